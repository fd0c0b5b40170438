"""Captions name exactly what their modality carries, and the text judge reads every one of them back."""

import re

import numpy as np
import pytest

from mmbridge.errors import ConfigError
from mmbridge.synthetic import CARRIES, FACTORS, Scene, caption, parse
from mmbridge.synthetic.language import NAMES

SCENE = Scene("circle", "red", "small", "top left", "up")


@pytest.mark.parametrize("modality", CARRIES)
def test_every_caption_of_every_scene_parses_back(modality):
    rng = np.random.default_rng(0)
    for scene in Scene.all():
        expected = scene.factors(modality)
        for text in (caption(scene, modality), *(caption(scene, modality, rng) for _ in range(3))):
            assert parse(text) == expected, text


@pytest.mark.parametrize(
    ("modality", "words"),
    [
        ("image", "a small red circle at the top left"),
        ("video", "a small red circle at the top left moving up"),
        ("text", "a small red circle at the top left moving up"),
        ("audio", "a small circle moving up"),
        ("depth", "a small circle at the top left"),
        ("normal", "a small circle at the top left"),
        ("pointcloud", "a small red circle at the top left"),
        ("imu", "a small object moving up"),
        ("fmri", "a small red circle at the top left moving up"),
    ],
)
def test_canonical_captions(modality, words):
    assert caption(SCENE, modality) == words


def test_canonical_captions_of_one_modality_are_distinct():
    assert len({caption(scene) for scene in Scene.all()}) == 4320


def test_article_before_a_vowel():
    assert caption(SCENE.replace(colour="orange", size="small"), "image").startswith("a small orange")
    texts = [caption(Scene.random(rng), "text", rng) for rng in [np.random.default_rng(1)] for _ in range(500)]
    assert not [text for text in texts if re.search(r"\b(a [aeiou]|an [^aeiou])", text, re.IGNORECASE)]


@pytest.mark.parametrize("modality", CARRIES)
def test_phrasings_vary_and_repeat_with_their_seed(modality):
    rng = np.random.default_rng(0)
    synonyms = sorted((name for names in NAMES.values() for words in names.values() for name in words), key=len)
    skeletons = set()
    for _ in range(300):
        text = caption(SCENE, modality, rng).lower()
        for name in reversed(synonyms):
            text = text.replace(name, "_")
        skeletons.add(text)
    assert len(skeletons) >= 6
    assert caption(SCENE, modality, np.random.default_rng(4)) == caption(SCENE, modality, np.random.default_rng(4))


def test_each_synonym_means_one_value_and_each_value_has_at_least_two():
    for factor, names in NAMES.items():
        assert set(names) == set(FACTORS[factor])
        for value, words in names.items():
            assert len(words) >= 2
            for word in words:
                assert parse(f"it is {word}") == {factor: value}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ("Hello! How are you?", {}),
        ("That is right.", {}),
        ("left", {"motion": "left"}),
        ("Still.", {"motion": "still"}),
        ("A RED Disc", {"colour": "red", "shape": "circle"}),
        ("a redder circles", {}),
        ("a medium-sized ring in the upper-left corner", {"size": "medium", "shape": "ring", "place": "top left"}),
        ("moving left at the top right", {"motion": "left", "place": "top right"}),
        ("drifting to the right in the lower left corner", {"motion": "right", "place": "bottom left"}),
        ("a red blue star", {"shape": "star"}),
        ("a crimson red star", {"colour": "red", "shape": "star"}),
        ("a red circle and a blue square", {}),
        ("It is not red.", {}),
        ("No, it is blue.", {"colour": "blue"}),
        ("It isn't red but green.", {"colour": "green"}),
        ("The star is not moving.", {"shape": "star", "motion": "still"}),
    ],
)
def test_parse(text, found):
    assert parse(text) == found


def test_parse_only_the_wanted_factors():
    assert parse(caption(SCENE), ["size", "motion"]) == {"size": "small", "motion": "up"}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: caption(SCENE, "audi"), r"modality 'audi'.*did you mean 'audio'\?"),
        (lambda: parse("red", ["color"]), r"factor 'color'.*did you mean 'colour'\?"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong()
