"""A layout for tests: the parts of a tiny bridge and its encoder's weights under names of their own, ``part/name``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mmbridge.conversion.keymap import KeyMap, Target

CONFIG: dict[str, Any] = {}  # of the bridge
ENCODER: dict[str, Any] = {}  # of the encoder that the file contains
stop: Any = None  # called with every name before its tensor is made


def beside(folder: Path) -> dict[str, Any]:
    return {}


def keymap(state: Mapping[str, Tensor]) -> KeyMap:
    parts: dict[str, dict[str, Target]] = {}
    for whole in state:
        part, _, name = whole.partition("/")
        if part == "left":
            continue

        def make(tensor: Tensor, whole: str = whole) -> Tensor:
            if stop is not None and not tensor.is_meta:
                stop(whole)
            return tensor

        parts.setdefault(part, {})[name] = Target((whole,), make)
    return KeyMap(parts, {"left/over": "nobody needs it"})


def bridge_config(state: Mapping[str, Tensor], base: Mapping[str, str] | None) -> dict[str, Any]:
    base = base or {}
    encoder = {**CONFIG["inputs"]["image"]["encoder"], "weights": base.get("vision", "someone/vision")}
    inputs = {"image": {**CONFIG["inputs"]["image"], "encoder": encoder}}
    backbone = {**CONFIG["backbone"], "source": base.get("backbone", CONFIG["backbone"]["source"])}
    return {**CONFIG, "backbone": backbone, "inputs": inputs}


def base_configs(state: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    return {"base.vision": ENCODER}


def export_map(parts: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor]) -> dict[str, Target]:
    return {f"{part}/{name}": Target((f"{part}/{name}",)) for part, tensors in parts.items() for name in tensors}
