"""The demo's prompts: files of scenes whose combinations no bridge has trained on, and what is asked about them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbridge.data.tasks import Task, render_medium
from mmbridge.media import Audio, Image, Video
from mmbridge.messages import Message
from mmbridge.modality import PAIRED
from mmbridge.synthetic import (
    CARRIES,
    FRAMES_PER_SECOND,
    IMU_SAMPLE_RATE,
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
class Entry:
    """Files of a scene by modality that come in first, and what is asked about it: words, the wanted medium, and a detail.

    The detail is {"ask": factor} for a question, {factor: value} for a change that lasts, or {}.
    """

    title: str
    files: dict[str, str]
    scene: Scene
    asks: tuple[tuple[str, str, dict[str, str]], ...]
    again: bool = False


FOUR = (
    Entry("A picture, described", {"image": "star.png"}, Scene("star", "red", "medium", "top left", "left"),
          (("What do you see?", "text", {}),), True),
    Entry("A question about a JPEG", {"image": "square.jpg"}, Scene("square", "orange", "medium", "top right", "up"),
          (("What colour is it?", "text", {"ask": "colour"}),)),
    Entry("A video, described", {"video": "ring.mp4"}, Scene("ring", "purple", "large", "top left", "up"),
          (("What happens?", "text", {}),), True),
    Entry("A question about a GIF", {"video": "cross.gif"}, Scene("cross", "yellow", "small", "bottom right", "left"),
          (("How does it move?", "text", {"ask": "motion"}),)),
    Entry("A sound, described", {"audio": "circle.wav"}, Scene("circle", "cyan", "small", "top right", "circling"),
          (("What do you hear?", "text", {}),), True),
    Entry("A question about an MP3", {"audio": "triangle.mp3"}, Scene("triangle", "pink", "large", "centre", "left"),
          (("What shape is it?", "text", {"ask": "shape"}),)),
    Entry("Words, in other words", {}, Scene("ring", "yellow", "small", "bottom left", "circling"),
          (("There is a tiny lemon donut in the lower left corner orbiting. Describe the object.", "text", {}),)),
    Entry("A picture from words", {}, Scene("cross", "yellow", "large", "top left", "down"),
          (("Could you paint a huge lemon plus sign in the upper left corner?", "image", {}),), True),
    Entry("A picture from a picture", {"image": "triangle.png"}, Scene("triangle", "green", "small", "top left", "up"),
          (("Draw this object again.", "image", {}),)),
    Entry("A picture from a sound", {"audio": "star.wav"}, Scene("star", "blue", "large", "bottom left", "circling"),
          (("Paint what you hear.", "image", {}),), True),
    Entry("A picture from a video", {"video": "ring-small.mp4"}, Scene("ring", "orange", "small", "bottom right", "circling"),
          (("Draw what moves.", "image", {}),), True),
    Entry("A video from words", {}, Scene("star", "yellow", "small", "top left", "right"),
          (("Film a little canary star in the top left corner drifting to the right.", "video", {}),), True),
    Entry("A video from a picture", {"image": "square.png"}, Scene("square", "purple", "large", "bottom right", "right"),
          (("Animate this picture.", "video", {}),)),
    Entry("A video from a sound", {"audio": "square.mp3"}, Scene("square", "red", "large", "top left", "right"),
          (("Make a video of what you hear.", "video", {}),)),
    Entry("A video from a video", {"video": "triangle.mp4"}, Scene("triangle", "cyan", "medium", "centre", "right"),
          (("Film the object in the clip.", "video", {}),)),
    Entry("A sound from words", {}, Scene("circle", "green", "medium", "top left", "down"),
          (("Let me hear a mid-sized disc falling.", "audio", {}),), True),
    Entry("A sound from a picture", {"image": "ring.jpg"}, Scene("ring", "cyan", "medium", "bottom right", "down"),
          (("Play what you see.", "audio", {}),)),
    Entry("A sound from a video", {"video": "star.gif"}, Scene("star", "pink", "medium", "bottom left", "left"),
          (("Play the sound of what moves.", "audio", {}),)),
    Entry("A sound from a sound", {"audio": "cross.wav"}, Scene("cross", "green", "small", "bottom left", "left"),
          (("Let me hear what makes this sound.", "audio", {}),)),
    Entry("A picture and a sound, together a video", {"image": "circle.png", "audio": "circle.mp3"},
          Scene("circle", "yellow", "large", "bottom right", "up"),
          (("Film the object in the picture, moving as in the sound.", "video", {}),), True),
    Entry("A picture and a sound, together in words", {"image": "star-large.png", "audio": "star-large.wav"},
          Scene("star", "cyan", "large", "bottom right", "still"),
          (("What is it, and how does it move?", "text", {}),)),
    Entry("A picture, and words that change it", {"image": "triangle.jpg"},
          Scene("triangle", "green", "large", "bottom right", "left"),
          (("Draw this object, but in red.", "image", {"colour": "red"}),)),
    Entry("The same, but blue", {}, Scene("cross", "red", "medium", "bottom right", "still"),
          (("Please draw a medium red cross at the lower right.", "image", {}),
           ("The same, but blue.", "image", {"colour": "blue"})), True),
    Entry("The same, but heard", {"video": "cross-falling.mp4"}, Scene("cross", "purple", "large", "top right", "down"),
          (("What happens?", "text", {}), ("Now let me hear it.", "audio", {}))),
    Entry("A dialogue of two turns", {"video": "cross.mp4"}, Scene("cross", "purple", "large", "top right", "down"),
          (("What colour is it?", "text", {"ask": "colour"}), ("Now draw it.", "image", {}))),
    Entry("Small talk, so no medium", {}, Scene("circle", "red", "small", "top left", "still"),
          (("What can you do?", "none", {}),)),
)  # fmt: skip
"""About words, pictures, videos and sounds."""

EIGHT = (
    Entry("A depth map of 16 bits, with its picture", {"depth": "star-depth.png"},
          Scene("star", "yellow", "medium", "bottom left", "left"), (("What do you see?", "text", {}),)),
    Entry("A normal map, described", {"normal": "triangle-normal.npy"},
          Scene("triangle", "purple", "large", "bottom left", "left"), (("Describe the normal map.", "text", {}),)),
    Entry("A question about a PLY of points", {"pointcloud": "square-points.ply"},
          Scene("square", "cyan", "large", "top right", "right"), (("What colour is it?", "text", {"ask": "colour"}),)),
    Entry("A motion sensor's trace, in words", {"imu": "cross-imu.csv"},
          Scene("cross", "yellow", "large", "top left", "down"), (("What moves?", "text", {}),)),
    Entry("A brain scan, described", {"fmri": "cross-fmri.npy"}, Scene("cross", "cyan", "small", "centre", "left"),
          (("Describe the brain scan.", "text", {}),)),
    Entry("A picture, through the same encoder", {"image": "triangle-small.png"},
          Scene("triangle", "purple", "small", "centre", "up"), (("Describe the picture.", "text", {}),)),
    Entry("A video, through the same encoder", {"video": "square-yellow.mp4"},
          Scene("square", "yellow", "large", "bottom left", "right"), (("What happens?", "text", {}),)),
    Entry("A sound, through the same encoder", {"audio": "star-left.wav"}, Scene("star", "green", "medium", "centre", "left"),
          (("What do you hear?", "text", {}),)),
    Entry("A video with its sound, from one MP4", {"audio": "ring-heard.mp4", "video": "ring-heard.mp4"},
          Scene("ring", "orange", "small", "bottom right", "circling"),
          (("What is it, and how does it move?", "text", {}),)),
    Entry("A picture and a sound, together", {"image": "ring-pink.png", "audio": "ring-falling.mp3"},
          Scene("ring", "pink", "medium", "top right", "down"), (("Tell me what you see and hear.", "text", {}),)),
    Entry("A picture from a point cloud", {"pointcloud": "star-points.csv"},
          Scene("star", "pink", "small", "top left", "right"), (("Draw the object in the point cloud.", "image", {}),)),
    Entry("A picture from a depth map", {"depth": "circle-depth.npy"},
          Scene("circle", "pink", "large", "bottom right", "up"), (("Paint what the depth map shows.", "image", {}),)),
    Entry("A sound from a motion sensor", {"imu": "triangle-imu.npy"},
          Scene("triangle", "cyan", "medium", "centre", "right"), (("Let me hear what moves.", "audio", {}),)),
    Entry("A video from a brain scan", {"fmri": "ring-fmri.npy"}, Scene("ring", "purple", "large", "top left", "up"),
          (("Film what the brain scan shows.", "video", {}),)),
)  # fmt: skip
"""About eight media that one encoder reads, alone and two at a time."""


def write_prompts(
    folder: Path, outputs: Collection[str] = ("image", "video", "audio"), entries: Sequence[Entry] = FOUR
) -> list[Prompt]:
    """Render the prompts' media into a folder, as files of every kind that people have, and return the prompts.

    Args:
        folder: Where to write.
        outputs: Media that the bridge makes; prompts that ask for others are left out.
        entries: The prompts: ``FOUR`` or ``EIGHT``.

    Raises:
        MediaError: A file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prompts = []
    for number, entry in enumerate(entries):
        if not {wanted for _, wanted, _ in entry.asks} <= {*outputs, "text", "none"}:
            continue
        for file in set(entry.files.values()):
            modalities = [modality for modality, name in entry.files.items() if name == file]
            write_medium(modalities, entry.scene, RENDERING + number, folder / file)
        prompts.append(_prompt(entry))
    return prompts


def _prompt(entry: Entry) -> Prompt:
    """A prompt whose replies show what was given by files or words so far, with all changes."""
    parts: list[dict[str, Any]] = [_part(modality, file) for modality, file in entry.files.items()]
    shown = tuple(entry.files)
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


def _part(modality: str, file: str) -> dict[str, Any]:
    """A file as a part of a message; maps come with their picture, traces without times with their rate."""
    if modality in PAIRED:
        return {"type": modality, "path": file, "picture": picture_of(file)}
    rate = {"sample_rate": IMU_SAMPLE_RATE} if modality == "imu" and file.endswith(".npy") else {}
    return {"type": modality, "path": file, **rate}


def picture_of(file: str) -> str:
    """Return the name of the picture of the same view as a map."""
    return f"{Path(file).stem}-picture.png"


def write_medium(modalities: Sequence[str], scene: Scene, seed: int, path: Path) -> None:
    """Render a scene to a file: JPEG at quality 50, MP3 at 44.1 kHz, H.264 at crf 30, or without loss.

    Args:
        modalities: The medium; "video" and "audio" together for a video with sound.
        scene: What to render.
        seed: Chooses the rendering.
        path: The file; of a map, the picture of the same view is written beside it.
    """
    sound = Audio.load(render_audio(scene, seed), sample_rate=SAMPLE_RATE) if "audio" in modalities else None
    if "image" in modalities:
        Image.load(render_image(scene, seed)).save(path, quality=50)
    elif "video" in modalities:
        clip = Video.load(render_video(scene, seed), fps=FRAMES_PER_SECOND)
        clip.audio = sound
        clip.save(path, crf=30 if path.suffix == ".mp4" else None)
    elif sound is not None:
        (sound.resample(44_100) if path.suffix == ".mp3" else sound).save(path)
    else:
        medium = render_medium(modalities[0], scene, seed)
        medium.save(path)
        if modalities[0] in PAIRED:
            medium.picture.save(path.with_name(picture_of(path.name)))


def below(folder: str, message: Message) -> Message:
    """Return a message with the paths of its media below ``folder``."""
    content = [
        {key: f"{folder}/{value}" if key in ("path", "picture") else value for key, value in part.items()}
        for part in message["content"]
    ]
    return {**message, "content": content}
