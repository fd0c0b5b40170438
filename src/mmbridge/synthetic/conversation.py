"""Turns of a dialogue about scenes: questions with answers, requests to describe, draw and convert, and small talk.

Requests to draw are imperatives (or polite forms of them) that name the picture; nothing else asks for one, so that a
bridge can learn to emit a picture when asked for it and only then.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from mmbridge.synthetic.language import NAMES, caption, fill, with_article
from mmbridge.synthetic.scene import CARRIES, FACTORS, Scene, lookup

_T = TypeVar("_T")

_QUESTIONS = {
    "shape": ("What shape is it?", "Which shape is it?", "What is its shape?", "Tell me the shape."),
    "colour": ("What colour is it?", "Which colour is it?", "What is its colour?", "Tell me the colour."),
    "size": ("What size is it?", "How big is it?", "What is its size?", "Tell me the size."),
    "place": ("Where is it?", "In which place is it?", "What is its place?", "Tell me the place."),
    "motion": ("How does it move?", "What is it doing?", "What is its motion?", "Tell me the motion."),
}
_DESCRIBE = {
    "image": (
        "What do you see?", "Describe the picture.", "Describe the image.", "What is in the picture?",
        "What does the image show?", "Tell me what you see.", "Please describe this picture.",
        "Can you describe the image?", "What is this?",
    ),
    "video": (
        "What happens?", "Describe the video.", "Describe the clip.", "What is in the video?",
        "What does the video show?", "Tell me what happens.", "Please describe this video.",
        "Can you describe the clip?", "What do you see?",
    ),
    "audio": (
        "What do you hear?", "Describe the sound.", "Describe the audio.", "What is in the sound?",
        "What makes this sound?", "Tell me what you hear.", "Please describe this sound.",
        "Can you describe the audio?", "What does it sound like?",
    ),
    "text": (
        "What is it?", "Describe the scene.", "Describe the object.", "What is in the scene?",
        "What does the text say?", "Tell me what it is.", "Please describe this scene.", "Can you describe the object?",
    ),
}  # fmt: skip
_DRAW = (
    "Draw {thing} {place}.", "Please draw {thing} {place}.", "Paint {thing} {place}.", "Please paint {thing} {place}.",
    "Show me a picture of {thing} {place}.", "Make a picture of {thing} {place}.",
    "Create an image of {thing} {place}.", "Give me an image of {thing} {place}.",
    "I want a picture of {thing} {place}.", "Can you draw {thing} {place}?", "Could you paint {thing} {place}?",
)  # fmt: skip
_CONVERT = {
    "image": (
        "Draw this object again.", "Paint the object in the picture.", "Draw what you see.",
        "Make another picture of this object.", "Please paint this picture again.",
        "Create a new image of what you see.", "Show me a new picture of this.",
        "Can you draw the object in the image?",
    ),
    "video": (
        "Draw the object in the video.", "Paint what you see in the video.", "Draw what moves.",
        "Make a picture of the video.", "Please paint the object in the clip.",
        "Create an image of this video.", "Show me a picture of what happens.",
        "Can you draw the object in the clip?",
    ),
    "audio": (
        "Paint what you hear.", "Draw what you hear.", "Draw what makes this sound.",
        "Make a picture of this sound.", "Please paint the object in the sound.",
        "Create an image of what you hear.", "Show me a picture of this sound.",
        "Can you draw the object in the audio?",
    ),
}  # fmt: skip
_CHAT = (
    ("Hello!", "Hello! Show me a picture or a sound."),
    ("Hi!", "Hi! Show me a picture or a sound."),
    ("Good morning!", "Good morning! What can I do for you?"),
    ("How are you?", "I am fine, thank you."),
    ("Who are you?", "I am a model. I can see, hear and draw."),
    ("What is your name?", "I have no name."),
    ("What can you do?", "I can see pictures and videos, hear sounds, and draw."),
    ("Can you draw?", "Yes, I can. Tell me what to draw."),
    ("Can you paint?", "Yes, I can. Tell me what to paint."),
    ("Do you like pictures?", "Yes, I like pictures very much."),
    ("Can you hear sounds?", "Yes, I can. Play me a sound."),
    ("Can you see videos?", "Yes, I can. Show me a video."),
    ("Can you help me?", "Yes, I can. What can I do for you?"),
    ("Thank you!", "You are welcome."),
    ("Thanks, that is nice.", "You are welcome."),
    ("Well done!", "Thank you!"),
    ("I like it.", "I am glad."),
    ("Goodbye!", "Goodbye!"),
)
_DRAW_REPLIES = (
    "Here it is.", "Here is the picture.", "Here you are.", "Done.", "Sure, here it is.", "Here is your picture.",
)  # fmt: skip


def question(scene: Scene, factor: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for one factor, openly or for a yes or no, and answer in a short sentence.

    Raises:
        ConfigError: the factor is not known.
    """
    lookup("factor", factor, tuple(FACTORS))
    answer = f"it is {_state(factor, getattr(scene, factor))}."
    if rng.random() < 0.6:
        return _pick(_QUESTIONS[factor], rng), answer.capitalize()
    asked = getattr(scene, factor) if rng.random() < 0.5 else _pick(FACTORS[factor], rng)
    return f"Is it {_state(factor, asked)}?", ("Yes, " if asked == getattr(scene, factor) else "No, ") + answer


def describe_request(modality: str, rng: np.random.Generator) -> str:
    """Ask what a picture, a video, a sound or a described scene contains.

    Raises:
        ConfigError: the modality is not known.
    """
    return _pick(_DESCRIBE[lookup("modality", modality, tuple(_DESCRIBE))], rng)


def draw_request(scene: Scene, rng: np.random.Generator) -> str:
    """Ask for a picture of a scene, naming all that a picture shows, with synonyms."""
    return fill(_pick(_DRAW, rng), scene, "image", rng)


def convert_request(modality: str, rng: np.random.Generator) -> str:
    """Ask for a picture of what a given picture, video or sound contains, naming nothing.

    Raises:
        ConfigError: the modality is not "image", "video" or "audio".
    """
    return _pick(_CONVERT[lookup("modality", modality, tuple(_CONVERT))], rng)


def draw_reply(rng: np.random.Generator) -> str:
    """What is said along with a picture that was asked for."""
    return _pick(_DRAW_REPLIES, rng)


def chat_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """One to three turns of small talk, (user, reply) each, none of which asks for a picture."""
    return [_CHAT[index] for index in rng.permutation(len(_CHAT))[: rng.integers(1, 4)]]


def dialogue(scene: Scene, modality: str, rng: np.random.Generator) -> list[tuple[str, str]]:
    """A description and two questions about one medium, as (user, reply) turns; the medium itself comes first.

    Raises:
        ConfigError: the modality is not known.
    """
    asked = rng.permutation(CARRIES[lookup("modality", modality, tuple(CARRIES))])[:2]
    return [
        (describe_request(modality, rng), caption(scene, modality, rng)),
        *(question(scene, str(factor), rng) for factor in asked),
    ]


def _state(factor: str, value: str) -> str:
    """The value as it follows "it is"."""
    name = NAMES[factor][value][0]
    return with_article(name) if factor == "shape" else name


def _pick(options: tuple[_T, ...], rng: np.random.Generator) -> _T:
    return options[rng.integers(len(options))]
