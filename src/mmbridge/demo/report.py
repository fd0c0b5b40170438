"""What the demo found out, as plain data for its page: answers, stages, parts, the table and what it ran on."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmbridge import __version__, hub
from mmbridge.bridge import Bridge, find_bridge
from mmbridge.demo.charts import Points, read_metrics
from mmbridge.messages import Message

_PACKAGES = ("torch", "transformers", "diffusers", "peft", "lightning", "safetensors", "av")


@dataclass
class Exchange:
    """A dialogue with the bridge's replies.

    Attributes:
        title: What it shows.
        source: What the scene was given by: "text", a medium such as "image", or a pair such as "image+audio".
        wanted: What was asked for at last: a medium, "text" or "none".
        messages: The dialogue; paths of media are relative to the demo's folder.
        truth: What the scene is, in words; "" where only the absence of media counts.
        measured: What the judges looked at, such as "shape"; empty where only the absence of media counts.
        right: Whether every reply was right.
        seconds: How long the replies took.
    """

    title: str
    source: str
    wanted: str
    messages: list[Message]
    truth: str
    measured: list[str]
    right: bool
    seconds: float


@dataclass
class StageReport:
    """A finished stage.

    Attributes:
        name: The stage.
        steps: Optimiser steps.
        batch_size: Dialogues per step.
        seconds: How long it took in all; encoding of media, validation and saving included.
        trained: Names of the parts that trained.
        metrics: (step, value) pairs by column of the log.
    """

    name: str
    steps: int
    batch_size: int
    seconds: float
    trained: list[str]
    metrics: dict[str, Points]


@dataclass
class PartReport:
    """A part of a bridge.

    Attributes:
        name: Such as "inputs.image.projection".
        parameters: Parameters that no earlier part of the list has.
        trained_in: Stages that trained it; empty for frozen parts.
        source: Where frozen weights come from.
        licence: Of frozen weights.
        sha256: Of the weights.
    """

    name: str
    parameters: int
    trained_in: list[str]
    source: str = ""
    licence: str = ""
    sha256: str = ""


@dataclass
class BridgeReport:
    """A second shipped bridge.

    Attributes:
        bridge: Its name.
        loading_seconds: How long it took to open it.
        exchanges: Its answers.
        table: Its any-to-any table, recorded when it was made.
        forgetting: Its accuracies after every stage of its training, as ``mmbridge.evaluation.forgetting.compare`` returns them.
    """

    bridge: str
    loading_seconds: float
    exchanges: list[Exchange]
    table: list[dict[str, Any]]
    forgetting: dict[str, Any]


@dataclass
class Report:
    """All that the page shows.

    Attributes:
        bridge: The shipped bridge.
        loading_seconds: How long it took to open it.
        exchanges: Its answers.
        parts: The parts of the bridge that was used last.
        table: The any-to-any table.
        measured: Whose table it is, in words.
        stages: Stages that were trained.
        again: Answers of the bridge that was trained.
        eight: The shipped bridge of eight modalities.
        environment: Versions and the machine.
    """

    bridge: str
    loading_seconds: float
    exchanges: list[Exchange]
    parts: list[PartReport]
    table: list[dict[str, Any]]
    measured: str = "the shipped bridge, recorded when it was made"
    stages: list[StageReport] = field(default_factory=list)
    again: list[Exchange] = field(default_factory=list)
    eight: BridgeReport | None = None
    environment: dict[str, str] = field(default_factory=lambda: describe_environment())


def describe_parts(bridge: Bridge, source: str | Path) -> list[PartReport]:
    """List the parts of a saved bridge, trained ones first.

    Args:
        bridge: The bridge; a decoder's parameters count only once it has made something, since it loads late.
        source: Where it was loaded from.
    """
    manifest = hub.read_json(find_bridge(source) / "manifest.json")
    reports, counted = [], set()
    for name, parameters in bridge.parts().items():
        stages = [stage["stage"] for stage in manifest["lineage"] if name in stage["trained"]]
        counted |= {id(value) for value in parameters.values()}
        size = sum(value.numel() for value in parameters.values())
        reports.append(PartReport(name, size, stages, sha256=manifest["parts"][name]["sha256"]))
    for name, entry in manifest["frozen"].items():
        sizes = {id(value): value.numel() for value in bridge.get_submodule(name).parameters()}
        size = sum(sizes[key] for key in sizes.keys() - counted)
        counted |= sizes.keys()
        weights, licence = entry.get("source") or entry.get("weights") or "", entry.get("licence") or "unknown"
        reports.append(PartReport(name, size, [], str(weights), licence, entry["sha256"] or ""))
    return reports


def describe_stage(folder: Path, seconds: float) -> StageReport:
    """Read what a finished run left in its folder.

    Raises:
        CheckpointError: The run is not finished.
        DataError: Its log can't be read.
    """
    stage: Mapping[str, Any] = hub.read_json(folder / "bridge" / "manifest.json")["lineage"][-1]
    run = stage["recipe"]["run"]
    metrics: dict[str, Points] = dict(read_metrics(folder / "logs" / "metrics.csv"))
    return StageReport(
        stage["stage"], stage["steps"], run["batch_size"] * run["accumulate"], seconds, list(stage["trained"]), metrics
    )


def describe_environment(packages: Sequence[str] = _PACKAGES) -> dict[str, str]:
    """Return versions and the machine, by name."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "mmbridge": __version__,
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "computed on": device,
    }
