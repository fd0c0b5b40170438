"""Any picture tower of open_clip (CLIP, SigLIP, EVA, ...) as an encoder.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. The
text tower is dropped. Nothing is downloaded unless pretrained weights are named.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge import hub
from mmbridge.encoders.base import Encoder, is_planning
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.registry import encoders as registry
from mmbridge.registry import suggest
from mmbridge.specs import ImageInput, TokenSpec

register = registry.register

RESIZE = {"shortest": "crop", "longest": "pad", "squash": "squash"}
SMALLEST_TEXT_TOWER = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
TINY_TOWER = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}


@register("open_clip", tiny={"model": {"embed_dim": 12, "vision_cfg": TINY_TOWER}})
class OpenClip(Encoder):
    """A frozen picture tower of open_clip.

    Args:
        model: Built-in name ("ViT-B-32"), a folder or hub id with ``open_clip_config.json``, or the model configuration
            itself: ``{"embed_dim": ..., "vision_cfg": {...}}``.
        pretrained: Tag ("laion2b_s34b_b79k", downloaded) or weights file of a built-in model; None for random weights.
        tokens: "patch" for the patch tokens of the last block after its norm (before it, where the model pools by
            attention); "pooled" for the image embedding as ``encode_image`` gives it, not normalised.

    Shape: (B, 3, size, size) -> (B, T, D).

    Raises:
        ConfigError: Unknown model, tag or option.
        CheckpointError: Weights that can't be had or read.
    """

    modality = "image"

    def __init__(self, model: str | dict[str, Any], pretrained: str | None = None, tokens: str = "patch"):
        super().__init__()
        if tokens not in ("patch", "pooled"):
            raise ConfigError(f"OpenClip's tokens is {tokens!r} but must be 'patch' or 'pooled'.")
        self.tokens = tokens
        self.options = {"model": model, "tokens": tokens}
        clip = self._create(model, pretrained)
        self.visual = clip.visual
        self._input = _read_input(clip)
        self.freeze()
        size = self._input.size
        tokens_of_blank = self(torch.zeros(1, 3, size, size, device=next(self.parameters()).device))
        self._spec = TokenSpec(*tokens_of_blank.shape[1:])

    def _create(self, model: str | dict[str, Any], pretrained: str | None) -> Any:
        import open_clip

        arguments: dict[str, Any] = {"device": torch.get_default_device()}
        if isinstance(model, dict):
            name, arguments = "ViT-B-32", {**arguments, "text_cfg": SMALLEST_TEXT_TOWER, **model}
        elif (name := model.replace("/", "-")) not in open_clip.list_models():
            return self._create_from_folder(model, pretrained)
        if pretrained is not None:
            self.source = f"{model}:{pretrained}" if isinstance(model, str) else pretrained
        if pretrained is None or is_planning():
            return open_clip.create_model(name, **{"text_cfg": SMALLEST_TEXT_TOWER, **arguments})
        self.file = _find_file(name, pretrained)
        try:
            return open_clip.create_model(name, pretrained=pretrained, **arguments)
        except Exception as error:  # open_clip passes on the errors of every reader that it tries
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"open_clip could not load {pretrained!r} into {name!r} ({reason}); give the weights that belong to it."
            ) from error

    def _create_from_folder(self, model: str, pretrained: str | None) -> Any:
        import open_clip

        if "/" not in model and not Path(model).exists():
            raise ConfigError(f"open_clip has no model {model!r}{suggest(model, open_clip.list_models())}")
        if pretrained is not None:
            raise ConfigError(f"OpenClip({model!r}) brings its own weights; leave out pretrained={pretrained!r}.")
        self.source = model
        if is_planning():
            folder = hub.resolve_config(model)
            return open_clip.create_model(f"local-dir:{folder}", load_weights=False, device="meta")
        folder = hub.resolve(model)
        found = [file for name in ("*.safetensors", "*.bin", "*.pt", "*.pth") for file in sorted(folder.glob(name))]
        if not found or not (folder / "open_clip_config.json").exists():
            raise CheckpointError(
                f"{folder} is not an open_clip model: it needs open_clip_config.json and weights such as "
                "open_clip_model.safetensors; name another folder or hub id."
            )
        self.file = found[0]
        self.licence = hub.licence_of(folder)
        try:
            return open_clip.create_model(f"local-dir:{folder}", require_pretrained=True)
        except Exception as error:  # open_clip passes on the errors of every reader that it tries
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"open_clip could not load {folder} ({reason}); restore the folder.") from error

    @property
    def spec(self) -> TokenSpec:
        """Tokens of one picture and their width."""
        return self._spec

    @property
    def input(self) -> ImageInput:
        """Size, mean and standard deviation from the model's own configuration."""
        return self._input

    def encode(self, x: Tensor) -> Tensor:
        """Return the tokens of a batch."""
        if self.tokens == "pooled":
            pooled = self.visual(x)
            return (pooled[0] if isinstance(pooled, tuple) else pooled).unsqueeze(1)
        # CoCa's norm stands behind its attention pool and has another width
        norm = getattr(self.visual, "attn_pool", None) is None
        output = self.visual.forward_intermediates(x, indices=1, normalize_intermediates=norm, intermediates_only=True)
        return output["image_intermediates"][-1].flatten(2).transpose(1, 2)  # (B, D, H, W) -> (B, T, D)


def _find_file(name: str, pretrained: str) -> Path:
    import open_clip

    if Path(pretrained).is_file():
        return Path(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        raise ConfigError(
            f"{pretrained!r} is neither a weights file nor a tag of open_clip's {name!r}{suggest(pretrained, tags)}"
        )
    try:
        return Path(open_clip.download_pretrained(open_clip.get_pretrained_cfg(name, pretrained)))
    except Exception as error:  # every failure of the download has the same remedy
        raise CheckpointError(
            f"the open_clip weights {name}:{pretrained} are not in the cache and could not be downloaded "
            f"({type(error).__name__}); connect once, or give pretrained= a weights file."
        ) from error


def _read_input(clip: Any) -> ImageInput:
    import open_clip

    facts = open_clip.get_model_preprocess_cfg(clip)
    sides = {facts["size"]} if isinstance(facts["size"], int) else set(facts["size"])
    if len(sides) != 1:
        raise ConfigError(f"OpenClip reads square pictures only, but this model wants {facts['size']}; choose another.")
    return ImageInput(sides.pop(), tuple(facts["mean"]), tuple(facts["std"]), RESIZE[facts["resize_mode"]])
