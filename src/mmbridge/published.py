"""Published weights to folders of this library and back; ``mmbridge.verification`` checks them.

The layouts themselves are `mmbridge.conversion`'s, for each system a module with ``beside(folder)``, what files beside the
weights tell that the tensors do not, and with that ``keymap(state, **beside)`` and, for parts that are models of their own,
``base_configs(state, **beside)``. Where the result is a bridge there is ``bridge_config(state, base)``, where there is a way back
``export_map(parts, base, **beside)``, where words are compared ``compare_words(state, base)``.
"""

import importlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mmbridge import __version__, hub
from mmbridge.bridge import find_bridge
from mmbridge.conversion.files import (
    DTYPES,
    Checkpoint,
    Draft,
    Joined,
    refuse_existing,
    resumable_folder,
    shapes,
    write_tensors,
)
from mmbridge.conversion.keymap import KeyMap, Target, listed
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.registry import suggest
from mmbridge.verification import BASE, Modules, place_of, store_checks

SYSTEMS = ("imagebind", "nextgpt", "onellm")
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

    A killed run is taken up by the next one with the same arguments, a few tensors before where it was.

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
    places = state.source if state.source.is_dir() else state.source.parent
    told = module.beside(places)
    keymap: KeyMap = module.keymap(state.meta, **told)
    keymap.check(state.meta, f"{source} as {system} weights")
    own = [name for name in keymap.parts if name.startswith(BASE)]
    inside = {name.removeprefix(BASE): f"./{place_of(name).parent}" for name in own}
    config = _with_base(module, state, inside, base) if hasattr(module, "bridge_config") else None
    models = module.base_configs(state.meta, **told)
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
    plain = json.loads(json.dumps(models))
    identity = {"mmbridge": __version__, "system": system, "dtype": dtype, "files": stamps, "models": plain}
    with (
        resumable_folder(target, identity, size) as draft,
        tqdm(total=size, unit="B", unit_scale=True, desc=target.name, disable=None) as bar,
    ):
        files = {name: place_of(name, config is not None) for name in keymap.parts}
        for name, values in models.items():
            path = draft.folder / files[name].with_name("config.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            hub.write_json(path, values)
            for pattern in _TOKENIZER if "vocab_size" in values else ():
                for file in places.glob(pattern):
                    shutil.copy(file, path.with_name(file.name))
        if config is not None:
            hub.write_json(draft.folder / "config.json", config)
        modules = Modules(draft.folder, {})
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
        store_checks(draft.folder, modules)


def export(
    system: str, source: str | Path, target: str | Path, dtype: str = "keep", base: str | Path | None = None
) -> None:
    """Write a saved bridge as one file of a published layout: safetensors by its ending, else that of ``torch.save``.

    Safetensors are written a tensor at a time; for ``torch.save`` the whole file is in memory.

    Args:
        system: "nextgpt" or "onellm".
        source: The saved bridge.
        target: File to write, which must not exist.
        dtype: What floats become.
        base: The base language model, or a whole published file; None for the bridge's own, if it is on this machine.

    Raises:
        CheckpointError: A bridge that the layout can't hold, a value that is not finite, or a target that exists.
        ConfigError: A system without such a layout.
    """
    target, module, cast = Path(target), _system(system), _dtype(dtype)
    if not hasattr(module, "export_map"):
        raise ConfigError(f"there is no way back to {system}; take nextgpt or onellm.")
    refuse_existing(target)
    folder = find_bridge(source)
    config = hub.localised(hub.read_json(folder / "config.json"), folder)
    manifest = hub.read_json(folder / "manifest.json")
    parts = {name: Checkpoint(folder / place_of(name)) for name in (*manifest["parts"], *manifest.get("base", {}))}
    own = hub.find_local(config["backbone"]["source"])
    place = own if base is None else Path(base)
    words = {"base": Checkpoint(place)} if place is not None else {}
    targets = module.export_map(parts, words.get("base", {}), **(module.beside(own) if own is not None else {}))
    state = Joined({**parts, **words})
    target.parent.mkdir(parents=True, exist_ok=True)
    half = target.with_name(f".{target.name}.half")
    try:
        if target.suffix == ".safetensors":
            with tqdm(
                total=sum(value.nbytes for value in shapes(targets, state.meta, cast).values()),
                unit="B", unit_scale=True, desc=target.name, disable=None,
            ) as bar:  # fmt: skip
                write_tensors(half, targets, state, cast, bar.update)
        else:
            made = {name: how.make(*(state[source] for source in how.sources)) for name, how in targets.items()}
            floats = {name: value.to(cast) for name, value in made.items() if cast and value.is_floating_point()}
            torch.save({name: value.clone() for name, value in {**made, **floats}.items()}, half)
        half.rename(target)
    finally:
        half.unlink(missing_ok=True)


def _system(name: str) -> Any:
    if name not in SYSTEMS:
        raise ConfigError(f"there are no published weights of {name!r} to convert{suggest(name, list(SYSTEMS))}")
    return importlib.import_module(f"mmbridge.conversion.{name}")


def _dtype(name: str) -> torch.dtype | None:
    if name not in DTYPES:
        raise ConfigError(f"floats can't become {name!r}{suggest(name, list(DTYPES))}")
    return DTYPES[name]


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
    digest = draft.add(
        place.as_posix(),
        lambda file, begun, record: write_tensors(file, tensors, state, dtype, bar.update, begun, record),
    )
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
            digest = hub.weights_sha256(model) if name == "backbone" else base[BASE + model.name]["sha256"]
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
