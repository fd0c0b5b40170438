"""OpenClip against open_clip itself, with small random models."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from mmbridge.encoders import OpenClip
from mmbridge.encoders.openclip import SMALLEST_TEXT_TOWER
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.specs import ImageInput

TOWER = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8}
MODEL = {"embed_dim": 12, "vision_cfg": TOWER, "text_cfg": SMALLEST_TEXT_TOWER}
PREPROCESS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize_mode": "squash"}
X = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


@pytest.fixture(scope="module")
def clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**MODEL).eval()


@pytest.fixture
def folder(clip: open_clip.CLIP, tmp_path: Path) -> Path:
    save_file(clip.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESS}))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    return tmp_path


def test_pooled_output_is_encode_image(clip: open_clip.CLIP, folder: Path) -> None:
    encoder = OpenClip(str(folder), tokens="pooled")
    with torch.no_grad():
        expected = clip.encode_image(X)
    assert torch.equal(encoder(X), expected.unsqueeze(1))
    assert (encoder.spec.tokens, encoder.spec.dim) == (1, 12)


def test_patch_tokens_are_those_of_open_clip(clip: open_clip.CLIP, folder: Path) -> None:
    encoder = OpenClip(str(folder))
    clip.visual.output_tokens = True
    with torch.no_grad():
        _, expected = clip.visual(X)  # all tokens but the class token, after the final norm
    clip.visual.output_tokens = False
    assert torch.equal(encoder(X), expected)
    assert (encoder.spec.tokens, encoder.spec.dim) == (4, 16)


def test_folder_gives_preprocessing_and_manifest(folder: Path) -> None:
    encoder = OpenClip(str(folder))
    assert encoder.input == ImageInput(16, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), "squash")
    facts = encoder.describe()
    assert (facts["weights"], facts["licence"], len(facts["sha256"] or "")) == (str(folder), "mit", 64)


def test_weights_file_of_a_given_configuration(clip: open_clip.CLIP, folder: Path) -> None:
    file = str(folder / "open_clip_model.safetensors")
    encoder = OpenClip(MODEL, pretrained=file, tokens="pooled")
    with torch.no_grad():
        assert torch.equal(encoder(X), clip.encode_image(X).unsqueeze(1))
    assert encoder.describe()["weights"] == file


@pytest.mark.parametrize(
    ("name", "patch", "pooled"),
    [
        ("ViT-B-32", (49, 768), (1, 512)),
        ("RN50", (49, 2048), (1, 1024)),  # convolutional
        ("coca_ViT-B-32", (49, 768), (1, 512)),  # pools by attention
        ("ViT-B-16-SigLIP", (196, 768), (1, 768)),  # a timm trunk without class token
    ],
)
def test_built_in_models_of_every_family(name: str, patch: tuple[int, int], pooled: tuple[int, int]) -> None:
    with torch.device("meta"):
        specs = [OpenClip(name, tokens=tokens).spec for tokens in ("patch", "pooled")]
    assert [(spec.tokens, spec.dim) for spec in specs] == [patch, pooled]


def test_planning_reads_sizes_but_no_weights(folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    with torch.device("meta"):
        planned = [OpenClip(str(folder)), OpenClip("ViT-B-32", pretrained="laion2b_s34b_b79k")]
    assert [encoder.spec.tokens for encoder in planned] == [4, 49]
    assert planned[1].describe()["weights"] == "ViT-B-32:laion2b_s34b_b79k"


def test_wrong_names_are_answered_with_close_ones(folder: Path) -> None:
    with pytest.raises(ConfigError, match="open_clip has no model 'ViT-B-33'; did you mean 'ViT-B-32'"):
        OpenClip("ViT-B-33")
    with pytest.raises(
        ConfigError, match=r"'laion2b_s34b' is neither a weights file nor a tag .*did you mean 'laion2b_"
    ):
        OpenClip("ViT-B-32", pretrained="laion2b_s34b")
    with pytest.raises(ConfigError, match="tokens is 'cls' but must be 'patch' or 'pooled'"):
        OpenClip("ViT-B-32", tokens="cls")
    with pytest.raises(ConfigError, match="brings its own weights; leave out pretrained='openai'"):
        OpenClip(str(folder), pretrained="openai")


def test_unusable_weights_are_named(folder: Path) -> None:
    file = folder / "open_clip_model.safetensors"
    with pytest.raises(CheckpointError, match=r"could not load .*give the weights that belong to it"):
        OpenClip({**MODEL, "embed_dim": 10}, pretrained=str(file))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"could not load .*restore the folder"):
        OpenClip(str(folder))
    file.unlink()
    with pytest.raises(
        CheckpointError, match=r"is not an open_clip model: it needs open_clip_config\.json and weights"
    ):
        OpenClip(str(folder))
