"""Any picture backbone of timm as an encoder: transformers, convolutional and hybrid networks.

Preprocessing comes from the model's own data configuration; its ``crop_pct`` is deliberately not applied, so that the
borders of a picture are seen. Nothing is downloaded unless ``pretrained`` is asked for.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge import hub
from mmbridge.encoders.base import Encoder, is_planning, load_strict
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.registry import encoders as registry
from mmbridge.registry import suggest
from mmbridge.specs import ImageInput, TokenSpec

register = registry.register


@register("timm", tiny={"model": "test_vit", "image_size": 32})
class Timm(Encoder):
    """A frozen timm backbone without its classifier.

    Args:
        model: Name in timm ("vit_base_patch16_224", with or without a pretrained tag).
        pretrained: Download and use timm's published weights.
        weights: A weights file, shipped folder or hub id instead; a classifier in it is left out.
        tokens: "patch" for all positions of the last feature map, prefix tokens dropped; "pooled" for one vector.
        image_size: Side of the picture, where the model lets it be chosen; None for the model's own.

    Shape: (B, 3, size, size) -> (B, T, D).

    Raises:
        ConfigError: Unknown model or option.
        CheckpointError: Weights that can't be had, read or don't fit.
    """

    modality = "image"

    def __init__(
        self,
        model: str,
        pretrained: bool = False,
        weights: str | Path | None = None,
        tokens: str = "patch",
        image_size: int | None = None,
    ):
        super().__init__()
        if tokens not in ("patch", "pooled"):
            raise ConfigError(f"Timm's tokens is {tokens!r} but must be 'patch' or 'pooled'.")
        if pretrained and weights is not None:
            raise ConfigError(f"Timm({model!r}) was given pretrained=True and weights={str(weights)!r}; choose one.")
        self.tokens = tokens
        self.options = {"model": model, "tokens": tokens}
        planning = is_planning()
        self.backbone = _create(model, pretrained and not planning, image_size)
        facts = self.backbone.pretrained_cfg
        if pretrained:
            self.source, self.licence = model, facts.get("license") or "unknown"
            self.file = None if planning else _find_cached(facts.get("hf_hub_id"))
        if weights is not None:
            self.source = str(weights)
        if weights is not None and not planning:
            self.file = _find_weights(hub.resolve(weights))
            self.licence = hub.licence_of(self.file.parent)
            load_strict(self.backbone, _read_tensors(self.file, facts.get("classifier")), f"timm weights {self.file}")
        self._input = _read_input(self.backbone, image_size)
        self.freeze()
        size = self._input.size
        tokens_of_blank = self(torch.zeros(1, 3, size, size, device=next(self.parameters()).device))
        self._spec = TokenSpec(*tokens_of_blank.shape[1:])

    @property
    def spec(self) -> TokenSpec:
        """Tokens of one picture and their width."""
        return self._spec

    @property
    def input(self) -> ImageInput:
        """Size, mean and standard deviation from the model's data configuration."""
        return self._input

    def encode(self, x: Tensor) -> Tensor:
        """Return the tokens of a batch."""
        features = self.backbone.forward_features(x)
        if self.tokens == "pooled":
            return self.backbone.forward_head(features, pre_logits=True).unsqueeze(1)
        if features.ndim == 3:
            return features[:, getattr(self.backbone, "num_prefix_tokens", 0) :]
        channels_last = getattr(self.backbone, "output_fmt", "NCHW") == "NHWC"
        return features.flatten(1, 2) if channels_last else features.flatten(2).transpose(1, 2)


def _create(model: str, pretrained: bool, image_size: int | None) -> Any:
    import timm

    if not timm.is_model(model):
        raise ConfigError(f"timm has no model {model!r}{suggest(model, timm.list_models())}")
    arguments: dict[str, Any] = {} if image_size is None else {"img_size": image_size}
    try:
        return timm.create_model(model, pretrained=pretrained, num_classes=0, **arguments)
    except TypeError as error:
        raise ConfigError(f"timm's {model!r} lets no image_size be chosen; leave it out.") from error
    except Exception as error:  # every failure of the download has the same remedy
        if not pretrained:
            raise ConfigError(f"timm can't build {model!r}: {error}") from error
        raise CheckpointError(
            f"timm's weights of {model!r} are not in the cache and could not be downloaded ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); connect once, or give weights= a file."
        ) from error


def _find_cached(repository: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repository, "model.safetensors") if repository else None
    return Path(found) if isinstance(found, str) else None


def _find_weights(path: Path) -> Path:
    found = path if path.is_file() else path / "model.safetensors"
    if not found.is_file():
        raise CheckpointError(f"{path} has no model.safetensors; name the weights file itself.")
    return found


def _read_tensors(file: Path, classifier: str | tuple[str, ...] | None) -> dict[str, Tensor]:
    import timm

    try:
        state = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # any reader's error: the file is not weights
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} can't be read as weights ({reason}); get it anew.") from error
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    prefixes = tuple(f"{name}." for name in names)
    return {name: tensor for name, tensor in state.items() if not name.startswith(prefixes)}


def _read_input(backbone: Any, image_size: int | None) -> ImageInput:
    from timm.data.config import resolve_data_config

    facts = resolve_data_config({} if image_size is None else {"img_size": image_size}, model=backbone)
    _, height, width = facts["input_size"]
    if height != width:
        raise ConfigError(f"Timm reads square pictures only, but this model wants {height} x {width}; choose another.")
    resize = "squash" if facts.get("crop_mode") == "squash" else "crop"
    return ImageInput(height, tuple(facts["mean"]), tuple(facts["std"]), resize)
