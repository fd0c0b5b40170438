"""Every tower of ImageBind against the paper's formulas, written out here a second time.

The published code's own numbers (tests/parity) cover patch tokens of pictures, videos and sounds. For everything else (pooled
outputs; text, depth, thermal and motion sensors in any form) there are none, so the expected values come from this file: patches
cut one by one, torch's own ``multi_head_attention_forward`` with its added key and value, and no code of the library.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmbridge.conversion import imagebind
from mmbridge.encoders import ImageBindConfig, ImageBindModel
from mmbridge.encoders.imagebind_modules import (
    AudioConfig,
    DepthConfig,
    ImuConfig,
    TextConfig,
    ThermalConfig,
    VisionConfig,
)
from mmbridge.errors import ConfigError

HEADS = 4
CONFIG = ImageBindConfig(
    embed_dim=12,
    vision=VisionConfig(16, 3, HEADS, image_size=24, patch=8),
    text=TextConfig(16, 2, HEADS, vocabulary=20, context=7, sot=18, eot=19),
    audio=AudioConfig(16, 2, HEADS, patch=8, stride=6, mel_bins=20, frames=26),
    depth=DepthConfig(16, 2, HEADS, image_size=16, patch=4),
    thermal=ThermalConfig(16, 2, HEADS, image_size=16, patch=8),
    imu=ImuConfig(16, 2, HEADS, kernel=4, steps=20),
)
GIVEN = {"audio": {"stride": 6, "mel_bins": 20, "frames": 26}, "text": {"sot": 18, "eot": 19}}
STRIDES = {"vision": 8, "audio": 6, "depth": 4, "thermal": 8}
INPUTS = {
    "image": (2, 3, 24, 24),
    "video": (2, 3, 3, 2, 24, 24),  # three clips
    "audio": (2, 4, 1, 20, 26),  # four clips
    "depth": (2, 1, 16, 16),
    "thermal": (2, 1, 16, 16),
    "imu": (2, 6, 20),
    "text": (3, 7),
}
CASES = [
    (modality, tokens)
    for modality in INPUTS
    for tokens in ("pooled", "patch")
    if (modality, tokens) != ("text", "patch")
]


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights in which no bias is zero and no norm is the identity, so that each of them shows."""
    torch.manual_seed(0)
    state = ImageBindModel(CONFIG).state_dict()
    return {
        name: value if name.endswith("mask") else value + 0.2 * torch.randn_like(value) for name, value in state.items()
    }


def layer_norm(state: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt()
    return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]


def sequence(state: dict[str, Tensor], tower: str, x: Tensor) -> Tensor:
    """Raw input of one tower to its sequence (B, T, D)."""
    prefix = f"modality_preprocessors.{tower}"
    if tower == "text":
        return state[f"{prefix}.token_embedding.weight"][x] + state[f"{prefix}.pos_embed"]
    if tower == "imu":
        weight = state[f"{prefix}.imu_stem.proj.weight"]
        pieces = [x[:, :, start : start + 4].flatten(1) for start in range(0, 20, 4)]
        stem, positions = "imu_stem", state[f"{prefix}.pos_embed"]
    else:
        stem = "depth_stem" if tower == "depth" else "rgbt_stem"
        weight = state[f"{prefix}.{stem}.proj.{'1.' if tower == 'vision' else ''}weight"]
        if tower == "vision" and x.ndim == 4:
            x = torch.stack([x, x], dim=2)  # a picture is a film of two equal frames
        size, stride = weight.shape[-1], STRIDES[tower]
        places = [range(0, side - size + 1, stride) for side in x.shape[-2:]]
        pieces = [x[..., i : i + size, j : j + size].flatten(1) for i in places[0] for j in places[1]]
        positions = state[f"{prefix}.pos_embedding_helper.pos_embed"]
    tokens = torch.stack([piece @ weight.flatten(1).T for piece in pieces], dim=1)
    if tower != "vision":
        tokens = layer_norm(state, f"{prefix}.{stem}.norm_layer", tokens, 1e-5)
    first = state[f"{prefix}.cls_token"].repeat(len(x), 1, 1)
    return torch.cat([first, tokens], dim=1) + positions


def trunk(state: dict[str, Tensor], tower: str, x: Tensor) -> Tensor:
    """The transformer, with torch's own attention, sequence first."""
    prefix = f"modality_trunks.{tower}"
    if tower == "vision":
        x = layer_norm(state, f"{prefix}.pre_transformer_layer.0", x, 1e-6)
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1) if tower == "text" else None
    for number in range(getattr(CONFIG, tower).depth):
        block = f"{prefix}.blocks.{number}"
        normed = layer_norm(state, f"{block}.norm_1", x, 1e-6).transpose(0, 1)
        read, _ = F.multi_head_attention_forward(
            normed, normed, normed, x.shape[-1], HEADS,
            state[f"{block}.attn.in_proj_weight"], state[f"{block}.attn.in_proj_bias"],
            state.get(f"{block}.attn.bias_k"), state.get(f"{block}.attn.bias_v"), False, 0.0,
            state[f"{block}.attn.out_proj.weight"], state[f"{block}.attn.out_proj.bias"],
            training=False, need_weights=True, attn_mask=mask,
        )  # fmt: skip
        x = x + read.transpose(0, 1)
        hidden = layer_norm(state, f"{block}.norm_2", x, 1e-6) @ state[f"{block}.mlp.fc1.weight"].T
        hidden = hidden + state[f"{block}.mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
        x = x + hidden @ state[f"{block}.mlp.fc2.weight"].T + state[f"{block}.mlp.fc2.bias"]
    return x


def one_clip(state: dict[str, Tensor], tower: str, tokens: str, x: Tensor) -> Tensor:
    """Unit vectors (B, T, D) of one clip."""
    hidden = trunk(state, tower, sequence(state, tower, x))
    if tower == "text":
        ends = [row.tolist().index(19) for row in x]
        hidden = torch.stack([states[end] for states, end in zip(hidden, ends, strict=True)])[:, None]
    else:
        hidden = hidden[:, :1] if tokens == "pooled" else hidden[:, 1:]
    head = f"modality_heads.{tower}" + (".proj" if tower == "text" else "")
    last = {"text": "1", "imu": "3"}.get(tower, "2")
    projected = layer_norm(state, f"{head}.0", hidden, 1e-6) @ state[f"{head}.{last}.weight"].T
    return projected / projected.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize(("modality", "tokens"), CASES)
def test_towers_equal_the_formulas(state: dict[str, Tensor], modality: str, tokens: str) -> None:
    tower = {"image": "vision", "video": "vision"}.get(modality, modality)
    encoder = imagebind.encoder(state, modality, tokens=tokens, heads=HEADS, **GIVEN.get(modality, {}))
    if modality == "text":
        x = torch.tensor([[18, 3, 4, 19, 0, 0, 0], [18, 19, 0, 0, 0, 0, 0], [18, 1, 2, 3, 4, 5, 19]])
    else:
        x = torch.randn(INPUTS[modality])
    if modality in ("video", "audio"):
        expected = sum(one_clip(state, tower, tokens, clip) for clip in x.unbind(1)) / x.shape[1]
    else:
        expected = one_clip(state, tower, tokens, x)
    y = encoder(x)
    assert y.shape == (len(x), encoder.spec.tokens, encoder.spec.dim)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=0)


def test_only_the_tower_asked_for_is_made(state: dict[str, Tensor]) -> None:
    for modality in INPUTS:
        encoder = imagebind.encoder(state, modality, tokens="pooled", heads=HEADS, **GIVEN.get(modality, {}))
        tower = {"image": "vision", "video": "vision"}.get(modality, modality)
        assert {name.split(".")[2] for name in encoder.state_dict()} == {tower}


def test_a_text_has_one_token(state: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match="ImageBind gives a text one token: pass tokens='pooled'"):
        imagebind.encoder(state, "text", heads=HEADS, **GIVEN["text"])
