"""OneLLM's universal encoder: one frozen CLIP transformer that reads every modality through a tokenizer of its own.

Source: Han et al., "OneLLM: One Framework to Align All Modalities with Language", arXiv 2312.03700, section 3.1; the
transformer is that of Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmbridge import hub
from mmbridge.encoders.base import Encoder, is_planning, load_strict
from mmbridge.encoders.imagebind_modules import Attention, initialise
from mmbridge.encoders.tokenizers import (
    KINDS,
    AudioSizes,
    FmriSizes,
    ImageSizes,
    ImuSizes,
    PointSizes,
    Tokenizer,
    interpolate_positions,
    waves,
)
from mmbridge.errors import CheckpointError, ConfigError, ShapeError
from mmbridge.registry import encoders as registry
from mmbridge.registry import suggest
from mmbridge.schema import build, mapping
from mmbridge.specs import InputSpec, MapInput, TokenSpec, VideoInput

register = registry.register

TOKENIZERS = {
    "image": "image",
    "video": "image",
    "depth": "image",
    "normal": "image",
    "audio": "audio",
    "pointcloud": "pointcloud",
    "imu": "imu",
    "fmri": "fmri",
}
"""The tokenizer of each modality; one that another package brings has a tokenizer of its own name."""

_SHAPES = {
    "image": ("(B, 3, H, W)", (4,)),
    "video": ("(B, frames, 3, H, W) or (B, clips, 3, frames, H, W)", (5, 6)),
    "depth": ("the picture and its map, (B, 2, 3, H, W)", (5,)),
    "normal": ("the picture and its map, (B, 2, 3, H, W)", (5,)),
    "audio": ("(B, 1, mel bins, frames) or (B, clips, 1, mel bins, frames)", (4, 5)),
    "pointcloud": ("(B, points, channels), or (B, groups, neighbours, channels)", (3, 4)),
    "imu": ("(B, channels, steps)", (3,)),
    "fmri": ("(B, voxels) or (B, 1, voxels)", (2, 3)),
}
_shared: WeakValueDictionary[tuple[object, ...], "Transformer"] = WeakValueDictionary()


class QuickGELU(nn.Module):
    """The GELU approximation that OpenAI's CLIP was trained with: x sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of each number."""
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


@dataclass(frozen=True)
class UniversalConfig:
    """Sizes of the transformer and of the tokenizers; one that is None does not exist.

    Raises:
        ConfigError: Heads that do not divide the width, or an unknown activation.
    """

    dim: int = 1024
    depth: int = 24
    heads: int = 16
    dim_feedforward: int = 4096
    activation: str = "quick_gelu"
    image: ImageSizes | None = None
    audio: AudioSizes | None = None
    pointcloud: PointSizes | None = None
    imu: ImuSizes | None = None
    fmri: FmriSizes | None = None
    others: dict[str, Any] = field(default_factory=dict, hash=False, metadata={"in_file": False})
    """Sizes of the tokenizers of other packages (see ``register_tokenizer``)."""

    def __post_init__(self) -> None:
        if self.heads < 1 or self.dim % self.heads:
            raise ConfigError(f"a universal encoder of width {self.dim} can't have heads={self.heads}; take a divisor.")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"the universal encoder has no activation {self.activation!r}{suggest(self.activation, list(ACTIVATIONS))}"
            )

    @classmethod
    def published(cls) -> "UniversalConfig":
        """Return the sizes of OneLLM-7B's encoder: CLIP ViT-L/14 with all tokenizers."""
        return cls(**{name: KINDS[name][0]() for name in set(TOKENIZERS.values())})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "UniversalConfig":
        """Build from nested plain data, the inverse of ``to_dict``.

        Raises:
            ConfigError: An unknown key, named with close matches.
        """
        inner = {
            name: _from_dict(KINDS[name][0], sizes, f"{name}.")
            for name, sizes in values.items()
            if name in KINDS and isinstance(sizes, dict)
        }
        own, others = _apart(inner)
        plain = {key: value for key, value in values.items() if key not in others}
        return replace(_from_dict(cls, {**plain, **own}, ""), others=others)

    @classmethod
    def from_plain(cls, value: Any, path: str) -> "UniversalConfig":
        """Check a section of a recipe; ``path`` names it in errors.

        Raises:
            ConfigError: An unknown key or a wrong value.
        """
        own, others = _apart(mapping(value, path))
        sizes = {name: build(KINDS[name][0], given, f"{path}.{name}") for name, given in others.items()}
        return replace(build(cls, own, path), others=sizes)

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data for JSON; absent tokenizers are left out."""
        plain = asdict(self)
        others = plain.pop("others")
        return {key: value for key, value in plain.items() if value is not None} | others

    @property
    def tokenizers(self) -> dict[str, Any]:
        """The sizes of the tokenizers that there are, by kind."""
        own = {name: getattr(self, name) for name in dict.fromkeys(TOKENIZERS.values())}
        return {name: sizes for name, sizes in own.items() if sizes is not None} | self.others


def _apart(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part the tokenizers of other packages from what a configuration of mmbridge's own has."""
    others = {name for name in values if name in KINDS and name not in TOKENIZERS.values()}
    return {key: values[key] for key in values if key not in others}, {key: values[key] for key in others}


def _from_dict(kind: Any, values: dict[str, Any], path: str) -> Any:
    known = [entry.name for entry in fields(kind) if entry.name != "others"]
    for key in values:
        if key not in known:
            raise ConfigError(f"a universal encoder's configuration has no key {path + key!r}{suggest(key, known)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


class Block(nn.Module):
    """Pre-norm transformer block. Shape: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: UniversalConfig):
        super().__init__()
        dim, inner = config.dim, config.dim_feedforward
        self.norm_attention = nn.LayerNorm(dim)
        self.attention = Attention(dim, config.heads, bias_kv=False, causal=False)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, inner), act=ACTIVATIONS[config.activation](), fc2=nn.Linear(inner, dim))
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined sequence."""
        x = x + self.attention(self.norm_attention(x))
        return x + self.mlp(self.norm_mlp(x))


class Transformer(nn.Module):
    """CLIP's picture transformer without patches and without its last projection. Shape: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: UniversalConfig):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.dim))
        self.norm_in = nn.LayerNorm(config.dim)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.depth)))
        self.norm_out = nn.LayerNorm(config.dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return all tokens after the last norm."""
        return self.norm_out(self.blocks(self.norm_in(x)))


_PICTURES = "tokenizers.image."


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors of one part by its own names."""
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


TINY = {
    "modality": "image",
    "config": {"dim": 16, "depth": 2, "heads": 2, "dim_feedforward": 32, "image": {"patch": 8, "image_size": 16}},
}


def _sizes_of(folder: Path, config: UniversalConfig | dict[str, Any] | None) -> UniversalConfig:
    """Return the sizes of the weights in a folder, with those that are given in their stead."""
    from mmbridge.encoders import clip  # it imports this file

    if isinstance(config, UniversalConfig):
        return config
    if clip.find_kind(folder):
        return clip.sizes_of(folder, config)
    beside = folder / "config.json"
    own = hub.read_json(beside) if config is None or beside.is_file() else {}
    return UniversalConfig.from_dict({**own, **(config or {})})


@register("universal", tiny=TINY)
class UniversalEncoder(Encoder):
    """A frozen CLIP transformer over the tokens of one modality; the class token is the first of those it gives.

    Frames of a video, clips of a sound, and a picture with its depth or normal map are encoded one by one and averaged, as
    published. Encoders of several modalities that read the same weights have one transformer in memory.

    The tokenizers are light: ``trains="tokenizer"`` makes this one a part of a bridge that can train, through the frozen
    transformer, as in the paper. Only then may the weights lack it; see ``Tokenizer.start``.

    Args:
        modality: "image", "video", "audio", "depth", "normal", "pointcloud", "imu", "fmri", or that of a registered tokenizer.
        weights: Folder or hub id with ``config.json`` and ``model.safetensors``, or of a plain CLIP of transformers or open_clip,
            which reads pictures, videos and maps; None for random weights of ``config``.
        config: Sizes; those that a mapping does not name, with None all, are taken beside the weights. Positions are interpolated
            to another size of inputs. For a plain CLIP see ``clip.sizes_of``.
        coordinates: Channels of a point between which distances are measured when points are grouped. The published
            code measures them between colours: (3, 4, 5) repeats that.
        frames: What becomes of a video's frames: "mean", as published, which forgets their order, or "tokens", all of them
            in a row, each frame with the sinusoidal encoding of its number (arXiv 1706.03762, section 3.5) added.
        trains: What a bridge may train: None, "tokenizer", or "encoder" for the transformer too, which all ways in that name
            these weights then share.

    Shape: (B, ...) -> (B, 1 + T, D); a video whose frames are "tokens" gives (B, frames * (1 + T), D).

    Raises:
        ConfigError: Unknown modality or size, or neither weights nor config.
        CheckpointError: Weights that can't be read or don't fit.
    """

    def __init__(
        self,
        modality: str,
        weights: str | Path | None = None,
        config: UniversalConfig | dict[str, Any] | None = None,
        coordinates: Sequence[int] = (0, 1, 2),
        frames: Literal["mean", "tokens"] = "mean",
        trains: Literal["tokenizer", "encoder"] | None = None,
    ):
        super().__init__()
        readable = list(dict.fromkeys([*TOKENIZERS, *KINDS]))
        if modality not in readable:
            raise ConfigError(f"the universal encoder has no modality {modality!r}{suggest(modality, readable)}")
        for option, value, known in (
            ("frames", frames, ("mean", "tokens")),
            ("trains", trains, (None, "tokenizer", "encoder")),
        ):
            if value not in known:
                raise ConfigError(
                    f"the universal encoder got {option}={value!r}; accepted: {', '.join(map(str, known))}."
                )
        self.trains = trains
        if weights is None and config is None:
            raise ConfigError(
                "the universal encoder needs weights (a folder or a hub id) or, for random weights, a config; pass one of them."
            )
        folder = None if weights is None else (hub.resolve_config if is_planning() else hub.resolve)(weights)
        sizes = UniversalConfig.from_dict(config) if isinstance(config, dict) else config
        if folder is not None:
            self.source = str(weights)
            sizes = _sizes_of(folder, config)
        assert sizes is not None
        self.modality, self.kind, self.sizes = modality, TOKENIZERS.get(modality, modality), sizes
        if self.kind not in sizes.tokenizers:
            raise ConfigError(
                f"this universal encoder has no tokenizer {self.kind!r}, which reads {modality!r}; it has "
                f"{', '.join(sizes.tokenizers) or 'none'}."
            )
        self.own = sizes.tokenizers[self.kind]
        self.options = {"activation": sizes.activation, "heads": sizes.heads}
        if modality == "pointcloud":
            self.options |= {"coordinates": tuple(coordinates), "sizes": asdict(self.own)}
        elif modality in ("audio", "imu"):
            self.options |= {"stride": self.own.stride}
        elif modality not in TOKENIZERS:
            self.options |= asdict(self.own)
        self.frame_tokens = modality == "video" and frames == "tokens"
        if self.frame_tokens:
            self.options |= {"frames": frames}
        self._create(folder, tuple(coordinates))
        self.freeze()

    def _create(self, folder: Path | None, coordinates: tuple[int, ...]) -> None:
        given = (coordinates,) if self.modality == "pointcloud" else ()
        if folder is None:
            self.transformer, self.tokenizer = Transformer(self.sizes), self._tokenizer(*given)
            initialise(self)
            self.tokenizer.start()
            return
        with torch.device("meta"):
            self.tokenizer, transformer = self._tokenizer(*given), Transformer(self.sizes)
        key: tuple[object, ...] = (folder.resolve(), replace(self.sizes, others={}))
        if not is_planning():
            state = self._read(folder)
            if not self._load(self.tokenizer, state, f"tokenizers.{self.kind}.", optional=self.trains is not None):
                self.tokenizer = self._tokenizer(*given)
                self.tokenizer.start(_part(state, _PICTURES))
            assert self.file is not None
            status = self.file.stat()
            key = (*key, status.st_mtime_ns, status.st_size)
        present = _shared.get(key)
        if present is None or self.trains == "encoder":  # what trains must not change what others hold
            if not is_planning():
                self._load(transformer, state, "transformer.")
            present = transformer
            if self.trains != "encoder":
                _shared[key] = present
        self.transformer = present

    def _tokenizer(self, *given: Any) -> Tokenizer:
        return KINDS[self.kind][1](self.own, self.sizes.dim, *given)

    def _read(self, folder: Path) -> dict[str, Tensor]:
        """Return all tensors in a folder by our names, with positions for the tokenizer's own grid."""
        from mmbridge.encoders import clip  # it imports this file

        self.file, self.licence = folder / "model.safetensors", hub.licence_of(folder)
        if clip.find_kind(folder):
            self.file = clip.weights_file(folder)
            trained, state = clip.read_clip(folder, self.sizes)
        else:
            beside = folder / "config.json"
            trained = UniversalConfig.from_dict(hub.read_json(beside)) if beside.is_file() else self.sizes
            wanted = ("transformer.", _PICTURES, f"tokenizers.{self.kind}.")
            try:
                with safe_open(self.file, framework="pt") as stream:
                    state = {
                        name: stream.get_tensor(name)
                        for name in stream.keys()  # noqa: SIM118
                        if name.startswith(wanted)
                    }
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{self.file} can't be read as safetensors ({error}); replace it.") from error
        name, grid = (
            f"tokenizers.{self.kind}.positions",
            getattr(trained.tokenizers.get(self.kind), "grid", self.own.grid),
        )
        if grid != self.own.grid and name in state and len(state[name]) == 1 + math.prod(grid):
            state[name] = interpolate_positions(state[name], grid, self.own.grid)
        return state

    def _load(self, module: nn.Module, state: dict[str, Tensor], prefix: str, optional: bool = False) -> bool:
        """Take a module's weights; returns False where there are none of them and they are optional."""
        own = _part(state, prefix)
        if optional and not own:
            return False
        load_strict(module, own, f"universal encoder weights {self.file}, {prefix}*,")
        return True

    def trainable(self) -> dict[str, nn.Module]:
        """Return what a bridge may train for this modality alone."""
        return {} if self.trains is None else {"tokenizer": self.tokenizer}

    def share(self, pool: MutableMapping[str, nn.Module]) -> None:
        """Have the transformer in common with the other ways in, if it trains."""
        if self.trains == "encoder":
            self.transformer = pool.setdefault("encoder", self.transformer)  # type: ignore[assignment]

    def gather(self, x: Tensor) -> Tensor:
        """Do the part of ``encode`` on a batch that no weight takes part in: points in groups (B, groups, neighbours, channels)."""
        return self.tokenizer.gather(x)

    @property
    def spec(self) -> TokenSpec:
        """Tokens of one medium of the usual length, the class token among them, and their width."""
        frames = self.own.video_clips * self.own.video_crops if self.frame_tokens else 1
        return TokenSpec(frames * self.tokenizer.count, self.sizes.dim)

    @property
    def input(self) -> InputSpec:
        """What ``prepare`` makes of files."""
        own = self.own
        match self.modality:
            case "video":
                return VideoInput(
                    own.image_size, own.mean, own.std,
                    clips=own.video_clips, frames=own.tubelet, seconds=own.video_seconds, crops=own.video_crops,
                )  # fmt: skip
            case "depth" | "normal":
                return MapInput(own.input)
            case "pointcloud":
                return replace(own.input, coordinates=tuple(self.tokenizer.coordinates))  # type: ignore[no-any-return]
        found: InputSpec = own.input
        return found

    def encode(self, x: Tensor) -> Tensor:
        """Return the tokens of a batch.

        Raises:
            ShapeError: The batch is of another shape.
        """
        wanted = self.input.shape
        accepted, axes = _SHAPES.get(self.modality, (f"(B, {', '.join(map(str, wanted))})", (1 + len(wanted),)))
        paired = self.modality in ("depth", "normal")
        if x.ndim not in axes or (paired and x.shape[1] != 2):
            raise ShapeError(f"the universal encoder's {self.modality!r} is {accepted}, not {tuple(x.shape)}.")
        if self.modality == "video" and x.ndim == 6:
            x = x.transpose(2, 3).flatten(1, 2)  # clips and their frames -> frames
        if self.modality == "video" and self.own.tubelet > 1:
            x = x.unflatten(1, (-1, self.own.tubelet)).transpose(2, 3)  # (B, clips, 3, tubelet, H, W)
        frames = x if x.ndim > 4 and self.modality in TOKENIZERS else x.unsqueeze(1)  # (B, frames or clips, ...)
        tokens = self.transformer(self.tokenizer(frames.flatten(0, 1), self.transformer.class_embedding))
        tokens = tokens.unflatten(0, frames.shape[:2])  # (B, frames, 1 + T, D)
        if not self.frame_tokens:
            return tokens.mean(1)
        numbers = torch.arange(tokens.shape[1], device=tokens.device)
        return (tokens + waves(numbers, self.sizes.dim, base=100).to(tokens.dtype).unsqueeze(1)).flatten(1, 2)
