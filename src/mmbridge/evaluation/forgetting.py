"""Forgetting: the same directions measured after every stage of training, and how far the last has fallen below the best."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mmbridge import hub
from mmbridge.bridge import Bridge, find_bridge
from mmbridge.errors import ConfigError
from mmbridge.evaluation.any_to_any import Partial, directions, evaluate, fingerprint, name_of
from mmbridge.registry import suggest

_PARTIAL = "forgetting.partial.json"


def measure_forgetting(
    bridges: Sequence[str | Path],
    out: str | Path,
    *,
    samples: int = 200,
    seed: int = 0,
    cells: Sequence[str] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure bridges of successive stages and write ``forgetting.json``; finished stages and cells are not measured again.

    The table of each bridge is written into a folder of its own below ``out``, as ``evaluate`` does.

    Args:
        bridges: Names or folders, in the order of training.
        out: Folder to write into.
        samples: Requests per cell.
        seed: Seed of scenes, renderings, decoders and resamplings: the same requests for every bridge.
        cells: Names of the directions to measure; all that any of the bridges has by default.
        progress: Whether to show progress bars.

    Returns:
        What is written (see ``compare``).

    Raises:
        ConfigError: Fewer than two bridges, ``samples`` is below 1, or none of the bridges has such a cell.
        CheckpointError: A bridge is missing or altered.
    """
    if len(bridges) < 2:
        raise ConfigError(f"forgetting is measured over two bridges or more, not {len(bridges)}; give every stage's.")
    known = [_cells_of(bridge) for bridge in bridges]
    for cell in cells or ():
        if not any(cell in names for names in known):
            every = list(dict.fromkeys(name for names in known for name in names))
            raise ConfigError(f"none of these bridges has a cell {cell!r}{suggest(cell, every)}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"samples": samples, "seed": seed, "cells": cells and list(cells)}
    partial = Partial(folder / _PARTIAL, settings)
    tables: dict[str, list[dict[str, Any]]] = {}
    for number, (source, names) in enumerate(zip(bridges, known, strict=True), start=1):
        chosen = [cell for cell in (cells or names) if cell in names]
        stage = f"{number}-{Path(source).resolve().name}"
        bridge = Bridge.from_pretrained(source)
        key = f"{stage} {fingerprint(bridge)}"
        if key not in partial.cells:
            table: list[dict[str, Any]] = []
            if chosen:
                options: dict[str, Any] = {"samples": samples, "seed": seed, "cells": chosen, "progress": progress}
                table = evaluate(bridge, folder / stage, **options)
            partial.keep(key, {"table": table})
        tables[stage] = partial.cells[key]["table"]
    result = compare(tables)
    hub.write_json(folder / "forgetting.json", result)
    partial.path.unlink(missing_ok=True)
    return result


def _cells_of(source: str | Path) -> list[str]:
    """The names of a saved bridge's directions, without its weights."""
    config = hub.read_json(find_bridge(source) / "config.json")
    ways = SimpleNamespace(inputs=config["inputs"], outputs=config.get("outputs", {}))
    return [name_of(direction) for direction in directions(ways)]


def compare(tables: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return how the accuracy of every direction went over the stages.

    Args:
        tables: The any-to-any table after each stage, by its name, in the order of training.

    Returns:
        ``stages``, their names, and ``directions``: dicts with ``in``, ``out``, ``split`` and ``turn`` (where it is 2) as in
        the tables; ``accuracy``, after every stage, None where the bridge lacks the direction; ``best`` of these; and
        ``drop``, how many points the last is below the best, None where the last bridge lacks the direction.
    """
    found: dict[tuple[Any, ...], list[float | None]] = {}
    for number, table in enumerate(tables.values()):
        for cell in table:
            key = ("+".join(cell["in"]), cell["out"], cell["split"], cell.get("turn", 1))
            found.setdefault(key, [None] * len(tables))[number] = cell["accuracy"]
    rows = []
    for (sources, wanted, split, turn), accuracy in found.items():
        best = max(value for value in accuracy if value is not None)
        drop = None if accuracy[-1] is None else round(100 * (best - accuracy[-1]), 6)
        row = {"in": sources.split("+"), "out": wanted, "split": split, **({"turn": turn} if turn > 1 else {})}
        rows.append({**row, "accuracy": accuracy, "best": best, "drop": drop})
    return {"stages": list(tables), "directions": rows}


def format_forgetting(result: dict[str, Any]) -> str:
    """Return the directions as text for a terminal, a column per stage."""
    widths = [max(len(stage), 6) + 2 for stage in result["stages"]]
    heads = "".join(f"{stage:>{width}}" for stage, width in zip(result["stages"], widths, strict=True))
    lines = [f"{'in':<13}{'out':<13}{'turn':<5}{'split':<7}{heads}{'best':>8}{'drop':>8}"]
    for row in result["directions"]:
        values = "".join(
            f"{'-' if value is None else format(value, '.3f'):>{width}}"
            for value, width in zip(row["accuracy"], widths, strict=True)
        )
        drop = "-" if row["drop"] is None else f"{row['drop']:.1f}"
        lines.append(
            f"{'+'.join(row['in']):<13}{row['out']:<13}{row.get('turn', 1):<5}{row['split']:<7}{values}{row['best']:>8.3f}"
            f"{drop:>8}"
        )
    return "\n".join(lines)
