"""Sizes read from published tensors, and what is refused."""

import pytest
import torch
from torch import Tensor

from mmbridge.conversion import imagebind
from mmbridge.encoders import ImageBind, ImageBindConfig, ImageBindModel
from mmbridge.encoders.imagebind_modules import AudioConfig, DepthConfig, ImuConfig, ThermalConfig, VisionConfig
from mmbridge.errors import CheckpointError, ConfigError

CONFIG = ImageBindConfig(
    embed_dim=12,
    vision=VisionConfig(16, 3, 2, image_size=24, patch=8),
    audio=AudioConfig(16, 2, 4, patch=8, stride=6, mel_bins=20, frames=26),
    depth=DepthConfig(16, 2, 4, image_size=16, patch=4),
    thermal=ThermalConfig(16, 2, 4, image_size=16, patch=8),
    imu=ImuConfig(16, 2, 4, kernel=4, steps=20),
)
GIVEN = {"audio": {"stride": 6, "mel_bins": 20, "frames": 26}}
INPUTS = {"image": (3, 24, 24), "audio": (1, 1, 20, 26), "depth": (1, 16, 16), "thermal": (1, 16, 16), "imu": (6, 20)}


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return ImageBindModel(CONFIG).state_dict()


@pytest.mark.parametrize("modality", INPUTS)
def test_sizes_are_read_from_the_tensors(state: dict[str, Tensor], modality: str) -> None:
    heads = 2 if modality == "image" else 4
    converted = imagebind.encoder(state, modality, heads=heads, **GIVEN.get(modality, {}))
    direct = ImageBind(modality, config=CONFIG)
    direct.model.load_state_dict({name: state[name] for name in direct.model.state_dict()})
    x = torch.randn(2, *INPUTS[modality])
    assert converted.spec == direct.spec
    assert torch.equal(converted(x), direct(x))
    assert not any(parameter.requires_grad for parameter in converted.parameters())


def test_output_options_are_passed_on(state: dict[str, Tensor]) -> None:
    converted = imagebind.encoder(
        state, "video", tokens="pooled", clips="concat", heads=2, video_clips=4, video_crops=1
    )
    assert (converted.spec.tokens, converted.spec.dim) == (4, 12)


def test_published_sizes_need_no_help() -> None:
    with torch.device("meta"):
        huge = ImageBindModel(ImageBindConfig.huge(), ("imu",)).state_dict()
    half = {name: torch.zeros(tensor.shape, dtype=torch.float16) for name, tensor in huge.items()}
    converted = imagebind.encoder(half, "imu")
    assert converted.spec.tokens == 250
    assert {parameter.dtype for parameter in converted.parameters()} == {torch.float32}


def test_what_is_missing_or_left_over_is_named(state: dict[str, Tensor]) -> None:
    broken = {name: tensor for name, tensor in state.items() if name != "modality_trunks.imu.blocks.0.attn.bias_k"}
    broken["modality_heads.imu.9.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError) as caught:
        imagebind.encoder(broken, "imu", heads=4)
    assert "1 missing: modality_trunks.imu.blocks.0.attn.bias_k (1, 1, 16)" in str(caught.value)
    assert "1 unexpected: modality_heads.imu.9.weight" in str(caught.value)
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 13, 16\) instead of \(1, 261, 16\)"):
        imagebind.encoder(state, "audio", heads=4)
    with pytest.raises(CheckpointError, match=r"lack modality_heads\.imu\.3\.weight, so they hold no whole"):
        imagebind.encoder({}, "imu")


def test_unreadable_or_unknown_sizes_are_asked_for(state: dict[str, Tensor]) -> None:
    with pytest.raises(ConfigError, match=r"attention heads can't be read.*16 wide.*pass heads="):
        imagebind.encoder(state, "image")
    with pytest.raises(ConfigError, match="has no size 'head'; did you mean 'heads'"):
        imagebind.encoder(state, "image", head=2)
