"""Media of every kind on their way from a message to the sequence of a bridge, with nothing but parts named."""

import pytest
import tiny
import torch
from media.measured import example, noise, picture

from mmbridge import media
from mmbridge.bridge import Bridge
from mmbridge.data.features import FeatureStore
from mmbridge.errors import MediaError
from mmbridge.media import Audio, Image, Video
from mmbridge.messages import store_media
from mmbridge.modality import MEDIA

SIZES = {
    "dim": 16, "depth": 1, "heads": 2, "dim_feedforward": 32,
    "image": {"patch": 8, "image_size": 16, "video_crops": 1, "video_clips": 2},
    "audio": {"patch": 4, "stride": 3, "mel_bins": 10, "frames": 16},
    "pointcloud": {"groups": 5, "neighbours": 4, "points": 40},
    "imu": {"kernel": 4, "steps": 10},
    "fmri": {"voxels": 11, "tokens": 3},
}  # fmt: skip


@pytest.fixture
def bridge(parts) -> Bridge:
    torch.manual_seed(0)
    config = tiny.bridge_config(parts, out=False)
    config["inputs"] = {
        modality: {
            "name": "encoded",
            "encoder": {"name": "universal", "modality": modality, "config": SIZES},
            "projection": {"name": "linear"},
        }
        for modality in MEDIA
    }
    return Bridge.from_config(config)


@pytest.fixture
def dialogue(tmp_path) -> list:
    """One message with a file of every kind."""
    clip = Video(picture(16, 16).pixels.expand(8, -1, -1, -1), 4.0, Audio(noise(16000).clamp(-1, 1), 8000))
    content = []
    for modality in MEDIA:
        medium = {"image": Image(picture().pixels), "audio": clip.audio, "video": clip}.get(modality)
        part = {"type": modality, "data": example(modality) if medium is None else medium}
        content.append(part | ({"picture": picture()} if modality in ("depth", "normal") else {}))
    return store_media([{"role": "user", "content": content}, {"role": "assistant", "content": "It is red."}], tmp_path)


def test_every_medium_enters_where_it_stands(bridge, dialogue, tmp_path):
    (sequence,) = bridge.prepare([dialogue], root=tmp_path)
    assert [span.modality for span in sequence.entering] == list(MEDIA)
    for span, part in zip(sequence.entering, dialogue[0]["content"], strict=True):
        options = {"picture": part["picture"]} if "picture" in part else {}
        (wanted,) = bridge.inputs[part["type"]].features([media.load(part["type"], part["path"], tmp_path, **options)])
        torch.testing.assert_close(span.content, wanted)


def test_features_of_every_medium_are_stored_once(bridge, dialogue, tmp_path):
    store = FeatureStore(None)
    for _ in range(2):
        bridge.prepare([dialogue], root=tmp_path, store=store)
    assert store.computed == dict.fromkeys(MEDIA, 1)


def test_a_map_of_a_file_without_its_picture_is_one_error(bridge, dialogue, tmp_path):
    part = next(part for part in dialogue[0]["content"] if part["type"] == "depth")
    alone = {key: value for key, value in part.items() if key != "picture"}
    with pytest.raises(
        MediaError, match=r"a depth map can't be encoded without the picture of the same view; give it as"
    ):
        bridge.prepare([[{"role": "user", "content": [alone]}]], root=tmp_path)


def test_a_video_with_sound_enters_as_two_media(bridge, dialogue, tmp_path):
    path = next(part["path"] for part in dialogue[0]["content"] if part["type"] == "video")
    both = [{"type": "video", "path": path}, {"type": "audio", "path": path}]
    (sequence,) = bridge.prepare([[{"role": "user", "content": both}]], root=tmp_path)
    assert [span.modality for span in sequence.entering] == ["video", "audio"]
