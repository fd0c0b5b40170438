"""Checkpoint files as they are published, and the files that conversion writes, one tensor in memory at a time.

Files are mapped into memory, so that only what is touched is read, and opened again after a while, so that what was read
is let go. Pickles are read by torch's unpickler of plain tensors alone: a file that asks for more is refused, not run.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmbridge import hub
from mmbridge.conversion.keymap import Target, listed
from mmbridge.errors import CheckpointError, MMBridgeError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "keep": None}
"""What floats become on the way, by the name that the command line takes."""

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PICKLES = (".pt", ".pth", ".bin")
_MAPPED = 32 << 20  # bytes handed out before mappings are renewed
_RECORDED = 4 << 20  # bytes of an unfinished file that a killed run may lose
_CHUNK = 1 << 20  # elements that are cast, checked and written at once


class Checkpoint(Mapping[str, Tensor]):
    """Tensors of a published checkpoint by name, read from the disk where and when they are touched.

    Args:
        source: A ``.safetensors`` file, a ``.pt``, ``.pth`` or ``.bin`` file of ``torch.save``, or a folder of either, whose
            shards may come with an index (``*.index.json``).

    Attributes:
        files: The files, in order.
        meta: Every tensor on the meta device: names, shapes and dtypes.

    Raises:
        CheckpointError: Nothing there, a file that is damaged or holds more than tensors, shards that do not fit together.
    """

    def __init__(self, source: str | Path):
        self.source = Path(source).expanduser()
        self.files, index = _find(self.source)
        self.meta: dict[str, Tensor] = {}
        self._places: dict[str, Path] = {}
        self._open: dict[Path, Mapping[str, Tensor]] = {}
        self._handed = 0
        for file in self.files:
            tensors = _mapped(file)
            twice = sorted(tensors.keys() & self._places.keys())
            if twice:
                raise CheckpointError(
                    f"{self._places[twice[0]].name} and {file.name} in {self.source} both hold {listed(twice)}; "
                    "give one of them, or a folder with the shards of one checkpoint alone."
                )
            self._places.update(dict.fromkeys(tensors, file))
            self.meta.update({name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()})
        absent = sorted(name for name, file in index.items() if self._places.get(name) != file)
        if absent:
            raise CheckpointError(f"the shards in {self.source} lack what their index names: {listed(absent)}.")

    def __getitem__(self, name: str) -> Tensor:
        size = self.meta[name].nbytes
        if self._handed and self._handed + size > _MAPPED:
            self.release()
        self._handed += size
        file = self._places[name]
        if file not in self._open:
            self._open[file] = _mapped(file)
        return self._open[file][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)

    def release(self) -> None:
        """Let go of the mappings; their memory is free once no tensor of theirs is held."""
        self._open.clear()
        self._handed = 0


class Joined(Mapping[str, Tensor]):
    """Several checkpoints as one: a tensor is called ``<checkpoint>/<its name>``."""

    def __init__(self, checkpoints: Mapping[str, Checkpoint]):
        self._checkpoints = checkpoints
        self.meta = {
            f"{first}/{name}": value for first, state in checkpoints.items() for name, value in state.meta.items()
        }

    def __getitem__(self, name: str) -> Tensor:
        first, _, rest = name.partition("/")
        return self._checkpoints[first][rest]

    def __iter__(self) -> Iterator[str]:
        return iter(self.meta)

    def __len__(self) -> int:
        return len(self.meta)


def _find(source: Path) -> tuple[list[Path], dict[str, Path]]:
    """Return the files of a source, and which tensor an index says is where."""
    if source.is_file():
        return [source], {}
    if not source.is_dir():
        raise CheckpointError(f"there is no file or folder {source}; give the published weights.")
    indices = sorted(source.glob("*.index.json"))
    if len(indices) > 1:
        names = ", ".join(path.name for path in indices)
        raise CheckpointError(f"{source} has several indices ({names}); give a folder with one checkpoint.")
    if indices:
        places = hub.read_json(indices[0]).get("weight_map", {})
        index = {name: source / str(file) for name, file in places.items()}
        absent = sorted({file.name for file in index.values() if not file.is_file()})
        if absent or not index:
            raise CheckpointError(
                f"{indices[0]} names {listed(absent) if absent else 'no files'}, and {source} does not hold them; "
                "download the missing files."
            )
        return sorted(set(index.values())), index
    found = sorted(source.glob("*.safetensors"))
    found = found or sorted(path for path in source.iterdir() if path.suffix in _PICKLES)
    if not found:
        raise CheckpointError(
            f"{source} holds no weights (*.safetensors, {', '.join('*' + ending for ending in _PICKLES)}); give the folder or "
            "the file that was downloaded."
        )
    return found, {}


def _mapped(file: Path) -> Mapping[str, Tensor]:
    """Return the tensors of one file, mapped into memory: nothing but their names and shapes is read yet."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stream:
                return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise CheckpointError(
            f"{file} asks to run code or holds more than tensors, and was not opened ({_reason(error)}); get the weights "
            "from their publisher."
        ) from error
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError, KeyError) as error:
        raise CheckpointError(
            f"{file} is damaged or not a checkpoint ({_reason(error)}); download it again, and compare its size."
        ) from error
    tensors = state if isinstance(state, Mapping) else {}
    other = next((name for name, value in tensors.items() if not isinstance(value, Tensor)), None)
    if not tensors or other is not None:
        held = f"{type(tensors[other]).__name__} {other!r}" if other is not None else "no tensors"
        raise CheckpointError(
            f"{file} holds {held} where tensors by name are wanted; give the file of the weights alone."
        )
    return tensors


def _reason(error: Exception) -> str:
    """Return the telling line of an error of torch's or safetensors'."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "nsupported" in line]
    return (telling or lines or [type(error).__name__])[0][:160].rstrip(".")


def shapes(tensors: Mapping[str, Target], meta: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return what a part's tensors will be, on the meta device; floats in ``dtype``, or as they are where it is None."""
    made = {name: target.make(*(meta[source] for source in target.sources)) for name, target in tensors.items()}
    return {name: value.to(dtype) if dtype and value.is_floating_point() else value for name, value in made.items()}


def write_tensors(
    file: Path,
    tensors: Mapping[str, Target],
    state: Checkpoint | Joined,
    dtype: torch.dtype | None,
    progress: Callable[[int], Any] = lambda size: None,
    begun: tuple[int, str] = (0, ""),
    record: Callable[[int, str], Any] = lambda size, digest: None,
) -> str:
    """Write a part as safetensors, a tensor at a time.

    Args:
        file: The file to write.
        tensors: Names, and what each is made from.
        state: Where that is.
        dtype: What floats become; None keeps each as it is.
        progress: Told the bytes written.
        begun: What an earlier run recorded of this file: bytes, and their SHA-256. If they are there, it goes on behind them.
        record: Told now and then, between two tensors, how many bytes are on the disk, and their SHA-256.

    Returns:
        SHA-256 of the file.

    Raises:
        CheckpointError: A value is not finite, before or after the cast; a tensor has a dtype that safetensors lacks.
    """
    planned = shapes(tensors, state.meta, dtype)
    # wide types first, so that every tensor starts at a multiple of its element's size
    order = sorted(planned, key=lambda name: (-planned[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        value = planned[name]
        if value.dtype not in _NAMES:
            raise CheckpointError(f"{name} is {value.dtype}, which safetensors files of this library do not hold.")
        start, end = end, end + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = _begun(file, *begun)
    start = recorded = begun[0] if digest else 0
    digest = digest or hashlib.sha256()
    with file.open("r+b" if start else "wb") as out:
        out.seek(start)
        out.truncate()
        for piece in () if start else (len(head).to_bytes(8, "little"), head):
            out.write(piece)
            digest.update(piece)
        for name in order:
            end = 8 + len(head) + header[name]["data_offsets"][1]
            if end <= start:
                progress(planned[name].nbytes)
                continue
            for data in _chunks(name, tensors[name], state, planned[name].dtype):
                out.write(data)
                digest.update(data)
                progress(data.nbytes)
            data = None  # it may keep a mapping alive
            if end - recorded >= _RECORDED:
                _settle(out)
                record(end, digest.hexdigest())
                recorded = end
        _settle(out)
    return digest.hexdigest()


def _begun(file: Path, size: int, wanted: str) -> Any:
    """Return the running SHA-256 of a file's first bytes, None where they are not what was recorded."""
    digest = hashlib.sha256()
    if not size or not file.is_file():
        return None
    with file.open("rb") as stream:
        while left := min(size - stream.tell(), 1 << 20):
            piece = stream.read(left)
            if not piece:
                return None
            digest.update(piece)
    return digest if digest.hexdigest() == wanted else None


def _settle(out: Any) -> None:
    """Have what was written on the disk."""
    out.flush()
    os.fsync(out.fileno())


def _chunks(name: str, target: Target, state: Checkpoint | Joined, dtype: torch.dtype) -> Iterator[Any]:
    """Yield a tensor's bytes in pieces, checked and cast."""
    flat = target.make(*(state[source] for source in target.sources)).reshape(-1)
    for start in range(0, len(flat), _CHUNK):
        chunk = flat[start : start + _CHUNK]
        ready = chunk.to(dtype).contiguous()
        _require_finite(name, chunk, ready, target.sources)
        yield ready.view(torch.uint8).numpy()


def _require_finite(name: str, before: Tensor, after: Tensor, sources: tuple[str, ...]) -> None:
    """Raise unless all values are finite; attention masks, which are tensors in some checkpoints, may be infinite."""
    if not after.is_floating_point() or not (unfit := ~after.isfinite()).any():
        return
    if name.rpartition(".")[2] == "mask" and not after.isnan().any():
        return
    if before.isfinite().all():
        raise CheckpointError(f"{name} has values too large for {after.dtype}; convert with --dtype bfloat16 or keep.")
    raise CheckpointError(
        f"{name} (from {listed(list(sources))}) holds {int(unfit.sum())} values that are not finite; the file is damaged: "
        "download it again."
    )


class Draft:
    """An unfinished folder with a record of the files that are whole, and of how far one was written.

    Args:
        folder: The unfinished folder.
        identity: What it is made from and how; a folder made from anything else is thrown away.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self._record = folder, folder / "record.json"
        self._facts: dict[str, Any] = {"identity": identity, "files": {}, "begun": {}}
        found = None
        with contextlib.suppress(CheckpointError):
            found = hub.read_json(self._record)
        if found is not None and found["identity"] == identity:
            self._facts |= found
        else:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, write: Callable[[Path, tuple[int, str], Callable[[int, str], None]], str]) -> str:
        """Have a file written, or keep the one that an earlier run finished; its hash tells.

        Args:
            name: Path of the file in the folder.
            write: Writes the file it is given, goes on where an earlier run left it, and records how far it is, both as
                ``write_tensors`` does; returns the file's SHA-256.

        Returns:
            SHA-256 of the file.
        """
        file, whole = self.folder / name, self._facts["files"]
        recorded: str | None = whole.get(name)
        if recorded is not None and file.is_file() and hub.file_sha256(file) == recorded:
            return recorded
        file.parent.mkdir(parents=True, exist_ok=True)
        half = file.with_name(file.name + ".half")

        def record(size: int, digest: str) -> None:
            self._facts["begun"] = {name: [size, digest]}
            hub.write_json(self._record, self._facts)

        size, digest = self._facts["begun"].get(name, (0, ""))
        made = write(half, (size, digest), record)
        half.replace(file)
        whole[name], self._facts["begun"] = made, {}
        hub.write_json(self._record, self._facts)
        return made


@contextlib.contextmanager
def resumable_folder(target: Path, identity: dict[str, Any], size: int = 0) -> Iterator[Draft]:
    """Give a folder to write into that takes the name ``target`` when all is written, and that a killed run leaves behind.

    Args:
        target: Must not exist.
        identity: What the folder is made from and how, as plain data.
        size: Bytes that will be written, to see beforehand whether the disk has room.

    Raises:
        CheckpointError: The target exists, the disk is full, or writing failed.
    """
    refuse_existing(target)
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Draft(unfinished, identity)
        there = sum(path.stat().st_size for path in unfinished.rglob("*") if path.is_file())
        free = shutil.disk_usage(unfinished).free
        if size - there > free:
            raise CheckpointError(
                f"{target} needs {(size - there) / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free; make room."
            )
        yield draft
        (unfinished / "record.json").unlink(missing_ok=True)
        unfinished.rename(target)
    except MMBridgeError:  # going on would end the same way
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except OSError as error:
        raise CheckpointError(
            f"could not write {target} ({error.strerror or error}); the same command goes on where it stopped."
        ) from error


def refuse_existing(target: Path) -> None:
    """Raise CheckpointError if ``target`` exists."""
    if target.exists():
        raise CheckpointError(f"{target} exists already and was not overwritten; name another place, or remove it.")
