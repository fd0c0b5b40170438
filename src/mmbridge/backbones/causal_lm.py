"""Any transformers causal language model as the backbone: read by embeddings, frozen, with LoRA, or trainable as a whole.

Hidden states are those after the final norm (the ``hidden_states[-1]`` of transformers). Logits are computed only for
the positions that somebody reads.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmbridge import hub
from mmbridge.backbones.lora import Lora, add_lora
from mmbridge.errors import CheckpointError, ConfigError, ContextError
from mmbridge.registry import backbones

register = backbones.register
log = logging.getLogger("mmbridge")


@register("causal_lm")
class CausalLM(nn.Module):
    """A causal language model from a local folder, a hub id or a shipped name.

    Args:
        source: Where the model is.
        lora: Adapters to add (a ``Lora`` or its fields); None for none.
        trainable: Whether all weights can train, instead of adapters; they are then saved with the bridge, as large as they are.
        template: Chat template: a name in ``mmbridge.messages.template_names()``, Jinja source, or None for the tokenizer's own.
        stop: Text that ends a reply and is not part of it, beside the end-of-sequence token: for models that were trained
            without one.
        revision: Revision of a hub repository.
        dtype: Name of a torch dtype; None means float32 on a CPU, and on an accelerator bfloat16, or float32 where all weights
            can train, since small updates vanish in half precision.

    Raises:
        CheckpointError: The model can't be loaded.
        ConfigError: LoRA targets or template do not exist, the model changes its logits after the head, or both ``lora`` and
            ``trainable`` are given.
    """

    def __init__(
        self,
        source: str,
        *,
        lora: Lora | dict[str, Any] | None = None,
        trainable: bool = False,
        template: str | None = None,
        stop: str | None = None,
        revision: str | None = None,
        dtype: str | None = None,
    ):
        super().__init__()
        from transformers import AutoConfig, AutoModelForCausalLM

        if trainable and lora is not None:
            raise ConfigError(
                f"backbone {source!r} got both lora and trainable: true; give lora to train adapters, or trainable to train all."
            )
        self.source, self.revision, self._template = str(source), revision, template
        self.trainable = trainable
        self.stop = stop or ""
        self.lora = (
            Lora(**{**lora, "targets": tuple(lora.get("targets", Lora.targets))}) if isinstance(lora, dict) else lora
        )
        self._tokenizer: Any = None
        if torch.get_default_device().type == "meta":
            config = AutoConfig.from_pretrained(hub.resolve_config(source))
            self.model = AutoModelForCausalLM.from_config(config)
        else:
            path = hub.resolve(source, revision)
            half = torch.cuda.is_available() and not trainable
            chosen = getattr(torch, dtype) if dtype else torch.bfloat16 if half else torch.float32
            try:
                self.model = AutoModelForCausalLM.from_pretrained(path, dtype=chosen)
            except (OSError, ValueError, RuntimeError) as error:
                raise CheckpointError(f"backbone {source!r} can't be loaded: {error}") from error
        self.model.requires_grad_(trainable)
        self.model.eval()
        self.adapters = add_lora(self.model, self.lora) if self.lora else {}
        self._check_logits()

    def _check_logits(self) -> None:
        weight = self.model.get_input_embeddings().weight
        if weight.is_meta:
            return
        with torch.no_grad():
            ids = torch.tensor([[1, 2, 3]], device=weight.device)
            ours = self.model.get_output_embeddings()(self.model.base_model(input_ids=ids).last_hidden_state)
            if not torch.allclose(ours, self.model(input_ids=ids).logits, atol=1e-3, rtol=1e-3):
                raise ConfigError(
                    f"backbone {self.source!r} changes its logits after the head (soft-capping or scaling), which is not supported."
                )

    def train(self, mode: bool = True) -> "CausalLM":
        """Keep frozen layers in eval mode; only the dropout of adapters that train, and checkpointing, follow ``mode``."""
        whole = self.trainable and self.embedding.requires_grad
        super().train(mode and whole)
        if mode and not whole:
            adapting = any(parameter.requires_grad for parameter in self.adapters.values())
            for name, module in self.model.named_modules():
                if "lora_dropout" in name:
                    module.train(adapting)
                elif getattr(module, "gradient_checkpointing", False):
                    # transformers checkpoints a layer only where this flag is set; its parts stay in eval mode.
                    module.training = True
        return self

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters that can train, by part and name: ``lora``, ``weights``, or nothing."""
        weights = dict(self.model.named_parameters()) if self.trainable else {}
        return {name: dict(part) for name, part in (("lora", self.adapters), ("weights", weights)) if part}

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded when first used."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            path = hub.resolve(self.source, self.revision)
            try:
                self._tokenizer = AutoTokenizer.from_pretrained(path)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"the tokenizer of backbone {self.source!r} can't be loaded: {error}") from error
        return self._tokenizer

    @property
    def template(self) -> str:
        """The chat template: the one asked for, else the tokenizer's own.

        Raises:
            ConfigError: There is neither.
        """
        chosen = self._template or self.tokenizer.chat_template
        if not chosen:
            raise ConfigError(f"backbone {self.source!r} has no chat template; give template='vicuna' or 'plain'.")
        return str(chosen)

    @property
    def dim(self) -> int:
        """Width D of embeddings and hidden states."""
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def vocabulary_size(self) -> int:
        """Rows V of the base embedding; added tokens get ids from V on."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def embedding(self) -> Tensor:
        """The base embedding matrix (V, D)."""
        return self.model.get_input_embeddings().weight

    @property
    def context(self) -> int:
        """Longest sequence, in positions."""
        return int(getattr(self.model.config, "max_position_embeddings", 2**31))

    @property
    def eos(self) -> int:
        """Id of the end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's floating-point type."""
        return self.embedding.dtype

    def tokenize(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids and each token's character range in ``text``; adds no special tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def embed(self, ids: Tensor) -> Tensor:
        """Look up base embeddings: (...,) ids below V -> (..., D)."""
        return self.model.get_input_embeddings()(ids)

    def forward(
        self, embeddings: Tensor, mask: Tensor | None = None, positions: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """Run the decoder's layers.

        Args:
            embeddings: (B, T, D).
            mask: (B, S) with 1 at real positions of cache plus input, or (B, 1, T, S) boolean, True where attention is allowed.
            positions: (B, T) position ids; None counts from the cache's end.
            cache: A transformers cache to read and extend, or None.

        Returns:
            Hidden states after the final norm, (B, T, D).

        Raises:
            ContextError: More positions than the context holds.
        """
        total = embeddings.shape[1] + (cache.get_seq_length() if cache is not None else 0)
        if total > self.context:
            raise ContextError(
                f"the sequence has {total} positions but backbone {self.source!r} has a context of {self.context}; "
                "shorten the dialogue or use fewer media."
            )
        output = self.model.base_model(
            inputs_embeds=embeddings, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=cache is not None,
        )  # fmt: skip
        return output.last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the base vocabulary: (..., D) -> (..., V)."""
        return self.model.get_output_embeddings()(hidden)

    def new_cache(self) -> Any:
        """Return an empty key-value cache."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        # The second is what transformers called it before 5.20.
        enable = (
            getattr(self.model, "activation_checkpointing_enable", None) or self.model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
        # transformers makes embeddings of a model with adapters require gradients, which only reentrant checkpoints need.
        self.model.disable_input_require_grads()

    def describe(self) -> dict[str, Any]:
        """Return the manifest entry of the weights at ``source``, which are frozen or what training started from."""
        path = hub.resolve(self.source, self.revision)
        return {
            "source": self.source, "revision": self.revision, "sha256": hub.weights_sha256(path), "licence": hub.licence_of(path),
        }  # fmt: skip


@torch.no_grad()
def first_layer(folder: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """Return what the first decoder layer alone, with the final norm, makes of eight words: (1, 8, D), in float32.

    The words are spread over the vocabulary; only their rows and the tensors of that layer are read.

    Args:
        folder: Where the model's ``config.json`` lies.
        tensors: The model's weights by their names, on the CPU.

    Raises:
        CheckpointError: The model of this configuration can't be filled with them.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(folder)
        words = torch.linspace(0, config.vocab_size - 1, 8).long()
        config.num_hidden_layers, config.vocab_size, config.pad_token_id = 1, len(words), None
        with torch.device("meta"):
            model = AutoModel.from_config(config)
        embedding = model.get_input_embeddings().weight
        state = {}
        for name, value in model.named_parameters():
            stored = tensors[f"{model.base_model_prefix}.{name}"]
            state[name] = stored[words] if value is embedding else stored
        # not filled by hand, so that what is computed from the configuration (rotary frequencies) is made as it always is
        model = type(model).from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"the first layer of {folder} can't be opened ({error}).") from error
    hidden: Tensor = model(input_ids=torch.arange(len(words))[None], use_cache=False).last_hidden_state
    return hidden
