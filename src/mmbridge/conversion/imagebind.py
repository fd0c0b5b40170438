"""Published ImageBind tensors (imagebind_huge.pth and files of its layout) to ``mmbridge.encoders.ImageBind``.

Sizes are read from the tensors. What leaves no trace in their shapes keeps its published number unless it is given:
attention heads, and how a sound is laid out (stride, mel bins, frames).
"""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge import hub
from mmbridge.conversion.keymap import KeyMap, Target, listed
from mmbridge.conversion.probe import noise
from mmbridge.encoders.base import load_strict
from mmbridge.encoders.imagebind import ImageBind, ImageBindModel, find_tower, read_config
from mmbridge.encoders.imagebind_modules import TOWER_CONFIGS, ImageBindConfig
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.registry import suggest


def encoder(
    state: Mapping[str, Tensor], modality: str, tokens: str = "patch", clips: str = "mean", **sizes: Any
) -> ImageBind:
    """Build the encoder of one modality from the tensors of a checkpoint; those of other towers are left alone.

    Args:
        state: Tensors by their published names.
        modality: "image", "video", "audio", "text", "depth", "thermal" or "imu".
        tokens: As in ``ImageBind``; "pooled" for text.
        clips: As in ``ImageBind``.
        sizes: Fields of the tower's configuration, such as ``heads``, that can't be read or shall differ.

    Raises:
        ConfigError: Unknown modality or size, or a width whose number of heads is not known.
        CheckpointError: Missing, unexpected or wrongly shaped tensors, listed.
    """
    tower = find_tower(ImageBindConfig.huge(), modality)
    kind = TOWER_CONFIGS[tower]
    known = [field.name for field in fields(kind)]
    for name in sizes:
        if name not in known:
            raise ConfigError(f"ImageBind's {tower} tower has no size {name!r}{suggest(name, known)}")
    found, embed_dim = _read_sizes(state, tower)
    if found["dim"] != kind.dim and "heads" not in sizes:
        raise ConfigError(
            f"the number of attention heads can't be read from weights; this {tower} tower is {found['dim']} wide "
            f"instead of the published {kind.dim}, so pass heads=."
        )
    config = ImageBindConfig(embed_dim, **{tower: kind(**{**found, **sizes})})
    converted = ImageBind(modality, tokens=tokens, clips=clips, config=config)
    own = {name: tensor for name, tensor in state.items() if name.split(".")[1:2] == [tower]}
    load_strict(converted.model, own, f"the tensors of ImageBind's {tower} tower")
    converted.freeze()
    return converted


def beside(folder: Path) -> dict[str, Any]:
    """Return as arguments of ``keymap`` and ``base_configs`` what a ``config.json`` of this library beside the weights tells."""
    file = folder / "config.json"
    ours = file.is_file() and TOWER_CONFIGS.keys() & hub.read_json(file).keys()
    return {"config": read_config(folder)} if ours else {}


def keymap(state: Mapping[str, Tensor], config: ImageBindConfig | None = None) -> KeyMap:
    """Map a whole checkpoint, whose names are kept: one part, ``model``, which ``encoders.ImageBind`` opens.

    Args:
        state: Tensors by their published names, on any device; only names and shapes are read.
        config: As for ``base_configs``; names do not depend on it.

    Raises:
        CheckpointError: No towers of ImageBind, or a tower that lacks a tensor or has one too many.
    """
    towers = _towers(state)
    if not towers:
        raise CheckpointError(
            f"this is no ImageBind checkpoint; its tensors are {listed(sorted(state))}. Give a file such as imagebind_huge.pth."
        )
    depths = {tower: _read_sizes(state, tower)[0]["depth"] for tower in towers}
    sizes = ImageBindConfig(**{tower: TOWER_CONFIGS[tower](depth=depth) for tower, depth in depths.items()})
    with torch.device("meta"):
        wanted = ImageBindModel(sizes).state_dict()
    return KeyMap({"model": {name: Target((name,)) for name in wanted}})


def base_configs(state: Mapping[str, Tensor], config: ImageBindConfig | None = None) -> dict[str, dict[str, Any]]:
    """Return the ``config.json`` of the part ``model``: sizes read from the tensors.

    Args:
        state: Tensors by their published names, on any device; only names and shapes are read.
        config: What leaves no trace in them (attention heads, how a sound is laid out); None takes the published numbers.

    Raises:
        ConfigError: Another width than the configuration's, whose heads are then not known.
        CheckpointError: A tensor of the wrong shape.
    """
    given = config or ImageBindConfig.huge()
    towers: dict[str, Any] = {}
    embed_dim = given.embed_dim
    for tower in _towers(state):
        found, embed_dim = _read_sizes(state, tower)
        told = getattr(given, tower) or TOWER_CONFIGS[tower]()
        if found["dim"] != told.dim:
            raise ConfigError(
                f"the number of attention heads can't be read from weights; this {tower} tower is {found['dim']} wide instead "
                f"of {told.dim}, so put a config.json that has its sizes beside the weights."
            )
        towers[tower] = replace(told, **found)
    sizes = ImageBindConfig(embed_dim, **towers)
    with torch.device("meta"):
        wanted = {name: tuple(value.shape) for name, value in ImageBindModel(sizes).state_dict().items()}
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {shape}"
        for name, shape in wanted.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if wrong:
        raise CheckpointError(f"ImageBind checkpoint has {len(wrong)} tensors of the wrong shape: {listed(wrong)}.")
    return {"model": sizes.to_dict()}


def _towers(state: Mapping[str, Tensor]) -> list[str]:
    """Return the towers of which there is anything."""
    return [tower for tower in TOWER_CONFIGS if any(name.split(".")[1:2] == [tower] for name in state)]


def example(config: ImageBindConfig, tower: str) -> Tensor:
    """Return a fixed input (1, ...) of a tower, for the numeric self-check."""
    sizes = getattr(config, tower)
    if tower == "text":
        ids = torch.zeros(1, sizes.context, dtype=torch.long)
        middle = torch.arange(1, 1 + min(8, sizes.context - 2))
        ids[0, 0], ids[0, middle], ids[0, len(middle) + 1] = sizes.sot, middle, sizes.eot
        return ids
    if tower == "imu":
        return noise(1, sizes.channels, sizes.steps)
    if tower == "audio":
        return noise(1, 1, sizes.mel_bins, sizes.frames)
    return noise(1, 3 if tower == "vision" else 1, sizes.image_size, sizes.image_size)


def _read_sizes(state: Mapping[str, Tensor], tower: str) -> tuple[dict[str, int], int]:
    def shape(group: str, name: str) -> tuple[int, ...]:
        key = f"modality_{group}.{tower}.{name}"
        if key not in state:
            raise CheckpointError(
                f"these weights lack {key}, so they hold no whole ImageBind {tower} tower; give the tensors of a file "
                "such as imagebind_huge.pth under their own names."
            )
        return tuple(state[key].shape)

    last = {"text": "proj.1.weight", "imu": "3.weight"}.get(tower, "2.weight")
    embed_dim, dim = shape("heads", last)
    numbers = [re.match(rf"modality_trunks\.{tower}\.blocks\.(\d+)\.", name) for name in state]
    found = {"dim": dim, "depth": 1 + max((int(number[1]) for number in numbers if number), default=-1)}
    if tower == "text":
        found["context"] = shape("preprocessors", "pos_embed")[1]
        found["vocabulary"] = shape("preprocessors", "token_embedding.weight")[0]
    elif tower == "imu":
        channels = TOWER_CONFIGS["imu"].channels
        found["kernel"] = shape("preprocessors", "imu_stem.proj.weight")[1] // channels
        found["steps"] = found["kernel"] * (shape("preprocessors", "pos_embed")[1] - 1)
    else:
        stem = "depth_stem" if tower == "depth" else "rgbt_stem"
        kernel = shape("preprocessors", f"{stem}.proj.1.weight" if tower == "vision" else f"{stem}.proj.weight")
        found["patch"] = kernel[-1]
        if tower == "vision":
            found["frames"] = kernel[2]
        if tower != "audio":
            patches = shape("preprocessors", "pos_embedding_helper.pos_embed")[1] - 1
            found["image_size"] = kernel[-1] * round(patches**0.5)
    return found, embed_dim
