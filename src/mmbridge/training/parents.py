"""Where a stage starts: parts as the parent's, those of a new modality as another's (``like``), experts as a single one."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmbridge.config import Part
from mmbridge.errors import ConfigError
from mmbridge.projections.mixture import MixtureOfExperts, upcycled


def load_parents(bridge: Any, parents: Mapping[str, Sequence[str]], inputs: Mapping[str, Part]) -> None:
    """Start a bridge's parts as those of its parents, and modalities that no parent has as those they are ``like``.

    Several experts start as a parent's single one where ``upcycle`` of their projection allows it. Prints what starts as what;
    parts that are not named keep their random start.

    Args:
        bridge: A ``Bridge``.
        parents: Where each parent is (a folder, a run, or a shipped name), and patterns over the names of its parts.
        inputs: The bridge's ways in, as in its recipe.

    Raises:
        ConfigError: A parent has no such part of this bridge, or a single expert where there shall be several.
        CheckpointError: A parent is missing, altered or of other shapes.
    """
    present = set()
    for parent, patterns in parents.items():
        read = bridge.load_parts(parent, strict=False, only=patterns, adapt=_Upcycling(inputs))
        if not read:
            named = "" if list(patterns) == ["*"] else f" among {', '.join(patterns)}"
            raise ConfigError(
                f"parent {parent!r} has no part in common with this recipe's bridge{named}; set parent: null."
            )
        print(f"from {parent}: {', '.join(read)}", flush=True)
        present |= {name.split(".")[1] for name in read if name.startswith("inputs.")}
    if parents:
        _start_alike(bridge, inputs, present)


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


class _Upcycling:
    """Makes the tensors of a parent's single expert those of several; ``Bridge.load_parts`` asks for shared experts first."""

    def __init__(self, inputs: Mapping[str, Part]):
        projections = {f"inputs.{name}.projection": part.arguments.get("projection") for name, part in inputs.items()}
        self.mixtures = {
            name: projection.arguments
            for name, projection in projections.items()
            if projection is not None and projection.name == MixtureOfExperts.registry_name
        }
        self.sharing: dict[str, list[str]] = {}  # names of projections by that of the part that is their experts
        for name, arguments in self.mixtures.items():
            if shared := arguments.get("experts"):
                self.sharing.setdefault(f"inputs.shared.{shared}", []).append(name)
        self.grown: dict[str, float] = {}  # noise, by the names of parts whose experts start as one

    def __call__(self, name: str, stored: dict[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if name in self.mixtures or name in self.sharing:
            experts = [key for key in fresh if key.startswith(("experts.", "blocks.")) and key in stored]
            if experts and len(stored[experts[0]]) == 1 < len(fresh[experts[0]]):
                self._grow(name, len(fresh[experts[0]]))
        return upcycled(stored, fresh, self.grown[name]) if name in self.grown else stored

    def _grow(self, name: str, count: int) -> None:
        among = self.sharing.get(name, [name])
        noise = next((value for one in among if (value := self.mixtures[one].get("upcycle")) is not None), None)
        if noise is None:
            raise ConfigError(
                f"{name} of the parent has one expert, but this recipe has {count}; give bridge.{among[0]} 'upcycle: 0' to start "
                "all as the one, more to add noise, or 'num_experts: 1'."
            )
        self.grown |= dict.fromkeys([name, *among], noise)
        print(f"{name}: {count} experts start as the parent's one, with noise {noise:g} and new routers", flush=True)
