"""Requests to bridges over the synthetic world, and what a right reply must show: the tasks of training's checks and of the table.

A task is one or two turns of the user, each answered by the bridge itself, about one scene. Media are rendered, and worn as
files in the wild are; replies are read by judges that learned nothing.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mmbridge.errors import ConfigError
from mmbridge.media import Audio, Depth, Fmri, Image, Imu, Normal, PointCloud, Video
from mmbridge.media.wear import through_mp3
from mmbridge.messages import Message
from mmbridge.registry import suggest
from mmbridge.synthetic import (
    CARRIES,
    FRAMES_PER_SECOND,
    IMU_SAMPLE_RATE,
    RENDERERS,
    SAMPLE_RATE,
    Scene,
    caption,
    chat_pairs,
    convert_request,
    describe_request,
    judge,
    make_request,
    question,
    render_audio,
    render_depth,
    render_fmri,
    render_image,
    render_imu,
    render_normal,
    render_pointcloud,
    render_video,
    sentence,
    shared_caption,
)
from mmbridge.synthetic.dialogues import Shown, ordered
from mmbridge.synthetic.requests import (
    INPUTS,
    MEDIA,
    PAIRS,
    again_request,
    change_request,
    change_scene,
    then_request,
)
from mmbridge.synthetic.scene import lookup

EVALUATION = 10_000_000
"""First seed of the renderings by which training is watched; training draws its seeds below."""

MAX_NEW_TOKENS = 64
"""Room for the longest right reply."""


def known_sources() -> tuple[str, ...]:
    """Return what a scene can be given by; "text+image" is a picture, with words that change it."""
    return ("text", *INPUTS, *PAIRS, *(f"text+{medium}" for medium in INPUTS))


@dataclass(frozen=True)
class Task:
    """Requests about a scene, and what the last reply shows if it is right.

    Attributes:
        messages: The turns of the user; each is answered before the next is asked.
        sources: What the scene is given by, such as ("text",) or ("image", "audio").
        wanted: What the last reply must hold: "text", "image", "video", "audio", two media such as "image+audio", or
            "none" where no medium may be made.
        scene: What the last reply is about.
        factors: The factors that are given by then; of them a medium has to show those that it can.
    """

    messages: tuple[Message, ...]
    sources: tuple[str, ...]
    wanted: str
    scene: Scene
    factors: tuple[str, ...]

    @property
    def media(self) -> tuple[str, ...]:
        """The media that the last reply must hold, in order."""
        return () if self.wanted in ("text", "none") else tuple(self.wanted.split("+"))

    @property
    def measured(self) -> tuple[str, ...]:
        """The factors that the last reply must show."""
        shown = {factor for medium in self.media or ("text",) for factor in CARRIES[medium]}
        return tuple(factor for factor in self.factors if factor in shown and self.wanted != "none")

    def caption(self, medium: str) -> str:
        """Return the gold caption of a medium that is wanted."""
        return shared_caption(self.scene, self.factors, medium)

    def matches(self, found: Mapping[str, str | None]) -> bool:
        """Return whether what a judge read in a medium has every factor that is given right."""
        return all(value == getattr(self.scene, name) for name, value in found.items() if name in self.factors)


@functools.lru_cache(maxsize=20_000)
def render_medium(modality: str, scene: Scene, seed: int) -> Any:
    """Render a scene as a medium; every third rendering is worn, as files in the wild are.

    Raises:
        ConfigError: Scenes are not rendered as such media.
    """
    makers = {**_TO_MEDIUM, **RENDERERS}
    return makers[lookup("medium", modality, tuple(makers))](scene, seed)


def read_medium(medium: Any) -> dict[str, str | None]:
    """Return what the judge reads in a medium."""
    given = (medium,) if medium.modality in RENDERERS else _TO_ARRAY[medium.modality](medium)
    return judge(medium.modality, *given)


def _image(scene: Scene, seed: int) -> Image:
    pixels = render_image(scene, seed)
    return Image.load(recompress(pixels, np.random.default_rng([seed, 77])) if _is_worn(seed) else pixels)


def _video(scene: Scene, seed: int) -> Video:
    frames = render_video(scene, seed)
    if _is_worn(seed):
        frames = np.stack([recompress(frame, np.random.default_rng([seed, 78]), resize=False) for frame in frames])
    return Video.load(frames, fps=float(FRAMES_PER_SECOND))


def _audio(scene: Scene, seed: int) -> Audio:
    rng, samples = np.random.default_rng([seed, 77]), render_audio(scene, seed)
    worn = _is_worn(seed)
    if worn:
        samples = samples * rng.uniform(0.3, 1.0) + rng.uniform(0, 0.003) * rng.standard_normal(len(samples))
    audio = Audio.load(torch.from_numpy(np.asarray(samples, dtype=np.float32)), sample_rate=SAMPLE_RATE)
    return through_mp3(audio, int(rng.choice([48_000, 64_000, 96_000]))) if worn and rng.random() < 0.6 else audio


def _is_worn(seed: int) -> bool:
    return seed % 3 == 0


def _worn(modality: str, scene: Scene, seed: int) -> torch.Tensor:
    return torch.from_numpy(render_worn(modality, scene, seed))


_TO_MEDIUM: dict[str, Callable[[Scene, int], Any]] = {
    "image": _image,
    "video": _video,
    "audio": _audio,
    "depth": lambda scene, seed: Depth(_worn("depth", scene, seed), Image.load(render_image(scene, seed))),
    "normal": lambda scene, seed: Normal(
        _worn("normal", scene, seed).permute(2, 0, 1).contiguous(), Image.load(render_image(scene, seed))
    ),
    "pointcloud": lambda scene, seed: PointCloud(_worn("pointcloud", scene, seed)),
    "imu": lambda scene, seed: Imu(_worn("imu", scene, seed), float(IMU_SAMPLE_RATE)),
    "fmri": lambda scene, seed: Fmri(_worn("fmri", scene, seed)),
}
"""Scenes to media, by modality; maps come with the picture of the same view."""

_TO_ARRAY: dict[str, Callable[[Any], tuple[Any, ...]]] = {
    "image": lambda image: (image.pixels.permute(1, 2, 0).contiguous().numpy(),),
    "video": lambda video: (video.frames.permute(0, 2, 3, 1).contiguous().numpy(),),
    "audio": lambda audio: (audio.samples.numpy(), audio.sample_rate),
    "depth": lambda depth: (depth.map.numpy(),),
    "normal": lambda normal: (normal.map.permute(1, 2, 0).numpy(),),
    "pointcloud": lambda cloud: (cloud.points.numpy(),),
    "imu": lambda imu: (imu.samples.numpy(), imu.sample_rate),
    "fmri": lambda fmri: (fmri.voxels.numpy(),),
}
"""Media to what the judges take: the array, and the sample rate where there is one."""


def render_worn(modality: str, scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a map, points or a signal; every third rendering is worn, as files in the wild are.

    Args:
        modality: "depth" (at times of another size, in millimetres), "normal" (of another size, in bytes), "pointcloud"
            (some of the points, less exact), "imu" (noisier) or "fmri" (of another strength, noisier).
        scene: What to render.
        seed: Chooses rendering and wear.

    Returns:
        float32, as the modality's renderer gives it.

    Raises:
        ConfigError: It is another modality.
    """
    array = _RENDERERS[lookup("modality", modality, tuple(_RENDERERS))](scene, seed)
    if not _is_worn(seed):
        return array
    rng = np.random.default_rng([seed, 79])
    if modality == "depth":
        array = np.round(_resized(array, rng) * 1000) / 1000
    elif modality == "normal":
        array = np.round(np.clip(_resized(array, rng), -1, 1) * 127.5 + 127.5) / 127.5 - 1
        array /= np.linalg.norm(array, axis=-1, keepdims=True)
    elif modality == "pointcloud":
        array = array[: rng.integers(700, len(array))]
        array = array + np.pad(rng.normal(0, 0.003, (len(array), 3)), ((0, 0), (0, 3)))
    elif modality == "imu":
        array = array + rng.normal(0, 1, array.shape) * np.repeat([0.1, 0.02], 3)[:, None]
    else:
        array = array * rng.uniform(0.7, 1.4) + rng.normal(0, 0.5, array.shape)
    return array.astype(np.float32)


_RENDERERS: dict[str, Callable[[Scene, int], np.ndarray]] = {
    "depth": render_depth,
    "normal": render_normal,
    "pointcloud": render_pointcloud,
    "imu": render_imu,
    "fmri": render_fmri,
}


def _resized(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An (H, W) or (H, W, C) array of floats as a square of 40 to 199 pixels."""
    from PIL import Image as PilImage

    side = int(rng.integers(40, 200))
    layers = [
        np.asarray(PilImage.fromarray(layer).resize((side, side), PilImage.Resampling.BILINEAR))
        for layer in np.moveaxis(np.atleast_3d(array), -1, 0)
    ]
    return np.stack(layers, axis=-1) if array.ndim == 3 else layers[0]


def recompress(pixels: np.ndarray, rng: np.random.Generator, resize: bool = True) -> np.ndarray:
    """Return a picture (H, W, 3) after a change of size and a JPEG round trip."""
    from PIL import Image as PilImage

    picture = PilImage.fromarray(pixels)
    if resize:
        side = int(rng.integers(40, 200))
        picture = picture.resize((side, side), PilImage.Resampling.BICUBIC)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=int(rng.integers(30, 90)))
    return np.asarray(PilImage.open(stream).convert("RGB"))


def opening(shown: Shown, seed: int, rng: np.random.Generator) -> dict[str, Any]:
    """Return the part that brings a scene in: a medium, or a sentence in its place."""
    if shown.modality == "text":
        return {"type": "text", "text": sentence(caption(shown.scene, "text", rng)) + " "}
    return {"type": shown.modality, "data": render_medium(shown.modality, shown.scene, seed)}


def make_task(sources: str | Sequence[str], wanted: str, scene: Scene, seed: int, turn: int = 1) -> Task:
    """Return a request about a scene.

    Args:
        sources: What the scene is given by, one of ``known_sources()``; a pair is joined by "+" or given as two names.
        wanted: "text", "image", "video", "audio", two media joined by "+", or "none".
        scene: What the last reply is about. Where words change what is shown or was made, it is the scene after the change;
            the one before is of the same split if this one is "seen", and any otherwise. Which split it is of depends on
            the sources (see ``Scene.split_for``).
        seed: Chooses words, renderings and what is changed.
        turn: 2 for a request that comes back to the reply before: "the same, but blue".

    Raises:
        ConfigError: Unknown sources, medium or turn, or a turn that there is no request for.
    """
    source = sources if isinstance(sources, str) else "+".join(sources)
    media = () if wanted in ("text", "none") else tuple(wanted.split("+"))
    if source not in known_sources() or not set(media) <= set(MEDIA) or len(media) > 2 or turn not in (1, 2):
        raise ConfigError(
            f"there is no task from {source!r} to {wanted!r} in turn {turn}{suggest(source, list(known_sources()))}"
        )
    if (turn == 2 and (len(media) != 1 or "+" in source)) or (source.startswith("text+") and len(media) > 1):
        raise ConfigError(
            f"no request leads from {source!r} to {wanted!r} in turn {turn}; ask for one medium in turn 1."
        )
    rng = np.random.default_rng([seed, 5])
    if turn == 2:
        return _second_turn(source, wanted, scene, seed, rng)
    factors, shown = _factors(source), scene
    if wanted == "none" and source == "text" and rng.random() < 0.5:
        asked, factors = chat_pairs(rng)[0][0], ()
        return Task((_user([], asked),), ("text",), wanted, scene, factors)
    if source.startswith("text+"):
        able = CARRIES[source[5:] if not media else media[0]]
        shown, changed = change_scene(scene, able, rng, _split_before(scene, source), source)
        factors = ordered({*factors, *changed})
        asked = change_request(scene, changed, media[0] if media else "text", rng)
    elif media and source == "text":
        factors = ordered({factor for medium in media for factor in CARRIES[medium]})
        return Task((_user([], make_request(scene, media, rng)),), ("text",), wanted, scene, factors)
    elif media:
        asked = convert_request(source, media, rng)
    elif wanted == "none" and rng.random() < 0.5:
        asked = question(scene, str(rng.choice(factors)), rng)[0]
    else:
        asked = describe_request(source, rng)
    return Task((_user(_openings(source, shown, seed, rng), asked),), tuple(source.split("+")), wanted, scene, factors)


def _second_turn(source: str, wanted: str, scene: Scene, seed: int, rng: np.random.Generator) -> Task:
    """A medium that is made, or a description, and the same with a change."""
    before, changed = change_scene(scene, CARRIES[wanted], rng, _split_before(scene, source), source)
    same = rng.random() < 0.6
    factors = CARRIES[wanted] if source == "text" and same else CARRIES[source]
    first = [] if source == "text" and same else _openings(source, before, seed, rng)
    if not same:
        asked = describe_request(source, rng)
    else:
        asked = make_request(before, wanted, rng) if source == "text" else convert_request(source, wanted, rng)
    then = again_request(scene, changed, rng) if same else then_request(scene, changed, wanted, rng)
    return Task((_user(first, asked), _user([], then)), (source,), wanted, scene, ordered({*factors, *changed}))


def _split_before(scene: Scene, source: str) -> str | None:
    """Which split the scene before a change is of."""
    return "seen" if scene.split_for(source) == "seen" else None


def _factors(source: str) -> tuple[str, ...]:
    """The factors that are given by what is shown."""
    shown = source.removeprefix("text+").split("+")
    return ordered({factor for name in shown for factor in CARRIES[name]})


def _openings(source: str, scene: Scene, seed: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    return [opening(Shown(name, scene), seed, rng) for name in source.removeprefix("text+").split("+")]


def _user(parts: list[dict[str, Any]], words: str) -> Message:
    return {"role": "user", "content": [*parts, {"type": "text", "text": words}]}


def answer_tasks(bridge: Any, tasks: Sequence[Task], seed: int | Sequence[int] = 0) -> list[Any]:
    """Return the last replies of a bridge to tasks of equally many turns: the first turns together, then the next."""
    dialogues: list[list[Message]] = [[] for _ in tasks]
    replies: list[Any] = []
    for turn in range(len(tasks[0].messages)):
        for dialogue, task, reply in zip(dialogues, tasks, replies or [None] * len(tasks), strict=True):
            dialogue += [*([reply.message] if reply is not None else []), task.messages[turn]]
        replies = bridge.generate(dialogues, max_new_tokens=MAX_NEW_TOKENS, seed=seed)
    return replies


def is_emitted(task: Task, reply: Any) -> bool:
    """Return whether a reply holds exactly the media that were asked for, in order."""
    return tuple(medium.modality for medium in reply.media) == task.media


def right_factors(task: Task, reply: Any) -> dict[str, bool]:
    """Return for each factor that a reply must show whether it does: in words, or in every medium that can.

    Nothing is right in a reply with other media than those that were asked for.
    """
    if not is_emitted(task, reply):
        return dict.fromkeys(task.measured, False)
    found = [judge("text", reply.text)] if task.wanted == "text" else [read_medium(medium) for medium in reply.media]
    return {
        name: all(read[name] == getattr(task.scene, name) for read in found if name in read) for name in task.measured
    }


def is_right(task: Task, reply: Any) -> bool:
    """Return whether a reply holds exactly the media that were asked for, and all of them show every given factor."""
    return is_emitted(task, reply) and all(right_factors(task, reply).values())
