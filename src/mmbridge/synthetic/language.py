"""Words for scenes: captions with synonyms and several phrasings, and the judge that reads factors back from text.

Every synonym belongs to exactly one value, so that a caption never loses what it names. `caption` without a generator
is the canonical phrasing, which gold conditions and tests use.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import TypeVar

import numpy as np

from mmbridge.synthetic.scene import CARRIES, FACTORS, Scene, lookup

_T = TypeVar("_T")

NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "circle": ("circle", "disc", "disk"),
        "square": ("square", "box", "block"),
        "triangle": ("triangle", "wedge", "pyramid"),
        "star": ("star", "pentagram", "starburst"),
        "cross": ("cross", "plus", "plus sign"),
        "ring": ("ring", "hoop", "donut"),
    },
    "colour": {
        "red": ("red", "crimson", "scarlet"),
        "orange": ("orange", "tangerine", "apricot"),
        "yellow": ("yellow", "lemon", "canary"),
        "green": ("green", "emerald", "grassy"),
        "cyan": ("cyan", "turquoise", "aqua"),
        "blue": ("blue", "sapphire", "cobalt"),
        "purple": ("purple", "violet", "plum"),
        "pink": ("pink", "rose", "rosy"),
    },
    "size": {
        "small": ("small", "little", "tiny"),
        "medium": ("medium", "medium-sized", "mid-sized"),
        "large": ("large", "big", "huge"),
    },
    "place": {
        "centre": ("at the centre", "in the centre", "in the middle", "in the center"),
        **{
            f"{row} {side}": (
                f"at the {row} {side}",
                f"in the {row} {side} corner",
                f"at the {other} {side}",
                f"in the {other} {side} corner",
            )
            for row, other in (("top", "upper"), ("bottom", "lower"))
            for side in ("left", "right")
        },
    },
    "motion": {
        "still": ("standing still", "staying still", "resting"),
        "left": ("moving left", "sliding left", "drifting to the left"),
        "right": ("moving right", "sliding right", "drifting to the right"),
        "up": ("moving up", "rising", "climbing"),
        "down": ("moving down", "falling", "sinking"),
        "circling": ("circling", "going round", "orbiting"),
    },
}
"""What each value may be called in a caption; the first name is the canonical one."""

_FINITE = {
    "standing": "stands", "staying": "stays", "resting": "rests", "moving": "moves", "sliding": "slides",
    "drifting": "drifts", "rising": "rises", "climbing": "climbs", "falling": "falls", "sinking": "sinks",
    "circling": "is circling", "going": "goes", "orbiting": "orbits",
}  # fmt: skip

TEMPLATES: dict[str, tuple[str, ...]] = {
    "image": (
        "{thing} {place}",
        "There is {thing} {place}.",
        "I see {thing} {place}.",
        "{place}, there is {thing}.",
        "The picture shows {thing} {place}.",
        "You can see {thing} {place}.",
        "It is {thing} {place}.",
        "The {shape} {place} is {size} and {colour}.",
    ),
    "video": (
        "{thing} {place} {moving}",
        "There is {thing} {place} {moving}.",
        "I see {thing} {place}. It {moves}.",
        "{place}, {thing} {moves}.",
        "The video shows {thing} {place} {moving}.",
        "You can see {thing} {moving} {place}.",
        "The {bare} {place} {moves}.",
        "The {shape} {place} is {size} and {colour}, and it {moves}.",
    ),
    "audio": (
        "{thing} {moving}",
        "There is {thing} {moving}.",
        "I hear {thing} {moving}.",
        "You can hear {thing} {moving}.",
        "It sounds like {thing} {moving}.",
        "The sound comes from {thing} {moving}.",
        "{thing} {moves}.",
        "The {shape} is {size}, and it {moves}.",
    ),
    "depth": (
        "{thing} {place}",
        "There is {thing} {place}.",
        "I see {thing} {place}.",
        "{place}, there is {thing}.",
        "The depth map shows {thing} {place}.",
        "You can see {thing} {place}.",
        "It is {thing} {place}.",
        "The {shape} {place} is {size}.",
    ),
    "normal": (
        "{thing} {place}",
        "There is {thing} {place}.",
        "I see {thing} {place}.",
        "{place}, there is {thing}.",
        "The normal map shows {thing} {place}.",
        "You can see {thing} {place}.",
        "It is {thing} {place}.",
        "The {shape} {place} is {size}.",
    ),
    "pointcloud": (
        "{thing} {place}",
        "There is {thing} {place}.",
        "I see {thing} {place}.",
        "{place}, there is {thing}.",
        "The point cloud shows {thing} {place}.",
        "You can see {thing} {place}.",
        "It is {thing} {place}.",
        "The {shape} {place} is {size} and {colour}.",
    ),
    "imu": (
        "{thing} {moving}",
        "There is {thing} {moving}.",
        "It is {thing} {moving}.",
        "The sensor trace shows {thing} {moving}.",
        "{thing} {moves}.",
        "It {moves}, and it is {size}.",
        "The object is {size}, and it {moves}.",
        "The object {moves}. It is {size}.",
    ),
    "fmri": (
        "{thing} {place} {moving}",
        "There is {thing} {place} {moving}.",
        "It is {thing} {place} {moving}.",
        "{place}, {thing} {moves}.",
        "The brain scan shows {thing} {place} {moving}.",
        "It is {thing} {moving} {place}.",
        "The {bare} {place} {moves}.",
        "The {shape} {place} is {size} and {colour}, and it {moves}.",
    ),
}
TEMPLATES["text"] = tuple(template for template in TEMPLATES["video"] if "video" not in template)
"""Captions of each modality, the canonical one first."""

_ORDER = ("size", "colour", "shape")


def pick(options: Sequence[_T], rng: np.random.Generator) -> _T:
    """One of some options, each equally likely."""
    return options[int(rng.integers(len(options)))]


def with_article(phrase: str) -> str:
    """The phrase behind "a" or "an"."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def say(scene: Scene, factor: str, rng: np.random.Generator | None = None) -> str:
    """One name of a factor's value: the canonical one, or with a generator any of its synonyms."""
    names = NAMES[factor][getattr(scene, factor)]
    return names[0] if rng is None else pick(names, rng)


def fill(template: str, scene: Scene, modality: str, rng: np.random.Generator | None = None) -> str:
    """Put names of a scene's factors into a template such as "There is {thing} {place}.".

    Args:
        template: May use {shape} {colour} {size} {place}, {bare} and {thing} (without and with
            article), {moving}, {moves}.
        scene: What is described.
        modality: Decides whether {thing} has a colour and a shape; without a shape it is an "object".
        rng: Chooses synonyms; without one the canonical names are used.
    """
    names = {factor: say(scene, factor, rng) for factor in FACTORS}
    bare = _noun([names[factor] for factor in _ORDER if factor in CARRIES[modality]], "shape" in CARRIES[modality])
    verb, *rest = names["motion"].split()
    text = template.format(
        **names, bare=bare, thing=with_article(bare), moving=names["motion"], moves=" ".join([_FINITE[verb], *rest])
    )
    return text[0].upper() + text[1:] if text.endswith((".", "?")) else text


def caption(scene: Scene, modality: str = "text", rng: np.random.Generator | None = None) -> str:
    """Name exactly the factors that a modality carries.

    Args:
        scene: What is described.
        modality: One of ``CARRIES``.
        rng: Chooses the phrasing and the synonyms; without one the caption is the canonical one.

    Raises:
        ConfigError: the modality is not known.
    """
    templates = TEMPLATES[lookup("modality", modality, tuple(CARRIES))]
    return fill(templates[0] if rng is None else pick(templates, rng), scene, modality, rng)


def _noun(names: Sequence[str], has_shape: bool) -> str:
    """Names of size, colour and shape together: "small red circle", or without a shape "small object"."""
    return " ".join(names if has_shape else [*names, "object"])


def shared_caption(scene: Scene, factors: Collection[str], *media: str) -> str:
    """Name, canonically, the factors that are known and that a medium can show.

    Args:
        scene: What is described.
        factors: The factors that are known, such as those that a source carries.
        media: Modalities of what is made from it; of several, whatever one of them can show is named.

    Returns:
        Such as "a small circle", the picture of a sound, or "a small object", that of an IMU trace. Of all that a
        modality carries it is its canonical caption.
    """
    named = [factor for factor in factors if any(factor in CARRIES[medium] for medium in media)]
    thing = with_article(_noun([say(scene, factor) for factor in _ORDER if factor in named], "shape" in named))
    return " ".join([thing, *(say(scene, factor) for factor in ("place", "motion") if factor in named)])


def sentence(text: str) -> str:
    """A caption as a sentence."""
    text = text.rstrip(".")
    return text[:1].upper() + text[1:] + "."


def _vocabulary() -> dict[str, tuple[str, str]]:
    """Every phrase that names a value, with hyphens as spaces, and the factor and value it names."""
    words: dict[str, tuple[str, str]] = {}
    for factor in ("shape", "colour", "size"):
        for value, names in NAMES[factor].items():
            words |= {name.replace("-", " "): (factor, value) for name in names}
    for value, names in NAMES["place"].items():
        words |= {re.sub("^(at|in) the | corner$", "", name): ("place", value) for name in names}
    for value, names in NAMES["motion"].items():
        for verb, *rest in map(str.split, names):
            words |= {" ".join([form, *rest]): ("motion", value) for form in (verb, _FINITE[verb].split()[-1])}
    for value in ("left", "right", "up", "down"):
        for verb in ("moving", "moves", "sliding", "slides", "drifting", "drifts"):
            words |= {f"{verb} {way}": ("motion", value) for way in (value, f"to the {value}", f"{value}wards")}
    return words | {"not moving": ("motion", "still"), "does not move": ("motion", "still")}


_WORDS = _vocabulary()
_PHRASE = re.compile(r"\b(" + "|".join(sorted(_WORDS, key=len, reverse=True)) + r")\b")
_NEGATION = re.compile(r"\b(not|no|never|without|neither|nor|cannot)\b|n't\b")


def parse(text: str, factors: Iterable[str] | None = None) -> dict[str, str]:
    """Read factors back from text; this is the text judge.

    The longest phrase wins, upper and lower case are the same, and what a clause denies does not count. A factor that
    the text gives two values is left out, and so is one that it does not name.

    Args:
        text: Any text; a bare value such as "left" is read as an answer.
        factors: The factors to read; by default all of them.

    Returns:
        The value of each factor that the text names.

    Raises:
        ConfigError: a factor is not known.
    """
    wanted = [lookup("factor", factor, tuple(FACTORS)) for factor in (FACTORS if factors is None else factors)]
    text = " ".join(text.lower().replace("-", " ").replace("’", "'").split())
    found: dict[str, set[str]] = {factor: set() for factor in FACTORS}
    for clause in re.split(r"[.,;:!?\n]|\bbut\b", text):
        if not _NEGATION.search(_PHRASE.sub(" ", clause)):
            for phrase in _PHRASE.findall(clause):
                factor, value = _WORDS[phrase]
                found[factor].add(value)
    bare = text.strip(" .!")
    if bare in FACTORS["motion"]:
        found["motion"].add(bare)
    return {factor: found[factor].pop() for factor in wanted if len(found[factor]) == 1}
