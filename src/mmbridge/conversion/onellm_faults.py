"""What may be wrong with a file in OneLLM's layout, in one error; ``onellm`` uses this."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mmbridge.conversion.keymap import Target, listed
from mmbridge.errors import CheckpointError


def shapes_of(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def finite(tensor: Tensor) -> bool:
    return tensor.is_meta or bool(tensor.isfinite().all())


def faults_of(state: Mapping[str, Any], targets: Mapping[str, Target], own: str) -> dict[str, list[str]]:
    """Return which names are missing, and which that match ``own`` nobody wants."""
    known = {source for target in targets.values() for source in target.sources}
    return {
        "missing": [name for name in known if name not in state],
        "unexpected": [name for name in state if re.match(own, name) and name not in known],
    }


def misshapen(
    state: Mapping[str, Any], targets: Mapping[str, Target], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    found = []
    for name, target in targets.items():
        wanted = target.make.source(shapes[name])  # type: ignore[attr-defined]
        found += [
            f"{source} {tuple(state[source].shape)} instead of {wanted}"
            for source in target.sources
            if tuple(state[source].shape) != wanted
        ]
    return found


def refuse(faults: Mapping[str, list[str]], what: str) -> None:
    """Raise an error that lists what is wrong, if anything is."""
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {listed(sorted(names))}" for fault, names in faults.items() if names)
        raise CheckpointError(
            f"OneLLM checkpoint does not fill {what}: {found}. Pass all its tensors under their own names, from an "
            "undamaged file."
        )
