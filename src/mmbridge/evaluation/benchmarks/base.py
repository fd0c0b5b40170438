"""What a benchmark is, as data: which files it reads, what it asks, what is measured."""

import csv
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmbridge.errors import DataError


@dataclass(frozen=True)
class Request:
    """One thing to ask.

    Attributes:
        id: Its number or name in the data set.
        text: What the prompt's ``{}`` stands for: a question or a caption; empty where the prompt has none.
        medium: The file that the user gives, relative to the data's folder; None for words alone.
        references: Captions or answers of people; for media to make, their captions.
        real: For media to make, the real one of the caption, relative to the data's folder.
    """

    id: str
    text: str
    medium: str | None
    references: tuple[str, ...]
    real: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        takes: What is given: "text" or a modality.
        gives: What is asked for: "text", "image", "video" or "audio".
        prompt: What the user says beside the medium; ``{}`` stands for the request's text.
        files: What must be below the data's folder, besides media.
        download: What to get from where, and where to put it.
        read: Reads the requests from the data's folder.
        metrics: Keys of ``scoring.SCORERS``.
        max_new_tokens: Longest reply in tokens.
        optional: Files that are used where they are there.
        complete: Whether every medium must be there; False for collections whose originals vanish from the web.
    """

    takes: str
    gives: str
    prompt: str
    files: tuple[str, ...]
    download: str
    read: Callable[[Path], Iterator[Request]]
    metrics: tuple[str, ...]
    max_new_tokens: int
    optional: tuple[str, ...] = ()
    complete: bool = True


def locate(name: str, root: Path) -> Path:
    """Return a file of a data set, below its folder.

    Raises:
        MediaError: It leads out of ``root``.
    """
    from mmbridge.media.base import within_root

    return within_root(name, root)


def exists(name: str, root: Path) -> bool:
    """Tell whether a path below ``root`` is a file.

    Raises:
        MediaError: It leads out of ``root``.
    """
    from mmbridge.data.samples import is_file

    return is_file(name, root)


def read_json(root: Path, name: str) -> Any:
    """Return what a JSON file of a data set holds.

    Raises:
        DataError: It can't be read.
        MediaError: It leads out of ``root``.
    """
    try:
        return json.loads(locate(name, root).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{root / name} can't be read as JSON ({error}); download it again.") from None


def read_csv(root: Path, name: str) -> list[dict[str, str]]:
    """Return the rows of a CSV file of a data set, which has a header.

    Raises:
        DataError: It can't be read.
        MediaError: It leads out of ``root``.
    """
    try:
        with locate(name, root).open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{root / name} can't be read as CSV ({error}); download it again.") from None


def read_requests(
    name: str, benchmark: Benchmark, root: Path, limit: int | None = None, seed: int = 0
) -> tuple[list[Request], int]:
    """Return the requests of a benchmark, and how many were passed over because their media are not there.

    Args:
        name: How errors call it.
        benchmark: The benchmark.
        root: Folder of the data; nothing outside is read.
        limit: Draw so many, by ``seed``, and keep their order; None for all.
        seed: Seed of the draw.

    Raises:
        DataError: The data are not there, incomplete or not as published; the message says what to download.
        MediaError: A path leads out of ``root``.
    """
    if not root.is_dir():
        raise DataError(f"there is no folder {str(root)!r} to read {name} from; {benchmark.download}")
    absent = [file for file in benchmark.files if not exists(file, root)]
    if absent:
        raise DataError(f"{name} needs {' and '.join(absent)} below {str(root)!r}; {benchmark.download}")
    files = " or ".join(file for file in (*benchmark.files, *benchmark.optional) if exists(file, root))
    try:
        requests = list(benchmark.read(root))
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{files} below {str(root)!r} is not as published ({reason}); download it again.") from None
    if not requests or not all(request.references for request in requests):
        raise DataError(f"{files} below {str(root)!r} holds no request, or one without a reference; download it again.")
    there = [each for each in requests if all(exists(file, root) for file in (each.medium, each.real) if file)]
    chosen = _draw(requests if benchmark.complete else there, limit, seed)
    lacking = [each for each in chosen if each not in set(there)] if benchmark.complete else []
    if lacking or not there:
        lost = lacking or requests
        raise DataError(
            f"{len(lost)} of {len(chosen) or len(requests)} media of {name} are not below {str(root)!r}, the first is "
            f"{lost[0].medium or lost[0].real}; {benchmark.download}"
        )
    return chosen, 0 if benchmark.complete else len(requests) - len(there)


def _draw(requests: list[Request], limit: int | None, seed: int) -> list[Request]:
    if limit is None or limit >= len(requests):
        return requests
    return [requests[index] for index in sorted(random.Random(seed).sample(range(len(requests)), limit))]
