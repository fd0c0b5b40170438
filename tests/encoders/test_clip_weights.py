"""A plain CLIP as the universal encoder: the same tokens as in transformers and in open_clip, or an error that says so."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig, CLIPVisionModel

from mmbridge.encoders import UniversalConfig, UniversalEncoder
from mmbridge.encoders.clip import read_clip, sizes_of
from mmbridge.errors import CheckpointError, ConfigError

SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
TOWER = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 4, "mlp_ratio": 1.5}
SMALL_TEXT = {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1}
X = torch.linspace(-2, 2, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).sin()
Tokens = Callable[[Tensor], Tensor]


def disturb(module: nn.Module) -> Any:
    """Move every parameter away from its start, where norms do nothing and biases are 0."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.eval()


def of_transformers(folder: Path, activation: str = "quick_gelu", whole: bool = False) -> Tokens:
    """Save a model, the picture tower alone or with its text tower; return all its tokens after the last norm."""
    if whole:
        text = {
            "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8
        }  # fmt: skip
        model = disturb(CLIPModel(CLIPConfig(text_config=text, vision_config={**SIZES, "hidden_act": activation})))
        tower = model.vision_model
    else:
        model = disturb(CLIPVisionModel(CLIPVisionConfig(**SIZES, hidden_act=activation)))
        tower = getattr(model, "vision_model", model)
    model.save_pretrained(folder)
    return lambda x: tower.post_layernorm(tower(x).last_hidden_state)


def of_open_clip(folder: Path, activation: str = "quick_gelu", safe: bool = True, **preprocess: Any) -> Tokens:
    config = {"embed_dim": 12, "vision_cfg": TOWER, "quick_gelu": activation == "quick_gelu"}
    model = disturb(open_clip.CLIP(**config, text_cfg=SMALL_TEXT))
    facts = {"model_cfg": {**config, "text_cfg": SMALL_TEXT}, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(facts))
    if safe:
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    else:
        torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    visual = model.visual
    return lambda x: visual.ln_post(visual.transformer(visual._embeds(x)))


WRITERS = {
    "transformers": of_transformers,
    "transformers, both towers": lambda folder, activation="quick_gelu": of_transformers(folder, activation, True),
    "open_clip": of_open_clip,
    "open_clip, pickled": lambda folder, activation="quick_gelu": of_open_clip(folder, activation, safe=False),
}


@torch.no_grad()
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("writer", WRITERS)
def test_all_tokens_are_the_librarys(writer: str, activation: str, tmp_path: Path) -> None:
    wanted = WRITERS[writer](tmp_path, activation)(X)
    encoder = UniversalEncoder("image", tmp_path)
    assert wanted.std() > 0.5 and wanted.shape == (2, 5, 16)
    torch.testing.assert_close(encoder(X), wanted, atol=1e-5, rtol=1e-5)
    assert (encoder.sizes.activation, encoder.spec.tokens, encoder.spec.dim) == (activation, 5, 16)
    assert encoder.describe()["sha256"] and not any(value.requires_grad for value in encoder.parameters())
    other = UniversalEncoder(
        "image", config=replace(encoder.sizes, activation={"gelu": "quick_gelu"}.get(activation, "gelu"))
    )
    other.load_state_dict(encoder.state_dict())
    assert (other(X) - wanted).abs().max() > 1e-2  # the two activations can be told apart here


@torch.no_grad()
def test_videos_and_maps_share_the_transformer_and_weights_in_half_precision_are_read(tmp_path: Path) -> None:
    tokens = of_transformers(tmp_path)
    state = {name: value.half() for name, value in load_file(tmp_path / "model.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    image, video, depth = (UniversalEncoder(modality, str(tmp_path)) for modality in ("image", "video", "depth"))
    assert image.transformer is video.transformer is depth.transformer
    assert {value.dtype for value in image.parameters()} == {torch.float32}
    torch.testing.assert_close(image(X), tokens(X), atol=2e-2, rtol=0)
    torch.testing.assert_close(video(X.unsqueeze(0)), image(X).mean(0, keepdim=True))


def test_a_file_of_another_spelling_is_read(tmp_path: Path) -> None:
    wanted = of_transformers(tmp_path)(X).detach()
    state = {
        name.removeprefix("vision_model."): value for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    state = {name.replace("pre_layrnorm", "pre_layernorm"): value for name, value in state.items()}
    assert any("pre_layernorm" in name for name in state)
    state["embeddings.position_ids"] = torch.arange(5).unsqueeze(0)  # in files of older versions
    save_file({f"vision_model.{name}": value for name, value in state.items()}, tmp_path / "model.safetensors")
    torch.testing.assert_close(UniversalEncoder("image", tmp_path)(X), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("writer", ["transformers", "open_clip"])
@pytest.mark.parametrize("changed", [{"activation": "gelu"}, {"heads": 2}])
def test_tokens_that_differ_from_the_librarys_are_refused(writer: str, changed: dict[str, Any], tmp_path: Path) -> None:
    WRITERS[writer](tmp_path)
    UniversalEncoder("image", tmp_path)
    with pytest.raises(
        CheckpointError, match=r"compute other tokens here, with heads=.* off by 0\.\d+ of the largest, where 0.001"
    ):
        UniversalEncoder("image", tmp_path, config=changed)


def test_a_library_that_computes_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_open_clip(tmp_path)
    whole = nn.MultiheadAttention.__init__

    def sequence_first(self: nn.MultiheadAttention, *arguments: Any, **options: Any) -> None:
        whole(self, *arguments, **{**options, "batch_first": False})

    monkeypatch.setattr(nn.MultiheadAttention, "__init__", sequence_first)  # as open_clip's blocks once were
    with pytest.raises(CheckpointError, match="compute other tokens here"):
        read_clip(tmp_path)
    monkeypatch.undo()
    config, tensors = read_clip(tmp_path)
    assert (config.dim, config.depth, config.heads, config.dim_feedforward) == (16, 2, 4, 24)
    assert len(tensors) == 7 + 2 * 12 and tensors["tokenizers.image.positions"].shape == (5, 16)


@torch.no_grad()
@pytest.mark.parametrize("writer", ["transformers", "open_clip"])
def test_another_picture_size_interpolates_positions_once(writer: str, tmp_path: Path) -> None:
    WRITERS[writer](tmp_path)
    small, large = (
        UniversalEncoder("image", tmp_path),
        UniversalEncoder("image", tmp_path, config={"image": {"image_size": 32}}),
    )
    assert large.input.size == 32 and large.spec.tokens == 17
    table = small.tokenizer.positions[1:].T.reshape(1, 16, 2, 2)
    wanted = nn.functional.interpolate(table, (4, 4), mode="bicubic")[0].flatten(1).T
    torch.testing.assert_close(large.tokenizer.positions[1:], wanted)
    assert torch.equal(large.tokenizer.positions[0], small.tokenizer.positions[0])
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(large(x), small(x))


@torch.no_grad()
def test_the_universal_encoders_own_weights_take_other_lengths_too(tmp_path: Path) -> None:
    config = {"dim": 16, "depth": 1, "heads": 2, "dim_feedforward": 32, "imu": {"kernel": 4, "steps": 10}}
    own = UniversalEncoder("imu", config=config)
    tensors = {f"transformer.{name}": value for name, value in own.transformer.state_dict().items()}
    tensors |= {f"tokenizers.imu.{name}": value for name, value in own.tokenizer.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    longer = UniversalEncoder("imu", tmp_path, config={**config, "imu": {"kernel": 4, "steps": 24}})
    x = torch.randn(2, 6, 24)
    assert longer.spec.tokens == 22
    torch.testing.assert_close(longer(x), own(x))


def test_mean_and_deviation_are_those_beside_the_weights(tmp_path: Path) -> None:
    of_transformers(tmp_path)
    usual = UniversalEncoder("image", tmp_path).input
    assert usual.mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]})
    )
    assert UniversalEncoder("image", tmp_path).input.mean == (0.1, 0.2, 0.3)
    of_open_clip(tmp_path, mean=[0.5, 0.5, 0.5], std=[0.2, 0.3, 0.4])  # beside the other: open_clip's goes first
    found = UniversalEncoder("image", tmp_path).input
    assert (found.mean, found.std) == ((0.5, 0.5, 0.5), (0.2, 0.3, 0.4))


def test_other_tokenizers_have_published_sizes_or_those_of_the_config(tmp_path: Path) -> None:
    of_transformers(tmp_path)
    published = UniversalConfig.published()
    found = sizes_of(tmp_path)
    assert (found.audio, found.pointcloud, found.imu, found.fmri, found.dim) == (
        published.audio, published.pointcloud, published.imu, published.fmri, 16
    )  # fmt: skip
    given = sizes_of(tmp_path, {"imu": {"steps": 50}})
    assert given.imu is not None and given.imu.steps == 50 and given.audio is None and given.dim == 16
    with torch.device("meta"):
        (tmp_path / "model.safetensors").rename(tmp_path / "away")
        assert UniversalEncoder("audio", tmp_path).spec.tokens == 1213
    (tmp_path / "away").rename(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tokenizers\.imu\.\*, do not fit: 2 missing"):
        UniversalEncoder("imu", tmp_path, config={"imu": {"steps": 50}})
    with pytest.raises(ConfigError, match="no tokenizer 'fmri'"):
        UniversalEncoder("fmri", tmp_path, config={"imu": {"steps": 50}})


def test_folders_that_hold_no_such_clip_are_one_sentence(tmp_path: Path) -> None:
    of_transformers(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    key = next(name for name in state if name.endswith("layers.1.mlp.fc2.weight"))
    save_file({name: value for name, value in state.items() if name != key}, file)
    with pytest.raises(CheckpointError, match=r"do not fit: 1 missing: blocks\.1\.mlp\.fc2\.weight"):
        UniversalEncoder("image", tmp_path)
    save_file({**state, key.replace("fc2", "fc3"): state[key].clone()}, file)
    with pytest.raises(CheckpointError, match=r"in transformers, do not fit: 1 unexpected"):
        UniversalEncoder("image", tmp_path)
    file.write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="can't be read as weights"):
        UniversalEncoder("image", tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin; add the weights"):
        UniversalEncoder("image", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**facts, "model_type": "siglip"}))
    with pytest.raises(CheckpointError, match=r"holds a 'siglip', but the universal encoder reads CLIP"):
        UniversalEncoder("image", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**facts, "hidden_act": "gelu_new"}))
    with pytest.raises(ConfigError, match="no activation 'gelu_new'"):
        UniversalEncoder("image", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**facts, "patch_size": 5}))
    with pytest.raises(CheckpointError, match="pictures of 16 in patches of 5"):
        UniversalEncoder("image", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no CLIP: neither"):
        read_clip(tmp_path)
    layers = {"model_cfg": {"embed_dim": 8, "vision_cfg": {**TOWER, "layers": [1, 1, 1, 1]}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(layers))
    with pytest.raises(CheckpointError, match="is no vision transformer of open_clip's own"):
        UniversalEncoder("image", tmp_path)
