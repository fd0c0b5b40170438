"""The world's geometry: outlines, radii, places, paths and hues, as numbers and signed distances.

Shared by the renderers and the judges; it deals in names and arrays, never in scenes. Lengths are pixels of a 64x64
picture, x runs to the right and y downwards.
"""

from __future__ import annotations

import numpy as np

IMAGE_SIZE = 64
RADII = {"small": 6.0, "medium": 8.6, "large": 12.2}
CENTRES = {
    "top left": (21.0, 21.0),
    "top right": (43.0, 21.0),
    "centre": (32.0, 32.0),
    "bottom left": (21.0, 43.0),
    "bottom right": (43.0, 43.0),
}
HUES = {
    "red": 0.0,
    "orange": 30.0,
    "yellow": 58.0,
    "green": 120.0,
    "cyan": 180.0,
    "blue": 226.0,
    "purple": 274.0,
    "pink": 322.0,
}
"""Degrees on the HSV circle."""
SATURATION_VALUE = {
    "red": (0.90, 0.82),
    "orange": (0.92, 0.90),
    "yellow": (0.85, 0.86),
    "green": (0.82, 0.70),
    "cyan": (0.82, 0.82),
    "blue": (0.82, 0.86),
    "purple": (0.75, 0.76),
    "pink": (0.55, 0.90),
}
TRAVEL = 5.0
"""Pixels from the place to either end of a straight path, and the radius of the circling path."""

# Outline sizes, in units of the radius.
TRIANGLE_CORNER, STAR_TIP, STAR_NOTCH = 1.15, 1.15, 0.45 * 1.15
SQUARE_HALF, CROSS_HALF_WIDTH, RING_HOLE = 0.84, 0.34, 0.55
AREAS = {
    "circle": np.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": 0.75 * 3**0.5 * TRIANGLE_CORNER**2,
    "star": 5 * STAR_TIP * STAR_NOTCH * np.sin(np.pi / 5),
    "cross": 4 * CROSS_HALF_WIDTH * (2 - CROSS_HALF_WIDTH),
    "ring": np.pi * (1 - RING_HOLE**2),
}
"""Covered area of each shape, in units of the radius squared."""


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Distance to a shape's outline, negative inside (near corners: to the closest extended edge).

    Args:
        shape: Name of the shape, which stands upright around the origin.
        x: Abscissae, in units of the radius.
        y: Ordinates, same shape, pointing down.
    """
    if shape == "circle":
        return np.hypot(x, y) - 1
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF
    if shape == "triangle":
        return np.maximum(y, 0.75**0.5 * np.abs(x) - 0.5 * y) - TRIANGLE_CORNER / 2
    if shape == "cross":
        x, y = np.abs(x), np.abs(y)
        return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - CROSS_HALF_WIDTH)
    if shape == "ring":
        return np.abs(np.hypot(x, y) - (1 + RING_HOLE) / 2) - (1 - RING_HOLE) / 2
    # Star: fold the plane into one half-ray from tip to notch; its edge is then a single straight line.
    angle = np.abs(np.mod(np.arctan2(x, -y) + np.pi / 5, 2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    edge = np.array([STAR_NOTCH * np.cos(np.pi / 5) - STAR_TIP, STAR_NOTCH * np.sin(np.pi / 5)])
    edge /= np.hypot(*edge)
    return (radius * np.cos(angle) - STAR_TIP) * edge[1] - radius * np.sin(angle) * edge[0]


def path(
    motion: str, num_frames: int, phase: float = 0.0, clockwise: bool = True, travel: float = TRAVEL
) -> np.ndarray:
    """Where an object is relative to its place in each frame of a clip; the mean is the place itself.

    Args:
        motion: Name of the motion.
        num_frames: Frames in the clip, which spans the whole movement (one orbit, when circling).
        phase: Where on the orbit a circling object starts, in radians.
        clockwise: The sense of rotation of a circling object, as seen on the screen.
        travel: Pixels from the place to either end, and the radius of an orbit.

    Returns:
        (F, 2) offsets in pixels, x then y.
    """
    if motion == "circling":
        turn = phase + (1 if clockwise else -1) * 2 * np.pi * np.arange(num_frames) / num_frames
        return travel * np.stack([np.cos(turn), np.sin(turn)], axis=1)
    direction = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}[motion]
    return np.linspace(-travel, travel, num_frames)[:, None] * np.array(direction)


def hsv_to_rgb(hue: float, saturation: float, value: float) -> np.ndarray:
    """One colour, from degrees and two fractions to (3,) fractions of red, green and blue."""
    sector = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return value - value * saturation * np.clip(np.minimum(sector, 4 - sector), 0, 1)
