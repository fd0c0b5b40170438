"""Sounds: files, arrays and tensors to mono samples, resampling, and samples to what an encoder wants."""

import math
import os
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import numpy as np
import soundfile
import torch
from torch import Tensor
from torch.nn import functional as F

from mmbridge.errors import MediaError
from mmbridge.media.base import MediaFile, find_file, from_array, hash_content
from mmbridge.media.containers import decode_track
from mmbridge.media.export import write_audio
from mmbridge.media.mel import kaldi_fbank
from mmbridge.modality import register
from mmbridge.specs import AudioInput

MAX_SECONDS = 600
_FORMATS = {"WAV": "WAV", "FLAC": "FLAC", "OGG": "OGG", "MP3": "MP3", "MP4": "MP4 (M4A)", "WebM": "WebM"}
_MAX_CHANNELS = 32
_MAX_PEAK = 4.0
_SILENCE = 1e-6
_UNKNOWN_SIZE = 0x7FFF0000
# A Kaiser window this long and this steep keeps 88 % of the band within 0.1 % and aliases below -80 dB.
_ZERO_CROSSINGS = 48
_KAISER_BETA = 8.0
_ROLLOFF = 0.945
_CHUNK = 8192
_MAX_FILTERS = 4_000_000  # values of a filter bank that is kept; rates without a large common divisor exceed it


@register("audio")
@dataclass(eq=False, repr=False)
class Audio:
    """A sound.

    Args:
        samples: Mono, float32 in [-1, 1], shape (T,); kept on the CPU.
        sample_rate: Samples a second.

    Raises:
        MediaError: Another dtype or shape, no samples, or a rate below 1.
    """

    modality: ClassVar[str] = "audio"
    noun: ClassVar[str] = "audio"
    suffix: ClassVar[str] = ".wav"
    samples: Tensor
    sample_rate: int

    def __post_init__(self) -> None:
        if self.samples.dtype != torch.float32 or self.samples.ndim != 1 or not len(self.samples):
            raise MediaError(
                f"audio holds float32 samples of shape (T,), not {self.samples.dtype} of shape "
                f"{tuple(self.samples.shape)}; Audio.load converts arrays and tensors."
            )
        if not self.samples.isfinite().all():
            raise MediaError("audio holds NaN or infinite samples; replace them by numbers in -1..1.")
        self.samples = self.samples.detach().cpu()
        if self.sample_rate < 1:
            raise MediaError(f"audio with a sample rate of {self.sample_rate} Hz can't be used; it must be at least 1.")

    def __repr__(self) -> str:
        return f"Audio({self.seconds:.2f} s, {self.sample_rate} Hz)"

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.samples) / self.sample_rate

    @classmethod
    def load(
        cls, source: object, *, sample_rate: int | None = None, root: str | os.PathLike[str] | None = None
    ) -> "Audio":
        """Read a sound; several channels become their mean.

        Samples that a file's decoder puts slightly outside [-1, 1] are clipped. Silence is a valid sound.

        Args:
            source: A path or the bytes of a WAV, FLAC, OGG, MP3, MP4, M4A or WebM file; an array or tensor (T,),
                (T, C) or (C, T) of up to 32 channels, the shorter side being C, as floats in [-1, 1] or int16, int32
                or uint8 at full scale; or an ``Audio``.
            sample_rate: Samples a second of an array or tensor; only for these.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged, of another format, without sound or longer than 10
                minutes; the array has another shape, dtype or range, or holds NaN; ``sample_rate`` is missing or
                superfluous; a path leads out of ``root``.
        """
        if isinstance(source, (np.ndarray, Tensor)):
            if sample_rate is None:
                raise MediaError("an array of samples does not say its rate; pass sample_rate=, in samples a second.")
            audio = cls(_from_values(source), sample_rate)
            _check_length(len(audio.samples), sample_rate, "the sound")
            return audio
        if sample_rate is not None:
            raise MediaError(
                f"sample_rate={sample_rate} is for arrays and tensors; a file holds its own rate: "
                "load it without, then call resample()."
            )
        if isinstance(source, Audio):
            return source
        if isinstance(source, (str, os.PathLike, bytes)):
            medium = find_file(source, "audio", _FORMATS, root)
            if medium.format in ("MP4", "WebM", "MP3"):
                track = cls.from_track(medium)
                if track is None:
                    raise MediaError(f"{medium.name} holds no sound; choose another file, or load a video as a video.")
                return track
            return cls(*_from_file(medium))
        raise MediaError(
            f"audio can't be loaded from {type(source).__name__}; "
            "accepted: a path, bytes, a NumPy array or torch tensor with sample_rate=, or an Audio."
        )

    @classmethod
    def from_track(cls, medium: MediaFile) -> "Audio | None":
        """Read the sound track of a video that was found already; None where it has none."""
        track = decode_track(medium, MAX_SECONDS)
        return None if track is None else cls(_checked(track[0], medium.name, _MAX_PEAK), track[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a WAV, FLAC, OGG or MP3 file, whole or not at all.

        Raises:
            MediaError: Unknown suffix, a rate that the format can't hold, or the file can't be written.
        """
        write_audio(self.samples, self.sample_rate, path)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the samples and their rate."""
        return hash_content(f"{self.modality} {self.sample_rate}", self.samples)

    def resample(self, rate: int) -> "Audio":
        """Return the sound at another sample rate, band-limited to the lower one.

        A windowed sinc (Kaiser, 48 zero crossings a side) is evaluated at the exact rational positions of the new
        samples: flat within 0.1 % up to 88 % of the lower Nyquist frequency, aliases below -60 dB.

        Raises:
            MediaError: ``rate`` is below 1.
        """
        if rate == self.sample_rate:
            return self
        if rate < 1:
            raise MediaError(f"audio can't be resampled to {rate} Hz; the rate must be at least 1.")
        return Audio(_resample(self.samples, self.sample_rate, rate).clamp(-1, 1), rate)


def _check_length(length: int, rate: int, name: str) -> None:
    if length > MAX_SECONDS * rate:
        raise MediaError(f"{name} lasts {length / rate:.0f} s; at most {MAX_SECONDS} s are read: cut it first.")


def _from_values(values: np.ndarray | Tensor) -> Tensor:
    what = "the array" if isinstance(values, np.ndarray) else "the tensor"
    dtype = values.dtype.name if isinstance(values, np.ndarray) else str(values.dtype).removeprefix("torch.")
    shape = tuple(values.shape)
    scale = {"int16": 2**15, "int32": 2**31, "uint8": 2**7}.get(dtype)
    if not scale and "float" not in dtype:
        raise MediaError(f"{what} has dtype {dtype}; accepted: floats in -1..1, int16, int32 or uint8 at full scale.")
    if 0 in shape or values.ndim not in (1, 2):
        raise MediaError(f"{what} has shape {shape}; audio is (T,), (T, C) or (C, T), with at least one sample.")
    if values.ndim == 2 and (min(shape) > _MAX_CHANNELS or (shape[0] == shape[1] > 1)):
        raise MediaError(
            f"{what} has shape {shape}, in which channels can't be told from samples: the shorter side is the "
            f"channels, at most {_MAX_CHANNELS}; pass the mean over the channels, of shape (T,)."
        )
    if isinstance(values, np.ndarray):
        values = from_array(values)
    samples = values.detach().cpu().float()
    if scale:
        samples = (samples - (128 if dtype == "uint8" else 0)) / scale
    if samples.ndim == 2:
        samples = samples.mean(dim=0 if shape[0] == min(shape) else 1)
    return _checked(samples, what, 1.001)  # the rounding of half precision is forgiven


def _from_file(medium: MediaFile) -> tuple[Tensor, int]:
    if medium.format == "WAV":
        _check_wav(medium)
    elif medium.format == "OGG":
        _check_ogg(medium)
    with medium.decoding(), medium.open() as file:
        try:
            with soundfile.SoundFile(file) as sound:
                rate, announced = sound.samplerate, sound.frames
                _check_length(announced, rate, medium.name)
                samples = torch.from_numpy(sound.read(dtype="float32", always_2d=True).mean(axis=1))
        except soundfile.LibsndfileError as error:  # its texts name our reader's address
            raise medium.damaged("libsndfile can't decode it") from error
    if len(samples) < announced:
        raise medium.damaged(f"it holds {len(samples)} of {announced} samples")
    if not len(samples):
        raise MediaError(f"{medium.name} holds no {medium.format} samples, or was cut off; export or fetch it again.")
    return _checked(samples, medium.name, _MAX_PEAK), rate


def _check_wav(medium: MediaFile) -> None:
    """Raise MediaError where a WAV file is shorter than its header says, which libsndfile reads without a word."""
    with medium.open() as file:
        announced = int.from_bytes(file.read(8)[4:], "little") + 8
        held = file.seek(0, os.SEEK_END)
    # A program that writes to a pipe can't know the size and puts the largest; some count the first 8 bytes twice.
    if held + 8 < announced < _UNKNOWN_SIZE:
        raise medium.damaged(f"it holds {held} of {announced} bytes")


def _check_ogg(medium: MediaFile) -> None:
    """Raise MediaError where the last page of an OGG file is cut, which libsndfile reads without a word."""
    with medium.open() as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 2**17))
        tail = file.read()
    page = tail[tail.rfind(b"OggS") :]  # 27 bytes, the last of which counts the segments; their lengths; the segments
    if len(page) < 27 or len(page) < 27 + page[26] + sum(page[27 : 27 + page[26]]):
        raise medium.damaged("its last page is cut")


def _checked(samples: Tensor, what: str, limit: float) -> Tensor:
    if not samples.isfinite().all():
        raise MediaError(f"{what} holds NaN or infinite samples; replace them by numbers in -1..1.")
    peak = samples.abs().max().item()
    if peak > limit:
        raise MediaError(f"{what} reaches {peak:g}; floats must lie in -1..1: divide them by full scale.")
    return samples.clamp(-1, 1)


def _resample(samples: Tensor, old: int, new: int) -> Tensor:
    """Evaluate the band-limited signal (T,) at ceil(T * new / old) positions, ``old / new`` samples apart."""
    up, down = new // math.gcd(old, new), old // math.gcd(old, new)
    cutoff = _ROLLOFF * min(1.0, up / down)  # in units of the old Nyquist frequency
    half = math.ceil(_ZERO_CROSSINGS / cutoff)
    count = -(-len(samples) * up // down)
    padded = F.pad(samples, (half, down + half))
    if up * (down + 2 * half) <= _MAX_FILTERS:  # ``up`` outputs for each ``down`` inputs: one strided convolution
        filters = _sinc_filters(up, down, half, cutoff)  # (up, down + 2 * half)
        padded = F.pad(padded, (0, -len(samples) % down))
        return F.conv1d(padded[None, None], filters[:, None], stride=down)[0].T.flatten()[:count]
    windows = padded.unfold(0, 2 * half, 1)  # (T + down, 2 * half), a view
    pieces = []
    for positions in (torch.arange(count) * down).split(_CHUNK):  # in units of 1 / up samples
        offsets = torch.arange(-half, half) - (positions % up)[:, None].double() / up
        pieces.append((windows[positions // up] * _windowed_sinc(offsets, cutoff)).sum(dim=1))
    return torch.cat(pieces)


@lru_cache(maxsize=8)
def _sinc_filters(up: int, down: int, half: int, cutoff: float) -> Tensor:
    steps = torch.arange(up, dtype=torch.float64)[:, None] * down / up
    return _windowed_sinc(torch.arange(-half, down + half) - steps, cutoff)


def _windowed_sinc(offsets: Tensor, cutoff: float) -> Tensor:
    """Evaluate a low-pass of the relative ``cutoff`` at offsets in samples, shape (N, taps), each row of unit sum."""
    ratio = offsets * (cutoff / _ZERO_CROSSINGS)
    window = torch.special.i0(_KAISER_BETA * (1 - ratio.square()).clamp_min(0).sqrt()) * (ratio.abs() <= 1)
    kernel = torch.sinc(offsets * cutoff) * window
    return (kernel / kernel.sum(dim=1, keepdim=True)).float()


def prepare_audio(audio: Audio, spec: AudioInput) -> Tensor:
    """Turn a sound into log-mel clips, as ImageBind's loader does (Girdhar et al. 2023, arXiv 2305.05665).

    ``spec.clips`` clips start at evenly spaced times between 0 and the last possible one; a sound shorter than a clip
    is taken whole each time. Each clip, minus its mean, becomes a Kaldi filter bank (Hanning window, 25 ms every
    10 ms), which is cut or filled with zeros to ``spec.frames`` and then normalised.

    Returns:
        Floats, shape (clips, 1, mel_bins, frames).

    Raises:
        MediaError: The sound is silent, or shorter than one frame of 25 ms.
    """
    peak = (audio.samples - audio.samples.mean()).abs().max().item()
    if peak < _SILENCE:
        raise MediaError(
            f"the sound of {audio.seconds:.2f} s is silent (peak {peak:.1e}); an encoder has nothing to hear."
        )
    samples = audio.resample(spec.sample_rate).samples
    length = round(spec.seconds * spec.sample_rate)
    clips = []
    for start in torch.linspace(0, max(0, len(samples) - length), spec.clips, dtype=torch.float64).long().tolist():
        clip = samples[start : start + length]
        mel = kaldi_fbank(clip - clip.mean(), spec.sample_rate, spec.mel_bins)  # (F, mel_bins)
        if not len(mel):
            raise MediaError(f"the sound lasts {1000 * audio.seconds:.0f} ms; an encoder needs at least 25 ms.")
        clips.append(F.pad(mel.T, (0, spec.frames - len(mel))))  # a negative width cuts
    return ((torch.stack(clips) - spec.mean) / spec.std)[:, None]
