"""Check a recipe without building anything.

Keys, types, names of parts and their arguments, losses and patterns are checked; the recipe as it would run is printed.
"""

import argparse

EXAMPLES = """\
  mmbridge validate tiny/encoder_alignment
  mmbridge validate my-recipe.yaml run.steps=10 bridge.inputs.image.projection.num_tokens=8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file or name of a shipped recipe")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="values to override, by dotted path"
    )


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge.config import Recipe

    recipe = Recipe.load(arguments.recipe, arguments.overrides)
    recipe.validate()
    print(f"OK {arguments.recipe}\n\n{recipe.to_yaml()}", end="")
