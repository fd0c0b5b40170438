"""Train one stage from a recipe.

RECIPE is a YAML file or the name of a shipped recipe (see `mmbridge ls recipes`). Any value of it can be overridden by
its dotted path. Checkpoints, logs and the trained bridge go to DIR.
"""

import argparse
from pathlib import Path

EXAMPLES = """\
  mmbridge train tiny/encoder_alignment
  mmbridge train tiny/encoder_alignment run.steps=50 optimizer.lr=1e-4 --out runs/short
  mmbridge train tiny/instruction_tuning data.path=dialogues.jsonl     your own data
  mmbridge train tiny/encoder_alignment --resume                       go on after an interruption
  mmbridge train tiny/onellm-image --cache runs/cache                  stages that share it encode media once
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="values to override, by dotted path"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the results (runs/<name of the recipe>)")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="folder of frozen results, which several runs may share (DIR of --out/cache)",
    )
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", action="store_true", help="go on from the last checkpoint in DIR")
    again.add_argument("--overwrite", action="store_true", help="delete an earlier run in DIR first")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge.config import Recipe

    recipe = Recipe.load(arguments.recipe, arguments.overrides)

    from mmbridge.training.run import train

    out = arguments.out or Path("runs") / recipe.name
    train(recipe, out, resume=arguments.resume, overwrite=arguments.overwrite, cache=arguments.cache)
