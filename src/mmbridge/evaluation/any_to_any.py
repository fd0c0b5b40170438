"""The any-to-any table: every direction of a bridge, read by judges that learned nothing.

Each cell holds the share of replies in which all shared factors are right and only the media asked for are there, with
its Wilson interval at 95 %, beside the bound: the same decoder given the gold caption. Cells whose "out" is "none" ask for no
medium, and count replies that hold none.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mmbridge import hub
from mmbridge.data.tasks import Task, answer_tasks, is_right, make_task
from mmbridge.synthetic import Scene

RENDERING = 50_000_000
"""First seed of evaluation's renderings; training draws its seeds far below."""


@dataclass
class Cell:
    """One direction on one split; ``inputs`` and ``output`` are ``in`` and ``out`` in the file."""

    inputs: list[str]
    output: str
    split: str
    accuracy: float
    low: float
    high: float
    bound: float
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Return the cell as the table's file has it."""
        values = asdict(self)
        return {"in": values.pop("inputs"), "out": values.pop("output"), **values}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the Wilson score interval at 95 % of ``right`` successes in ``count`` trials (Wilson, 1927)."""
    z, share = 1.959964, right / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - spread), min(1.0, centre + spread)


def make_tasks(source: str, wanted: str, split: str, count: int, seed: int) -> list[Task]:
    """Return evaluation tasks of one direction, on fresh renderings."""
    rng = np.random.default_rng([seed, len(source), len(wanted), len(split)])
    return [
        make_task(source, wanted, Scene.random(rng, split), RENDERING + seed * 100_000 + index)
        for index in range(count)
    ]


def gold_accuracy(decoder: Any, tasks: Sequence[Task], seed: int, batch_size: int) -> float:
    """Return what the decoder itself reaches from the tasks' gold captions."""
    right = []
    for start in range(0, len(tasks), batch_size):
        part = tasks[start : start + batch_size]
        conditions, _ = decoder.encode([task.caption("image") for task in part])
        pictures = decoder.sample(conditions, seed=[seed + start + index for index in range(len(part))])
        for task, picture in zip(part, pictures, strict=True):
            right.append(task.is_shown(picture))
    return float(np.mean(right))


def measure(
    bridge: Any, tasks: Sequence[Task], *, seed: int = 0, batch_size: int = 50, progress: Any = None
) -> list[bool]:
    """Return for each task whether the bridge's reply is right."""
    right = []
    for start in range(0, len(tasks), batch_size):
        part = tasks[start : start + batch_size]
        replies = answer_tasks(bridge, part, seed + start)
        right += [is_right(task, reply) for task, reply in zip(part, replies, strict=True)]
        if progress is not None:
            progress.update(len(part))
    return right


def directions(bridge: Any) -> list[tuple[str, str]]:
    """Return the (source, wanted) pairs that the bridge has ways for."""
    sources = ["text", *(name for name in ("image", "video", "audio") if name in bridge.inputs)]
    wanted = ["text", "none", *(["image"] if "image" in bridge.outputs else [])]
    return [(source, made) for made in wanted for source in sources]


def evaluate(
    bridge: Any,
    out: str | Path,
    *,
    samples: int = 200,
    seed: int = 0,
    splits: Sequence[str] = ("unseen", "seen"),
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure every direction and write ``any_to_any.json``.

    Args:
        bridge: A ``Bridge``, or the name or folder of one.
        out: Folder to write into.
        samples: Requests per cell.
        seed: Seed of scenes, renderings and decoders.
        splits: Which factor combinations to draw: "unseen" ones, held out of all training of bridges, and "seen" ones.
        progress: Whether to show a progress bar.

    Returns:
        The table, as written: a list of cells with keys in, out, split, accuracy, low, high, bound, n.
    """
    if isinstance(bridge, str | Path):
        from mmbridge.bridge import Bridge

        bridge = Bridge.from_pretrained(bridge)
    cells = []
    pairs = directions(bridge)
    with tqdm(total=len(pairs) * len(splits) * samples, desc="evaluating", unit="request", disable=not progress) as bar:
        for split in splits:
            for source, wanted in pairs:
                tasks = make_tasks(source, wanted, split, samples, seed)
                right = measure(bridge, tasks, seed=seed, progress=bar)
                bound = 1.0
                if wanted == "image":
                    bound = gold_accuracy(bridge.outputs["image"].decoder, tasks, seed, 50)
                low, high = wilson(sum(right), len(right))
                cells.append(Cell([source], wanted, split, float(np.mean(right)), low, high, bound, len(right)))
    table = [cell.to_dict() for cell in cells]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    hub.write_json(folder / "any_to_any.json", table)
    return table


def format_table(table: Sequence[dict[str, Any]]) -> str:
    """Return the table as text for a terminal."""
    lines = [f"{'in':<8}{'out':<8}{'split':<8}{'right':>8}   {'95 % interval':<17}{'bound':>6}{'n':>6}"]
    for cell in table:
        interval = f"{cell['low']:.3f} to {cell['high']:.3f}"
        lines.append(
            f"{'+'.join(cell['in']):<8}{cell['out']:<8}{cell['split']:<8}{cell['accuracy']:>8.3f}   {interval:<17}"
            f"{cell['bound']:>6.3f}{cell['n']:>6}"
        )
    return "\n".join(lines)
