"""Depth and normal maps: files, arrays and tensors to distances and directions, with the picture of the same view."""

import os
from dataclasses import dataclass
from io import BytesIO
from typing import Any, ClassVar

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.arrays import check_finite, encode_npy, read_npy, read_still, still_values, to_floats, unit_floats
from mmbridge.media.base import check_pixels, find_file, hash_content, suffix_of, write_atomically
from mmbridge.media.drawing import colourise, stretch
from mmbridge.media.export import write_image
from mmbridge.media.image import Image, prepare_pixels, resize, resize_short_side
from mmbridge.modality import register
from mmbridge.specs import DisparityInput, MapInput

_FORMATS = {"PNG": "PNG (8 or 16 bit)", "NumPy": "NPY", "EXR": "EXR"}
_SUFFIXES = (".png", ".npy")
_MILLIMETRE = 0.001
_UNIT = 0.01  # how far from 1 the length of a normal may be
_EXACT = 1e-5  # the rounding of float32, which is left as it is
_SHORTEST = 0.1  # a direction that is stored as a shorter vector is not known
_ASPECT = 0.05


@register("depth")
@dataclass(eq=False, repr=False)
class Depth:
    """A depth map: how far each point of a view is from the camera.

    Args:
        map: float32, shape (H, W), in metres or any other unit, 0 where nothing was measured; kept on the CPU.
        picture: The picture of the same view, which some encoders need.

    Raises:
        MediaError: Another dtype or shape, NaN, infinite or negative values, or more than 64 megapixels.
    """

    modality: ClassVar[str] = "depth"
    noun: ClassVar[str] = "a depth map"
    suffix: ClassVar[str] = ".npy"
    map: Tensor
    picture: Image | None = None

    def __post_init__(self) -> None:
        if self.map.dtype != torch.float32 or self.map.ndim != 2:
            raise MediaError(
                f"a depth map holds float32 values of shape (H, W), not {self.map.dtype} of shape "
                f"{tuple(self.map.shape)}; Depth.load converts arrays and tensors."
            )
        check_pixels(self.map.shape[1], self.map.shape[0], "the depth map")
        check_finite(self.map, "the depth map")
        if self.map.min() < 0:
            raise MediaError(
                f"the depth map reaches {self.map.min():g}; distances are not negative, and 0 where nothing was measured."
            )
        self.map = self.map.detach().cpu()

    def __repr__(self) -> str:
        return f"Depth({self.map.shape[1]}x{self.map.shape[0]}{', picture' if self.picture else ''})"

    @classmethod
    def load(
        cls,
        source: object,
        *,
        picture: object = None,
        scale: float | None = None,
        root: str | os.PathLike[str] | None = None,
    ) -> "Depth":
        """Read a depth map.

        Args:
            source: A path or the bytes of a PNG (8 or 16 bit), NPY or EXR file; a PIL image; an array or tensor (H, W),
                (1, H, W) or (H, W, 1); or a ``Depth``. A picture of three equal channels counts as one.
            picture: The picture of the same view: whatever ``Image.load`` reads.
            scale: The unit of stored numbers, in metres. None for the usual one: a millimetre for 16 bits, 1/255 of the
                largest depth for 8 bits, 1 for floats.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged or of another format; values are NaN, infinite or negative, or
                integers of other widths without ``scale``; ``scale`` is not positive; a path leads out of ``root``.
        """
        paired = None if picture is None else Image.load(picture, root=root)
        if isinstance(source, Depth):
            if scale is not None:
                raise MediaError(f"scale={scale:g} is for files and arrays; a Depth holds its values already.")
            return source if paired is None else cls(source.map, paired)
        values, name = _values(source, "depth", "a Depth", root)
        if isinstance(values, np.ndarray) and values.ndim == 3 and values.shape[2] == 3:
            if not (values == values[..., :1]).all():
                raise MediaError(f"{name} holds colours; a depth map has one channel: save its numbers, not a drawing.")
            values = values[..., 0]
        if values.ndim == 3 and 1 in (values.shape[0], values.shape[2]):
            values = values.squeeze(0 if values.shape[0] == 1 else 2)
        if values.ndim != 2:
            raise MediaError(f"{name} has shape {tuple(values.shape)}; a depth map is (H, W), (1, H, W) or (H, W, 1).")
        return cls(_scaled(values, scale, name), paired)

    def save(self, path: str | os.PathLike[str], *, scale: float = _MILLIMETRE) -> None:
        """Write an NPY file, which holds every bit, or a PNG of 16 bits, whole or not at all; the picture is not written.

        Args:
            path: Ends in .npy or .png.
            scale: The unit of a PNG's numbers, a millimetre by convention; what is beyond 65535 of them does not fit.

        Raises:
            MediaError: Unknown suffix, a depth that does not fit, or the file can't be written.
        """
        if suffix_of(path, "depth", _SUFFIXES) == ".npy":
            write_atomically(path, encode_npy(self.map))
            return
        steps = (self.map.double() / scale).round()
        if not scale > 0 or steps.max() > 65535:
            raise MediaError(
                f"{os.fspath(path)!r}: depths up to {self.map.max():g} do not fit into 16 bits with scale={scale:g}; "
                f"pass scale={max(float(self.map.max()), 1e-9) / 65535:.2g} or more, or write NPY."
            )
        buffer = BytesIO()
        PIL.Image.fromarray(steps.numpy().astype(np.uint16)).save(buffer, "PNG")
        write_atomically(path, buffer.getvalue())

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the values and of the picture."""
        return hash_content(f"{self.modality} {_hash_of(self.picture)}", self.map)

    @property
    def shades(self) -> Tensor:
        """The map as a grey picture, black at its smallest and white at its largest depth: floats 0..255, (3, H, W)."""
        return 255 * stretch(self.map).expand(3, -1, -1)

    def draw(self) -> Image:
        """Return a picture for people: near is bright, black where nothing was measured."""
        return Image(colourise(1 - stretch(self.map)) * (self.map > 0))


@register("normal")
@dataclass(eq=False, repr=False)
class Normal:
    """A normal map: which way the surface faces at each point of a view.

    Args:
        map: float32 unit vectors, shape (3, H, W): x to the right, y up, z towards the camera; the zero vector where the
            direction is not known; kept on the CPU.
        picture: The picture of the same view, which some encoders need.

    Raises:
        MediaError: Another dtype or shape, NaN or infinite values, vectors of other lengths, or more than 64 megapixels.
    """

    modality: ClassVar[str] = "normal"
    noun: ClassVar[str] = "a normal map"
    suffix: ClassVar[str] = ".npy"
    map: Tensor
    picture: Image | None = None

    def __post_init__(self) -> None:
        if self.map.dtype != torch.float32 or self.map.ndim != 3 or len(self.map) != 3:
            raise MediaError(
                f"a normal map holds float32 values of shape (3, H, W), not {self.map.dtype} of shape "
                f"{tuple(self.map.shape)}; Normal.load converts arrays and tensors."
            )
        check_pixels(self.map.shape[2], self.map.shape[1], "the normal map")
        check_finite(self.map, "the normal map")
        lengths = self.map.norm(dim=0)
        if (((lengths - 1).abs() > _UNIT) & (lengths > 0)).any():
            raise MediaError(
                f"normals have length 1, or 0 where they are not known, not {lengths.min():g}..{lengths.max():g}; "
                "Normal.load makes them so."
            )
        self.map = self.map.detach().cpu()

    def __repr__(self) -> str:
        return f"Normal({self.map.shape[2]}x{self.map.shape[1]}{', picture' if self.picture else ''})"

    @classmethod
    def load(cls, source: object, *, picture: object = None, root: str | os.PathLike[str] | None = None) -> "Normal":
        """Read a normal map; vectors get length 1, those shorter than 0.1 count as not known.

        Args:
            source: A path or the bytes of a PNG (8 or 16 bit, 0 to the largest number for -1 to 1), NPY or EXR file; a PIL
                image; an array or tensor (3, H, W) or (H, W, 3), floats in -1..1, uint8 or uint16; or a ``Normal``.
            picture: The picture of the same view: whatever ``Image.load`` reads.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged or of another format; the array has another shape or dtype;
                values are NaN or infinite; no vector is long enough; a path leads out of ``root``.
        """
        paired = None if picture is None else Image.load(picture, root=root)
        if isinstance(source, Normal):
            return source if paired is None else cls(source.map, paired)
        values, name = _values(source, "normal", "a Normal", root)
        if values.ndim != 3 or 3 not in (values.shape[0], values.shape[2]):
            raise MediaError(f"{name} has shape {tuple(values.shape)}; a normal map is (3, H, W) or (H, W, 3).")
        if isinstance(values, Tensor) and values.dtype in (torch.uint8, torch.uint16):
            values = values.detach().cpu().numpy()
        if isinstance(values, np.ndarray) and values.dtype in (np.uint8, np.uint16):
            vectors = 2 * unit_floats(values) - 1
        else:
            vectors = to_floats(values, name)
        if len(vectors) != 3:
            vectors = vectors.permute(2, 0, 1)
        lengths = vectors.norm(dim=0, keepdim=True)
        known = lengths >= _SHORTEST
        if not known.any():
            raise MediaError(
                f"{name} holds no direction: all vectors are shorter than {_SHORTEST}; is it a normal map?"
            )
        vectors = torch.where((lengths - 1).abs() < _EXACT, vectors, vectors / lengths.clamp_min(_SHORTEST))
        return cls((vectors * known).contiguous(), paired)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an NPY file (3, H, W), which holds every bit, or a PNG of 8 bits, whole or not at all; no picture.

        Raises:
            MediaError: Unknown suffix, or the file can't be written.
        """
        if suffix_of(path, "normal", _SUFFIXES) == ".npy":
            write_atomically(path, encode_npy(self.map))
        else:
            write_image(self.draw().pixels, path)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the vectors and of the picture."""
        return hash_content(f"{self.modality} {_hash_of(self.picture)}", self.map)

    @property
    def shades(self) -> Tensor:
        """The vectors as colours, -1..1 as 0..255: floats (3, H, W)."""
        return (self.map.clamp(-1, 1) + 1) * 127.5

    def draw(self) -> Image:
        """Return the vectors as colours: x red, y green, z blue."""
        return Image(self.shades.round().to(torch.uint8))


def _hash_of(picture: Image | None) -> str:
    return picture.content_hash if picture else "alone"


def _values(
    source: object, modality: str, own: str, root: str | os.PathLike[str] | None
) -> tuple[np.ndarray | Tensor, str]:
    """Return the values of a map as they are given, and how errors call them."""
    if isinstance(source, np.ndarray):
        return source, "the array"
    if isinstance(source, Tensor):
        return source, "the tensor"
    if isinstance(source, PIL.Image.Image):
        return still_values(source, "the PIL image"), "the PIL image"
    if isinstance(source, (str, os.PathLike, bytes)):
        medium = find_file(source, modality, _FORMATS, root)
        return (read_npy if medium.format == "NumPy" else read_still)(medium), medium.name
    raise MediaError(
        f"a {modality} map can't be loaded from {type(source).__name__}; "
        f"accepted: a path, bytes, a PIL image, a NumPy array, a torch tensor, or {own}."
    )


def _scaled(values: Any, scale: float | None, name: str) -> Tensor:
    if scale is not None and not 0 < scale < float("inf"):
        raise MediaError(f"{name} can't have scale={scale:g}; a unit in metres is positive.")
    if scale is None:
        dtype = str(values.dtype).removeprefix("torch.")
        scale = 1.0 if "float" in dtype else {"uint8": 1 / 255, "uint16": _MILLIMETRE}.get(dtype)
        if scale is None:
            raise MediaError(f"{name} has dtype {dtype}, whose unit is not known; pass scale=, in metres.")
    return to_floats(values, name) * scale


def prepare_map(medium: Depth | Normal, spec: MapInput) -> Tensor:
    """Turn a map and its picture into what OneLLM's encoder wants (Han et al. 2023, arXiv 2312.03700): two pictures.

    The map is resized to the picture; both are then cropped and normalised alike.

    Returns:
        Floats, shape (2, 3, size, size), the picture first.

    Raises:
        MediaError: The map has no picture, or one of another aspect ratio.
    """
    kind = type(medium).__name__
    if medium.picture is None:
        raise MediaError(
            f"a {medium.modality} map can't be encoded without the picture of the same view; give it as "
            f"{kind}.load(..., picture=...), or under 'picture' in a message."
        )
    pixels = medium.picture.pixels
    height, width = pixels.shape[1:]
    rows, columns = medium.map.shape[-2:]
    if abs(rows * width / (height * columns) - 1) > _ASPECT:
        raise MediaError(
            f"a {medium.modality} map of {columns}x{rows} does not fit its picture of {width}x{height}; "
            "give the picture of the same view, of the same aspect ratio."
        )
    shades = resize(medium.shades, height, width).clamp(0, 255)
    return torch.stack([prepare_pixels(pixels, spec.image), prepare_pixels(shades, spec.image)])


def prepare_disparity(depth: Depth, spec: DisparityInput) -> Tensor:
    """Turn a depth map into disparity: the nearest distance divided by each, whatever the unit; 0 where not measured.

    ImageBind reads disparity for the sake of that (Girdhar et al. 2023, arXiv 2305.05665, section 4).

    Returns:
        Floats in 0..1, shape (1, size, size), short side resized, centre cropped.

    Raises:
        MediaError: Nothing was measured.
    """
    measured = depth.map > 0
    if not measured.any():
        raise MediaError("the depth map is 0 everywhere, which means that nothing was measured; choose another one.")
    nearest = depth.map[measured].min()
    disparity = torch.where(measured, nearest / depth.map.clamp_min(nearest), 0.0)
    resized = resize_short_side(disparity[None], spec.size).clamp(0, 1)
    top, left = ((side - spec.size) // 2 for side in resized.shape[1:])
    return resized[:, top : top + spec.size, left : left + spec.size].contiguous()
