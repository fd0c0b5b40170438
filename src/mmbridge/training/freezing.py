"""What trains and what stays frozen: declared by patterns over part names, set exactly, printed and checked."""

import fnmatch
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from mmbridge.errors import ConfigError
from mmbridge.registry import suggest


def select_parts(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the part names that match any of the patterns, in the order of ``names``.

    Raises:
        ConfigError: A pattern matches nothing, or there is none.
    """
    if not patterns:
        raise ConfigError(f"train is empty, so nothing would be trained; name parts of {', '.join(names)}.")
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                f"train has {pattern!r}, which matches no part of this bridge{suggest(pattern, list(names))}"
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def freeze(bridge: Any, patterns: Sequence[str]) -> list[str]:
    """Let exactly the matching parts train: no other parameter of the bridge gets a gradient.

    Args:
        bridge: A ``Bridge``.
        patterns: Patterns over the names of ``bridge.parts()``, such as "inputs.*.projection".

    Returns:
        Names of the parts that train.

    Raises:
        ConfigError: A pattern matches nothing, or a matching part shares parameters with one that must stay frozen.
    """
    parts = bridge.parts()
    chosen = select_parts(list(parts), patterns)
    bridge.requires_grad_(False)
    declared = {id(parameter) for name in chosen for parameter in parts[name].values()}
    for name in chosen:
        for parameter in parts[name].values():
            parameter.requires_grad_(True)
    for name, parameters in parts.items():
        if name not in chosen and any(id(parameter) in declared for parameter in parameters.values()):
            raise ConfigError(
                f"part {name!r} shares parameters with one that trains, but is not named in train; add it."
            )
    set_modes(bridge)
    return chosen


def set_modes(bridge: Any) -> None:
    """Put parts that train into training mode and all others into evaluation mode, whose results don't vary."""
    bridge.eval()
    for ways in (bridge.inputs, bridge.outputs):
        for way in ways.values():
            for module in way.trainable().values():
                module.train(any(parameter.requires_grad for parameter in module.parameters()))
    bridge.backbone.train(True)


def trainable_table(bridge: Any) -> str:
    """Return a table of all parts with their numbers of parameters and whether they train."""
    parts = bridge.parts()
    listed = {id(parameter) for parameters in parts.values() for parameter in parameters.values()}
    counted = set(listed)
    rows = [
        (
            name,
            sum(value.numel() for value in parameters.values()),
            any(value.requires_grad for value in parameters.values()),
        )
        for name, parameters in parts.items()
    ]
    for name, module in _frozen_modules(bridge).items():
        if listed.issuperset(own := {id(value) for value in module.parameters()}) and own:
            continue  # a part as a whole, such as a language model whose weights can train
        fresh = {id(value): value for value in module.parameters() if id(value) not in counted}
        counted |= fresh.keys()
        rows.append((name, sum(value.numel() for value in fresh.values()), False))
    total = sum(count for _, count, _ in rows)
    trained = sum(count for _, count, trains in rows if trains)
    width = max(len(name) for name, _, _ in rows)
    lines = [f"{'part':<{width}} {'parameters':>15}  trainable"]
    for name, count, trains in rows:
        shown = f"{count:,}" if count else "not loaded yet"  # decoders load when they are first used
        lines.append(f"{name:<{width}} {shown:>15}  {'yes' if trains else 'no'}")
    lines.append(f"{'total in memory':<{width}} {total:>15,}  {trained:,} ({trained / max(total, 1):.2%})")
    return "\n".join(lines)


def frozen_digests(bridge: Any) -> dict[str, str]:
    """Return a SHA-256 per frozen module that is in memory: equal before and after training, or something is wrong.

    Decoders load their components late, so there may be more entries after training; the common ones must be equal.
    """
    digests: dict[str, Any] = {}
    trained = {id(value) for value in bridge.parameters() if value.requires_grad}
    for name, tensor in bridge.state_dict(keep_vars=True).items():
        if id(tensor) in trained:
            continue
        digest = digests.setdefault(".".join(name.split(".")[:4]), hashlib.sha256())
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _frozen_modules(bridge: Any) -> dict[str, nn.Module]:
    modules = {"backbone": bridge.backbone}
    for side, ways in (("inputs", bridge.inputs), ("outputs", bridge.outputs)):
        for modality, way in ways.items():
            trained = {id(module) for module in way.trainable().values()}
            modules.update(
                {
                    f"{side}.{modality}.{name}": module
                    for name, module in way.named_children()
                    if id(module) not in trained
                }
            )
    return modules
