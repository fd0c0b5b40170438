"""How the universal encoder cuts each kind of raw input into tokens, with learned positions.

Source: Han et al., "OneLLM: One Framework to Align All Modalities with Language", arXiv 2312.03700, section 3.1.

Positions are learned for the length that a tokenizer was trained with, and interpolated for any other.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbridge.encoders.imagebind_modules import CLIP_MEAN, CLIP_STD
from mmbridge.errors import ConfigError, ShapeError
from mmbridge.registry import Table
from mmbridge.specs import AudioInput, FmriInput, ImageInput, ImuInput, PointsInput

KINDS: Table[tuple[Any, Any]] = Table(
    "tokenizer", "mmbridge.tokenizers", dict.fromkeys(("image", "audio", "pointcloud", "imu", "fmri"), __name__)
)
"""Sizes and module of each tokenizer; videos, depth and normal maps are cut as pictures are."""

_C = TypeVar("_C", bound=type)


def register_tokenizer(name: str, sizes: type) -> Callable[[_C], _C]:
    """Decorate a ``Tokenizer`` of the universal encoder.

    Args:
        name: The modality that it reads.
        sizes: A frozen dataclass with defaults, whose ``grid`` and ``input`` are those of the classes here; configurations hold it
            under ``name``. An ``input`` of an own class prepares the medium itself, see ``mmbridge.specs.OwnInput``.

    Raises:
        ConfigError: The name is taken.
    """

    def decorate(tokenizer: _C) -> _C:
        KINDS.register(name, (sizes, tokenizer), tokenizer)
        return tokenizer

    return decorate


@dataclass(frozen=True)
class ImageSizes:
    """Pictures in patches; a video is so many clips, in ``video_crops`` crops.

    Of each clip the first frame is read; or ``tubelet`` frames, spread over it, whose patches are one token each (ViViT, arXiv
    2103.15691, section 3.2). A picture is then a clip in which nothing moves.
    """

    patch: int = 14
    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    video_clips: int = 5
    video_seconds: float = 1.0
    video_crops: int = 3
    tubelet: int = 1

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches down and across."""
        return (self.image_size // self.patch,) * 2

    @property
    def input(self) -> ImageInput:
        """What ``prepare`` makes of files."""
        return ImageInput(self.image_size, self.mean, self.std)


@dataclass(frozen=True)
class AudioSizes:
    """Log-mel spectrograms in overlapping square patches; ``seconds`` of sound fill ``frames`` of 25 ms every 10 ms."""

    patch: int = 16
    stride: int = 10
    mel_bins: int = 128
    frames: int = 1024
    sample_rate: int = 16000
    seconds: float = 10.255
    mean: float = -4.2677393
    std: float = 9.1379948

    @property
    def grid(self) -> tuple[int, ...]:
        """Patches over frequency and over time."""
        return tuple((size - self.patch) // self.stride + 1 for size in (self.mel_bins, self.frames))

    @property
    def input(self) -> AudioInput:
        """What ``prepare`` makes of files."""
        return AudioInput(self.sample_rate, self.mel_bins, self.frames, 1, self.seconds, self.mean, self.std)


@dataclass(frozen=True)
class PointSizes:
    """Clouds of ``points`` points as ``groups`` groups of ``neighbours``; a point has a position and a colour.

    As published a point is mapped by one matrix. With a hidden layer of width ``hidden`` it is as in Point-BERT (arXiv
    2111.14819, section 3.1): a point's place is taken from its group's centre, and another such map of the centre is the position.
    """

    groups: int = 1024
    neighbours: int = 32
    channels: int = 6
    points: int = 8192
    hidden: int = 0

    @property
    def grid(self) -> tuple[int, ...]:
        """Groups."""
        return (self.groups,)

    @property
    def input(self) -> PointsInput:
        """What ``prepare`` makes of files."""
        return PointsInput(self.points, self.channels)


@dataclass(frozen=True)
class ImuSizes:
    """Motion-sensor readings, ``sample_rate`` a second, in windows of ``kernel`` steps, one every ``stride`` steps."""

    kernel: int = 10
    stride: int = 1
    steps: int = 400
    channels: int = 6
    sample_rate: float = 200.0

    @property
    def grid(self) -> tuple[int, ...]:
        """Windows."""
        return ((self.steps - self.kernel) // self.stride + 1,)

    @property
    def input(self) -> ImuInput:
        """What ``prepare`` makes of files."""
        return ImuInput(self.sample_rate, self.steps)


@dataclass(frozen=True)
class FmriSizes:
    """Brain activity, all voxels read by each token."""

    voxels: int = 15724
    tokens: int = 8

    @property
    def grid(self) -> tuple[int, ...]:
        """Tokens."""
        return (self.tokens,)

    @property
    def input(self) -> FmriInput:
        """What ``prepare`` makes of files."""
        return FmriInput(self.voxels)


class Tokenizer(nn.Module):
    """Raw inputs to a class token and tokens, with positions: (B, ...) -> (B, 1 + T, dim).

    A subclass gives ``tokenize``, which returns tokens (B, T, dim) and the grid they lie on.

    Attributes:
        ordered: Whether a token's number says where or when it is.
    """

    ordered = True

    def __init__(self, grid: tuple[int, ...], dim: int):
        super().__init__()
        if min(grid) < 1:
            raise ConfigError(f"{type(self).__name__} would make {grid} tokens; let windows be no larger than inputs.")
        self.grid = grid
        self.positions = nn.Parameter(torch.empty(1 + math.prod(grid), dim))

    @torch.no_grad()
    def start(self) -> None:
        """Give positions their start for training: sines over the grid, as large as tokens are, or small numbers without order.

        Small random numbers, which large models are given, take a small one thousands of steps to tell apart.
        """
        self.positions.normal_(std=0.02)
        if self.ordered:
            share = self.positions.shape[1] // len(self.grid)
            lines = torch.meshgrid(*(torch.arange(size) for size in self.grid), indexing="ij")
            for axis, line in enumerate(lines):
                self.positions[1:, axis * share : (axis + 1) * share] += waves(line.flatten(), share, base=100)

    def gather(self, x: Tensor) -> Tensor:
        """Do the part of ``tokenize`` that no weight takes part in; it may be done once and kept."""
        return x

    @abstractmethod
    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return tokens without positions, and their grid."""

    def forward(self, x: Tensor, class_embedding: Tensor) -> Tensor:
        """Return the sequence that a transformer takes.

        Args:
            x: (B, ...).
            class_embedding: (dim,).

        Raises:
            ShapeError: An input of another kind, or smaller than a window.
        """
        tokens, grid = self.tokenize(x)
        return torch.cat([class_embedding.expand(len(x), 1, -1), tokens], dim=1) + self._positions_of(grid)

    def _positions_of(self, grid: tuple[int, ...]) -> Tensor:
        return self.positions if grid == self.grid else interpolate_positions(self.positions, self.grid, grid)


@register_tokenizer("image", ImageSizes)
@register_tokenizer("audio", AudioSizes)
class PatchTokenizer(Tokenizer):
    """Square patches of a map by a convolution, rows first. Shape: (B, channels, H, W) -> (B, 1 + T, dim).

    With tubelets also (B, channels, tubelet, H, W).
    """

    def __init__(self, sizes: ImageSizes | AudioSizes, dim: int):
        super().__init__(sizes.grid, dim)
        self.tubelet = sizes.tubelet if isinstance(sizes, ImageSizes) else 1
        self.projection: nn.Conv2d | nn.Conv3d
        if isinstance(sizes, AudioSizes):
            self.projection = nn.Conv2d(1, dim, sizes.patch, stride=sizes.stride)
        elif self.tubelet == 1:
            self.projection = nn.Conv2d(3, dim, sizes.patch, stride=sizes.patch, bias=False)
        else:
            window = (self.tubelet, sizes.patch, sizes.patch)
            self.projection = nn.Conv3d(3, dim, window, stride=window, bias=False)

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return one token per patch."""
        channels, size = self.projection.in_channels, self.projection.kernel_size[-1]
        if x.shape[1] != channels or min(x.shape[-2:]) < size:
            raise ShapeError(f"maps are (B, {channels}, at least {size}, at least {size}), not {tuple(x.shape)}.")
        if self.tubelet > 1 and x.ndim == 4:
            x = x.unsqueeze(2).expand(-1, -1, self.tubelet, -1, -1)
        patches = self.projection(x).squeeze(2) if self.tubelet > 1 else self.projection(x)  # (B, dim, rows, columns)
        return patches.flatten(2).transpose(1, 2), tuple(patches.shape[2:])


@register_tokenizer("pointcloud", PointSizes)
class PointTokenizer(Tokenizer):
    """Groups of neighbouring points: each point is mapped, each group takes the largest values.

    Shape: (B, N, channels) or, in groups, (B, groups, neighbours, channels) -> (B, 1 + groups, dim).

    Args:
        sizes: How many groups of how many points.
        dim: Width.
        coordinates: Channels between which distances are measured.
    """

    ordered = False

    def __init__(self, sizes: PointSizes, dim: int, coordinates: tuple[int, ...] = (0, 1, 2)):
        super().__init__(sizes.grid, dim)
        if not coordinates or not set(coordinates) <= set(range(sizes.channels)):
            raise ConfigError(f"coordinates={coordinates} are not channels of points, 0 to {sizes.channels - 1}.")
        self.neighbours, self.coordinates = sizes.neighbours, list(coordinates)
        self.projection = nn.Conv2d(sizes.hidden or sizes.channels, dim, 1)
        self.channels, self.has_hidden = sizes.channels, sizes.hidden > 0
        if self.has_hidden:
            self.hidden = nn.Sequential(nn.Conv2d(sizes.channels, sizes.hidden, 1), nn.GELU())
            self.place = nn.Sequential(
                nn.Linear(len(coordinates), sizes.hidden), nn.GELU(), nn.Linear(sizes.hidden, dim)
            )

    def gather(self, x: Tensor) -> Tensor:
        """Put points (B, N, channels) into groups (B, groups, neighbours, channels), each from its centre on."""
        if x.ndim not in (3, 4) or x.shape[-1] != self.channels or 0 in x.shape:
            raise ShapeError(f"clouds are (B, at least 1 point, {self.channels}), not {tuple(x.shape)}.")
        if x.ndim == 4:
            return x
        places = x[..., self.coordinates].float()
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        centres = farthest_points(places, min(self.grid[0], x.shape[1]))  # (B, G)
        members = nearest_points(places, places[rows, centres], min(self.neighbours, x.shape[1]))  # (B, G, K)
        return x[rows.unsqueeze(2), members]

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return one token per group, of points or of what ``gather`` made of them."""
        groups = self.gather(x)  # (B, G, K, channels)
        places = groups[:, :, :1, self.coordinates]  # of the centres, which are their own nearest points
        if self.has_hidden:
            groups = groups.clone()
            groups[..., self.coordinates] -= places
        # one by one, since all members of all groups would fill the memory: (B, dim, G, 1) each
        members = (self._map(each) for each in groups.permute(0, 3, 1, 2).split(1, dim=3))
        tokens = functools.reduce(torch.maximum, members).squeeze(3).transpose(1, 2)
        return tokens + self.place(places.squeeze(2)) if self.has_hidden else tokens, (groups.shape[1],)

    def _map(self, points: Tensor) -> Tensor:
        return self.projection(self.hidden(points) if self.has_hidden else points)


@register_tokenizer("imu", ImuSizes)
class ImuTokenizer(Tokenizer):
    """Windows of readings by a convolution. Shape: (B, channels, steps) -> (B, 1 + T, dim)."""

    def __init__(self, sizes: ImuSizes, dim: int):
        super().__init__(sizes.grid, dim)
        self.projection = nn.Conv1d(sizes.channels, dim, sizes.kernel, sizes.stride, bias=False)

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return one token per window."""
        channels, kernel = self.projection.in_channels, self.projection.kernel_size[0]
        if x.shape[1] != channels or x.shape[2] < kernel:
            raise ShapeError(f"readings are (B, {channels}, at least {kernel}), not {tuple(x.shape)}.")
        windows = self.projection(x)
        return windows.transpose(1, 2), (windows.shape[2],)


@register_tokenizer("fmri", FmriSizes)
class FmriTokenizer(Tokenizer):
    """All voxels to a few tokens by one linear map, channels outermost. Shape: (B, voxels) -> (B, 1 + T, dim)."""

    ordered = False

    def __init__(self, sizes: FmriSizes, dim: int):
        super().__init__(sizes.grid, dim)
        self.projection = nn.Linear(sizes.voxels, dim * sizes.tokens)

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return the tokens."""
        voxels = self.projection.in_features
        if x.shape[1:].numel() != voxels:
            raise ShapeError(f"brain activity is (B, {voxels}) or (B, 1, {voxels}), not {tuple(x.shape)}.")
        return self.projection(x.flatten(1)).unflatten(1, (-1, *self.grid)).transpose(1, 2), self.grid


def waves(numbers: Tensor, dim: int, base: float = 10_000) -> Tensor:
    """Return sinusoidal encodings of numbers (N,) -> (N, dim), sines then cosines (Vaswani et al., arXiv 1706.03762, section 3.5).

    Args:
        numbers: Positions.
        dim: Width.
        base: The longest wave has this many positions times 2 pi.
    """
    half = (dim + 1) // 2
    rates = base ** -(torch.arange(half, device=numbers.device) / half)
    angles = numbers.unsqueeze(1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :dim]


def interpolate_positions(positions: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Carry learned positions over to another grid: bicubically over two axes, linearly over one.

    Args:
        positions: That of the class token, then those of the grid, (1 + T, dim).
        old: Grid of ``positions``.
        new: Grid that is wanted, of as many axes.
    """
    table = positions[1:].float().T.unflatten(1, old).unsqueeze(0)  # (1, dim, *old)
    resized = F.interpolate(table, new, mode="bicubic" if len(new) == 2 else "linear")
    return torch.cat([positions[:1], resized[0].flatten(1).T.to(positions.dtype)])


def farthest_points(x: Tensor, count: int) -> Tensor:
    """Choose points that lie far apart: each next one is the farthest from all chosen (arXiv 1706.02413, section 3.2).

    Args:
        x: Points (B, N, C).
        count: How many, at most N.

    Returns:
        Indices (B, count); the first is 0, and of equally far points the lowest index is taken.
    """
    rows = torch.arange(len(x), device=x.device)
    chosen = torch.zeros(len(x), count, dtype=torch.long, device=x.device)
    distance = x.new_full(x.shape[:2], math.inf)
    for step in range(1, count):
        latest = x[rows, chosen[:, step - 1]].unsqueeze(1)
        distance = torch.minimum(distance, (x - latest).square().sum(-1))
        chosen[:, step] = distance.argmax(1)
    return chosen


def nearest_points(x: Tensor, centres: Tensor, count: int) -> Tensor:
    """Find the nearest points of each centre, in the order of their distance.

    Args:
        x: Points (B, N, C).
        centres: (B, G, C).
        count: How many, at most N.

    Returns:
        Indices (B, G, count); of equally near points the lowest indices are taken.
    """
    found = []
    for cloud, middle in zip(x, centres, strict=True):  # one by one: all distances of a batch would fill the memory
        distance = (middle.unsqueeze(1) - cloud).square().sum(-1)  # (G, N)
        found.append(distance.sort(dim=1, stable=True).indices[:, :count])
    return torch.stack(found)
