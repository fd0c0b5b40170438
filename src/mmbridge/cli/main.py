"""``mmbridge COMMAND ...``: finds the command, and turns errors into one sentence and an exit code.

A command is a module of this folder with a docstring (its help; the first line is its summary), ``EXAMPLES``,
``add_arguments(parser)`` and ``run(arguments)``. Exit codes: 0 done, 1 what was checked is not whole, 2 the input is at
fault, 130 interrupted.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from mmbridge import __version__
from mmbridge.errors import ConfigError, MMBridgeError

COMMANDS = (
    "demo",
    "chat",
    "generate",
    "train",
    "evaluate",
    "data",
    "ls",
    "cp",
    "validate",
    "plan",
    "convert",
    "verify",
)

_EXAMPLES = """\
examples:
  mmbridge demo                                       see it work: answers, then training, in one page
  mmbridge chat                                       talk with the shipped bridge
  mmbridge ls recipes                                 what can be trained
  mmbridge generate mmbridge/tiny --messages dialogue.json --out reply
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence, like every other error of the command line."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`.")


def create_parser() -> argparse.ArgumentParser:
    """Return the parser of the whole command line; loads no torch."""
    parser = _Parser(
        prog="mmbridge",
        description="Let a language model see, hear and answer in any medium by training only small bridges.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--version", action="version", version=f"mmbridge {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands", parser_class=_Parser)
    for name in COMMANDS:
        module = importlib.import_module(f"mmbridge.cli.{name}")
        description = (module.__doc__ or "").strip()
        command = commands.add_parser(
            name, help=description.splitlines()[0], description=description, epilog=f"examples:\n{module.EXAMPLES}"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line without the program's name.

    Raises:
        ConfigError: An unknown command or option, or a missing argument.
    """
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        from mmbridge.registry import suggest

        raise ConfigError(f"unknown command {command!r}{suggest(command, list(COMMANDS))}")
    parser = create_parser()
    parsed, rest = parser.parse_known_args(arguments)
    if parsed.command is None:
        if rest:
            raise ConfigError(f"{rest[0]!r} is not an option of mmbridge; see `mmbridge --help`.")
        parser.print_help()
        raise SystemExit(0)
    # argparse does not look for overrides behind an option
    overrides = [item for item in rest if "=" in item and not item.startswith("-")] if "overrides" in parsed else []
    unknown = [item for item in rest if item not in overrides]
    if unknown:
        raise ConfigError(f"{parsed.command} does not take {unknown[0]!r}; see `mmbridge {parsed.command} --help`.")
    if overrides:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code.

    Args:
        arguments: The command line without the program's name; None takes the process's own.
    """
    try:
        parsed = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        status = parsed.run(parsed)
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read our output (head, less) has gone; Python would complain once more while it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("mmbridge: interrupted", file=sys.stderr)
        return 130
    except (MMBridgeError, OSError) as error:
        if os.environ.get("MMBRIDGE_TRACEBACK") == "1":
            raise
        print(f"mmbridge: {_sentence(error)}", file=sys.stderr)
        return 2
    return status or 0


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror.lower()}."
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
