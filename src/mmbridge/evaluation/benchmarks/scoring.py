"""From replies to figures: which metric needs what, and what is said where something is not there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmbridge import media
from mmbridge.errors import ConfigError, MediaError, MMBridgeError
from mmbridge.evaluation import metrics
from mmbridge.evaluation.benchmarks.base import Request

_BATCH = 16


@dataclass(frozen=True)
class Answered:
    """A request and the reply to it.

    Attributes:
        request: What was asked.
        text: The reply's words.
        file: The medium that was made, None where there is none or none was asked for.
    """

    request: Request
    text: str
    file: Path | None = None


class Judges:
    """The networks that metrics look through, each loaded when it is first used.

    Args:
        embedder: Source of CLIP, CLAP, ImageBind, ... as ``mmbridge.encoders.joint.load_joint`` takes it.
        root: Folder of the data, which real media are in.
        report: Called with a sentence for every real medium that is damaged.
        progress: Whether to show progress bars, on a terminal.
    """

    def __init__(
        self,
        embedder: str | Path | None,
        root: Path,
        report: Callable[[str], None] = tqdm.write,
        progress: bool = False,
    ):
        self.embedder, self.root, self.report, self.progress = embedder, root, report, progress
        self.damaged: dict[str, str] = {}

    @cached_property
    def inception(self) -> Any:
        """FID's network; raises what ``Inception`` raises."""
        from mmbridge.encoders.inception import Inception

        return Inception()

    @cached_property
    def _joint(self) -> Any:
        from mmbridge.encoders.joint import load_joint

        assert self.embedder is not None
        return load_joint(self.embedder)

    def joint(self, modality: str) -> Any:
        """Return the embedder, which must know a modality.

        Raises:
            ConfigError: None was named, or it does not.
            CheckpointError: It can't be loaded.
        """
        if self.embedder is None:
            name = {"image": "CLIP or ImageBind", "audio": "CLAP or ImageBind"}[modality]
            raise ConfigError(f"no embedder was named; name one with --embedder: a folder or hub id of {name}.")
        if modality not in self._joint.modalities:
            raise ConfigError(
                f"the embedder {str(self.embedder)!r} knows {' and '.join(self._joint.modalities)}, not {modality}."
            )
        return self._joint

    def texts(self, modality: str, texts: Sequence[str]) -> Any:
        """Return embeddings of texts (N, D)."""
        embed = self.joint(modality).embed_text
        return _stack(embed(texts[start : start + _BATCH]) for start in range(0, len(texts), _BATCH))

    def made(self, network: Any, modality: str, items: Sequence[Answered]) -> Any:
        """Return embeddings of the media that were made (N, D)."""
        return self._embed(network, modality, [(str(item.file), None) for item in items if item.file is not None])

    def real(self, network: Any, modality: str, items: Sequence[Answered]) -> Any:
        """Return embeddings of the real media (N, D), each once; damaged ones are reported and left out."""
        names = dict.fromkeys(item.request.real for item in items if item.request.real is not None)
        return self._embed(network, modality, [(name, self.root) for name in names])

    def _embed(self, network: Any, modality: str, files: Sequence[tuple[str, Path | None]]) -> Any:
        return _stack(network.embed(modality, batch) for batch in self._load(modality, files))

    def _load(self, modality: str, files: Sequence[tuple[str, Path | None]]) -> Iterator[list[Any]]:
        batch: list[Any] = []
        for name, root in tqdm(
            files, desc=f"measuring {modality}s", leave=False, disable=None if self.progress else True
        ):
            try:
                batch.append(media.load(modality, name, root=root))
            except MediaError as error:
                if name not in self.damaged:
                    self.report(f"left out: {error}")
                self.damaged[name] = str(error)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        if batch:
            yield batch


def _stack(parts: Iterator[Any]) -> Any:
    import numpy as np

    arrays = [part.numpy() for part in parts]
    return np.concatenate(arrays) if arrays else np.zeros((0, 0))


def _with_media(items: Sequence[Answered]) -> tuple[list[Answered], float]:
    """Return what made a medium, and its share of all; the others count as 0 in similarities."""
    made = [item for item in items if item.file is not None]
    return made, len(made) / len(items)


def _captions(items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    texts, references = [item.text for item in items], [item.request.references for item in items]
    scores = metrics.bleu(texts, references)
    return {
        **{f"bleu_{order}": score for order, score in enumerate(scores, start=1)},
        "rouge_l": metrics.rouge_l(texts, references),
        "cider_d": metrics.cider_d(texts, references),
    }


def _meteor(items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    return {"meteor": metrics.meteor([item.text for item in items], [item.request.references for item in items])}


def _vqa_accuracy(items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    people = [item.request.references for item in items]
    return {"vqa_accuracy": metrics.vqa_accuracy([item.text for item in items], people)}


def _accuracy(items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    wanted = [item.request.references[0] for item in items]
    return {"accuracy": metrics.answer_accuracy([item.text for item in items], wanted)}


def _frechet(name: str, modality: str, items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    network = judges.inception if name == "fid" else judges.joint(modality)
    made, real = judges.made(network, modality, items), judges.real(network, modality, items)
    return {name: metrics.frechet_distance(made, real)}


def _clip_score(items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    made, share = _with_media(items)
    texts = judges.texts("image", [f"A photo depicts {item.request.text}" for item in made])
    return {"clip_score": share * metrics.clip_score(judges.made(judges.joint("image"), "image", made), texts)}


def _clap_score(items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    made, share = _with_media(items)
    texts = judges.texts("audio", [item.request.text for item in made])
    return {"clap_score": share * metrics.mean_cosine(judges.made(judges.joint("audio"), "audio", made), texts)}


def _clipsim(items: Sequence[Answered], judges: Judges) -> dict[str, float]:
    made, share = _with_media(items)
    network, videos = judges.joint("image"), []
    for item in tqdm(made, desc="measuring videos", leave=False, disable=None if judges.progress else True):
        frames = media.load("video", str(item.file), with_audio=False).frames  # type: ignore[union-attr]
        pictures = [media.Image(frame) for frame in frames]
        starts = range(0, len(pictures), _BATCH)
        videos.append(_stack(network.embed("image", pictures[start : start + _BATCH]) for start in starts))
    return {"clipsim": share * metrics.clipsim(videos, judges.texts("image", [item.request.text for item in made]))}


SCORERS: dict[str, Callable[[Sequence[Answered], Judges], dict[str, float]]] = {
    "captions": _captions,
    "meteor": _meteor,
    "vqa_accuracy": _vqa_accuracy,
    "accuracy": _accuracy,
    "fid": lambda items, judges: _frechet("fid", "image", items, judges),
    "frechet_embedder": lambda items, judges: _frechet("frechet_embedder", "image", items, judges),
    "clip_score": _clip_score,
    "fad": lambda items, judges: _frechet("fad", "audio", items, judges),
    "clap_score": _clap_score,
    "clipsim": _clipsim,
}
"""Metrics by name; each gives one figure or more."""

_LOOKS_THROUGH = {
    "frechet_embedder": "image",
    "clip_score": "image",
    "clipsim": "image",
    "fad": "audio",
    "clap_score": "audio",
}
"""What the embedder must know for a metric."""


def find_left_out(names: Sequence[str], judges: Judges) -> dict[str, str]:
    """Return the metrics whose network is not there, and why; said before hours of work, not after.

    Raises:
        CheckpointError: An embedder was named and can't be loaded.
    """
    left_out = {}
    for name in names:
        try:
            if name == "fid":
                _ = judges.inception
            elif name in _LOOKS_THROUGH:
                judges.joint(_LOOKS_THROUGH[name])
        except MMBridgeError as error:
            if judges.embedder is not None and name != "fid" and not isinstance(error, ConfigError):
                raise
            left_out[name] = str(error)
    return left_out


def score(names: Sequence[str], items: Sequence[Answered], judges: Judges) -> tuple[dict[str, float], dict[str, str]]:
    """Return the figures, and for each metric that can't be had why.

    Args:
        names: Keys of ``SCORERS``.
        items: Requests and replies.
        judges: The networks.
    """
    figures: dict[str, float] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            figures.update(SCORERS[name](items, judges))
        except MMBridgeError as error:
            left_out[name] = str(error)
    return figures, left_out
