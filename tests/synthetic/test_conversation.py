"""Turns in words: right answers, requests to describe that name nothing, small talk without a scene."""

import numpy as np
import pytest

from mmbridge.errors import ConfigError
from mmbridge.synthetic import CARRIES, FACTORS, Scene, chat_pairs, describe_request, parse, question

SCENE = Scene("circle", "orange", "small", "top left", "up")


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


def test_small_talk_has_replies_without_a_scene():
    turns = {turn for talk in many(lambda rng: tuple(chat_pairs(rng))) for turn in talk}
    assert len(turns) >= 12
    assert all(reply and not parse(user) and not parse(reply) for user, reply in turns)
    assert {len(talk) for talk in many(lambda rng: tuple(chat_pairs(rng)))} == {1, 2, 3}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda rng: question(SCENE, "color", rng), r"factor 'color'.*did you mean 'colour'\?"),
        (lambda rng: describe_request("dept", rng), r"modality 'dept'.*did you mean 'depth'"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong(np.random.default_rng(0))
