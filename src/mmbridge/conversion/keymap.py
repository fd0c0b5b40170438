"""What a converter is: which tensors of a published file make which tensors of ours, told from names and shapes alone.

A `KeyMap` holds no weights, so it works on the meta device, and its parts can be made one tensor at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mmbridge.errors import CheckpointError

_SHOWN = 8  # names of each kind that an error lists


def _same(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Target:
    """A tensor of ours: the names of those it is made from, and how."""

    sources: tuple[str, ...]
    make: Callable[..., Tensor] = _same


@dataclass(frozen=True)
class KeyMap:
    """A published layout, mapped.

    Args:
        parts: For each part of ours, its tensors' names and how to make them.
        unused: Published names, or rows of them as ``name[from:to]``, that are left out on purpose, and why.
    """

    parts: dict[str, dict[str, Target]]
    unused: dict[str, str] = field(default_factory=dict)

    def check(self, state: Mapping[str, Any], what: str) -> None:
        """Refuse names that are missing or that nobody wants.

        Args:
            state: Tensors, or anything else, by published names.
            what: What the file is, for the message.

        Raises:
            CheckpointError: The difference, listed.
        """
        used = {source for tensors in self.parts.values() for target in tensors.values() for source in target.sources}
        faults = {
            "missing": sorted(used - state.keys()),
            "unexpected": sorted(state.keys() - used - self.unused.keys()),
        }
        if any(faults.values()):
            found = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
            raise CheckpointError(f"{what} is not whole: {found}. Give an undamaged file of this layout.")

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """Return each part's tensors, views of the given ones where nothing changes."""
        return {
            part: {name: target.make(*(state[source] for source in target.sources)) for name, target in tensors.items()}
            for part, tensors in self.parts.items()
        }

    def report(self) -> dict[str, Any]:
        """Return as plain data which published tensor went where, and which were left out and why."""
        return {
            "used": {
                f"{part}: {name}": list(target.sources)
                for part, tensors in self.parts.items()
                for name, target in tensors.items()
            },
            "unused": self.unused,
        }


def joined(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the tensors of several parts as one state: ``<part>/<name>``."""
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def listed(names: list[str]) -> str:
    """Return the first few names and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + rest if names else "nothing"
