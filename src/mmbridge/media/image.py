"""Pictures: files, arrays and tensors to RGB pixels, and pixels to what an encoder wants."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, ClassVar

import numpy as np
import PIL.Image
import torch
from PIL import ImageOps
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor
from torch.nn import functional as F

from mmbridge.errors import MediaError
from mmbridge.media.base import MediaFile, check_pixels, find_file, from_array, hash_content, to_uint8
from mmbridge.media.export import write_image
from mmbridge.modality import register
from mmbridge.specs import ImageInput

_FORMATS = {"PNG": "PNG", "JPEG": "JPEG", "WebP": "WebP"}
# Opened by class and not by PIL.Image.open, whose warning about large pictures would precede our error.
_READERS: dict[str, Callable[[BinaryIO], ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "WebP": WebPImageFile,
}

_MAX_ASPECT = 100


@register("image")
@dataclass(eq=False, repr=False)
class Image:
    """A picture.

    Args:
        pixels: RGB, uint8, shape (3, H, W); kept on the CPU.

    Raises:
        MediaError: Another dtype or shape.
    """

    modality: ClassVar[str] = "image"
    noun: ClassVar[str] = "an image"
    suffix: ClassVar[str] = ".png"
    pixels: Tensor

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.ndim != 3 or len(self.pixels) != 3:
            raise MediaError(
                f"an image holds uint8 pixels of shape (3, H, W), not {self.pixels.dtype} of shape "
                f"{tuple(self.pixels.shape)}; Image.load converts arrays and tensors."
            )
        check_pixels(self.pixels.shape[2], self.pixels.shape[1], "the image")
        self.pixels = self.pixels.detach().cpu()

    def __repr__(self) -> str:
        return f"Image({self.pixels.shape[2]}x{self.pixels.shape[1]})"

    @classmethod
    def load(cls, source: object, *, root: str | os.PathLike[str] | None = None) -> "Image":
        """Read a picture.

        EXIF orientation is applied, transparency is composited on white, 16-bit values are scaled to 8 bits.

        Args:
            source: A path or the bytes of a PNG, JPEG or WebP file; a PIL image; an array (H, W), (H, W, 1),
                (H, W, 3) or (H, W, 4); a tensor (H, W), (1, H, W), (3, H, W) or (4, H, W); or an ``Image``. Arrays
                and tensors are uint8, uint16, bool, or floats in 0..1.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: The file is missing, empty, damaged, of another format or above 64 megapixels; the array has
                another shape, dtype or range, or holds NaN; a path leads out of ``root``.
        """
        if isinstance(source, Image):
            return source
        if isinstance(source, PIL.Image.Image):
            check_pixels(source.width, source.height, "the PIL image")
            try:
                return cls(_from_pil(source))
            except (OSError, ValueError) as error:
                raise MediaError(f"a PIL image of mode {source.mode!r} can't be used: {error}.") from error
        if isinstance(source, np.ndarray):
            return cls(_from_array(source))
        if isinstance(source, Tensor):
            return cls(_from_channels_first(source, "the tensor", "(H, W), (1, H, W), (3, H, W) or (4, H, W)"))
        if isinstance(source, (str, os.PathLike, bytes)):
            return cls(_from_file(find_file(source, "image", _FORMATS, root)))
        raise MediaError(
            f"an image can't be loaded from {type(source).__name__}; "
            "accepted: a path, bytes, a PIL image, a NumPy array, a torch tensor, or an Image."
        )

    def save(self, path: str | os.PathLike[str], *, quality: int = 95) -> None:
        """Write a PNG, JPEG or WebP file, whole or not at all.

        Raises:
            MediaError: Unknown suffix, or the file can't be written.
        """
        write_image(self.pixels, path, quality)

    @property
    def content_hash(self) -> str:
        """Hex SHA-256 of the pixels and their shape: equal pictures, whatever file they came from, are equal keys."""
        return hash_content(self.modality, self.pixels)


def _from_file(medium: MediaFile) -> Tensor:
    with medium.open() as file, medium.decoding():
        picture = _READERS[medium.format](file)
        check_pixels(picture.width, picture.height, medium.name)
        return _from_pil(picture)


def _from_pil(picture: PIL.Image.Image) -> Tensor:
    picture.load()
    transparent = picture.info.get("transparency")
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # PIL's own conversion to RGB would clip 16 bits at 255
        values = np.asarray(picture)
        if picture.mode.startswith("I"):
            if values.min() < 0 or values.max() > 65535:
                raise MediaError(f"a PIL image of mode 'I' spans {values.min()}..{values.max()}; accepted: 0..65535.")
            values = values.astype(np.uint16)
            if isinstance(transparent, int):
                values = np.where(values == transparent, np.uint16(65535), values)
        return _from_array(values)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or transparent is not None:
        picture = picture.convert("RGBA")
        white = PIL.Image.new("RGBA", picture.size, "white")
        picture = PIL.Image.alpha_composite(white, picture)
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous()


def _from_array(array: np.ndarray) -> Tensor:
    accepted = "(H, W), (H, W, 1), (H, W, 3) or (H, W, 4)"
    if not array.size or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        channels_first = array.ndim == 3 and array.shape[0] in (1, 3, 4)
        hint = "; transpose it, or pass a torch tensor, which has channels first" if channels_first else ""
        raise MediaError(f"the array has shape {array.shape}; an image is {accepted}{hint}.")
    if array.dtype.kind not in "buf":
        raise MediaError(f"the array has dtype {array.dtype}; accepted: uint8, uint16, bool, or floats in 0..1.")
    tensor = from_array(array)
    return _from_channels_first(tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor, "the array", accepted)


def _from_channels_first(values: Tensor, what: str, accepted: str) -> Tensor:
    if values.ndim == 2:
        values = values[None]
    if values.ndim != 3 or len(values) not in (1, 3, 4) or not values.numel():
        raise MediaError(f"{what} has shape {tuple(values.shape)}; an image is {accepted}.")
    check_pixels(values.shape[2], values.shape[1], what)
    pixels = to_uint8(values, what)
    if len(pixels) == 4:
        alpha = pixels[3:].float() / 255
        pixels = (pixels[:3] * alpha + 255 * (1 - alpha)).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).contiguous()


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize pixels (..., C, H, W), uint8 or float, by the antialiased bicubic filter, as PIL does."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    batch = pixels.flatten(0, -4) if pixels.ndim > 3 else pixels[None]
    return F.interpolate(batch, (height, width), mode="bicubic", antialias=True).reshape(
        *pixels.shape[:-2], height, width
    )


def resize_short_side(pixels: Tensor, size: int) -> Tensor:
    """Resize pixels (..., C, H, W) so that the shorter side is ``size``, the aspect kept.

    Raises:
        MediaError: One side is more than 100 times the other.
    """
    height, width = pixels.shape[-2:]
    short = min(height, width)
    if max(height, width) > _MAX_ASPECT * short:  # the resized picture would not fit into memory
        raise MediaError(
            f"a picture of {width}x{height} is too long and thin to be cropped to a square: "
            f"at most {_MAX_ASPECT} times longer than wide; cut it first."
        )
    return resize(pixels, max(size, size * height // short), max(size, size * width // short))


def normalise(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return (x - mean) / std of pixels (..., 3, H, W) in 0..255, with x in 0..1."""
    return (pixels.float() / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def prepare_image(image: Image, spec: ImageInput) -> Tensor:
    """Turn a picture into what an encoder wants.

    Returns:
        Floats, shape (3, size, size).

    Raises:
        MediaError: ``spec.resize`` is unknown, or a picture to be cropped is more than 100 times longer than wide.
    """
    return prepare_pixels(image.pixels, spec)


def prepare_pixels(pixels: Tensor, spec: ImageInput) -> Tensor:
    """Do what ``prepare_image`` does with pixels (3, H, W), uint8 or floats in 0..255."""
    size = spec.size
    height, width = pixels.shape[1:]
    if spec.resize == "crop":
        pixels = resize_short_side(pixels, size)
        top, left = round((pixels.shape[1] - size) / 2), round((pixels.shape[2] - size) / 2)
        pixels = pixels[:, top : top + size, left : left + size]
    elif spec.resize == "pad":
        side = max(height, width)
        square = (torch.tensor(spec.mean) * 255).round().to(pixels.dtype)[:, None, None].repeat(1, side, side)
        top, left = (side - height) // 2, (side - width) // 2
        square[:, top : top + height, left : left + width] = pixels
        pixels = resize(square, size, size)
    elif spec.resize == "squash":
        pixels = resize(pixels, size, size)
    else:
        raise MediaError(f"an image can't be resized by {spec.resize!r}; accepted: 'crop', 'pad', 'squash'.")
    return normalise(pixels, spec.mean, spec.std)
