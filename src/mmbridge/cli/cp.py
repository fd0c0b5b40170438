"""Copy a shipped recipe, to be changed and trained.

TARGET is a file or a folder; a file that exists is never overwritten.
"""

import argparse
from pathlib import Path

from mmbridge.errors import ConfigError

EXAMPLES = """\
  mmbridge cp tiny/encoder_alignment my-recipe.yaml
  mmbridge cp nextgpt/instruction_tuning .
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe")
    parser.add_argument("target", type=Path, metavar="TARGET", help="file or folder to copy to")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge.config import find_recipe

    source = find_recipe(arguments.recipe)
    target = arguments.target / source.name if arguments.target.is_dir() else arguments.target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise ConfigError(f"{target} exists already and was not overwritten; name another file.") from None
    print(target)
