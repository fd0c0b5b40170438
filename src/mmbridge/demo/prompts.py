"""The demo's prompts: files of scenes whose combinations no bridge has trained on, and what is asked about them."""

from collections.abc import Collection
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
    render_audio,
    render_image,
    render_video,
    shared_caption,
)
from mmbridge.synthetic.dialogues import ordered

RENDERING = 90_000_000
"""First seed of the demo's renderings; training and evaluation draw theirs below."""


@dataclass(frozen=True)
class Prompt:
    """A dialogue to be answered turn by turn.

    Attributes:
        title: What it shows.
        turns: Requests in order, each a task with one message of the user; paths are relative to the folder of media.
        truth: What a right answer must tell or show at last, in words; "" where only the absence of media counts.
        again: Whether a freshly trained bridge answers it too.
    """

    title: str
    turns: tuple[Task, ...]
    truth: str
    again: bool


@dataclass(frozen=True)
class _Entry:
    """Files of a scene that come in first, and what is asked about it: words, the wanted medium, and a detail.

    The detail is {"ask": factor} for a question, {factor: value} for a change that lasts, or {}.
    """

    title: str
    files: tuple[str, ...]
    scene: Scene
    asks: tuple[tuple[str, str, dict[str, str]], ...]
    again: bool = False


_ENTRIES = (
    _Entry("A picture, described", ("star.png",), Scene("star", "red", "medium", "top left", "left"),
           (("What do you see?", "text", {}),), True),
    _Entry("A question about a JPEG", ("square.jpg",), Scene("square", "orange", "medium", "top right", "up"),
           (("What colour is it?", "text", {"ask": "colour"}),)),
    _Entry("A video, described", ("ring.mp4",), Scene("ring", "purple", "large", "top left", "up"),
           (("What happens?", "text", {}),), True),
    _Entry("A question about a GIF", ("cross.gif",), Scene("cross", "yellow", "small", "bottom right", "left"),
           (("How does it move?", "text", {"ask": "motion"}),)),
    _Entry("A sound, described", ("circle.wav",), Scene("circle", "cyan", "small", "top right", "circling"),
           (("What do you hear?", "text", {}),), True),
    _Entry("A question about an MP3", ("triangle.mp3",), Scene("triangle", "pink", "large", "centre", "left"),
           (("What shape is it?", "text", {"ask": "shape"}),)),
    _Entry("Words, in other words", (), Scene("ring", "yellow", "small", "bottom left", "circling"),
           (("There is a tiny lemon donut in the lower left corner orbiting. Describe the object.", "text", {}),)),
    _Entry("A picture from words", (), Scene("cross", "yellow", "large", "top left", "down"),
           (("Could you paint a huge lemon plus sign in the upper left corner?", "image", {}),), True),
    _Entry("A picture from a picture", ("triangle.png",), Scene("triangle", "green", "small", "top left", "up"),
           (("Draw this object again.", "image", {}),)),
    _Entry("A picture from a sound", ("star.wav",), Scene("star", "blue", "large", "bottom left", "circling"),
           (("Paint what you hear.", "image", {}),), True),
    _Entry("A picture from a video", ("ring-small.mp4",), Scene("ring", "orange", "small", "bottom right", "circling"),
           (("Draw what moves.", "image", {}),), True),
    _Entry("A video from words", (), Scene("star", "yellow", "small", "top left", "right"),
           (("Film a little canary star in the top left corner drifting to the right.", "video", {}),), True),
    _Entry("A video from a picture", ("square.png",), Scene("square", "purple", "large", "bottom right", "right"),
           (("Animate this picture.", "video", {}),)),
    _Entry("A video from a sound", ("square.mp3",), Scene("square", "red", "large", "top left", "right"),
           (("Make a video of what you hear.", "video", {}),)),
    _Entry("A video from a video", ("triangle.mp4",), Scene("triangle", "cyan", "medium", "centre", "right"),
           (("Film the object in the clip.", "video", {}),)),
    _Entry("A sound from words", (), Scene("circle", "green", "medium", "top left", "down"),
           (("Let me hear a mid-sized disc falling.", "audio", {}),), True),
    _Entry("A sound from a picture", ("ring.jpg",), Scene("ring", "cyan", "medium", "bottom right", "down"),
           (("Play what you see.", "audio", {}),)),
    _Entry("A sound from a video", ("star.gif",), Scene("star", "pink", "medium", "bottom left", "left"),
           (("Play the sound of what moves.", "audio", {}),)),
    _Entry("A sound from a sound", ("cross.wav",), Scene("cross", "green", "small", "bottom left", "left"),
           (("Let me hear what makes this sound.", "audio", {}),)),
    _Entry("A picture and a sound, together a video", ("circle.png", "circle.mp3"),
           Scene("circle", "yellow", "large", "bottom right", "up"),
           (("Film the object in the picture, moving as in the sound.", "video", {}),), True),
    _Entry("A picture and a sound, together in words", ("star-large.png", "star-large.wav"),
           Scene("star", "cyan", "large", "bottom right", "still"),
           (("What is it, and how does it move?", "text", {}),)),
    _Entry("A picture, and words that change it", ("triangle.jpg",), Scene("triangle", "green", "large", "bottom right", "left"),
           (("Draw this object, but in red.", "image", {"colour": "red"}),)),
    _Entry("The same, but blue", (), Scene("cross", "red", "medium", "bottom right", "still"),
           (("Please draw a medium red cross at the lower right.", "image", {}),
            ("The same, but blue.", "image", {"colour": "blue"})), True),
    _Entry("The same, but heard", ("cross-falling.mp4",), Scene("cross", "purple", "large", "top right", "down"),
           (("What happens?", "text", {}), ("Now let me hear it.", "audio", {}))),
    _Entry("A dialogue of two turns", ("cross.mp4",), Scene("cross", "purple", "large", "top right", "down"),
           (("What colour is it?", "text", {"ask": "colour"}), ("Now draw it.", "image", {}))),
    _Entry("Small talk, so no medium", (), Scene("circle", "red", "small", "top left", "still"),
           (("What can you do?", "none", {}),)),
)  # fmt: skip

MODALITIES = {".png": "image", ".jpg": "image", ".mp4": "video", ".gif": "video", ".wav": "audio", ".mp3": "audio"}


def write_prompts(folder: Path, outputs: Collection[str] = ("image", "video", "audio")) -> list[Prompt]:
    """Render the prompts' media into a folder, as files of every kind that people have, and return the prompts.

    Args:
        folder: Where to write.
        outputs: Media that the bridge makes; prompts that ask for others are left out.

    Raises:
        MediaError: A file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = []
    for number, entry in enumerate(_ENTRIES):
        if not {wanted for _, wanted, _ in entry.asks} <= {*outputs, "text", "none"}:
            continue
        for file in entry.files:
            write_medium(MODALITIES[Path(file).suffix], entry.scene, RENDERING + number, folder / file)
        prompts.append(_prompt(entry))
    return prompts


def _prompt(entry: _Entry) -> Prompt:
    """A prompt whose replies show what was given by files or words so far, with all changes."""
    parts: list[dict[str, Any]] = [{"type": MODALITIES[Path(file).suffix], "path": file} for file in entry.files]
    shown = tuple(part["type"] for part in parts)
    first = entry.asks[0][1]
    known = {factor for name in shown or (first if first != "none" else "text",) for factor in CARRIES[name]}
    changed_at_once = bool(set(entry.asks[0][2]) - {"ask"})
    sources = ("text", *shown) if changed_at_once or not shown else shown
    scene, turns = entry.scene, []
    for words, wanted, detail in entry.asks:
        changes = {factor: value for factor, value in detail.items() if factor != "ask"}
        scene, known = scene.replace(**changes), known | set(changes)
        factors = () if wanted == "none" else (detail["ask"],) if "ask" in detail else ordered(known)
        message = {"role": "user", "content": [*parts, {"type": "text", "text": words}]}
        turns.append(Task((message,), sources, wanted, scene, factors))
        parts = []
    last = turns[-1]
    truth = "" if last.wanted == "none" else shared_caption(scene, known, *(last.media or ("text",)))
    return Prompt(entry.title, tuple(turns), truth, entry.again)


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


def below(folder: str, message: Message) -> Message:
    """Return a message with the paths of its media below ``folder``."""
    content = [{**part, "path": f"{folder}/{part['path']}"} if "path" in part else part for part in message["content"]]
    return {**message, "content": content}
