"""The universal encoder's tokenizers as parts that train, tubelets, frames in a row, and points that are drawn."""

import json

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from mmbridge import Bridge, backbones, inputs, projections
from mmbridge.data.tasks import render_medium
from mmbridge.encoders import UniversalEncoder
from mmbridge.encoders.tokenizers import farthest_points
from mmbridge.errors import CheckpointError, ConfigError, ShapeError
from mmbridge.sequence import collate
from mmbridge.synthetic import Scene
from mmbridge.training.freezing import freeze

SIZES = {"dim": 16, "depth": 1, "heads": 2, "dim_feedforward": 32, "activation": "gelu"}
CONFIG = {
    **SIZES, "image": {"patch": 8, "image_size": 16, "video_clips": 3, "video_crops": 1},
    "imu": {"kernel": 8, "stride": 4, "steps": 40, "sample_rate": 100.0},
    "pointcloud": {"groups": 6, "neighbours": 8, "points": 64},
}  # fmt: skip
SCENE = Scene("star", "red", "large", "centre", "left")
MIXTURE = {"num_tokens": 2, "dim_hidden": 16, "num_experts": 2, "depth": 1, "num_heads": 2, "dim_feedforward": 16}


def way(modality, trains="tokenizer", config=CONFIG, **options):
    torch.manual_seed(3)
    encoder = UniversalEncoder(modality, config=config, trains=trains, **options)
    return inputs.Encoded(encoder, projections.MixtureOfExperts(**MIXTURE, experts="experts"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return backbones.CausalLM(tiny.llama(tmp_path_factory.mktemp("llama")), template="plain")


def losses_of(bridge, modality):
    medium = {"type": modality, "data": render_medium(modality, SCENE, 1)}
    dialogue = [
        {"role": "user", "content": [medium, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "It is red."},
    ]
    return bridge(collate(bridge.prepare([dialogue], targets=True)))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder with a transformer and no tokenizer."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    transformer = UniversalEncoder("imu", config=CONFIG).transformer.state_dict()
    save_file({f"transformer.{name}": value for name, value in transformer.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return str(folder)


def from_files(modality, weights, trains):
    encoder = UniversalEncoder(modality, weights, trains=trains)
    return inputs.Encoded(encoder, projections.MixtureOfExperts(**MIXTURE, experts="experts"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with the tokenizer of pictures alone, and a picture in grey with what it gives."""
    folder = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    grey = torch.rand(2, 1, 16, 16)
    encoder = UniversalEncoder("image", config=CONFIG)
    torch.nn.init.normal_(encoder.tokenizer.positions)
    state = {f"transformer.{name}": value for name, value in encoder.transformer.state_dict().items()}
    state |= {f"tokenizers.image.{name}": value for name, value in encoder.tokenizer.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder, grey, encoder(grey.expand(-1, 3, -1, -1))


def test_a_new_map_with_one_channel_starts_as_a_picture_in_grey(pictures):
    folder, grey, wanted = pictures
    same = {"audio": {"patch": 8, "stride": 8, "mel_bins": 16, "frames": 16}}
    torch.testing.assert_close(UniversalEncoder("audio", folder, same, trains="tokenizer").encode(grey), wanted)
    longer = {"audio": {**same["audio"], "stride": 4}}  # positions are then interpolated
    assert UniversalEncoder("audio", folder, longer, trains="tokenizer").encode(grey).shape == (2, 10, 16)
    other = {"audio": {"patch": 4, "stride": 4, "mel_bins": 16, "frames": 16}}
    assert UniversalEncoder("audio", folder, other, trains="tokenizer").encode(grey).shape == (2, 17, 16)


def test_points_that_are_drawn_start_as_pictures_whatever_their_height(pictures):
    folder, grey, wanted = pictures
    sizes = {
        "groups": 4,
        "neighbours": 8,
        "points": 64,
        "patch": 8,
        "image_size": 16,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
    }
    encoder = UniversalEncoder("pointcloud", folder, {"pointcloud": sizes}, trains="tokenizer")
    patches = F.unfold(grey, 8, stride=8).transpose(1, 2).unsqueeze(-1)  # (B, 4, 64, 1)
    drawn = torch.cat([patches.expand(-1, -1, -1, 3), torch.randn(2, 4, 64, 1)], dim=-1)
    centres = torch.tensor([[-0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0], [-0.5, -0.5, 0, 0], [0.5, -0.5, 0, 0]])
    drawn = torch.cat([drawn, centres[:, None].expand(2, -1, 1, -1)], dim=2)
    torch.testing.assert_close(encoder.encode(drawn), wanted)


@pytest.mark.parametrize("modality", ["imu", "pointcloud", "depth"])
def test_slots_are_the_same_whether_tokens_are_kept_or_computed_inside(modality):
    encoded = way(modality)
    encoded.build(modality, 24)
    media = [render_medium(modality, SCENE, seed) for seed in (1, 2)]
    kept = encoded.features(media)
    frozen, prints = encoded.enter(kept), {encoded.fingerprint}
    assert kept[0].shape == (encoded.encoder.spec.tokens, 16)
    encoded.encoder.tokenizer.requires_grad_(True)
    raw = encoded.features(media)
    inside = encoded.enter(raw)
    torch.testing.assert_close(inside, frozen, atol=1e-5, rtol=1e-5)
    assert encoded.fingerprint not in prints and encoded.length(raw[0]) == encoded.length(kept[0])
    inside.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoded.encoder.tokenizer.parameters())
    assert all(parameter.grad is None for parameter in encoded.encoder.transformer.parameters())


def test_a_tokenizer_is_a_part_that_trains_is_saved_and_changes_the_fingerprint(llama, weights, tmp_path):
    bridge = Bridge(llama, {"imu": from_files("imu", weights, "tokenizer")})
    assert list(bridge.parts()) == ["inputs.shared.experts", "inputs.imu.projection", "inputs.imu.tokenizer"]
    before = bridge.inputs["imu"].fingerprint
    freeze(bridge, ["inputs.imu.tokenizer"])
    losses_of(bridge, "imu")["text"].backward()
    tokenizer = bridge.inputs["imu"].encoder.tokenizer
    assert tokenizer.projection.weight.grad.abs().sum() > 0
    with torch.no_grad():
        tokenizer.projection.weight.add_(0.5)
    bridge.requires_grad_(False)
    assert bridge.inputs["imu"].fingerprint != before
    bridge.save_pretrained(tmp_path / "bridge")
    again = Bridge.from_pretrained(tmp_path / "bridge")
    torch.testing.assert_close(again.inputs["imu"].encoder.tokenizer.projection.weight, tokenizer.projection.weight)
    with pytest.raises(CheckpointError, match=r"tokenizers\.imu"):
        UniversalEncoder("imu", weights)


def test_the_transformer_trains_as_one_part_of_all_ways_in(llama, weights):
    bridge = Bridge(llama, {name: from_files(name, weights, "encoder") for name in ("imu", "pointcloud")})
    transformers = [bridge.inputs[name].encoder.transformer for name in ("imu", "pointcloud")]
    assert transformers[0] is transformers[1]
    assert transformers[0] is not UniversalEncoder("imu", weights, trains="tokenizer").transformer
    assert "inputs.shared.encoder" in freeze(bridge, ["inputs.shared.*"])
    losses_of(bridge, "imu")["text"].backward()
    assert transformers[0].blocks[0].mlp.fc1.weight.grad.abs().sum() > 0


def test_tubelets_read_clips_and_pictures_that_stand_still():
    clips = {**CONFIG, "image": {**CONFIG["image"], "tubelet": 2}}
    torch.manual_seed(0)
    image = UniversalEncoder("image", config=clips)
    torch.manual_seed(0)
    video = UniversalEncoder("video", config=clips)
    pictures = torch.randn(2, 3, 16, 16)
    still = pictures[:, None, :, None].expand(-1, 3, -1, 2, -1, -1)  # (B, clips, 3, frames, H, W)
    torch.testing.assert_close(video(still), image(pictures))
    moving = still.clone()
    moving[:, :, :, 1] = torch.randn_like(pictures)[:, None]
    assert (video(moving) - video(moving.flip(3))).abs().max() > 0.1  # which frame comes first is told
    assert video.input.frames == 2
    weight = image.tokenizer.projection.weight.sum(2)
    flat = F.conv2d(pictures, weight, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(image.tokenizer.tokenize(pictures)[0], flat, atol=1e-5, rtol=1e-5)


def test_frames_in_a_row_keep_their_order_and_their_mean_does_not():
    torch.manual_seed(0)
    mean = UniversalEncoder("video", config=CONFIG)
    torch.manual_seed(0)
    row = UniversalEncoder("video", config=CONFIG, frames="tokens")
    frames = torch.randn(2, 3, 3, 16, 16)
    assert row.spec.tokens == 3 * mean.spec.tokens and row(frames).shape == (2, row.spec.tokens, 16)
    torch.testing.assert_close(mean(frames), mean(frames.flip(1)))
    assert (row(frames).mean(1) - row(frames.flip(1)).mean(1)).abs().max() < 1e-5
    assert (row(frames).unflatten(1, (3, -1)) - row(frames.flip(1)).unflatten(1, (3, -1)).flip(1)).abs().max() > 0.1


def test_drawn_points_read_like_the_picture_that_they_are_of():
    """A point on every pixel of a picture: the groups in the middle of its patches give the tokens of the picture."""
    config = {
        **SIZES, "image": {"patch": 7, "image_size": 14},
        "pointcloud": {"groups": 196, "neighbours": 196, "points": 196, "patch": 7, "image_size": 14},
    }  # fmt: skip
    torch.manual_seed(0)
    points, image = UniversalEncoder("pointcloud", config=config), UniversalEncoder("image", config=config)
    with torch.no_grad():
        points.tokenizer.projection.weight.zero_()[:, :147] = image.tokenizer.projection.weight.flatten(1)
        points.tokenizer.positions.zero_()
    line = (torch.arange(14) + 0.5) / 7 - 1
    down, across = torch.meshgrid(line, line, indexing="ij")
    colours = torch.rand(14, 14, 3)
    cloud = torch.cat([torch.stack([across, -down, torch.zeros(14, 14)], -1), colours], -1).flatten(0, 1)[None]
    mean, std = (torch.tensor(getattr(points.own, name)) for name in ("mean", "std"))
    wanted = image.tokenizer.tokenize(((colours - mean) / std).permute(2, 0, 1)[None])[0]
    centres = farthest_points(cloud[..., :3], 196)[0].tolist()
    middles = [centres.index(14 * row + column) for row in (3, 10) for column in (3, 10)]
    torch.testing.assert_close(points.tokenizer.tokenize(cloud)[0][:, middles], wanted, atol=1e-4, rtol=1e-4)


def test_drawn_points_tell_where_they_are_and_draw_once():
    config = {**SIZES, "pointcloud": {"groups": 5, "neighbours": 9, "points": 40, "patch": 4, "image_size": 16}}
    torch.manual_seed(0)
    encoder = UniversalEncoder("pointcloud", config=config)
    cloud = torch.rand(2, 40, 6)
    drawn = encoder.gather(cloud)
    assert drawn.shape == (2, 5, 17, 4) and encoder.spec.tokens == 6
    torch.testing.assert_close(encoder(drawn), encoder(cloud))
    moved = cloud.clone()
    moved[..., 0] -= 0.5
    assert (encoder(moved) - encoder(cloud)).abs().max() > 0.01
    assert encoder.input.centre == "box"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": "all"}, "frames='all'"),
        ({"trains": "everything"}, "trains='everything'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        UniversalEncoder("video", config=CONFIG, **options)


def test_points_that_are_drawn_need_colours():
    with pytest.raises(ConfigError, match="a place and a colour"):
        UniversalEncoder("pointcloud", config={**SIZES, "pointcloud": {"patch": 8, "channels": 3}})
    encoder = UniversalEncoder("pointcloud", config={**SIZES, "pointcloud": {"patch": 8, "groups": 4, "neighbours": 4}})
    with pytest.raises(ShapeError, match="at least 1 point"):
        encoder(torch.rand(1, 9, 3))
