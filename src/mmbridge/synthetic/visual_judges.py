"""Judges of pictures and videos: they measure the factors by segmentation, templates and tracking; nothing is learned.

The object is what differs in chroma from the picture's border. Its coverage (a soft mask) is unmixed from the colour of
the object and a smooth model of the ground, then area, centroid and outline are compared with the world's geometry.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from mmbridge.errors import MediaError
from mmbridge.synthetic.geometry import AREAS, CENTRES, HUES, IMAGE_SIZE, RADII, signed_distance
from mmbridge.synthetic.image import LUMA
from mmbridge.synthetic.scene import CARRIES

Verdict = dict[str, str | None]

_PATCH = 33  # samples per side of the patch in which outlines are compared
_REACH = 1.8  # half-width of that patch, in radii of the disc of equal area
_BRIGHTNESS = 3.0  # how much more brightness counts than colour, which compressed files hold at half the resolution
_WEIGHED = np.column_stack([np.eye(3) - LUMA[:, None], _BRIGHTNESS * LUMA]).astype(np.float32)  # RGB to chroma and luma
_LINE = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
_GROUND_TERMS = np.stack(
    [
        np.broadcast_to(term, (IMAGE_SIZE, IMAGE_SIZE))
        for term in (1.0, _LINE, _LINE**2, _LINE[:, None], _LINE[:, None] ** 2, _LINE * _LINE[:, None])
    ],
    axis=-1,
).reshape(-1, 6)


@dataclass(frozen=True)
class _Object:
    """What was measured of one frame: patch of the outline, area and centroid (x, y) in pixels, RGB fractions."""

    patch: np.ndarray
    area: float
    centroid: np.ndarray
    colour: np.ndarray


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
    return _verdict([_measure(pixels)], "image")


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
    verdict = _verdict(measured, "video")
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


def _verdict(measured: list[_Object | None], modality: str) -> Verdict:
    """Combine the frames' measurements; most frames have to show an object."""
    found = [one for one in measured if one is not None]
    verdict: Verdict = dict.fromkeys(CARRIES[modality])
    if len(found) * 2 <= len(measured):
        return verdict
    verdict["colour"] = _colour(np.mean([one.colour for one in found], axis=0))
    verdict["place"] = _place(np.mean([one.centroid for one in found], axis=0))
    verdict["shape"], gain = _shape(np.mean([one.patch for one in found], axis=0))
    if verdict["shape"] is not None:
        radius = float(np.sqrt(np.mean([one.area for one in found]) / gain / AREAS[verdict["shape"]]))
        size = min(RADII, key=lambda name: abs(np.log(radius / RADII[name])))
        verdict["size"] = size if abs(np.log(radius / RADII[size])) < 0.3 else None
    return verdict


def _measure(pixels: np.ndarray) -> _Object | None:
    """Find the object in one frame."""
    if pixels.shape[:2] != (IMAGE_SIZE, IMAGE_SIZE):
        pixels = np.asarray(Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
    rgb = pixels.astype(np.float32) / 255
    chroma = rgb - rgb.mean(axis=-1, keepdims=True)
    border = np.concatenate([chroma[:3].reshape(-1, 3), chroma[-3:].reshape(-1, 3), chroma[:, :3].reshape(-1, 3),
                             chroma[:, -3:].reshape(-1, 3)])  # fmt: skip
    contrast = np.linalg.norm(_box(chroma - np.median(border, axis=0)), axis=-1)  # (H, W)
    peak = np.partition(contrast.ravel(), -20)[-20]
    if peak < max(0.08, 4 * np.median(contrast)):
        return None

    colour = np.median(rgb[contrast > 0.7 * peak], axis=0)
    outside = ~_grow(contrast > 0.3 * peak, steps=2).ravel()
    if outside.sum() < 500:
        return None
    terms = _GROUND_TERMS[outside]
    model = np.linalg.solve(terms.T @ terms, terms.T @ rgb.reshape(-1, 3)[outside])
    ground = (_GROUND_TERMS @ model).reshape(rgb.shape)
    away, towards = (rgb - ground) @ _WEIGHED, (colour - ground) @ _WEIGHED
    coverage = (away * towards).sum(axis=-1) / np.maximum((towards**2).sum(axis=-1), 1e-3)

    solid = coverage > 0.5
    seed = np.argmax(_box(_box(solid[..., None].astype(np.float32)))[..., 0] * solid)
    region = _grow(_component(solid, int(seed)), steps=2)
    if ((solid | (contrast > 0.5 * peak)) & ~region).sum() > 0.25 * (solid & region).sum():
        return None  # more than one object
    coverage = np.where(region, np.clip(coverage, -0.3, 1.6), 0)
    area = float(coverage.sum())
    if not 20 < area < 0.4 * IMAGE_SIZE**2:
        return None
    axis = np.arange(IMAGE_SIZE) + 0.5
    centroid = np.array([(coverage.sum(axis=0) * axis).sum(), (coverage.sum(axis=1) * axis).sum()]) / area
    return _Object(_patch(coverage, centroid, np.sqrt(area / np.pi)), area, centroid, colour)


def _box(image: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels of an (H, W, C) array."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _grow(mask: np.ndarray, steps: int = 1) -> np.ndarray:
    """Add the neighbours of a mask, diagonal ones too."""
    for _ in range(steps):
        mask = mask.copy()
        mask[1:] |= mask[:-1].copy()
        mask[:-1] |= mask[1:].copy()
        mask[:, 1:] |= mask[:, :-1].copy()
        mask[:, :-1] |= mask[:, 1:].copy()
    return mask


def _component(mask: np.ndarray, seed: int) -> np.ndarray:
    """The connected part of a mask around one (flat) position."""
    part = np.zeros_like(mask)
    part.flat[seed] = True
    size = 0
    while part.sum() > size:
        size = part.sum()
        part = _grow(part, steps=2) & mask
    return part


def _patch(coverage: np.ndarray, centroid: np.ndarray, radius: float) -> np.ndarray:
    """Resample the coverage around the centroid to a patch in which every object has the same area (bilinear)."""
    offsets = np.linspace(-_REACH, _REACH, _PATCH) * radius - 0.5
    weights = [np.maximum(0, 1 - np.abs(centre + offsets[:, None] - np.arange(IMAGE_SIZE))) for centre in centroid]
    return weights[1] @ coverage @ weights[0].T  # rows by y, columns by x


@cache
def _templates() -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Patches of all shapes, turned, scaled and blurred: names, (N, 33 * 33) coverages, sums of their squares."""
    fine = 3 * _PATCH
    line = (np.arange(fine) - (fine - 1) / 2) * (2 * _REACH / (_PATCH - 1) / 3)
    step = np.subtract.outer(np.linspace(-_REACH, _REACH, _PATCH), line)
    blurs = [np.exp(-0.5 * (step / sigma) ** 2) for sigma in (0.06, 0.11, 0.17, 0.25, 0.33)]
    blurs = [blur / blur.sum(axis=1).max() for blur in blurs]
    names, patches = [], []
    for shape, area in AREAS.items():
        for angle in (0.0,) if shape in ("circle", "ring") else np.deg2rad((-10, -5, 0, 5, 10)):
            for scale in (0.8, 0.85, 0.9, 0.95, 1.0, 1.06):
                unit = scale * np.sqrt(np.pi / area)  # the shape's radius, where a disc of its area has radius 1
                x, y = line[None, :] / unit, line[:, None] / unit
                turned = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
                inside = (signed_distance(shape, *turned) < 0).astype(np.float32)
                patches += [(blur @ inside @ blur.T).ravel() for blur in blurs]
                names += [shape] * len(blurs)
    stacked = np.stack(patches).astype(np.float32)
    return tuple(names), stacked, (stacked**2).sum(axis=1)


def _shape(patch: np.ndarray) -> tuple[str | None, float]:
    """The shape whose template fits best, and the factor by which the coverage was overestimated."""
    names, templates, power = _templates()
    overlap = templates @ patch.ravel().astype(np.float32)
    gain = np.clip(overlap / power, 0.8, 1.5)
    misfit = (patch**2).sum() - 2 * gain * overlap + gain**2 * power
    best = int(np.argmin(misfit))
    return (names[best] if misfit[best] < 0.35 * (patch**2).sum() else None), float(gain[best])


def _colour(rgb: np.ndarray) -> str | None:
    """The colour whose hue is nearest; None for a grey."""
    spread = rgb.max() - rgb.min()
    if spread < 0.12:
        return None
    red, green, blue = rgb
    hue = np.rad2deg(np.arctan2(3**0.5 * (green - blue), 2 * red - green - blue))
    # This angle differs from the HSV hue by about one degree at most.
    return min(HUES, key=lambda name: abs((hue - HUES[name] + 180) % 360 - 180))


def _place(centroid: np.ndarray) -> str | None:
    distances = {name: float(np.hypot(*(centroid - centre))) for name, centre in CENTRES.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] < 11 else None


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
