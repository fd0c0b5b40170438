"""ImageBind's architecture: sizes, key names, modalities, text, clips, and learning."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from media.measured import example
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from mmbridge import media
from mmbridge.encoders import ImageBind, ImageBindConfig, ImageBindModel
from mmbridge.encoders.imagebind_modules import (
    AudioConfig,
    DepthConfig,
    ImuConfig,
    TextConfig,
    ThermalConfig,
    VisionConfig,
)
from mmbridge.errors import ConfigError, MediaError, ShapeError
from mmbridge.specs import AudioInput, DisparityInput, ImageInput, ImuInput, TokenSpec, VideoInput

CONFIG = ImageBindConfig(
    embed_dim=12,
    vision=VisionConfig(16, 2, 2, image_size=16, patch=8, video_clips=3, video_seconds=1.25, video_crops=1),
    text=TextConfig(16, 2, 2, vocabulary=20, context=7, sot=18, eot=19),
    audio=AudioConfig(16, 2, 2, patch=8, stride=6, mel_bins=20, frames=26, clips=2),
    depth=DepthConfig(16, 2, 2, image_size=16, patch=8),
    thermal=ThermalConfig(16, 2, 2, image_size=16, patch=8),
    imu=ImuConfig(16, 2, 2, kernel=4, steps=20),
)
INPUTS = {
    "image": (2, 3, 16, 16),
    "video": (2, 3, 3, 2, 16, 16),
    "audio": (2, 2, 1, 20, 26),
    "depth": (2, 1, 16, 16),
    "thermal": (2, 1, 16, 16),
    "imu": (2, 6, 20),
}
TOKENS = {"image": 4, "video": 4, "audio": 3 * 4, "depth": 4, "thermal": 4, "imu": 5}


@pytest.fixture
def model() -> ImageBindModel:
    torch.manual_seed(0)
    return ImageBindModel(CONFIG).eval()


def test_published_sizes_to_the_digit() -> None:
    with torch.device("meta"):
        huge = ImageBindModel(ImageBindConfig.huge())
    assert len(huge.state_dict()) == 1311
    counts = dict.fromkeys(huge.towers, 0)
    for name, parameter in huge.named_parameters():
        counts[name.split(".")[1]] += parameter.numel()
    assert {tower: round(count / 1e6, 1) for tower, count in counts.items()} == {
        "vision": 632.8,
        "text": 354.0,
        "audio": 86.2,
        "thermal": 86.2,
        "depth": 21.9,
        "imu": 19.6,
    }
    assert round(sum(counts.values()) / 1e6, 1) == 1200.8


def test_published_names_and_shapes_of_towers_that_have_their_own() -> None:
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape) for name, value in ImageBindModel(ImageBindConfig.huge()).state_dict().items()
        }
    expected = {
        "modality_preprocessors.vision.rgbt_stem.proj.1.weight": (1280, 3, 2, 14, 14),
        "modality_preprocessors.vision.pos_embedding_helper.pos_embed": (1, 257, 1280),
        "modality_preprocessors.text.pos_embed": (1, 77, 1024),
        "modality_preprocessors.text.mask": (77, 77),
        "modality_preprocessors.text.token_embedding.weight": (49408, 1024),
        "modality_preprocessors.audio.pos_embedding_helper.pos_embed": (1, 229, 768),
        "modality_preprocessors.depth.depth_stem.proj.weight": (384, 1, 16, 16),
        "modality_preprocessors.depth.depth_stem.norm_layer.weight": (384,),
        "modality_preprocessors.thermal.rgbt_stem.proj.weight": (768, 1, 16, 16),
        "modality_preprocessors.imu.pos_embed": (1, 251, 512),
        "modality_preprocessors.imu.imu_stem.proj.weight": (512, 48),
        "modality_trunks.vision.pre_transformer_layer.0.weight": (1280,),
        "modality_trunks.imu.blocks.5.attn.bias_k": (1, 1, 512),
        "modality_heads.text.proj.1.weight": (1024, 1024),
        "modality_heads.imu.3.weight": (1024, 512),
        "modality_postprocessors.text.1.log_logit_scale": (),
        "modality_postprocessors.depth.1.log_logit_scale": (),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert "modality_trunks.vision.blocks.0.attn.bias_k" not in shapes
    assert "modality_trunks.audio.pre_transformer_layer.0.weight" not in shapes
    assert "modality_postprocessors.vision.1.log_logit_scale" not in shapes


def test_published_encoders_announce_their_tokens_and_input() -> None:
    with torch.device("meta"):
        huge = {
            modality: ImageBind(modality, config=ImageBindConfig.huge()) for modality in ("image", "video", "audio")
        }
    assert {modality: encoder.spec.tokens for modality, encoder in huge.items()} == {
        "image": 256,
        "video": 256,
        "audio": 228,
    }
    assert huge["image"].spec.dim == 1024
    assert isinstance(huge["image"].input, ImageInput) and huge["image"].input.size == 224
    assert isinstance(huge["video"].input, VideoInput)
    assert (huge["video"].input.clips, huge["video"].input.frames, huge["video"].input.crops) == (5, 2, 3)
    assert huge["audio"].input == AudioInput(16000, 128, 204, 3, 2.0, -4.268, 9.138)


@pytest.mark.parametrize("modality", INPUTS)
@pytest.mark.parametrize("tokens", ["patch", "pooled"])
def test_every_modality_gives_its_spec(modality: str, tokens: str) -> None:
    encoder = ImageBind(modality, config=CONFIG, tokens=tokens)
    y = encoder(torch.randn(INPUTS[modality]))
    assert encoder.spec == TokenSpec(TOKENS[modality] if tokens == "patch" else 1, 12)
    assert y.shape == (2, encoder.spec.tokens, 12)
    if INPUTS[modality][1:] and modality not in ("video", "audio"):
        torch.testing.assert_close(y.norm(dim=-1), torch.ones(y.shape[:2]))
    else:
        assert (y.norm(dim=-1) < 1 + 1e-5).all()  # a mean of unit vectors


def test_media_are_prepared_as_the_tower_wants_them() -> None:
    config = ImageBindConfig(12, vision=CONFIG.vision, audio=AudioConfig(16, 1, 2))
    film = media.Video(torch.randint(0, 256, (8, 3, 30, 40), dtype=torch.uint8), 4.0)
    sound = media.Audio(torch.randn(22050) / 10, 11025)
    for modality, medium, shape in (("video", film, (3, 3, 2, 16, 16)), ("audio", sound, (3, 1, 128, 204))):
        encoder = ImageBind(modality, config=config)
        raw = encoder.prepare(medium)
        assert raw.shape == shape
        assert encoder(raw.unsqueeze(0)).shape == (1, encoder.spec.tokens, 12)


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("tokens", ["patch", "pooled"])
def test_clips_are_averaged_after_normalising_or_kept_in_order(modality: str, tokens: str) -> None:
    torch.manual_seed(0)
    mean = ImageBind(modality, config=CONFIG, tokens=tokens)
    torch.manual_seed(0)
    concat = ImageBind(modality, config=CONFIG, tokens=tokens, clips="concat")
    x = torch.randn(INPUTS[modality])
    each = torch.stack([mean(clip.unsqueeze(1)) for clip in x.unbind(1)], dim=1)  # (B, S, T, D)
    torch.testing.assert_close(each.norm(dim=-1), torch.ones(each.shape[:3]))
    torch.testing.assert_close(mean(x), each.mean(dim=1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(concat(x), each.flatten(1, 2), atol=1e-6, rtol=1e-5)
    assert concat.spec.tokens == each.shape[1] * each.shape[2]
    assert mean.fingerprint != concat.fingerprint


def test_a_picture_is_a_still_film(model: ImageBindModel) -> None:
    picture = torch.randn(2, 3, 16, 16)
    film = picture[:, None, :, None].expand(-1, 3, -1, 2, -1, -1)  # (B, clips, 3, frames, H, W)
    torch.testing.assert_close(model.embed("video", film), model.embed("image", picture))


def test_sensor_windows_do_not_overlap(model: ImageBindModel) -> None:
    x = torch.randn(1, 6, 20)
    moved = x.clone()
    moved[0, 3, 9] += 1  # step 9 lies in the third window of four steps
    change = (model.modality_preprocessors.imu(moved) - model.modality_preprocessors.imu(x)).abs().sum(-1)[0]
    assert (change > 1e-4).tolist() == [False, False, False, True, False, False]


def test_text_is_read_at_its_end_and_nothing_behind_counts(model: ImageBindModel) -> None:
    ids = torch.tensor([[18, 3, 4, 19, 0, 0, 0]])
    behind, before = ids.clone(), ids.clone()
    behind[0, 5] = 7
    before[0, 1] = 7
    torch.testing.assert_close(model.embed("text", behind), model.embed("text", ids))
    assert (model.embed("text", before) - model.embed("text", ids)).abs().max() > 1e-3
    torch.testing.assert_close(model.tokens("text", ids)[:, 3], model.embed("text", ids))


def test_tokenizer_file_beside_the_weights(tmp_path: Path) -> None:
    words = {word: number for number, word in enumerate(["?", "a", "red", "circle"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    ImageBindModel(CONFIG, tokenizer=tmp_path / "words.json").save_pretrained(tmp_path / "model")
    loaded = ImageBindModel.from_pretrained(tmp_path / "model", ("text",))
    assert loaded.tokenize(["a red circle", "red red red red red red red"]).tolist() == [
        [18, 1, 2, 3, 19, 0, 0],
        [18, 2, 2, 2, 2, 2, 19],
    ]


def test_published_vocabulary_is_clips() -> None:
    text = TextConfig(16, 1, 2)
    ids = ImageBindModel(ImageBindConfig(text=text)).tokenize(["a photo of a cat"])
    assert ids.shape == (1, 77)
    assert ids[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]


def test_a_vocabulary_of_its_own_needs_its_tokenizer(model: ImageBindModel) -> None:
    with pytest.raises(ConfigError, match=r"has 20 tokens but no tokenizer\.json"):
        model.tokenize(["red"])
    with pytest.raises(ConfigError, match="has no text tower"):
        ImageBindModel(ImageBindConfig(vision=CONFIG.vision)).tokenize(["red"])


def test_logit_scales(model: ImageBindModel) -> None:
    scales = {name: float(model.logit_scale(name)) for name in INPUTS}
    assert scales == pytest.approx({"image": 1, "video": 1, "audio": 20, "depth": 5, "thermal": 10, "imu": 5})
    assert model.logit_scale("text").requires_grad
    with torch.no_grad():
        model.modality_postprocessors.text[1].log_logit_scale.fill_(9.0)
    assert model.logit_scale("text").item() == pytest.approx(100)


def test_towers_learn_a_joint_space() -> None:
    torch.manual_seed(0)
    model = ImageBindModel(CONFIG, ("image", "text", "audio"))
    pictures, sounds = torch.randn(6, 3, 16, 16), torch.randn(6, 2, 1, 20, 26)
    texts = torch.tensor([[18, number, number + 6, 19, 0, 0, 0] for number in range(6)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        text = model.embed("text", texts)
        loss = sum(
            F.cross_entropy(10 * other @ text.T, torch.arange(6))
            for other in (model.embed("image", pictures), model.embed("audio", sounds))
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    named = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert named == {"modality_postprocessors.text.1.log_logit_scale"}
    for modality, x in (("image", pictures), ("audio", sounds)):
        matches = (model.embed(modality, x) @ model.embed("text", texts).T).argmax(dim=1)
        assert matches.tolist() == list(range(6))


@pytest.mark.parametrize(
    ("modality", "shape", "words"),
    [
        ("image", (1, 3, 20, 20), r"vision tower takes \(B, 3, 16, 16\).*given \(1, 3, 20, 20\)"),
        ("audio", (1, 2, 1, 20, 30), r"audio tower takes \(B, 1, 20, 26\)"),
        ("imu", (1, 6, 21), r"imu tower takes \(B, 6, 20\)"),
        ("text", (1, 8), r"takes ids of shape \(B, 7\) but was given \(1, 8\)"),
    ],
)
def test_wrong_shapes_are_named(model: ImageBindModel, modality: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        model.embed(modality, torch.zeros(shape, dtype=torch.long if modality == "text" else torch.float))


def test_depth_maps_and_traces_are_read_from_media() -> None:
    depth, imu = ImageBind("depth", config=CONFIG), ImageBind("imu", config=CONFIG)
    assert depth.input == DisparityInput(16) and imu.input == ImuInput(400.0, 20)
    for encoder in (depth, imu):
        x = encoder.prepare(example(encoder.modality))
        assert x[None].shape == (1, *INPUTS[encoder.modality][1:])
        assert encoder(x[None]).shape == (1, encoder.spec.tokens, encoder.spec.dim)
    assert ImuConfig().steps / ImuConfig().sample_rate == 5.0  # seconds, as in the paper


def test_wrong_arguments_are_named(model: ImageBindModel) -> None:
    with pytest.raises(ConfigError, match="no modality 'imagee'; did you mean 'image'"):
        ImageBind("imagee", config=CONFIG)
    with pytest.raises(ConfigError, match=r"have no audio tower.*they have: vision"):
        ImageBind("audio", config=ImageBindConfig(vision=CONFIG.vision))
    with pytest.raises(ConfigError, match="tokens is 'cls' but must be 'patch' or 'pooled'"):
        ImageBind("image", config=CONFIG, tokens="cls")
    with pytest.raises(ConfigError, match="clips is 'max' but must be 'mean' or 'concat'"):
        ImageBind("video", config=CONFIG, clips="max")
    with pytest.raises(ConfigError, match=r"needs weights .* or, for random weights, a config"):
        ImageBind("image")
    with pytest.raises(ConfigError, match=r"for text use ImageBindModel\.embed"):
        ImageBind("text", config=CONFIG)
    with pytest.raises(ConfigError, match="built with the towers audio, not with 'vision'"):
        ImageBindModel(CONFIG, ("audio",)).embed("image", torch.zeros(1, 3, 16, 16))
    with pytest.raises(MediaError, match="can't read thermal files; it takes tensors"):
        ImageBind("thermal", config=CONFIG).prepare(torch.zeros(1, 16, 16))


def test_configuration_is_checked_and_survives_json() -> None:
    assert ImageBindConfig.from_dict(CONFIG.to_dict()) == CONFIG
    listed = {"embed_dim": 12, "vision": {"mean": [0.5, 0.5, 0.5]}}  # JSON has lists, not tuples
    assert ImageBindConfig.from_dict(listed).vision == VisionConfig(mean=(0.5, 0.5, 0.5))
    with pytest.raises(ConfigError, match=r"no key 'vision\.image_sise'; did you mean 'image_size'"):
        ImageBindConfig.from_dict({"vision": {"image_sise": 3}})
    with pytest.raises(ConfigError, match="no key 'visoin'; did you mean 'vision'"):
        ImageBindConfig.from_dict({"visoin": {}})
    with pytest.raises(ConfigError, match="vision tower: image_size=30 is not a multiple of patch=8"):
        ImageBindConfig(vision=VisionConfig(16, 2, 2, image_size=30, patch=8))
    with pytest.raises(ConfigError, match="dim=16 is not a multiple of heads=3"):
        ImageBindConfig(text=TextConfig(16, 2, 3))
