"""Where a stage starts: as its parent, as another modality, as copies of one expert."""

import copy
import shutil

import pytest
import tiny
import torch

from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.projections import MixtureOfExperts
from mmbridge.training.run import build_bridge, train

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


def test_several_parents_give_the_parts_that_they_are_asked_for(make, save, tmp_path):
    inputs = {name: way(name, tags=True) for name in ("image", "video")}
    parent, before = save(inputs)
    other = str(shutil.copytree(parent, tmp_path / "other"))
    values = make(inputs).to_dict()
    recipe = Recipe.from_dict({**values, "parent": {str(parent): ["inputs.image.*"], other: ["inputs.video.tags"]}})
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    found = {name: same(part, before[name]) for name, part in build_bridge(recipe)[0].parts().items()}
    assert [name for name, taken in found.items() if not taken] == ["inputs.video.projection"]
    with pytest.raises(ConfigError, match=r"has no part in common with this recipe's bridge among outputs\.\*"):
        build_bridge(Recipe.from_dict({**values, "parent": {other: ["outputs.*"]}}))


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


def expand(one, number):
    return one.expand(number, *one.shape[1:])


@pytest.mark.parametrize("name", [None, "experts"])
def test_experts_start_as_the_one_of_the_parent(make, save, capsys, name):
    named = {} if name is None else {"experts": name}
    parent, before = save(
        {medium: way(medium, {**tiny.MIXTURE, "num_experts": 1, **named}) for medium in ("image", "video")}
    )
    several = {**tiny.MIXTURE, "num_experts": 3, **named, "upcycle": 0.0, "router": "features"}
    bridge, _ = build_bridge(make({medium: way(medium, several) for medium in ("image", "video")}, parent))
    parts = bridge.parts()
    assert parts.keys() == before.keys()
    for part, one in before.items():
        for key, value in parts[part].items():
            if key.startswith("router."):
                continue
            wanted = expand(one[key], 3) if key.startswith(("experts.", "blocks.")) else one[key]
            assert torch.equal(value, wanted), (part, key)
    assert [len(parts[f"inputs.{medium}.projection"]["router.2.bias"]) for medium in ("image", "video")] == [3, 3]
    printed = capsys.readouterr().out
    for part in ["inputs.image.projection", "inputs.video.projection"] if name is None else ["inputs.shared.experts"]:
        assert f"{part}: 3 experts start as the parent's one, with noise 0 and new routers" in printed
    single = MixtureOfExperts(
        12, 32, **{key: value for key, value in tiny.MIXTURE.items() if key != "name"} | {"num_experts": 1}
    )
    shared = {f"experts.{key}": value for key, value in before.get("inputs.shared.experts", {}).items()}
    single.load_state_dict({**before["inputs.image.projection"], **shared})
    features = torch.randn(2, 5, 12)
    torch.testing.assert_close(bridge.inputs["image"].projection(features), single(features), atol=1e-5, rtol=1e-5)


def test_noise_sets_upcycled_experts_apart_the_same_way_each_time(make, save):
    parent, before = save({"image": way("image", {**tiny.MIXTURE, "num_experts": 1})})
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        bridge, _ = build_bridge(
            make({"image": way("image", {**tiny.MIXTURE, "num_experts": 4, "upcycle": 0.5})}, parent)
        )
        made.append(bridge.parts()["inputs.image.projection"])
    assert same(*made)
    one = before["inputs.image.projection"]["experts.blocks.0.gate"]
    apart = made[0]["experts.blocks.0.gate"] - one
    assert (apart.std((1, 2)) / one.std() - 0.5).abs().max() < 0.15
    assert same({"tokens": made[0]["tokens"]}, {"tokens": before["inputs.image.projection"]["tokens"]})


def test_a_parent_that_has_as_many_experts_is_read_as_ever(make, save, capsys):
    inputs = {"image": way("image", {**tiny.MIXTURE, "upcycle": 0.5})}
    parent, before = save(inputs)
    bridge, _ = build_bridge(make(inputs, parent))
    assert all(same(part, before[name]) for name, part in bridge.parts().items())
    assert "experts start" not in capsys.readouterr().out


@pytest.mark.parametrize("named", [{}, {"experts": "experts"}])
def test_a_parent_with_one_expert_is_not_taken_by_accident(make, save, named):
    parent, _ = save({"image": way("image", {**tiny.MIXTURE, "num_experts": 1, **named})})
    with pytest.raises(
        ConfigError, match=r"has one expert, but this recipe has 2; give bridge\.inputs\.image\.projection"
    ):
        build_bridge(make({"image": way("image", {**tiny.MIXTURE, **named})}, parent))


def test_other_numbers_of_experts_are_refused(make, save):
    parent, _ = save({"image": way("image", tiny.MIXTURE)})
    with pytest.raises(CheckpointError, match=r"does not fit part 'inputs\.image\.projection'"):
        build_bridge(make({"image": way("image", {**tiny.MIXTURE, "num_experts": 3, "upcycle": 0})}, parent))


def test_a_new_modality_starts_as_an_upcycled_one(make, save):
    shared = {**tiny.MIXTURE, "experts": "experts"}
    parent, _ = save({"image": way("image", {**shared, "num_experts": 1})})
    several = {**shared, "num_experts": 3, "upcycle": 0.1}
    bridge, _ = build_bridge(
        make({"image": way("image", several), "video": way("video", several, like="image")}, parent)
    )
    assert same(bridge.parts()["inputs.video.projection"], bridge.parts()["inputs.image.projection"])


def test_a_curriculum_goes_from_run_to_run(make, parts, tmp_path):
    """One expert for pictures; three for a new modality too, with a balance loss; then the language model as a whole."""
    data = str(tiny.colours_file(tmp_path / "data", 6))
    shared = {**tiny.MIXTURE, "experts": "experts"}
    several = {**shared, "num_experts": 3, "upcycle": 0.1, "router": "features"}
    ways = {"image": way("image", several, tags=True), "video": way("video", several, tags=True, like="image")}
    stages = (
        ({"image": way("image", {**shared, "num_experts": 1}, tags=True)}, {}),
        (ways, {"losses": {"text": 1.0, "image.balance": 0.1}, "train": ["inputs.shared.*", "inputs.image.*"]}),
        (ways, {"stage": "instruction_tuning", "train": ["backbone.weights"]}),
    )
    parent = None
    for number, (inputs, changes) in enumerate(stages):
        values = make(inputs, parent).to_dict()
        values["data"], values["run"]["steps"], values["run"]["validate_every"] = {"path": data}, 2, 2
        values["bridge"]["backbone"]["trainable"] = number == 2
        parent = tmp_path / f"run-{number}"
        train(Recipe.from_dict({**values, **changes}), parent, cache=tmp_path / "cache", progress=False)
    opened = [Bridge.from_pretrained(tmp_path / f"run-{number}") for number in range(3)]
    assert [len(bridge.inputs["image"].projection.experts.blocks[0].gate) for bridge in opened] == [1, 3, 3]
    assert [stage["stage"] for stage in opened[2].lineage] == ["encoder_alignment"] * 2 + ["instruction_tuning"]
    for name, part in opened[1].parts().items():
        assert same(part, opened[2].parts()[name])
    weights = [bridge.backbone.model.state_dict() for bridge in opened[1:]]
    assert not any(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
