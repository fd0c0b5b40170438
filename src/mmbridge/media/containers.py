"""Frames and sound tracks out of MP4, WebM and GIF, by PyAV."""

import itertools
from collections.abc import Iterator

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.base import Encoded, check_pixels

MAX_BYTES = 2 * 1024**3
# A demuxer named by us can't be talked into opening further files or addresses, as a play list could.
_DEMUXERS = {"MP4": "mov", "WebM": "matroska", "GIF": "gif"}


def decode_track(encoded: Encoded, max_seconds: float) -> tuple[Tensor, int] | None:
    """Decode the first sound track.

    Returns:
        Samples (C, T) and sample rate; None where the file has no sound track.

    Raises:
        MediaError: The file is damaged, or the track lasts longer than ``max_seconds``.
    """
    with encoded.decoding(), encoded.open() as file, av.open(file, format=_DEMUXERS[encoded.format]) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        rate = stream.rate
        resampler = av.AudioResampler("fltp", rate=rate)
        pieces, total = [], 0
        for frame in container.decode(stream):
            for piece in resampler.resample(frame):
                pieces.append(torch.from_numpy(piece.to_ndarray()))
                total += pieces[-1].shape[1]
            if total > max_seconds * rate:
                raise MediaError(
                    f"the sound of {encoded.name} lasts longer than {max_seconds:g} s, the longest that is read; cut it."
                )
    if not total:
        raise encoded.damaged("its sound track is empty")
    return torch.cat(pieces, dim=1), rate


def decode_frames(encoded: Encoded, max_frames: int | None) -> tuple[Tensor, float]:
    """Decode the pictures of the first video track at a constant rate.

    A variable rate becomes constant (the reciprocal of the median frame time) by showing or dropping frames.

    Args:
        encoded: The file.
        max_frames: Where the video has more, this many are kept, evenly spaced.

    Returns:
        uint8 frames (F, 3, H, W), and how many of them make up a second.

    Raises:
        MediaError: The file is damaged, has no frames, or would fill more than 2 GiB.
    """
    times, end, nominal = _frame_times(encoded)
    interval = float(np.median(np.diff(times))) if len(times) > 1 else end - times[0]
    fps, shown = _constant_rate(times, end, interval, nominal)
    if max_frames is not None and len(shown) > max_frames:
        kept = ((np.arange(max_frames) + 0.5) * len(shown) / max_frames).astype(int)
        fps, shown = fps * max_frames / len(shown), shown[kept]
    with encoded.decoding(), encoded.open() as file, av.open(file, format=_DEMUXERS[encoded.format]) as container:
        stream = _video_stream(container, encoded)
        return _collect(encoded, container.decode(stream), shown + interval / 4), fps


def _video_stream(container: InputContainer, encoded: Encoded) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song is no video
            return stream
    raise MediaError(f"{encoded.name} has no video track; load it as audio, or choose another file.")


def _frame_times(encoded: Encoded) -> tuple[np.ndarray, float, float]:
    """Return when each frame is shown, when the last one ends (seconds), and the nominal rate; nothing is decoded."""
    with encoded.decoding(), encoded.open() as file, av.open(file, format=_DEMUXERS[encoded.format]) as container:
        stream = _video_stream(container, encoded)
        check_pixels(stream.codec_context.width, stream.codec_context.height, encoded.name)
        packets = [p for p in container.demux(stream) if p.pts is not None and p.size and not p.is_discard]
        if not packets:
            raise MediaError(f"{encoded.name} is a video without frames; choose another file.")
        if stream.frames > len(packets):
            raise encoded.damaged(f"it holds {len(packets)} of {stream.frames} frames")
        tick, nominal = float(stream.time_base), float(stream.average_rate or 0)
        times = np.unique([p.pts * tick for p in packets])
        end = max((p.pts + (p.duration or 0)) * tick for p in packets)
    if end <= times[-1]:  # the container does not say how long the last frame is shown
        end = times[-1] + (float(np.median(np.diff(times))) if len(times) > 1 else 1 / (nominal or 1))
    return times, end, nominal


def _constant_rate(times: np.ndarray, end: float, interval: float, nominal: float) -> tuple[float, np.ndarray]:
    """Return frames a second, and the times at which a constant rate shows a frame."""
    steps = np.arange(len(times))
    # Stored times are rounded, to 1 ms by WebM and to 10 ms by GIF, so the nominal rate is better where it fits them.
    for fps, tolerance in ((nominal, 0.002), (len(times) / (end - times[0]), interval / 4)):
        if fps > 0 and np.abs(times - times[0] - steps / fps).max() < tolerance:
            return fps, times[0] + steps / fps
    count = max(1, round((end - times[0]) / interval))
    return 1 / interval, times[0] + np.arange(count) * interval


def _collect(encoded: Encoded, decoded: Iterator[av.VideoFrame], wanted: np.ndarray) -> Tensor:
    """Return, for each wanted time, the frame shown then: uint8 (F, 3, H, W)."""
    frames, filled, last = None, 0, None
    for frame in itertools.chain(decoded, [None]):
        if frame is not None and frame.time is None:
            continue
        # The frame before this one is shown up to here; pixels are converted only where they are wanted.
        until = len(wanted) if frame is None else int(np.searchsorted(wanted, frame.time))
        if last is not None and until > filled:
            pixels = _pixels(last)
            if frames is None:
                _check_bytes(encoded, len(wanted), pixels.numel())
                frames = torch.empty(len(wanted), *pixels.shape, dtype=torch.uint8)
            if pixels.shape != frames.shape[1:]:
                raise encoded.damaged("its frames change size")
            frames[filled:until] = pixels
            filled = until
        last = frame or last
        if filled == len(wanted):
            break
    if frames is None:
        raise encoded.damaged("none of its frames can be decoded")
    return frames


def _check_bytes(encoded: Encoded, count: int, size: int) -> None:
    if count * size > MAX_BYTES:
        raise MediaError(
            f"{encoded.name} would fill {count * size / 1024**3:.1f} GiB ({count} frames); "
            f"at most {MAX_BYTES // 1024**3} GiB are read: pass max_frames={MAX_BYTES // size} or fewer."
        )


def _pixels(frame: av.VideoFrame) -> Tensor:
    """Convert a frame to uint8 (3, H, W): transparency on white, the camera's rotation applied."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba").astype(np.float32)
        alpha = rgba[..., 3:] / 255
        rgb = (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24")
    turns = round(frame.rotation / 90) % 4  # anticlockwise, as NumPy's
    return torch.from_numpy(np.rot90(rgb, turns).copy()).permute(2, 0, 1)
