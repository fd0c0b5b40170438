"""Numbers in files: NPY, tables of text, and pictures whose values are measurements."""

from io import BytesIO

import av
import numpy as np
import PIL.Image
import torch
from PIL.PngImagePlugin import PngImageFile
from torch import Tensor

from mmbridge.errors import MediaError
from mmbridge.media.base import MediaFile, check_pixels, from_array

MAX_BYTES = 2 * 1024**3
MAX_TEXT = 256 * 1024**2
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def check_size(medium: MediaFile, limit: int = MAX_BYTES) -> None:
    """Raise MediaError where a file holds more bytes than are read."""
    if medium.size > limit:
        raise MediaError(
            f"{medium.name} holds {medium.size / 1024**2:.0f} MiB; at most {limit // 1024**2} MiB are read from "
            f"{medium.format}: make it smaller first."
        )


def to_floats(values: np.ndarray | Tensor, what: str) -> Tensor:
    """Return numbers as float32 on the CPU.

    Raises:
        MediaError: They are no real numbers, or NaN or infinite.
    """
    if isinstance(values, np.ndarray):
        if values.dtype.kind not in "buif":
            raise MediaError(f"{what} has dtype {values.dtype}; accepted: floats and integers.")
        values = from_array(values)
    elif values.is_complex():
        raise MediaError(f"{what} has dtype {values.dtype}; accepted: floats and integers.")
    floats = values.detach().cpu().float()
    check_finite(floats, what)
    return floats


def check_finite(values: Tensor, what: str) -> None:
    """Raise MediaError where values are NaN or infinite."""
    bad = int((~values.isfinite()).sum())
    if bad:
        raise MediaError(f"{what} holds {bad} NaN or infinite values; remove or replace them.")


def read_npy(medium: MediaFile) -> np.ndarray:
    """Read an array of numbers; nothing is unpickled.

    Raises:
        MediaError: The file is damaged, larger than 2 GiB, or holds Python objects.
    """
    check_size(medium)
    with medium.decoding(), medium.open() as file:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise medium.damaged(f"NPY of version {version} holds no plain numbers")
        shape, _, dtype = _HEADERS[version](file)
        if dtype.hasobject:
            raise MediaError(f"{medium.name} holds Python objects, which are never read; save an array of numbers.")
        wanted, held = int(np.prod(shape, dtype=object)) * dtype.itemsize, medium.size - file.tell()
        if held < wanted:
            raise medium.damaged(f"it holds {held} of {wanted} bytes")
        file.seek(0)
        return np.asarray(np.load(file, allow_pickle=False))


def encode_npy(values: Tensor) -> bytes:
    """Return the bytes of an NPY file."""
    buffer = BytesIO()
    np.save(buffer, values.contiguous().numpy(), allow_pickle=False)
    return buffer.getvalue()


def read_table(medium: MediaFile) -> tuple[list[str], np.ndarray]:
    """Read a table of numbers: columns between commas, semicolons, tabs or spaces; lines with # are passed over.

    Returns:
        Names of the columns in lower case, [] without a header; and float64 (rows, columns).

    Raises:
        MediaError: Not UTF-8, no number in it, a cell that is no number, rows of different lengths, or above 256 MiB.
    """
    check_size(medium, MAX_TEXT)
    with medium.open() as file:
        try:
            lines = [line.strip() for line in file.read().decode("utf-8-sig").splitlines()]
        except UnicodeDecodeError as error:
            raise MediaError(f"{medium.name} is not UTF-8 at byte {error.start}; save it as UTF-8.") from None
    lines = [line for line in lines if line]
    first = lines[0].lstrip("# ") if lines else ""
    delimiter = next((mark for mark in (",", ";") if mark in first), None)
    cells = [cell.strip().strip('"').lower() for cell in first.split(delimiter)]
    names = [] if all(_is_number(cell) for cell in cells) else cells
    rows = [line for line in lines[bool(names) :] if not line.startswith("#")]
    if not rows:
        raise MediaError(f"{medium.name} holds no row of numbers; export or fetch it again.")
    return names, parse_rows(rows, delimiter, medium)


def parse_rows(rows: list[str], delimiter: str | None, medium: MediaFile) -> np.ndarray:
    """Parse lines of numbers to float64 (rows, columns).

    Raises:
        MediaError: A cell that is no number, or rows of different lengths.
    """
    try:
        return np.loadtxt(rows, delimiter=delimiter, ndmin=2, comments=None)
    except ValueError as error:
        reason = str(error).partition(";")[0].rstrip(".")
        raise MediaError(f"{medium.name} is not a table of numbers: {reason}.") from None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def read_still(medium: MediaFile) -> np.ndarray:
    """Read the values of a PNG or EXR as they are stored.

    Returns:
        uint8, uint16 or (EXR) float32, shape (H, W) or (H, W, 3).

    Raises:
        MediaError: The file is damaged, of more than 64 megapixels, or paletted, or an EXR has other channels.
    """
    check_size(medium)
    if medium.format == "EXR":
        return _decode_exr(medium)
    with medium.decoding(), medium.open() as file:
        picture = PngImageFile(file)
        check_pixels(picture.width, picture.height, medium.name)
        picture.load()
        file.seek(24)
        depth, kind = file.read(2)
    if (depth, kind) in ((16, 2), (16, 6)):  # PIL keeps 8 of 16 bits of a colour
        return _decode(medium, "png_pipe")[..., :3]
    return still_values(picture, medium.name)


def still_values(picture: PIL.Image.Image, name: str) -> np.ndarray:
    """Return the values of a PIL image: uint8, uint16 or float32, shape (H, W) or (H, W, 3).

    Raises:
        MediaError: It has a palette, or values above 16 bits.
    """
    if picture.mode not in ("L", "LA", "RGB", "RGBA", "I", "F") and not picture.mode.startswith("I;16"):
        raise MediaError(f"{name} is a picture of mode {picture.mode!r}; maps have 8 or 16 bits a channel, no palette.")
    values = np.asarray(picture)
    if picture.mode == "I":
        if values.min() < 0 or values.max() > 65535:
            raise MediaError(f"{name} spans {values.min()}..{values.max()}; accepted: 0..65535.")
        values = values.astype(np.uint16)
    return values[..., 0] if picture.mode == "LA" else values[..., :3] if picture.mode == "RGBA" else values


def _decode_exr(medium: MediaFile) -> np.ndarray:
    try:
        _check_exr(medium)
        return _decode(medium, "exr_pipe").astype(np.float32)
    except MediaError as error:
        raise MediaError(
            f"{str(error).rstrip('.')}; of EXR files the channels Y, or R, G and B, are read: save others as NPY."
        ) from error


def _check_exr(medium: MediaFile) -> None:
    """Raise MediaError where an EXR file is cut, which FFmpeg decodes without a word: by its table of chunks."""
    with medium.decoding(), medium.open() as file:
        content = file.read()
        flags = int.from_bytes(content[4:8], "little")
        if flags & 0x1800:
            raise medium.damaged("it has several parts, or several depths a pixel")
        place = 8
        while content[place]:  # attributes: name, type, size, value
            kind = content.index(b"\0", place) + 1
            size = content.index(b"\0", kind) + 1
            place = size + 4 + int.from_bytes(content[size : size + 4], "little")
        table = place + 1
        count = (int.from_bytes(content[table : table + 8], "little") - table) // 8  # the first chunk follows the table
        chunks = np.frombuffer(content, "<u8", max(1, count), table)
        size = int(chunks.max()) + (16 if flags & 0x200 else 4)  # after the coordinates of a tile or of a line
        wanted = size + 4 + int.from_bytes(content[size : size + 4], "little")
        if count < 1 or chunks.min() < table or len(content) < wanted:
            raise medium.damaged(f"it holds {len(content)} of {wanted} bytes")


def _decode(medium: MediaFile, demuxer: str) -> np.ndarray:
    with medium.decoding(), medium.open() as file, av.open(file, "r", format=demuxer) as container:
        context = container.streams.video[0].codec_context
        if not context.width:
            raise medium.damaged("its size can't be read")
        check_pixels(context.width, context.height, medium.name)
        for frame in container.decode(video=0):
            if getattr(frame, "is_corrupt", False):
                break
            values = frame.to_ndarray()
            return values[..., :3] if values.ndim == 3 else values
        raise medium.damaged("it holds no picture")


def unit_floats(values: np.ndarray) -> Tensor:
    """Return uint8 or uint16 values divided by their largest, 0..1."""
    return torch.from_numpy(values.astype(np.float32)) / np.iinfo(values.dtype).max
