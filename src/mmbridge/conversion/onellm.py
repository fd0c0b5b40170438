"""OneLLM's published tensors to parts of ours and back (arXiv 2312.03700; the 940 tensors of OneLLM-7B).

Sizes are read from the tensors. Names may carry the file's ``llma.`` or stand without it. Modalities may be called as OneLLM
calls them or as everything else here does: "point" is "pointcloud", "rgbd" is "depth", "rgbn" is "normal".

| published | part |
|---|---|
| ``clip_proj1``, ``clip_proj2``, ``resample_tokens``, ``routers`` | ``inputs.<modality>.projection`` |
| ``start_tag``, ``end_tag`` | ``inputs.<modality>.tags`` |
| ``resample_layers`` | ``inputs.shared.experts``: one set for all modalities |
| ``clip.visual``, ``conv1``, ``positional_embedding`` | ``base.encoder``: ``mmbridge.encoders.UniversalEncoder`` |
| ``tok_embeddings``, ``layers``, ``norm``, ``output`` | ``base.language_model``: a ``LlamaForCausalLM`` of transformers |
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmbridge import hub
from mmbridge.conversion.keymap import KeyMap, Target, joined, listed
from mmbridge.conversion.onellm_faults import faults_of, finite, misshapen, refuse, shapes_of
from mmbridge.conversion.onellm_names import (
    ENCODER,
    EXPERTS,
    LANGUAGE_MODEL,
    MODALITIES,
    NAMES,
    OURS,
    THEIRS,
    UNUSED,
    encoder_targets,
    expert_targets,
    find_kinds,
    highest,
    language_model_targets,
    projection_targets,
    tag_targets,
    targets_of,
)
from mmbridge.encoders.tokenizers import KINDS
from mmbridge.encoders.universal import TOKENIZERS, Transformer, UniversalConfig, UniversalEncoder
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.projections.mixture import MixtureOfExperts
from mmbridge.registry import suggest

COLOURS = (3, 4, 5)
"""Channels of a point between which the published code measures distances, which it calls coordinates."""


def mixture(state: Mapping[str, Tensor], modality: str, num_heads: int = 16) -> MixtureOfExperts:
    """Convert one modality's projection; tensors of other modalities, of the encoder and of the language model are left alone.

    Its slots come without the start and end tags that OneLLM puts around them. Its experts have the name by which all modalities
    share them, that of ``bridge_config`` and of the recipes ``onellm/*``.

    Args:
        state: Tensors by their published names.
        modality: One of ``MODALITIES``.
        num_heads: Attention heads of the experts, which the tensors do not tell.

    Raises:
        ConfigError: Unknown modality.
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    theirs = _find(modality)
    state = _stripped(state)
    experts = {f"experts.{name}": target for name, target in expert_targets(*_expert_counts(state)).items()}
    targets = projection_targets(theirs) | experts
    own = rf"resample_layers\.|(resample_tokens|clip_proj[12]|routers)\.{theirs}(\.|$)"
    what = f"the projection of {theirs!r}"
    refuse(faults_of(state, targets, own), what)
    with torch.device("meta"):
        module = _mixture(state, theirs, num_heads)
    return _filled(module, state, targets, what).float()


def encoder(
    state: Mapping[str, Tensor], modality: str, heads: int = 16, coordinates: Sequence[int] = COLOURS, **sizes: Any
) -> UniversalEncoder:
    """Convert one modality's encoder: its tokenizer, and the CLIP transformer that all share.

    Args:
        state: Tensors by their published names.
        modality: One of ``MODALITIES``.
        heads: Attention heads, which the tensors do not tell.
        coordinates: As in ``UniversalEncoder``; the published weights were trained to group points by their colours.
        sizes: Fields of the tokenizer's sizes that can't be read, or shall differ: ``neighbours`` of points; ``stride``,
            ``mel_bins`` and ``frames`` of sound.

    Raises:
        ConfigError: Unknown modality or size.
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    theirs = _find(modality)
    state, kind = _stripped(state), TOKENIZERS[OURS[theirs]]
    depth = highest(state, r"clip\.visual\.transformer\.resblocks\.(\d+)\.")
    targets = {
        name.replace(f"tokenizers.{kind}.", "tokenizer."): target
        for name, target in encoder_targets([kind], depth).items()
    }
    others = "" if kind == "image" else r"|conv1\.|positional_embedding$"
    own = rf"clip\.visual\.(?!proj${others})|conv1\.{theirs}\.|positional_embedding\.{theirs}$"
    what = f"the encoder of {theirs!r}"
    refuse(faults_of(state, targets, own), what)
    config = _encoder_config(state, [kind], heads, **sizes)
    with torch.device("meta"):
        module = UniversalEncoder(OURS[theirs], config=config, coordinates=coordinates)
    return _filled(module, state, targets, what).float().freeze()


def beside(folder: Path) -> dict[str, Any]:
    """Return as arguments of ``keymap``, ``base_configs`` and ``export_map`` what files beside the weights tell: ``heads``.

    Read are LLaMA's own ``params.json``, and ``config.json`` of transformers.

    Raises:
        CheckpointError: The number in there is none.
    """
    for name, key in (("params.json", "n_heads"), ("config.json", "num_attention_heads")):
        if not (folder / name).is_file() or (heads := hub.read_json(folder / name).get(key)) is None:
            continue
        if not isinstance(heads, int) or heads < 1:
            raise CheckpointError(f"{folder / name} has {key}={heads!r}; write the number of attention heads there.")
        return {"heads": heads}
    return {}


def keymap(state: Mapping[str, Any], heads: int = 32) -> KeyMap:
    """Map a whole file to parts; only names and shapes are read.

    Args:
        state: Tensors, on any device, by their published names.
        heads: Attention heads of the language model, which the tensors do not tell.

    Raises:
        ConfigError: Heads that do not divide the width.
        CheckpointError: Missing or unexpected names, or wrong shapes; the message lists them.
    """
    prefix, state = _prefix(state), _stripped(state)
    modalities = _modalities(state)
    depth = highest(state, r"clip\.visual\.transformer\.resblocks\.(\d+)\.")
    dim = _shape(state, "tok_embeddings.weight", 2)[1]
    if heads < 1 or dim % (2 * heads):
        raise ConfigError(
            f"a language model of width {dim} can't have heads={heads}; pass the number that it was trained with."
        )
    parts: dict[str, dict[str, Target]] = {}
    for theirs in modalities:
        parts[f"inputs.{OURS[theirs]}.projection"] = projection_targets(theirs)
        parts[f"inputs.{OURS[theirs]}.tags"] = tag_targets(theirs)
    parts[EXPERTS] = expert_targets(*_expert_counts(state))
    parts[ENCODER] = encoder_targets(find_kinds(modalities), depth)
    parts[LANGUAGE_MODEL] = language_model_targets(highest(state, r"layers\.(\d+)\."), dim // heads)
    unused = {name: reason for name, reason in UNUSED.items() if name in state}
    KeyMap(parts, unused).check(state, "the OneLLM checkpoint")
    shapes = _part_shapes(state, modalities)
    wrong = [fault for part, targets in parts.items() for fault in misshapen(state, targets, shapes[part])]
    refuse({"of the wrong shape": wrong}, "its parts")
    return KeyMap(
        {
            part: {
                name: Target(tuple(prefix + source for source in target.sources), target.make)
                for name, target in targets.items()
            }
            for part, targets in parts.items()
        },
        {prefix + name: reason for name, reason in unused.items()},
    )


def released(state: Mapping[str, Tensor], heads: int = 32) -> dict[str, dict[str, Tensor]]:
    """Convert a whole file: every tensor is used, or named as unused by ``keymap``; precision stays as it is.

    Args:
        state: Tensors by their published names.
        heads: Attention heads of the language model, which the tensors do not tell.

    Returns:
        The tensors of each part: ``inputs.<modality>.projection`` and ``.tags``, ``inputs.shared.experts``,
        ``base.encoder``, and ``base.language_model`` as transformers' ``LlamaForCausalLM`` names them.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    found = keymap(state, heads)
    refuse({"not finite": [name for name, value in state.items() if not finite(value)]}, "its parts")
    return found.apply(state)


def export(parts: Mapping[str, Mapping[str, Tensor]], heads: int = 32) -> dict[str, Tensor]:
    """Convert back, bit for bit: parts as ``released`` returns them, all or some, to the published names.

    What ``keymap`` names as unused is not made; it is that of OpenAI's CLIP ViT-L/14.

    Args:
        parts: Tensors of each part.
        heads: Attention heads of the language model.

    Raises:
        CheckpointError: A part that OneLLM does not have, or one that is not whole.
    """
    flat = joined(parts)
    return {
        name: target.make(*(flat[source] for source in target.sources)).contiguous()
        for name, target in export_map(parts, heads=heads).items()
    }


def export_map(
    parts: Mapping[str, Mapping[str, Any]], base: Mapping[str, Any] | None = None, heads: int = 32
) -> dict[str, Target]:
    """Return how ``export`` makes each published tensor, from sources called ``<part>/<name>``; only shapes are read.

    Args:
        parts: Tensors of each part, on any device.
        base: Not needed: a file of OneLLM takes nothing from elsewhere.
        heads: Attention heads of the language model.

    Raises:
        CheckpointError: As for ``export``.
    """
    found: dict[str, Target] = {}
    for part, tensors in parts.items():
        targets = targets_of(part, tensors, heads)
        if targets.keys() != tensors.keys():
            missing, unexpected = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
            raise CheckpointError(
                f"part {part!r} can't be exported: it lacks {listed(missing)} and has {listed(unexpected)} more; give the "
                "whole part of a OneLLM bridge."
            )
        for name, target in targets.items():
            for index, source in enumerate(target.sources):
                found[f"llma.{source}"] = Target((f"{part}/{name}",), partial(target.make.undo, index=index))  # type: ignore[attr-defined]
    return found


def bridge_config(
    state: Mapping[str, Any], base: Mapping[str, str] | None = None, num_heads: int = 16
) -> dict[str, Any]:
    """Return the configuration of the bridge that opens what ``released`` returns, as ``Bridge.from_config`` takes it.

    What the weights were trained with is set, though it is no default of ours: routers normalised by a sigmoid, and points that
    are grouped by their colours.

    Args:
        state: Tensors, on any device, by their published names.
        base: Where the parts "encoder" and "language_model" lie; None names them as the parts are named.
        num_heads: Attention heads of the experts, which the tensors do not tell.

    Raises:
        CheckpointError: Tensors from which sizes are read are missing, or of another number of axes.
    """
    state = _stripped(state)
    modalities = _modalities(state)
    sources = {"encoder": ENCODER, "language_model": LANGUAGE_MODEL, **(base or {})}
    with torch.device("meta"):
        sizes = {theirs: _mixture(state, theirs, num_heads) for theirs in modalities}
    return {
        "backbone": {"name": "causal_lm", "source": sources["language_model"], "template": "onellm", "stop": "###"},
        "inputs": {
            OURS[theirs]: {
                "name": "encoded",
                "encoder": {
                    "name": "universal",
                    "modality": OURS[theirs],
                    "weights": sources["encoder"],
                    **({"coordinates": list(COLOURS)} if theirs == "point" else {}),
                },
                "projection": {
                    "name": MixtureOfExperts.registry_name,  # type: ignore[attr-defined]
                    "num_tokens": projection.tokens_out,
                    **dict(zip(_EXPERT_SIZES, projection.experts.sizes, strict=True)),
                    "normalize": "sigmoid",
                    "experts": _SHARED_AS,
                },
                "tags": True,
            }
            for theirs, projection in sizes.items()
        },
        "outputs": {},
    }


def base_configs(state: Mapping[str, Any], heads: int = 32) -> dict[str, dict[str, Any]]:
    """Return the ``config.json`` that lies beside the weights of ``base.encoder`` and ``base.language_model``.

    Args:
        state: Tensors, on any device, by their published names.
        heads: Attention heads of the language model, which the tensors do not tell.

    Raises:
        CheckpointError: Tensors from which sizes are read are missing, or of another number of axes.
    """
    state = _stripped(state)
    vocabulary, dim = _shape(state, "tok_embeddings.weight", 2)
    return {
        ENCODER: _encoder_config(state, find_kinds(_modalities(state))).to_dict(),
        LANGUAGE_MODEL: {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": dim,
            "intermediate_size": _shape(state, "layers.0.feed_forward.w1.weight", 2)[0],
            "num_hidden_layers": highest(state, r"layers\.(\d+)\."),
            "num_attention_heads": heads,
            "num_key_value_heads": _shape(state, "layers.0.attention.wk.weight", 2)[0] * heads // dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    }


def repeat_cache_offset(cache: Any) -> None:
    """Go on decoding as OneLLM's published code does, two positions too early; for repeating its numbers only.

    After the prompt that code counts a medium's slots, but not its two tags, so that every new token takes the position of one
    two steps before it, and the first two overwrite the prompt's last two keys and values. Call it once, after the prompt.

    Args:
        cache: A cache of transformers that holds a prompt with one medium.
    """
    cache.crop(-2)


# Sizes ---------------------------------------------------------------------------------------------------------------

_SHARED_AS = EXPERTS.rpartition(".")[2]
_EXPERT_SIZES = ("num_experts", "depth", "dim_hidden", "num_heads", "dim_feedforward")


def _mixture(state: Mapping[str, Any], theirs: str, num_heads: int) -> MixtureOfExperts:
    """Create a projection of the sizes that the tensors have; on the meta device, if the caller says so."""
    count, depth = _expert_counts(state)
    dim_out, _ = _shape(state, f"clip_proj2.{theirs}.0.weight", 2)
    _, num_tokens, dim_hidden = _shape(state, f"resample_tokens.{theirs}", 3)
    try:
        return MixtureOfExperts(
            dim_in=_shape(state, f"clip_proj1.{theirs}.0.weight", 2)[1],
            dim_out=dim_out,
            num_tokens=num_tokens,
            dim_hidden=dim_hidden,
            num_experts=count,
            depth=depth,
            num_heads=num_heads,
            dim_feedforward=_shape(state, "resample_layers.0.0.feed_forward.w1.weight", 2)[0],
            normalize="sigmoid",
            experts=_SHARED_AS,
        )
    except ConfigError as error:
        raise CheckpointError(f"OneLLM checkpoint has shapes that fit no projection: {error}") from error


def _encoder_config(state: Mapping[str, Any], kinds: list[str], heads: int = 16, **sizes: Any) -> UniversalConfig:
    """Read the sizes of the transformer and of tokenizers; ``sizes`` are further ones of each tokenizer."""
    (dim,) = _shape(state, "clip.visual.class_embedding", 1)
    found: dict[str, Any] = {
        "dim": dim,
        "depth": highest(state, r"clip\.visual\.transformer\.resblocks\.(\d+)\."),
        "heads": heads,
        "dim_feedforward": _shape(state, "clip.visual.transformer.resblocks.0.mlp.c_fc.weight", 2)[0],
    }
    for kind in kinds:
        projection, positions, _ = NAMES[kind]
        length = _shape(state, positions, 2)[0] - 1
        kernel = _shape(state, f"{projection}.weight", {"imu": 3, "fmri": 2}.get(kind, 4))
        if kind == "image":
            read = {"patch": kernel[-1], "image_size": kernel[-1] * math.isqrt(length)}
        elif kind == "audio":
            read = {"patch": kernel[-1]}
            usual = UniversalConfig.from_dict({**found, "audio": {**read, **sizes}}).audio
            assert usual is not None
            rows, columns = usual.grid
            if rows * columns != length:  # as much sound as there are positions for
                read["frames"] = (length // max(rows, 1) - 1) * usual.stride + usual.patch
        elif kind == "pointcloud":
            read = {"groups": length, "channels": kernel[1]}
        elif kind == "imu":
            read = {"kernel": kernel[2], "steps": length + kernel[2] - 1, "channels": kernel[1]}
        else:
            read = {"voxels": kernel[1], "tokens": length}
        found[kind] = {**read, **sizes}
    return UniversalConfig.from_dict(found)


def _part_shapes(state: Mapping[str, Any], modalities: Iterable[str]) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes that the tensors of each part must have by the sizes that some of them tell."""
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    with torch.device("meta"):
        for theirs in modalities:
            whole = shapes_of(_mixture(state, theirs, num_heads=1))
            experts = {name: whole.pop(name) for name in list(whole) if name.startswith("experts.")}
            shapes[f"inputs.{OURS[theirs]}.projection"] = whole
            shapes[f"inputs.{OURS[theirs]}.tags"] = dict.fromkeys(("start", "end"), (1, whole["project_out.0.bias"][0]))
            shapes[EXPERTS] = {name.removeprefix("experts."): shape for name, shape in experts.items()}
        config = _encoder_config(state, find_kinds(modalities), heads=1)
        kinds = {kind: KINDS[kind][1](getattr(config, kind), config.dim) for kind in find_kinds(modalities)}
        encoder = nn.ModuleDict({"transformer": Transformer(config), "tokenizers": nn.ModuleDict(kinds)})
        shapes[ENCODER] = shapes_of(encoder)
    vocabulary, dim = _shape(state, "tok_embeddings.weight", 2)
    queries, keys = (_shape(state, f"layers.0.attention.{name}.weight", 2)[0] for name in ("wq", "wk"))
    inner = _shape(state, "layers.0.feed_forward.w1.weight", 2)[0]
    rows = {
        "q_proj": (queries, dim), "k_proj": (keys, dim), "v_proj": (keys, dim), "o_proj": (dim, queries),
        "gate_proj": (inner, dim), "up_proj": (inner, dim), "down_proj": (dim, inner),
        "embed_tokens": (vocabulary, dim), "lm_head": (vocabulary, dim),
    }  # fmt: skip
    names = language_model_targets(highest(state, r"layers\.(\d+)\."), head=2)
    shapes[LANGUAGE_MODEL] = {name: rows.get(name.split(".")[-2], (dim,)) for name in names}
    return shapes


def _shape(state: Mapping[str, Any], name: str, axes: int) -> tuple[int, ...]:
    if name not in state:
        raise CheckpointError(
            f"OneLLM checkpoint lacks {name}, from which sizes are read; pass all its tensors under their own names."
        )
    shape = tuple(state[name].shape)
    if len(shape) != axes:
        refuse({"of the wrong shape": [f"{name} {shape} instead of {axes} axes"]}, "its parts")
    return shape


def _expert_counts(state: Mapping[str, Any]) -> tuple[int, int]:
    """Return the numbers of experts and of blocks of each."""
    found = (highest(state, rf"resample_layers\.{pattern}\.") for pattern in (r"(\d+)\.\d+", r"\d+\.(\d+)"))
    experts, depth = (max(1, number) for number in found)
    return experts, depth


def _find(modality: str) -> str:
    """Return a modality's published name."""
    theirs = THEIRS.get(modality, modality)
    if theirs not in MODALITIES:
        raise ConfigError(f"OneLLM has no modality {modality!r}{suggest(modality, list(MODALITIES))}")
    return theirs


def _modalities(state: Mapping[str, Any]) -> list[str]:
    """Return the published names of the modalities of which there is anything, in their order."""
    own = r"(resample_tokens|clip_proj[12]|routers|start_tag|end_tag)\.(\w+)"
    present = {match[2] for name in state if (match := re.match(own, name))}
    return [theirs for theirs in MODALITIES if theirs in present]


# Files ---------------------------------------------------------------------------------------------------------------


def _prefix(state: Mapping[str, Any]) -> str:
    return "llma." if any(name.startswith("llma.") for name in state) else ""


def _stripped(state: Mapping[str, Any]) -> dict[str, Any]:
    prefix = _prefix(state)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def _filled(module: Any, state: Mapping[str, Tensor], targets: Mapping[str, Target], what: str) -> Any:
    """Give a module on the meta device its tensors."""
    sources = sorted({source for target in targets.values() for source in target.sources})
    refuse({"of the wrong shape": misshapen(state, targets, shapes_of(module))}, what)
    refuse({"not finite": [name for name in sources if not finite(state[name])]}, what)
    module.to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            tensor.copy_(targets[name].make(*(state[source] for source in targets[name].sources)))
    return module
