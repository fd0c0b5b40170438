"""Published ImageBind tensors (imagebind_huge.pth and files of its layout) to ``mmbridge.encoders.ImageBind``.

Sizes are read from the tensors. What leaves no trace in their shapes keeps its published number unless it is given:
attention heads, and how a sound is laid out (stride, mel bins, frames).
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor

from mmbridge.encoders.base import load_strict
from mmbridge.encoders.imagebind import ImageBind, find_tower
from mmbridge.encoders.imagebind_modules import TOWER_CONFIGS, ImageBindConfig
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.registry import suggest


def encoder(
    state: Mapping[str, Tensor], modality: str, tokens: str = "patch", clips: str = "mean", **sizes: Any
) -> ImageBind:
    """Build the encoder of one modality from the tensors of a checkpoint; those of other towers are left alone.

    Args:
        state: Tensors by their published names.
        modality: "image", "video", "audio", "depth", "thermal" or "imu".
        tokens: As in ``ImageBind``.
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
