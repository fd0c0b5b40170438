"""The universal encoder against transformers' CLIP and against loops that follow the description of each tokenizer."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from media.measured import example, noise, picture
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from mmbridge import media
from mmbridge.encoders import UniversalConfig, UniversalEncoder
from mmbridge.encoders.tokenizers import farthest_points, nearest_points
from mmbridge.errors import CheckpointError, ConfigError, MediaError, ShapeError
from mmbridge.specs import FmriInput, ImuInput, MapInput, PointsInput

CONFIG = {
    "dim": 16, "depth": 2, "heads": 2, "dim_feedforward": 32,
    "image": {"patch": 8, "image_size": 16},
    "audio": {"patch": 4, "stride": 3, "mel_bins": 10, "frames": 16},
    "pointcloud": {"groups": 5, "neighbours": 4, "points": 40},
    "imu": {"kernel": 4, "steps": 10},
    "fmri": {"voxels": 11, "tokens": 3},
}  # fmt: skip
SHAPES = {
    "image": (3, 16, 16), "video": (3, 3, 16, 16), "depth": (2, 3, 16, 16), "normal": (2, 3, 16, 16), "audio": (1, 10, 16),
    "pointcloud": (40, 6), "imu": (6, 10), "fmri": (1, 11),
}  # fmt: skip
TOKENS = {"audio": 3 * 5, "pointcloud": 5, "imu": 7, "fmri": 3}


def make(modality: str, **options) -> UniversalEncoder:
    torch.manual_seed(0)
    encoder = UniversalEncoder(modality, config=CONFIG, **options)
    with torch.no_grad():
        for parameter in encoder.parameters():  # none of which is at its start
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder


def clip_of(encoder: UniversalEncoder) -> CLIPVisionModel:
    """The same weights in transformers' CLIP."""
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        hidden_act="quick_gelu",
    )  # fmt: skip
    clip = CLIPVisionModel(config).eval()
    state = {}
    for name, tensor in encoder.transformer.state_dict().items():
        for ours, theirs in (
            ("class_embedding", "embeddings.class_embedding"), ("norm_in", "pre_layrnorm"), ("norm_out", "post_layernorm"),
            ("blocks.", "encoder.layers."), ("norm_attention", "layer_norm1"), ("norm_mlp", "layer_norm2"),
            ("attention.", "self_attn."),
        ):  # fmt: skip
            name = name.replace(ours, theirs)
        if ".in_proj_" in name:
            for part, piece in zip("qkv", tensor.chunk(3), strict=True):
                state[name.replace("in_proj_", f"{part}_proj.")] = piece
        else:
            state[name] = tensor
    if encoder.kind == "image":
        state["embeddings.patch_embedding.weight"] = encoder.tokenizer.projection.weight
        state["embeddings.position_embedding.weight"] = encoder.tokenizer.positions
    inner = getattr(clip, "vision_model", clip)
    unfilled, unknown = inner.load_state_dict(state, strict=False)
    assert not unknown and all(name.startswith("embeddings.p") for name in unfilled)
    return inner


def through_clip(encoder: UniversalEncoder, tokens: Tensor) -> Tensor:
    clip = clip_of(encoder)
    first = encoder.transformer.class_embedding.expand(len(tokens), 1, -1)
    sequence = torch.cat([first, tokens], dim=1) + encoder.tokenizer.positions
    hidden = clip.encoder(inputs_embeds=clip.pre_layrnorm(sequence)).last_hidden_state
    return clip.post_layernorm(hidden)


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("modality", ["image", "video", "depth", "normal"])
def test_pictures_and_frames_equal_clip_with_its_last_norm_on_all_tokens(modality: str) -> None:
    encoder, x = make(modality), torch.randn(2, *SHAPES[modality])
    clip = clip_of(encoder)
    frames = x.unsqueeze(1) if modality == "image" else x
    wanted = torch.stack([clip.post_layernorm(clip(frame).last_hidden_state) for frame in frames.unbind(1)]).mean(0)
    assert wanted.abs().mean() > 0.1
    assert_equal(encoder(x), wanted)
    assert wanted.shape[1:] == (encoder.spec.tokens, encoder.spec.dim)


def patches(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """Overlapping patches one by one, frequency outermost."""
    size = weight.shape[-1]
    return torch.stack(
        [
            torch.einsum("chw,dchw->d", x[:, top : top + size, left : left + size], weight) + bias
            for top in range(0, x.shape[1] - size + 1, stride)
            for left in range(0, x.shape[2] - size + 1, stride)
        ]
    )


def grouped(cloud: Tensor, weight: Tensor, bias: Tensor, coordinates: list[int]) -> Tensor:
    """Farthest points, their neighbours and the largest values of each group, point by point in Python."""
    places = cloud[:, coordinates].tolist()

    def distance(one: list[float], other: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))

    centres = [0]
    while len(centres) < 5:
        apart = [min(distance(place, places[centre]) for centre in centres) for place in places]
        centres.append(apart.index(max(apart)))
    tokens = []
    for centre in centres:
        nearest = sorted(range(len(places)), key=lambda index: distance(places[index], places[centre]))[:4]
        tokens.append((cloud[nearest] @ weight.flatten(1).T + bias).max(0).values)
    return torch.stack(tokens)


@torch.no_grad()
@pytest.mark.parametrize("modality", TOKENS)
def test_other_tokenizers_equal_their_descriptions(modality: str) -> None:
    encoder, x = make(modality), torch.randn(2, *SHAPES[modality])
    projection = encoder.tokenizer.projection
    weight, bias = projection.weight, projection.bias
    match modality:
        case "audio":
            tokens = torch.stack([patches(one, weight, bias, stride=3) for one in x])
        case "pointcloud":
            tokens = torch.stack([grouped(cloud, weight, bias, [0, 1, 2]) for cloud in x])
        case "imu":
            windows = [torch.einsum("bcs,dcs->bd", x[:, :, step : step + 4], weight) for step in range(7)]
            tokens = torch.stack(windows, dim=1)
        case _:
            whole = x[:, 0] @ weight.T + bias
            tokens = torch.stack([whole[:, [channel * 3 + t for channel in range(16)]] for t in range(3)], dim=1)
    assert tokens.shape[1] == TOKENS[modality]
    assert_equal(encoder(x), through_clip(encoder, tokens))


@torch.no_grad()
def test_a_hidden_layer_of_motion_equals_its_description() -> None:
    plain, config = make("imu"), CONFIG | {"imu": {"kernel": 4, "steps": 10, "hidden": 12}}
    torch.manual_seed(0)
    encoder, x = UniversalEncoder("imu", config=config), torch.randn(2, *SHAPES["imu"])
    first, last = encoder.tokenizer.projection[0], encoder.tokenizer.projection[-1]
    assert first.weight.shape == (12, 6, 4) and last.weight.shape == (16, 12, 1)
    windows = [torch.einsum("bcs,hcs->bh", x[:, :, step : step + 4], first.weight) + first.bias for step in range(7)]
    tokens = [F.gelu(window) @ last.weight[..., 0].T + last.bias for window in windows]
    assert_equal(encoder(x), through_clip(encoder, torch.stack(tokens, dim=1)))
    assert encoder.spec == plain.spec and encoder.fingerprint != plain.fingerprint
    with pytest.raises(ShapeError, match=r"readings are \(B, 6, at least 4\)"):
        encoder(x[:, :5])


@torch.no_grad()
def test_points_can_be_grouped_by_colour_as_published() -> None:
    x = torch.randn(2, 40, 6)
    encoder = make("pointcloud", coordinates=(3, 4, 5))
    projection = encoder.tokenizer.projection
    tokens = torch.stack([grouped(cloud, projection.weight, projection.bias, [3, 4, 5]) for cloud in x])
    assert_equal(encoder(x), through_clip(encoder, tokens))
    plain = make("pointcloud")
    assert (plain(x) - encoder(x)).abs().max() > 1e-2
    assert plain.fingerprint != encoder.fingerprint
    one_colour = torch.cat([x[..., :3], torch.ones(2, 40, 3)], dim=-1)  # all groups are then the same points
    groups = encoder.tokenizer.tokenize(one_colour)[0]
    assert torch.equal(groups, groups[:, :1].expand_as(groups))


def test_ties_go_to_the_lowest_index() -> None:
    grid = torch.tensor([[float(x), float(y)] for x in range(4) for y in range(4)] * 2).unsqueeze(0)
    assert farthest_points(grid, 5).tolist() == [[0, 15, 3, 12, 5]]
    near = nearest_points(grid, grid[:, [5]], 7)[0, 0].tolist()
    assert near == [5, 21, 1, 4, 6, 9, 17]


def test_fewer_points_than_groups_are_all_centres() -> None:
    assert make("pointcloud")(torch.randn(2, 3, 6)).shape == (2, 4, 16)


@pytest.mark.parametrize(
    ("modality", "shape", "sizes"),
    [
        ("image", (3, 32, 32), {"image_size": 32}),
        ("audio", (1, 10, 31), {"frames": 31}),
        ("imu", (6, 24), {"steps": 24}),
    ],
)
def test_other_lengths_get_interpolated_positions(modality: str, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    encoder, x = make(modality), torch.randn(2, *shape)
    longer = UniversalEncoder(modality, config={**CONFIG, modality: {**CONFIG[modality], **sizes}})
    axes = {"image": (2, 2), "audio": (3, 5), "imu": (7,)}[modality]
    grid = {"image": (4, 4), "audio": (3, 10), "imu": (21,)}[modality]
    positions = encoder.tokenizer.positions
    table = positions[1:].T.reshape(1, 16, *axes)
    wanted = torch.nn.functional.interpolate(table, grid, mode="linear" if modality == "imu" else "bicubic")
    state = encoder.state_dict()
    state["tokenizer.positions"] = torch.cat([positions[:1], wanted[0].flatten(1).T])
    longer.load_state_dict(state)
    assert_equal(encoder(x), longer(x))
    assert encoder(x).shape[1] == longer.spec.tokens > encoder.spec.tokens


def test_clips_of_prepared_videos_and_sounds_are_averaged() -> None:
    video, x = make("video"), torch.randn(2, 3, 3, 1, 16, 16)
    assert torch.equal(video(x), video(x[:, :, :, 0]))
    audio, x = make("audio"), torch.randn(2, 3, 1, 10, 16)
    assert_equal(audio(x), torch.stack([audio(x[:, clip]) for clip in range(3)]).mean(0))


def test_published_sizes_and_inputs() -> None:
    with torch.device("meta"):
        encoders = {modality: UniversalEncoder(modality, config=UniversalConfig.published()) for modality in SHAPES}
    tokens = {modality: encoder.spec.tokens for modality, encoder in encoders.items()}
    assert tokens == {
        "image": 257, "video": 257, "depth": 257, "normal": 257, "audio": 1213, "pointcloud": 1025, "imu": 392, "fmri": 9
    }  # fmt: skip
    assert sum(value.numel() for value in encoders["image"].parameters()) == 303_179_776  # without CLIP's projection
    inputs = {modality: encoder.input for modality, encoder in encoders.items()}
    assert inputs["image"].size == inputs["video"].size == 224
    assert (inputs["video"].clips, inputs["video"].frames, inputs["video"].crops) == (5, 1, 3)
    assert (inputs["audio"].clips, inputs["audio"].mel_bins, inputs["audio"].frames) == (1, 128, 1024)
    assert inputs["depth"] == inputs["normal"] == MapInput(inputs["image"])
    assert inputs["pointcloud"] == PointsInput(8192, 6, (0, 1, 2))
    assert inputs["imu"] == ImuInput(200.0, 400) and inputs["fmri"] == FmriInput(15724)
    sound = media.Audio(torch.sin(torch.arange(16000 * 11) / 9) / 2, 16000)
    prepared = encoders["audio"].prepare(sound)
    assert prepared.shape == (1, 1, 128, 1024)
    assert prepared[0, 0, :, -1].std() > 0  # the last frame holds sound, not filling


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    encoders = [make(modality) for modality in ("image", "audio", "imu")]
    tensors = {f"transformer.{name}": value for name, value in encoders[0].transformer.state_dict().items()}
    for encoder in encoders:
        tensors |= {f"tokenizers.{encoder.kind}.{key}": v for key, v in encoder.tokenizer.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({key: CONFIG[key] for key in list(CONFIG)[:6]} | {"imu": CONFIG["imu"]})
    )
    return tmp_path


def test_encoders_of_one_folder_have_one_transformer_in_memory(folder: Path) -> None:
    image, video, imu = (UniversalEncoder(modality, folder) for modality in ("image", "video", "imu"))
    assert image.transformer is video.transformer is imu.transformer
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(image(x), make("image")(x)) and torch.equal(video(x.unsqueeze(1)), image(x))
    assert image.fingerprint != video.fingerprint
    assert image.describe()["weights"] == str(folder) and len(image.describe()["sha256"] or "") == 64
    assert not any(parameter.requires_grad for parameter in image.parameters())
    with torch.device("meta"):
        planned = [UniversalEncoder(modality, folder) for modality in ("imu", "image")]
    assert planned[0].spec == imu.spec and planned[0].transformer is planned[1].transformer is not imu.transformer


def test_faults_are_one_sentence(folder: Path) -> None:
    with pytest.raises(ConfigError, match="no modality 'picture'"):
        make("picture")
    with pytest.raises(ConfigError, match=r"needs weights .* or, for random weights, a config"):
        UniversalEncoder("image")
    with pytest.raises(ConfigError, match=r"no key 'image\.pach'; did you mean 'patch'"):
        UniversalEncoder("image", config={"image": {"pach": 3}})
    with pytest.raises(ConfigError, match="no tokenizer 'fmri', which reads 'fmri'; it has image, audio, imu"):
        UniversalEncoder("fmri", folder)
    with pytest.raises(ConfigError, match=r"heads=3; take a divisor"):
        UniversalConfig(dim=16, heads=3)
    with pytest.raises(ConfigError, match="no activation 'gelo'; did you mean 'gelu'"):
        UniversalConfig(activation="gelo")
    with pytest.raises(ConfigError, match=r"coordinates=\(6,\) are not channels"):
        make("pointcloud", coordinates=(6,))
    with pytest.raises(CheckpointError, match=r"transformer\.\*, do not fit: 12 missing"):
        UniversalEncoder("image", folder, config={**CONFIG, "depth": 3})
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="can't be read as safetensors"):
        UniversalEncoder("image", folder)


@pytest.mark.parametrize(
    ("modality", "shape", "sentence"),
    [
        ("image", (2, 3, 3, 16, 16), r"'image' is \(B, 3, H, W\), not"),
        ("image", (2, 1, 16, 16), r"maps are \(B, 3, at least 8, at least 8\)"),
        ("depth", (2, 3, 16, 16), "'depth' is the picture and its map"),
        ("normal", (2, 3, 3, 16, 16), "'normal' is the picture and its map"),
        ("audio", (2, 1, 3, 16), "maps are .* at least 4"),
        ("pointcloud", (2, 40, 3), "clouds are .* 6"),
        ("imu", (2, 5, 10), r"readings are \(B, 6, at least 4\)"),
        ("fmri", (2, 1, 12), r"\(B, 11\) or \(B, 1, 11\)"),
    ],
)
def test_inputs_of_another_shape_are_one_sentence(modality: str, shape: tuple[int, ...], sentence: str) -> None:
    with pytest.raises(ShapeError, match=sentence):
        make(modality)(torch.randn(math.prod(shape)).view(shape))


def written(modality: str) -> Any:
    """A medium whose shape fits no tokenizer as it is, but for the voxels."""
    if modality == "image":
        return picture(20, 28)
    if modality == "video":
        return media.Video(picture(20, 28).pixels.expand(9, -1, -1, -1), 3.0)
    if modality == "audio":
        return media.Audio(noise(8000).clamp(-1, 1), 8000)
    medium = example(modality)
    if modality in ("depth", "normal"):
        medium.picture = picture(24, 32)
    return medium


@pytest.mark.parametrize("modality", SHAPES)
def test_media_of_every_modality_are_encoded(modality: str) -> None:
    encoder = make(modality)
    x = encoder.prepare(written(modality))
    assert x.shape == encoder.input.shape
    tokens = encoder(x[None])
    assert tokens.shape == (1, encoder.spec.tokens, encoder.spec.dim) and tokens.isfinite().all()
    assert encoder.fingerprint != make("image" if modality != "image" else "video").fingerprint


def test_media_that_an_encoder_can_not_read_are_one_sentence() -> None:
    for modality in ("depth", "normal"):
        with pytest.raises(MediaError, match=f"a {modality} map can't be encoded without the picture of the same view"):
            make(modality).prepare(example(modality))
    grey = media.PointCloud(torch.cat([noise(40, 3), torch.full((40, 3), 0.5)], dim=1))
    assert make("pointcloud").prepare(grey).shape == (40, 6)
    with pytest.raises(MediaError, match=r"of one colour, and this encoder groups points by channels \(3, 4, 5\)"):
        make("pointcloud", coordinates=(3, 4, 5)).prepare(grey)
    with pytest.raises(MediaError, match="has 12 voxels, and the encoder reads 11"):
        make("fmri").prepare(media.Fmri(noise(12)))
