"""Measure a bridge from any medium to any medium.

Scenes that bridges have seen in training and scenes that they have not are rendered, asked about and judged by
measurement. The table is printed and written to DIR/any_to_any.json: accuracy with its 95 % interval (low, high), and
the bound, which is the same decoder with the gold caption.
"""

import argparse
from pathlib import Path

EXAMPLES = """\
  mmbridge evaluate mmbridge/tiny --out evaluation
  mmbridge evaluate runs/tiny/instruction_tuning --out evaluation --samples 50 --seed 1
"""

_COLUMNS = ("in", "out", "split", "accuracy", "low", "high", "bound", "n")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bridge", metavar="BRIDGE", help="folder, shipped name or hub id of a saved bridge")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for any_to_any.json")
    parser.add_argument("--samples", type=int, metavar="N", help="requests per row of the table")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of scenes and replies")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge import Bridge, hub
    from mmbridge.evaluation.any_to_any import evaluate

    given = {"samples": arguments.samples, "seed": arguments.seed}
    options = {name: value for name, value in given.items() if value is not None}
    evaluate(Bridge.from_pretrained(arguments.bridge), arguments.out, **options)
    print(table(hub.read_json(arguments.out / "any_to_any.json")))


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows of any_to_any.json as aligned text."""
    lines = [_COLUMNS, *(tuple(_cell(row[column]) for column in _COLUMNS) for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(_COLUMNS))]
    aligned = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in aligned)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "+".join(map(str, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
