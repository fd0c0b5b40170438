"""OneLLM's published tensors to ``mmbridge.projections`` (arXiv 2312.03700; the 940 tensors of OneLLM-7B).

Sizes are read from the tensors. Names may carry the file's ``llma.`` or stand without it.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.projections.mixture import MixtureOfExperts
from mmbridge.registry import suggest

MODALITIES = ("image", "video", "audio", "point", "rgbd", "rgbn", "fmri", "imu")
"""As OneLLM names them; "point" is a point cloud, "rgbd" and "rgbn" are depth and normal maps beside their picture."""

_BLOCK = {
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
_SHOWN = 8  # keys of each kind that an error lists


def mixture(state: Mapping[str, Tensor], modality: str, num_heads: int = 16) -> MixtureOfExperts:
    """Convert one modality's projection; tensors of other modalities, of the encoder and of the language model are left alone.

    Its slots come without the start and end tags that OneLLM puts around them.

    Args:
        state: Tensors by their published names.
        modality: One of ``MODALITIES``.
        num_heads: Attention heads of the experts, which the tensors do not tell.

    Raises:
        ConfigError: Unknown modality.
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes; the message lists them.
    """
    if modality not in MODALITIES:
        raise ConfigError(f"OneLLM has no modality {modality!r}{suggest(modality, list(MODALITIES))}")
    state = {key.removeprefix("llma."): value for key, value in state.items()}
    numbers = [(int(m[1]), int(m[2])) for key in state if (m := re.match(r"resample_layers\.(\d+)\.(\d+)\.", key))]
    experts, depth = (1 + max((pair[axis] for pair in numbers), default=0) for axis in (0, 1))
    sources = {
        "tokens": [f"resample_tokens.{modality}"],
        **{f"project_in.{name}": [f"clip_proj1.{modality}.{name}"] for name in _PROJECTED},
        **{f"project_out.{name}": [f"clip_proj2.{modality}.{name}"] for name in _PROJECTED},
        **{
            f"router.{ours}.{name}": [f"routers.{modality}.{theirs}.{name}"]
            for ours, theirs in ((0, "fc1"), (2, "fc2"))
            for name in ("weight", "bias")
        },
        **{
            f"experts.blocks.{block}.{ours}": [
                f"resample_layers.{expert}.{block}.{theirs}.weight" for expert in range(experts)
            ]
            for block in range(depth)
            for ours, theirs in _BLOCK.items()
        },
    }
    _refuse({"missing": [key for keys in sources.values() for key in keys if key not in state]}, modality)
    shapes = {
        key: tuple(state[sources[key][0]].shape)
        for key in ("tokens", "project_in.0.weight", "project_out.0.weight", "experts.blocks.0.gate", "router.2.weight")
    }
    axes = {key: 3 if key == "tokens" else 2 for key in shapes}
    _refuse({"of the wrong shape": [sources[key][0] for key in shapes if len(shapes[key]) != axes[key]]}, modality)
    try:
        with torch.device("meta"):
            module = MixtureOfExperts(
                dim_in=shapes["project_in.0.weight"][1],
                dim_out=shapes["project_out.0.weight"][0],
                num_tokens=shapes["tokens"][1],
                dim_hidden=shapes["tokens"][2],
                num_experts=experts,
                depth=depth,
                num_heads=num_heads,
                dim_feedforward=shapes["experts.blocks.0.gate"][0],
                normalize="sigmoid",
            )
    except ConfigError as error:
        raise CheckpointError(f"OneLLM checkpoint has shapes that fit no projection: {error}") from error
    known = {key for keys in sources.values() for key in keys}
    own = re.compile(rf"resample_layers\.|(resample_tokens|clip_proj[12]|routers)\.{modality}(\.|$)")
    wrong, tensors = [], {}
    for name, target in module.state_dict().items():
        shape = tuple(target.shape)
        single = (shape[0], *shape[2:]) if "norm" in name and "experts" in name else shape
        single = single[1:] if name.startswith("experts.") else single
        wrong += [
            f"{key} {tuple(state[key].shape)} instead of {single}"
            for key in sources[name]
            if state[key].shape != single
        ]
        if not wrong:
            stacked = (
                torch.stack([state[key] for key in sources[name]])
                if name.startswith("experts.")
                else state[sources[name][0]]
            )
            tensors[name] = stacked.reshape(shape)
    _refuse(
        {
            "unexpected": [key for key in state if own.match(key) and key not in known],
            "of the wrong shape": wrong,
            "not finite": [key for key in known if not state[key].isfinite().all()],
        },
        modality,
    )
    module.to_empty(device="cpu").load_state_dict(tensors)
    return module.float()


_PROJECTED = ("0.weight", "0.bias", "1.weight", "1.bias")


def _refuse(faults: dict[str, list[str]], modality: str) -> None:
    """Raise an error that lists what is wrong, if anything is."""
    if any(faults.values()):
        listed = "; ".join(f"{len(keys)} {fault}: {_listed(sorted(keys))}" for fault, keys in faults.items() if keys)
        raise CheckpointError(
            f"OneLLM checkpoint does not fill the projection of {modality!r}: {listed}. Pass all its tensors under their "
            "own names, from an undamaged file."
        )


def _listed(keys: list[str]) -> str:
    rest = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + rest
