"""ImageBind: one embedding space for pictures, videos, text, sound, depth, heat and motion.

Source: Girdhar et al., "ImageBind: One Embedding Space To Bind Them All", arXiv 2305.05665; written from the paper and
from the names and shapes of the published tensors. Only the towers asked for are created and read from disk. The
published weights (imagebind_huge.pth) are CC BY-NC-SA 4.0 and are not part of this library.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mmbridge import hub
from mmbridge.encoders.base import Encoder, is_planning, load_strict
from mmbridge.encoders.imagebind_modules import (
    MODALITY_TO_TOWER,
    ImageBindConfig,
    Trunk,
    create_head,
    create_postprocessor,
    create_preprocessor,
    initialise,
)
from mmbridge.errors import CheckpointError, ConfigError, MissingExtraError
from mmbridge.registry import encoders as registry
from mmbridge.registry import suggest
from mmbridge.specs import AudioInput, DisparityInput, ImageInput, ImuInput, InputSpec, TokenSpec, VideoInput

register = registry.register

_GROUPS = ("modality_preprocessors", "modality_trunks", "modality_heads", "modality_postprocessors")
_shared: WeakValueDictionary[tuple[object, ...], "ImageBindModel"] = WeakValueDictionary()


class ImageBindModel(nn.Module):
    """Towers of ImageBind with the state dict keys of the published weights; trainable, for contrastive learning.

    Args:
        config: Sizes of every tower.
        modalities: What to build ("image", "video", "text", "audio", "depth", "thermal", "imu"); None for all.
        tokenizer: A tokenizer.json for the text tower; None for CLIP's vocabulary, which comes with open_clip.

    Raises:
        ConfigError: Unknown modality, or one that the configuration has no tower for.
    """

    def __init__(
        self, config: ImageBindConfig, modalities: Sequence[str] | None = None, tokenizer: str | Path | None = None
    ):
        super().__init__()
        self.config = config
        self.tokenizer_file = Path(tokenizer) if tokenizer is not None else None
        names = config.towers if modalities is None else [find_tower(config, modality) for modality in modalities]
        self.towers = tuple(dict.fromkeys(names))
        self.modality_preprocessors = nn.ModuleDict()
        self.modality_trunks = nn.ModuleDict()
        self.modality_heads = nn.ModuleDict()
        self.modality_postprocessors = nn.ModuleDict()
        for tower in self.towers:
            sizes = getattr(config, tower)
            self.modality_preprocessors[tower] = create_preprocessor(tower, sizes)
            self.modality_trunks[tower] = Trunk(tower, sizes.dim, sizes.depth, sizes.heads)
            self.modality_heads[tower] = create_head(tower, sizes.dim, config.embed_dim)
            self.modality_postprocessors[tower] = create_postprocessor(tower)
        initialise(self)

    @classmethod
    def from_pretrained(
        cls, weights: str | Path, modalities: Sequence[str] | None = None, config: ImageBindConfig | None = None
    ) -> "ImageBindModel":
        """Read towers from a folder, a ``.safetensors`` or ``.pth`` file, a shipped name or a hub id.

        Args:
            weights: Where the weights are; sizes come from a ``config.json`` beside them.
            modalities: What to read; None for all towers of the configuration.
            config: Sizes, instead of those of ``config.json``; without either the published "huge" sizes hold.

        Raises:
            CheckpointError: No weights there, unreadable, or not of these sizes.
        """
        file = find_weights(hub.resolve(weights))
        config = config or read_config(file.parent)
        tokenizer = file.with_name("tokenizer.json")
        with torch.device("meta"):
            model = cls(config, modalities, tokenizer if tokenizer.exists() else None)
        load_strict(model, read_tensors(file, model.towers), f"ImageBind weights {file}")
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and, if there is one, ``tokenizer.json``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = ImageBindConfig(self.config.embed_dim, **{tower: getattr(self.config, tower) for tower in self.towers})
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        if self.tokenizer_file is not None and self.tokenizer_file != folder / "tokenizer.json":
            (folder / "tokenizer.json").write_bytes(self.tokenizer_file.read_bytes())

    def forward(self, modality: str, x: Tensor, pooled: bool = True) -> Tensor:
        """Return L2-normalised embeddings (B, S, T, D) of S clips; T is 1 where ``pooled``.

        Args:
            modality: What ``x`` is.
            x: (B, ...) as the tower takes it, or (B, S, ...) for clips of video (6 dimensions) and audio (5).
            pooled: The class token (text: the end-of-text token) alone, or all tokens but the class token.
        """
        tower = find_tower(self.config, modality)
        if tower not in self.towers:
            raise ConfigError(f"this ImageBind was built with the towers {', '.join(self.towers)}, not with {tower!r}.")
        has_clips = x.ndim == {"vision": 6, "audio": 5}.get(tower)
        flat = x.flatten(0, 1) if has_clips else x  # (B * S, ...)
        hidden = self.modality_trunks[tower](self.modality_preprocessors[tower](flat))
        if tower != "text":
            hidden = hidden[:, :1] if pooled else hidden[:, 1:]
        elif pooled:
            ends = x.eq(getattr(self.config, tower).eot).int().argmax(dim=1)
            hidden = hidden[torch.arange(len(x), device=x.device), ends].unsqueeze(1)
        embeddings = F.normalize(self.modality_heads[tower](hidden), dim=-1)
        return embeddings.unflatten(0, (len(x), x.shape[1] if has_clips else 1))

    def embed(self, modality: str, x: Tensor) -> Tensor:
        """Return one embedding per medium (B, D): the mean of its clips' unit vectors, with gradients."""
        return self(modality, x, pooled=True).mean(dim=1).squeeze(1)

    def tokens(self, modality: str, x: Tensor) -> Tensor:
        """Return all tokens (B, T, D), each the mean of its clips' unit vectors, with gradients."""
        return self(modality, x, pooled=False).mean(dim=1)

    def logit_scale(self, modality: str) -> Tensor:
        """Return the factor, at most 100, by which the published model multiplies this modality's embeddings."""
        return self.modality_postprocessors[find_tower(self.config, modality)](torch.ones(()))

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return token ids (B, context): start token, text cut to fit, end token, zeros.

        Raises:
            ConfigError: The model has no text tower, or a vocabulary of its own without a tokenizer.json.
        """
        sizes = self.config.text
        if sizes is None:
            raise ConfigError("this ImageBind has no text tower; use weights or a configuration with one.")
        ids = torch.zeros(len(texts), sizes.context, dtype=torch.long)
        for row, text in enumerate(texts):
            pieces = [sizes.sot, *self._split(text)[: sizes.context - 2], sizes.eot]
            ids[row, : len(pieces)] = torch.tensor(pieces)
        return ids

    def _split(self, text: str) -> list[int]:
        if self.tokenizer_file is not None:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        return list(self._tokenizer.encode(text))

    @cached_property
    def _tokenizer(self) -> Any:
        if self.tokenizer_file is not None:
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(self.tokenizer_file))
        try:
            from open_clip.tokenizer import SimpleTokenizer
        except ModuleNotFoundError as error:
            raise MissingExtraError("ImageBind's text tokens need open_clip: pip install open_clip_torch") from error
        tokenizer = SimpleTokenizer()
        size = self.config.text.vocabulary if self.config.text else 0
        if tokenizer.vocab_size != size:
            raise ConfigError(
                f"ImageBind's text tower has {size} tokens but no tokenizer.json, and CLIP's own vocabulary has "
                f"{tokenizer.vocab_size}; put the tokenizer.json it was trained with beside its weights."
            )
        return tokenizer


def find_tower(config: ImageBindConfig, modality: str) -> str:
    """Return the tower that serves a modality.

    Raises:
        ConfigError: Unknown modality, or a configuration without its tower.
    """
    tower = MODALITY_TO_TOWER.get(modality)
    if tower is None:
        raise ConfigError(f"ImageBind has no modality {modality!r}{suggest(modality, list(MODALITY_TO_TOWER))}")
    if getattr(config, tower) is None:
        raise ConfigError(
            f"these ImageBind weights have no {tower} tower, so they can't encode {modality!r}; "
            f"they have: {', '.join(config.towers)}."
        )
    return tower


def find_weights(path: Path) -> Path:
    """Return the weights file in a folder, or the file itself.

    Raises:
        CheckpointError: No file, or several in a folder that don't have the usual name.
    """
    if path.is_file():
        return path
    usual = path / "model.safetensors"
    found = [usual] if usual.exists() else sorted([*path.glob("*.safetensors"), *path.glob("*.pth")])
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise CheckpointError(
            f"{path} should hold one ImageBind weights file (model.safetensors, or one .safetensors or .pth file) but "
            f"has {names}; name the file itself."
        )
    return found[0]


def read_config(folder: Path) -> ImageBindConfig:
    """Return the sizes in a folder's ``config.json``, or the published "huge" sizes if there is none."""
    path = folder / "config.json"
    if not path.exists():
        return ImageBindConfig.huge()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not JSON ({error}); restore the one that belongs to these weights."
        ) from error
    return ImageBindConfig.from_dict(values)


def read_tensors(file: Path, towers: Sequence[str]) -> dict[str, Tensor]:
    """Return the tensors of the named towers from a ``.safetensors`` or ``.pth`` file; others are not read.

    Raises:
        CheckpointError: The file can't be read.
    """
    prefixes = tuple(f"{group}.{tower}." for group in _GROUPS for tower in towers)
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stream:
                return {name: stream.get_tensor(name) for name in stream.keys() if name.startswith(prefixes)}  # noqa: SIM118
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{file} can't be read as safetensors or .pth weights ({reason}); replace it.") from error
    return {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}


def _share(weights: str | Path, modality: str, config: ImageBindConfig | None) -> tuple[ImageBindModel, Path | None]:
    """Read one tower, or return the one that another encoder already holds: image and video share vision."""
    if is_planning():
        place = hub.resolve_config(weights)
        sizes = config or read_config(place.parent if place.is_file() else place)
        key: tuple[object, ...] = (place, find_tower(sizes, modality), sizes)
        planned = _shared.get(key)
        if planned is None:
            planned = _shared[key] = ImageBindModel(sizes, (modality,))
        return planned, None
    file = find_weights(hub.resolve(weights)).resolve()
    sizes = config or read_config(file.parent)
    status = file.stat()
    key = (file, status.st_mtime_ns, status.st_size, find_tower(sizes, modality), sizes)
    model = _shared.get(key)
    if model is None:
        model = _shared[key] = ImageBindModel.from_pretrained(file, (modality,), sizes)
    return model, file


TINY = {
    "modality": "image",
    "config": {"embed_dim": 12, "vision": {"dim": 16, "depth": 2, "heads": 2, "image_size": 16, "patch": 8}},
}


@register("imagebind", tiny=TINY)
class ImageBind(Encoder):
    """One frozen ImageBind tower as an encoder.

    Args:
        modality: "image", "video", "audio", "text", "depth", "thermal" or "imu"; image and video share a tower in memory.
        weights: Folder, file, shipped name or hub id; None for random weights of the given ``config``.
        tokens: "patch" for every patch token through the head, class token dropped; "pooled" for the class token alone (text: the
            end-of-text token, and nothing else is offered).
        clips: "mean" over clips of video or audio after normalising (as published), or "concat" to keep their order.
        config: Sizes; None to take those beside the weights.

    Shape: (B, ...) -> (B, T, D), each token L2-normalised before the mean over clips, without the logit scale.

    Raises:
        ConfigError: Unknown modality or option, or neither weights nor config.
        CheckpointError: Weights that can't be read or don't fit.
    """

    def __init__(
        self,
        modality: str,
        weights: str | Path | None = None,
        tokens: str = "patch",
        clips: str = "mean",
        config: ImageBindConfig | dict[str, Any] | None = None,
    ):
        super().__init__()
        for option, value, accepted in (("tokens", tokens, ("patch", "pooled")), ("clips", clips, ("mean", "concat"))):
            if value not in accepted:
                raise ConfigError(f"ImageBind's {option} is {value!r} but must be {accepted[0]!r} or {accepted[1]!r}.")
        if modality == "text" and tokens != "pooled":
            raise ConfigError(
                "ImageBind gives a text one token: pass tokens='pooled', or for text use ImageBindModel.embed."
            )
        sizes = ImageBindConfig.from_dict(config) if isinstance(config, dict) else config
        if weights is not None:
            self.model, self.file = _share(weights, modality, sizes)
            self.source = str(weights)
        elif sizes is not None:
            self.model = ImageBindModel(sizes, (modality,))
        else:
            raise ConfigError(
                "ImageBind needs weights (a folder, a file, a shipped name such as 'mmbridge/...' or a hub id) or, for "
                "random weights, a config; pass one of them."
            )
        self.modality = modality
        self.tower = find_tower(self.model.config, modality)
        self.sizes = getattr(self.model.config, self.tower)
        self.tokens, self.clips = tokens, clips
        self.options = {"tokens": tokens, "clips": clips, "heads": self.sizes.heads}
        if weights is not None and self.sizes == getattr(ImageBindConfig.huge(), self.tower):
            self.licence = "CC-BY-NC-SA-4.0"
        elif self.file is not None:
            self.licence = hub.licence_of(self.file.parent)
        self.freeze()

    @property
    def spec(self) -> TokenSpec:
        """Tokens of one medium and their width."""
        repeats = 1
        if self.clips == "concat" and isinstance(self.input, VideoInput):
            repeats = self.input.clips * self.input.crops
        elif self.clips == "concat" and isinstance(self.input, AudioInput):
            repeats = self.input.clips
        return TokenSpec(repeats * (1 if self.tokens == "pooled" else self.sizes.tokens), self.model.config.embed_dim)

    @property
    def input(self) -> InputSpec | None:
        """What ``prepare`` makes of files; None for text and thermal."""
        sizes = self.sizes
        if self.modality == "image":
            return ImageInput(sizes.image_size, sizes.mean, sizes.std)
        if self.modality == "video":
            return VideoInput(
                sizes.image_size,
                sizes.mean,
                sizes.std,
                clips=sizes.video_clips,
                frames=sizes.frames,
                seconds=sizes.video_seconds,
                crops=sizes.video_crops,
            )
        if self.modality == "audio":
            return AudioInput(
                sizes.sample_rate, sizes.mel_bins, sizes.frames, sizes.clips, sizes.seconds, sizes.mean, sizes.std
            )
        if self.modality == "depth":
            return DisparityInput(sizes.image_size)
        if self.modality == "imu":
            return ImuInput(sizes.sample_rate, sizes.steps)
        return None

    def prepare(self, medium: Any) -> Tensor:
        """Turn one medium, or a text, into raw input without a batch dimension.

        Raises:
            MediaError: Thermal is given as tensors only.
        """
        return self.model.tokenize([medium])[0] if self.modality == "text" else super().prepare(medium)

    def encode(self, x: Tensor) -> Tensor:
        """Return the tokens of a batch."""
        embeddings = self.model(self.modality, x, pooled=self.tokens == "pooled")  # (B, S, T, D)
        return embeddings.mean(dim=1) if self.clips == "mean" else embeddings.flatten(1, 2)
