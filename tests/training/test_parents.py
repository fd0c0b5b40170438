"""Where a stage starts: as its parent, as another modality, as copies of one expert."""

import copy

import pytest
import tiny
import torch

from mmbridge.config import Recipe
from mmbridge.errors import ConfigError
from mmbridge.training.run import build_bridge

VISION = {"dim": 16, "depth": 1, "heads": 2, "image_size": 16, "patch": 8, "video_clips": 1, "video_crops": 1}


def way(modality, projection=None, width=12, **options):
    encoder = {"name": "imagebind", "modality": modality, "config": {"embed_dim": width, "vision": VISION}}
    return {"name": "encoded", "encoder": encoder, "projection": projection or tiny.MIXTURE, **options}


@pytest.fixture
def make(parts):
    """Make a recipe of the first stage with these ways in."""

    def make_recipe(inputs, parent=None):
        values = tiny.recipe(parts, "data.jsonl", stage="encoder_alignment")
        values["bridge"] = {**tiny.bridge_config(parts, out=False), "inputs": copy.deepcopy(inputs)}
        values["train"] = ["inputs.*"]
        return Recipe.from_dict({**values, "parent": None if parent is None else str(parent)})

    return make_recipe


@pytest.fixture
def save(make, tmp_path):
    """Save a bridge whose parts are all another than a new one's; returns where it is, and its parts."""

    def save_bridge(inputs):
        torch.manual_seed(7)
        bridge, _ = build_bridge(make(inputs))
        with torch.no_grad():
            for parameters in bridge.parts().values():
                for value in parameters.values():
                    value.add_(0.1 * torch.randn_like(value))
        bridge.save_pretrained(tmp_path / "parent")
        return tmp_path / "parent", {name: dict(part) for name, part in bridge.parts().items()}

    return save_bridge


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_a_new_modality_starts_as_the_one_it_is_like(make, save, capsys):
    parent, before = save({"image": way("image", tags=True)})
    bridge, _ = build_bridge(
        make({"image": way("image", tags=True), "video": way("video", tags=True, like="image")}, parent)
    )
    for part in ("projection", "tags"):
        assert same(bridge.parts()[f"inputs.video.{part}"], before[f"inputs.image.{part}"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "inputs.video.projection starts as inputs.image.projection",
        "inputs.video.tags starts as inputs.image.tags",
    ]
    ours, theirs = (bridge.inputs[name].projection for name in ("video", "image"))
    assert not {id(value) for value in ours.parameters()} & {id(value) for value in theirs.parameters()}


def test_a_new_modality_starts_anew_unless_told_otherwise(make, save, capsys):
    parent, before = save({"image": way("image")})
    bridge, _ = build_bridge(make({"image": way("image"), "video": way("video")}, parent))
    assert not same(bridge.parts()["inputs.video.projection"], before["inputs.image.projection"])
    assert "starts as" not in capsys.readouterr().out


def test_what_the_parent_has_stays_the_parents(make, save, capsys):
    inputs = {"image": way("image"), "video": way("video", like="image")}
    parent, before = save(inputs)
    bridge, _ = build_bridge(make(inputs, parent))
    assert all(same(part, before[name]) for name, part in bridge.parts().items())
    assert "starts as" not in capsys.readouterr().out


def test_only_tensors_of_the_same_shape_are_copied(make, save, capsys):
    parent, before = save({"image": way("image")})
    bridge, _ = build_bridge(make({"image": way("image"), "video": way("video", width=8, like="image")}, parent))
    ours, theirs = bridge.parts()["inputs.video.projection"], before["inputs.image.projection"]
    differing = {key for key, value in ours.items() if value.shape != theirs[key].shape}
    assert differing == {"project_in.0.weight"}
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items() if key not in differing)
    line = "inputs.video.projection starts as inputs.image.projection, but for project_in.0.weight, of other shapes"
    assert line in capsys.readouterr().out.splitlines()


def test_experts_that_are_shared_need_no_copy(make, save):
    shared = {**tiny.MIXTURE, "experts": "experts"}
    parent, before = save({"image": way("image", shared)})
    inputs = {"image": way("image", shared), "video": way("video", shared, like="image")}
    bridge, _ = build_bridge(make(inputs, parent))
    assert same(bridge.parts()["inputs.shared.experts"], before["inputs.shared.experts"])
    assert same(bridge.parts()["inputs.video.projection"], before["inputs.image.projection"])
    features = torch.randn(2, 5, 12)
    made = [bridge.inputs[name].projection(features) for name in inputs]
    assert torch.equal(*made)


def test_a_modality_like_a_new_one_starts_as_what_that_is_like(make, save):
    parent, before = save({"image": way("image", {"name": "linear"})})
    inputs = {
        "depth": way("depth", {"name": "linear"}, like="video"),
        "video": way("video", {"name": "linear"}, like="image"),
        "image": way("image", {"name": "linear"}),
    }
    inputs["depth"]["encoder"]["config"]["depth"] = {"dim": 16, "depth": 1, "heads": 2, "image_size": 16, "patch": 8}
    bridge, _ = build_bridge(make(inputs, parent))
    for name in inputs:
        assert same(bridge.parts()[f"inputs.{name}.projection"], before["inputs.image.projection"])


@pytest.mark.parametrize(
    ("video", "words"),
    [
        ({"like": "imgae"}, "like is 'imgae', which is no way in of this bridge; did you mean 'image'"),
        ({"like": "video"}, "like is 'video', which would start as itself"),
        ({"like": "image", "projection": {"name": "linear"}}, "projection is a 'mixture_of_experts', but this one is a 'linear'"),
        ({"like": 3}, "like is 3, but must be a string"),
    ],
)  # fmt: skip
def test_what_a_modality_cannot_be_like_is_told(make, video, words):
    with pytest.raises(ConfigError, match=words):
        make({"image": way("image"), "video": {**way("video"), **video}}).validate()


def test_modalities_that_are_like_each_other_are_refused(make):
    with pytest.raises(ConfigError, match=r"inputs\.video\.like is 'image', which would start as itself"):
        make({"image": way("image", like="video"), "video": way("video", like="image")}).validate()
