"""What all media share: finding a file, telling its format by its first bytes, hashing, safe writing.

The format is always read from the content, never from the file's name, so a decoder sees only what it is made for.
"""

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.modality import MEDIA

MAX_PIXELS = 64_000_000
_HEAD_BYTES = 512
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"fLaC": "FLAC",
    b"OggS": "OGG",
    b"ID3": "MP3",
    b"\x1aE\xdf\xa3": "WebM",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"BM": "BMP",
    b"%PDF": "PDF",
    b"PK\x03\x04": "ZIP",
    b"\x1f\x8b": "gzip",
    b"\x93NUMPY": "NumPy",
    b"v/1\x01": "EXR",
    b"ply\n": "PLY",
    b"ply\r": "PLY",
    b"# .PCD": "PCD",
    b"VERSION": "PCD",
}
_RIFF = {b"WAVE": "WAV", b"WEBP": "WebP", b"AVI ": "AVI"}
_STILL_BRANDS = {b"heic": "HEIC", b"heix": "HEIC", b"mif1": "HEIC", b"avif": "AVIF"}


def sniff(head: bytes) -> str | None:
    """Tell a file's format by its first bytes.

    Returns:
        A name such as "PNG", "MP4" (also for M4A and QuickTime), "WebM" (also for Matroska) or "text"; None if unknown.
    """
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if head[:4] in (b"RIFF", b"RF64"):
        return _RIFF.get(head[8:12])
    if head[4:8] == b"ftyp":
        return _STILL_BRANDS.get(head[8:12], "MP4")
    if head[344:348] in (b"n+1\0", b"ni1\0") or head[4:8] == b"n+2\0":
        return "NIfTI"
    if head[4:8] in (b"moov", b"mdat", b"wide"):
        return "MP4"
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE6 == 0xE2:  # an MPEG frame header, layer III
        return "MP3"
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) >= len(head) - 3 and all(c.isprintable() or c.isspace() for c in text):  # 3: a cut character
        return "text"
    return None


def within_root(path: str | os.PathLike[str], root: str | os.PathLike[str] | None) -> Path:
    """Resolve a path, below ``root`` where one is given.

    Raises:
        MediaError: The path, its symbolic links followed, leads out of ``root``.
    """
    if root is None:
        return Path(path)
    base = Path(root).resolve()
    full = (base / path).resolve()
    if not full.is_relative_to(base):
        raise MediaError(
            f"{os.fspath(path)!r} leads out of the data root {str(base)!r}; "
            "media paths are relative to the data root and stay below it."
        )
    return full


@dataclass(frozen=True)
class MediaFile:
    """A medium as its file holds it, on disk or in memory, whose format is one that its modality reads.

    Args:
        modality: What is read from it: "image", "audio", ...
        name: How errors call it.
        content: Where it is, or its bytes.
        format: What its first bytes say, see ``sniff``.
    """

    modality: str
    name: str
    content: Path | bytes
    format: str

    def open(self) -> BinaryIO:
        """Return a fresh reader."""
        return BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Turn whatever a decoder raises on damaged content into one MediaError that names the file."""
        try:
            yield
        except MediaError:
            raise
        except Exception as error:  # decoders raise anything on hostile bytes, MemoryError for an absurd size included
            reason = getattr(error, "strerror", None) or str(error)  # FFmpeg's str() adds error numbers
            raise self.damaged(" ".join(reason.split()).rstrip(".") or type(error).__name__) from error

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    def damaged(self, reason: str) -> MediaError:
        """Return the error for content that starts well and can't be decoded."""
        return MediaError(
            f"{self.name} is a damaged or truncated {self.format} file ({reason}); export or fetch it again."
        )


def _noun(modality: str) -> str:
    noun: str = "a mask of voxels" if modality == "mask" else MEDIA[modality].noun
    return noun


def find_file(
    source: str | os.PathLike[str] | bytes,
    modality: str,
    formats: dict[str, str],
    root: str | os.PathLike[str] | None = None,
) -> MediaFile:
    """Look at a file or bytes and check that ``modality`` can be read from it.

    Args:
        source: A path, or the encoded bytes themselves.
        modality: What is to be read from it: "image", "audio", ...
        formats: Formats that are read, as ``sniff`` names them, to what an error calls them.
        root: Folder that paths are relative to and may not leave.

    Raises:
        MediaError: No such file, not a regular file, empty, or of another format.
    """
    noun, accepted = _noun(modality), ", ".join(formats.values())
    content: Path | bytes
    if isinstance(source, bytes):
        name, content, head = f"the {len(source)} bytes given", source, source[:_HEAD_BYTES]
    else:
        name = repr(os.fspath(source))
        try:
            content = within_root(source, root)
            if content.exists() and not content.is_file():
                raise MediaError(f"{name} is not a file that {noun} can be read from, but a folder or a device.")
            with content.open("rb") as file:
                head = file.read(_HEAD_BYTES)
        except FileNotFoundError:
            hint = "addresses are not fetched, so download it first" if "://" in name else "check the path"
            raise MediaError(f"there is no file {name} to read {noun} from; {hint}.") from None
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: symbolic links in a circle
            raise MediaError(f"{name} can't be opened to read {noun} from: {error}.") from error
    if not head:
        raise MediaError(f"{name} is empty (0 bytes); {noun} is read from {accepted}.")
    found = sniff(head)
    if found not in formats:
        looks = f"it looks like {found}" if found else "its format is not known"
        raise MediaError(f"{name} is not {noun} that can be read: {looks}; {noun} is read from {accepted}.")
    return MediaFile(modality, name, content, found)


def from_array(array: np.ndarray) -> Tensor:
    """Return an array as a tensor that torch knows: native byte order, floats of any width as float32."""
    dtype = np.dtype(np.float32) if array.dtype.kind == "f" else array.dtype.newbyteorder("=")
    return torch.from_numpy(array.astype(dtype))


def to_uint8(values: Tensor, what: str) -> Tensor:
    """Return pixel values as uint8 on the CPU.

    Args:
        values: uint8, uint16 (divided by 257), bool, or floats in 0..1.
        what: How errors call them.

    Raises:
        MediaError: Another dtype, NaN or infinite values, or floats outside 0..1.
    """
    values = values.detach().cpu()
    if values.dtype == torch.uint8:
        return values
    if values.dtype == torch.bool:
        return values.to(torch.uint8) * 255
    if values.dtype == torch.uint16:
        return (values.float() / 257).round().to(torch.uint8)
    if not values.is_floating_point():
        raise MediaError(f"{what} has dtype {values.dtype}; accepted: uint8, uint16, bool, or floats in 0..1.")
    values = values.float()
    if not values.isfinite().all():
        raise MediaError(f"{what} holds NaN or infinite values; replace them by numbers in 0..1.")
    low, high = values.min().item(), values.max().item()
    if low < -1e-3 or high > 1 + 1e-3:  # the rounding of half precision is forgiven
        raise MediaError(f"{what} spans {low:g}..{high:g}; floats must lie in 0..1: rescale them, or pass uint8.")
    return (values.clamp(0, 1) * 255).round().to(torch.uint8)


def check_pixels(width: int, height: int, name: str) -> None:
    """Raise MediaError where a picture has no pixel or more than ``MAX_PIXELS``."""
    if width < 1 or height < 1:
        raise MediaError(f"{name} has no pixels ({width}x{height}).")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} has {width}x{height} = {width * height / 1e6:.0f} megapixels; "
            f"at most {MAX_PIXELS // 1_000_000} are read: scale it down first."
        )


def hash_content(header: str, tensor: Tensor) -> str:
    """Return the hex SHA-256 of a header, a tensor's dtype and shape, and its values."""
    digest = hashlib.sha256(f"{header} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def suffix_of(path: str | os.PathLike[str], modality: str, accepted: tuple[str, ...]) -> str:
    """Return a path's suffix in lower case.

    Raises:
        MediaError: It is not one of ``accepted``.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in accepted:
        raise MediaError(
            f"{os.fspath(path)!r}: {_noun(modality)} can't be written as {suffix or 'a file without a suffix'!r}; "
            f"accepted: {', '.join(accepted)}."
        )
    return suffix


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file or leave everything as it was: write beside it, flush to the disk, rename.

    Raises:
        MediaError: The folder is missing or can't be written to, or the disk is full.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with beside.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except FileNotFoundError as error:
        raise MediaError(
            f"{str(path)!r} can't be written: there is no folder {str(path.parent)!r}; create it."
        ) from error
    except OSError as error:
        raise MediaError(
            f"{str(path)!r} can't be written ({error.strerror}); {len(content)} bytes are needed, nothing was changed."
        ) from error
    finally:
        beside.unlink(missing_ok=True)
