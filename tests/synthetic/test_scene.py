"""Scenes and their split: what is held out, and that nothing held out leaks through any modality."""

import itertools
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from mmbridge.errors import ConfigError
from mmbridge.synthetic import CARRIES, FACTORS, Scene

SCENES = Scene.all()


def of_split(split, source="text"):
    return {scene for scene in SCENES if scene.split_for(source) == split}


def test_all_scenes_are_different_and_counted():
    assert len(SCENES) == len(set(SCENES)) == 4320
    assert Counter(scene.split for scene in SCENES) == {"seen": 2752, "unseen": 176, "between": 1392}


@pytest.mark.parametrize(
    ("modality", "combinations", "seen"),
    [
        ("image", 720, 576),
        ("pointcloud", 720, 576),
        ("audio", 108, 86),
        ("depth", 90, 72),
        ("normal", 90, 72),
        ("imu", 18, 12),
    ],
)
def test_a_fifth_to_a_third_of_what_a_modality_carries_is_held_out(modality, combinations, seen):
    assert len({tuple(scene.factors(modality).values()) for scene in SCENES}) == combinations
    assert len({tuple(scene.factors(modality).values()) for scene in of_split("seen", modality)}) == seen


@pytest.mark.parametrize("modality", CARRIES)
def test_no_unseen_combination_occurs_among_the_seen(modality):
    seen = {tuple(scene.factors(modality).values()) for scene in of_split("seen", modality)}
    unseen = {tuple(scene.factors(modality).values()) for scene in of_split("unseen", modality)}
    assert unseen and not seen & unseen
    for factor, values in Scene.all()[0].factors(modality).items():
        assert {getattr(scene, factor) for scene in of_split("unseen", modality)} == set(FACTORS[factor]), values


@pytest.mark.parametrize("source", ["depth", "normal", "imu", "text+depth", "depth+imu"])
def test_a_split_of_their_own_is_part_of_the_split(source):
    for split in ("seen", "unseen"):
        assert of_split(split, source) < of_split(split)


@pytest.mark.parametrize("source", ["image", "video", "audio", "pointcloud", "fmri", "image+audio", "audio+video"])
def test_other_media_have_the_split_of_the_scene(source):
    assert all(scene.split_for(source) == scene.split for scene in SCENES)


@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_every_value_occurs_in_both_sets(split):
    for factor, values in FACTORS.items():
        assert {getattr(scene, factor) for scene in of_split(split)} == set(values)


def test_every_pair_of_values_is_seen():
    seen = of_split("seen")
    for first, second in itertools.combinations(FACTORS, 2):
        pairs = {(getattr(scene, first), getattr(scene, second)) for scene in seen}
        assert len(pairs) == len(FACTORS[first]) * len(FACTORS[second])


def test_random_draws_from_the_whole_split_and_repeats_with_its_seed():
    drawn = [Scene.random(np.random.default_rng(3), "unseen") for _ in range(2)]
    assert drawn[0] == drawn[1]
    rng = np.random.default_rng(0)
    assert {Scene.random(rng, "unseen") for _ in range(3000)} == of_split("unseen")
    assert {Scene.random(rng, "unseen", "depth") for _ in range(600)} == of_split("unseen", "depth")
    assert {Scene.random(rng).split for _ in range(300)} == {"seen", "unseen", "between"}


def test_replace_and_factors():
    scene = Scene("ring", "red", "small", "centre", "up")
    assert scene.replace(colour="pink", motion="still") == Scene("ring", "pink", "small", "centre", "still")
    assert scene.factors("audio") == {"shape": "ring", "size": "small", "motion": "up"}
    assert list(scene.factors()) == list(FACTORS)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda: Scene("circel", "red", "small", "centre", "up"),
            r"shape 'circel'.*'circle', 'square'.*did you mean 'circle'\?",
        ),
        (lambda: SCENES[0].replace(color="red"), r"factor 'color'.*did you mean 'colour'\?"),
        (lambda: SCENES[0].factors("sound"), r"modality 'sound'.*'text', 'image', 'video', 'audio'"),
        (lambda: Scene.random(np.random.default_rng(0), "uneen"), r"split 'uneen'.*did you mean 'unseen'\?"),
        (lambda: SCENES[0].split_for("image+dept"), r"modality 'dept'.*did you mean 'depth'\?"),
    ],
)
def test_unknown_names_are_refused_with_a_suggestion(wrong, words):
    with pytest.raises(ConfigError, match=words):
        wrong()


def test_the_world_needs_neither_torch_nor_scipy():
    program = "import sys, mmbridge.synthetic; print(sorted({'torch', 'scipy', 'av'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
