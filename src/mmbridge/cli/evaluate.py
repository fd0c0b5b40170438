"""Measure a bridge from any medium to any medium.

Scenes that bridges have seen in training and scenes that they have not are rendered, asked about and judged by
measurement. The table is printed, written to DIR/any_to_any.json and drawn in DIR/index.html: accuracy with its 95 %
bootstrap interval (low, high), what the same decoders make of the gold captions (bound) and of the reply's own words
(written), and how often exactly the media asked for came out (emission). The same command goes on with an interrupted run.

With several bridges, those of one bridge's stages in the order of training, measure forgetting: the same cells after every
stage, each bridge's table in a folder of its own below DIR, and in DIR/forgetting.json and forgetting.svg how the accuracy
of every direction went, its best, and how many points the last stage is below it.

With --benchmark, answer a public benchmark instead, over data in their official layout below --data, and measure the
replies by the field's own metrics. Nothing is downloaded: what is not there is named, with where to get it. An interrupted
run goes on when it is started again. docs/evaluation.md lists layouts and metrics.
"""

import argparse
from pathlib import Path
from typing import Any

from mmbridge.errors import ConfigError
from mmbridge.evaluation.benchmarks.table import BENCHMARKS

EXAMPLES = """\
  mmbridge evaluate mmbridge/tiny --out evaluation
  mmbridge evaluate runs/tiny/instruction_tuning --out evaluation --samples 50 --seed 1
  mmbridge evaluate mmbridge/tiny --out evaluation --cells text:image,image+audio:text,text:image:2
  mmbridge evaluate runs/onellm/image runs/onellm/video_audio_pointcloud --out forgetting
  mmbridge evaluate runs/nextgpt --benchmark coco-caption --data coco --out captions --limit 500
  mmbridge evaluate runs/nextgpt --benchmark coco-text-to-image --data coco --out pictures --limit 30000 \\
      --embedder openai/clip-vit-base-patch32
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "bridges",
        nargs="+",
        metavar="BRIDGE",
        help="folder, shipped name or hub id of a saved bridge; several for forgetting",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for what is written")
    parser.add_argument("--seed", type=int, metavar="N", help="seed of scenes and replies")
    group = parser.add_argument_group("the table")
    group.add_argument("--samples", type=int, metavar="N", help="requests per cell of the table")
    group.add_argument(
        "--cells", metavar="LIST", help="only these cells: IN:OUT joined by commas, with :2 behind it for second turns"
    )
    group = parser.add_argument_group("a public benchmark")
    group.add_argument("--benchmark", metavar="NAME", help=f"one of {', '.join(BENCHMARKS)}")
    group.add_argument("--data", type=Path, metavar="DIR", help="folder of the benchmark's official files")
    group.add_argument("--limit", type=int, metavar="N", help="draw so many requests, by the seed")
    group.add_argument("--prompt", metavar="TEXT", help="what to say in place of the benchmark's own words")
    group.add_argument(
        "--embedder", metavar="SOURCE", help="CLIP, CLAP or ImageBind to measure similarities and distances through"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    given = {name: getattr(arguments, name) for name in ("limit", "prompt", "embedder")}
    options = {name: value for name, value in given.items() if value is not None}
    if arguments.benchmark is not None:
        run_benchmark(arguments, options)
        return
    if options or arguments.data is not None:
        name = next(iter(options), "data")
        raise ConfigError(f"--{name} is for a benchmark; name it with --benchmark: {', '.join(BENCHMARKS)}.")
    cells = [name.strip() for name in arguments.cells.split(",")] if arguments.cells else None
    given = {"samples": arguments.samples, "seed": arguments.seed, "cells": cells}
    options = {name: value for name, value in given.items() if value is not None}
    if len(arguments.bridges) > 1:
        run_forgetting(arguments, options)
        return
    from mmbridge.demo.page import write_table
    from mmbridge.evaluation.any_to_any import evaluate, format_table

    (bridge,) = arguments.bridges
    table = evaluate(bridge, arguments.out, **options)
    print(format_table(table))
    print(f"see {write_table(table, bridge, arguments.out)}")


def run_forgetting(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Measure the bridges of successive stages."""
    from mmbridge.demo.charts import forgetting_chart
    from mmbridge.evaluation.forgetting import format_forgetting, measure_forgetting

    result = measure_forgetting(arguments.bridges, arguments.out, **options)
    forgetting_chart(result, arguments.out / "forgetting.svg")
    print(format_forgetting(result))
    print(f"see {arguments.out / 'forgetting.json'} and {arguments.out / 'forgetting.svg'}")


def run_benchmark(arguments: argparse.Namespace, options: dict[str, Any]) -> None:
    """Answer and measure a public benchmark."""
    if arguments.data is None or arguments.samples is not None or arguments.cells is not None:
        raise ConfigError(
            "--benchmark needs --data, the folder of its files, and takes --limit, not --samples or --cells."
        )
    if len(arguments.bridges) > 1:
        raise ConfigError(f"--benchmark measures one bridge, not {len(arguments.bridges)}; give one.")
    from mmbridge.evaluation.benchmarks.run import format_result
    from mmbridge.evaluation.benchmarks.run import run_benchmark as measure

    seed = 0 if arguments.seed is None else arguments.seed
    result = measure(arguments.bridges[0], arguments.benchmark, arguments.data, arguments.out, seed=seed, **options)
    print(format_result(result))
    print(f"see {arguments.out / 'metrics.json'}")
