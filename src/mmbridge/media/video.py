"""Videos: files, arrays and tensors to frames, and frames to the clips that an encoder wants."""

import math
import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.audio import Audio
from mmbridge.media.base import find_file, from_array, hash_content, to_uint8
from mmbridge.media.containers import decode_frames
from mmbridge.media.export import write_video
from mmbridge.media.image import normalise, resize, resize_short_side
from mmbridge.modality import register
from mmbridge.specs import VideoInput

_MIN_FPS, _MAX_FPS = 0.001, 1000
_FORMATS = {"MP4": "MP4", "WebM": "WebM", "GIF": "GIF"}


@register("video")
@dataclass(eq=False, repr=False)
class Video:
    """A video, and its sound where it has one.

    Args:
        frames: RGB, uint8, shape (F, 3, H, W); kept on the CPU.
        fps: Frames a second.
        audio: Its sound track.

    Raises:
        MediaError: Another dtype or shape, no frames, or fps outside 0.001..1000.
    """

    modality: ClassVar[str] = "video"
    noun: ClassVar[str] = "a video"
    suffix: ClassVar[str] = ".mp4"
    frames: Tensor
    fps: float
    audio: Audio | None = None

    def __post_init__(self) -> None:
        frames = self.frames
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[1] != 3:
            raise MediaError(
                f"a video holds uint8 frames of shape (F, 3, H, W), not {frames.dtype} of shape "
                f"{tuple(frames.shape)}; Video.load converts arrays and tensors."
            )
        if not frames.numel():
            raise MediaError(f"a video without frames or pixels can't be used: its shape is {tuple(frames.shape)}.")
        self.frames = frames.detach().cpu()
        if not _MIN_FPS <= self.fps <= _MAX_FPS:
            raise MediaError(
                f"a video with {self.fps:g} frames a second can't be used; accepted: {_MIN_FPS}..{_MAX_FPS}."
            )

    def __repr__(self) -> str:
        count, _, height, width = self.frames.shape
        return f"Video({width}x{height}, {count} frames, {self.fps:g} fps{', sound' if self.audio else ''})"

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return len(self.frames) / self.fps

    @classmethod
    def load(
        cls,
        source: object,
        *,
        fps: float | None = None,
        max_frames: int | None = None,
        with_audio: bool = True,
        root: str | os.PathLike[str] | None = None,
    ) -> "Video":
        """Read a video; the camera's rotation is applied, a variable frame rate becomes constant.

        Args:
            source: A path or the bytes of an MP4, WebM or GIF file; an array (F, H, W, 3) or a tensor (F, 3, H, W),
                uint8 or floats in 0..1; or a ``Video``.
            fps: Frames a second of an array or tensor; only for these.
            max_frames: Keep at most so many, evenly spaced, with ``fps`` lowered to match. The rest of a file is
                decoded but never held.
            with_audio: Read the sound track too.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged, of another format, without frames, or would fill more than
                2 GiB; its sound lasts longer than 10 minutes; the array has another shape, dtype or range, or holds
                NaN; ``fps`` is missing or superfluous; a path leads out of ``root``.
        """
        if max_frames is not None and max_frames < 1:
            raise MediaError(f"max_frames={max_frames} leaves no frame of a video; it must be at least 1.")
        if isinstance(source, (np.ndarray, Tensor)):
            if fps is None:
                raise MediaError("an array of frames does not say its rate; pass fps=, in frames a second.")
            video = cls(_from_values(source), fps)
        elif fps is not None:
            raise MediaError(f"fps={fps:g} is for arrays and tensors; a file holds its own rate: load it without.")
        elif isinstance(source, Video):
            video = source if with_audio else cls(source.frames, source.fps)
        elif isinstance(source, (str, os.PathLike, bytes)):
            medium = find_file(source, "video", _FORMATS, root)
            frames, rate = decode_frames(medium, max_frames)
            return cls(frames, rate, Audio.from_track(medium) if with_audio else None)
        else:
            raise MediaError(
                f"a video can't be loaded from {type(source).__name__}; "
                "accepted: a path, bytes, a NumPy array or torch tensor with fps=, or a Video."
            )
        return video if max_frames is None else _subsample(video, max_frames)

    def save(self, path: str | os.PathLike[str], *, crf: int | None = None) -> None:
        """Write an MP4 (H.264, AAC), WebM (VP9, Opus) or GIF file (no sound), whole or not at all.

        Args:
            path: Ends in .mp4, .webm or .gif.
            crf: Constant rate factor, higher is smaller and worse: 0..51 for MP4 (20), 0..63 for WebM (24).

        Raises:
            MediaError: Unknown suffix, or the file can't be written.
        """
        samples, rate = (self.audio.samples, self.audio.sample_rate) if self.audio else (None, None)
        write_video(self.frames, self.fps, path, samples, rate, crf)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the frames, their rate and the sound."""
        sound = self.audio.content_hash if self.audio else "silent"
        return hash_content(f"{self.modality} {self.fps!r} {sound}", self.frames)


def _from_values(values: np.ndarray | Tensor) -> Tensor:
    shape = tuple(values.shape)
    if isinstance(values, np.ndarray):
        what, accepted = "the array", "(F, H, W, 3)"
        if values.dtype.kind not in "buf":
            raise MediaError(f"the array has dtype {values.dtype}; accepted: uint8, or floats in 0..1.")
        values = from_array(values)
        values = values.movedim(-1, 1) if values.ndim == 4 else values
    else:
        what, accepted = "the tensor", "(F, 3, H, W)"
    if values.ndim != 4 or values.shape[1] != 3:
        raise MediaError(f"{what} has shape {shape}; a video is {accepted}.")
    if not values.numel():
        raise MediaError(f"{what} is a video without frames or pixels: its shape is {shape}.")
    return to_uint8(values, what).contiguous()


def _subsample(video: Video, count: int) -> Video:
    total = len(video.frames)
    if total <= count:
        return video
    kept = ((torch.arange(count, dtype=torch.float64) + 0.5) * total / count).long()
    return Video(video.frames[kept], video.fps * count / total, video.audio)


def prepare_video(video: Video, spec: VideoInput) -> Tensor:
    """Turn a video into clips, as ImageBind's loader does (Girdhar et al. 2023, arXiv 2305.05665).

    ``spec.clips`` clips start at evenly spaced times between 0 and the last possible one; a video shorter than a clip
    is taken whole each time. Of each clip ``spec.frames`` frames are taken, evenly spaced from its first to its last.
    The short side is resized to ``spec.size``; one crop is the centre, three are start, centre and end of the longer
    side.

    Returns:
        Floats, shape (clips * crops, 3, frames, size, size), the crops of a clip side by side.

    Raises:
        MediaError: ``spec.crops`` is neither 1 nor 3.
    """
    if spec.crops not in (1, 3):
        raise MediaError(f"a video can't be prepared in {spec.crops} crops; accepted: 1 or 3.")
    total = len(video.frames)
    starts = torch.linspace(0, max(0.0, video.seconds - spec.seconds), spec.clips, dtype=torch.float64)
    rows = []
    for start in starts.tolist():
        first = min(math.ceil(start * video.fps - 1e-6), total - 1)  # 1e-6: the rounding of start * fps
        last = min(max(math.ceil((start + spec.seconds) * video.fps - 1e-6), first + 1), total) - 1
        rows.append(torch.linspace(first, last, spec.frames, dtype=torch.float64).long())
    wanted, places = torch.stack(rows).unique(return_inverse=True)  # frames that clips share are resized once
    frames = resize_short_side(video.frames[wanted], spec.size)  # (N, 3, H, W)
    height, width = frames.shape[2:]
    spare = max(height, width) - spec.size
    crops = []
    for offset in (math.ceil(spare / 2),) if spec.crops == 1 else (0, math.ceil(spare / 2), spare):
        cropped = frames.narrow(2 if height > width else 3, offset, spec.size)
        crops.append(normalise(cropped, spec.mean, spec.std)[places])  # (clips, frames, 3, S, S)
    return torch.stack(crops, dim=1).flatten(0, 1).transpose(1, 2).contiguous()


def crop_video(video: Video, frames: int, height: int, width: int) -> Tensor:
    """Return frames spread evenly over a video, resized to cover a size and cropped at its centre.

    A video of fewer frames repeats some.

    Returns:
        Floats in 0..1, shape (frames, 3, height, width).
    """
    kept = ((torch.arange(frames, dtype=torch.float64) + 0.5) * len(video.frames) / frames).long()
    pixels = video.frames[kept]
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = max(height, round(pixels.shape[2] * scale)), max(width, round(pixels.shape[3] * scale))
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return resize(pixels, *size)[..., top : top + height, left : left + width].float() / 255
