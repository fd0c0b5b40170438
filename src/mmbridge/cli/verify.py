"""Check converted weights or a saved bridge, part by part.

Hashes, finite values, names and shapes, and what projections, encoders and a language model's first layer compute from a fixed
input: this tells when another version of a library computes something else. Frozen models outside the folder are not read: a
bridge compares them with its manifest when it is opened. Exit code 1 if a part is not whole.
"""

import argparse

EXAMPLES = """\
  mmbridge verify weights/nextgpt
  mmbridge verify mmbridge/tiny
"""

_MARKS = {True: "✓", False: "✗", None: "-"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("folder", metavar="DIR", help="what `mmbridge convert` wrote, or a saved bridge")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from mmbridge.verification import verify

    whole = True
    for finding in verify(arguments.folder):
        print(f"{_MARKS[finding.whole]} {finding.part}: {finding.text}", flush=True)
        whole = whole and finding.whole is not False
    return 0 if whole else 1
