"""The modules of ImageBind: sizes as data, stems, transformer trunks, heads and logit scales of its six towers.

Source: Girdhar et al., "ImageBind: One Embedding Space To Bind Them All", arXiv 2305.05665, section 3 and appendix B.
The modules are named so that their state dicts have the keys of the published weights. Dropout of whole layers
(stochastic depth) and resizing of position embeddings are deliberately absent.
"""

import math
from collections import OrderedDict
from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbridge.errors import ConfigError, ShapeError
from mmbridge.registry import suggest

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

MODALITY_TO_TOWER = {
    "image": "vision",
    "video": "vision",
    "text": "text",
    "audio": "audio",
    "depth": "depth",
    "thermal": "thermal",
    "imu": "imu",
}


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the vision tower, which serves pictures and videos; ``video_*`` say how a video is cut into clips."""

    dim: int = 1280
    depth: int = 32
    heads: int = 16
    image_size: int = 224
    patch: int = 14
    frames: int = 2
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    video_clips: int = 5
    video_seconds: float = 2.0
    video_crops: int = 3

    @property
    def tokens(self) -> int:
        """Number of patches of one clip."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; ``eot`` is the id of the token at which a sentence is read out."""

    dim: int = 1024
    depth: int = 24
    heads: int = 16
    vocabulary: int = 49408
    context: int = 77
    sot: int = 49406
    eot: int = 49407

    @property
    def tokens(self) -> int:
        """Number of positions."""
        return self.context


@dataclass(frozen=True)
class AudioConfig:
    """Sizes of the audio tower: log-mel clips of ``seconds`` seconds, overlapping square patches."""

    dim: int = 768
    depth: int = 12
    heads: int = 12
    patch: int = 16
    stride: int = 10
    mel_bins: int = 128
    frames: int = 204
    sample_rate: int = 16000
    clips: int = 3
    seconds: float = 2.0
    mean: float = -4.268
    std: float = 9.138

    @property
    def tokens(self) -> int:
        """Number of patches of one clip."""
        bins, frames = ((size - self.patch) // self.stride + 1 for size in (self.mel_bins, self.frames))
        return bins * frames


@dataclass(frozen=True)
class DepthConfig:
    """Sizes of the depth tower: one channel (disparity)."""

    dim: int = 384
    depth: int = 12
    heads: int = 8
    image_size: int = 224
    patch: int = 16

    @property
    def tokens(self) -> int:
        """Number of patches."""
        return (self.image_size // self.patch) ** 2


@dataclass(frozen=True)
class ThermalConfig(DepthConfig):
    """Sizes of the thermal tower: one channel (infrared)."""

    dim: int = 768
    heads: int = 12


@dataclass(frozen=True)
class ImuConfig:
    """Sizes of the motion-sensor tower: ``channels`` x ``steps`` readings, cut into windows of ``kernel`` steps.

    ``sample_rate`` is that of the paper's clips, 2000 readings in 5 s.
    """

    dim: int = 512
    depth: int = 6
    heads: int = 8
    kernel: int = 8
    steps: int = 2000
    channels: int = 6
    sample_rate: float = 400.0

    @property
    def tokens(self) -> int:
        """Number of windows."""
        return self.steps // self.kernel


TOWER_CONFIGS: dict[str, Any] = {
    "vision": VisionConfig,
    "text": TextConfig,
    "audio": AudioConfig,
    "depth": DepthConfig,
    "thermal": ThermalConfig,
    "imu": ImuConfig,
}
LOGIT_SCALES = {"text": 1 / 0.07, "audio": 20.0, "depth": 5.0, "thermal": 10.0, "imu": 5.0}


@dataclass(frozen=True)
class ImageBindConfig:
    """Sizes of an ImageBind model; a tower that is None does not exist.

    Raises:
        ConfigError: A size that another one does not divide.
    """

    embed_dim: int = 1024
    vision: VisionConfig | None = None
    text: TextConfig | None = None
    audio: AudioConfig | None = None
    depth: DepthConfig | None = None
    thermal: ThermalConfig | None = None
    imu: ImuConfig | None = None

    def __post_init__(self) -> None:
        for tower in self.towers:
            sizes = getattr(self, tower)
            divisions = [("dim", "heads")]
            if hasattr(sizes, "image_size"):
                divisions.append(("image_size", "patch"))
            if hasattr(sizes, "kernel"):
                divisions.append(("steps", "kernel"))
            for whole, part in divisions:
                if getattr(sizes, part) < 1 or getattr(sizes, whole) % getattr(sizes, part):
                    raise ConfigError(
                        f"ImageBind {tower} tower: {whole}={getattr(sizes, whole)} is not a multiple of "
                        f"{part}={getattr(sizes, part)}; change one of them."
                    )

    @property
    def towers(self) -> tuple[str, ...]:
        """Names of the towers that this model has."""
        return tuple(tower for tower in TOWER_CONFIGS if getattr(self, tower) is not None)

    @classmethod
    def huge(cls) -> "ImageBindConfig":
        """Return the sizes of the published imagebind_huge weights: 1,200.8 M parameters in 1,311 tensors."""
        return cls(**{tower: sizes() for tower, sizes in TOWER_CONFIGS.items()})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageBindConfig":
        """Build from nested plain data, the inverse of ``to_dict``.

        Raises:
            ConfigError: An unknown key, named with close matches.
        """
        towers = {
            tower: _from_dict(TOWER_CONFIGS[tower], sizes, f"{tower}.")
            for tower, sizes in values.items()
            if tower in TOWER_CONFIGS and sizes is not None
        }
        return _from_dict(cls, {**values, **towers}, "")

    def to_dict(self) -> dict[str, Any]:
        """Return nested plain data for JSON; absent towers are left out."""
        return {key: value for key, value in asdict(self).items() if value is not None}


Config = TypeVar("Config")


def _from_dict(kind: type[Config], values: dict[str, Any], path: str) -> Config:
    known = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    for key in values:
        if key not in known:
            raise ConfigError(f"ImageBind configuration has no key {path + key!r}{suggest(key, known)}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


class Attention(nn.Module):
    """Multi-head self-attention with fused input weights; ``bias_kv`` adds one learned key and value to attend to.

    Shape: (B, T, D) -> (B, T, D).
    """

    def __init__(self, dim: int, heads: int, bias_kv: bool, causal: bool):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * dim, dim))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * dim))
        self.bias_k = nn.Parameter(torch.empty(1, 1, dim)) if bias_kv else None
        self.bias_v = nn.Parameter(torch.empty(1, 1, dim)) if bias_kv else None
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return each position's attention read-out."""
        query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(len(x), -1, -1)], dim=1)
            value = torch.cat([value, self.bias_v.expand(len(x), -1, -1)], dim=1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        read = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)  # (B, heads, T, D / heads)
        return self.out_proj(read.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block with a GELU MLP four times as wide. Shape: (B, T, D) -> (B, T, D)."""

    def __init__(self, dim: int, heads: int, bias_kv: bool, causal: bool):
        super().__init__()
        self.attn = Attention(dim, heads, bias_kv, causal)
        self.norm_1 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(dim, 4 * dim), act=nn.GELU(), fc2=nn.Linear(4 * dim, dim)),
        )
        self.norm_2 = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Return the refined sequence."""
        x = x + self.attn(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class Trunk(nn.Module):
    """The transformer of one tower. Shape: (B, T, D) -> (B, T, D)."""

    def __init__(self, tower: str, dim: int, depth: int, heads: int):
        super().__init__()
        norms = [nn.LayerNorm(dim, eps=1e-6)] if tower == "vision" else []
        self.pre_transformer_layer = nn.Sequential(*norms)
        bias_kv, causal = tower not in ("vision", "text"), tower == "text"
        self.blocks = nn.Sequential(*(Block(dim, heads, bias_kv, causal) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sequence after all blocks."""
        return self.blocks(self.pre_transformer_layer(x))


class PositionEmbedding(nn.Module):
    """Learned positions, shape (1, T, D)."""

    def __init__(self, tokens: int, dim: int):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, dim))


class PatchStem(nn.Module):
    """A projection of patches, then an optional LayerNorm. Shape: (B, channels, ...) -> (B, T, D)."""

    def __init__(self, projection: nn.Module, dim: int, norm: bool):
        super().__init__()
        self.proj = projection
        self.norm_layer = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return one token per patch, rows first."""
        projected = self.proj(x)
        tokens = projected if isinstance(self.proj, nn.Linear) else projected.flatten(2).transpose(1, 2)
        return self.norm_layer(tokens)


class RepeatFrame(nn.Module):
    """Shows a picture as a still film of so many frames; a film passes unchanged."""

    def __init__(self, frames: int):
        super().__init__()
        self.frames = frames

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) or (B, 3, F, H, W) -> (B, 3, F, H, W)."""
        return x.unsqueeze(2).expand(-1, -1, self.frames, -1, -1) if x.ndim == 4 else x


class PatchPreprocessor(nn.Module):
    """Pictures, clips, mel spectrograms, depth or thermal maps to a class token and patch tokens with positions.

    Shape: (B, channels, ...) -> (B, 1 + T, D).
    """

    def __init__(self, tower: str, config: VisionConfig | AudioConfig | DepthConfig):
        super().__init__()
        self.tower, self.stem_name = tower, "depth_stem" if tower == "depth" else "rgbt_stem"
        dim, patch = config.dim, config.patch
        if isinstance(config, VisionConfig):
            kernel, size = (config.frames, patch, patch), config.image_size
            film = nn.Conv3d(3, dim, kernel, stride=kernel, bias=False)
            projection: nn.Module = nn.Sequential(RepeatFrame(config.frames), film)
            self.shapes = [(3, size, size), (3, config.frames, size, size)]
        elif isinstance(config, AudioConfig):
            projection = nn.Conv2d(1, dim, patch, stride=config.stride, bias=False)
            self.shapes = [(1, config.mel_bins, config.frames)]
        else:
            projection = nn.Conv2d(1, dim, patch, stride=patch, bias=False)
            self.shapes = [(1, config.image_size, config.image_size)]
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.add_module(self.stem_name, PatchStem(projection, dim, norm=tower != "vision"))
        self.pos_embedding_helper = PositionEmbedding(1 + config.tokens, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return class token and patches.

        Raises:
            ShapeError: A size that this tower was not built for.
        """
        if tuple(x.shape[1:]) not in self.shapes:
            accepted = " or ".join(str(("B", *shape)).replace("'", "") for shape in self.shapes)
            raise ShapeError(
                f"ImageBind's {self.tower} tower takes {accepted} but was given {tuple(x.shape)}; prepare the medium "
                "with encoder.prepare(medium)."
            )
        patches = getattr(self, self.stem_name)(x)
        sequence = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], dim=1)
        return sequence + self.pos_embedding_helper.pos_embed


class TextPreprocessor(nn.Module):
    """Token ids to embeddings with positions. Shape: (B, context) -> (B, context, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.context = config.context
        self.pos_embed = nn.Parameter(torch.empty(1, config.context, config.dim))
        # The published weights hold this mask as a tensor; attention itself is told to be causal, which is faster.
        self.register_buffer("mask", torch.full((config.context, config.context), -math.inf).triu(1))
        self.token_embedding = nn.Embedding(config.vocabulary, config.dim)

    def forward(self, ids: Tensor) -> Tensor:
        """Return embedded tokens.

        Raises:
            ShapeError: Another length than the context.
        """
        if ids.ndim != 2 or ids.shape[1] != self.context:
            raise ShapeError(
                f"ImageBind's text tower takes ids of shape (B, {self.context}) but was given {tuple(ids.shape)}; "
                "make them with model.tokenize(texts)."
            )
        return self.token_embedding(ids) + self.pos_embed


class ImuPreprocessor(nn.Module):
    """Motion-sensor readings to a class token and windows with positions. Shape: (B, C, steps) -> (B, 1 + T, D)."""

    def __init__(self, config: ImuConfig):
        super().__init__()
        self.shape, self.kernel = (config.channels, config.steps), config.kernel
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.tokens, config.dim))
        projection = nn.Linear(config.channels * config.kernel, config.dim, bias=False)
        self.imu_stem = PatchStem(projection, config.dim, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return class token and windows.

        Raises:
            ShapeError: Another number of channels or steps.
        """
        if tuple(x.shape[1:]) != self.shape:
            raise ShapeError(
                f"ImageBind's imu tower takes (B, {self.shape[0]}, {self.shape[1]}) but was given {tuple(x.shape)}; "
                "resample the readings to that length."
            )
        windows = x.unfold(-1, self.kernel, self.kernel).transpose(1, 2).flatten(2)  # (B, T, C * kernel)
        sequence = torch.cat([self.cls_token.expand(len(x), -1, -1), self.imu_stem(windows)], dim=1)
        return sequence + self.pos_embed


class LogitScale(nn.Module):
    """The temperature with which a modality's embeddings are compared, as log of a factor of at most 100."""

    def __init__(self, factor: float, learnable: bool):
        super().__init__()
        value = torch.tensor(math.log(factor))
        if learnable:
            self.log_logit_scale = nn.Parameter(value)
        else:
            self.register_buffer("log_logit_scale", value)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the factor."""
        return x * self.log_logit_scale.exp().clamp(max=100.0)


def create_preprocessor(tower: str, config: Any) -> nn.Module:
    """Return the part of a tower that turns raw input into a sequence."""
    if tower == "text":
        return TextPreprocessor(config)
    return ImuPreprocessor(config) if tower == "imu" else PatchPreprocessor(tower, config)


def create_head(tower: str, dim: int, embed_dim: int) -> nn.Module:
    """Return LayerNorm and Linear into the joint space, for every token.

    The identity stands where the published model picks the class token; here the caller picks.
    """
    norm, projection = nn.LayerNorm(dim, eps=1e-6), nn.Linear(dim, embed_dim, bias=False)
    if tower == "text":
        return nn.Sequential(OrderedDict(proj=nn.Sequential(norm, projection)))
    between = [nn.Identity(), nn.Dropout(0.5)] if tower == "imu" else [nn.Identity()]
    return nn.Sequential(norm, *between, projection)


def create_postprocessor(tower: str) -> nn.Module:
    """Return the logit scale of a tower, behind the place of the parameterless normalisation; vision has none."""
    if tower == "vision":
        return nn.Identity()
    return nn.Sequential(nn.Identity(), LogitScale(LOGIT_SCALES[tower], learnable=tower == "text"))


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Draw fresh weights from normals of std 1 / sqrt(inputs) for matrices and 1 / sqrt(D) for vectors; biases zero.

    At small widths the usual std of 0.02 would drown the positions in the patches and delay learning several times.
    """
    for child in module.modules():
        if isinstance(child, nn.LayerNorm | LogitScale):
            continue
        for name, parameter in child.named_parameters(recurse=False):
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                vectors = parameter.ndim == 3  # positions, class tokens and the added key and value: (1, T, D)
                inputs = parameter.shape[-1] if vectors else parameter[0].numel()
                nn.init.trunc_normal_(parameter, std=inputs**-0.5)
