"""Turns that are answered in words: questions about scenes with their answers, requests to describe, and small talk.

None of them asks for a medium; those that do are in `requests`.
"""

from __future__ import annotations

import numpy as np

from mmbridge.synthetic.language import NAMES, pick, with_article
from mmbridge.synthetic.scene import FACTORS, Scene, lookup

_QUESTIONS = {
    "shape": ("What shape is it?", "Which shape is it?", "What is its shape?", "Tell me the shape."),
    "colour": ("What colour is it?", "Which colour is it?", "What is its colour?", "Tell me the colour."),
    "size": ("What size is it?", "How big is it?", "What is its size?", "Tell me the size."),
    "place": ("Where is it?", "In which place is it?", "What is its place?", "Tell me the place."),
    "motion": ("How does it move?", "What is it doing?", "What is its motion?", "Tell me the motion."),
}
DESCRIBE = {
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
    "depth": (
        "What do you see?", "Tell me what you see.", "What is this?", "Describe the object.",
        "Can you describe the object?", "Describe the depth map.", "What is in the depth map?",
        "What does the depth map show?", "Please describe this depth map.",
    ),
    "normal": (
        "What do you see?", "Tell me what you see.", "What is this?", "Describe the object.",
        "Can you describe the object?", "Describe the normal map.", "What is in the normal map?",
        "What does the normal map show?", "Please describe this normal map.",
    ),
    "pointcloud": (
        "What do you see?", "Tell me what you see.", "What is this?", "Describe the object.",
        "Can you describe the object?", "Describe the point cloud.", "What is in the point cloud?",
        "What does the point cloud show?", "Please describe this point cloud.",
    ),
    "imu": (
        "What happens?", "Tell me what happens.", "What moves?", "Describe the motion.", "Please describe this motion.",
        "Describe the sensor trace.", "What is in the sensor trace?", "What does the sensor trace show?",
        "Please describe this sensor trace.",
    ),
    "fmri": (
        "What is it?", "Tell me what it is.", "What is this?", "Describe the scene.", "Can you describe the object?",
        "Describe the brain scan.", "What is in the brain scan?", "What does the brain scan show?",
        "Please describe this brain scan.",
    ),
    "text": (
        "What is it?", "Describe the scene.", "Describe the object.", "What is in the scene?",
        "What does the text say?", "Tell me what it is.", "Please describe this scene.", "Can you describe the object?",
    ),
    "image+audio": (
        "What is it, and how does it move?", "What do you see and hear?", "Tell me what you see and hear.",
        "Describe the object and its motion.", "Describe the picture and the sound together.",
    ),
    "audio+video": (
        "What is it, and how does it move?", "What do you see and hear?", "Tell me what you see and hear.",
        "Describe the object and its motion.", "Describe the video and the sound together.",
    ),
}  # fmt: skip
"""Requests to describe each modality."""
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


def question(scene: Scene, factor: str, rng: np.random.Generator) -> tuple[str, str]:
    """Ask for one factor, openly or for a yes or no, and answer in a short sentence.

    Raises:
        ConfigError: the factor is not known.
    """
    lookup("factor", factor, tuple(FACTORS))
    reply = answer(scene, factor)
    if rng.random() < 0.5:
        return pick(_QUESTIONS[factor], rng), reply
    asked = getattr(scene, factor) if rng.random() < 0.5 else pick(FACTORS[factor], rng)
    yes = "Yes, " if asked == getattr(scene, factor) else "No, "
    return f"Is it {_state(factor, asked)}?", yes + reply[:1].lower() + reply[1:]


def answer(scene: Scene, factor: str) -> str:
    """Tell one factor in a short sentence."""
    return f"It is {_state(factor, getattr(scene, factor))}."


def describe_request(modality: str, rng: np.random.Generator) -> str:
    """Ask what a medium, two media joined by "+" or, for "text", a described scene contain.

    Raises:
        ConfigError: the modality is not known, or there is no such pair.
    """
    return pick(DESCRIBE[lookup("modality", modality, tuple(DESCRIBE))], rng)


def chat_pairs(rng: np.random.Generator) -> list[tuple[str, str]]:
    """One to three turns of small talk, (user, reply) each, none of which asks for a medium."""
    return [_CHAT[index] for index in rng.permutation(len(_CHAT))[: rng.integers(1, 4)]]


def _state(factor: str, value: str) -> str:
    """The value as it follows "it is"."""
    name = NAMES[factor][value][0]
    return with_article(name) if factor == "shape" else name
