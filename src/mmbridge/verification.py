"""Folders of converted weights and saved bridges, checked part by part.

Numbers of a self-check are stored when weights are converted (``store_checks``) and when a bridge is saved, and computed
again when a folder is verified.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmbridge import hub, registry
from mmbridge.backbones.causal_lm import first_layer
from mmbridge.bridge import Bridge, create_part, find_bridge
from mmbridge.conversion import imagebind, probe
from mmbridge.conversion.files import Checkpoint
from mmbridge.encoders.imagebind import ImageBindModel, read_config
from mmbridge.errors import CheckpointError, MMBridgeError

log = logging.getLogger("mmbridge")

BASE = "base."
"""Beginning of the names of parts that are models of their own."""


@dataclass(frozen=True)
class Finding:
    """What was found of one part: ``whole`` is None where it could not be looked at."""

    part: str
    whole: bool | None
    text: str


def verify(source: str | Path) -> Iterator[Finding]:
    """Check a converted folder or a saved bridge, part by part.

    Hash and finiteness of every part; names and shapes against the module that it belongs to; and, where numbers were stored
    when it was converted or saved, what the module makes of a fixed input, within ``conversion.probe.TOLERANCE`` of the largest.
    Frozen models that are not in the folder are reported as unchecked.

    Raises:
        CheckpointError: No manifest there.
    """
    folder = find_bridge(source)
    manifest = hub.read_json(folder / "manifest.json")
    modules = Modules(folder, manifest)
    bridge = "backbone" in modules.config
    for name, entry in {**manifest["parts"], **manifest.get("base", {})}.items():
        try:
            yield Finding(name, True, _verify_part(folder / place_of(name, bridge), name, entry, modules))
        except MMBridgeError as error:
            yield Finding(name, False, str(error))
    for name, entry in manifest["frozen"].items():
        origin = entry.get("source") or entry.get("weights") or "random weights"
        if str(origin).startswith("./"):
            continue
        there = origin != "random weights" and hub.find_local(origin) is not None
        state = "compared when the bridge is opened" if there else "not on this machine"
        yield Finding(name, None, f"unchecked: {origin}, {state}")


def _verify_part(file: Path, name: str, entry: Mapping[str, Any], modules: "Modules") -> str:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing; convert again, or restore it")
    if hub.file_sha256(file) != entry["sha256"]:
        raise CheckpointError(f"{file} was altered: its hash is not that of the manifest; convert again, or restore it")
    state = Checkpoint(file)
    for key in state:
        value = state[key]
        if (
            value.is_floating_point()
            and not key.endswith("mask")
            and not all(c.isfinite().all() for c in value.reshape(-1).split(1 << 20))
        ):
            raise CheckpointError(f"{key} holds values that are not finite")
    done = ["hash", "finite"]
    if (clash := modules.clash(name, state.meta)) is not None:
        raise CheckpointError(f"names or shapes are not those of the module, first at {clash}")
    done += ["shapes"] if name in modules.parts else []
    numbers = modules.numbers(name) if "check" in entry else {}
    for key, stored in entry.get("check", {}).items():
        off = probe.difference(stored, numbers.get(key, []))
        if off > probe.TOLERANCE:
            raise CheckpointError(
                f"self-check of {key} is off by {off:.2g} of the largest number, more than {probe.TOLERANCE:g}: it computes "
                "something else than when it was written; use the versions of then, or report it"
            )
        done.append(f"self-check of {key}")
    why = f"; shapes unchecked: {modules.why}" if modules.why and name not in modules.parts else ""
    return f"{entry['parameters']:,} parameters: {', '.join(done)}{why}"


class Modules:
    """What the parts of a folder belong to, built on the meta device, so that nothing is held twice."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any]):
        self.folder, self.why = folder, ""
        self.config = hub.read_json(folder / "config.json")
        self.parts: dict[str, Mapping[str, Tensor]] = {}
        self.modules: dict[str, nn.Module] = {}
        self.towers: tuple[str, ...] = ()
        if "backbone" not in self.config:
            with torch.device("meta"):
                model = ImageBindModel(read_config(folder))
            self.parts["model"], self.towers = model.state_dict(), model.towers
            return
        try:
            with torch.device("meta"):
                bridge = Bridge.from_config(hub.localised(self.config, folder))
        except CheckpointError as error:
            self.why = f"a frozen model is missing ({str(error).partition(';')[0]})"
            self._projections(manifest.get("parts", {}))
            return
        self.parts.update(bridge.parts())
        self.modules = bridge.trainable()
        if self.config["backbone"]["source"].startswith("./base/") and not bridge.backbone.adapters:
            name = BASE + self.config["backbone"]["source"].rpartition("/")[2]
            self.parts[name] = bridge.backbone.model.state_dict()

    def _projections(self, entries: Mapping[str, Any]) -> None:
        """Build the projections alone, of the sizes that the manifest tells."""
        pool: dict[str, nn.Module] = {}
        for name, entry in entries.items():
            side, _, rest = name.partition(".")
            modality, _, last = rest.partition(".")
            if last == "projection" and "sizes" in entry:
                with torch.device("meta"):
                    part = create_part(registry.projections, self.config[side][modality]["projection"])
                    if share := getattr(part, "share", None):
                        share(pool)
                    self.modules[name] = part.build(**entry["sizes"])
        self.parts.update({f"inputs.shared.{name}": dict(module.named_parameters()) for name, module in pool.items()})
        shared = {id(value) for part in self.parts.values() for value in part.values()}
        for name, module in self.modules.items():
            self.parts[name] = {key: value for key, value in module.named_parameters() if id(value) not in shared}

    def clash(self, name: str, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the first name and shape in which tensors differ from a part, None where they fit or nothing is known."""
        if name not in self.parts:
            return None
        wanted, found = (
            {(key, tuple(value.shape)) for key, value in part.items()} for part in (self.parts[name], tensors)
        )
        return " ".join(map(str, min(wanted ^ found))) if wanted != found else None

    def numbers(self, name: str) -> dict[str, list[float]]:
        """Return a few numbers of what a part's modules make of fixed inputs; none for parts that compute nothing."""
        if name == "model":
            return {tower: self._tower(tower) for tower in self.towers}
        if name.startswith(BASE):
            return self._base_model(f"./{place_of(name).parent}")
        if not probe.sizes(module := self.modules.get(name)):
            return {}
        assert module is not None
        used = {id(value) for value in module.parameters()}
        tensors = {}  # of this part, and of what it shares with others
        for other, part in self.parts.items():
            if own := {key: id(value) for key, value in part.items() if id(value) in used}:
                source = Checkpoint(self.folder / place_of(other))
                tensors.update({identity: source[key] for key, identity in own.items()})
        return probe.projection(module, tensors)

    def _tower(self, tower: str) -> list[float]:
        config, state = read_config(self.folder), Checkpoint(self.folder / place_of("model", bridge=False))
        modality = "image" if tower == "vision" else tower
        with torch.device("meta"):
            model = ImageBindModel(config, (modality,))
        tensors = {id(value): state[key] for key, value in model.state_dict(keep_vars=True).items()}
        with probe.filled(model.eval(), tensors):
            return probe.numbers(lambda: model(modality, imagebind.example(config, tower)))

    def _base_model(self, place: str) -> dict[str, list[float]]:
        """Run a model of this folder: of a language model one layer, and encoders as a bridge would open them."""
        if self.config["backbone"]["source"] == place:
            hidden = first_layer(self.folder / place, Checkpoint(self.folder / place))
            return {"first layer": probe.numbers(lambda: hidden)}
        found = {}
        for modality, way in self.config["inputs"].items():
            if place not in way["encoder"].values():
                continue
            encoder = create_part(registry.encoders, hub.localised(way["encoder"], self.folder))
            if encoder.input is not None:
                x = probe.noise(1, *encoder.input.shape)
                found[modality] = probe.numbers(lambda encoder=encoder, x=x: encoder(x))  # type: ignore[misc]
        return found


def store_checks(folder: Path, modules: Modules) -> None:
    """Compute the numbers of the self-check and put them into the manifest."""
    manifest = hub.read_json(folder / "manifest.json")
    for name, entry in {**manifest["parts"], **manifest["base"]}.items():
        if numbers := modules.numbers(name):
            entry["check"] = numbers
            if sizes := probe.sizes(modules.modules.get(name)):
                entry["sizes"] = sizes
    if modules.why:
        log.warning("no self-check of projections was stored: %s; name frozen models with --base.", modules.why)
    hub.write_json(folder / "manifest.json", manifest)


def place_of(name: str, bridge: bool = True) -> Path:
    """Return where in a folder a part lies."""
    if name.startswith(BASE):
        return Path("base", name.removeprefix(BASE), "model.safetensors")
    return Path("parts", f"{name}.safetensors") if bridge else Path(f"{name}.safetensors")
