"""Scenes: one object, described by five named factors, that every renderer and every sentence is about.

A scene knows nothing of pixels or samples; `CARRIES` says which factors a modality can show at all. Two rules on the
factors' indices hold out a fifth of what a picture can show and about a fifth of what a sound can carry, so that a
model can be tested on combinations that it never met. Media that carry too little for these rules to hold out anything
have rules of their own.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from mmbridge.errors import ConfigError

FACTORS: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "cross", "ring"),
    "colour": ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    "size": ("small", "medium", "large"),
    "place": ("top left", "top right", "centre", "bottom left", "bottom right"),
    "motion": ("still", "left", "right", "up", "down", "circling"),
}
CARRIES: dict[str, tuple[str, ...]] = {
    "text": ("shape", "colour", "size", "place", "motion"),
    "image": ("shape", "colour", "size", "place"),
    "video": ("shape", "colour", "size", "place", "motion"),
    "audio": ("shape", "size", "motion"),
    "depth": ("shape", "size", "place"),
    "normal": ("shape", "size", "place"),
    "pointcloud": ("shape", "colour", "size", "place"),
    "imu": ("size", "motion"),
    "fmri": ("shape", "colour", "size", "place", "motion"),
}
SPLITS = ("seen", "unseen", "between")


def lookup(kind: str, name: str, accepted: tuple[str, ...]) -> str:
    """Return `name` if it is one of `accepted`.

    Raises:
        ConfigError: it is not; the message suggests the closest name.
    """
    if name in accepted:
        return name
    close = difflib.get_close_matches(str(name), accepted, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise ConfigError(f"{kind} {name!r} is not known; use one of {', '.join(map(repr, accepted))}{hint}")


@dataclass(frozen=True)
class Scene:
    """One object and what it does.

    Args:
        shape: One of `FACTORS["shape"]`.
        colour: One of `FACTORS["colour"]`.
        size: One of `FACTORS["size"]`.
        place: One of `FACTORS["place"]`.
        motion: One of `FACTORS["motion"]`.

    Raises:
        ConfigError: a value is not in its factor's list.
    """

    shape: str
    colour: str
    size: str
    place: str
    motion: str

    def __post_init__(self) -> None:
        for factor, accepted in FACTORS.items():
            lookup(factor, getattr(self, factor), accepted)

    @staticmethod
    def all() -> tuple[Scene, ...]:
        """All 4320 scenes, in the order of `FACTORS` (the last factor changes fastest)."""
        return _all_scenes()

    @staticmethod
    def random(rng: np.random.Generator, split: str | None = None, source: str = "text") -> Scene:
        """A scene drawn uniformly, from one split ("seen", "unseen", "between") or from all.

        Args:
            rng: Draws it.
            split: The split; None for all scenes.
            source: What it is to be shown by, which decides the split (see `split_for`); several are joined by "+".

        Raises:
            ConfigError: the split or the source is not known.
        """
        scenes = _scenes_of(None if split is None else lookup("split", split, SPLITS), source)
        return scenes[rng.integers(len(scenes))]

    def replace(self, **values: Any) -> Scene:
        """The same scene with some factors changed.

        Raises:
            ConfigError: a factor or a value is not known.
        """
        for factor in values:
            lookup("factor", factor, tuple(FACTORS))
        return replace(self, **values)

    def factors(self, modality: str = "text") -> dict[str, str]:
        """The factors that a modality carries, with this scene's values.

        Raises:
            ConfigError: the modality is not known.
        """
        lookup("modality", modality, tuple(CARRIES))
        return {factor: getattr(self, factor) for factor in CARRIES[modality]}

    @property
    def indices(self) -> dict[str, int]:
        """The position of each value in its factor's list."""
        return {factor: FACTORS[factor].index(value) for factor, value in zip(FACTORS, astuple(self), strict=True)}

    @property
    def split(self) -> str:
        """The scene's set: "seen" if neither rule holds it out, "unseen" if both do, else "between" (unused)."""
        return self.split_for("text")

    def split_for(self, source: str) -> str:
        """The scene's set where it is shown by a modality, or by several joined by "+".

        Depth and normal maps and IMU traces have a rule of their own, which has to agree with the other two.

        Raises:
            ConfigError: a modality is not known.
        """
        names = {lookup("modality", name, tuple(CARRIES)) for name in source.split("+")}
        held_out = {is_visibly_held_out(self), is_audibly_held_out(self)}
        held_out |= {HELD_OUT[name](self) for name in names if name in HELD_OUT}
        return "between" if len(held_out) == 2 else "unseen" if held_out == {True} else "seen"


def is_visibly_held_out(scene: Scene) -> bool:
    """Whether this shape, colour, size and place never appear together in training: 144 of 720 combinations."""
    at = scene.indices
    return (at["shape"] + at["colour"] + 2 * at["size"] + at["place"]) % 5 == 0


def is_audibly_held_out(scene: Scene) -> bool:
    """Whether this shape, size and motion never sound together in training: 22 of 108 combinations."""
    at = scene.indices
    return (at["shape"] + at["size"] + at["motion"]) % 5 == 0


def is_held_out_in_relief(scene: Scene) -> bool:
    """Whether no depth or normal map in training shows this shape, size and place: 18 of 90 combinations."""
    at = scene.indices
    return (at["shape"] + at["size"] + 2 * at["place"]) % 5 == 0


def is_held_out_in_motion(scene: Scene) -> bool:
    """Whether no IMU trace in training is of this size and motion: 6 of 18 combinations, one of each motion."""
    at = scene.indices
    return (at["size"] + at["motion"]) % 3 == 0


HELD_OUT: dict[str, Callable[[Scene], bool]] = {
    "depth": is_held_out_in_relief,
    "normal": is_held_out_in_relief,
    "imu": is_held_out_in_motion,
}
"""The rules of media that carry too little for the first two."""


@cache
def _all_scenes() -> tuple[Scene, ...]:
    return tuple(Scene(*values) for values in itertools.product(*FACTORS.values()))


@cache
def _scenes_of(split: str | None, source: str) -> tuple[Scene, ...]:
    return tuple(scene for scene in _all_scenes() if split is None or scene.split_for(source) == split)
