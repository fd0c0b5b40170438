"""The shipped bridge on factor combinations that no bridge has trained on, from fresh renderings and from worn files."""

import dataclasses

import pytest
from wear import WEAR

from mmbridge.bridge import Bridge
from mmbridge.data.tasks import answer_tasks, is_emitted
from mmbridge.decoders import AudioLDM, ModelScope, StableDiffusion
from mmbridge.evaluation.any_to_any import gold_accuracy, make_tasks, measure

TEXT = {"text": 0.95, "image": 0.95, "audio": 0.95, "video": 0.90}
REQUESTS = 200


@pytest.fixture(scope="module")
def bridge():
    return Bridge.from_pretrained("mmbridge/tiny")


@pytest.fixture(scope="module")
def hasty():
    """The same bridge with decoders of one step, where only a medium's being there counts."""
    bridge = Bridge.from_pretrained("mmbridge/tiny")
    bridge.outputs["image"].decoder = StableDiffusion("mmbridge/tiny-sd", steps=1)
    bridge.outputs["audio"].decoder = AudioLDM("mmbridge/tiny-audioldm", steps=1)
    bridge.outputs["video"].decoder = ModelScope("mmbridge/tiny-zeroscope", steps=1)
    return bridge


def share(right):
    return sum(right) / len(right)


@pytest.mark.parametrize("source", TEXT)
def test_answers_name_every_factor(bridge, source):
    assert share(measure(bridge, make_tasks(source, "text", "unseen", REQUESTS, seed=0))) >= TEXT[source]


@pytest.mark.parametrize("source, wear", [(source, wear) for source, wears in WEAR.items() for wear in wears])
def test_worn_files_cost_at_most_five_points(bridge, source, wear, tmp_path):
    tasks = make_tasks(source, "text", "unseen", REQUESTS, seed=0)
    worn = []
    for number, task in enumerate(tasks):
        (message,) = task.messages
        content = [
            part
            if part["type"] != source
            else {"type": source, "path": str(WEAR[source][wear](part["data"], tmp_path / str(number)))}
            for part in message["content"]
        ]
        worn.append(dataclasses.replace(task, messages=({"role": "user", "content": content},)))
    assert share(measure(bridge, worn)) >= max(TEXT[source], share(measure(bridge, tasks))) - 0.05


@pytest.mark.parametrize("source", TEXT)
def test_pictures_come_close_to_the_gold_captions(bridge, source):
    tasks = make_tasks(source, "image", "unseen", 60, seed=0)
    bound = gold_accuracy(bridge, tasks)
    needed = 0.95 if source == "text" else 0.90
    assert share(measure(bridge, tasks, batch_size=60)) >= needed * bound
    assert bound >= (0.9 if source != "audio" else 0.6)


@pytest.mark.parametrize("source", TEXT)
def test_sounds_come_close_to_the_gold_captions(bridge, source):
    tasks = make_tasks(source, "audio", "unseen", 60, seed=0)
    bound = gold_accuracy(bridge, tasks)
    assert share(measure(bridge, tasks, batch_size=60)) >= 0.90 * bound
    assert bound >= 0.95


@pytest.mark.parametrize("source", ["text", "audio"])
def test_videos_come_close_to_the_gold_captions(bridge, source):
    tasks = make_tasks(source, "video", "unseen", 30, seed=0)
    bound = gold_accuracy(bridge, tasks)
    assert share(measure(bridge, tasks, batch_size=30)) >= 0.90 * bound
    assert bound >= (0.85 if source == "text" else 0.6)


@pytest.mark.parametrize(
    "source, wanted",
    [
        *((source, wanted) for source in TEXT for wanted in ("image", "audio", "video", "none")),
        *(("text", "image+audio"), ("image", "audio+video"), ("audio", "image+video"), ("video", "image+audio")),
    ],
)
def test_media_are_made_when_asked_for_and_only_then(hasty, source, wanted):
    count = 100 if "video" in wanted else REQUESTS
    tasks = make_tasks(source, wanted, "unseen", count, seed=1)
    replies = [reply for start in range(0, count, 50) for reply in answer_tasks(hasty, tasks[start : start + 50])]
    # A block that was not complete would have no medium.
    assert share([is_emitted(task, reply) for task, reply in zip(tasks, replies, strict=True)]) >= 0.99


def test_a_second_turn_changes_the_picture(bridge):
    tasks = make_tasks("text", "image", "unseen", 60, seed=0, turn=2)
    assert share(measure(bridge, tasks, batch_size=60)) >= 0.90 * gold_accuracy(bridge, tasks)
