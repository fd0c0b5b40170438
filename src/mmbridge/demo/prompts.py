"""The demo's prompts: files of scenes whose combinations no bridge has trained on, and what is asked about them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbridge.data.tasks import Task
from mmbridge.media import Audio, Image, Video
from mmbridge.messages import Message
from mmbridge.synthetic import (
    CARRIES,
    FRAMES_PER_SECOND,
    SAMPLE_RATE,
    Scene,
    caption,
    render_audio,
    render_image,
    render_video,
)

RENDERING = 90_000_000
"""First seed of the demo's renderings; training and evaluation draw theirs below."""


@dataclass(frozen=True)
class Prompt:
    """A dialogue to be answered turn by turn.

    Attributes:
        title: What it shows.
        turns: Requests in order, each a task with one message of the user; paths are relative to the folder of media.
        truth: What a right answer must tell or show, in words; "" where only the absence of media counts.
    """

    title: str
    turns: tuple[Task, ...]
    truth: str


@dataclass(frozen=True)
class _Entry:
    title: str
    file: str
    scene: Scene
    asks: tuple[tuple[str, str, str], ...]  # words, wanted medium, the one factor asked for or ""


_ENTRIES = (
    _Entry("A picture, described", "star.png", Scene("star", "red", "medium", "top left", "left"),
           (("What do you see?", "text", ""),)),
    _Entry("A question about a JPEG", "square.jpg", Scene("square", "orange", "medium", "top right", "up"),
           (("What colour is it?", "text", "colour"),)),
    _Entry("A video, described", "ring.mp4", Scene("ring", "purple", "large", "top left", "up"),
           (("What happens?", "text", ""),)),
    _Entry("A question about a GIF", "cross.gif", Scene("cross", "yellow", "small", "bottom right", "left"),
           (("How does it move?", "text", "motion"),)),
    _Entry("A sound, described", "circle.wav", Scene("circle", "cyan", "small", "top right", "circling"),
           (("What do you hear?", "text", ""),)),
    _Entry("A question about an MP3", "triangle.mp3", Scene("triangle", "pink", "large", "centre", "left"),
           (("What shape is it?", "text", "shape"),)),
    _Entry("A picture from words", "", Scene("cross", "yellow", "large", "top left", "down"),
           (("Could you paint a huge lemon plus sign in the upper left corner?", "image", ""),)),
    _Entry("A picture from a sound", "star.wav", Scene("star", "blue", "large", "bottom left", "circling"),
           (("Paint what you hear.", "image", ""),)),
    _Entry("A picture from a video", "ring-small.mp4", Scene("ring", "orange", "small", "bottom right", "circling"),
           (("Draw what moves.", "image", ""),)),
    _Entry("A picture from a picture", "triangle.png", Scene("triangle", "green", "small", "top left", "up"),
           (("Draw this object again.", "image", ""),)),
    _Entry("Small talk, so no picture", "", Scene("circle", "red", "small", "top left", "still"),
           (("What can you do?", "none", ""),)),
    _Entry("A dialogue of two turns", "cross.mp4", Scene("cross", "purple", "large", "top right", "down"),
           (("What colour is it?", "text", "colour"), ("Draw the object in the video.", "image", ""))),
)  # fmt: skip

MODALITIES = {".png": "image", ".jpg": "image", ".mp4": "video", ".gif": "video", ".wav": "audio", ".mp3": "audio"}


def write_prompts(folder: Path) -> list[Prompt]:
    """Render the prompts' media into a folder, as files of every kind that people have, and return the prompts.

    Raises:
        MediaError: A file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = []
    for number, entry in enumerate(_ENTRIES):
        source = MODALITIES[Path(entry.file).suffix] if entry.file else "text"
        first: list[dict[str, Any]] = []
        if entry.file:
            write_medium(source, entry.scene, RENDERING + number, folder / entry.file)
            first = [{"type": source, "path": entry.file}]
        turns = [
            Task(
                ({"role": "user", "content": [*(first if index == 0 else []), {"type": "text", "text": words}]},),
                (source,), wanted, entry.scene, factors_of(source, wanted, factor),
            )
            for index, (words, wanted, factor) in enumerate(entry.asks)
        ]  # fmt: skip
        prompts.append(Prompt(entry.title, tuple(turns), truth_of(turns[0])))
    return prompts


def write_medium(modality: str, scene: Scene, seed: int, path: Path) -> None:
    """Render a scene to a file: JPEG at quality 50, MP3 at 44.1 kHz, H.264 at crf 30, or without loss."""
    if modality == "image":
        Image.load(render_image(scene, seed)).save(path, quality=50)
    elif modality == "video":
        crf = 30 if path.suffix == ".mp4" else None
        Video.load(render_video(scene, seed), fps=FRAMES_PER_SECOND).save(path, crf=crf)
    else:
        sound = Audio.load(render_audio(scene, seed), sample_rate=SAMPLE_RATE)
        (sound.resample(44_100) if path.suffix == ".mp3" else sound).save(path)


def factors_of(source: str, wanted: str, factor: str) -> tuple[str, ...]:
    """Return the factors that a right answer must show."""
    if factor or wanted == "none":
        return (factor,) if factor else ()
    return CARRIES["image"] if (source, wanted) == ("text", "image") else CARRIES[source]


def truth_of(task: Task) -> str:
    """Return what the scene of a prompt's first request is, in the words for its source."""
    return (
        "" if task.wanted == "none" else caption(task.scene, "image" if task.sources == ("text",) else task.sources[0])
    )


def below(folder: str, message: Message) -> Message:
    """Return a message with the paths of its media below ``folder``."""
    content = [{**part, "path": f"{folder}/{part['path']}"} if "path" in part else part for part in message["content"]]
    return {**message, "content": content}
