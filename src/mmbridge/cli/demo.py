"""Answer some forty prompts, then train the three stages.

The shipped bridges answer prompts with files first: of words, pictures, videos and sounds, then of eight modalities. Then the
three tiny recipes train, and what they give is evaluated on combinations that no stage has seen. All of it is shown on one
page, DIR/index.html. Runs offline on two CPU cores.
"""

import argparse
from pathlib import Path

EXAMPLES = """\
  mmbridge demo
  mmbridge demo --no-train             only the answers of the shipped bridges, about two minutes
  mmbridge demo --out /somewhere/else
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="folder of the page (demo)")
    parser.add_argument("--no-train", action="store_true", help="stop after the answers of the shipped bridges")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge import demo

    demo.run(arguments.out, train=not arguments.no_train)
