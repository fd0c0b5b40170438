"""AudioLDM 2 as a decoder: generated states and T5 states steer a UNet on latents of a log-mel VAE.

Source: Liu et al., "AudioLDM 2: Learning Holistic Audio Generation with Self-supervised Pretraining", arXiv 2308.05734. A
GPT-2 continues what CLAP and T5 make of a caption by a few states, its "language of audio"; the UNet attends to those, and
in other layers to T5's states. Text to speech and CLAP's audio branch as a judge are deliberately absent.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbridge.decoders.audioldm import AudioLDM
from mmbridge.decoders.latent_diffusion import import_pipeline, join_mask, split_mask
from mmbridge.errors import ConfigError
from mmbridge.registry import decoders as registry
from mmbridge.specs import ConditionSpec

register = registry.register


@register("audioldm2")
class AudioLDM2(AudioLDM):
    """A frozen AudioLDM 2: (B, generated + tokens, dim) -> B sounds.

    The UNet attends to two sequences, which a condition holds one after the other, filled with zeros to the same width:

    - positions 0 to ``generated`` - 1: the states that GPT-2 generates, of its width;
    - the ``tokens`` positions after them: T5's states of the caption, of T5's width, zero at padding;
    - the last number of every position: 1 where it is attended to, 0 at padding, decided at a half.

    Captions are encoded one by one: the pipeline pads them to the longest of a batch, and GPT-2 counts the padding, so that
    its states would depend on a caption's neighbours.

    Args:
        source: A diffusers folder: shipped name, local path or hub id.
        steps: Sampling steps; None takes the folder's own (``mmbridge.json``), else 200.
        guidance: Classifier-free guidance; None takes the folder's own, else 3.5. Up to 1 means none.
        seconds: Length of the sounds; None takes the folder's own, else what the UNet was trained for.
        tokens: Positions for T5's states; longer captions are cut.
        dtype: "float32", "bfloat16" or "float16", or the torch dtype.
        revision: Branch, tag or commit of a hub repository.
        offload: Keep components on the CPU and bring each to the device only while it works.

    Example:
        >>> decoder = AudioLDM2("cvssp/audioldm2")
        >>> condition, mask = decoder.encode(["rain on a tin roof"])
        >>> decoder.sample(condition, seed=1)[0].save("rain.wav")
    """

    kind = "AudioLDM 2"
    default_guidance = 3.5
    encoders = ("text_encoder", "text_encoder_2", "projection_model", "language_model")
    cached_components = (*encoders, "tokenizer", "tokenizer_2", "vae")
    classes = {
        "text_encoder": "transformers.ClapModel",
        "text_encoder_2": "transformers.T5EncoderModel",
        "projection_model": "diffusers.AudioLDM2ProjectionModel",
        "language_model": "transformers.GPT2Model",
        "tokenizer": None,
        "tokenizer_2": None,
        "unet": "diffusers.AudioLDM2UNet2DConditionModel",
        "vae": "diffusers.AutoencoderKL",
        "vocoder": "transformers.SpeechT5HifiGan",
        "scheduler": None,
    }

    def __init__(
        self,
        source: str | Path,
        steps: int | None = None,
        guidance: float | None = None,
        seconds: float | None = None,
        tokens: int = 64,
        dtype: str | torch.dtype = "float32",
        revision: str | None = None,
        offload: bool = False,
    ):
        super().__init__(source, steps, guidance, seconds, dtype, revision, offload)
        if tokens < 1:
            raise ConfigError(f"the decoder has tokens={tokens} positions for a caption but needs at least 1.")
        self._tokens = tokens

    @cached_property
    def spec(self) -> ConditionSpec:
        """Shape of one condition: generated states, then the caption's, and whether they are attended to.

        Raises:
            CheckpointError: A configuration is missing or incomplete.
            ShapeError: The components do not fit together.
        """
        generated, states = self._widths
        attended = [list(widths)[1:] for widths in self._read("unet", "cross_attention_dim")]
        if any(widths != [generated, states] for widths in attended):
            raise self._misfit(
                f"its UNet attends to states of widths {attended[0]} but its language model and second text encoder "
                f"give {[generated, states]}; take all from the same model."
            )
        clap, projected = (
            self._read("text_encoder", "projection_dim"),
            self._read("projection_model", "text_encoder_dim"),
        )
        if clap != projected:
            raise self._misfit(
                f"its text encoder projects to width {clap} but its projection model takes {projected}; take both from "
                "the same model."
            )
        self._check_sound()
        return ConditionSpec(tokens=self._generated + self._tokens, dim=max(generated, states) + 1)

    @property
    def _generated(self) -> int:
        return int(self.components.config("language_model").get("max_new_tokens") or 8)

    @property
    def _widths(self) -> tuple[int, int]:
        return self._read("language_model", "n_embd"), self._read("text_encoder_2", "d_model")

    @property
    def caption_tokens(self) -> int:
        """Positions of a caption that CLAP reads."""
        return int(self._read("tokenizer", "model_max_length"))

    def options(self) -> dict[str, Any]:
        """Whatever changes ``encode`` and ``target`` besides weights; part of the fingerprint."""
        return {**super().options(), "generated": self._generated, "states": self._tokens}

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return what the UNet attends to, as diffusers' pipeline makes it of a single caption.

        Returns:
            Condition (B, generated + tokens, dim); mask (B, generated + tokens), False at padding.

        Raises:
            ConfigError: There is no caption, or a string in place of a list.
        """
        ids, seen = self._tokenize(captions, self.caption_tokens)
        with self.using(*self.encoders):
            rows = [self._encode_one(ids[[row]], seen[[row]], caption) for row, caption in enumerate(captions)]
        condition = torch.stack(rows)
        return condition, split_mask(condition)[1]

    def _encode_one(self, ids: Tensor, seen: Tensor, caption: str) -> Tensor:
        """Return one condition (generated + tokens, dim) of CLAP's ids and mask (1, T) and the caption."""
        clap = self.component("text_encoder").get_text_features(ids, attention_mask=seen)
        clap = getattr(clap, "pooler_output", clap)[:, None]  # (1, 1, D); transformers 4 returns the tensor itself
        words, mask = self._tokenize([caption], self._tokens, "tokenizer_2", pad=False)
        states = self.component("text_encoder_2")(words, attention_mask=mask).last_hidden_state  # (1, T, D)
        read = self.component("projection_model")(clap, states, torch.ones_like(mask[:, :1]), mask).hidden_states
        for _ in range(self._generated):
            latest = self.component("language_model")(inputs_embeds=read).last_hidden_state[:, -1:]
            read = torch.cat([read, latest], dim=1)
        padding = self._tokens - states.shape[1]
        width = self.spec.dim - 1
        parts = [
            join_mask(F.pad(part, (0, width - part.shape[-1])), torch.ones_like(part[..., 0]))
            for part in (read[:, -self._generated :], states)
        ]
        return F.pad(torch.cat(parts, dim=1)[0], (0, 0, 0, padding))

    def _split(self, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return generated states (B, G, D), T5's states (B, T, E) and their mask (B, T)."""
        generated, width = self._widths
        states, mask = split_mask(condition[:, self._generated :])
        return condition[:, : self._generated, :generated], states[..., :width], mask

    def denoise(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """Return the UNet's prediction for noisy latents (B, C, time, frequency) at timesteps (B,)."""
        generated, states, mask = self._split(condition)
        return self.component("unet")(  # type: ignore[no-any-return]
            noisy,
            timesteps,
            encoder_hidden_states=generated,
            encoder_hidden_states_1=states,
            encoder_attention_mask_1=mask.to(noisy),
        ).sample

    def _pipeline(self, scheduler: Any) -> Any:
        return import_pipeline("AudioLDM2Pipeline", "0.42")(
            vae=self.component("vae"),
            text_encoder=None,
            text_encoder_2=self.component("vocoder"),  # these two are asked for their dtype only
            language_model=self.component("vocoder"),
            projection_model=None,
            tokenizer=None,
            tokenizer_2=None,
            feature_extractor=None,
            unet=self.component("unet"),
            scheduler=scheduler,
            vocoder=self.component("vocoder"),
        )

    def _prompt(self, condition: Tensor, empty: Tensor | None) -> dict[str, Any]:
        prompt: dict[str, Any] = {}
        for prefix, source in (("", condition), ("negative_", empty)):
            if source is not None:
                generated, states, mask = self._split(source)
                prompt |= {
                    f"{prefix}prompt_embeds": states,
                    f"{prefix}generated_prompt_embeds": generated,
                    f"{prefix}attention_mask": mask.long(),
                }
        return prompt
