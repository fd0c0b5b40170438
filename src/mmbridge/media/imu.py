"""Motion: accelerations and turn rates of an inertial measurement unit, from files, arrays and tensors."""

import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.arrays import check_finite, encode_npy, read_npy, read_table, to_floats
from mmbridge.media.base import MediaFile, find_file, hash_content, suffix_of, write_atomically
from mmbridge.media.drawing import draw_curves
from mmbridge.media.image import Image
from mmbridge.modality import register
from mmbridge.specs import ImuInput

_FORMATS = {"NumPy": "NPY", "text": "text (CSV, TXT)"}
_SUFFIXES = (".csv", ".npy")
_TIMES = ("time", "t", "timestamp", "seconds", "s")
_CHANNELS = ("ax", "ay", "az", "gx", "gy", "gz")
_MIN_RATE, _MAX_RATE = 1, 100_000


@register("imu")
@dataclass(eq=False, repr=False)
class Imu:
    """A trace of an inertial measurement unit.

    Args:
        samples: float32, shape (6, T): accelerations along x, y, z in m/s2, then turn rates around x, y, z in rad/s; kept
            on the CPU.
        sample_rate: Samples a second.

    Raises:
        MediaError: Another dtype or shape, fewer than 2 samples, NaN or infinite values, or a rate outside 1..100000.
    """

    modality: ClassVar[str] = "imu"
    noun: ClassVar[str] = "an IMU trace"
    suffix: ClassVar[str] = ".csv"
    samples: Tensor
    sample_rate: float

    def __post_init__(self) -> None:
        shape = tuple(self.samples.shape)
        if self.samples.dtype != torch.float32 or self.samples.ndim != 2 or shape[0] != 6 or shape[1] < 2:
            raise MediaError(
                "an IMU trace holds float32 samples of shape (6, T), at least 2 of them, not "
                f"{self.samples.dtype} of shape {shape}; Imu.load converts arrays and tensors."
            )
        check_finite(self.samples, "the IMU trace")
        if not _MIN_RATE <= self.sample_rate <= _MAX_RATE:
            raise MediaError(
                f"an IMU trace of {self.sample_rate:g} samples a second can't be used; accepted: {_MIN_RATE}..{_MAX_RATE} "
                "(times are in seconds)."
            )
        self.samples = self.samples.detach().cpu()

    def __repr__(self) -> str:
        return f"Imu({self.seconds:.2f} s, {self.sample_rate:g} Hz)"

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.samples.shape[1] / self.sample_rate

    @classmethod
    def load(
        cls, source: object, *, sample_rate: float | None = None, root: str | os.PathLike[str] | None = None
    ) -> "Imu":
        """Read a trace.

        Args:
            source: A path or the bytes of an NPY file or of a CSV with a row of 6 numbers per sample, with or without a
                header, and perhaps a column of times in seconds: the first, or one with the header "time", "t",
                "timestamp", "seconds" or "s"; an array or tensor (6, T) or (T, 6); or an ``Imu``.
            sample_rate: Samples a second, for what has no times. Uneven times are made even by interpolation.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged or of another format; there are not 6 channels; values are NaN;
                times do not grow; the rate is missing or superfluous; a path leads out of ``root``.
        """
        if isinstance(source, (str, os.PathLike, bytes)):
            medium = find_file(source, "imu", _FORMATS, root)
            name, times = medium.name, None
            if medium.format == "NumPy":
                values = read_npy(medium)
            else:
                values, times = _columns(medium)
            if times is not None:
                _check_superfluous(sample_rate)
                return cls(*_even(to_floats(values, name), times, name))
        elif isinstance(source, (np.ndarray, Tensor)):
            name, values = "the array" if isinstance(source, np.ndarray) else "the tensor", source
        elif isinstance(source, Imu):
            _check_superfluous(sample_rate)
            return source
        else:
            raise MediaError(
                f"an IMU trace can't be loaded from {type(source).__name__}; "
                "accepted: a path, bytes, a NumPy array, a torch tensor, or an Imu."
            )
        if values.ndim != 2 or 6 not in values.shape:
            raise MediaError(
                f"{name} has shape {tuple(values.shape)}; an IMU trace is (6, T) or (T, 6): three accelerations, three turn "
                "rates."
            )
        if sample_rate is None:
            raise MediaError(
                f"{name} does not say its rate; pass sample_rate=, in samples a second, or add a column of times in seconds."
            )
        samples = to_floats(values, name)
        return cls((samples if len(samples) == 6 else samples.T).contiguous(), float(sample_rate))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a CSV file with times, or an NPY file (6, T), which does not hold the rate; whole or not at all.

        Raises:
            MediaError: Unknown suffix, or the file can't be written.
        """
        if suffix_of(path, "imu", _SUFFIXES) == ".npy":
            write_atomically(path, encode_npy(self.samples))
            return
        rows = [
            f"{index / self.sample_rate!r}," + ",".join(f"{value:.9g}" for value in row)
            for index, row in enumerate(self.samples.T.tolist())
        ]
        write_atomically(path, "\n".join([",".join(["time", *_CHANNELS]), *rows, ""]).encode())

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the samples and their rate."""
        return hash_content(f"{self.modality} {self.sample_rate!r}", self.samples)

    def resample(self, rate: float) -> "Imu":
        """Return the trace at another rate: interpolated between samples, averaged by a triangle where the rate falls.

        Raises:
            MediaError: ``rate`` is outside 1..100000, or would leave fewer than 2 samples.
        """
        if rate == self.sample_rate:
            return self
        factor = (1.0, rate / self.sample_rate)
        if not _MIN_RATE <= rate <= _MAX_RATE or self.samples.shape[1] * factor[1] < 2:
            raise MediaError(f"an IMU trace of {self.seconds:g} s can't be resampled to {rate:g} samples a second.")
        resized = F.interpolate(self.samples[None, None], scale_factor=factor, mode="bilinear", antialias=True)
        return Imu(resized[0, 0].contiguous(), rate)

    def draw(self, width: int = 480, height: int = 240) -> Image:
        """Return the curves over time, accelerations above turn rates: x red, y green, z blue."""
        return Image(draw_curves(self.samples.unflatten(0, (2, 3)), width, height))


def _check_superfluous(sample_rate: float | None) -> None:
    if sample_rate is not None:
        raise MediaError(f"sample_rate={sample_rate:g} is for samples without times; these know their own rate.")


def _columns(medium: MediaFile) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the samples (T, 6) of a table, and their times (T,) where it has some."""
    names, table = read_table(medium)
    if table.shape[1] == 6 and not set(names) & set(_TIMES):
        return table, None
    places = [index for index, name in enumerate(names) if name in _TIMES] if names else [0]
    if table.shape[1] != 7 or len(places) != 1:
        raise MediaError(
            f"{medium.name} has {table.shape[1]} columns ({', '.join(names) or 'without names'}); an IMU trace has 6, three "
            "accelerations and three turn rates, and perhaps one of times, called 'time'."
        )
    return np.delete(table, places[0], axis=1), table[:, places[0]]


def _even(samples: Tensor, times: np.ndarray, name: str) -> tuple[Tensor, float]:
    """Return samples (6, T) at even times, and their rate, the mean one."""
    if len(times) < 2 or not (np.isfinite(times).all() and (np.diff(times) > 0).all()):
        raise MediaError(f"the times of {name} do not grow from row to row; sort its rows, in seconds.")
    rate = (len(times) - 1) / float(times[-1] - times[0])
    rate = float(f"{rate:.9g}")  # without the rounding of written times
    even = times[0] + np.arange(len(times)) / rate
    if np.abs(even - times).max() * rate > 0.01:
        samples = torch.from_numpy(
            np.stack([np.interp(even, times, column) for column in samples.T.numpy()], axis=1).astype(np.float32)
        )
    return samples.T.contiguous(), rate


def prepare_imu(imu: Imu, spec: ImuInput) -> Tensor:
    """Turn a trace into what an encoder wants: resampled, its first ``spec.steps`` samples, zeros after its end.

    Returns:
        Floats, shape (6, steps).
    """
    samples = imu.resample(spec.sample_rate).samples[:, : spec.steps]
    return F.pad(samples, (0, spec.steps - samples.shape[1]))
