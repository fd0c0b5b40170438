"""A user's own data: one JSON object with "messages" per line, and the files that they name beside it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from mmbridge.errors import DataError, MediaError, MessageError
from mmbridge.media.base import within_root
from mmbridge.messages import Message, parse_messages


class Data(Protocol):
    """What trains a bridge: dialogues by number; sample ``i`` is always the same."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``{"messages": [...]}``."""


class JsonlData:
    """Dialogues of a JSONL file, read by line when they are asked for.

    Every line is checked at the start, the existence of its files included, so that a run can't fail on it hours later.

    Args:
        path: The file; each line is ``{"messages": [...]}``, empty lines are passed over.
        root: Folder that media paths are relative to and may not leave; None for the file's own.

    Raises:
        DataError: No such file, no dialogue in it, or a line that can't be used, as "file:line: why".
    """

    def __init__(self, path: str | Path, root: str | Path | None = None):
        self.path = Path(path)
        self.root = Path(root) if root is not None else self.path.parent
        self._lines: list[tuple[int, int]] = []  # offset in bytes, line number
        try:
            with self.path.open("rb") as file:
                offset = 0
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        self._check(line, number)
                        self._lines.append((offset, number))
                    offset += len(line)
        except OSError as error:
            raise DataError(
                f"the data file {str(path)!r} can't be read ({error.strerror}); give a JSONL file."
            ) from None
        if not self._lines:
            raise DataError(f'{path} holds no dialogue; write one {{"messages": [...]}} per line.')

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample: ``{"messages": [...]}``.

        Raises:
            DataError: The file was changed since it was opened.
        """
        offset, number = self._lines[index]
        try:
            with self.path.open("rb") as file:
                file.seek(offset)
                return self._check(file.readline(), number)
        except OSError as error:
            raise DataError(f"the data file {str(self.path)!r} can't be read any more ({error.strerror}).") from None

    def where(self, index: int) -> str:
        """Return "file:line" of a sample, for errors."""
        return f"{self.path}:{self._lines[index][1]}"

    def _check(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self.path}:{number}"
        try:
            sample = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not a line of JSON ({error}).") from None
        if not isinstance(sample, dict) or "messages" not in sample:
            raise DataError(f'{where}: a line must be an object with the key "messages".')
        try:
            for turn in parse_messages(sample["messages"]):
                for part in turn.parts:
                    if getattr(part, "data", None) is not None:
                        raise DataError(f"{where}: a medium in a file is given by 'path', not by 'data'.")
                    path = getattr(part, "path", None)
                    if path is not None and not within_root(path, self.root).is_file():
                        raise DataError(f"{where}: there is no file {path!r} below {str(self.root)!r}.")
        except (MessageError, MediaError) as error:
            raise DataError(f"{where}: {error}") from None
        return sample


def read_samples(path: str | Path, root: str | Path | None = None) -> Iterator[list[Message]]:
    """Yield the dialogues of a JSONL file.

    Raises:
        DataError: As for ``JsonlData``.
    """
    data = JsonlData(path, root)
    for index in range(len(data)):
        yield data[index]["messages"]
