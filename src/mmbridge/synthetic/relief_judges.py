"""Judges of depth maps, normal maps and point clouds: each becomes a map of heights, whose object is then measured.

A depth map is one, negated; normals are integrated to one; points are put into one by the nearest point of each pixel. What
stands out of a bent, tilted ground that is fitted to the map is the object; `segmentation` reads the factors from it.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image

from mmbridge.errors import MediaError
from mmbridge.synthetic.geometry import IMAGE_SIZE
from mmbridge.synthetic.relief import PITCH
from mmbridge.synthetic.segmentation import GROUND_TERMS, Found, Verdict, box, grow, isolate, read

_RIM = 3  # pixels along the border where no object is
_LEAST_RISE = 0.03  # metres
_LEAST_POINTS = 128


def judge_depth(depth: np.ndarray) -> Verdict:
    """Read shape, size and place from a depth map.

    Args:
        depth: (H, W) floats, metres from the camera, at least 32 pixels on each side; it is compared at 64x64.

    Returns:
        The value of each factor, None where the map does not show one.

    Raises:
        MediaError: the array is not a depth map, or holds values that are not finite.
    """
    depth = np.asarray(depth)
    if depth.ndim != 2 or depth.dtype.kind != "f" or min(depth.shape) < 32 or not np.isfinite(depth).all():
        raise MediaError(
            f"judge_depth got an array of shape {depth.shape} and type {depth.dtype}; it accepts (H, W) finite floats in "
            "metres, of at least 32x32 pixels, so divide millimetres by 1000 and fill what is missing first"
        )
    return read([_measure(-_resized(depth))], "depth")


def judge_normal(normal: np.ndarray) -> Verdict:
    """Read shape, size and place from a map of surface normals.

    Args:
        normal: (H, W, 3) floats, x to the right, y upwards, z towards the camera, of any length; at least 32 pixels on each
            side; it is compared at 64x64.

    Returns:
        The value of each factor, None where the map does not show one.

    Raises:
        MediaError: the array is not a normal map, or holds values that are not finite.
    """
    normal = np.asarray(normal)
    fits = normal.ndim == 3 and normal.shape[-1] == 3 and normal.dtype.kind == "f" and min(normal.shape[:2]) >= 32
    if not fits or not np.isfinite(normal).all():
        raise MediaError(
            f"judge_normal got an array of shape {normal.shape} and type {normal.dtype}; it accepts (H, W, 3) finite floats "
            "of at least 32x32 pixels, so map bytes to -1 ... 1 first"
        )
    x, y, z = (_resized(normal[..., axis]) for axis in range(3))
    if np.median(z) <= 0:
        return read([None], "normal")
    z = np.maximum(z, 0.05 * np.sqrt(x**2 + y**2 + z**2) + 1e-9)
    return read([_measure(_integrate(-x / z * PITCH, y / z * PITCH))], "normal")


def judge_pointcloud(points: np.ndarray) -> Verdict:
    """Read shape, colour, size and place from a point cloud.

    Args:
        points: (N, 6) floats in any order: x, y, z in metres and red, green, blue from 0 to 1; or (N, 3), which has no
            colour. At least 128 points, those in the frame of -1 to 1 along x and y count.

    Returns:
        The value of each factor, None where the points do not show one.

    Raises:
        MediaError: the array is not a point cloud, or holds values that are not finite.
    """
    points = np.asarray(points)
    fits = points.ndim == 2 and points.shape[1] in (3, 6) and points.dtype.kind == "f" and len(points) >= _LEAST_POINTS
    if not fits or not np.isfinite(points).all():
        raise MediaError(
            f"judge_pointcloud got an array of shape {points.shape} and type {points.dtype}; it accepts (N, 6) or (N, 3) "
            f"finite floats of at least {_LEAST_POINTS} points, xyz in metres and rgb from 0 to 1"
        )
    points = points[(np.abs(points[:, :2]) <= 1.05).all(axis=1)].astype(np.float32)
    if len(points) < _LEAST_POINTS:
        return read([None], "pointcloud")
    pixels = np.column_stack([points[:, 0] + 1, 1 - points[:, 1]]) / np.float32(PITCH)
    line = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
    centres = np.stack(np.meshgrid(line, line), axis=-1).reshape(-1, 2)
    nearest = np.argmin((pixels**2).sum(axis=1) - 2 * centres @ pixels.T, axis=1).reshape(IMAGE_SIZE, IMAGE_SIZE)
    return read([_measure(points[nearest, 2], points[nearest, 3:] if points.shape[1] == 6 else None)], "pointcloud")


def _measure(height: np.ndarray, rgb: np.ndarray | None = None) -> Found | None:
    """Find what stands out of the ground.

    Args:
        height: (64, 64) metres towards the camera.
        rgb: (64, 64, 3) fractions, where they are known.
    """
    height = height.astype(np.float64)
    ground = np.ones((IMAGE_SIZE, IMAGE_SIZE), bool)
    ground[_RIM:-_RIM, _RIM:-_RIM] = False
    for _ in range(3):
        terms = GROUND_TERMS[ground.ravel()]
        model = np.linalg.lstsq(terms, height[ground], rcond=None)[0]
        above = height - (GROUND_TERMS @ model).reshape(height.shape)
        smooth = box(above[..., None])[..., 0]
        peak = np.partition(smooth.ravel(), -20)[-20]
        if peak < max(_LEAST_RISE, 4 * np.median(np.abs(smooth))):
            return None
        ground = ~grow(smooth > 0.15 * peak, steps=2)
        if ground.sum() < 500:
            return None
    face = float(np.median(above[smooth > 0.7 * peak]))
    coverage = above / face
    if rgb is not None:
        colour = np.median(rgb[coverage > 0.7], axis=0)
    return isolate(coverage, np.abs(coverage) > 0.5, colour if rgb is not None else None)


def _resized(image: np.ndarray) -> np.ndarray:
    """An (H, W) map at 64x64, float32."""
    image = image.astype(np.float32)
    if image.shape == (IMAGE_SIZE, IMAGE_SIZE):
        return image
    return np.asarray(Image.fromarray(image).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))


def _integrate(across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """The surface whose slopes come closest, in the sense of least squares, up to a constant (Poisson's equation).

    Solved exactly in the cosine basis, as in Simchony, Chellappa and Shao (1990), "Direct analytical methods for solving
    Poisson equations in computer vision problems".

    Args:
        across: (64, 64) rise per pixel to the right.
        down: (64, 64) rise per pixel downwards.
    """
    step_x = (across[:, 1:] + across[:, :-1]) / 2  # from each pixel to the next
    step_y = (down[1:] + down[:-1]) / 2
    zero = ((0, 0), (1, 1)), ((1, 1), (0, 0))
    divergence = np.diff(np.pad(step_x, zero[0]), axis=1) + np.diff(np.pad(step_y, zero[1]), axis=0)
    basis, eigenvalues = _cosines()
    spectrum = basis @ divergence @ basis.T / np.minimum(eigenvalues[:, None] + eigenvalues, -1e-9)
    spectrum[0, 0] = 0
    return basis.T @ spectrum @ basis


@cache
def _cosines() -> tuple[np.ndarray, np.ndarray]:
    """The orthonormal cosine basis (64, 64), by rows, and the eigenvalues (64,) of the second difference in it."""
    number = np.arange(IMAGE_SIZE)
    basis = np.cos(np.pi / IMAGE_SIZE * number[:, None] * (number + 0.5)) * np.sqrt(2 / IMAGE_SIZE)
    basis[0] /= np.sqrt(2)
    return basis, 2 * np.cos(np.pi * number / IMAGE_SIZE) - 2
