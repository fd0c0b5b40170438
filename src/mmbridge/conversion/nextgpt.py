"""NExT-GPT's published projections to ``mmbridge.projections`` (arXiv 2309.05519).

Each function takes the tensors of one module, with the checkpoint's prefix already stripped, reads every size from
their shapes and returns the module in float32. Output projections of the released weights (``fc``, ``model``) and of
the newer code (``in_fc``, ``out_fc``) differ in names only. Attention heads leave no trace in the shapes, so they are
arguments, whose defaults are the published numbers. Language model rows and LoRA are not converted here.
"""

import re
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.projections.base import Projection
from mmbridge.projections.grouping import Grouping
from mmbridge.projections.linear import MLP, Linear
from mmbridge.projections.signal_transformer import SignalTransformer

P = TypeVar("P", bound=Projection)

# Ours to theirs, applied in order.
_GROUPING_NAMES = (
    (r"^project_(in|out)\.", r"\1_fc."),
    (r"^stages\.", "layers."),
    (r"\.concepts$", ".group_token"),
    (r"\.carry\.norm\.", ".group_projector.0."),
    (r"\.carry\.mlp\.", ".group_projector.1."),
    (r"\.norm_attention\.", ".norm1."),
    (r"\.attention\.(query|key|value)\.", ".attn.qkv."),
    (r"\.attention\.out\.", ".attn.proj."),
    (r"(\.blocks\.\d+)\.norm_mlp\.", r"\1.norm2."),
    (r"\.grouping\.norm_tokens\.", ".grouping.norm_x."),
    (r"\.mixer\.norm\.", ".norm_tokens."),
    (r"\.mixer\.mlp\.", ".mlp_inter."),
    (r"\.norm_mixed\.", ".norm_post_tokens."),
    (r"\.cross_attention\.(q|k|v)[a-z]+\.", r".pre_assign_attn.attn.\1_proj."),
    (r"\.cross_attention\.out\.", ".pre_assign_attn.attn.proj."),
    (r"\.norm_cross_mlp\.", ".pre_assign_attn.norm2."),
    (r"\.cross_mlp\.", ".pre_assign_attn.mlp."),
    (r"\.norm_cross\.", ".pre_assign_attn.norm_post."),
    (r"\.assign_(q|k|v)[a-z]+\.", r".assign.\1_proj."),
    (r"\.assign_out\.", ".assign.proj."),
    (r"\.grouping\.norm_mlp\.", ".grouping.norm_new_x."),
    (r"\.grouping\.mlp\.", ".grouping.mlp_channels."),
    (r"\.grouping\.", ".downsample."),
    (r"\.(mlp\w*|group_projector\.1)\.0\.", r".\1.fc1."),
    (r"\.(mlp\w*|group_projector\.1)\.2\.", r".\1.fc2."),
)
_SHOWN = 8  # keys of each kind that an error lists


def linear(state: Mapping[str, Tensor]) -> Linear:
    """Convert a linear input projection: ``weight``, ``bias`` (``llama_proj`` of the released weights).

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    dim_out, dim_in = _shape(state, "weight", 2)
    return _filled(_created(Linear, dim_in=dim_in, dim_out=dim_out), state, [(r"^layer\.", "")])


def mlp(state: Mapping[str, Tensor]) -> MLP:
    """Convert an MLP input projection: ``layer.0.*``, ``layer.2.*``.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    dim_hidden, dim_in = _shape(state, "layer.0.weight", 2)
    dim_out, _ = _shape(state, "layer.2.weight", 2)
    module = _created(MLP, dim_in=dim_in, dim_out=dim_out, dim_hidden=dim_hidden)
    return _filled(module, state, [(r"^layers\.", "layer.")])


def grouping(state: Mapping[str, Tensor], num_heads: int = 8) -> Grouping:
    """Convert the newer code's grouping input projection: ``in_fc.*``, ``layers.*``, ``norm.*``, ``out_fc.*``.

    Args:
        state: Tensors of one ``mm_input_projector``, without prefix.
        num_heads: Attention heads, which the tensors do not tell.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    dim_hidden, dim_in = _shape(state, "in_fc.weight", 2)
    dim_out, _ = _shape(state, "out_fc.weight", 2)
    stages = max(1, _count(state, r"layers\.(\d+)\.") - 1)  # the last layer groups nothing
    groups = [_shape(state, f"layers.{i}.group_token", 3)[1] for i in range(stages)]
    module = _created(
        Grouping,
        dim_in=dim_in,
        dim_out=dim_out,
        num_tokens=groups[-1],
        num_concepts=groups[:-1],
        depths=[max(1, _count(state, rf"layers\.{i}\.blocks\.(\d+)\.")) for i in range(stages + 1)],
        dim_hidden=dim_hidden,
        num_heads=num_heads,
        variant="published",
    )
    return _filled(module, state, [(r"^blocks\.", f"layers.{stages}.blocks."), *_GROUPING_NAMES])


def signal_transformer(state: Mapping[str, Tensor], num_heads: int = 4) -> SignalTransformer:
    """Convert an output projection: ``query_embs``, ``tfm.*`` and ``fc.*``, ``model.*`` or ``in_fc.*``, ``out_fc.*``.

    Args:
        state: Tensors of one ``gen_text_hidden_fcs*.0`` or ``mm_output_*_projector``, without prefix.
        num_heads: Attention heads, which the tensors do not tell.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    released = any(re.match(r"(fc|model)\.(weight|bias)$", key) for key in state)
    project_in, project_out = ("fc", "model") if released else ("in_fc", "out_fc")
    dim_hidden, dim_in = _shape(state, f"{project_in}.weight", 2)
    dim_out, _ = _shape(state, f"{project_out}.weight", 2)
    _, num_queries, _ = _shape(state, "query_embs", 3)
    dim_feedforward, _ = _shape(state, "tfm.encoder.layers.0.linear1.weight", 2)
    module = _created(
        SignalTransformer,
        dim_in=dim_in,
        dim_out=dim_out,
        num_queries=num_queries,
        dim_hidden=dim_hidden,
        num_heads=num_heads,
        num_encoder_layers=max(1, _count(state, r"tfm\.encoder\.layers\.(\d+)\.")),
        num_decoder_layers=max(1, _count(state, r"tfm\.decoder\.layers\.(\d+)\.")),
        dim_feedforward=dim_feedforward,
    )
    names = [
        (r"^project_in\.", f"{project_in}."),
        (r"^project_out\.", f"{project_out}."),
        (r"^queries$", "query_embs"),
        (r"^transformer\.", "tfm."),
    ]
    return _filled(module, state, names)


def _shape(state: Mapping[str, Tensor], key: str, axes: int) -> tuple[int, ...]:
    if key not in state:
        raise CheckpointError(
            f"NExT-GPT checkpoint lacks {key!r}, from which sizes are read; it has {_listed(sorted(state))}. Pass one "
            "module's tensors with their prefix stripped."
        )
    shape = tuple(state[key].shape)
    if len(shape) != axes:
        raise CheckpointError(
            f"NExT-GPT checkpoint has {key} of the wrong shape: {shape} instead of {axes} axes. Pass an undamaged file."
        )
    return shape


def _created(part: type[P], **arguments: Any) -> P:
    """Create a module without memory or random numbers, from sizes that a file gave."""
    try:
        with torch.device("meta"):
            return part(**arguments)
    except ConfigError as error:
        raise CheckpointError(f"NExT-GPT checkpoint has shapes that fit no projection: {error}") from error


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = [int(match[1]) for key in state if (match := re.match(pattern, key))]
    return max(found, default=-1) + 1


def _filled(module: P, state: Mapping[str, Tensor], names: list[tuple[str, str]]) -> P:
    """Copy the tensors into a module that was created on the meta device; strict both ways."""
    shapes = {key: value.shape for key, value in module.state_dict().items()}
    sources: dict[str, list[str]] = {}  # several keys of ours share one tensor of theirs, stacked along its first axis
    for key in shapes:
        source = key
        for pattern, replacement in names:
            source = re.sub(pattern, replacement, source)
        sources.setdefault(source, []).append(key)
    wanted = {s: (sum(shapes[k][0] for k in keys), *shapes[keys[0]][1:]) for s, keys in sources.items()}
    both = [key for key in wanted if key in state]
    faults = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of the wrong shape": [
            f"{key} {tuple(state[key].shape)} instead of {wanted[key]}"
            for key in both
            if tuple(state[key].shape) != wanted[key]
        ],
        "not finite": [key for key in both if not state[key].isfinite().all()],
    }
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault}: {_listed(keys)}" for fault, keys in faults.items() if keys)
        raise CheckpointError(
            f"NExT-GPT checkpoint does not fill projection {module.name!r}: {listed}. Pass one module's tensors with "
            "their prefix stripped, from an undamaged file."
        )
    tensors: dict[str, Tensor] = {}
    for source, keys in sources.items():
        tensors.update(zip(keys, state[source].chunk(len(keys)), strict=True))
    module.float().to_empty(device="cpu").load_state_dict(tensors)
    return module


def _listed(keys: list[str]) -> str:
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + rest if keys else "nothing"
