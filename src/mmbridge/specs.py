"""How parts announce themselves: plain data, no torch.

A bridge derives every width, length and preprocessing setting from these, so that no recipe spells a number that a
model's own configuration already holds.
"""

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class TokenSpec:
    """What an encoder gives for one medium: ``tokens`` vectors of width ``dim``, shape (tokens, dim).

    ``tokens`` is None where the number depends on the medium.
    """

    tokens: int | None
    dim: int


@dataclass(frozen=True)
class ConditionSpec:
    """What a decoder is steered by: shape (tokens, dim); ``normalized`` where rows have unit L2 norm."""

    tokens: int
    dim: int
    normalized: bool = False


@dataclass(frozen=True)
class ImageInput:
    """Raw picture that an encoder wants: (3, size, size) floats, (x - mean) / std with x in 0..1.

    ``resize``: "crop" (short side to ``size``, then centre crop), "pad" (to a square with the mean colour, then resize) or
    "squash" (both sides to ``size``).
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resize: str = "crop"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (3, self.size, self.size)


@dataclass(frozen=True)
class VideoInput:
    """Raw video that an encoder wants: ``clips`` clips of ``seconds`` seconds, ``frames`` frames each, evenly spaced.

    Shape (clips * crops, 3, frames, size, size); ``crops`` spatial crops (1 or 3) along the longer side.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    clips: int
    frames: int
    seconds: float
    crops: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (self.clips * self.crops, 3, self.frames, self.size, self.size)


@dataclass(frozen=True)
class AudioInput:
    """Raw sound that an encoder wants: log-mel clips of shape (clips, 1, mel_bins, frames), (x - mean) / std.

    ``seconds`` is the length of one clip; clips are evenly spaced over the sound.
    """

    sample_rate: int
    mel_bins: int
    frames: int
    clips: int
    seconds: float
    mean: float
    std: float

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (self.clips, 1, self.mel_bins, self.frames)


@dataclass(frozen=True)
class MapInput:
    """Depth or normal map that an encoder wants with its picture: both as ``image`` says, shape (2, 3, size, size).

    A depth map becomes a grey picture, black at its smallest and white at its largest depth; normals become colours.
    """

    image: ImageInput

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (2, *self.image.shape)


@dataclass(frozen=True)
class DisparityInput:
    """Depth map that an encoder wants without a picture: disparity, 1 at the nearest point, shape (1, size, size)."""

    size: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (1, self.size, self.size)


@dataclass(frozen=True)
class PointsInput:
    """Point cloud that an encoder wants: ``points`` points, shape (points, 6), or (points, 3).

    It is centred at its mean and scaled into the unit ball, or, where ``centre`` is "box", fills the cube from -1 to 1 with its
    longest side, whatever the density of its points. ``coordinates`` are the channels between which the encoder measures distances.
    """

    points: int
    channels: int = 6
    coordinates: tuple[int, ...] = (0, 1, 2)
    centre: str = "mean"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (self.points, self.channels)


@dataclass(frozen=True)
class ImuInput:
    """Motion that an encoder wants: the first ``steps`` samples at ``sample_rate`` Hz, zeros after the end, (6, steps)."""

    sample_rate: float
    steps: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (6, self.steps)


@dataclass(frozen=True)
class FmriInput:
    """Brain activity that an encoder wants: as many voxels as it was made for, shape (voxels,)."""

    voxels: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        return (self.voxels,)


class OwnInput(Protocol):
    """Raw input of a medium that another package brings: a frozen dataclass that prepares it itself."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one raw input."""
        ...

    def prepare(self, medium: Any) -> Any:
        """Return the raw input, a tensor of that shape, of one medium."""
        ...


InputSpec = (
    ImageInput | VideoInput | AudioInput | MapInput | DisparityInput | PointsInput | ImuInput | FmriInput | OwnInput
)
"""Whatever raw input an encoder may want."""
