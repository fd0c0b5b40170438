"""Several sets of dialogues as one: how often training draws from each, small sets again and again, old ones as replay."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmbridge.data.samples import Data, JsonlData
from mmbridge.errors import ConfigError, DataError, MediaError
from mmbridge.media.base import within_root
from mmbridge.messages import Message
from mmbridge.registry import suggest

_BITS = 53


class MixedData:
    """Several data sets, one behind the other; training draws from each by its share.

    Media are named by their full path, which lies below the root of their own set.

    Args:
        sets: Data by name.
        shares: How often training draws from each, by name (see ``mixing_shares``); a set of share 0 is left out.

    Attributes:
        sizes: Samples of each set that is not left out.
        shares: Their shares.
    """

    def __init__(self, sets: Mapping[str, Data], shares: Mapping[str, float]):
        self._sets = [data for name, data in sets.items() if shares[name] > 0]
        self.shares = [shares[name] for name in sets if shares[name] > 0]
        self.sizes = [len(data) for data in self._sets]
        self._starts = list(itertools.accumulate(self.sizes, initial=0))

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one sample: ``{"messages": [...]}``.

        Raises:
            DataError: It can't be used any more.
        """
        data, number = self._find(index)
        sample, root = data[number], getattr(data, "root", None)
        if root is None:
            return sample
        try:
            return {**sample, "messages": [_resolve(message, root) for message in sample["messages"]]}
        except MediaError as error:
            raise DataError(f"{self.where(index)}: {error}") from None

    def where(self, index: int) -> str:
        """Return "file:line" of a sample, for errors."""
        data, number = self._find(index)
        where = getattr(data, "where", None)
        return str(where(number)) if where else f"sample {number}"

    def _find(self, index: int) -> tuple[Data, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = bisect.bisect_right(self._starts, index) - 1
        return self._sets[place], index - self._starts[place]


def _resolve(message: Message, root: Path) -> Message:
    """The same message with full paths."""
    if isinstance(message["content"], str):
        return message
    content = [
        {**part, **{key: str(within_root(part[key], root)) for key in ("path", "picture") if part.get(key) is not None}}
        for part in message["content"]
    ]
    return {**message, "content": content}


def read_files(
    paths: str | Mapping[str, str],
    root: str | None = None,
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    replay: Mapping[str, Any] | None = None,
) -> Data:
    """Return the dialogues of one JSONL file, or of several by name.

    Args:
        paths: The file, or files by name.
        root: Folder that media paths are relative to; None for the folder of each file.
        weights: See ``mixing_shares``, like the rest.
        temperature: Of several files.
        replay: Of several files.

    Raises:
        ConfigError: As for ``mixing_shares``.
        DataError: A file can't be used.
    """
    if isinstance(paths, str):
        return JsonlData(paths, root)
    sets = {name: JsonlData(path, root) for name, path in paths.items()}
    sizes = {name: len(data) for name, data in sets.items()}
    return MixedData(sets, mixing_shares(sizes, weights, temperature, replay))


def mixing_shares(
    sizes: Mapping[str, int],
    weights: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    replay: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """Return how often training draws from each set, in proportion to ``weight * size^(1 / temperature)``.

    The temperature is that of Arivazhagan et al., arXiv 1907.05019: at 1 sets are drawn by their sizes, at large values equally
    often.

    Args:
        sizes: Samples by name.
        weights: Factors by name, 1 where a set is not named; 0 leaves a set out.
        temperature: Above 0.
        replay: Sets of earlier stages and their part of the draws, as ``{"share": 0.4, "of": ["image"]}``: those together get
            this share and the others the rest; among them both are drawn as without it.

    Returns:
        Shares by name, which sum to 1.

    Raises:
        ConfigError: A name is not known, a number is out of range, or nothing is left to draw from.
    """
    weights, of = weights or {}, list(replay["of"]) if replay else []
    for key, names in (("weights", weights), ("replay.of", of)):
        for name in names:
            if name not in sizes:
                raise ConfigError(f"data.{key} names {name!r}, which is not in this data{suggest(name, list(sizes))}")
    for name, weight in weights.items():
        if weight < 0:
            raise ConfigError(f"data.weights.{name} is {weight}, but a weight must be at least 0.")
    if temperature <= 0:
        raise ConfigError(f"data.temperature is {temperature}, but must be above 0.")
    largest = max(sizes.values(), default=1)
    parts = {name: weights.get(name, 1.0) * (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    old = sum(parts[name] for name in sizes if name in of)
    new = sum(parts.values()) - old
    if replay is None:
        if not new:
            raise ConfigError("data.weights leaves nothing to draw from; give one of them a weight above 0.")
        return {name: part / new for name, part in parts.items()}
    share = replay["share"]
    if not 0 < share < 1 or not old or not new:
        raise ConfigError(
            f"data.replay gives the share {share} to {of} of {list(sizes)}; it needs a share between 0 and 1, and on either "
            "side a name whose weight is above 0."
        )
    return {name: part * (share / old if name in of else (1 - share) / new) for name, part in parts.items()}


def draws(count: int, shares: Sequence[float]) -> list[int]:
    """Return how many of the first ``count`` draws fall to each set.

    Draws are spread evenly by the van der Corput sequence in base 2 (1935): number ``i`` falls to the set in whose part of
    [0, 1) the bits of ``i`` lie when they are mirrored at the point. Of ``2^k`` draws from a multiple of ``2^k`` on, each set
    has its share to within one draw.

    Args:
        count: Below 2^53.
        shares: Of the sets; they sum to 1.
    """
    bounds = [round(total * 2**_BITS) for total in itertools.accumulate(shares)]
    below = [0, *(_mirrored_below(count, bound) for bound in bounds[:-1]), count]
    return [last - first for first, last in itertools.pairwise(below)]


def _mirrored_below(count: int, bound: int) -> int:
    """How many numbers below ``count`` are below ``bound / 2^53`` when their bits are mirrored."""
    found = 0
    for bit in range(count.bit_length()):
        # 2^bit numbers that share their upper bits, which mirrored are an offset to multiples of a step
        if count >> bit & 1:
            offset = int(f"{count >> bit + 1 << bit + 1:0{_BITS}b}"[::-1], 2)
            step = 1 << _BITS - bit
            found += min(max(-((offset - bound) // step), 0), 1 << bit)
    return found
