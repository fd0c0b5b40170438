"""Published weights to folders of this library and back, and folders that were converted checked.

The layouts themselves are `mmbridge.conversion`'s: for each system a module with ``keymap(state)`` and, where the result is a
bridge, ``bridge_config(state, base)``; optionally ``base_configs(state)`` for parts that are models of their own,
``compare_words(state, base)``, and ``export(parts)`` or ``export(parts, base)``.
"""

import importlib
import inspect
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from mmbridge import __version__, hub, media, registry
from mmbridge.bridge import Bridge, create_part, find_bridge
from mmbridge.conversion import imagebind, probe
from mmbridge.conversion.files import (
    DTYPES,
    Checkpoint,
    Draft,
    refuse_existing,
    resumable_folder,
    shapes,
    write_tensors,
)
from mmbridge.conversion.keymap import KeyMap, Target, listed
from mmbridge.encoders.imagebind import ImageBindModel, read_config
from mmbridge.errors import CheckpointError, ConfigError, MMBridgeError
from mmbridge.registry import suggest
from mmbridge.specs import (
    AudioInput,
    DisparityInput,
    FmriInput,
    ImageInput,
    ImuInput,
    MapInput,
    PointsInput,
    VideoInput,
)

log = logging.getLogger("mmbridge")

SYSTEMS = ("imagebind", "nextgpt", "onellm")
_BASE = "base."  # parts that are models of their own
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "vocab*",
    "merges.txt",
)


def convert(
    system: str,
    source: str | Path,
    target: str | Path,
    dtype: str = "keep",
    base: str | Path | None = None,
    report: str | Path | None = None,
) -> None:
    """Write published weights as a folder of this library, one tensor in memory at a time.

    A killed run is taken up by the next one with the same arguments: parts that are whole are kept.

    Args:
        system: One of ``SYSTEMS``.
        source: File, or folder of shards.
        target: Folder to write, which must not exist: a saved bridge, or for ImageBind what ``ImageBind`` opens.
        dtype: One of ``conversion.files.DTYPES``: what floats become.
        base: Folder with frozen models, in subfolders named as their hub ids, or as the last part of these; those that are not
            there keep the hub's name.
        report: File to write, as JSON, which published tensor went where.

    Raises:
        CheckpointError: A source that is damaged or of another layout, or a target that exists.
        ConfigError: An unknown system or dtype.
    """
    target = Path(target)
    module, cast = _system(system), _dtype(dtype)
    refuse_existing(target)
    state = Checkpoint(source)
    keymap: KeyMap = module.keymap(state.meta)
    keymap.check(state.meta, f"{source} as {system} weights")
    own = [name for name in keymap.parts if name.startswith(_BASE)]
    inside = {name.removeprefix(_BASE): f"./{_place(name).parent}" for name in own}
    config = _with_base(module, state, inside, base) if hasattr(module, "bridge_config") else None
    places = state.source if state.source.is_dir() else state.source.parent
    if module is imagebind:
        models = imagebind.base_configs(state.meta, places)
    else:
        models = module.base_configs(state.meta) if hasattr(module, "base_configs") else {}
    facts = keymap.report()
    if config is not None and hasattr(module, "compare_words") and base is not None:
        found = hub.find_local(config["backbone"]["source"])
        if found is not None and config["backbone"]["source"] not in inside.values():
            facts["words"] = module.compare_words(state, Checkpoint(found))
            state.release()
    if report is not None:
        hub.write_json(Path(report), facts)
    planned = {name: shapes(tensors, state.meta, cast) for name, tensors in keymap.parts.items()}
    size = sum(value.nbytes for tensors in planned.values() for value in tensors.values())
    stamps = {str(file.resolve()): [file.stat().st_size, file.stat().st_mtime_ns] for file in state.files}
    identity = {"mmbridge": __version__, "system": system, "dtype": dtype, "files": stamps}
    with (
        resumable_folder(target, identity, size) as draft,
        tqdm(total=size, unit="B", unit_scale=True, desc=target.name, disable=None) as bar,
    ):
        files = {name: _place(name, config is not None) for name in keymap.parts}
        for name, values in models.items():
            path = draft.folder / files[name].with_name("config.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.write_json(path, values)
            for pattern in _TOKENIZER if "vocab_size" in values else ():
                for file in places.glob(pattern):
                    shutil.copy(file, path.with_name(file.name))
        if config is not None:
            hub.write_json(draft.folder / "config.json", config)
        modules = _Modules(draft.folder, {})
        for name, values in planned.items():
            if (clash := modules.clash(name, values)) is not None:
                raise CheckpointError(
                    f"{name} does not fit the frozen models named in the configuration, first at {clash}; give those that the "
                    "weights were trained with, by --base."
                )
        entries = {
            name: _write(draft, files[name], tensors, state, cast, bar) for name, tensors in keymap.parts.items()
        }
        state.release()
        origin = {
            "system": system,
            "licence": hub.licence_line(system),
            "files": {file.name: hub.file_sha256(file) for file in state.files},
            "dtype": dtype,
            "unused": keymap.unused,
        }
        more: dict[str, Any] = {"base": {name: entries.pop(name) for name in own}, "converted": origin}
        if config is None:
            manifest = {"format": 1, "mmbridge": __version__, "parts": entries, "frozen": {}, **more}
            hub.write_json(draft.folder / "manifest.json", manifest)
            card = f"Converted from {system}. {origin['licence']}.\n"
            (draft.folder / "README.md").write_text(card, encoding="utf-8")
        else:
            frozen = _frozen(config, draft.folder, more["base"])
            hub.write_facts(draft.folder, config, entries, frozen, lineage=[], **more)
        _store_checks(draft.folder, modules)


def export(
    system: str, source: str | Path, target: str | Path, dtype: str = "keep", base: str | Path | None = None
) -> None:
    """Write a saved bridge as one file of a published layout: safetensors by its ending, else that of ``torch.save``.

    Args:
        system: "nextgpt" or "onellm".
        source: The saved bridge.
        target: File to write, which must not exist.
        dtype: What floats become.
        base: The base language model, or a whole published file; None for the bridge's own, if it is on this machine.

    Raises:
        CheckpointError: A bridge that the layout can't hold, or a target that exists.
        ConfigError: A system without such a layout.
    """
    target, module, cast = Path(target), _system(system), _dtype(dtype)
    if not hasattr(module, "export"):
        raise ConfigError(f"there is no way back to {system}; take nextgpt or onellm.")
    refuse_existing(target)
    folder = find_bridge(source)
    config = hub.localised(hub.read_json(folder / "config.json"), folder)
    manifest = hub.read_json(folder / "manifest.json")
    parts = {name: Checkpoint(folder / _place(name)) for name in (*manifest["parts"], *manifest.get("base", {}))}
    words: tuple[Mapping[str, Tensor], ...] = ()
    if "base" in inspect.signature(module.export).parameters:
        place = base if base is not None else hub.find_local(config["backbone"]["source"])
        words = (Checkpoint(place) if place is not None else {},)
    state = {
        name: (tensor.to(cast) if cast and tensor.is_floating_point() else tensor).contiguous()
        for name, tensor in module.export(parts, *words).items()
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.half")
    try:
        if target.suffix == ".safetensors":
            save_file(state, half, {"format": "pt"})
        else:
            torch.save({name: tensor.clone() for name, tensor in state.items()}, half)
        half.rename(target)
    finally:
        half.unlink(missing_ok=True)


@dataclass(frozen=True)
class Finding:
    """What was found of one part: ``whole`` is None where it could not be looked at."""

    part: str
    whole: bool | None
    text: str


def verify(source: str | Path) -> Iterator[Finding]:
    """Check a converted folder or a saved bridge, part by part.

    Hash and finiteness of every part; names and shapes against the module that it belongs to; and, where numbers were stored
    when it was converted, what the module makes of a fixed input, within ``conversion.probe.TOLERANCE`` of the largest.
    Frozen models that are not in the folder are reported as unchecked.

    Raises:
        CheckpointError: No manifest there.
    """
    folder = find_bridge(source)
    manifest = hub.read_json(folder / "manifest.json")
    bridge = "converted" not in manifest or hasattr(_system(manifest["converted"]["system"]), "bridge_config")
    modules = _Modules(folder, manifest)
    for name, entry in {**manifest["parts"], **manifest.get("base", {})}.items():
        try:
            yield Finding(name, True, _verify_part(folder / _place(name, bridge), name, entry, modules))
        except MMBridgeError as error:
            yield Finding(name, False, str(error))
    for name, entry in manifest["frozen"].items():
        origin = entry.get("source") or entry.get("weights") or "random weights"
        if str(origin).startswith("./"):
            continue
        there = origin != "random weights" and hub.find_local(origin) is not None
        state = "compared when the bridge is opened" if there else "not on this machine"
        yield Finding(name, None, f"unchecked: {origin}, {state}")


def _verify_part(file: Path, name: str, entry: Mapping[str, Any], modules: "_Modules") -> str:
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
                "something else than when it was converted; use the versions of then, or report it"
            )
        done.append(f"self-check of {key}")
    why = f"; shapes unchecked: {modules.why}" if modules.why and name not in modules.parts else ""
    return f"{entry['parameters']:,} parameters: {', '.join(done)}{why}"


class _Modules:
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
        self.modules = {
            f"{side}.{modality}.{name}": part
            for side, ways in (("inputs", bridge.inputs), ("outputs", bridge.outputs))
            for modality, way in ways.items()
            for name, part in way.trainable().items()
        }
        if self.config["backbone"]["source"].startswith("./base/") and not bridge.backbone.adapters:
            name = _BASE + self.config["backbone"]["source"].rpartition("/")[2]
            self.parts[name] = bridge.backbone.model.state_dict()

    def _projections(self, entries: Mapping[str, Any]) -> None:
        """Build the projections alone, of the sizes that the manifest tells."""
        for name, entry in entries.items():
            side, _, rest = name.partition(".")
            modality, _, last = rest.partition(".")
            if last == "projection" and "sizes" in entry:
                with torch.device("meta"):
                    part = create_part(registry.projections, self.config[side][modality]["projection"])
                    self.modules[name] = part.build(**entry["sizes"])
                self.parts[name] = dict(part.named_parameters())

    def clash(self, name: str, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the first name and shape in which tensors differ from a part, None where they fit or nothing is known."""
        if name not in self.parts:
            return None
        wanted, found = (
            {(key, tuple(value.shape)) for key, value in part.items()} for part in (self.parts[name], tensors)
        )
        return " ".join(map(str, min(wanted ^ found))) if wanted != found else None

    def sizes(self, name: str) -> dict[str, int] | None:
        """Return the widths of a projection."""
        part = self.modules.get(name)
        known = {key: getattr(part, key, None) for key in ("dim_in", "dim_out", "num_queries")}
        return {key: size for key, size in known.items() if size is not None} or None

    def numbers(self, name: str) -> dict[str, list[float]]:
        """Return a few numbers of what a part's modules make of fixed inputs; none for parts that compute nothing."""
        if name == "model":
            return {tower: self._tower(tower) for tower in self.towers}
        if name.startswith(_BASE):
            return self._encoders(f"./{_place(name).parent}")
        if (sizes := self.sizes(name)) is None:
            return {}
        module = self.modules[name].eval()
        used = {id(value) for value in module.parameters()}
        tensors = {}  # of this part, and of what it shares with others
        for other, part in self.parts.items():
            if own := {key: id(value) for key, value in part.items() if id(value) in used}:
                source = Checkpoint(self.folder / _place(other))
                tensors.update({identity: source[key] for key, identity in own.items()})
        with probe.filled(module, tensors):
            return {"projection": probe.numbers(lambda: module(probe.noise(1, 8, sizes["dim_in"])))}

    def _tower(self, tower: str) -> list[float]:
        config, state = read_config(self.folder), Checkpoint(self.folder / _place("model", bridge=False))
        modality = "image" if tower == "vision" else tower
        with torch.device("meta"):
            model = ImageBindModel(config, (modality,))
        tensors = {id(value): state[key] for key, value in model.state_dict(keep_vars=True).items()}
        with probe.filled(model.eval(), tensors):
            return probe.numbers(lambda: model(modality, imagebind.example(config, tower)))

    def _encoders(self, place: str) -> dict[str, list[float]]:
        """Run the encoders that read a part of this folder, as a bridge would open them."""
        found = {}
        for modality, way in self.config["inputs"].items():
            if place not in way["encoder"].values():
                continue
            encoder = create_part(registry.encoders, hub.localised(way["encoder"], self.folder))
            medium = _medium(encoder.input)
            if medium is not None:
                x = probe.noise(1, *encoder.prepare(medium).shape)
                found[modality] = probe.numbers(lambda encoder=encoder, x=x: encoder(x))  # type: ignore[misc]
        return found


def _medium(spec: Any) -> Any:
    """Return any medium that a spec takes, None where files are not taken."""
    picture = torch.zeros(3, 32, 32, dtype=torch.uint8)
    match spec:
        case ImageInput():
            return media.Image(picture)
        case VideoInput():
            return media.Video(picture.expand(8, -1, -1, -1), 4.0)
        case AudioInput():
            return media.Audio(0.1 * probe.noise(spec.sample_rate), spec.sample_rate)
        case MapInput() | DisparityInput():
            return media.Depth(torch.ones(32, 32), media.Image(picture))
        case PointsInput():
            return media.PointCloud(probe.noise(spec.points, 6).sigmoid())
        case ImuInput():
            return media.Imu(probe.noise(6, spec.steps), spec.sample_rate)
        case FmriInput():
            return media.Fmri(probe.noise(spec.voxels))
    return None


def _store_checks(folder: Path, modules: _Modules) -> None:
    """Compute the numbers of the self-check and put them into the manifest."""
    manifest = hub.read_json(folder / "manifest.json")
    for name, entry in {**manifest["parts"], **manifest["base"]}.items():
        if numbers := modules.numbers(name):
            entry["check"] = numbers
            if sizes := modules.sizes(name):
                entry["sizes"] = sizes
    if modules.why:
        log.warning("no self-check of projections was stored: %s; name frozen models with --base.", modules.why)
    hub.write_json(folder / "manifest.json", manifest)


def _system(name: str) -> Any:
    if name not in SYSTEMS:
        raise ConfigError(f"there are no published weights of {name!r} to convert{suggest(name, list(SYSTEMS))}")
    return importlib.import_module(f"mmbridge.conversion.{name}")


def _dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise ConfigError(f"floats can't become {name!r}{suggest(name, list(DTYPES))}")
    return DTYPES[name]


def _place(name: str, bridge: bool = True) -> Path:
    """Return where in a folder a part lies."""
    if name.startswith(_BASE):
        return Path("base", name.removeprefix(_BASE), "model.safetensors")
    return Path("parts", f"{name}.safetensors") if bridge else Path(f"{name}.safetensors")


def _write(
    draft: Draft,
    place: Path,
    tensors: Mapping[str, Target],
    state: Checkpoint,
    dtype: torch.dtype | None,
    bar: Any,
) -> dict[str, Any]:
    """Write a part, or keep the one that an earlier run finished; returns its entry in the manifest."""
    planned, before = shapes(tensors, state.meta, dtype), bar.n
    digest = draft.add(place.as_posix(), lambda file: write_tensors(file, tensors, state, dtype, bar.update))
    bar.update(before + sum(value.nbytes for value in planned.values()) - bar.n)  # what was there already
    return {"sha256": digest, "parameters": sum(value.numel() for value in planned.values())}


def _origins(config: Mapping[str, Any]) -> dict[str, str]:
    """Return where the frozen parts of a bridge come from, by their names in a manifest."""
    found = {"backbone": config["backbone"].get("source")}
    for side, kind in (("inputs", "encoder"), ("outputs", "decoder")):
        for modality, way in (config.get(side) or {}).items():
            part = way.get(kind) or {}
            found[f"{side}.{modality}.{kind}"] = part.get("weights") or part.get("source") or part.get("model")
    return {name: str(origin) for name, origin in found.items() if origin}


def _frozen(config: Mapping[str, Any], folder: Path, base: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the manifest entries of the frozen parts; hashes are known of those in the folder, since no publisher tells them."""
    entries = {}
    for name, origin in _origins(config).items():
        digest, licence = None, hub.licence_line(origin)
        if origin.startswith("./"):
            model = folder / origin
            digest = hub.weights_sha256(model) if name == "backbone" else base[_BASE + model.name]["sha256"]
        elif licence is None and Path(origin).is_dir():
            licence = hub.licence_of(Path(origin))
        entries[name] = {"weights": origin, "sha256": digest, "licence": licence or "unknown", "revision": None}
    return entries


def _with_base(module: Any, state: Checkpoint, inside: Mapping[str, str], base: str | Path | None) -> dict[str, Any]:
    """Return the bridge's configuration, with the frozen models that lie in ``inside`` and below ``base``."""
    config: dict[str, Any] = module.bridge_config(state.meta, dict(inside) or None)
    if base is None:
        return config
    found = {}
    for name, origin in _origins(config).items():
        for candidate in (origin, origin.replace("/", "--"), origin.rpartition("/")[2]):
            if origin[0] not in "./" and (Path(base) / candidate).exists():
                found[name] = str((Path(base) / candidate).resolve())
                break
    if not found:
        raise CheckpointError(
            f"{base} holds none of the frozen models: {listed(sorted(set(_origins(config).values())))}; it should have "
            "subfolders of these names, or of their last parts."
        )
    return dict(module.bridge_config(state.meta, {**found, **inside}))
