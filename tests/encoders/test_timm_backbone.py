"""Timm against timm itself, with small random models."""

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mmbridge.encoders import Timm
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.specs import ImageInput

X = torch.linspace(-2, 2, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32)


@pytest.fixture(scope="module")
def original() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=10).eval()


@pytest.fixture
def weights(original: torch.nn.Module, tmp_path: Path) -> Path:
    save_file(original.state_dict(), tmp_path / "model.safetensors")
    return tmp_path


def test_tokens_are_those_of_timm_without_its_classifier(original: torch.nn.Module, weights: Path) -> None:
    with torch.no_grad():
        features = original.forward_features(X)
        pooled = original.forward_head(features, pre_logits=True)
    patch = Timm("test_vit", weights=weights, image_size=32)
    assert torch.equal(patch(X), features[:, original.num_prefix_tokens :])
    assert (patch.spec.tokens, patch.spec.dim) == (4, 64)
    assert torch.equal(Timm("test_vit", weights=weights, image_size=32, tokens="pooled")(X), pooled.unsqueeze(1))


def test_pth_files_and_manifest(original: torch.nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": original.state_dict()}, tmp_path / "vit.pth")
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    encoder = Timm("test_vit", weights=str(tmp_path / "vit.pth"), image_size=32)
    with torch.no_grad():
        assert torch.equal(encoder(X), original.forward_features(X)[:, original.num_prefix_tokens :])
    facts = encoder.describe()
    assert (facts["weights"], facts["licence"], len(facts["sha256"] or "")) == (str(tmp_path / "vit.pth"), "mit", 64)


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext"])
def test_convolutional_maps_become_rows_of_tokens(model: str) -> None:
    encoder = Timm(model)
    x = torch.randn(1, 3, 160, 160)
    expected = encoder.backbone.forward_features(x)  # (B, D, H, W)
    y = encoder(x)
    assert y.shape[1:] == (encoder.spec.tokens, encoder.spec.dim)
    torch.testing.assert_close(y[0, 7], expected[0, :, 1, 2])  # five tokens a row


def test_channels_last_maps_become_rows_of_tokens() -> None:
    with torch.device("meta"):
        spec = Timm("swin_tiny_patch4_window7_224").spec
    assert (spec.tokens, spec.dim) == (49, 768)


def test_preprocessing_is_the_models_own() -> None:
    with torch.device("meta"):
        read = Timm("vit_base_patch16_clip_224.openai").input
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert read == ImageInput(224, mean, std, "crop")
    assert Timm("test_vit", image_size=48).input.size == 48


def test_planning_reads_no_weights() -> None:
    with torch.device("meta"):
        planned = [Timm("test_vit", pretrained=True), Timm("test_vit", weights="somebody/something")]
    assert [encoder.spec.tokens for encoder in planned] == [100, 100]
    assert [encoder.describe()["weights"] for encoder in planned] == ["test_vit", "somebody/something"]


def test_wrong_arguments_are_named(weights: Path) -> None:
    with pytest.raises(ConfigError, match=r"timm has no model 'test_vot'; did you mean .*'test_vit'"):
        Timm("test_vot")
    with pytest.raises(ConfigError, match="tokens is 'cls' but must be 'patch' or 'pooled'"):
        Timm("test_vit", tokens="cls")
    with pytest.raises(ConfigError, match="lets no image_size be chosen; leave it out"):
        Timm("test_resnet", image_size=64)
    with pytest.raises(ConfigError, match=r"pretrained=True and weights=.*choose one"):
        Timm("test_vit", pretrained=True, weights=weights)


def test_unusable_weights_are_named(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"pos_embed \(1, 5, 64\) instead of \(1, 101, 64\)"):
        Timm("test_vit", weights=weights)
    file = weights / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read as weights"):
        Timm("test_vit", weights=weights, image_size=32)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors; name the weights file itself"):
        Timm("test_vit", weights=weights, image_size=32)
