"""A user's own data: one JSON object with "messages" per line, and the files that they name beside it."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from mmbridge.errors import DataError, MediaError, MessageError
from mmbridge.media.base import within_root
from mmbridge.messages import MediumPart, Message, Turn, parse_messages


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
        try:
            return check_line(line, self.root)[0]
        except (DataError, MediaError, MessageError) as error:
            raise DataError(f"{self.path}:{number}: {error}") from None


def check_line(line: bytes, root: Path) -> tuple[dict[str, Any], list[Turn]]:
    """Return what a line of a data file holds: the sample, and its dialogue, whose files are all there.

    Raises:
        DataError: Not UTF-8, not JSON, no dialogue, or a medium without a file.
        MediaError: A path leads out of ``root``.
        MessageError: A break of the message schema.
    """
    try:
        sample = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        at = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise DataError(f"not a line of JSON in UTF-8 ({at}); save the file as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a line of JSON ({error}).") from None
    if not isinstance(sample, dict) or "messages" not in sample:
        raise DataError('a line must be an object with the key "messages".')
    turns = parse_messages(sample["messages"])
    for turn in turns:
        for part in media_of([turn]):
            if part.data is not None:
                raise DataError("a medium in a file is given by 'path', not by 'data'.")
            if part.path is None and turn.role != "assistant":
                raise DataError(
                    f"a medium of the {turn.role} needs a 'path'; a caption alone will do for the assistant."
                )
            if part.picture is not None and not isinstance(part.picture, str):
                raise DataError(f"a picture in a file is given by its file name, not by {part.picture!r:.60}.")
            for name in (part.path, part.picture):
                if name is not None and not is_file(name, root):
                    raise DataError(f"there is no file {name!r} below {str(root)!r}.")
            if part.path is not None and part.type != "imu" and not (part.sample_rate is None is part.fps):
                raise DataError(f"the file {part.path!r} knows its own rate; leave out 'sample_rate' and 'fps'.")
    return sample, turns


def media_of(turns: Sequence[Turn]) -> Iterator[MediumPart]:
    """Yield the media of a dialogue in order."""
    return (part for turn in turns for part in turn.parts if isinstance(part, MediumPart))


def is_file(path: str, root: Path) -> bool:
    """Tell whether a path below ``root`` is a file.

    Raises:
        MediaError: It leads out of ``root``.
    """
    try:
        return within_root(path, root).is_file()
    except (OSError, ValueError, RuntimeError):  # names too long, with NUL, or links in a circle
        return False


def read_samples(path: str | Path, root: str | Path | None = None) -> Iterator[list[Message]]:
    """Yield the dialogues of a JSONL file.

    Raises:
        DataError: As for ``JsonlData``.
    """
    data = JsonlData(path, root)
    for index in range(len(data)):
        yield data[index]["messages"]
