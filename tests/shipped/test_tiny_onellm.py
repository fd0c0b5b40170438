"""The shipped bridge of eight modalities on factor combinations that no bridge has trained on, and what its files say of it."""

import json

import pytest

from mmbridge import hub
from mmbridge.bridge import Bridge
from mmbridge.evaluation.any_to_any import gold_accuracy, make_tasks, measure, replies
from mmbridge.synthetic import CARRIES, judge

EIGHT = ("image", "video", "audio", "pointcloud", "depth", "normal", "imu", "fmri")
LEAST = {
    "imu": 0.75,
    "depth": 0.85,
}  # short of the 0.90 of all others; of motion, a third of what there is was never shown
REQUESTS = 100


@pytest.fixture(scope="module")
def bridge():
    return Bridge.from_pretrained("mmbridge/tiny-onellm")


def share(right):
    return sum(right) / len(right)


@pytest.mark.parametrize("source", [*EIGHT, "image+audio", "audio+video"])
def test_answers_name_every_factor_that_a_modality_carries(bridge, source):
    assert share(measure(bridge, make_tasks(source, "text", "unseen", REQUESTS, seed=3))) >= LEAST.get(source, 0.90)


def test_a_video_with_its_sound_tells_as_much_as_the_video_and_more_than_the_sound(bridge):
    """Of what only one carries, colour and place: as much as from the video, and far more than from the sound."""
    found = {}
    for source in ("audio", "video", "audio+video"):
        tasks = make_tasks("audio+video" if source == "audio" else source, "text", "unseen", 60, seed=4)
        if source == "audio":  # the same request, with the sound alone
            for task in tasks:
                (message,) = task.messages
                message["content"] = [part for part in message["content"] if part["type"] != "video"]
        read = [judge("text", reply.text) for reply in replies(bridge, tasks)]
        for factor in ("colour", "place"):
            right = [one.get(factor) == getattr(task.scene, factor) for one, task in zip(read, tasks, strict=True)]
            found[source, factor] = share(right)
    for factor in ("colour", "place"):
        assert found["audio+video", factor] >= 0.95
        assert found["audio+video", factor] >= found["video", factor] - 0.03
        assert found["audio+video", factor] >= found["audio", factor] + 0.3


@pytest.mark.parametrize(("source", "wanted"), [("pointcloud", "image"), ("imu", "audio"), ("fmri", "audio")])
def test_what_comes_in_anew_goes_out_through_the_ways_that_were_there(bridge, source, wanted):
    tasks = make_tasks(source, wanted, "unseen", 40, seed=0)
    assert share(measure(bridge, tasks, batch_size=40)) >= LEAST.get(source, 0.90) * gold_accuracy(bridge, tasks)


def test_its_table_and_what_it_has_forgotten():
    folder = hub.resolve("mmbridge/tiny-onellm")
    table = json.loads((folder / "any_to_any.json").read_text())
    text = {"+".join(cell["in"]): cell for cell in table if cell["out"] == "text"}
    for source in EIGHT:
        assert text[source]["accuracy"] >= LEAST.get(source, 0.90)
        assert set(text[source]["factors"]) == set(CARRIES[source])
    forgetting = json.loads((folder / "forgetting.json").read_text())
    assert len(forgetting["stages"]) == 4
    rows = {row["in"][0]: row for row in forgetting["directions"] if row["split"] == "unseen"}
    assert set(rows) == set(EIGHT)
    assert all(row["drop"] <= 3 for row in rows.values())
