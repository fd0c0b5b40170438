"""Measure a bridge from any medium to any medium.

Scenes that bridges have seen in training and scenes that they have not are rendered, asked about and judged by
measurement. The table is printed, written to DIR/any_to_any.json and drawn in DIR/index.html: accuracy with its 95 %
bootstrap interval (low, high), what the same decoders make of the gold captions (bound) and of the reply's own words
(written), and how often exactly the media asked for came out (emission). The same command goes on with an interrupted run.
"""

import argparse
from pathlib import Path

EXAMPLES = """\
  mmbridge evaluate mmbridge/tiny --out evaluation
  mmbridge evaluate runs/tiny/instruction_tuning --out evaluation --samples 50 --seed 1
  mmbridge evaluate mmbridge/tiny --out evaluation --cells text:image,image+audio:text,text:image:2
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("bridge", metavar="BRIDGE", help="folder, shipped name or hub id of a saved bridge")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for any_to_any.json and index.html"
    )
    parser.add_argument("--samples", type=int, metavar="N", help="requests per cell of the table")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of scenes and replies")
    parser.add_argument(
        "--cells", metavar="LIST", help="only these cells: IN:OUT joined by commas, with :2 behind it for second turns"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge.demo.page import write_table
    from mmbridge.evaluation.any_to_any import evaluate, format_table

    cells = [name.strip() for name in arguments.cells.split(",")] if arguments.cells else None
    given = {"samples": arguments.samples, "seed": arguments.seed, "cells": cells}
    options = {name: value for name, value in given.items() if value is not None}
    table = evaluate(arguments.bridge, arguments.out, **options)
    print(format_table(table))
    print(f"see {write_table(table, arguments.bridge, arguments.out)}")
