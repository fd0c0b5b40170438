"""Tensors to files: PNG, JPEG, WebP; WAV, FLAC, OGG, MP3; MP4, WebM, GIF.

Each file is encoded in memory and then written at once, so a full disk or an interruption leaves the old file or none.
"""

import os
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import PIL.Image
import soundfile
import torch
from av.video.reformatter import ColorRange, Colorspace
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.base import suffix_of, write_atomically

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
VIDEO_SUFFIXES = (".mp4", ".webm", ".gif")
_MP3_RATES = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_MAX_VORBIS_RATE = 200_000
_BLOCK = 65536
_OPUS_RATES = (8000, 12000, 16000, 24000, 48000)


def write_image(pixels: Tensor, path: str | os.PathLike[str], quality: int = 95) -> None:
    """Write a picture.

    Args:
        pixels: uint8, shape (3, H, W).
        path: Ends in .png, .jpg, .jpeg or .webp.
        quality: 1..100, for JPEG and WebP.

    Raises:
        MediaError: Unknown suffix, or the file can't be written.
    """
    suffix = suffix_of(path, "image", IMAGE_SUFFIXES)
    buffer = BytesIO()
    picture = PIL.Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    try:
        picture.save(buffer, {".png": "PNG", ".webp": "WEBP"}.get(suffix, "JPEG"), quality=quality)
    except (OSError, ValueError) as error:
        size = f"{picture.width}x{picture.height}"
        raise MediaError(f"{os.fspath(path)!r}: a picture of {size} can't be encoded: {error}.") from error
    write_atomically(path, buffer.getvalue())


def write_audio(samples: Tensor, sample_rate: int, path: str | os.PathLike[str]) -> None:
    """Write a sound, mono; WAV and FLAC hold 16 bit.

    Args:
        samples: float32 in [-1, 1], shape (T,).
        sample_rate: Samples a second; MP3 holds nine rates only, OGG at most 200000.
        path: Ends in .wav, .flac, .ogg or .mp3.

    Raises:
        MediaError: Unknown suffix, a sample rate that MP3 can't hold, or the file can't be written.
    """
    suffix = suffix_of(path, "audio", AUDIO_SUFFIXES)
    if suffix == ".mp3" and sample_rate not in _MP3_RATES:
        accepted = ", ".join(map(str, _MP3_RATES))
        raise MediaError(f"{os.fspath(path)!r}: MP3 can't hold {sample_rate} Hz; resample to one of {accepted}.")
    if suffix == ".ogg" and sample_rate > _MAX_VORBIS_RATE:  # libvorbis ends the process
        raise MediaError(
            f"{os.fspath(path)!r}: OGG can't hold {sample_rate} Hz; resample to at most {_MAX_VORBIS_RATE}."
        )
    buffer = BytesIO()
    try:
        with soundfile.SoundFile(buffer, "w", sample_rate, 1, format=suffix[1:].upper()) as file:
            for block in samples.split(_BLOCK):  # given minutes at once, libvorbis overruns its stack
                file.write(block.numpy())
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        raise MediaError(f"{os.fspath(path)!r}: sound of {sample_rate} Hz can't be encoded: {reason}.") from error
    write_atomically(path, buffer.getvalue())


def write_video(
    frames: Tensor,
    fps: float,
    path: str | os.PathLike[str],
    samples: Tensor | None = None,
    sample_rate: int | None = None,
    crf: int | None = None,
) -> None:
    """Write a video: MP4 (H.264, AAC), WebM (VP9, Opus) or GIF (no sound).

    MP4 and WebM have even sides: an odd one gains a copy of its last row or column.

    Args:
        frames: uint8, shape (F, 3, H, W).
        fps: Frames a second; GIF shows each for a multiple of 10 ms, at least 20 ms.
        path: Ends in .mp4, .webm or .gif.
        samples: Sound track, float32 in [-1, 1], shape (T,).
        sample_rate: Samples a second.
        crf: Constant rate factor, higher is smaller and worse: 0..51 for MP4 (20), 0..63 for WebM (24).

    Raises:
        MediaError: Unknown suffix, or the file can't be written.
    """
    suffix = suffix_of(path, "video", VIDEO_SUFFIXES)
    try:
        if suffix == ".gif":
            content = _encode_gif(frames, fps)
        else:
            content = _encode_container(frames, fps, suffix, samples, sample_rate, crf)
    except (av.FFmpegError, OverflowError) as error:  # the latter where sides or times are too long for GIF
        given = f"{tuple(frames.shape)} at {fps:g} fps, crf {crf}"
        reason = getattr(error, "strerror", None) or str(error)
        raise MediaError(f"{os.fspath(path)!r}: frames {given} can't be encoded: {reason}.") from error
    write_atomically(path, content)


def _encode_gif(frames: Tensor, fps: float) -> bytes:
    pictures = [PIL.Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in frames]
    ends = (np.arange(len(pictures) + 1) * 100 / fps).round().astype(int)  # in GIF's unit, so rounding does not add up
    durations = [int(max(ticks, 2)) * 10 for ticks in np.diff(ends)]  # below 2 ticks browsers slow a GIF down
    buffer = BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return buffer.getvalue()


def _encode_container(
    frames: Tensor, fps: float, suffix: str, samples: Tensor | None, sample_rate: int | None, crf: int | None
) -> bytes:
    height, width = frames.shape[2:]
    if height % 2 or width % 2:
        rows, columns = torch.arange(height + height % 2), torch.arange(width + width % 2)
        frames = frames[:, :, rows.clamp(max=height - 1)][..., columns.clamp(max=width - 1)]
    mp4 = suffix == ".mp4"
    options = {"crf": str(20 if mp4 else 24) if crf is None else str(crf)}
    if not mp4:
        options |= {"b": "0", "deadline": "good", "cpu-used": "5"}
    buffer = BytesIO()
    with av.open(buffer, "w", format=suffix[1:]) as container:
        rate = Fraction(fps).limit_denominator(60_000)
        stream = container.add_stream("libx264" if mp4 else "libvpx-vp9", rate, options)
        stream.width, stream.height, stream.pix_fmt = frames.shape[3], frames.shape[2], "yuv420p"
        # The matrix that the conversion from RGB uses; untagged, players take another one for large pictures.
        stream.codec_context.colorspace, stream.codec_context.color_range = Colorspace.ITU601, ColorRange.MPEG
        if samples is not None and sample_rate is not None:  # tracks are declared before the first frame
            track_rate = sample_rate if sample_rate in (_MP3_RATES if mp4 else _OPUS_RATES) else 48_000
            sound = container.add_stream("aac" if mp4 else "libopus", track_rate, layout="mono")
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if samples is not None and sample_rate is not None:
            wave = av.AudioFrame.from_ndarray(samples.numpy()[None], format="fltp", layout="mono")
            wave.sample_rate, wave.pts = sample_rate, 0  # timed, so that players skip what the codec puts before it
            container.mux(sound.encode(wave))
            container.mux(sound.encode())
    return buffer.getvalue()
