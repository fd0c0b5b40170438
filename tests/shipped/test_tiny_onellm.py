"""The shipped bridge of eight modalities on factor combinations that no bridge has trained on, and what its files say of it."""

import json

import pytest

from mmbridge import hub
from mmbridge.bridge import Bridge
from mmbridge.evaluation.any_to_any import gold_accuracy, make_tasks, measure, replies
from mmbridge.synthetic import CARRIES, FACTORS, judge

EIGHT = ("image", "video", "audio", "pointcloud", "depth", "normal", "imu", "fmri")
REQUESTS = 200


@pytest.fixture(scope="module")
def bridge():
    return Bridge.from_pretrained("mmbridge/tiny-onellm")


def share(right):
    return sum(right) / len(right)


@pytest.mark.parametrize("source", [*EIGHT, "image+audio", "audio+video"])
def test_answers_name_every_factor_that_a_modality_carries(bridge, source):
    assert share(measure(bridge, make_tasks(source, "text", "unseen", REQUESTS, seed=3))) >= 0.90


def told(bridge, pair, shown, count=60):
    """By factor, the share of right answers to a request about a pair of media, of which only some are shown."""
    tasks = make_tasks(pair, "text", "unseen", count, seed=4)
    for task in tasks:
        (message,) = task.messages
        message["content"] = [part for part in message["content"] if part["type"] in ("text", *shown)]
    read = [judge("text", reply.text) for reply in replies(bridge, tasks)]
    return {
        factor: share([one.get(factor) == getattr(task.scene, factor) for one, task in zip(read, tasks, strict=True)])
        for factor in FACTORS
    }


@pytest.mark.parametrize("pair", ["audio+video", "image+audio"])
def test_two_media_together_tell_what_only_one_of_them_carries(bridge, pair):
    """Beside a video, a sound has nothing of its own; beside a picture it has the motion."""
    both, one, other = ({*pair.split("+")}, *({name} for name in pair.split("+")))
    found = {frozenset(shown): told(bridge, pair, shown) for shown in (both, one, other)}
    for with_it, without in ((one, other), (other, one)):
        (carrier,), (rest,) = with_it, without
        for factor in set(CARRIES[carrier]) - set(CARRIES[rest]):
            together = found[frozenset(both)][factor]
            assert together >= 0.90
            assert together >= found[frozenset(with_it)][factor] - 0.05
            assert together >= found[frozenset(without)][factor] + 0.3


@pytest.mark.parametrize(("source", "wanted"), [("pointcloud", "image"), ("imu", "audio"), ("fmri", "audio")])
def test_what_comes_in_anew_goes_out_through_the_ways_that_were_there(bridge, source, wanted):
    tasks = make_tasks(source, wanted, "unseen", 40, seed=0)
    assert share(measure(bridge, tasks, batch_size=40)) >= 0.90 * gold_accuracy(bridge, tasks)


def test_its_table_and_what_it_has_forgotten():
    folder = hub.resolve("mmbridge/tiny-onellm")
    table = json.loads((folder / "any_to_any.json").read_text())
    text = {"+".join(cell["in"]): cell for cell in table if cell["out"] == "text"}
    for source in EIGHT:
        assert text[source]["accuracy"] >= 0.90
        assert set(text[source]["factors"]) == set(CARRIES[source])
    forgetting = json.loads((folder / "forgetting.json").read_text())
    assert len(forgetting["stages"]) == 4
    rows = {row["in"][0]: row for row in forgetting["directions"] if row["split"] == "unseen"}
    assert set(rows) == set(EIGHT)
    assert all(row["drop"] <= 3 for row in rows.values())
