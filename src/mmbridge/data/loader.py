"""Samples to batches: frozen work first and once, then a stateless order of batches.

The batch of a step is a function of the seed and the step's number alone, so a run that was killed goes on with the very
batches that it would have had.
"""

import hashlib
import math
import signal
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from mmbridge.data.features import FeatureStore
from mmbridge.data.mixing import MixedData, draws
from mmbridge.data.samples import Data
from mmbridge.errors import DataError, MMBridgeError
from mmbridge.sequence import IGNORED, Batch, TokenSequence, collate

_CHUNK = 256
_KEPT = 200_000
_WINDOW = 8


class PreparedData:
    """Dialogues as sequences whose media are encoded; made by ``prepare_all``.

    Up to 200,000 sequences stay in memory; beyond, they are tokenised again when they are read, with features from the store.

    Attributes:
        entering: Modalities that come in.
    """

    def __init__(self, bridge: Any, data: Data, store: FeatureStore):
        self.bridge, self.data, self.store = bridge, data, store
        self.lengths: list[int] = []
        self.entering: set[str] = set()
        self._kept: list[TokenSequence] = []

    def __len__(self) -> int:
        return len(self.data)

    def read(self, indices: Sequence[int]) -> list[TokenSequence]:
        """Return sequences by number.

        Raises:
            DataError: A sample that can't be used, with its place in the file.
        """
        if self._kept:
            return [self._kept[index] for index in indices]
        return self._prepare(indices)

    def encode_all(self, label: str, progress: bool) -> None:
        """Prepare every dialogue once, which fills the store."""
        count = len(self.data)
        with tqdm(total=count, desc=f"encoding {label}", unit=" dialogues", disable=not progress, leave=False) as bar:
            before = dict(self.store.computed)
            for start in range(0, count, _CHUNK):
                indices = range(start, min(start + _CHUNK, count))
                sequences = self._prepare(indices)
                self.lengths += [len(sequence.ids) for sequence in sequences]
                self.entering |= {span.modality for sequence in sequences for span in sequence.entering}
                if count <= _KEPT:
                    self._kept += sequences
                bar.update(len(indices))
                done = {key: value - before.get(key, 0) for key, value in self.store.computed.items()}
                bar.set_postfix({key: value for key, value in done.items() if value}, refresh=False)

    def check_trained(self, parts: Sequence[str]) -> None:
        """Check that every modality comes in whose way in trains.

        Args:
            parts: Names of the parts that train.

        Raises:
            DataError: A modality comes in nowhere.
        """
        trained = dict.fromkeys(part.split(".")[1] for part in parts if part.startswith("inputs."))
        missing = [name for name in trained if name not in {"shared", *self.entering}]
        if missing:
            raise DataError(
                f"train has the way in of {' and '.join(missing)}, but no dialogue of the training data shows such a medium; "
                f"add dialogues (with a weight above 0), or leave {', '.join(f'inputs.{name}.*' for name in missing)} out of "
                "train."
            )

    def _prepare(self, indices: Sequence[int]) -> list[TokenSequence]:
        dialogues = [self.data[index]["messages"] for index in indices]
        try:
            sequences = self._sequences(dialogues)
        except MMBridgeError:
            for index, dialogue in zip(indices, dialogues, strict=True):
                try:
                    self._sequences([dialogue])
                except MMBridgeError as error:
                    raise DataError(f"{self._where(index)}: {error}") from error
            raise
        for index, sequence in zip(indices, sequences, strict=True):
            if len(sequence.ids) > self.bridge.backbone.context:
                raise DataError(
                    f"{self._where(index)}: the dialogue has {len(sequence.ids)} positions but the backbone's context "
                    f"holds {self.bridge.backbone.context}; split it or shorten it."
                )
            if all(label == IGNORED for label in sequence.labels):
                raise DataError(
                    f"{self._where(index)}: the assistant says nothing, so there is nothing to learn; add its turn."
                )
        return sequences

    def _sequences(self, dialogues: Sequence[Any]) -> list[TokenSequence]:
        root = getattr(self.data, "root", None)
        sequences: list[TokenSequence] = self.bridge.prepare(dialogues, root=root, store=self.store, targets=True)
        return sequences

    def _where(self, index: int) -> str:
        where = getattr(self.data, "where", None)
        return str(where(index)) if where else f"sample {index}"


def prepare_all(
    bridge: Any, data: Data, store: FeatureStore, *, label: str = "training data", progress: bool = True
) -> PreparedData:
    """Do all frozen work of a data set: encode its media and captions into the store, in big batches, and tokenise it.

    Args:
        bridge: A ``Bridge``.
        data: Samples; their media paths are relative to its ``root``, if it has one.
        store: Where frozen results are kept; what it has is not computed again.
        label: What the progress bar calls the data.
        progress: Whether to show a progress bar.

    Raises:
        DataError: A sample that can't be used, with its place in the file.
        CheckpointError: The store can't be written.
    """
    prepared = PreparedData(bridge, data, store)
    try:
        prepared.encode_all(label, progress)
    finally:
        store.flush()
    return prepared


def step_seed(seed: int, *numbers: int) -> int:
    """Return a seed that is well mixed from others."""
    text = "/".join(str(number) for number in (seed, *numbers))
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=6).digest(), "little")


@lru_cache(maxsize=16)
def permutation(count: int, seed: int, epoch: int) -> Tensor:
    """Return the order of an epoch."""
    generator = torch.Generator().manual_seed(step_seed(seed, 1, epoch))
    return torch.randperm(count, generator=generator).to(torch.int32)


def window_batches(
    lengths: Sequence[int],
    size: int,
    seed: int,
    window: int,
    sizes: Sequence[int] | None = None,
    shares: Sequence[float] = (1.0,),
) -> list[list[int]]:
    """Return the samples of the 8 batches of a window.

    Shuffled epochs follow one another and are cut into windows; inside a window, samples whose lengths differ by less
    than a factor of 2 or so share a batch, since padding all to the longest dialogue wastes half of the work, and the
    batches are shuffled. Finer classes would make batches of a single answer or of a single medium, which learn badly: a
    projection whose medium comes in every third batch has a third of the steps (1,000 of 32 left video at an error of 0.65
    in classes of a factor of 1.4, 600 at 0.30 in these).

    Of several sets, each goes through epochs of its own and is dealt to all batches of the window: the shorter of its samples
    to the same batches as the shorter of another's, so that every batch has every set by its share.

    Args:
        lengths: Of all samples, set after set.
        size: Samples of a batch.
        seed: Seed of the order.
        window: Number of the window.
        sizes: Samples of each set; None for one set.
        shares: How often each set is drawn.
    """
    sizes, total = sizes or [len(lengths)], _WINDOW * size
    generator = torch.Generator().manual_seed(step_seed(seed, 4, window))
    shift = float(torch.rand((), generator=generator))  # so that no two lengths are always kept apart
    ranked: list[tuple[float, int]] = []
    spans = zip(sizes, draws(window * total, shares), draws((window + 1) * total, shares), strict=True)
    start = 0
    for number, (count, first, last) in enumerate(spans):
        own = step_seed(seed, 5, number) if number else seed
        members = [start + int(permutation(count, own, turn // count)[turn % count]) for turn in range(first, last)]
        members.sort(key=lambda index: int(math.log2(lengths[index]) + shift))  # stable: still shuffled inside
        ranked += [((rank + 0.5) / len(members), index) for rank, index in enumerate(members)]
        start += count
    members = [index for _, index in sorted(ranked, key=lambda pair: pair[0])]
    order: list[int] = torch.randperm(_WINDOW, generator=generator).tolist()
    return [members[place * size : (place + 1) * size] for place in order]


class StepBatches(IterableDataset[Batch]):
    """The batches from a step on, without end.

    Args:
        prepared: From ``prepare_all``.
        batch_size: Dialogues per batch.
        seed: Seed of the order and of what the losses draw.
        start: Number of the first batch.
    """

    def __init__(self, prepared: PreparedData, batch_size: int, seed: int, start: int = 0):
        super().__init__()
        self.prepared, self.batch_size, self.seed, self.start = prepared, batch_size, seed, start
        self._window: tuple[int, list[list[int]]] = (-1, [])

    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""
        window, place = divmod(step, _WINDOW)
        if self._window[0] != window:
            data = self.prepared.data
            mix = (data.sizes, data.shares) if isinstance(data, MixedData) else ()
            self._window = window, window_batches(self.prepared.lengths, self.batch_size, self.seed, window, *mix)
        return collate(self.prepared.read(self._window[1][place]), seed=step_seed(self.seed, 2, step))

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        step, stride = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield self.batch(step)
            step += stride

    def loader(self, workers: int = 0) -> DataLoader[Batch]:
        """Return a loader whose worker processes take turns, so that the order is the same for any number of them."""
        return DataLoader(
            self, batch_size=None, collate_fn=_same, num_workers=workers, worker_init_fn=_ignore_interrupts
        )


def held_batches(prepared: PreparedData, batch_size: int) -> Iterator[Batch]:
    """Yield all samples once, in order, for validation."""
    for start in range(0, len(prepared), batch_size):
        indices = range(start, min(start + batch_size, len(prepared)))
        yield collate(prepared.read(indices), seed=step_seed(0, 3, start))


def _same(batch: Batch) -> Batch:
    return batch


def _ignore_interrupts(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers Ctrl-C and ends its workers
