"""Checkpoints of a running stage, without pickle: tensors as safetensors, all else as JSON, whole or not at all.

Only what trains is in them, with the optimiser's state and the loop's counters. Frozen weights are not copied.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from mmbridge import hub
from mmbridge.errors import CheckpointError

log = logging.getLogger("mmbridge")

_TENSORS, _STATE = "tensors.safetensors", "state.json"


class SafeCheckpointIO(CheckpointIO):
    """Writes and reads Lightning's checkpoints as folders of two files."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint; an earlier one at ``path`` survives a failure.

        Raises:
            CheckpointError: The disk is full, or the checkpoint holds something that is neither tensor nor plain data.
        """
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; tensors arrive on the CPU.

        Raises:
            CheckpointError: It is missing, altered or incomplete.
        """
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        shutil.rmtree(path, ignore_errors=True)


def write_checkpoint(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a nested dict of tensors and plain data.

    Raises:
        CheckpointError: Writing failed, or a value is neither.
    """
    tensors: dict[str, Tensor] = {}
    state = _encode(checkpoint, tensors, "checkpoint")
    content = save(tensors)
    text = json.dumps({"format": 1, "sha256": hashlib.sha256(content).hexdigest(), "state": state}).encode()
    with hub.atomic_folder(folder) as draft:
        for name, data in ((_TENSORS, content), (_STATE, text)):
            with (draft / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Read what ``write_checkpoint`` wrote.

    Raises:
        CheckpointError: A file is missing, altered or incomplete.
    """
    record = hub.read_json(folder / _STATE)
    try:
        content = (folder / _TENSORS).read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{folder / _TENSORS} can't be read ({error.strerror}); delete {folder} and resume."
        ) from None
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise CheckpointError(
            f"{folder / _TENSORS} was altered: its hash is not the recorded one; delete {folder} and resume."
        )
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise CheckpointError(
            f"{folder / _TENSORS} is no safetensors file ({error}); delete {folder} and resume."
        ) from None
    state: dict[str, Any] = _decode(record["state"], tensors)
    return state


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder, -1 for any other file."""
    found = re.fullmatch(r"step-(\d+)", folder.name)
    return int(found.group(1)) if found else -1


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, the newest first."""
    found = [path for path in folder.glob("step-*") if step_of(path) >= 0]
    return sorted(found, key=step_of, reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint that is whole; damaged ones are passed over with a warning.

    Raises:
        CheckpointError: There are checkpoints, but none is whole.
    """
    found = checkpoints_in(folder)
    for path in found:
        try:
            read_checkpoint(path)
        except CheckpointError as error:
            log.warning("passing over a damaged checkpoint: %s", error)
            continue
        return path
    if found:
        raise CheckpointError(f"none of the {len(found)} checkpoints in {folder} is whole; start anew with overwrite.")
    return None


def _encode(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """Return JSON for a value; tensors go to ``tensors`` and leave their number."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        # A copy, since two names of one tensor must not share storage in a safetensors file.
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {"dict": [[_encode(part, tensors, path) for part in (key, item)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_encode(item, tensors, path) for item in value]}
    raise CheckpointError(
        f"{path} holds a {type(value).__name__}, which is neither a tensor nor plain data; don't save it."
    )


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {_decode(key, tensors): _decode(item, tensors) for key, item in content}
    items = [_decode(item, tensors) for item in content]
    return tuple(items) if kind == "tuple" else items
