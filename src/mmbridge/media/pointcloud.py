"""Point clouds: files, arrays and tensors to positions and colours, and these to what an encoder wants."""

import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.arrays import check_finite, encode_npy, read_npy, read_table, to_floats
from mmbridge.media.base import find_file, hash_content, suffix_of, write_atomically
from mmbridge.media.drawing import draw_points
from mmbridge.media.image import Image
from mmbridge.media.pointfiles import MAX_POINTS, encode_ply, read_pcd, read_ply
from mmbridge.modality import register
from mmbridge.specs import PointsInput

_FORMATS = {"NumPy": "NPY", "PLY": "PLY", "PCD": "PCD", "text": "text (XYZ, CSV, TXT)"}
_SUFFIXES = (".npy", ".ply", ".csv")
_READERS = {"NumPy": read_npy, "PLY": read_ply, "PCD": read_pcd}
_FEWEST = 3


@register("pointcloud")
@dataclass(eq=False, repr=False)
class PointCloud:
    """Points in space, with or without colours.

    Args:
        points: float32, shape (N, 3), x y z in any unit, or (N, 6), with r g b in 0..1; kept on the CPU.

    Raises:
        MediaError: Another dtype or shape, fewer than 3 points or more than 20 million, NaN or infinite values, or
            colours outside 0..1.
    """

    modality: ClassVar[str] = "pointcloud"
    noun: ClassVar[str] = "a point cloud"
    suffix: ClassVar[str] = ".npy"
    points: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.points.shape)
        if self.points.dtype != torch.float32 or self.points.ndim != 2 or shape[1] not in (3, 6):
            raise MediaError(
                f"a point cloud holds float32 values of shape (N, 3) or (N, 6), not {self.points.dtype} of shape {shape}; "
                "PointCloud.load converts arrays and tensors."
            )
        if not _FEWEST <= len(self.points) <= MAX_POINTS:
            raise MediaError(
                f"a point cloud of {len(self.points)} points can't be used; accepted: {_FEWEST} to {MAX_POINTS}."
            )
        check_finite(self.points, "the point cloud")
        colours = self.points[:, 3:]
        if colours.numel() and (colours.min() < 0 or colours.max() > 1):
            raise MediaError(
                f"the point cloud's colours span {colours.min():g}..{colours.max():g}; accepted: 0..1, or whole numbers "
                "in 0..255."
            )
        self.points = self.points.detach().cpu()

    def __repr__(self) -> str:
        return f"PointCloud({len(self.points)} points{', colours' if self.points.shape[1] == 6 else ''})"

    @classmethod
    def load(cls, source: object, *, root: str | os.PathLike[str] | None = None) -> "PointCloud":
        """Read a point cloud.

        Args:
            source: A path or the bytes of an NPY, PLY or PCD file, or of text with one point a line (XYZ, CSV, with or
                without a header); an array or tensor (N, 3) or (N, 6); or a ``PointCloud``. Colours are 0..1, or whole
                numbers in 0..255.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged or of another format; the points have another shape, are fewer
                than 3, or hold NaN; colours are out of range; a path leads out of ``root``.
        """
        if isinstance(source, PointCloud):
            return source
        name, values = "the array" if isinstance(source, np.ndarray) else "the tensor", source
        if isinstance(source, (str, os.PathLike, bytes)):
            medium = find_file(source, "pointcloud", _FORMATS, root)
            name = medium.name
            values = _READERS[medium.format](medium) if medium.format in _READERS else read_table(medium)[1]
        if not isinstance(values, (np.ndarray, Tensor)):
            raise MediaError(
                f"a point cloud can't be loaded from {type(source).__name__}; "
                "accepted: a path, bytes, a NumPy array, a torch tensor, or a PointCloud."
            )
        if values.ndim != 2 or values.shape[1] not in (3, 6):
            hint = "; transpose it" if values.ndim == 2 and values.shape[0] in (3, 6) else ""
            raise MediaError(f"{name} has shape {tuple(values.shape)}; a point cloud is (N, 3) or (N, 6){hint}.")
        points = to_floats(values, name)
        colours = points[:, 3:]
        if colours.numel() and 1 < colours.max() <= 255 and bool((colours == colours.round()).all()):
            points = torch.cat([points[:, :3], colours / 255], dim=1)
        return cls(points.contiguous())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an NPY or CSV file, which hold every bit, or a PLY, which keeps 8 bits of each colour; whole or not at all.

        Raises:
            MediaError: Unknown suffix, or the file can't be written.
        """
        match suffix_of(path, "pointcloud", _SUFFIXES):
            case ".npy":
                content = encode_npy(self.points)
            case ".ply":
                content = encode_ply(self.points.numpy())
            case _:
                rows = [",".join(f"{value:.9g}" for value in row) for row in self.points.tolist()]
                content = "\n".join([",".join("xyzrgb"[: self.points.shape[1]]), *rows, ""]).encode()
        write_atomically(path, content)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the points in their order."""
        return hash_content(self.modality, self.points)

    def draw(self, size: int = 256) -> Image:
        """Return a picture of the points from a corner, above, in their colours, or coloured by height."""
        colours = self.points[:, 3:] if self.points.shape[1] == 6 else None
        return Image(draw_points(self.points[:, :3], colours, size))


def prepare_points(cloud: PointCloud, spec: PointsInput) -> Tensor:
    """Turn a cloud into what an encoder wants: centred, in the unit ball or cube, and of ``spec.points`` points.

    Of more points so many are drawn, the same ones each time; fewer are repeated in turn. Points without colour are
    black where the encoder wants colours; colours are left out where it wants none.

    Returns:
        Floats, shape (points, channels).

    Raises:
        MediaError: All points are at one place, or of one colour where the encoder groups them by colour.
    """
    points = cloud.points
    if spec.centre == "box":
        low, high = points[:, :3].amin(dim=0), points[:, :3].amax(dim=0)
        places, radius = points[:, :3] - (low + high) / 2, (high - low).max() / 2
    else:
        places = points[:, :3] - points[:, :3].mean(dim=0)
        radius = places.norm(dim=1).max()
    if not radius > 0:
        raise MediaError(f"all {len(points)} points of the cloud are at one place; an encoder has no shape to see.")
    colours = points[:, 3:] if points.shape[1] == 6 else torch.zeros_like(places)
    values = torch.cat([places / radius, colours], dim=1)[:, : spec.channels]
    measured = values[:, list(spec.coordinates)]
    if (measured == measured[0]).all():
        raise MediaError(
            "the point cloud is of one colour, and this encoder groups points by channels "
            f"{tuple(spec.coordinates)}, their colours; give a coloured cloud, or an encoder with coordinates=(0, 1, 2)."
        )
    count = len(values)
    if count > spec.points:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))[: spec.points].sort().values
    else:
        order = torch.arange(spec.points) % count
    return values[order]
