"""Rebuild checkpoints/tiny: the shipped bridge, by the three shipped recipes, and its any-to-any table.

    python checkpoints/train_bridge.py                      # the three stages, then the table

The frozen parts beside it must exist: the other scripts of this folder make them. The shipped weights had 600 steps of stage 3 more
(checkpoints/tiny/README.md), and their table holds fewer cells than this measures, since videos take long.
"""

import argparse
from pathlib import Path

from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.evaluation.any_to_any import evaluate, format_table
from mmbridge.training.run import train

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="folder of the three runs")
    parser.add_argument("--samples", type=int, default=40, help="requests per cell of the table")
    options = parser.parse_args()
    parent = None
    for stage in ("encoder_alignment", "decoder_alignment", "instruction_tuning"):
        recipe = Recipe.load(f"tiny/{stage}", [] if parent is None else [f"parent={parent}"])
        parent = train(
            recipe, options.runs / stage, resume=(options.runs / stage).exists(), cache=options.runs / "cache"
        )
    target = HERE / "tiny"
    bridge = Bridge.from_pretrained(parent)
    for parameters in bridge.parts().values():
        for parameter in parameters.values():
            parameter.data = parameter.data.half()
    bridge.save_pretrained(target)
    print(format_table(evaluate(target, target, samples=options.samples, splits=("unseen",))))


if __name__ == "__main__":
    main()
