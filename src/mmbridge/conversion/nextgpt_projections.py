"""NExT-GPT's published projections to ``mmbridge.projections`` (arXiv 2309.05519), one module at a time.

Every size is read from the tensors' shapes. Output projections of the released weights (``fc``, ``model``) and of the newer
code (``in_fc``, ``out_fc``) differ in names only. Attention heads leave no trace in the shapes, so they are arguments, whose
defaults are the published numbers.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from mmbridge.conversion.keymap import Target, listed
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
_TRANSFORMER_NAMES = ((r"^queries$", "query_embs"), (r"^transformer\.", "tfm."))


@dataclass(frozen=True)
class Filling(Generic[P]):
    """A projection on the meta device, and the published tensors that fill it.

    Args:
        module: The projection.
        sources: Published names, and ours that share each, stacked along its first axis.
        prefix: What all published names start with.
    """

    module: P
    sources: dict[str, list[str]]
    prefix: str

    def check(self, state: Mapping[str, Any], *, values: bool = False) -> None:
        """Compare names and shapes below the prefix, and look for numbers that are not finite where ``values`` are asked for.

        Raises:
            CheckpointError: The differences, listed.
        """
        shapes = {key: value.shape for key, value in self.module.state_dict().items()}
        wanted = {s: (sum(shapes[k][0] for k in keys), *shapes[keys[0]][1:]) for s, keys in self.sources.items()}
        both = [key for key in wanted if key in state]
        faults = {
            "missing": [key for key in wanted if key not in state],
            "unexpected": [key for key in state if key.startswith(self.prefix) and key not in wanted],
            "of the wrong shape": [
                f"{key} {tuple(state[key].shape)} instead of {wanted[key]}"
                for key in both
                if tuple(state[key].shape) != wanted[key]
            ],
            "not finite": [key for key in both if values and not state[key].isfinite().all()],
        }
        if any(faults.values()):
            found = "; ".join(f"{len(keys)} {fault}: {listed(keys)}" for fault, keys in faults.items() if keys)
            raise CheckpointError(
                f"NExT-GPT checkpoint does not fill projection {self.module.name!r}: {found}. {_remedy(self.prefix)}"
            )

    def targets(self) -> dict[str, Target]:
        """Return how each of the module's tensors is made."""
        return {
            key: Target((source,), partial(_piece, index=index, count=len(keys)))
            if len(keys) > 1
            else Target((source,))
            for source, keys in self.sources.items()
            for index, key in enumerate(keys)
        }


def _piece(tensor: Tensor, index: int, count: int) -> Tensor:
    return tensor.chunk(count)[index]


def linear(state: Mapping[str, Tensor]) -> Linear:
    """Convert a linear input projection: ``weight``, ``bias`` (``llama_proj`` of the released weights).

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    return _filled(plan_linear(state), state)


def mlp(state: Mapping[str, Tensor]) -> MLP:
    """Convert an MLP input projection: ``layer.0.*``, ``layer.2.*``.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    return _filled(plan_mlp(state), state)


def grouping(state: Mapping[str, Tensor], num_heads: int = 8) -> Grouping:
    """Convert the newer code's grouping input projection: ``in_fc.*``, ``layers.*``, ``norm.*``, ``out_fc.*``.

    Args:
        state: Tensors of one ``mm_input_projector``, without prefix.
        num_heads: Attention heads, which the tensors do not tell.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    return _filled(plan_grouping(state, num_heads=num_heads), state)


def signal_transformer(state: Mapping[str, Tensor], num_heads: int = 4) -> SignalTransformer:
    """Convert an output projection: ``query_embs``, ``tfm.*`` and ``fc.*``, ``model.*`` or ``in_fc.*``, ``out_fc.*``.

    Args:
        state: Tensors of one ``gen_text_hidden_fcs*.0`` or ``mm_output_*_projector``, without prefix.
        num_heads: Attention heads, which the tensors do not tell.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    return _filled(plan_signal_transformer(state, num_heads=num_heads), state)


def plan_linear(state: Mapping[str, Any], prefix: str = "") -> Filling[Linear]:
    """Plan what ``linear`` does, for names that start with ``prefix``; reads names and shapes only."""
    dim_out, dim_in = _shape(state, prefix, "weight", 2)
    return _planned(_created(Linear, dim_in=dim_in, dim_out=dim_out), [(r"^layer\.", "")], prefix)


def plan_mlp(state: Mapping[str, Any], prefix: str = "") -> Filling[MLP]:
    """Plan what ``mlp`` does, for names that start with ``prefix``; reads names and shapes only."""
    dim_hidden, dim_in = _shape(state, prefix, "layer.0.weight", 2)
    dim_out, _ = _shape(state, prefix, "layer.2.weight", 2)
    module = _created(MLP, dim_in=dim_in, dim_out=dim_out, dim_hidden=dim_hidden)
    return _planned(module, [(r"^layers\.", "layer.")], prefix)


def plan_grouping(state: Mapping[str, Any], prefix: str = "", num_heads: int = 8) -> Filling[Grouping]:
    """Plan what ``grouping`` does, for names that start with ``prefix``; reads names and shapes only."""
    dim_hidden, dim_in = _shape(state, prefix, "in_fc.weight", 2)
    dim_out, _ = _shape(state, prefix, "out_fc.weight", 2)
    stages = max(1, _count(state, prefix, r"layers\.(\d+)\.") - 1)  # the last layer groups nothing
    groups = [_shape(state, prefix, f"layers.{i}.group_token", 3)[1] for i in range(stages)]
    module = _created(
        Grouping,
        dim_in=dim_in,
        dim_out=dim_out,
        num_tokens=groups[-1],
        num_concepts=groups[:-1],
        depths=[max(1, _count(state, prefix, rf"layers\.{i}\.blocks\.(\d+)\.")) for i in range(stages + 1)],
        dim_hidden=dim_hidden,
        num_heads=num_heads,
        variant="published",
    )
    return _planned(module, [(r"^blocks\.", f"layers.{stages}.blocks."), *_GROUPING_NAMES], prefix)


def plan_signal_transformer(
    state: Mapping[str, Any], prefix: str = "", num_heads: int = 4
) -> Filling[SignalTransformer]:
    """Plan what ``signal_transformer`` does, for names that start with ``prefix``; reads names and shapes only."""
    released = any(f"{prefix}{layer}.{kind}" in state for layer in ("fc", "model") for kind in ("weight", "bias"))
    project_in, project_out = ("fc", "model") if released else ("in_fc", "out_fc")
    dim_hidden, dim_in = _shape(state, prefix, f"{project_in}.weight", 2)
    dim_out, _ = _shape(state, prefix, f"{project_out}.weight", 2)
    _, num_queries, _ = _shape(state, prefix, "query_embs", 3)
    dim_feedforward, _ = _shape(state, prefix, "tfm.encoder.layers.0.linear1.weight", 2)
    module = _created(
        SignalTransformer,
        dim_in=dim_in,
        dim_out=dim_out,
        num_queries=num_queries,
        dim_hidden=dim_hidden,
        num_heads=num_heads,
        num_encoder_layers=max(1, _count(state, prefix, r"tfm\.encoder\.layers\.(\d+)\.")),
        num_decoder_layers=max(1, _count(state, prefix, r"tfm\.decoder\.layers\.(\d+)\.")),
        dim_feedforward=dim_feedforward,
    )
    names = [(r"^project_in\.", f"{project_in}."), (r"^project_out\.", f"{project_out}."), *_TRANSFORMER_NAMES]
    return _planned(module, names, prefix)


def released_name(name: str) -> str:
    """Return what the released weights call a tensor of ``SignalTransformer``."""
    return _renamed(name, [(r"^project_in\.", "fc."), (r"^project_out\.", "model."), *_TRANSFORMER_NAMES])


def _remedy(prefix: str) -> str:
    if prefix:
        return "Give the whole file, undamaged."
    return "Pass one module's tensors with their prefix stripped, from an undamaged file."


def _shape(state: Mapping[str, Any], prefix: str, name: str, axes: int) -> tuple[int, ...]:
    key = prefix + name
    if key not in state:
        present = listed(sorted(other for other in state if other.startswith(prefix)))
        raise CheckpointError(
            f"NExT-GPT checkpoint lacks {key!r}, from which sizes are read; it has {present}. {_remedy(prefix)}"
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


def _count(state: Mapping[str, Any], prefix: str, pattern: str) -> int:
    found = [int(match[1]) for key in state if (match := re.match(re.escape(prefix) + pattern, key))]
    return max(found, default=-1) + 1


def _renamed(name: str, names: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _planned(module: P, names: Sequence[tuple[str, str]], prefix: str) -> Filling[P]:
    sources: dict[str, list[str]] = {}
    for key in module.state_dict():
        sources.setdefault(prefix + _renamed(key, names), []).append(key)
    return Filling(module, sources, prefix)


def _filled(filling: Filling[P], state: Mapping[str, Tensor]) -> P:
    """Copy the tensors into the module; strict both ways."""
    filling.check(state, values=True)
    tensors = {key: target.make(state[target.sources[0]]) for key, target in filling.targets().items()}
    module = filling.module
    module.float().to_empty(device="cpu").load_state_dict(tensors)
    return module
