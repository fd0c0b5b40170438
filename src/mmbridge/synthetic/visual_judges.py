"""Judges of pictures and videos: they measure the factors by segmentation, templates and tracking; nothing is learned.

The object is what differs in chroma from the picture's border. Its coverage (a soft mask) is unmixed from the colour of
the object and a smooth model of the ground; `segmentation` reads the factors from it.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from mmbridge.errors import MediaError
from mmbridge.synthetic.geometry import IMAGE_SIZE
from mmbridge.synthetic.image import LUMA
from mmbridge.synthetic.segmentation import GROUND_TERMS, Found, Verdict, box, grow, isolate, read

_BRIGHTNESS = 3.0  # how much more brightness counts than colour, which compressed files hold at half the resolution
_WEIGHED = np.column_stack([np.eye(3) - LUMA[:, None], _BRIGHTNESS * LUMA]).astype(np.float32)  # RGB to chroma and luma


def judge_image(pixels: np.ndarray) -> Verdict:
    """Read shape, colour, size and place from a picture.

    Args:
        pixels: (H, W, 3) uint8, at least 32 pixels on each side; it is compared at 64x64.

    Returns:
        The value of each factor, None where the picture does not show one.

    Raises:
        MediaError: the array is not a picture.
    """
    pixels = _checked(pixels, "judge_image", "(H, W, 3)", 3)
    return read([_measure(pixels)], "image")


def judge_video(frames: np.ndarray) -> Verdict:
    """Read shape, colour, size, place and motion from a video that shows the whole movement.

    Args:
        frames: (F, H, W, 3) uint8, at least 4 frames of at least 32 pixels on each side; of long videos 16
            frames are read.

    Returns:
        The value of each factor, None where the video does not show one.

    Raises:
        MediaError: the array is not a video.
    """
    frames = _checked(frames, "judge_video", "(F, H, W, 3) with at least 4 frames", 4)
    picked = np.arange(min(len(frames), 16)) * len(frames) // min(len(frames), 16)
    measured = [_measure(frames[index]) for index in picked]
    verdict = read(measured, "video")
    shown = np.array([index for index, found in zip(picked, measured, strict=True) if found is not None])
    if len(shown) * 2 > len(picked):
        centroids = np.stack([found.centroid for found in measured if found is not None])
        verdict["motion"] = _motion(shown / len(frames), centroids)
    return verdict


def _checked(array: np.ndarray, judge: str, accepted: str, ndim: int) -> np.ndarray:
    array = np.asarray(array)
    fits = array.ndim == ndim and array.shape[-1] == 3 and min(array.shape[-3:-1]) >= 32 and array.dtype == np.uint8
    if not fits or (ndim == 4 and len(array) < 4):
        raise MediaError(
            f"{judge} got an array of shape {array.shape} and type {array.dtype}; it accepts {accepted} uint8 of at "
            "least 32x32 pixels, so convert or resize the medium first"
        )
    return array


def _measure(pixels: np.ndarray) -> Found | None:
    """Find the object in one frame."""
    if pixels.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        pixels = np.asarray(Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    rgb = pixels.astype(np.float32) / 255
    chroma = rgb - rgb.mean(axis=-1, keepdims=True)
    border = np.concatenate([chroma[:3].reshape(-1, 3), chroma[-3:].reshape(-1, 3), chroma[:, :3].reshape(-1, 3),
                             chroma[:, -3:].reshape(-1, 3)])  # fmt: skip
    contrast = np.linalg.norm(box(chroma - np.median(border, axis=0)), axis=-1)  # (H, W)
    peak = np.partition(contrast.ravel(), -20)[-20]
    if peak < max(0.08, 4 * np.median(contrast)):
        return None

    colour = np.median(rgb[contrast > 0.7 * peak], axis=0)
    outside = ~grow(contrast > 0.3 * peak, steps=2).ravel()
    if outside.sum() < 500:
        return None
    terms = GROUND_TERMS[outside]
    model = np.linalg.solve(terms.T @ terms, terms.T @ rgb.reshape(-1, 3)[outside])
    ground = (GROUND_TERMS @ model).reshape(rgb.shape)
    away, towards = (rgb - ground) @ _WEIGHED, (colour - ground) @ _WEIGHED
    coverage = (away * towards).sum(axis=-1) / np.maximum((towards**2).sum(axis=-1), 1e-3)

    return isolate(coverage, (coverage > 0.5) | (contrast > 0.5 * peak), colour)


def _motion(progress: np.ndarray, centroids: np.ndarray) -> str | None:
    """Compare a track with rest, a straight line and one orbit.

    Args:
        progress: (F,) time of each frame as a fraction of the clip.
        centroids: (F, 2) pixels, x then y.
    """
    track = (centroids - centroids.mean(axis=0)) @ np.array([1, 1j])  # (F,) x + iy
    power = float(np.mean(np.abs(track) ** 2))
    if power < 1.5**2:
        return "still"
    time = progress - progress.mean()
    speed = (time @ track) / (time @ time)
    line = abs(speed) ** 2 * float(np.mean(time**2)) / power
    orbit = max(abs(np.mean(track * np.exp(sense * 2j * np.pi * progress))) ** 2 for sense in (-1, 1)) / power
    if max(line, orbit) < 0.5:
        return None
    if orbit > line:
        return "circling"
    across, along = sorted((abs(speed.real), abs(speed.imag)))
    if across > 0.7 * along:
        return None
    if abs(speed.real) > abs(speed.imag):
        return "right" if speed.real > 0 else "left"
    return "down" if speed.imag > 0 else "up"
