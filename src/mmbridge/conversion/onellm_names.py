"""Which of OneLLM's published tensors make which of ours, by names alone (arXiv 2312.03700); ``onellm`` uses them.

Published names stand without ``llma.`` here.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mmbridge.conversion.keymap import Target
from mmbridge.encoders.clip import open_clip_names
from mmbridge.encoders.tokenizers import KINDS
from mmbridge.encoders.universal import TOKENIZERS
from mmbridge.errors import CheckpointError

MODALITIES = ("image", "video", "audio", "point", "rgbd", "rgbn", "fmri", "imu")
"""As OneLLM names them; "point" is a point cloud, "rgbd" and "rgbn" are depth and normal maps beside their picture."""

OURS = {name: name for name in MODALITIES} | {"point": "pointcloud", "rgbd": "depth", "rgbn": "normal"}
THEIRS = {ours: theirs for theirs, ours in OURS.items()}

EXPERTS, ENCODER, LANGUAGE_MODEL = "inputs.shared.experts", "base.encoder", "base.language_model"
"""Parts that belong to no single modality."""

_TEXT = "of CLIP's text tower, which OneLLM never runs"
UNUSED = {
    **{f"clip.{name}": _TEXT for name in ("token_embedding.weight", "positional_embedding", "text_projection")},
    **{f"clip.ln_final.{name}": _TEXT for name in ("weight", "bias")},
    "clip.logit_scale": "for comparing pictures with texts, which OneLLM never does",
    "clip.visual.proj": "carries the class token to CLIP's joint space; OneLLM takes all tokens before it",
    "rope.freqs": "rotary frequencies, which follow from the head size",
}
_EXPERT_BLOCK = {
    "norm_attention": "attention_norm",
    "query": "attention.wq",
    "key": "attention.wk",
    "value": "attention.wv",
    "out": "attention.wo",
    "norm_mlp": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
NAMES = {
    "image": ("clip.visual.conv1", "clip.visual.positional_embedding", ("weight",)),
    "audio": ("conv1.audio", "positional_embedding.audio", ("weight", "bias")),
    "pointcloud": ("conv1.point.conv1", "positional_embedding.point", ("weight", "bias")),
    "imu": ("conv1.imu", "positional_embedding.imu", ("weight",)),
    "fmri": ("conv1.fmri", "positional_embedding.fmri", ("weight", "bias")),
}
_LAYER = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
}


@dataclass(frozen=True)
class _Same:
    """A tensor as it is."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor

    def undo(self, tensor: Tensor, index: int = 0) -> Tensor:
        """Return the source number ``index`` of what was made."""
        return tensor

    def source(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape


@dataclass(frozen=True)
class _Stacked(_Same):
    """One tensor of each expert, together; norms (dim,) get an axis for the tokens."""

    def __call__(self, *tensors: Tensor) -> Tensor:
        stacked = torch.stack(tensors)
        return stacked.unsqueeze(1) if stacked.ndim == 2 else stacked

    def undo(self, tensor: Tensor, index: int = 0) -> Tensor:
        return tensor[index].reshape(self.source(tuple(tensor.shape)))

    def source(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape[1:] if shape[1] > 1 else shape[2:]


@dataclass(frozen=True)
class _Tag(_Same):
    """A tag (1, 1, dim), without the axis of the batch."""

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor[0]

    def undo(self, tensor: Tensor, index: int = 0) -> Tensor:
        return tensor[None]

    def source(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (1, *shape)


@dataclass(frozen=True)
class _Rotary(_Same):
    """Rows of queries or keys from Meta's order, where neighbours turn together, to that of halves in transformers."""

    head: int

    def __call__(self, tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (-1, self.head // 2, 2)).transpose(1, 2).flatten(0, 2)

    def undo(self, tensor: Tensor, index: int = 0) -> Tensor:
        return tensor.unflatten(0, (-1, 2, self.head // 2)).transpose(1, 2).flatten(0, 2)


def highest(names: Iterable[str], pattern: str) -> int:
    """Return one more than the highest number that the pattern's group finds."""
    return 1 + max((int(match[1]) for name in names if (match := re.match(pattern, name))), default=-1)


def find_kinds(modalities: Iterable[str]) -> list[str]:
    """Return the tokenizers of modalities, in their order."""
    present = {TOKENIZERS[OURS[theirs]] for theirs in modalities}
    return [kind for kind in KINDS if kind in present]


def _same(names: Mapping[str, str]) -> dict[str, Target]:
    return {ours: Target((theirs,), _Same()) for ours, theirs in names.items()}


def projection_targets(theirs: str) -> dict[str, Target]:
    both = ("weight", "bias")
    return _same({
        "tokens": f"resample_tokens.{theirs}",
        **{f"project_in.{i}.{name}": f"clip_proj1.{theirs}.{i}.{name}" for i in (0, 1) for name in both},
        **{f"project_out.{i}.{name}": f"clip_proj2.{theirs}.{i}.{name}" for i in (0, 1) for name in both},
        **{f"router.{i}.{name}": f"routers.{theirs}.{fc}.{name}" for i, fc in ((0, "fc1"), (2, "fc2")) for name in both},
    })  # fmt: skip


def tag_targets(theirs: str) -> dict[str, Target]:
    return {ours: Target((f"{ours}_tag.{theirs}",), _Tag()) for ours in ("start", "end")}


def expert_targets(count: int, depth: int) -> dict[str, Target]:
    return {
        f"blocks.{block}.{ours}": Target(
            tuple(f"resample_layers.{expert}.{block}.{theirs}.weight" for expert in range(count)), _Stacked()
        )
        for block in range(depth)
        for ours, theirs in _EXPERT_BLOCK.items()
    }


def encoder_targets(kinds: Iterable[str], depth: int) -> dict[str, Target]:
    clip = {ours: f"clip.visual.{theirs}" for ours, theirs in open_clip_names(depth).items()}
    names = {ours: theirs for ours, theirs in clip.items() if ours.startswith("transformer.")}
    for kind in kinds:
        projection, positions, tensors = NAMES[kind]
        names |= {f"tokenizers.{kind}.projection.{name}": f"{projection}.{name}" for name in tensors}
        names[f"tokenizers.{kind}.positions"] = positions
    return _same(names)


def language_model_targets(layers: int, head: int) -> dict[str, Target]:
    names = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    names |= {
        f"model.layers.{n}.{ours}": f"layers.{n}.{theirs}" for n in range(layers) for ours, theirs in _LAYER.items()
    }
    return {
        f"{ours}.weight": Target(
            (f"{theirs}.weight",), _Rotary(head) if ours.endswith(("q_proj", "k_proj")) else _Same()
        )
        for ours, theirs in names.items()
    }


def targets_of(part: str, tensors: Mapping[str, Tensor], heads: int) -> dict[str, Target]:
    """Return the targets of a part that is to be exported, sizes read from its tensors."""
    match = re.fullmatch(r"inputs\.(\w+)\.(projection|tags)", part)
    if match and match[1] in THEIRS:
        return (projection_targets if match[2] == "projection" else tag_targets)(THEIRS[match[1]])
    if part == EXPERTS:
        return expert_targets(len(next(iter(tensors.values()), ())), highest(tensors, r"blocks\.(\d+)\."))
    if part == ENCODER:
        kinds = [kind for kind in KINDS if f"tokenizers.{kind}.positions" in tensors]
        return encoder_targets(kinds, highest(tensors, r"transformer\.blocks\.(\d+)\."))
    if part == LANGUAGE_MODEL:
        dim = tensors["model.norm.weight"].numel() if "model.norm.weight" in tensors else 2 * heads
        return language_model_targets(highest(tensors, r"model\.layers\.(\d+)\."), dim // heads)
    raise CheckpointError(f"OneLLM has no part {part!r}; give parts as conversion.onellm.released returns them.")
