"""PLY and PCD files: named columns of numbers, of which positions and colours are kept.

Own readers, strict and small: of the libraries that read both, each comes with a viewer or under the GPL.
"""

from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from mmbridge.errors import MediaError
from mmbridge.media.arrays import MAX_TEXT, check_size, parse_rows
from mmbridge.media.base import MediaFile

MAX_POINTS = 20_000_000
_PLY_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4", "double": "f8", "float64": "f8",
}  # fmt: skip
_PLY_ORDERS = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_COLOURS = (("red", "green", "blue"), ("r", "g", "b"), ("diffuse_red", "diffuse_green", "diffuse_blue"))
_HEADER_LINES = 1000
_Field = tuple[str, str, int]  # name, NumPy type, how many


def read_ply(medium: MediaFile) -> np.ndarray:
    """Read the vertices of a PLY file, ascii or binary.

    Returns:
        float32 (N, 3) or, with colours, (N, 6).

    Raises:
        MediaError: The file is damaged, too large, or has no vertices with x, y and z.
    """
    check_size(medium)
    with medium.decoding(), medium.open() as file:
        encoding = ""
        elements: list[tuple[str, int, list[_Field]]] = []
        for words in _header(file, medium):
            match words:
                case ["format", encoding, _]:
                    pass
                case ["element", name, count]:
                    elements.append((name, int(count), []))
                case ["property", "list", *_]:
                    elements[-1][2].append(("", "list", 1))
                case ["property", kind, name]:
                    elements[-1][2].append((name, _PLY_TYPES[kind], 1))
                case ["end_header"]:
                    break
        if encoding not in _PLY_ORDERS:
            raise medium.damaged(f"a PLY is {', '.join(_PLY_ORDERS)}, not {encoding!r}")
        for element, total, fields in elements:
            if any(kind == "list" for _, kind, _ in fields):
                break
            columns = _rows(file, medium, fields, total, _PLY_ORDERS[encoding])
            if element == "vertex":
                return _points(columns, medium)
        raise MediaError(f"{medium.name} is a PLY whose vertices are no plain table at its start; save them so.")


def read_pcd(medium: MediaFile) -> np.ndarray:
    """Read a PCD file, ascii or binary.

    Returns:
        float32 (N, 3) or, with colours, (N, 6).

    Raises:
        MediaError: The file is damaged, too large, compressed, or has no x, y and z.
    """
    check_size(medium)
    with medium.decoding(), medium.open() as file:
        header: dict[str, list[str]] = {}
        for words in _header(file, medium):
            header[words[0].upper()] = words[1:]
            if words[0].upper() == "DATA":
                break
        encoding = header["DATA"][0].lower()
        if encoding not in ("ascii", "binary"):
            raise MediaError(f"{medium.name} is a PCD with {encoding} data; save it as ascii or binary.")
        names = header["FIELDS"]
        kinds = [letter.lower() + size for letter, size in zip(header["TYPE"], header["SIZE"], strict=True)]
        counts = [int(count) for count in header.get("COUNT", ["1"] * len(names))]
        total = int(header["POINTS"][0]) if "POINTS" in header else int(header["WIDTH"][0]) * int(header["HEIGHT"][0])
        fields = list(zip(names, kinds, counts, strict=True))
        return _points(_rows(file, medium, fields, total, "" if encoding == "ascii" else "<"), medium)


def _header(file: BinaryIO, medium: MediaFile) -> list[list[str]]:
    """Return the words of each line up to the one that ends the header; the file is then at the first point."""
    lines = []
    for _ in range(_HEADER_LINES):
        line = file.readline(4096)
        words = line.decode("ascii", errors="replace").split()
        if words and not words[0].startswith("#") and words[0] not in ("comment", "obj_info"):
            lines.append(words)
            if words[0] == "end_header" or words[0].upper() == "DATA":
                return lines
        if not line.endswith(b"\n"):
            break
    raise medium.damaged("its header does not end")


def _rows(file: BinaryIO, medium: MediaFile, fields: Sequence[_Field], count: int, order: str) -> dict[str, np.ndarray]:
    """Read ``count`` rows and return the columns by name; ``order`` is the byte order, "" for text."""
    if not 0 <= count <= MAX_POINTS:
        raise MediaError(f"{medium.name} announces {count} points; at most {MAX_POINTS} are read: thin it out first.")
    if not order:
        check_size(medium, MAX_TEXT)
        width = sum(number for _, _, number in fields)
        lines = [line for _ in range(count) if (line := file.readline().decode("ascii", errors="replace")).strip()]
        if len(lines) < count:
            raise medium.damaged(f"it holds {len(lines)} of {count} rows")
        table = parse_rows(lines, None, medium) if lines else np.empty((0, width))
        if table.shape[1] != width:
            raise medium.damaged(f"its rows have {table.shape[1]} of {width} columns")
        firsts = np.cumsum([0, *(number for _, _, number in fields)])
        return {name: table[:, first].astype(kind) for (name, kind, _), first in zip(fields, firsts, strict=False)}
    layout = np.dtype([(f"{index}", order + kind, (number,)) for index, (_, kind, number) in enumerate(fields)])
    content = file.read(count * layout.itemsize)
    if len(content) < count * layout.itemsize:
        raise medium.damaged(f"it holds {len(content)} of {count * layout.itemsize} bytes")
    records = np.frombuffer(content, layout, count)
    return {name: records[f"{index}"][:, 0] for index, (name, _, _) in enumerate(fields)}


def _points(columns: dict[str, np.ndarray], medium: MediaFile) -> np.ndarray:
    columns = {name.lower(): values for name, values in columns.items()}
    if not {"x", "y", "z"} <= columns.keys():
        raise MediaError(f"{medium.name} has the columns {', '.join(columns) or 'none'}; a point cloud has x, y and z.")
    kept = [columns[name] for name in "xyz"]
    names = next((names for names in _COLOURS if set(names) <= columns.keys()), ())
    kept += [_unit(columns[name]) for name in names]
    packed = columns.get("rgb", columns.get("rgba"))
    if not names and packed is not None:  # 0xRRGGBB, also where its bits are called a float
        bits = packed.astype("f4").view("u4") if packed.dtype.kind == "f" else packed.astype("u4")
        kept += [((bits >> shift) & 255) / 255 for shift in (16, 8, 0)]
    return np.stack([values.astype(np.float32) for values in kept], axis=1)


def _unit(values: np.ndarray) -> np.ndarray:
    return values / np.iinfo(values.dtype).max if values.dtype.kind in "ui" else values


def encode_ply(points: np.ndarray) -> bytes:
    """Return a binary PLY file of float32 points (N, 3) or (N, 6); colours have 8 bits, as viewers read them."""
    names = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]
    if points.shape[1] == 6:
        names += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    table = np.empty(len(points), dtype=names)
    for index, (name, kind) in enumerate(names):
        table[name] = points[:, index] if kind == "<f4" else (points[:, index] * 255).round()
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}"]
    lines += [f"property {'float' if kind == '<f4' else 'uchar'} {name}" for name, kind in names]
    return "\n".join([*lines, "end_header", ""]).encode() + table.tobytes()
