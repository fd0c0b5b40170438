"""How the universal encoder cuts each kind of raw input into tokens, with learned positions.

Source: Han et al., "OneLLM: One Framework to Align All Modalities with Language", arXiv 2312.03700, section 3.1.

Positions are learned for the length that a tokenizer was trained with, and interpolated for any other.
"""

import functools
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
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

    As published a point is mapped by one matrix. With a ``patch`` each group is drawn instead, as a patch of so many pixels a side
    of a picture with ``image_size`` pixels a side, which is what a picture transformer knows to read (see ``DrawnPointTokenizer``).
    """

    groups: int = 1024
    neighbours: int = 32
    channels: int = 6
    points: int = 8192
    patch: int = 0
    image_size: int = 224
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    @property
    def grid(self) -> tuple[int, ...]:
        """Groups; of groups that are drawn, patches down and across the picture, over which positions are laid."""
        return (self.image_size // self.patch,) * 2 if self.patch else (self.groups,)

    @property
    def input(self) -> PointsInput:
        """What ``prepare`` makes of files."""
        return PointsInput(self.points, self.channels, centre="box" if self.patch else "mean")


@dataclass(frozen=True)
class ImuSizes:
    """Motion-sensor readings, ``sample_rate`` a second, in windows of ``kernel`` steps, one every ``stride`` steps.

    As published a window is mapped by one matrix. With ``hidden`` there is a layer of that width and a GELU between, which can tell
    how fast something swings whatever its phase.
    """

    kernel: int = 10
    stride: int = 1
    steps: int = 400
    channels: int = 6
    sample_rate: float = 200.0
    hidden: int = 0

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

    @property
    def count(self) -> int:
        """Tokens of an input of the usual length, the class token among them."""
        return len(self.positions)

    @torch.no_grad()
    def start(self, pictures: Mapping[str, Tensor] | None = None) -> None:
        """Give positions their start for training: sines over the grid, as large as tokens are, or small numbers without order.

        Small random numbers, which large models are given, take a small one thousands of steps to tell apart.

        Args:
            pictures: Tensors of the pictures' tokenizer of the same encoder, if it is there, for a subclass to start from.
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
    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
        """Return tokens without positions, and their grid; or with positions, and None."""

    def forward(self, x: Tensor, class_embedding: Tensor) -> Tensor:
        """Return the sequence that a transformer takes.

        Args:
            x: (B, ...).
            class_embedding: (dim,).

        Raises:
            ShapeError: An input of another kind, or smaller than a window.
        """
        tokens, grid = self.tokenize(x)
        if grid is None:
            return torch.cat([(class_embedding + self.positions[0]).expand(len(x), 1, -1), tokens], dim=1)
        positions = self.positions if grid == self.grid else interpolate_positions(self.positions, self.grid, grid)
        return torch.cat([class_embedding.expand(len(x), 1, -1), tokens], dim=1) + positions


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
        if not isinstance(sizes, ImageSizes):
            self.projection = nn.Conv2d(1, dim, sizes.patch, stride=sizes.stride)
        elif self.tubelet == 1:
            self.projection = nn.Conv2d(3, dim, sizes.patch, stride=sizes.patch, bias=False)
        else:
            window = (self.tubelet, sizes.patch, sizes.patch)
            self.projection = nn.Conv3d(3, dim, window, stride=window, bias=False)

    @torch.no_grad()
    def start(self, pictures: Mapping[str, Tensor] | None = None) -> None:
        """Start as the pictures' tokenizer where patches are as large: a map with one channel is a picture in grey."""
        super().start(pictures)
        weight, bias = self.projection.weight, self.projection.bias
        if pictures and weight.shape[1] == 1 and weight.shape[-1] == pictures["projection.weight"].shape[-1]:
            matrix, positions = _of_pictures(pictures, self.grid)
            weight.copy_(matrix.sum(1, keepdim=True))
            self.positions.copy_(positions)
            if bias is not None:
                bias.zero_()

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return one token per patch."""
        channels, size = self.projection.in_channels, self.projection.kernel_size[-1]
        if x.shape[1] != channels or min(x.shape[-2:]) < size:
            raise ShapeError(f"maps are (B, {channels}, at least {size}, at least {size}), not {tuple(x.shape)}.")
        if self.tubelet > 1 and x.ndim == 4:
            x = x.unsqueeze(2).expand(-1, -1, self.tubelet, -1, -1)
        patches = self.projection(x).squeeze(2) if self.tubelet > 1 else self.projection(x)  # (B, dim, rows, columns)
        return patches.flatten(2).transpose(1, 2), tuple(patches.shape[2:])


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
        self.sizes, self.coordinates = sizes, list(coordinates)
        self.projection: nn.Conv2d | nn.Linear = nn.Conv2d(sizes.channels, dim, 1)

    @property
    def count(self) -> int:
        """Groups, and the class token."""
        return 1 + self.sizes.groups

    def gather(self, x: Tensor) -> Tensor:
        """Put points (B, N, channels) into groups (B, groups, neighbours, channels), each from its centre on."""
        if x.ndim not in (3, 4) or x.shape[-1] != self.sizes.channels or 0 in x.shape:
            raise ShapeError(f"clouds are (B, at least 1 point, {self.sizes.channels}), not {tuple(x.shape)}.")
        if x.ndim == 4:
            return x
        places = x[..., self.coordinates].float()
        rows = torch.arange(len(x), device=x.device).unsqueeze(1)
        centres = farthest_points(places, min(self.sizes.groups, x.shape[1]))  # (B, G)
        members = nearest_points(places, places[rows, centres], min(self.sizes.neighbours, x.shape[1]))  # (B, G, K)
        return x[rows.unsqueeze(2), members]

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
        """Return one token per group, of points or of what ``gather`` made of them."""
        groups = self.gather(x).permute(0, 3, 1, 2)  # (B, channels, G, K)
        # one by one, since all members of all groups would fill the memory: (B, dim, G, 1) each
        members = (self.projection(each) for each in groups.split(1, dim=3))
        return functools.reduce(torch.maximum, members).squeeze(3).transpose(1, 2), (groups.shape[2],)


class DrawnPointTokenizer(PointTokenizer):
    """Groups of neighbouring points, each drawn as a patch of a picture that is seen from the front, along z.

    A pixel takes colour and height over the centre from the nearest of the group's points in x and y; the patch is mapped by one
    matrix, as a picture's is, and has the picture's position at the centre's place, interpolated. That a picture transformer reads
    points that are drawn for it is PointCLIP's idea (Zhang et al., arXiv 2112.02413), for whole clouds; clouds fill the picture.

    Shape: (B, N, 6) or, drawn, (B, groups, patch * patch + 1, 4) -> (B, 1 + groups, dim).
    """

    def __init__(self, sizes: PointSizes, dim: int, coordinates: tuple[int, ...] = (0, 1, 2)):
        if sizes.channels != 6:
            raise ConfigError(f"points that are drawn have a place and a colour, channels: 6, not {sizes.channels}.")
        super().__init__(sizes, dim, coordinates)
        self.projection = nn.Linear(4 * sizes.patch**2, dim, bias=False)

    @torch.no_grad()
    def start(self, pictures: Mapping[str, Tensor] | None = None) -> None:
        """Start as the pictures' tokenizer where patches are as large; a point's height counts for nothing yet."""
        super().start(pictures)
        if pictures and self.sizes.patch == pictures["projection.weight"].shape[-1]:
            matrix, positions = _of_pictures(pictures, self.grid)
            self.projection.weight.zero_()[:, : matrix[0].numel()] = matrix.flatten(1)
            self.positions.copy_(positions)

    def gather(self, x: Tensor) -> Tensor:
        """Draw the groups of points (B, N, 6): pixels with red, green, blue and height, and last the centre (x, y, z, 0)."""
        size, pixels = self.sizes.patch, self.sizes.patch**2
        if x.shape[1:] == (self.sizes.groups, pixels + 1, 4):
            return x
        groups = super().gather(x)  # (B, G, K, 6)
        centres = groups[:, :, :1, :3]
        line = (torch.arange(size, device=x.device, dtype=x.dtype) - (size - 1) / 2) * 2 / self.sizes.image_size
        down, across = torch.meshgrid(line, line, indexing="ij")
        wanted = centres[..., :2] + torch.stack([across, -down], dim=-1).flatten(0, 1)  # (B, G, pixels, 2)
        pairs = zip(wanted, groups[..., :2], strict=True)  # one by one: all distances of a batch would fill the memory
        nearest = torch.stack(
            [(pixel.unsqueeze(2) - point.unsqueeze(1)).square().sum(-1).argmin(-1) for pixel, point in pairs]
        )  # (B, G, pixels)
        points = torch.cat([groups[..., 3:], groups[..., 2:3] - centres[..., 2:]], dim=-1)
        drawn = points.gather(2, nearest.unsqueeze(-1).expand(-1, -1, -1, 4))
        return torch.cat([drawn, F.pad(centres, (0, 1))], dim=2)

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...] | None]:
        """Return one token per group, with its position."""
        drawn = self.gather(x)
        pixels, centres = drawn[:, :, :-1], drawn[:, :, -1, :2]
        mean, std = (pixels.new_tensor((*values, rest)) for values, rest in ((self.sizes.mean, 0), (self.sizes.std, 1)))
        patches = self.projection(((pixels - mean) / std).transpose(2, 3).flatten(2))  # channels first, as of pictures
        table = self.positions[1:].T.unflatten(1, self.grid).expand(len(x), -1, -1, -1)
        places = (centres * centres.new_tensor([1, -1])).unsqueeze(1).to(table.dtype)  # pictures' rows run downwards
        positions = F.grid_sample(table, places, padding_mode="border", align_corners=False)  # (B, dim, 1, G)
        return patches + positions.squeeze(2).transpose(1, 2), None


def point_tokenizer(sizes: PointSizes, dim: int, coordinates: tuple[int, ...] = (0, 1, 2)) -> PointTokenizer:
    """Return the tokenizer of points that sizes ask for; arguments are those of ``PointTokenizer``."""
    return (DrawnPointTokenizer if sizes.patch else PointTokenizer)(sizes, dim, coordinates)


KINDS.register("pointcloud", (PointSizes, point_tokenizer), point_tokenizer)


@register_tokenizer("imu", ImuSizes)
class ImuTokenizer(Tokenizer):
    """Windows of readings by a convolution. Shape: (B, channels, steps) -> (B, 1 + T, dim)."""

    def __init__(self, sizes: ImuSizes, dim: int):
        super().__init__(sizes.grid, dim)
        self.channels, self.kernel = sizes.channels, sizes.kernel
        window = (sizes.channels, sizes.hidden or dim, sizes.kernel, sizes.stride)
        self.projection: nn.Module = nn.Conv1d(*window, bias=False)
        if sizes.hidden:
            self.projection = nn.Sequential(nn.Conv1d(*window), nn.GELU(), nn.Conv1d(sizes.hidden, dim, 1))

    def tokenize(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return one token per window."""
        if x.shape[1] != self.channels or x.shape[2] < self.kernel:
            raise ShapeError(f"readings are (B, {self.channels}, at least {self.kernel}), not {tuple(x.shape)}.")
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


def _of_pictures(pictures: Mapping[str, Tensor], grid: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return the matrix (dim, 3, patch, patch) of pictures, whose frames are alike, and their positions on another grid."""
    weight, positions = pictures["projection.weight"], pictures["positions"]
    side = math.isqrt(len(positions) - 1)
    return weight.sum(2) if weight.ndim == 5 else weight, interpolate_positions(positions, (side, side), grid)


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
