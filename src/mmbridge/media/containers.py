"""Frames and sound tracks out of MP4, WebM, GIF and MP3, by PyAV.

MP3 is here because libsndfile guesses the length of a file of variable bit rate and drops the rest.
"""

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.base import MediaFile, check_pixels

MAX_BYTES = 2 * 1024**3
# A demuxer named by us can't be talked into opening further files or addresses, as a play list could.
_DEMUXERS = {"MP4": "mov", "WebM": "matroska", "GIF": "gif", "MP3": "mp3"}


def decode_track(medium: MediaFile, max_seconds: float) -> tuple[Tensor, int] | None:
    """Decode the first sound track; several channels become their mean.

    Returns:
        Mono samples (T,) and sample rate; None where the file has no sound track, or an empty one.

    Raises:
        MediaError: The file is damaged, or the track lasts longer than ``max_seconds``.
    """
    _scan(medium)
    with _opened(medium) as container:
        if not container.streams.audio:
            return None
        stream = container.streams.audio[0]
        _check_codec(medium, stream)
        rate = stream.rate
        resampler = av.AudioResampler("fltp", rate=rate)
        pieces, total = [], 0
        for frame in container.decode(stream):
            for piece in resampler.resample(frame):
                pieces.append(torch.from_numpy(piece.to_ndarray().mean(axis=0)))
                total += len(pieces[-1])
            if total > (max_seconds + 1) * rate:  # a second for the padding of codecs
                raise MediaError(
                    f"the sound of {medium.name} lasts longer than the {max_seconds:g} s that are read: cut it first."
                )
        if medium.format == "MP3":
            _check_mp3_length(medium, container, total / rate)
    return (torch.cat(pieces), rate) if total else None


def decode_frames(medium: MediaFile, max_frames: int | None) -> tuple[Tensor, float]:
    """Decode the pictures of the first video track at a constant rate.

    A variable rate becomes constant by showing frames again or dropping them; the new rate is that of the densest parts
    (the first decile of the times between frames).

    Args:
        medium: The file.
        max_frames: Where the video has more, this many are kept, evenly spaced.

    Returns:
        uint8 frames (F, 3, H, W), and how many of them make up a second.

    Raises:
        MediaError: The file is damaged, has no frames, or would fill more than 2 GiB.
    """
    spans = _scan(medium)
    with _opened(medium) as container:
        stream = _video_stream(container, medium)
        _check_codec(medium, stream)
        check_pixels(stream.codec_context.width, stream.codec_context.height, medium.name)
        nominal = float(stream.average_rate or 0)
        times = np.unique([start for start, _ in spans[stream.index]])
        if not len(times):
            raise MediaError(f"{medium.name} is a video without frames; choose another file.")
        interval = float(np.quantile(np.diff(times), 0.1, method="lower")) if len(times) > 1 else 1 / (nominal or 1)
        end = max(end for _, end in spans[stream.index])
        if end <= times[-1]:  # the container does not say how long the last frame is shown
            end = times[-1] + interval
        fps, shown = _constant_rate(times, end, interval, nominal)
        if max_frames is not None and len(shown) > max_frames:
            kept = ((np.arange(max_frames) + 0.5) * len(shown) / max_frames).astype(int)
            fps, shown = fps * max_frames / len(shown), shown[kept]
        _check_bytes(medium, len(shown), 3 * stream.codec_context.width * stream.codec_context.height)
        return _collect(medium, container.decode(stream), shown + interval / 4), fps


@contextmanager
def _opened(medium: MediaFile) -> Iterator[InputContainer]:
    with medium.decoding(), medium.open() as file, av.open(file, "r", format=_DEMUXERS[medium.format]) as container:
        yield container


def _scan(medium: MediaFile) -> dict[int, list[tuple[float, float]]]:
    """Return when each packet of each track is shown, as (start, end) in seconds; nothing is decoded.

    Raises:
        MediaError: The file holds less than it announces.
    """
    with _opened(medium) as container:
        spans: dict[int, list[tuple[float, float]]] = {stream.index: [] for stream in container.streams}
        counts = dict.fromkeys(spans, 0)
        for packet in container.demux():
            index, tick = packet.stream.index, packet.time_base
            if packet.size and packet.pts is not None:
                counts[index] += 1
                if not packet.is_discard:
                    spans[index].append((float(packet.pts * tick), float((packet.pts + (packet.duration or 0)) * tick)))
        for stream in container.streams:
            if stream.frames > counts[stream.index]:
                raise medium.damaged(f"it holds {counts[stream.index]} of {stream.frames} packets of a track")
        if medium.format == "WebM" and container.duration:
            announced = container.duration / av.time_base
            held = max((_end(track) for track in spans.values() if track), default=0.0)
            if held < 0.99 * announced - 0.05:
                raise medium.damaged(f"it holds {held:.2f} of {announced:.2f} s")
        if not (container.streams.video or container.streams.audio):
            raise medium.damaged("it holds neither pictures nor sound")
    if medium.format == "GIF":
        with medium.open() as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
            if not file.read().rstrip(b"\0\r\n").endswith(b";"):  # a GIF's last byte
                raise medium.damaged("its end is missing")
    return spans


def _end(track: list[tuple[float, float]]) -> float:
    """Return when a track's last packet ends; it may lack its length, so it lasts as long as the longest before."""
    starts = np.sort([start for start, _ in track])
    return max(max(end for _, end in track), float(starts[-1] + np.diff(starts).max(initial=0.0)))


def _check_mp3_length(medium: MediaFile, container: InputContainer, held: float) -> None:
    """Raise MediaError where an MP3 gave fewer seconds than its info frame says; without that frame FFmpeg guesses."""
    with medium.open() as file:
        head = file.read(2**16)
    announced = (container.duration or 0) / av.time_base
    if (b"Xing" in head or b"Info" in head) and held < 0.99 * announced - 0.01:
        raise medium.damaged(f"it holds {held:.2f} of {announced:.2f} s")


def _video_stream(container: InputContainer, medium: MediaFile) -> VideoStream:
    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a song is no video
            return stream
    raise MediaError(f"{medium.name} has no video track; load it as audio, or choose another file.")


def _check_codec(medium: MediaFile, stream: Stream) -> None:
    if stream.codec_context is None:
        raise MediaError(
            f"the {stream.type} track of {medium.name} is of a codec that is not known; "
            "encode it again, as H.264 with AAC or as VP9 with Opus."
        )


def _constant_rate(times: np.ndarray, end: float, interval: float, nominal: float) -> tuple[float, np.ndarray]:
    """Return frames a second, and the times at which a constant rate shows a frame."""
    steps = np.arange(len(times))
    # Stored times are rounded, to 1 ms by WebM and to 10 ms by GIF, so the nominal rate is better where it fits them.
    for fps, tolerance in ((nominal, 0.002), (len(times) / (end - times[0]), interval / 4)):
        if fps > 0 and np.abs(times - times[0] - steps / fps).max() < tolerance:
            return fps, times[0] + steps / fps
    count = max(1, round((end - times[0]) / interval))
    return 1 / interval, times[0] + np.arange(count) * interval


def _collect(medium: MediaFile, decoded: Iterator[av.VideoFrame], wanted: np.ndarray) -> Tensor:
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
                frames = torch.empty(len(wanted), *pixels.shape, dtype=torch.uint8)
            if pixels.shape != frames.shape[1:]:
                raise medium.damaged("its frames change size")
            frames[filled:until] = pixels
            filled = until
        last = frame or last
        if filled == len(wanted):
            break
    if frames is None:
        raise medium.damaged("none of its frames can be decoded")
    return frames


def _check_bytes(medium: MediaFile, count: int, size: int) -> None:
    if count * size > MAX_BYTES:
        raise MediaError(
            f"{medium.name} would fill {count * size / 1024**3:.1f} GiB ({count} frames); "
            f"at most {MAX_BYTES // 1024**3} GiB are read: pass max_frames={MAX_BYTES // size} or fewer."
        )


def _pixels(frame: av.VideoFrame) -> Tensor:
    """Convert a frame to uint8 (3, H, W): transparency on white, the camera's rotation applied."""
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba")
        alpha = rgba[..., 3:].astype(np.float32) / 255
        rgb = (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    else:
        rgb = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    turns = round(frame.rotation / 90) % 4  # anticlockwise, as NumPy's
    return torch.from_numpy(np.rot90(rgb, turns).copy()).permute(2, 0, 1)
