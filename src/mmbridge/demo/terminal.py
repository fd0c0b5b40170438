"""What the demo says in a terminal: plain lines, with colour only where a person looks at them."""

import os
import sys

_STYLES = {"bold": "1", "faint": "2", "good": "32", "poor": "31", "accent": "36"}


def style(text: str, name: str) -> str:
    """Return text in a style where standard output is a terminal (and NO_COLOR is not set), else unchanged."""
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        return text
    return f"\033[{_STYLES[name]}m{text}\033[0m"


def say(text: str = "") -> None:
    """Print a line at once, also into a pipe."""
    print(text, flush=True)


def heading(text: str) -> None:
    """Print a heading."""
    say()
    say(style(text, "bold"))
    say(style("─" * len(text), "faint"))
