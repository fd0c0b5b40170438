"""One of each medium that is made of numbers, with values that are all different."""

from typing import Any

import torch

from mmbridge.media import Depth, Fmri, Image, Imu, Normal, PointCloud


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(height: int = 24, width: int = 32) -> Image:
    return Image((noise(3, height, width).sigmoid() * 255).to(torch.uint8))


def example(modality: str) -> Any:
    """A medium of 24 rows and 32 columns, of 50 points or samples, or of 11 voxels."""
    vectors = noise(3, 24, 32)
    return {
        "depth": lambda: Depth(noise(24, 32).exp()),
        "normal": lambda: Normal(vectors / vectors.norm(dim=0)),
        "pointcloud": lambda: PointCloud(torch.cat([noise(50, 3), noise(50, 3).sigmoid()], dim=1)),
        "imu": lambda: Imu(noise(6, 50), 100.0),
        "fmri": lambda: Fmri(noise(11)),
    }[modality]()


def values(medium: Any) -> torch.Tensor:
    """The numbers of a medium."""
    for name in ("map", "points", "samples", "voxels"):
        if hasattr(medium, name):
            return getattr(medium, name)
    raise AssertionError(medium)
