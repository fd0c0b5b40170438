"""A tiny random checkpoint in OneLLM's published layout: all modalities, two experts, language model of two layers."""

import torch
from torch import Tensor

HEADS = 4
"""Attention heads of the language model."""
DIM, HIDDEN, LLM, VOCABULARY, TOKENS = 16, 32, 64, 50, 3
TRANSFORMER_HEADS = 2
KINDS = {
    "audio": {"conv1.audio.weight": (DIM, 1, 16, 16), "conv1.audio.bias": (DIM,), "positional_embedding.audio": (25, DIM)},
    "point": {
        "conv1.point.conv1.weight": (DIM, 6, 1, 1), "conv1.point.conv1.bias": (DIM,), "positional_embedding.point": (6, DIM)
    },
    "imu": {"conv1.imu.weight": (DIM, 6, 4), "positional_embedding.imu": (8, DIM)},
    "fmri": {"conv1.fmri.weight": (DIM * 2, 11), "conv1.fmri.bias": (DIM * 2,), "positional_embedding.fmri": (3, DIM)},
}  # fmt: skip
BATCHES = {
    "image": (2, 3, 16, 16), "video": (2, 3, 3, 16, 16), "depth": (2, 2, 3, 16, 16), "normal": (2, 2, 3, 16, 16),
    "audio": (2, 1, 128, 26), "pointcloud": (2, 40, 6), "imu": (2, 6, 10), "fmri": (2, 1, 11),
}  # fmt: skip
"""A batch of each modality as we call it."""


def block(prefix: str, dim: int, inner: int) -> dict[str, tuple[int, ...]]:
    attention = {f"{prefix}.attention.{name}.weight": (dim, dim) for name in ("wq", "wk", "wv", "wo")}
    norms = {f"{prefix}.{name}.weight": (dim,) for name in ("attention_norm", "ffn_norm")}
    inside = {f"{prefix}.feed_forward.{name}.weight": (inner, dim) for name in ("w1", "w3")}
    return {**attention, **inside, f"{prefix}.feed_forward.w2.weight": (dim, inner), **norms}


def shapes() -> dict[str, tuple[int, ...]]:
    visual = "clip.visual"
    found: dict[str, tuple[int, ...]] = {
        "tok_embeddings.weight": (VOCABULARY, LLM), "output.weight": (VOCABULARY, LLM), "norm.weight": (LLM,),
        f"{visual}.class_embedding": (DIM,), f"{visual}.positional_embedding": (5, DIM), f"{visual}.conv1.weight": (DIM, 3, 8, 8),
        f"{visual}.proj": (DIM, 12), "clip.token_embedding.weight": (9, 8), "clip.positional_embedding": (7, 8),
        "clip.ln_final.weight": (8,), "clip.ln_final.bias": (8,), "clip.text_projection": (8, 12), "clip.logit_scale": (),
    }  # fmt: skip
    for norm in ("ln_pre", "ln_post"):
        found |= {f"{visual}.{norm}.weight": (DIM,), f"{visual}.{norm}.bias": (DIM,)}
    for number in range(2):
        at = f"{visual}.transformer.resblocks.{number}"
        found |= {f"{at}.attn.in_proj_weight": (3 * DIM, DIM), f"{at}.attn.in_proj_bias": (3 * DIM,)}
        found |= {f"{at}.mlp.c_fc.weight": (HIDDEN, DIM), f"{at}.mlp.c_fc.bias": (HIDDEN,)}
        found |= {f"{at}.mlp.c_proj.weight": (DIM, HIDDEN), f"{at}.attn.out_proj.weight": (DIM, DIM)}
        for name in ("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias", "mlp.c_proj.bias", "attn.out_proj.bias"):
            found[f"{at}.{name}"] = (DIM,)
        found |= block(f"layers.{number}", LLM, 192)
        for expert in range(2):
            found |= block(f"resample_layers.{expert}.{number}", DIM, 24)
    for modality in ("image", "video", "audio", "point", "rgbd", "rgbn", "fmri", "imu"):
        for name, rows, columns in (("clip_proj1", DIM, DIM), ("clip_proj2", LLM, DIM)):
            found |= {f"{name}.{modality}.0.weight": (rows, columns)}
            found |= {f"{name}.{modality}.{rest}": (rows,) for rest in ("0.bias", "1.weight", "1.bias")}
        for name, rows, columns in (("fc1", 4 * DIM, DIM), ("fc2", 2, 4 * DIM)):
            found |= {f"routers.{modality}.{name}.weight": (rows, columns), f"routers.{modality}.{name}.bias": (rows,)}
        found |= {f"{tag}.{modality}": (1, 1, LLM) for tag in ("start_tag", "end_tag")}
        found |= {f"resample_tokens.{modality}": (1, TOKENS, DIM), **KINDS.get(modality, {})}
    return found


def state() -> dict[str, Tensor]:
    """Return the tensors by the names that they have in the file."""
    generator = torch.Generator().manual_seed(5)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        return 1 + 0.1 * noise if "norm" in name or ".ln_" in name else 0.3 * noise

    return {f"llma.{name}": draw(name, shape) for name, shape in shapes().items()}
