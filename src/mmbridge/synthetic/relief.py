"""Scenes in relief: depth maps, normal maps and coloured point clouds of one height field.

The object of `render_image(scene, seed)`, the picture that belongs to all three, stands out of a tilted, slightly bent ground.
The camera looks along -z from far away (orthographic); x runs to the right, y upwards and z towards the camera, in metres.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmbridge.synthetic.geometry import IMAGE_SIZE, signed_distance
from mmbridge.synthetic.image import Pose, generator, pose, render_image
from mmbridge.synthetic.scene import Scene

PITCH = 2 / IMAGE_SIZE
"""Metres per pixel: the frame shows x and y from -1 to 1."""
EDGE = 2.4
"""Pixels over which an outline rises from the ground to the object's face; the outline of the picture is half-way up."""
NUM_POINTS = 1024
MARGIN = 3.0
"""Pixels around an object in which points are as dense as on it; half of all points lie there."""


@dataclass(frozen=True)
class Relief:
    """The height field of one scene and seed.

    Attributes:
        shape: Name of the object's shape.
        pose: The object's, as in the picture.
        rise: How far the object stands out, in metres.
        distance: Of the middle of the ground from the camera, in metres.
        slope: (2,) rise of the ground along x and y, metres per metre.
        bend: (2,) metres at the edges of the frame.
    """

    shape: str
    pose: Pose
    rise: float
    distance: float
    slope: np.ndarray
    bend: np.ndarray

    def outline(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Signed distance to the object's outline in pixels, negative inside, of positions in pixels of the picture."""
        (left, top), radius, tilt = self.pose
        x, y = (x - left) / radius, (y - top) / radius
        cos, sin = np.cos(tilt), np.sin(tilt)
        return radius * signed_distance(self.shape, x * cos + y * sin, y * cos - x * sin)

    def z(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Height of the surface in metres, below 0 as the camera is at 0, at positions in pixels of the picture."""
        part = np.clip(0.5 - self.outline(x, y) / EDGE, 0, 1)
        x, y = metres(x, y)
        ground = self.slope[0] * x + self.slope[1] * y + self.bend[0] * x**2 + self.bend[1] * y**2
        return ground - self.distance + self.rise * part**2 * (3 - 2 * part)


def metres(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions in pixels, y downwards, as metres from the middle of the frame, y upwards."""
    return x * PITCH - 1, 1 - y * PITCH


def relief(scene: Scene, seed: int) -> Relief:
    """The height field that all renderings in relief of a scene and seed show."""
    rng = generator(scene, "depth", seed)
    return Relief(
        scene.shape,
        pose(scene, generator(scene, "image", seed)),
        rise=rng.uniform(0.15, 0.3),
        distance=rng.uniform(1.8, 2.4),
        slope=rng.uniform(-0.2, 0.2, 2),
        bend=rng.uniform(-0.08, 0.08, 2),
    )


def render_depth(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a depth map.

    Args:
        scene: What to show; its colour and motion are ignored.
        seed: Chooses ground, rise and noise, and with the picture's seed also jitter.

    Returns:
        (64, 64) float32, metres from the camera.
    """
    x, y = _grid()
    depth = -relief(scene, seed).z(x, y)
    (rng,) = generator(scene, "depth", seed).spawn(1)  # the height field has the generator itself
    return (depth + rng.uniform(0.001, 0.004) * rng.standard_normal(depth.shape)).astype(np.float32)


def render_normal(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a map of surface normals.

    Args:
        scene: What to show; its colour and motion are ignored.
        seed: Chooses ground, rise, jitter and noise.

    Returns:
        (64, 64, 3) float32 unit vectors: x to the right, y upwards, z towards the camera.
    """
    field, (x, y) = relief(scene, seed), _grid()
    across = (field.z(x + 0.5, y) - field.z(x - 0.5, y)) / PITCH
    upwards = (field.z(x, y - 0.5) - field.z(x, y + 0.5)) / PITCH
    rng = generator(scene, "normal", seed)
    normal = np.stack([-across, -upwards, np.ones_like(across)], axis=-1)
    normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
    normal += rng.uniform(0.005, 0.02) * rng.standard_normal(normal.shape)
    return (normal / np.linalg.norm(normal, axis=-1, keepdims=True)).astype(np.float32)


def render_pointcloud(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a coloured point cloud.

    Args:
        scene: What to show; its motion is ignored.
        seed: Chooses ground, rise, jitter, the points, their order and noise.

    Returns:
        (1024, 6) float32: x, y, z in metres, and red, green, blue from 0 to 1, those of the picture of the same seed.
    """
    field, rng = relief(scene, seed), generator(scene, "pointcloud", seed)
    near = (field.outline(*_grid()) < MARGIN).ravel()
    chance = np.where(near, 0.5 / near.sum(), 0.5 / (~near).sum())
    row, column = np.divmod(rng.choice(near.size, NUM_POINTS, p=chance), IMAGE_SIZE)
    x, y = column + rng.random(NUM_POINTS), row + rng.random(NUM_POINTS)
    points = np.stack([*metres(x, y), field.z(x, y)], axis=1)
    points += rng.uniform(0.001, 0.004) * rng.standard_normal(points.shape)
    return np.column_stack([points, render_image(scene, seed)[row, column] / 255]).astype(np.float32)


def _grid() -> tuple[np.ndarray, np.ndarray]:
    """Centres of the pixels: x (1, 64) and y (64, 1)."""
    line = np.arange(IMAGE_SIZE) + 0.5
    return line[None, :], line[:, None]
