"""A numeric self-check: a few numbers of what a module makes of a fixed input.

They are stored when weights are converted and computed again later, possibly by other versions of this library and of
torch. Hashes tell whether weights changed; these tell whether what is done with them did: another attention layout,
activation or normalisation.
"""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

log = logging.getLogger("mmbridge")

TOLERANCE = 1e-3
"""Largest difference between stored and computed numbers, relative to the largest stored one."""

_SHOWN = 8  # numbers that are kept


class _InFloat32(TorchDispatchMode):
    """Computes in float32 whatever the weights are, each cast when it is used, so that they are never all in memory twice."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def raised(value: Any) -> Any:
            half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
            return value.float() if half else value

        return func(*tree_map(raised, args), **tree_map(raised, kwargs or {}))


def noise(*shape: int) -> Tensor:
    """Return the same standard normal numbers at every call, on every machine (NumPy's frozen generator)."""
    return torch.from_numpy(np.random.RandomState(20240611).standard_normal(shape).astype(np.float32))


@contextlib.contextmanager
def filled(module: nn.Module, tensors: Mapping[int, Tensor]) -> Iterator[None]:
    """Put tensors in the place of a module's parameters and buffers, by their ``id``, without copying them, for a while."""
    places = [
        (table, name, value)
        for part in module.modules()
        for table in (part._parameters, part._buffers)
        for name, value in table.items()
        if id(value) in tensors
    ]
    try:
        for table, name, value in places:
            table[name] = tensors[id(value)]  # type: ignore[assignment]
        yield
    finally:
        for table, name, value in places:
            table[name] = value  # type: ignore[assignment]


@torch.no_grad()
def numbers(forward: Callable[[], Tensor]) -> list[float]:
    """Return a few evenly spaced values of what ``forward`` returns, computed in float32."""
    with _InFloat32():
        values = forward().float().flatten()
    places = torch.linspace(0, len(values) - 1, min(_SHOWN, len(values))).long()
    return [float(f"{value:.6g}") for value in values[places].tolist()]


def projection(module: nn.Module, tensors: Mapping[int, Tensor]) -> dict[str, list[float]]:
    """Return the self-check of a projection: a few numbers of what it makes of eight tokens of noise.

    Args:
        module: The projection, which stays as it is.
        tensors: What is put in the place of its parameters, by their ``id``.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with filled(module, tensors):
            return {"projection": numbers(lambda: module(noise(1, 8, sizes(module)["dim_in"])))}
    finally:
        for part, mode in modes.items():
            part.training = mode


def sizes(module: nn.Module | None) -> dict[str, int]:
    """Return the widths of a projection; nothing for any other module."""
    known = {key: getattr(module, key, None) for key in ("dim_in", "dim_out", "num_queries")}
    return {key: size for key, size in known.items() if size is not None}


def entry(name: str, module: nn.Module | None) -> dict[str, Any]:
    """Return what the manifest says of a part for its self-check; nothing if it is no projection, or has no weights.

    A projection that can't be run, because it wants another number of tokens for example, is saved without: a warning tells.
    A projection with buffers is passed over, since they are not among the saved tensors.

    Args:
        name: The part's name, for the warning.
        module: The module, on any device; it is run on the CPU, in float32.
    """
    if module is None or not sizes(module) or any(True for _ in module.buffers()):
        return {}
    weights = list(module.parameters())
    if any(value.is_meta for value in weights):
        return {}
    try:
        found = projection(module, {id(value): value.detach().cpu() for value in weights})
    except Exception as error:  # whatever it is, what was trained must be saved
        log.warning("no self-check of %s was stored: %s", name, error)
        return {}
    return {"check": found, "sizes": sizes(module)} if all(map(math.isfinite, found["projection"])) else {}


def difference(stored: list[float], found: list[float]) -> float:
    """Return the largest difference, relative to the largest stored number; infinite where their counts differ."""
    if len(stored) != len(found):
        return float("inf")
    scale = max((abs(value) for value in stored), default=1.0) or 1.0
    worst = max((abs(a - b) for a, b in zip(stored, found, strict=True)), default=0.0) / scale
    return worst if worst == worst else float("inf")  # NaN
