"""Turns: right answers, requests that can be told apart, a small vocabulary."""

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
    dialogue,
    draw_reply,
    draw_request,
    parse,
    question,
)

SCENE = Scene("circle", "orange", "small", "top left", "up")
MEDIA = ("image", "video", "audio")


def many(make, count=400):
    rng = np.random.default_rng(0)
    return {make(rng) for _ in range(count)}


@pytest.mark.parametrize("factor", FACTORS)
def test_answers_are_right(factor):
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(300):
        scene = Scene.random(rng)
        asked, answer = question(scene, factor, rng)
        assert parse(answer) == {factor: getattr(scene, factor)}
        suggested = parse(asked).get(factor)
        if asked.startswith("Is it"):
            assert answer.startswith("Yes," if suggested == getattr(scene, factor) else "No,"), (asked, answer)
        else:
            assert answer.startswith("It is"), (asked, answer)
        kinds.add(answer.split()[0])
    assert kinds == {"It", "Yes,", "No,"}


@pytest.mark.parametrize("modality", CARRIES)
def test_there_are_eight_ways_to_ask_for_a_description(modality):
    asked = many(lambda rng: describe_request(modality, rng))
    assert len(asked) >= 8
    assert not any(parse(text) for text in asked)


def test_requests_to_draw_name_what_a_picture_shows():
    asked = many(lambda rng: draw_request(SCENE, rng))
    assert all(parse(text) == SCENE.factors("image") for text in asked)
    openings = {re.split(r" an? ", text.replace("picture of", "picture_of"))[0] for text in asked}
    assert len(openings) >= 8


@pytest.mark.parametrize("modality", MEDIA)
def test_requests_to_convert_name_nothing(modality):
    asked = many(lambda rng: convert_request(modality, rng))
    assert len(asked) >= 8
    assert not any(parse(text) for text in asked)


def test_what_asks_for_a_picture_never_coincides_with_what_does_not():
    drawing = many(lambda rng: draw_request(SCENE, rng)).union(
        *(many(lambda rng, modality=modality: convert_request(modality, rng)) for modality in MEDIA)
    )
    other = many(lambda rng: chat_pairs(rng)[0][0]).union(
        *(many(lambda rng, modality=modality: describe_request(modality, rng)) for modality in CARRIES),
        *(many(lambda rng, factor=factor: question(SCENE, factor, rng)[0]) for factor in FACTORS),
    )
    assert not drawing & other
    wanting = re.compile(
        r"^(please |can you |could you |i want )?(draw|paint|show me|make|create|give me|a picture)\b.*\w"
    )
    assert all(wanting.match(text.lower()) for text in drawing)
    assert not [
        text for text in other if wanting.match(text.lower()) and text not in ("Can you draw?", "Can you paint?")
    ]


def test_small_talk_has_replies_without_a_scene():
    turns = {turn for talk in many(lambda rng: tuple(chat_pairs(rng))) for turn in talk}
    assert len(turns) >= 12
    assert all(reply and not parse(user) and not parse(reply) for user, reply in turns)
    assert {len(talk) for talk in many(lambda rng: tuple(chat_pairs(rng)))} == {1, 2, 3}


def test_replies_with_a_picture_vary():
    assert len(many(draw_reply)) >= 4


@pytest.mark.parametrize("modality", CARRIES)
def test_dialogues_describe_and_answer_what_the_medium_carries(modality):
    rng = np.random.default_rng(0)
    for _ in range(50):
        scene = Scene.random(rng)
        (_, description), *answers = dialogue(scene, modality, rng)
        assert parse(description) == scene.factors(modality)
        assert len(answers) == 2
        for _, answer in answers:
            assert parse(answer).items() <= scene.factors(modality).items() and len(parse(answer)) == 1


def test_the_language_is_small():
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(1500):
        scene = Scene.random(rng)
        texts += [caption(scene, modality, rng) for modality in CARRIES]
        texts += [describe_request(modality, rng) for modality in CARRIES]
        texts += [convert_request(modality, rng) for modality in MEDIA]
        texts += [text for factor in FACTORS for text in question(scene, factor, rng)]
        texts += [text for turn in chat_pairs(rng) for text in turn] + [draw_request(scene, rng), draw_reply(rng)]
    assert len(set(re.findall(r"[a-z]+", " ".join(texts).lower()))) < 200


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda rng: question(SCENE, "color", rng), r"factor 'color'.*did you mean 'colour'\?"),
        (lambda rng: describe_request("depth", rng), r"modality 'depth'.*'image'"),
        (lambda rng: convert_request("text", rng), r"modality 'text'.*'image', 'video', 'audio'"),
        (lambda rng: dialogue(SCENE, "vidoe", rng), r"modality 'vidoe'.*did you mean 'video'\?"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong(np.random.default_rng(0))
