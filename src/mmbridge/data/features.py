"""Frozen work as data: whatever no trainable parameter can change is computed once, stored, and read back.

A value is found by what it was computed from (the medium's content, or the caption) and by the fingerprint of what
computed it (weights and preprocessing), so a changed file, weight or setting never reads a stale value. Values stand in
safetensors shards that are only ever added, each whole or not at all, and are mapped into memory, not loaded.
"""

import hashlib
import json
import logging
import mmap
import os
import uuid
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from mmbridge import hub, media
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.media.base import within_root
from mmbridge.messages import MediumPart

log = logging.getLogger("mmbridge")

Value: TypeAlias = Tensor | dict[str, Tensor]

_FLOATS = {"float32": torch.float32, "float16": torch.float16}
_DTYPES = {"F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_FLUSH_BYTES = 64 << 20
_CHUNK = 64


@dataclass(frozen=True)
class _Slice:
    """A tensor inside a shard: where its bytes are, what they mean, and their checksum."""

    shard: np.ndarray
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]
    checksum: int

    def read(self) -> Tensor | None:
        """Return the tensor, mapped; None where its bytes are not those that were written."""
        content = self.shard[self.start : self.stop]
        if zlib.crc32(content.data) != self.checksum:
            return None
        return torch.from_numpy(content.view(_DTYPES[self.dtype]).reshape(self.shape))


class FeatureStore:
    """Keeps frozen results; the ``store`` of ``Bridge.prepare``.

    Args:
        folder: Where the shards are; several runs may share one. None keeps everything in memory.
        dtype: "float32" or "float16": how floating-point values are kept.

    Attributes:
        computed: How many values were computed, by modality, rather than read.

    Raises:
        ConfigError: Unknown dtype.
        CheckpointError: The folder can't be made.
    """

    def __init__(self, folder: str | Path | None = None, dtype: str = "float32"):
        if dtype not in _FLOATS:
            raise ConfigError(f"a feature store keeps 'float32' or 'float16', not {dtype!r}.")
        self.folder = None if folder is None else Path(folder)
        self.dtype = dtype
        self.computed: Counter[str] = Counter()
        self._ready: dict[str, Value] = {}  # checked or computed in this process
        self._stored: dict[str, dict[str, _Slice]] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: dict[str, list[Any]] = {}  # path -> size, time of change, hash
        self._files_changed = False
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"the cache folder {self.folder} can't be made ({error.strerror}).") from error
            # In the order of writing, since a later shard may hold a repaired value.
            for shard in sorted(
                self.folder.glob("*.safetensors"), key=lambda file: (file.stat().st_mtime_ns, file.name)
            ):
                self._index(shard)
            self._read_files()

    def __len__(self) -> int:
        return len(self._ready.keys() | self._stored.keys())

    @property
    def size(self) -> int:
        """Bytes on the disk, or in memory for a store without a folder."""
        if self.folder is not None:
            return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        tensors = (tensor for value in self._ready.values() for tensor in _fields(value).values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def describe(self) -> str:
        """Return one line: how many values, how large, where."""
        return f"{len(self):,} cached values, {self.size / 2**20:,.1f} MiB in {self.folder or 'memory'}"

    def fetch(
        self, fingerprint: str, parts: Sequence[MediumPart], compute: Any, root: str | Path | None = None
    ) -> list[Any]:
        """Return what ``compute(parts)`` gives, computed only for parts that are not stored yet.

        Args:
            fingerprint: What computes: weights, preprocessing and settings.
            parts: Media, by path, content or caption.
            compute: From some of the parts to as many values, tensors or dicts of tensors.
            root: Folder that paths are relative to and may not leave.

        Raises:
            MediaError: A file can't be read.
            CheckpointError: A shard can't be written.
        """
        keys = [self._key(fingerprint, part, root) for part in parts]
        missing = {
            key: part for key, part in zip(keys, parts, strict=True) if key not in self._ready and not self._load(key)
        }
        todo = list(missing.items())
        for start in range(0, len(todo), _CHUNK):
            chunk = todo[start : start + _CHUNK]
            values = compute([part for _, part in chunk])
            for (key, part), value in zip(chunk, values, strict=True):
                self._add(key, value)
                self.computed[part.type] += 1
        if self._pending_bytes > _FLUSH_BYTES:
            self.flush()
        return [self._ready[key] for key in keys]

    def flush(self) -> None:
        """Write what was computed since the last shard; a kill before loses only that.

        Raises:
            CheckpointError: The shard can't be written; the store goes on without it.
        """
        if self.folder is None:
            return
        if self._pending:
            checksums = {name: zlib.crc32(tensor.numpy()) for name, tensor in self._pending.items()}
            content = save(self._pending, {"checksums": json.dumps(checksums)})
            self._write(self.folder / f"{uuid.uuid4().hex}.safetensors", content)
            self._pending, self._pending_bytes = {}, 0
        if self._files_changed:
            self._write(self.folder / "files.json", json.dumps(self._files).encode())
            self._files_changed = False

    def _write(self, path: Path, content: bytes) -> None:
        draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
        try:
            with draft.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except OSError as error:
            raise CheckpointError(
                f"the cache {path} can't be written ({error.strerror}; {len(content):,} bytes are needed); free some "
                "space or choose another folder for the cache."
            ) from error
        finally:
            draft.unlink(missing_ok=True)

    def _add(self, key: str, value: Value) -> None:
        kept = {name: self._kept(tensor) for name, tensor in _fields(value).items()}
        self._ready[key] = kept if isinstance(value, dict) else kept[""]
        if self.folder is not None:
            self._pending.update({f"{key}.{name}": tensor for name, tensor in kept.items()})
            self._pending_bytes += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    def _kept(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu()
        # A copy, since a row of a batch would keep the whole batch alive.
        return tensor.to(_FLOATS[self.dtype] if tensor.is_floating_point() else tensor.dtype).clone().contiguous()

    def _load(self, key: str) -> bool:
        slices = self._stored.get(key)
        if slices is None:
            return False
        tensors = {name: piece.read() for name, piece in slices.items()}
        if any(tensor is None for tensor in tensors.values()):
            log.warning("a cached value in %s was altered; it is computed again", self.folder)
            del self._stored[key]
            return False
        self._ready[key] = tensors.get("", tensors)  # type: ignore[assignment]
        return True

    def _index(self, path: Path) -> None:
        try:
            for name, piece in read_header(path).items():
                key, _, field = name.partition(".")
                self._stored.setdefault(key, {})[field] = piece
        except (ValueError, KeyError, TypeError, OSError) as error:
            log.warning("the cache shard %s is damaged (%s); what it held is computed again", path, error)
            path.unlink(missing_ok=True)

    def _key(self, fingerprint: str, part: MediumPart, root: str | Path | None) -> str:
        facts = [
            fingerprint,
            part.type,
            self._content(part, root),
            part.caption,
            part.sample_rate,
            part.fps,
            self.dtype,
        ]
        if part.picture is not None:
            named = isinstance(part.picture, str)
            picture = MediumPart("image", part.picture if named else None, None if named else part.picture)
            facts.append(self._content(picture, root))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]

    def _content(self, part: MediumPart, root: str | Path | None) -> str | None:
        if part.path is not None:
            return self._hash_file(part, root)
        if part.data is None:
            return None
        if isinstance(part.data, bytes):
            return hashlib.sha256(part.data).hexdigest()
        if hasattr(part.data, "content_hash"):
            return str(part.data.content_hash)
        return str(media.load(part.type, part.data, root, **part.options).content_hash)

    def _hash_file(self, part: MediumPart, root: str | Path | None) -> str:
        path = within_root(part.path or "", root)
        try:
            status = path.stat()
            facts = [status.st_size, status.st_mtime_ns]
            known = self._files.get(str(path.absolute()))
            if known is not None and known[:2] == facts:
                return str(known[2])
            digest = hub.file_sha256(path)
        except OSError:
            media.load(part.type, part.path, root=root)  # says what is wrong with the file
            raise
        self._files[str(path.absolute())] = [*facts, digest]
        self._files_changed = True
        return digest

    def _read_files(self) -> None:
        assert self.folder is not None
        try:
            self._files = dict(json.loads((self.folder / "files.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            self._files = {}  # only saves hashing files anew


def read_header(path: Path) -> dict[str, _Slice]:
    """Return the tensors of a safetensors shard by name, mapped into memory.

    Raises:
        ValueError: The file is not whole, or not a shard.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            raise ValueError("it is cut short")
        header = json.loads(file.read(length))
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=np.uint8, offset=8 + length)
    checksums = json.loads(header.pop("__metadata__")["checksums"])
    pieces = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        if stop > len(content):
            raise ValueError("it is cut short")
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"it holds {entry['dtype']}")
        pieces[name] = _Slice(content, start, stop, entry["dtype"], tuple(entry["shape"]), checksums[name])
    return pieces


def _fields(value: Value) -> dict[str, Tensor]:
    return value if isinstance(value, dict) else {"": value}
