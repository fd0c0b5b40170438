"""Requests for media: from words, from a medium, from two, and with a change, in this turn or after an earlier one.

A request names the medium that it wants by a verb or a noun that belongs to that medium alone, and nothing in
`conversation` does, so that a bridge can learn to make a medium when asked for it and only then. The one
exception is "The same, but blue.", which wants what was made before.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from mmbridge.synthetic.language import NAMES, fill, pick, say, with_article
from mmbridge.synthetic.scene import CARRIES, FACTORS, Scene, lookup

MEDIA = ("image", "video", "audio")
"""What can be asked for beside words."""
INPUTS = [*MEDIA, *(name for name in CARRIES if name not in ("text", *MEDIA))]
"""What can come in beside words."""
PAIRS = ("image+audio", "audio+video")
"""Two media of one object that come in together."""

_VERBS = {"image": ("draw", "paint"), "video": ("film", "animate"), "audio": ("play", "let me hear")}
_NOUNS = {"image": ("picture", "image"), "video": ("video", "clip"), "audio": ("sound", "audio")}
_MAKE = {
    "image": (
        "Draw {it}.", "Please draw {it}.", "Paint {it}.", "Please paint {it}.", "Show me a picture of {it}.",
        "Make a picture of {it}.", "Create an image of {it}.", "Give me an image of {it}.",
        "I want a picture of {it}.", "Can you draw {it}?", "Could you paint {it}?",
    ),
    "video": (
        "Film {it}.", "Please film {it}.", "Animate {it}.", "Please animate {it}.", "Show me a video of {it}.",
        "Make a video of {it}.", "Create a clip of {it}.", "Give me a clip of {it}.",
        "I want a video of {it}.", "Can you film {it}?", "Could you animate {it}?",
    ),
    "audio": (
        "Play {it}.", "Please play {it}.", "Play the sound of {it}.", "Let me hear {it}.", "Please let me hear {it}.",
        "Make the sound of {it}.", "Create a sound of {it}.", "Give me the sound of {it}.",
        "I want to hear {it}.", "Can you play {it}?", "Could you play the sound of {it}?",
    ),
}  # fmt: skip
_MAKE_TWO = (
    "{Do} and {also} {it}.", "Please {do} and {also} {it}.", "Can you {do} and {also} {it}?",
    "Make a {noun} and a {other} of {it}.", "I want a {noun} and a {other} of {it}.",
    "Give me a {noun} and a {other} of {it}.",
)  # fmt: skip
GIVEN = {
    "text": ("it", "this", "this object", "this scene"),
    "image": (
        "this object", "this object again", "this picture", "the object in the picture", "what you see",
        "the object in the image",
    ),
    "video": (
        "the object in the video", "what you see in the video", "what moves", "this video", "the object in the clip",
        "what happens",
    ),
    "audio": (
        "what you hear", "what makes this sound", "the object in the sound", "this sound", "the object in the audio",
    ),
    "depth": (
        "this object", "what you see", "the object in the depth map", "this depth map", "what the depth map shows",
    ),
    "normal": (
        "this object", "what you see", "the object in the normal map", "this normal map", "what the normal map shows",
    ),
    "pointcloud": (
        "this object", "what you see", "the object in the point cloud", "this point cloud",
        "what the point cloud shows",
    ),
    "imu": (
        "what moves", "what happens", "the object in the sensor trace", "this sensor trace",
        "what the sensor trace shows",
    ),
    "fmri": (
        "this object", "this", "the object in the brain scan", "this brain scan", "what the brain scan shows",
    ),
    "image+audio": (
        "what you see and hear", "the object in the picture, moving as in the sound",
        "what is in the picture and in the sound", "what you see, moving as you hear it",
    ),
    "audio+video": (
        "what you see and hear", "the object in the video and in the sound", "what is in the video and in the sound",
        "what moves and makes this sound",
    ),
}  # fmt: skip
"""What requests call that which is given, by modality."""
_DESCRIBE_CHANGED = (
    "Describe {it}, but {change}.",
    "Tell me what {it} is, but {change}.",
    "What is {it}, but {change}?",
)
_SAME = (
    "The same, but {change}.", "The same again, but {change}.", "Again, but {change}.", "Once more, but {change}.",
    "Now {change}.", "This time {change}.",
)  # fmt: skip
_TURN_IT = ("Now make it {change}.", "Make it {change}.", "Please make it {change}.")
_THEN = ("Now {do} it.", "{Do} it now.", "The same as a {noun}.", "Now make a {noun} of it.")
_THEN_CHANGED = (
    "The same as a {noun}, {change}.", "The same as a {noun}, but {change}.", "Now {do} it, but {change}.",
    "Now make a {noun} of it, but {change}.",
)  # fmt: skip
_ANOTHER = ("And this?", "And this one?", "What about this?", "Now the same for this.")
_IMPOSSIBLE = ("3D model", "statue", "puppet", "poem", "map", "cake")
_MAKE_IMPOSSIBLE = ("Make a {noun} of {it}.", "I want a {noun} of {it}.", "Can you make a {noun} of {it}?")


def make_request(scene: Scene, wanted: str | Sequence[str], rng: np.random.Generator) -> str:
    """Ask for one medium of a scene, or for two, naming all that they show, with synonyms.

    Raises:
        ConfigError: a wanted medium is not "image", "video" or "audio".
    """
    media = _media(wanted)
    shown = [modality for modality in ("image", "audio") if any(_shows(medium, modality) for medium in media)]
    carrier = "text" if len(shown) == 2 else shown[0]
    return fill(_wording(media, rng, _described(carrier)), scene, carrier, rng)


def convert_request(source: str, wanted: str | Sequence[str], rng: np.random.Generator) -> str:
    """Ask for one medium, or for two, of what a source contains, naming nothing.

    Args:
        source: "text", one of ``INPUTS``, or one of ``PAIRS`` for two media of the same object.
        wanted: One or two of "image", "video" and "audio".
        rng: Chooses the words.

    Raises:
        ConfigError: a name is not known.
    """
    return _wording(_media(wanted), rng, pick(GIVEN[lookup("source", source, tuple(GIVEN))], rng))


def change_request(scene: Scene, changed: Collection[str], wanted: str, rng: np.random.Generator) -> str:
    """Ask for a medium, or with "text" for a description, of what is given, with changes.

    Args:
        scene: The changed scene.
        changed: The factors to name.
        wanted: "text", "image", "video" or "audio".
        rng: Chooses the words.

    Raises:
        ConfigError: a name is not known.
    """
    change, given = _change(scene, changed, rng), pick(("this", "it", "this object"), rng)
    if wanted == "text":
        return pick(_DESCRIBE_CHANGED, rng).format(it=given, change=change)
    return _wording(_media(wanted), rng, f"{given}, but {change}")


def again_request(scene: Scene, changed: Collection[str], rng: np.random.Generator) -> str:
    """Ask for what was made before, with changes: the same medium of the changed scene."""
    if set(changed) <= {"colour", "size", "shape"} and len(changed) == 1 and rng.random() < 0.4:
        (factor,) = changed
        name = say(scene, factor, rng)
        return pick(_TURN_IT, rng).format(change=with_article(name) if factor == "shape" else name)
    return pick(_SAME, rng).format(change=_change(scene, changed, rng))


def then_request(scene: Scene, changed: Collection[str], wanted: str, rng: np.random.Generator) -> str:
    """Ask for what an earlier turn was about as a medium that is named, with changes or, if there are none, as it is.

    Raises:
        ConfigError: the wanted medium is not "image", "video" or "audio".
    """
    (medium,) = _media(wanted)
    words = _words(medium, rng)
    if not changed:
        return pick(_THEN, rng).format(**words)
    return pick(_THEN_CHANGED, rng).format(**words, change=_change(scene, changed, rng))


def another_request(rng: np.random.Generator) -> str:
    """Ask the last request again, of another medium that comes with it."""
    return pick(_ANOTHER, rng)


def impossible_request(source: str | None, scene: Scene, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for something that is no medium at all, with the reply.

    Args:
        source: What it is to be made from; None to name the scene.
        scene: What it is about.
        rng: Chooses the words.
    """
    noun = pick(_IMPOSSIBLE, rng)
    given = fill(_described("text"), scene, "text", rng) if source is None else pick(GIVEN[source], rng)
    return pick(_MAKE_IMPOSSIBLE, rng).format(noun=noun, it=given), f"I can't make a {noun}."


def refusal(medium: str) -> str:
    """The reply to a request for a medium that can't be made.

    Raises:
        ConfigError: it is not "image", "video" or "audio".
    """
    return f"I can't make a {_NOUNS[lookup('medium', medium, MEDIA)][0]}."


def missing_request(source: str, wanted: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for something of a picture, video or sound where there is none, with the reply.

    Raises:
        ConfigError: a name is not known.
    """
    lookup("source", source, MEDIA)
    given = [words for words in GIVEN[source] if any(noun in words for noun in _NOUNS[source])]
    reply = f"I {'hear' if source == 'audio' else 'see'} no {_NOUNS[source][0]}."
    return _wording(_media(wanted), rng, pick(given, rng)), reply


def change_scene(
    scene: Scene, factors: Sequence[str], rng: np.random.Generator, split: str | None = None, source: str = "text"
) -> tuple[Scene, tuple[str, ...]]:
    """Change one factor of a scene, sometimes two.

    Args:
        scene: What to change.
        factors: The factors that may change.
        rng: Chooses what changes, and into what.
        split: The split of the result; None for any. Where no single change leads there, two may.
        source: What shows it, which decides the split (see ``Scene.split_for``).

    Returns:
        The changed scene and which factors changed, in the order of ``FACTORS``; the same scene and none where no change
        leads to the split.
    """
    ordered = [factor for factor in FACTORS if factor in factors]
    single = [(factor,) for factor in ordered]
    double = [(first, second) for index, first in enumerate(ordered) for second in ordered[index + 1 :]]
    choices: list[tuple[str, ...]] = [pick(double, rng)] if double and rng.random() < 0.15 else []
    choices += [single[index] for index in rng.permutation(len(single))]
    choices += [double[index] for index in rng.permutation(len(double))]
    for changed in choices:
        found = [other for other in _changes(scene, changed) if split in (None, other.split_for(source))]
        if found:
            return pick(found, rng), changed
    return scene, ()


def _changes(scene: Scene, changed: Sequence[str]) -> list[Scene]:
    """All scenes that differ in exactly these factors."""
    scenes = [scene]
    for factor in changed:
        values = [value for value in FACTORS[factor] if value != getattr(scene, factor)]
        scenes = [other.replace(**{factor: value}) for other in scenes for value in values]
    return scenes


def _media(wanted: str | Sequence[str]) -> tuple[str, ...]:
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    return tuple(lookup("medium", name, MEDIA) for name in names)


def _shows(medium: str, modality: str) -> bool:
    """Whether a medium shows all that another one carries."""
    return set(CARRIES[modality]) <= set(CARRIES[medium])


def _described(modality: str) -> str:
    """The template that names all that a modality carries."""
    return {"image": "{thing} {place}", "audio": "{thing} {moving}"}.get(modality, "{thing} {place} {moving}")


def _words(medium: str, rng: np.random.Generator) -> dict[str, str]:
    verb = pick(_VERBS[medium], rng)
    return {"do": verb, "Do": verb.capitalize(), "noun": _NOUNS[medium][0]}


def _wording(media: Sequence[str], rng: np.random.Generator, given: str) -> str:
    """A request for one medium or two of what is given."""
    if len(media) == 1:
        return pick(_MAKE[media[0]], rng).replace("{it}", given)
    first, second = (_words(medium, rng) for medium in media)
    template = pick(_MAKE_TWO, rng).replace("{it}", given)
    for name, word in {**first, "also": second["do"], "other": second["noun"]}.items():
        template = template.replace(f"{{{name}}}", word)
    return template


def _change(scene: Scene, changed: Collection[str], rng: np.random.Generator) -> str:
    """The changed factors in words: "small and at the top left"."""
    named = []
    for factor in ("size", "colour", "shape", "place", "motion"):
        if factor in changed:
            name = pick(NAMES[factor][getattr(scene, factor)], rng)
            if factor == "shape":
                name = f"as {with_article(name)}"
            elif factor == "colour" and rng.random() < 0.5:
                name = f"in {name}"
            named.append(name)
    return " and ".join(named)
