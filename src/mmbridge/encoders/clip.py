"""A plain CLIP picture transformer, of transformers or open_clip, as the universal encoder's transformer and image tokenizer.

Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020. The text
tower and the last projection are left out. What the tensors compute here is compared, once at load, with what the library that
wrote them computes: attention layouts and activations have changed without an error.
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmbridge import hub
from mmbridge.encoders.base import load_strict
from mmbridge.encoders.tokenizers import ImageSizes, PatchTokenizer
from mmbridge.encoders.universal import TOKENIZERS, Transformer, UniversalConfig
from mmbridge.errors import CheckpointError

OPEN_CLIP, TRANSFORMERS = "open_clip", "transformers"

_FILES = {
    OPEN_CLIP: ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
    TRANSFORMERS: ("model.safetensors", "pytorch_model.bin"),
}
_BLOCK = {
    "attention.in_proj_weight": "attn.in_proj_weight",
    "attention.in_proj_bias": "attn.in_proj_bias",
    **{
        f"{ours}.{name}": f"{theirs}.{name}"
        for ours, theirs in {
            "norm_attention": "ln_1", "attention.out_proj": "attn.out_proj", "norm_mlp": "ln_2", "mlp.fc1": "mlp.c_fc",
            "mlp.fc2": "mlp.c_proj",
        }.items()
        for name in ("weight", "bias")
    },
}  # fmt: skip
_RENAMED = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "pre_layernorm": "ln_pre",
    "post_layernorm": "ln_post",
    "encoder.layers.": "transformer.resblocks.",
    "self_attn.": "attn.",
    "layer_norm": "ln_",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Names of transformers, as open_clip calls the same."""

_OTHERS = tuple(kind for kind in dict.fromkeys(TOKENIZERS.values()) if kind != "image")
_CHECK_TOLERANCE = 1e-3  # of the largest number
_checked: set[tuple[object, ...]] = set()


def open_clip_names(depth: int) -> dict[str, str]:
    """Return by our names what open_clip, and OneLLM with it, calls the tensors of transformer and image tokenizer."""
    names = {
        "transformer.class_embedding": "class_embedding",
        "tokenizers.image.projection.weight": "conv1.weight",
        "tokenizers.image.positions": "positional_embedding",
    }
    for ours, theirs in (("norm_in", "ln_pre"), ("norm_out", "ln_post")):
        names |= {f"transformer.{ours}.{name}": f"{theirs}.{name}" for name in ("weight", "bias")}
    for block in range(depth):
        for ours, theirs in _BLOCK.items():
            names[f"transformer.blocks.{block}.{ours}"] = f"transformer.resblocks.{block}.{theirs}"
    return names


def find_kind(folder: Path) -> str | None:
    """Return whose CLIP a folder holds, "open_clip" or "transformers"; None for a universal encoder's own.

    Raises:
        CheckpointError: The folder holds a model of transformers that is no CLIP.
    """
    if (folder / "open_clip_config.json").is_file():
        return OPEN_CLIP
    found = hub.read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind not in (None, "clip", "clip_vision_model"):
        raise CheckpointError(
            f"{folder} holds a {kind!r}, but the universal encoder reads CLIP (clip, clip_vision_model), open_clip's, or weights "
            "of its own; name another folder or hub id."
        )
    return TRANSFORMERS if kind else None


def weights_file(folder: Path) -> Path:
    """Return the file of a plain CLIP's weights.

    Raises:
        CheckpointError: There is none.
    """
    names = _FILES[find_kind(folder) or TRANSFORMERS]
    found = next((folder / name for name in names if (folder / name).is_file()), None)
    if found is None:
        raise CheckpointError(
            f"{folder} has a CLIP's configuration but neither {' nor '.join(names)}; add the weights."
        )
    return found


def sizes_of(folder: Path, config: dict[str, Any] | None = None) -> UniversalConfig:
    """Return the sizes of a plain CLIP, with those of the other tokenizers beside them.

    Args:
        folder: Folder with ``open_clip_config.json``, or transformers' ``config.json``; weights are not read.
        config: Keys of ``UniversalConfig`` that differ, and the only other tokenizers there are; None gives them all, of
            OneLLM's published sizes.

    Raises:
        CheckpointError: The configuration is that of another kind of model.
        ConfigError: An unknown key or activation.
    """
    own, _ = _configure(folder)
    if config is None:
        published = UniversalConfig.published()
        return replace(published, **{field: value for field, value in vars(own).items() if field not in _OTHERS})
    values = own.to_dict()
    image = config.get("image", {})
    if isinstance(image, dict):
        image = {**values["image"], **image}
    return UniversalConfig.from_dict({**values, **config, "image": image})


def read_clip(folder: Path, config: UniversalConfig | None = None) -> tuple[UniversalConfig, dict[str, Tensor]]:
    """Read a plain CLIP, and compare what it computes here with what its own library computes, once in a process.

    All tokens after the last norm of a picture of noise must be equal to 1e-3 of the largest.

    Args:
        folder: A folder of transformers (``model.safetensors`` or ``pytorch_model.bin``) or of open_clip
            (``open_clip_model.safetensors`` or ``open_clip_pytorch_model.bin``).
        config: The sizes to run it with; None for those in the folder. Positions stay those of the trained size.

    Returns:
        The sizes that it was trained with, and its tensors by the universal encoder's names, ``transformer.*`` and
        ``tokenizers.image.*``.

    Raises:
        CheckpointError: Not such a folder, tensors that do not fit, or other tokens than the library gives.
    """
    trained, library = _configure(folder)
    file = weights_file(folder)
    state, status = _visual(_load(file)), file.stat()
    no_others: dict[str, Any] = dict.fromkeys(_OTHERS)
    sizes = replace(config or trained, image=trained.image, others={}, **no_others)
    key = (file.resolve(), status.st_mtime_ns, status.st_size, sizes)
    if new := key not in _checked:
        state = {name: tensor.float() for name, tensor in state.items()}
    tensors = {ours: state[theirs] for ours, theirs in open_clip_names(trained.depth).items() if theirs in state}
    if new:
        _check(sizes, tensors, library, state, f"CLIP weights {file}")
        _checked.add(key)
    return trained, tensors


def _configure(folder: Path) -> tuple[UniversalConfig, Any]:
    """Return the sizes in a folder, and the library's own configuration."""
    kind = find_kind(folder)
    if kind is None:
        raise CheckpointError(
            f"{folder} holds no CLIP: neither open_clip_config.json, nor a config.json of transformers with model_type clip or "
            "clip_vision_model; name another folder."
        )
    try:
        library, values, facts = (_of_open_clip if kind == OPEN_CLIP else _of_transformers)(folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} has a configuration that is no CLIP's ({error}); restore it.") from error
    side, patch = values.pop("image_size"), values.pop("patch")
    if not isinstance(side, int) or not isinstance(patch, int) or side % patch:
        raise CheckpointError(
            f"{folder} has pictures of {side} in patches of {patch}, but the universal encoder reads squares; name another."
        )
    usual = ImageSizes(patch, side)
    image = replace(usual, mean=tuple(facts.get("mean") or usual.mean), std=tuple(facts.get("std") or usual.std))
    return UniversalConfig(**values, image=image), library


def _of_open_clip(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    import open_clip

    found = hub.read_json(folder / "open_clip_config.json")
    library = found["model_cfg"]
    tower = open_clip.CLIPVisionCfg(**library["vision_cfg"])
    if tower.timm_model_name or not isinstance(tower.layers, int):
        raise ValueError("its picture tower is no vision transformer of open_clip's own")
    values = {
        "dim": tower.width,
        "depth": tower.layers,
        "heads": tower.width // tower.head_width,
        "dim_feedforward": int(tower.width * tower.mlp_ratio),
        "activation": "quick_gelu" if library.get("quick_gelu") else "gelu",
        "image_size": tower.image_size,
        "patch": tower.patch_size,
    }
    return library, values, found.get("preprocess_cfg", {})


def _of_transformers(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from transformers import CLIPVisionConfig

    found = hub.read_json(folder / "config.json")
    own = found.get("vision_config", {}) if found["model_type"] == "clip" else found
    library = CLIPVisionConfig(**{name: value for name, value in own.items() if name != "model_type"})
    values = {
        "dim": library.hidden_size,
        "depth": library.num_hidden_layers,
        "heads": library.num_attention_heads,
        "dim_feedforward": library.intermediate_size,
        "activation": library.hidden_act,
        "image_size": library.image_size,
        "patch": library.patch_size,
    }
    beside = folder / "preprocessor_config.json"
    facts = hub.read_json(beside) if beside.is_file() else {}
    return library, values, {"mean": facts.get("image_mean"), "std": facts.get("image_std")}


def _load(file: Path) -> Mapping[str, Tensor]:
    """Return all tensors of a file, mapped into memory."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as stream:
                return {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, SafetensorError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{file} can't be read as weights ({str(error).splitlines()[0]:.160}); replace it."
        ) from error


def _visual(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the picture tower by open_clip's names, with queries, keys and values in one."""
    prefix = next((one for one in ("visual.", "vision_model.") if any(name.startswith(one) for name in state)), "")
    found = {
        _renamed(name.removeprefix(prefix)): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and not name.endswith("position_ids")
    }
    for name in [name for name in found if ".q_proj." in name]:
        parts = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
        if found.keys() >= set(parts):
            found[name.replace(".q_proj.", ".in_proj_")] = torch.cat([found.pop(part) for part in parts])
    return found


def _renamed(name: str) -> str:
    for theirs, ours in _RENAMED.items():
        name = name.replace(theirs, ours)
    return name


@torch.no_grad()
def _check(
    sizes: UniversalConfig, tensors: dict[str, Tensor], library: Any, state: dict[str, Tensor], what: str
) -> None:
    """Compare tokens of a picture of noise; modules are empty, and tensors theirs and ours at once."""
    image = sizes.image
    assert image is not None
    with torch.device("meta"):
        tokenizer, transformer = PatchTokenizer(image, sizes.dim), Transformer(sizes)
    for prefix, module in (("tokenizers.image.", tokenizer), ("transformer.", transformer)):
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        load_strict(module, own, f"{what}, as {prefix}*,")
    x = torch.randn(1, 3, *(image.image_size,) * 2, generator=torch.Generator().manual_seed(0), device="cpu")
    wanted = (_by_open_clip if isinstance(library, dict) else _by_transformers)(library, state, x, what)
    found = transformer(tokenizer(x, transformer.class_embedding))
    difference = float((found - wanted).abs().max() / wanted.abs().max())
    if not difference <= _CHECK_TOLERANCE:
        raise CheckpointError(
            f"{what} compute other tokens here, with heads={sizes.heads} and activation={sizes.activation!r}, than in their own "
            f"library: off by {difference:.2g} of the largest, where {_CHECK_TOLERANCE} is accepted; leave heads and activation "
            "out of the config, or install another version of that library."
        )


def _by_open_clip(library: dict[str, Any], state: dict[str, Tensor], x: Tensor, what: str) -> Tensor:
    import open_clip

    with torch.device("meta"):
        text = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
        tower = open_clip.CLIP(**{**library, "text_cfg": text}).visual
    load_strict(tower, state, f"{what}, in open_clip,")
    output = tower.eval().forward_intermediates(
        x, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    return torch.cat([output["image_intermediates_prefix"][-1], output["image_intermediates"][-1]], dim=1)


def _by_transformers(library: Any, state: dict[str, Tensor], x: Tensor, what: str) -> Tensor:
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        whole = CLIPVisionModel(library).eval()
    tower = getattr(whole, "vision_model", whole)  # older versions have it inside
    left, theirs = dict(state), {}
    for name in tower.state_dict():
        letter = re.search(r"\.([qkv])_proj\.", name)
        renamed = re.sub(r"\.[qkv]_proj\.", ".in_proj_", _renamed(name))
        if renamed in state:
            left.pop(renamed, None)
            theirs[name] = state[renamed].chunk(3)["qkv".index(letter[1])] if letter else state[renamed]
    load_strict(tower, theirs | left, f"{what}, in transformers,")
    tower.embeddings.position_ids = torch.arange(tower.embeddings.num_positions, device="cpu").unsqueeze(0)
    return tower.post_layernorm(tower(x).last_hidden_state)
