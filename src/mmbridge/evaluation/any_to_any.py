"""The any-to-any table: every direction of a bridge, read by judges that learned nothing.

A cell is the share of replies in which exactly the media asked for are there and show every factor that was given and that
they can carry. Beside it stand its 95 % bootstrap interval and, for media, two baselines through the same decoders: the bound,
which is what they make of the gold caption, and what they make of the words of the bridge's own reply.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmbridge import __version__, hub
from mmbridge.data.tasks import Task, answer_tasks, is_emitted, is_right, make_task, read_medium, right_factors
from mmbridge.errors import ConfigError
from mmbridge.modality import MEDIA
from mmbridge.registry import suggest
from mmbridge.synthetic import FACTORS, Scene
from mmbridge.synthetic.requests import PAIRS

RENDERING = 50_000_000
"""First seed of evaluation's renderings; training draws its seeds far below."""
RESAMPLES = 2000
_BATCH = 50
_PARTIAL = "any_to_any.partial.json"

Direction = tuple[str, str, int]
"""Sources (a pair is joined by "+"), what is wanted, and the turn."""


@dataclass
class Cell:
    """One direction on one split; ``inputs`` and ``output`` are ``in`` and ``out`` in the file.

    Attributes:
        inputs: What the scene is given by; "text" beside a medium changes what that shows.
        output: "text", "image", "video", "audio", two media such as "image+audio", or "none" where no medium is asked for.
        split: Which combinations: "seen" or "unseen".
        accuracy: Share of right replies.
        low: Lower end of its 95 % interval.
        high: Upper end.
        bound: What the decoders reach from the gold captions; 1 where none takes part.
        n: Requests.
        written: What the decoders reach from the words of the reply; None where none takes part.
        emission: Share of replies with exactly the media asked for, right or wrong.
        turn: 2 where the request comes back to a reply, as "the same, but blue" does.
        factors: By factor, the share of right replies among those that had to show it; never above ``emission`` of these.
    """

    inputs: list[str]
    output: str
    split: str
    accuracy: float
    low: float
    high: float
    bound: float
    n: int
    written: float | None
    emission: float
    turn: int = 1
    factors: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as the table's file has it; ``turn`` only where it is 2."""
        values = asdict(self)
        if self.turn == 1:
            del values["turn"]
        return {"in": values.pop("inputs"), "out": values.pop("output"), **values}


def bootstrap(right: Sequence[bool], seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval at 95 % of a share (Efron, 1979): 2,000 resamplings of the requests."""
    values = np.asarray(right, dtype=np.float32)
    drawn = np.random.default_rng([seed, 31]).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(low), float(high)


class CaptionReader:
    """What decoders make of captions, as judges read it; a caption is decoded once for each place that it has in a cell.

    Args:
        bridge: Whose decoders.
        seed: Seed of the decoders.
    """

    def __init__(self, bridge: Any, seed: int = 0):
        self.bridge, self.seed = bridge, seed
        self._found: dict[tuple[str, int, str], dict[str, str | None]] = {}

    def accuracy(self, tasks: Sequence[Task], captions: Sequence[Sequence[str]], progress: Any = None) -> float:
        """Return the share of tasks for which media made from captions are right.

        Args:
            tasks: What was asked for.
            captions: For each task, one caption per medium that it wants.
            progress: A bar that counts captions.
        """
        for medium in sorted({medium for task in tasks for medium in task.media}):
            keys = [
                (medium, place, words)
                for place, (task, texts) in enumerate(zip(tasks, captions, strict=True))
                for name, words in zip(task.media, texts, strict=True)
                if name == medium
            ]
            missing = [key for key in keys if key not in self._found]
            if progress is not None:
                progress.update(len(keys) - len(missing))
            for start in range(0, len(missing), _BATCH):
                part = missing[start : start + _BATCH]
                self._decode(medium, part)
                if progress is not None:
                    progress.update(len(part))
        return float(
            np.mean([
                all(task.matches(self._found[name, place, words]) for name, words in zip(task.media, texts, strict=True))
                for place, (task, texts) in enumerate(zip(tasks, captions, strict=True))
            ])
        )  # fmt: skip

    def _decode(self, medium: str, keys: Sequence[tuple[str, int, str]]) -> None:
        decoder = self.bridge.outputs[medium].decoder
        conditions, _ = decoder.encode([words for _, _, words in keys])
        made = decoder.sample(conditions, seed=[self.seed + place for _, place, _ in keys])
        for key, result in zip(keys, made, strict=True):
            self._found[key] = read_medium(result)


def gold_accuracy(bridge: Any, tasks: Sequence[Task], seed: int = 0) -> float:
    """Return what the decoders themselves reach from the tasks' gold captions."""
    return CaptionReader(bridge, seed).accuracy(tasks, _gold(tasks))


def _gold(tasks: Sequence[Task]) -> list[list[str]]:
    return [[task.caption(medium) for medium in task.media] for task in tasks]


def make_tasks(
    sources: str | Sequence[str], wanted: str, split: str, count: int, seed: int, turn: int = 1
) -> list[Task]:
    """Return evaluation tasks of one direction, on fresh renderings.

    All directions are about the same scenes, but those from maps and traces that have a split of their own.

    Raises:
        ConfigError: There is no such direction.
    """
    rng = np.random.default_rng([seed, len(split)])
    first = RENDERING + seed * 100_000
    source = sources if isinstance(sources, str) else "+".join(sources)
    scenes = [Scene.random(rng, split, source) for _ in range(count)]
    return [make_task(source, wanted, scene, first + index, turn) for index, scene in enumerate(scenes)]


def replies(
    bridge: Any, tasks: Sequence[Task], *, seed: int = 0, batch_size: int = _BATCH, progress: Any = None
) -> Iterator[Any]:
    """Yield the last reply to each task; the bridge answers in batches."""
    for start in range(0, len(tasks), batch_size):
        part = tasks[start : start + batch_size]
        yield from answer_tasks(bridge, part, seed + start)
        if progress is not None:
            progress.update(len(part))


def measure(bridge: Any, tasks: Sequence[Task], *, seed: int = 0, batch_size: int = _BATCH) -> list[bool]:
    """Return for each task whether the bridge's last reply is right."""
    answered = replies(bridge, tasks, seed=seed, batch_size=batch_size)
    return [is_right(task, reply) for task, reply in zip(tasks, answered, strict=True)]


def directions(bridge: Any) -> list[Direction]:
    """Return what the bridge can be asked for, as (sources, wanted, turn).

    Every medium that comes in, words, words with each medium, and a sound with a picture or a video, to words, to every
    medium that goes out and to words where a medium would be out of place; two media at once from something else, and
    second turns.
    """
    media = [name for name in MEDIA if name in bridge.inputs]
    made = [name for name in ("image", "audio", "video") if name in bridge.outputs]
    single = ["text", *media]
    pairs = [*(pair for pair in PAIRS if set(pair.split("+")) <= set(media)), *(f"text+{name}" for name in media)]
    several = ["+".join(pair) for pair in itertools.combinations(made, 2)]
    return [
        *((source, wanted, 1) for wanted in ("text", *made, "none") for source in (*single, *pairs)),
        *((source, wanted, 1) for wanted in several for source in single if source not in wanted.split("+")),
        *((source, wanted, 2) for wanted in made for source in single),
    ]


def name_of(direction: Direction) -> str:
    """Return a direction's name, such as "text:image" or, in the second turn, "text:image:2"."""
    sources, wanted, turn = direction
    return f"{sources}:{wanted}" + (f":{turn}" if turn > 1 else "")


def select(bridge: Any, cells: Sequence[str] | None) -> list[Direction]:
    """Return the directions of a bridge with these names, or all of them.

    Raises:
        ConfigError: It has no direction of that name.
    """
    known = {name_of(direction): direction for direction in directions(bridge)}
    for cell in cells or ():
        if cell not in known:
            raise ConfigError(f"this bridge has no cell {cell!r}{suggest(cell, list(known))}")
    return [known[cell] for cell in (cells or known)]


def evaluate(
    bridge: Any,
    out: str | Path,
    *,
    samples: int = 200,
    seed: int = 0,
    splits: Sequence[str] = ("unseen", "seen"),
    cells: Sequence[str] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure directions and write ``any_to_any.json``; what an interrupted run has measured is not measured again.

    Args:
        bridge: A ``Bridge``, or the name or folder of one.
        out: Folder to write into.
        samples: Requests per cell.
        seed: Seed of scenes, renderings, decoders and resamplings.
        splits: Which factor combinations to draw: "unseen" ones, held out of all training of bridges, and "seen" ones.
        cells: Names of the directions to measure (see ``name_of``); all of the bridge's by default.
        progress: Whether to show a progress bar, which counts replies and captions that decoders read.

    Returns:
        The table, as written: a list of cells with keys in, out, split, accuracy, low, high, bound, n, written,
        emission, factors, and turn where it is 2.

    Raises:
        ConfigError: ``samples`` is below 1, or the bridge has no such cell.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, not {samples}.")
    if isinstance(bridge, str | Path):
        from mmbridge.bridge import Bridge

        bridge = Bridge.from_pretrained(bridge)
    chosen = [(direction, split) for split in splits for direction in select(bridge, cells)]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    partial = Partial(folder / _PARTIAL, {"bridge": fingerprint(bridge), "samples": samples, "seed": seed})
    reader = CaptionReader(bridge, seed)
    table = []
    steps = [samples * (1 + 2 * _media_of(direction)) for direction, _ in chosen]
    with tqdm(total=sum(steps), unit=" replies and captions", disable=not progress) as bar:
        for (direction, split), count in zip(chosen, steps, strict=True):
            name = f"{name_of(direction)} {split}"
            bar.set_description(name)
            if name in partial.cells:
                bar.update(count)
            else:
                tasks = make_tasks(direction[0], direction[1], split, samples, seed, direction[2])
                partial.keep(name, measure_cell(bridge, tasks, split, direction[2], reader, seed, bar).to_dict())
            table.append(partial.cells[name])
    hub.write_json(folder / "any_to_any.json", table)
    partial.path.unlink(missing_ok=True)
    return table


def measure_cell(
    bridge: Any, tasks: Sequence[Task], split: str, turn: int, reader: CaptionReader, seed: int, progress: Any
) -> Cell:
    """Measure one cell.

    Args:
        bridge: The bridge.
        tasks: Its requests.
        split: Their split.
        turn: 2 for second turns.
        reader: Reads captions through the bridge's decoders.
        seed: Seed of replies and resamplings.
        progress: A bar that counts replies and captions.
    """
    right, emitted, written = [], [], []
    shown: dict[str, list[bool]] = {}
    for task, reply in zip(tasks, replies(bridge, tasks, seed=seed, progress=progress), strict=True):
        found = right_factors(task, reply)
        emitted.append(is_emitted(task, reply))
        right.append(emitted[-1] and all(found.values()))
        for name, value in found.items():
            shown.setdefault(name, []).append(value)
        words = reply.text.removeprefix("Here is ").removesuffix(".")
        written.append([words] * len(task.media))
    bound, pipeline = 1.0, None
    if tasks[0].media:
        bound = reader.accuracy(tasks, _gold(tasks), progress)
        pipeline = reader.accuracy(tasks, written, progress)
    low, high = bootstrap(right, seed)
    accuracy, emission = float(np.mean(right)), float(np.mean(emitted))
    sources, wanted = list(tasks[0].sources), tasks[0].wanted
    factors = {name: float(np.mean(shown[name])) for name in FACTORS if name in shown}
    return Cell(sources, wanted, split, accuracy, low, high, bound, len(right), pipeline, emission, turn, factors)


def _media_of(direction: Direction) -> int:
    """How many media a direction asks for."""
    return 0 if direction[1] in ("text", "none") else len(direction[1].split("+"))


class Partial:
    """The finished cells of a run that goes on, in a file; those of other settings are forgotten.

    Args:
        path: The file.
        settings: Whatever the cells depend on.
    """

    def __init__(self, path: Path, settings: dict[str, Any]):
        self.path, self.settings = path, {"mmbridge": __version__, **settings}
        self.cells: dict[str, dict[str, Any]] = {}
        if path.exists():
            kept = hub.read_json(path)
            if isinstance(kept, dict) and kept.get("settings") == self.settings:
                self.cells = kept["cells"]

    def keep(self, name: str, cell: dict[str, Any]) -> None:
        """Add a cell and write the file."""
        self.cells[name] = cell
        hub.write_json(self.path, {"settings": self.settings, "cells": self.cells})


def fingerprint(bridge: Any) -> str:
    """Return a SHA-256 of a bridge's configuration and trained weights."""
    digest = hashlib.sha256(json.dumps(bridge.config(), sort_keys=True, default=str).encode())
    for name, parameters in sorted(bridge.parts().items()):
        for key, value in sorted(parameters.items()):
            digest.update(f"{name}.{key}".encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """Return the table as text for a terminal."""
    lines = [
        f"{'in':<12}{'out':<13}{'turn':<5}{'split':<8}{'right':>6}   {'95 % interval':<17}{'bound':>6}{'written':>9}"
        f"{'emitted':>9}{'n':>6}"
    ]
    for cell in table:
        interval = f"{cell['low']:.3f} to {cell['high']:.3f}"
        written = "-" if cell["written"] is None else f"{cell['written']:.3f}"
        lines.append(
            f"{'+'.join(cell['in']):<12}{cell['out']:<13}{cell.get('turn', 1):<5}{cell['split']:<8}"
            f"{cell['accuracy']:>6.3f}   {interval:<17}{cell['bound']:>6.3f}{written:>9}{cell['emission']:>9.3f}"
            f"{cell['n']:>6}"
        )
    return "\n".join(lines)
