"""ImageBind's weights on disk: lazy and strict reading, sharing, fingerprints, manifests."""

import gc
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmbridge.encoders import ImageBind, ImageBindConfig, ImageBindModel
from mmbridge.encoders.imagebind_modules import AudioConfig, VisionConfig
from mmbridge.errors import CheckpointError, ConfigError

CONFIG = ImageBindConfig(
    embed_dim=12,
    vision=VisionConfig(16, 1, 2, image_size=16, patch=8, video_clips=2, video_crops=1),
    audio=AudioConfig(16, 1, 2, patch=8, stride=8, mel_bins=16, frames=16, clips=2),
)
PICTURE = torch.linspace(-2, 2, 3 * 16 * 16).reshape(1, 3, 16, 16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    ImageBindModel(CONFIG).save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def test_saved_model_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    model = ImageBindModel(CONFIG).eval()
    model.save_pretrained(tmp_path)
    expected = model.tokens("image", PICTURE)
    assert torch.equal(ImageBindModel.from_pretrained(tmp_path).tokens("image", PICTURE), expected)
    assert torch.equal(ImageBind("image", tmp_path)(PICTURE), expected)
    assert torch.equal(ImageBind("image", str(tmp_path / "model.safetensors"))(PICTURE), expected)


def test_pth_files_give_the_same_encoder(folder: Path, tmp_path: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "imagebind.pth")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert torch.equal(ImageBind("image", tmp_path)(PICTURE), ImageBind("image", folder)(PICTURE))


def test_half_precision_files_become_float32(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    encoder = ImageBind("image", folder)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert encoder(PICTURE).isfinite().all()


def test_only_the_tower_asked_for_is_built_and_read(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if ".audio." in name}, file)
    encoder = ImageBind("audio", folder)
    assert {name.split(".")[2] for name in encoder.state_dict()} == {"audio"}
    with pytest.raises(CheckpointError, match=r"missing: modality_preprocessors\.vision\.cls_token \(1, 1, 16\)"):
        ImageBind("image", folder)


def test_image_and_video_share_one_tower(folder: Path) -> None:
    image, video, audio = (ImageBind(modality, folder) for modality in ("image", "video", "audio"))
    shared = {id(parameter) for parameter in image.parameters()}
    assert shared == {id(parameter) for parameter in video.parameters()}
    assert not shared & {id(parameter) for parameter in audio.parameters()}
    assert image.fingerprint != video.fingerprint  # same weights, other preprocessing


def test_a_shared_tower_goes_with_its_last_user_and_with_its_file(folder: Path) -> None:
    first = ImageBind("image", folder)
    before = first(PICTURE)
    torch.manual_seed(1)
    ImageBindModel(CONFIG).save_pretrained(folder)
    second = ImageBind("image", folder)
    assert not torch.equal(second(PICTURE), before)
    remembered = weakref.ref(next(first.parameters()))
    del first
    gc.collect()
    assert remembered() is None


def test_strict_loading_lists_what_is_wrong(folder: Path) -> None:
    file = folder / "model.safetensors"
    state = load_file(file)
    del state["modality_heads.vision.0.bias"]
    state["modality_trunks.vision.blocks.7.norm_1.weight"] = torch.zeros(16)
    state["modality_heads.vision.2.weight"] = torch.zeros(5, 16)
    save_file(state, file)
    with pytest.raises(CheckpointError) as caught:
        ImageBind("image", folder)
    message = str(caught.value)
    assert str(file) in message
    assert "1 missing: modality_heads.vision.0.bias (16,)" in message
    assert "1 unexpected: modality_trunks.vision.blocks.7.norm_1.weight" in message
    assert "1 of the wrong shape: modality_heads.vision.2.weight (5, 16) instead of (12, 16)" in message
    assert ImageBind("audio", folder).spec.dim == 12  # the other tower is whole


def test_weights_without_configuration_have_the_published_sizes(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"cls_token \(1, 1, 16\) instead of \(1, 1, 1280\)"):
        ImageBind("image", folder)
    assert ImageBind("image", folder, config=CONFIG)(PICTURE).shape == (1, 4, 12)


def test_unreadable_files_are_named(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors can't be read.*replace it"):
        ImageBind("image", folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"should hold one ImageBind weights file.*but has none"):
        ImageBind("image", tmp_path / "empty")
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        ImageBind("image", folder)
    (folder / "config.json").write_text('{"vision_embed_dim": 1280}')
    with pytest.raises(ConfigError, match="no key 'vision_embed_dim'"):
        ImageBind("image", folder)


def test_code_in_a_pth_file_is_refused_and_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (marker,))  # type: ignore[return-value]

    torch.save({"modality_heads.vision.2.weight": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth can't be read"):
        ImageBind("image", tmp_path / "evil.pth", config=CONFIG)
    assert not marker.exists()


def test_manifest_facts(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert ImageBind("image", str(folder)).describe() == {
        "name": "imagebind",
        "weights": str(folder),
        "sha256": digest,
        "licence": "apache-2.0",
        "revision": None,
    }
    cached = folder.parent / "hub" / "snapshots" / "0123abc"
    cached.mkdir(parents=True)
    (cached / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    (cached / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert ImageBind("image", cached).describe()["revision"] == "0123abc"


def test_planning_reads_sizes_but_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with torch.device("meta"):
        planned = ImageBind("video", str(folder))
    assert (planned.spec.tokens, planned.spec.dim) == (4, 12)
    assert {parameter.device.type for parameter in planned.parameters()} == {"meta"}
    assert planned.describe()["weights"] == str(folder)


def test_published_weights_carry_their_licence(tmp_path: Path) -> None:
    huge = ImageBindConfig.huge()
    state = ImageBindModel(huge, ("imu",)).state_dict()
    torch.save(state, tmp_path / "imagebind_huge.pth")
    encoder = ImageBind("imu", tmp_path)
    assert encoder.licence == "CC-BY-NC-SA-4.0"
    assert ImageBind("imu", config=huge).licence == "unknown"  # random weights
    assert encoder(torch.randn(1, 6, 2000)).shape == (1, 250, 1024)
