"""What the judges of pictures, videos, maps and point clouds share: from a soft mask of an object to its factors.

Area, centroid and outline of the mask are compared with the world's geometry; nothing is learned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from mmbridge.synthetic.geometry import AREAS, CENTRES, HUES, IMAGE_SIZE, RADII, signed_distance
from mmbridge.synthetic.scene import CARRIES

Verdict = dict[str, str | None]

_PATCH = 33  # samples per side of the patch in which outlines are compared
_REACH = 1.8  # half-width of that patch, in radii of the disc of equal area
_LINE = (np.arange(IMAGE_SIZE) + 0.5) / IMAGE_SIZE * 2 - 1
GROUND_TERMS = np.stack(
    [
        np.broadcast_to(term, (IMAGE_SIZE, IMAGE_SIZE))
        for term in (1.0, _LINE, _LINE**2, _LINE[:, None], _LINE[:, None] ** 2, _LINE * _LINE[:, None])
    ],
    axis=-1,
).reshape(-1, 6)
"""(64 * 64, 6) terms of a bent, tilted ground."""


@dataclass(frozen=True)
class Found:
    """What was measured of one frame: patch of the outline, area and centroid (x, y) in pixels, RGB fractions if known."""

    patch: np.ndarray
    area: float
    centroid: np.ndarray
    colour: np.ndarray | None


def read(measured: list[Found | None], modality: str) -> Verdict:
    """Combine the frames' measurements; most frames have to show an object."""
    found = [one for one in measured if one is not None]
    verdict: Verdict = dict.fromkeys(CARRIES[modality])
    if len(found) * 2 <= len(measured):
        return verdict
    colours = [one.colour for one in found if one.colour is not None]
    if colours:
        verdict["colour"] = _colour(np.mean(colours, axis=0))
    verdict["place"] = _place(np.mean([one.centroid for one in found], axis=0))
    verdict["shape"], gain = _shape(np.mean([one.patch for one in found], axis=0))
    if verdict["shape"] is not None:
        radius = float(np.sqrt(np.mean([one.area for one in found]) / gain / AREAS[verdict["shape"]]))
        size = min(RADII, key=lambda name: abs(np.log(radius / RADII[name])))
        verdict["size"] = size if abs(np.log(radius / RADII[size])) < 0.3 else None
    return verdict


def isolate(coverage: np.ndarray, shown: np.ndarray, colour: np.ndarray | None = None) -> Found | None:
    """Measure the one object of a soft mask; None where there is none, or more than one.

    Args:
        coverage: (64, 64) about 1 on the object and about 0 elsewhere.
        shown: (64, 64) whether there is something; little of it may lie elsewhere than the object.
        colour: (3,) of the object, where it is known.
    """
    solid = coverage > 0.5
    seed = np.argmax(box(box(solid[..., None].astype(np.float32)))[..., 0] * solid)
    region = grow(_component(solid, int(seed)), steps=2)
    if (shown & ~region).sum() > 0.25 * (solid & region).sum():
        return None  # more than one object
    coverage = np.where(region, np.clip(coverage, -0.3, 1.6), 0)
    area = float(coverage.sum())
    if not 20 < area < 0.4 * IMAGE_SIZE**2:
        return None
    axis = np.arange(IMAGE_SIZE) + 0.5
    centroid = np.array([(coverage.sum(axis=0) * axis).sum(), (coverage.sum(axis=1) * axis).sum()]) / area
    return Found(_patch(coverage, centroid, np.sqrt(area / np.pi)), area, centroid, colour)


def box(image: np.ndarray) -> np.ndarray:
    """Mean over 3x3 pixels of an (H, W, C) array."""
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def grow(mask: np.ndarray, steps: int = 1) -> np.ndarray:
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
        part = grow(part, steps=2) & mask
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
