"""Where a stage starts: parts as the parent's, those of a new modality as another's (``like``)."""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from mmbridge.config import Part
from mmbridge.errors import ConfigError


def load_parent(bridge: Any, parent: str, inputs: Mapping[str, Part]) -> None:
    """Start a bridge's parts as those of its parent, and modalities that the parent lacks as those they are ``like``.

    Prints what starts as what; parts that are not named keep their random start.

    Args:
        bridge: A ``Bridge``.
        parent: Where the parent is: a folder, a run, or a shipped name.
        inputs: The bridge's ways in, as in its recipe.

    Raises:
        ConfigError: The parent has no part of this bridge.
        CheckpointError: The parent is missing, altered or of other shapes.
    """
    read = bridge.load_parts(parent, strict=False)
    if not read:
        raise ConfigError(f"parent {parent!r} has no part in common with this recipe's bridge; set parent: null.")
    print(f"from {parent}: {', '.join(read)}", flush=True)
    _start_alike(bridge, inputs, {name.split(".")[1] for name in read if name.startswith("inputs.")})


@torch.no_grad()
def _start_alike(bridge: Any, inputs: Mapping[str, Part], present: Collection[str]) -> None:
    """Copy what a modality that is not ``present`` has of the names and shapes of the one that it is like."""
    parts = bridge.parts()
    for modality in inputs:
        source = modality
        while source not in present and (like := inputs[source].arguments.get("like")):
            source = like  # one that is new itself starts as the one that it is like
        if source == modality:
            continue
        for part in ("projection", "tags"):
            name, other = f"inputs.{modality}.{part}", f"inputs.{source}.{part}"
            if name not in parts or other not in parts:
                continue
            ours, theirs = parts[name], parts[other]
            differing = [key for key, value in ours.items() if key not in theirs or theirs[key].shape != value.shape]
            for key in ours.keys() - differing:
                ours[key].copy_(theirs[key])
            rest = f", but for {', '.join(differing)}, of other shapes" if differing else ""
            print(f"{name} starts as {other}{rest}", flush=True)
