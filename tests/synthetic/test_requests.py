"""Requests for media: they name what they should and nothing else, and can be told apart."""

import itertools
import re

import numpy as np
import pytest

from mmbridge.errors import ConfigError
from mmbridge.synthetic import (
    CARRIES,
    FACTORS,
    Scene,
    caption,
    chat_pairs,
    convert_request,
    describe_request,
    make_request,
    parse,
    question,
    shared_caption,
)
from mmbridge.synthetic.requests import (
    INPUTS,
    MEDIA,
    PAIRS,
    again_request,
    another_request,
    change_request,
    change_scene,
    impossible_request,
    missing_request,
    refusal,
    then_request,
)

SCENE = Scene("circle", "orange", "small", "top left", "up")
SOURCES = ("text", *INPUTS, *PAIRS)
ORDERS = list(itertools.permutations(MEDIA, 2))


def many(make, count=400):
    rng = np.random.default_rng(0)
    return {make(rng) for _ in range(count)}


def asking_for(media):
    """Requests that name these media, in every way."""
    found = many(lambda rng: make_request(SCENE, media, rng))
    found |= many(lambda rng: convert_request(str(rng.choice(SOURCES)), media, rng))
    if isinstance(media, str):
        found |= many(lambda rng: change_request(SCENE, ("colour",), media, rng))
        found |= many(lambda rng: then_request(SCENE, (), media, rng) if rng.random() < 0.3 else
                      then_request(SCENE, ("size",), media, rng))  # fmt: skip
    return found


@pytest.mark.parametrize("medium", MEDIA)
def test_requests_from_words_name_what_the_medium_shows(medium):
    asked = many(lambda rng: make_request(SCENE, medium, rng))
    assert all(parse(text) == SCENE.factors(medium) for text in asked)
    assert len({re.split(r" an? (?!picture|video|clip|sound)", text)[0] for text in asked}) >= 8


@pytest.mark.parametrize("media", ORDERS)
def test_requests_for_two_name_what_either_shows(media):
    shown = {factor: value for medium in media for factor, value in SCENE.factors(medium).items()}
    assert all(parse(text) == shown for text in many(lambda rng: make_request(SCENE, media, rng)))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("wanted", [*MEDIA, *ORDERS])
def test_requests_to_convert_name_nothing(source, wanted):
    asked = many(lambda rng: convert_request(source, wanted, rng))
    assert len(asked) >= 8
    assert not any(parse(text) for text in asked)


def test_no_request_is_for_two_different_things():
    groups = {medium: asking_for(medium) for medium in MEDIA} | {pair: asking_for(pair) for pair in ORDERS}
    groups["again"] = many(lambda rng: again_request(SCENE, ("size",), rng))
    groups["other"] = many(lambda rng: impossible_request(None, SCENE, rng)[0]) | many(another_request)
    groups["words"] = many(lambda rng: chat_pairs(rng)[0][0]).union(
        many(lambda rng: change_request(SCENE, ("size",), "text", rng)),
        *(many(lambda rng, source=source: describe_request(source, rng)) for source in (*CARRIES, *PAIRS)),
        *(many(lambda rng, factor=factor: question(SCENE, factor, rng)[0]) for factor in FACTORS),
    )
    for one, other in itertools.combinations(groups, 2):
        assert not groups[one] & groups[other], (one, other)


NAMING = {
    "image": r"(draw|paint)\b|\b(picture|image) of\b|as a picture",
    "video": r"(film|animate)\b|\b(video|clip) of\b|as a video",
    "audio": r"play\b|hear (?!it\.$)|\bsound of\b|as a sound",
}


@pytest.mark.parametrize("medium", MEDIA)
def test_a_request_names_its_medium_and_no_other(medium):
    for text in many(lambda rng: make_request(SCENE, medium, rng)) | many(
        lambda rng: then_request(SCENE, ("size",), medium, rng)
    ):
        assert [name for name, words in NAMING.items() if re.search(words, text.lower())] == [medium], text


@pytest.mark.parametrize("factor", FACTORS)
def test_changes_are_named_and_nothing_else(factor):
    changed = {factor: getattr(SCENE, factor)}
    texts = many(lambda rng: again_request(SCENE, (factor,), rng))
    texts |= many(lambda rng: change_request(SCENE, (factor,), "video", rng))
    texts |= many(lambda rng: then_request(SCENE, (factor,), "video", rng))
    assert all(parse(text) == changed for text in texts)
    assert len(texts) > 20
    both = many(lambda rng: again_request(SCENE, ("size", "motion"), rng))
    assert all(parse(text) == {"size": "small", "motion": "up"} for text in both)


@pytest.mark.parametrize("split", [None, "seen", "unseen"])
def test_changed_scenes_stay_in_the_split_and_differ_in_what_is_named(split):
    rng = np.random.default_rng(0)
    counts = []
    for _ in range(150):
        scene, medium = Scene.random(rng, split), str(rng.choice(MEDIA))
        other, changed = change_scene(scene, CARRIES[medium], rng, split)
        assert set(changed) <= set(CARRIES[medium])
        assert changed == tuple(factor for factor in FACTORS if getattr(scene, factor) != getattr(other, factor))
        assert split in (None, other.split)
        counts.append(len(changed))
    assert {1, 2} <= set(counts)
    assert split == "unseen" or 0 not in counts


def test_changes_keep_to_the_split_of_their_source():
    rng = np.random.default_rng(0)
    for _ in range(100):
        other, _ = change_scene(Scene.random(rng, "seen", "depth"), CARRIES["depth"], rng, "seen", "depth")
        assert other.split_for("depth") == "seen"


@pytest.mark.parametrize("modality", CARRIES)
def test_what_is_shared_with_itself_is_the_canonical_caption(modality):
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = Scene.random(rng)
        assert shared_caption(scene, CARRIES[modality], modality) == caption(scene, modality)


@pytest.mark.parametrize(
    ("source", "media", "words"),
    [
        ("image", ["audio"], "a small circle"),
        ("audio", ["image"], "a small circle"),
        ("audio", ["video"], "a small circle moving up"),
        ("image", ["video"], "a small orange circle at the top left"),
        ("audio", ["image", "audio"], "a small circle moving up"),
        ("video", ["image", "audio"], "a small orange circle at the top left moving up"),
        ("depth", ["image"], "a small circle at the top left"),
        ("imu", ["image"], "a small object"),
        ("imu", ["video"], "a small object moving up"),
        ("fmri", ["audio"], "a small circle moving up"),
    ],
)
def test_shared_captions_name_what_both_sides_carry(source, media, words):
    assert shared_caption(SCENE, CARRIES[source], *media) == words


def test_what_cannot_be_done_is_said_without_naming_a_scene():
    replies = {refusal(medium) for medium in MEDIA}
    replies |= {impossible_request("image", SCENE, np.random.default_rng(seed))[1] for seed in range(20)}
    replies |= {missing_request(source, "image", np.random.default_rng(0))[1] for source in MEDIA}
    assert {"I can't make a video.", "I can't make a 3D model.", "I hear no sound.", "I see no picture."} <= replies
    assert not any(parse(reply) for reply in replies)
    for source in MEDIA:
        asked = many(lambda rng, source=source: missing_request(source, "image", rng)[0], 50)
        assert all(re.search("picture|image|video|clip|sound|audio", text) for text in asked)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda rng: make_request(SCENE, "text", rng), r"medium 'text'.*'image', 'video', 'audio'"),
        (lambda rng: convert_request("dept", "image", rng), r"source 'dept'.*did you mean 'depth'"),
        (lambda rng: convert_request("image", ("image", "vidoe"), rng), r"did you mean 'video'\?"),
        (lambda rng: refusal("smell"), r"medium 'smell'"),
    ],
)
def test_unknown_names_are_refused(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong(np.random.default_rng(0))
