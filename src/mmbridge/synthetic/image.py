"""Pictures of scenes: one anti-aliased, softly shaded object on a grey, uneven, noisy ground."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np

from mmbridge.synthetic.geometry import (
    CENTRES,
    HUES,
    IMAGE_SIZE,
    RADII,
    SATURATION_VALUE,
    hsv_to_rgb,
    signed_distance,
)
from mmbridge.synthetic.scene import CARRIES, Scene

_STREAMS = tuple(CARRIES)  # those of other packages come later, in any order
LUMA = np.array([0.299, 0.587, 0.114])
"""Brightness of red, green and blue (ITU-R BT.601, as in JPEG)."""
_UNIT = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE * 2 - 1


class Pose(NamedTuple):
    """Where an object is: centre (2,) and radius in pixels, rotation in radians."""

    centre: np.ndarray
    radius: float
    tilt: float


def generator(scene: Scene, modality: str, seed: int) -> np.random.Generator:
    """The source of a rendering's variation: the seed and what the modality carries, so that nothing else leaks in."""
    carried = [scene.indices[factor] for factor in CARRIES[modality]]
    stream = _STREAMS.index(modality) if modality in _STREAMS else zlib.crc32(modality.encode())
    return np.random.default_rng([seed, stream, *carried])


def render_image(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a picture.

    Args:
        scene: What to draw; its motion is ignored.
        seed: Chooses shade, jitter, ground and noise; the same scene and seed give the same bytes.

    Returns:
        (64, 64, 3) uint8.
    """
    rng = generator(scene, "image", seed)
    return draw(scene, np.zeros((1, 2)), rng)[0]


def pose(scene: Scene, rng: np.random.Generator) -> Pose:
    """The object's place, size and rotation with their jitter, which are the first that a picture draws."""
    centre = np.array(CENTRES[scene.place]) + rng.uniform(-1.2, 1.2, 2)
    return Pose(centre, RADII[scene.size] * rng.uniform(0.95, 1.05), np.deg2rad(rng.uniform(-8, 8)))


def draw(scene: Scene, offsets: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a scene's object at its place plus one offset per frame, on one ground, with fresh noise in each frame.

    Args:
        scene: What to draw.
        offsets: (F, 2) pixels, x then y.
        rng: Source of all variation.

    Returns:
        (F, 64, 64, 3) uint8.
    """
    centre, radius, tilt = pose(scene, rng)
    centres = centre + offsets  # (F, 2)
    saturation, value = SATURATION_VALUE[scene.colour]
    colour = hsv_to_rgb(
        (HUES[scene.colour] + rng.uniform(-4, 4)) % 360,
        saturation + rng.uniform(-0.05, 0.05),
        value + rng.uniform(-0.06, 0.04),
    )
    lit_from = rng.uniform(0, 2 * np.pi)

    pixel = (_UNIT + 1) * (IMAGE_SIZE / 2)
    x = ((pixel - centres[:, :1]) / radius).astype(np.float32)[:, None, :]  # (F, 1, W)
    y = ((pixel - centres[:, 1:]) / radius).astype(np.float32)[:, :, None]  # (F, H, 1)
    cos, sin = np.float32(np.cos(tilt)), np.float32(np.sin(tilt))
    distance = signed_distance(scene.shape, x * cos + y * sin, y * cos - x * sin)  # (F, H, W)
    coverage = np.clip(0.5 - distance * np.float32(radius), 0, 1)[..., None]
    shade = np.clip(1 - 0.09 * (x * np.float32(np.cos(lit_from)) + y * np.float32(np.sin(lit_from))), 0.85, 1.1)

    frames = ground(float(colour @ LUMA), rng)  # (H, W, 3)
    frames = frames + coverage * (shade[..., None] * colour.astype(np.float32) - frames)
    frames += np.float32(rng.uniform(0.01, 0.03)) * rng.standard_normal(frames.shape, dtype=np.float32)
    return (np.clip(frames, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def ground(avoid: float, rng: np.random.Generator) -> np.ndarray:
    """A grey level with a smooth gradient, slightly bent, and a faint tint: (64, 64, 3) float32 fractions.

    Args:
        avoid: Brightness of the object. The level keeps 0.18 away from it: JPEG and H.264 halve the resolution of
            colour, so an outline that only colour tells from its ground would be lost in ordinary files.
        rng: Source of the variation.
    """
    level = rng.uniform(0.1, 0.9)
    while abs(level - avoid) < 0.18:
        level = rng.uniform(0.1, 0.9)
    slope_x, slope_y = rng.uniform(-0.08, 0.08, 2)
    bend_x, bend_y = rng.uniform(-0.04, 0.04, 2)
    grey = level + slope_x * _UNIT + bend_x * _UNIT**2 + (slope_y * _UNIT + bend_y * _UNIT**2)[:, None]
    tint = rng.uniform(-0.025, 0.025, 3)
    return np.clip(grey[..., None] + (tint - tint.mean()), 0.02, 0.98).astype(np.float32)
