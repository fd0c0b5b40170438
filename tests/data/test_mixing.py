"""Sets of dialogues mixed by share: weights, temperature, replay, small sets that cycle, and all of them in every batch."""

import collections
import json

import numpy as np
import pytest
import tiny
import torch

from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.data.features import FeatureStore
from mmbridge.data.loader import StepBatches, prepare_all, window_batches
from mmbridge.data.mixing import MixedData, draws, mixing_shares, read_files
from mmbridge.data.samples import JsonlData
from mmbridge.data.synthetic import SyntheticData
from mmbridge.errors import ConfigError, DataError
from mmbridge.training.run import train

SIZES = {"image": 800, "audio": 200, "imu": 10}


def test_shares_are_in_proportion_to_sizes_until_the_temperature_evens_them():
    assert mixing_shares(SIZES) == pytest.approx({"image": 800 / 1010, "audio": 200 / 1010, "imu": 10 / 1010})
    even = mixing_shares(SIZES, temperature=2)
    assert even["image"] / even["audio"] == pytest.approx(2) and sum(even.values()) == pytest.approx(1)
    assert mixing_shares(SIZES, temperature=1e9) == pytest.approx(dict.fromkeys(SIZES, 1 / 3))
    weighted = mixing_shares(SIZES, {"imu": 2.0, "audio": 0.0}, 1e9)
    assert weighted == pytest.approx({"image": 1 / 3, "audio": 0, "imu": 2 / 3})


def test_replay_has_its_share_whatever_the_sizes():
    shares = mixing_shares(SIZES, {"imu": 40.0}, replay={"share": 0.4, "of": ["image", "audio"]})
    assert shares == pytest.approx({"image": 0.32, "audio": 0.08, "imu": 0.6})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {"imge": 1.0}}, r"data\.weights names 'imge', which is not in this data; did you mean 'image'"),
        ({"weights": {"imu": -1.0}}, r"data\.weights\.imu is -1\.0, but a weight must be at least 0"),
        ({"weights": dict.fromkeys(SIZES, 0.0)}, "leaves nothing to draw from"),
        ({"temperature": 0.0}, r"data\.temperature is 0\.0, but must be above 0"),
        ({"replay": {"share": 0.4, "of": ["fmri"]}}, r"data\.replay\.of names 'fmri'"),
        ({"replay": {"share": 0.4, "of": list(SIZES)}}, "on either side a name whose weight is above 0"),
        ({"replay": {"share": 1.0, "of": ["imu"]}}, "a share between 0 and 1"),
    ],
)
def test_shares_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        mixing_shares(SIZES, **settings)


def test_draws_are_spread_evenly_and_only_grow():
    shares = [0.4, 0.35, 0.2, 0.049, 0.001]
    counts = np.array([draws(count, shares) for count in range(5000)])
    assert (counts.sum(axis=1) == range(5000)).all()
    assert (np.diff(counts, axis=0) >= 0).all(), "nobody gives a draw back"
    assert np.abs(counts - np.outer(range(5000), shares)).max() < 6
    blocks = np.diff(counts[::64], axis=0)
    assert np.abs(blocks - 64 * np.array(shares)).max() <= 1
    assert draws(2**40 + 12345, [1.0]) == [2**40 + 12345]


def test_every_batch_has_every_set_and_small_sets_cycle():
    sizes, shares, lengths = [1000, 60, 7], [0.5, 0.375, 0.125], [20] * 1000 + [45] * 60 + [170] * 7
    seen = collections.Counter()
    for window in range(12):
        batches = window_batches(lengths, 16, 3, window, sizes, shares)
        assert batches == window_batches(lengths, 16, 3, window, sizes, shares)
        for batch in batches:
            counts = np.histogram(batch, [0, 1000, 1060, 1067])[0]
            assert np.abs(counts - [8, 6, 2]).max() <= 1, "although their lengths differ"
            seen.update(batch)
    small = [seen[index] for index in range(1060, 1067)]
    assert max(small) - min(small) <= 1 and sum(small) == 12 * 16, "every pass has every sample once"
    assert max(seen[index] for index in range(1000)) == 1, "of a large set nothing comes twice"
    assert window_batches(lengths, 16, 3, 0, sizes, shares) != window_batches(lengths, 16, 4, 0, sizes, shares)


def test_short_samples_share_batches_with_short_ones_of_other_sets():
    lengths = [10, 160] * 200 + [20, 320] * 200
    for window in range(4):
        batches = window_batches(lengths, 16, 0, window, [400, 400], [0.5, 0.5])
        assert sum(len({index % 2 for index in batch}) == 2 for batch in batches) <= 2


@pytest.fixture
def folders(tmp_path):
    """Two files of dialogues, each in a folder of its own; the names of their pictures are the same."""
    return {name: tiny.colours_file(tmp_path / name, count) for name, count in (("old", 9), ("new", 6))}


def test_media_are_those_of_their_own_folder(folders):
    data = read_files({name: str(path) for name, path in folders.items()}, weights={"old": 3.0})
    assert len(data) == 15 and data.shares == pytest.approx([27 / 33, 6 / 33])
    for index, (name, number) in ((8, ("old", 8)), (9, ("new", 0))):
        assert data.where(index) == f"{folders[name]}:{number + 1}"
        found = [part for turn in data[index]["messages"] if turn["content"] for part in turn["content"]]
        paths = [part["path"] for part in found if isinstance(part, dict) and "path" in part]
        assert paths == [str((folders[name].parent / f"0-{number}.png").resolve())]
    with pytest.raises(IndexError):
        data[15]


def test_a_set_of_weight_0_is_not_even_prepared(folders):
    data = read_files({name: str(path) for name, path in folders.items()}, weights={"old": 0.0})
    assert len(data) == 6 and data.where(0).startswith(str(folders["new"]))


def test_no_set_reads_from_the_folder_of_another(folders):
    (folders["new"].parent / "link.png").symlink_to(folders["old"].parent / "0-0.png")
    for path in ("../old/0-0.png", str(folders["old"].parent / "0-0.png"), "link.png"):
        content = [{"type": "image", "path": path}]
        line = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "It is red."}]}
        folders["new"].write_text(json.dumps(line))
        with pytest.raises(DataError, match=r"new/data-0\.jsonl:1: .* leads out of the data root"):
            read_files({name: str(path) for name, path in folders.items()})


def test_a_file_that_begins_to_lead_out_is_noticed(folders):
    picture = folders["new"].parent / "0-0.png"
    data = MixedData({name: JsonlData(path) for name, path in folders.items()}, {"old": 0.5, "new": 0.5})
    picture.unlink()
    picture.symlink_to(folders["old"].parent / "0-0.png")
    with pytest.raises(DataError, match=r"new/data-0\.jsonl:1: .* leads out"):
        data[9]


@pytest.fixture
def recipe(parts, folders):
    values = tiny.recipe(parts, folders["old"], stage="encoder_alignment", steps=2, validate_every=2)
    paths = {name: str(path) for name, path in folders.items()}
    values["data"] = {"path": paths, "validation": {"new": paths["new"]}, "replay": {"share": 0.25, "of": ["old"]}}
    return values


def test_a_recipe_trains_and_validates_on_several_files(recipe, tmp_path):
    loaded = Recipe.from_dict(recipe)
    assert Recipe.from_dict(loaded.to_dict()) == loaded
    folder = train(loaded, tmp_path / "run", progress=False)
    assert Bridge.from_pretrained(folder).lineage[0]["data"]["replay"] == {"share": 0.25, "of": ["old"]}
    assert (tmp_path / "run" / "samples" / "step-2" / "0" / "reply.json").exists()


def test_batches_of_several_files_depend_on_seed_and_step_alone(parts, folders):
    bridge = Bridge.from_config(tiny.bridge_config(parts))
    data = read_files({name: str(path) for name, path in folders.items()}, replay={"share": 0.25, "of": ["old"]})
    prepared = prepare_all(bridge, data, FeatureStore(None), progress=False)
    one, two = (StepBatches(prepared, 4, seed=5, start=start) for start in (0, 3))
    batches = [batch.ids for batch, _ in zip(one, range(5), strict=False)]
    assert all(torch.equal(batch.ids, wanted) for batch, wanted in zip(two, batches[3:], strict=False))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"path": "a.jsonl", "weights": {"a": 1.0}}, r"data\.weights needs several files; give data\.path as \{name: file"),
        ({"path": {"a": 3}}, r"data\.path\.a is 3, but must be a string"),
        ({"path": {"a": "a.jsonl"}, "replay": {"share": 2, "of": ["a"]}}, r"data\.replay\.share is 2\.0, but must be at most 1"),
        ({"name": "synthetic", "temperature": 2.0}, r"data\.temperature goes with data\.path"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_refused(recipe, data, words):
    with pytest.raises(ConfigError, match=words):
        Recipe.from_dict({**recipe, "data": data})


def shown(data):
    found = collections.Counter()
    for index in range(len(data)):
        for exchange in data.dialogues.compose(np.random.default_rng([data.seed, index, 1])):
            found.update(one.modality for one in exchange.shown)
    return {name: count / found.total() for name, count in found.items()}


@pytest.mark.parametrize("kind", ["describe", "convert", "edit", "refuse"])
def test_media_of_the_world_come_in_by_their_weights(kind):
    inputs = ("image", "video", "depth", "imu")
    data = SyntheticData(
        1500, inputs, mix={kind: 1.0}, weights={"video": 0, "imu": 3}, replay={"share": 0.4, "of": ["image"]}
    )
    assert shown(data) == pytest.approx({"image": 0.4, "depth": 0.15, "imu": 0.45}, abs=0.05)
    assert data.dialogues.inputs == ("image", "depth", "imu")


def test_pairs_of_the_world_follow_the_rarer_of_their_media():
    data = SyntheticData(
        1500,
        ("image", "video", "audio"),
        mix={"pair": 1.0},
        pairs=("image+audio", "audio+video"),
        weights={"image": 0.2},
    )
    pairs = collections.Counter()
    for index in range(len(data)):
        (exchange,) = data.dialogues.compose(np.random.default_rng([0, index, 1]))
        pairs["+".join(one.modality for one in exchange.shown)] += 1
    assert pairs["image+audio"] / pairs["audio+video"] == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": {"audo": 1.0}}, r"data\.weights names 'audo'.*did you mean 'audio'"),
        ({"weights": {"audio": 0}, "pairs": ["image+audio"]}, r"data\.pairs has 'image\+audio', but data\.inputs is"),
    ],
)
def test_weights_that_the_world_cannot_follow_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        SyntheticData(4, **settings)


def test_a_medium_that_trains_but_never_comes_in_stops_the_run_before_its_first_step(parts, tmp_path):
    values = tiny.recipe(parts, tmp_path, stage="encoder_alignment", steps=2)
    picture = values["bridge"]["inputs"]["image"]
    values["bridge"]["inputs"]["video"] = {**picture, "encoder": {**picture["encoder"], "modality": "video"}}
    values["data"] = {"name": "synthetic", "samples": 6, "inputs": ["image"], "validation_samples": 0}
    words = r"way in of video, but no dialogue of the training data shows such a medium; .*leave inputs\.video\.\* out"
    with pytest.raises(DataError, match=words):
        train(Recipe.from_dict(values), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
    train(Recipe.from_dict({**values, "train": ["inputs.image.*"]}), tmp_path / "run", overwrite=True, progress=False)
