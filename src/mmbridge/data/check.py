"""Every fault of a data file in one pass, where ``JsonlData`` stops at the first."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mmbridge import media
from mmbridge.data.samples import check_line, media_of
from mmbridge.errors import DataError, MediaError, MessageError
from mmbridge.modality import MEDIA

_LONGEST = 64_000_000  # bytes of a line; more is no dialogue but a file that is not JSONL


@dataclass
class Summary:
    """What a data file holds: its bad lines, and of the good ones dialogues, turns, and media in and out by type."""

    bad: int = 0
    dialogues: int = 0
    turns: int = 0
    media_in: Counter[str] = field(default_factory=Counter)
    media_out: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"dialogues {self.dialogues}, turns {self.turns}, bad lines {self.bad}"]
        for label, counts in (("in ", self.media_in), ("out", self.media_out)):
            lines.append(
                f"  {label}  {', '.join(f'{kind} {counts[kind]}' for kind in MEDIA if counts[kind]) or 'none'}"
            )
        return "\n".join(lines)


def check(
    path: str | Path,
    root: str | Path | None = None,
    *,
    decode: bool = False,
    report: Callable[[str], None] = tqdm.write,
    progress: bool = False,
) -> Summary:
    """Check every line of a JSONL file of dialogues, as ``JsonlData`` does, and go on after a bad one.

    One line is held at a time.

    Args:
        path: The file; each line is ``{"messages": [...]}``, empty lines are passed over.
        root: Folder that media paths are relative to and may not leave; None for the file's own.
        decode: Whether to read every medium as well; one that several lines name is read once.
        report: Called for every bad line with "file:line: why".
        progress: Whether to show a progress bar, on a terminal.

    Raises:
        DataError: The file or the folder can't be read, or the file is empty.
    """
    path = Path(path)
    root = Path(root) if root is not None else path.parent
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r}; give the folder that media paths are relative to.")

    @lru_cache(maxsize=65536)
    def load(kind: str, path: str, options: tuple[tuple[str, Any], ...]) -> str | None:
        """Return why a medium can't be read; None where it can."""
        try:
            media.load(kind, path, root=root, **dict(options))
        except MediaError as error:
            return str(error)
        return None

    summary = Summary()
    size = path.stat().st_size if path.is_file() else 0
    with tqdm(
        total=size, desc="checking", unit="B", unit_scale=True, leave=False, disable=None if progress else True
    ) as bar:
        for number, (line, length) in enumerate(_lines(path), start=1):
            bar.update(length)
            if not line.strip():
                continue
            try:
                if length > _LONGEST:
                    raise DataError(f"the line is longer than {_LONGEST} bytes; write one dialogue per line.")
                turns = check_line(line, root)[1]
                for part in media_of(turns) if decode else ():
                    if part.path is not None and (fault := load(part.type, part.path, tuple(part.options.items()))):
                        raise DataError(fault)
            except (DataError, MediaError, MessageError) as error:
                summary.bad += 1
                report(f"{path}:{number}: {' '.join(str(error).split())}")
                continue
            summary.dialogues += 1
            summary.turns += len(turns)
            for turn in turns:
                kinds = summary.media_out if turn.role == "assistant" else summary.media_in
                kinds.update(part.type for part in media_of([turn]))
    if not summary.dialogues and not summary.bad:
        raise DataError(f'{path} holds no dialogue; write one {{"messages": [...]}} per line.')
    return summary


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield each line, cut where it is too long, and its length in bytes."""
    try:
        with path.open("rb") as file:
            while line := file.readline(_LONGEST):
                length, end = len(line), line[-1:]
                while end != b"\n" and (more := file.readline(_LONGEST)):
                    length, end = length + len(more), more[-1:]
                yield line, length
    except OSError as error:
        raise DataError(f"the data file {str(path)!r} can't be read ({error.strerror}); give a JSONL file.") from None
