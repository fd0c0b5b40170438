"""Tasks over the synthetic world and the dialogues that train for them: what is asked, what is shown, and what is right."""

import itertools

import numpy as np
import pytest

from mmbridge.data import tasks
from mmbridge.data.synthetic import SyntheticData
from mmbridge.data.tasks import (
    is_emitted,
    is_right,
    known_sources,
    make_task,
    read_medium,
    render_medium,
    render_worn,
    right_factors,
)
from mmbridge.errors import ConfigError
from mmbridge.generation import Reply
from mmbridge.synthetic import CARRIES, Scene, parse
from mmbridge.synthetic.dialogues import MIX
from mmbridge.synthetic.requests import INPUTS, MEDIA

SCENE = Scene("circle", "orange", "small", "top left", "up")
WANTED = ("text", *MEDIA, "none")


def words(message):
    return " ".join(part["text"] for part in message["content"] if part["type"] == "text")


def right_reply(task, scene=None):
    """What a perfect bridge answers; other renderings of the scene than those that came in."""
    scene = scene or task.scene
    made = [render_medium(medium, scene, 77) for medium in task.media]
    return Reply([f"Here is {' '.join(scene.factors().values())}.", *made])


@pytest.mark.parametrize("source", known_sources())
@pytest.mark.parametrize("wanted", [*WANTED, "image+audio"])
@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_what_is_given_is_exactly_what_must_be_right(source, wanted, split):
    if source.startswith("text+") and "+" in wanted:
        with pytest.raises(ConfigError, match="no request leads from"):
            make_task(source, wanted, SCENE, 1)
        return
    rng = np.random.default_rng(0)
    for seed in range(1, 5):
        task = make_task(source, wanted, Scene.random(rng, split, source), seed)
        assert task.scene.split_for(source) == split
        (message,) = task.messages
        assert task.sources == tuple(source.split("+")) and task.wanted == wanted
        given = {}
        for part in message["content"]:
            if part["type"] != "text":
                given |= {name: value for name, value in read_medium(part["data"]).items() if value}
        given |= {} if wanted == "none" or "Is it" in words(message) else parse(words(message))
        if wanted != "none":
            assert given == {factor: getattr(task.scene, factor) for factor in task.factors}
        captions = [parse(task.caption(medium)) for medium in task.media]
        if captions:
            assert set(task.measured) == set().union(*captions)
        for medium in task.media:
            assert parse(task.caption(medium)) == {
                name: value for name, value in given.items() if name in CARRIES[medium]
            }


@pytest.mark.parametrize("source, wanted", itertools.product(("text", *MEDIA), MEDIA))
def test_second_turns_change_what_was_made_or_described(source, wanted):
    rng = np.random.default_rng(1)
    for seed in range(1, 5):
        task = make_task(source, wanted, Scene.random(rng, "unseen"), seed, turn=2)
        first, then = task.messages
        changed = parse(words(then))
        assert changed and changed.items() <= task.scene.factors(wanted).items()
        assert set(changed) <= set(task.factors)
        assert not any(part["type"] != "text" for part in then["content"])
        before = parse(words(first)) if source == "text" else read_medium(first["content"][0]["data"])
        for factor in set(before) - set(changed):
            assert before[factor] in (None, getattr(task.scene, factor))


@pytest.mark.parametrize("modality", ["depth", "normal", "pointcloud", "imu", "fmri"])
def test_worn_renderings_are_read_right(modality):
    rng = np.random.default_rng(3)
    for seed in range(0, 90, 3):
        scene = Scene.random(rng)
        assert read_medium(render_medium(modality, scene, seed)) == scene.factors(modality), seed
        assert not np.array_equal(render_worn(modality, scene, seed), tasks._RENDERERS[modality](scene, seed))


@pytest.mark.parametrize("source", ["depth", "imu", "text+depth"])
def test_what_seen_tasks_show_of_maps_and_traces_is_of_their_split(source):
    rng, modality = np.random.default_rng(4), source.removeprefix("text+")
    seen = {tuple(one.factors(modality).values()) for one in Scene.all() if one.split_for(modality) == "seen"}
    for seed in range(1, 12):
        task = make_task(source, "text", Scene.random(rng, "seen", source), seed)
        found = read_medium(task.messages[0]["content"][0]["data"])
        assert tuple(found.values()) in seen


@pytest.mark.parametrize("source", ["text", "image", "text+video"])
def test_changed_scenes_of_seen_tasks_start_from_seen_ones(source):
    rng = np.random.default_rng(2)
    for seed in range(1, 6):
        task = make_task(source, "video", Scene.random(rng, "seen"), seed, turn=1 if "+" in source else 2)
        part = task.messages[0]["content"][0]
        if part["type"] == "video":
            found = read_medium(part["data"])
            assert None in found.values() or Scene(**found).split == "seen"


@pytest.mark.parametrize("wanted", [*MEDIA, "image+audio", "video+image"])
def test_right_media_are_right_and_others_are_not(wanted):
    task = make_task("text", wanted, SCENE, 5)
    assert is_right(task, right_reply(task))
    other = right_reply(task, SCENE.replace(size="large"))
    assert is_emitted(task, other) and not is_right(task, other)
    silent = Reply(["Here is a small orange circle at the top left moving up."])
    assert not is_emitted(task, silent) and not is_right(task, silent)
    more = right_reply(task)
    more.parts.append(render_medium("image", SCENE, 1))
    assert not is_emitted(task, more) and not is_right(task, more)
    if "+" in wanted:
        swapped = right_reply(task)
        swapped.parts[1:] = swapped.parts[:0:-1]
        assert not is_right(task, swapped), "two media come in the order asked for"


def test_factors_are_right_one_by_one():
    task = make_task("image", "text", SCENE, 5)
    found = right_factors(task, Reply(["A little tangerine disc at the top right, moving up."]))
    assert found == {"shape": True, "colour": True, "size": True, "place": False}, "a picture has no motion"
    both = make_task("text", "image+audio", SCENE, 5)
    reply = right_reply(both)
    reply.parts[2] = render_medium("audio", SCENE.replace(size="large", motion="down"), 77)
    wrong = {name for name, right in right_factors(both, reply).items() if not right}
    assert wrong == {"size", "motion"}, "both media show the size, and one is wrong"
    del reply.parts[2]
    assert not any(right_factors(both, reply).values()), "a medium is missing"
    assert right_factors(make_task("image", "none", SCENE, 5), Reply(["Whatever."])) == {}


def test_words_are_right_without_media_alone():
    task = make_task("image", "text", SCENE, 5)
    assert is_right(task, Reply(["A little tangerine disc in the upper left corner."]))
    assert not is_right(task, Reply(["A little tangerine disc."]))
    assert not is_right(task, Reply(["A small orange circle at the top left.", render_medium("image", SCENE, 1)]))
    nothing = make_task("text", "none", SCENE, 5)
    assert is_right(nothing, Reply(["Whatever."]))
    assert not is_right(nothing, Reply([render_medium("audio", SCENE, 1)]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("imag", "text", SCENE, 1), r"from 'imag'.*did you mean 'image'"),
        (("text", "smell", SCENE, 1), "to 'smell'"),
        (("image+audio", "image", SCENE, 1, 2), "no request leads from 'image\\+audio' to 'image' in turn 2"),
        (("text", "text", SCENE, 1, 2), "in turn 2"),
        (("text", "text", SCENE, 1, 3), "in turn 3"),
    ],
)
def test_tasks_that_do_not_exist_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        make_task(*arguments)


@pytest.mark.parametrize("inputs", [MEDIA, INPUTS])
@pytest.mark.parametrize("kind", MIX)
def test_training_dialogues_hold_what_their_words_say(kind, inputs):
    data = SyntheticData(12, inputs=inputs, outputs=MEDIA, mix={kind: 1.0}, turns=0.4, pool=6)
    assert data[3] == data[3], "a sample is always the same"
    for index in range(len(data)):
        messages = data[index]["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        for message in messages:
            for part in message["content"]:
                if part["type"] == "text":
                    continue
                if message["role"] == "user":
                    assert part["data"].modality == part["type"] and kind != "draw"
                else:
                    assert parse(part["caption"]).items() <= parse(words(message)).items()


def test_pictures_and_sounds_of_a_pair_are_of_one_scene():
    data = SyntheticData(30, inputs=("image", "audio"), outputs=MEDIA, mix={"pair": 1.0}, pool=4)
    found = 0
    for index in range(len(data)):
        media = [part["data"] for part in data[index]["messages"][0]["content"] if part["type"] != "text"]
        if len(media) == 2:
            seen, heard = (read_medium(medium) for medium in media)
            assert all(seen[factor] == heard[factor] for factor in ("shape", "size"))
            found += 1
    assert found


def test_words_stand_before_between_and_behind_the_media_of_a_pair():
    data = SyntheticData(60, inputs=("video", "audio"), mix={"pair": 1.0}, pool=4, pairs=["audio+video"])
    contents = [data[index]["messages"][0]["content"] for index in range(len(data))]
    orders = {tuple(part["type"] for part in content) for content in contents if len(content) == 3}
    assert orders == {("text", "audio", "video"), ("audio", "text", "video"), ("audio", "video", "text")}
    for content in contents:
        if len(content) == 3:
            heard, seen = (read_medium(part["data"]) for part in content if part["type"] != "text")
            assert heard.items() <= seen.items()


def test_recipes_without_outputs_ask_for_pictures_alone():
    data = SyntheticData(40, mix={"draw": 1.0, "convert": 1.0, "edit": 1.0}, pool=3)
    made = {
        part["type"]
        for index in range(len(data))
        for message in data[index]["messages"][1::2]
        for part in message["content"]
    }
    assert made == {"text", "image"}
