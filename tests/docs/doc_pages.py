"""Pages of documentation as fenced blocks, each with the HTML comment before it."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its first line's number, and what the comment before it says."""

    page: Path
    language: str
    text: str
    line: int
    mark: str

    @property
    def code(self):
        """The block compiled, with the page's own line numbers."""
        return compile("\n" * (self.line - 1) + self.text, str(self.page), "exec")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("text")) + 1
        found.append(Block(page, match["language"], match["text"], line, match["mark"] or ""))
    return found


def commands_of(page: Path) -> list[list[str]]:
    """The words of each command line that starts with ``mmbridge``, without that word."""
    found = []
    for block in blocks_of(page):
        if block.language in ("bash", "sh", "console"):
            for line in block.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True)
                if words[:1] == ["mmbridge"]:
                    found.append(words[1:])
    return found
