"""The loop: text, trigger, span, medium, text again; for a batch of dialogues, or for one dialogue turn after turn.

The loop knows nothing of how a medium is made. When a row emits a trigger, the way out is handed a span with four verbs over
the shared key-value cache; rows in the same phase step together, the others wait masked. Each row has its own random
stream, so that its reply does not depend on its neighbours. What happens is told as events; whole replies are the last of them.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from mmbridge.errors import ConfigError, ContextError
from mmbridge.messages import Message
from mmbridge.outputs.base import Preview
from mmbridge.replies import Event, MediumDone, MediumPreview, MediumStarted, Reply, ReplyDone, TextDelta, Writing
from mmbridge.sequence import MediumSpan, TokenSequence, attention_of, collate, positions_of


@dataclass(frozen=True)
class Sampling:
    """How replies are drawn.

    Args:
        max_new_tokens: Longest reply in tokens; a medium counts as one.
        temperature: 0 takes the likeliest token; otherwise tokens are sampled.
        top_p: Share of the probability that sampling draws from.
        seed: Seed of sampling and of the decoders.
        preview_every: Sampling steps of a decoder from one preview to the next; 0 gives none.

    Raises:
        ConfigError: A number is out of range.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    preview_every: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_new_tokens < 1 or self.preview_every < 0:
            raise ConfigError(
                "temperature must be at least 0, top_p in (0, 1], max_new_tokens at least 1 and preview_every at least 0, "
                f"not {self.temperature}, {self.top_p}, {self.max_new_tokens}, {self.preview_every}."
            )

    def pick(self, scores: Tensor, generator: torch.Generator) -> int:
        """Choose a column of scores (V,)."""
        if self.temperature == 0:
            return int(scores.argmax())
        shares = (scores.float().cpu() / self.temperature).softmax(-1)
        if self.top_p < 1:
            ordered, order = shares.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= self.top_p] = 0
            shares = torch.zeros_like(shares).scatter(0, order, ordered)
        return int(torch.multinomial(shares, 1, generator=generator))


class Decoding:
    """The state of a batch while it is decoded: the cache, its mask, and each row's last hidden state.

    Args:
        bridge: A ``Bridge``.
        rows: Dialogues that are decoded together.

    Attributes:
        held: For each row what its cached positions hold: a token's id, a medium's features (by identity, so they must stay
            alive) with the place in its span, or None for what no sequence can repeat.
    """

    def __init__(self, bridge: Any, rows: int = 1):
        self.bridge = bridge
        self.cache = bridge.backbone.new_cache()
        self.mask = torch.zeros(
            rows, 0, dtype=torch.bool, device=bridge.backbone.device
        )  # (B, S), True at real positions
        self.held: list[list[Any]] = [[] for _ in range(rows)]
        self.hidden: Tensor  # (B, D)
        self.waiting: dict[int, int] = {}  # rows whose last token is chosen but not yet read

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self.mask.shape[1]

    def prefill(self, sequences: Sequence[TokenSequence]) -> int:
        """Read one sequence per row, so that the state is as if nothing else had been read.

        A single row reads only what follows the longest prefix that its cache holds already.

        Returns:
            How many positions were read.
        """
        contents = [self._contents(sequence) for sequence in sequences]
        known = 0
        if len(sequences) == 1:
            pairs = zip(self.held[0], contents[0], strict=False)
            same = next((at for at, (old, new) in enumerate(pairs) if old != new), len(self.held[0]))
            known = min(same, len(contents[0]) - 1)  # the last position is always read, for its hidden state
            for span in self._whole(sequences[0]):
                if span.start < known < span.start + span.length:
                    known = span.start
        known = self.crop(known)
        batch = collate([sequence.after(known) for sequence in sequences], left=True).to(self.mask.device)
        self.hidden = self.read(self.bridge.embed(batch), batch.mask, self.bridge.full_spans(batch))[:, -1]
        for held, content in zip(self.held, contents, strict=True):
            held += content[known:]
        return batch.ids.shape[1]

    def _whole(self, sequence: TokenSequence) -> list[MediumSpan]:
        """Return the spans that are read whole or not at all."""
        full = [span for span in sequence.leaving if self.bridge.outputs[span.modality].attention == "full"]
        return [*sequence.entering, *full]

    def _contents(self, sequence: TokenSequence) -> list[Any]:
        contents: list[Any] = list(sequence.ids)
        for span in self._whole(sequence):
            place = slice(span.start, span.start + span.length)
            # Padding ids stand where features come in; a block that sees itself differs in all places if it does in one.
            name = tuple(sequence.ids[place]) if span.content is None else id(span.content)
            contents[place] = [(name, at) for at in range(span.length)]
        return contents

    def crop(self, length: int) -> int:
        """Forget all but the first ``length`` positions; returns how many are left: none where the cache can't forget a part."""
        self.waiting = {}
        surplus = self.length - length
        if surplus and length:
            try:
                self.cache.crop(-surplus)
            except (RuntimeError, ValueError):  # layers with a sliding window or a recurrent state
                length = 0
        if not length:
            self.cache = self.bridge.backbone.new_cache()
        self.mask = self.mask[:, :length]
        self.held = [held[:length] for held in self.held]
        return length

    def read(self, embeddings: Tensor, real: Tensor, full: Sequence[MediumSpan] = ()) -> Tensor:
        """Read a chunk (B, K, D), of which ``real`` (B, K) says what counts; positions of a ``full`` span see each other."""
        past = self.length
        self.mask = torch.cat([self.mask, real], dim=1)
        positions = positions_of(self.mask)[:, past:]
        return self.bridge.backbone(embeddings, attention_of(self.mask, full, past), positions, self.cache)

    def step(
        self,
        rows: Sequence[int],
        embeddings: Tensor,
        ids: Sequence[Sequence[int | None]] = (),
        *,
        full: bool = False,
        keep: bool = True,
    ) -> Tensor:
        """Read embeddings (R, K, D) into some rows, and the waiting token of every other row; returns (R, K, D).

        ``ids`` are what the embeddings stand for, (R, K), None for those that are no token's.
        """
        count = self.mask.shape[0]
        chunk = max(embeddings.shape[1], 1)
        device = self.mask.device
        index = torch.tensor(list(rows), dtype=torch.long, device=device)
        others = [row for row in self.waiting if row not in set(rows)] if keep else []
        filled = embeddings.new_zeros(count, chunk, self.bridge.backbone.dim)
        real = torch.zeros(count, chunk, dtype=torch.bool, device=device)
        if len(rows):
            filled = filled.index_copy(0, index, embeddings)
            real[index] = True
        if others:
            waiting = torch.tensor([self.waiting[row] for row in others], device=device)
            filled[others, 0] = self.bridge.embed_ids(waiting).to(filled.dtype)
            real[others, 0] = True
        before = self.mask
        hidden = self.read(filled, real, [MediumSpan("", 0, chunk, None, row) for row in rows] if full else ())
        if not keep:
            self.cache.crop(-chunk)
            self.mask = before
            return hidden[index]
        if len(rows):
            self.hidden = self.hidden.index_copy(0, index, hidden[index, -1])
        for row, tokens in zip(rows, ids, strict=True):
            self.held[row] += tokens
        for row in others:
            self.hidden[row] = hidden[row, 0]
            self.held[row].append(self.waiting.pop(row))
        return hidden[index]


class CacheSpan:
    """The span of ``mmbridge.outputs.base.Span`` over a ``Decoding``; the trigger itself has not been read yet."""

    def __init__(self, decoding: Decoding, members: Sequence[int], trigger: int, pick: Any):
        self.decoding, self.members, self.pick = decoding, list(members), pick
        self.rows = len(self.members)
        self.trigger: int | None = trigger
        self.preview: Preview | None = None

    def _read(self, ids: list[list[int]]) -> tuple[Tensor, Tensor]:
        embeddings = self.decoding.bridge.embed_ids(torch.tensor(ids, device=self.decoding.mask.device))
        embeddings = embeddings.to(self.decoding.hidden.dtype)
        return self.decoding.step(self.members, embeddings, ids), embeddings

    def _open(self) -> None:
        if self.trigger is not None:
            trigger, self.trigger = self.trigger, None
            self._read([[trigger]] * self.rows)

    def force(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put these ids, which start with the trigger, into every row in one pass; returns hidden states and embeddings."""
        self.trigger = None
        return self._read([list(ids)] * self.rows)

    def sample(self, allowed: Sequence[int], count: int) -> Tensor:
        """Sample ``count`` ids one by one among ``allowed`` (ids that have a row in the head); returns (R, count)."""
        self._open()
        columns = torch.tensor([self.decoding.bridge.column_of(token) for token in allowed])
        chosen: list[list[int]] = [[] for _ in self.members]
        for _ in range(count):
            scores = self.decoding.bridge.logits(self.decoding.hidden[self.members])[:, columns]
            picks = [allowed[self.pick(row, scores[index])] for index, row in enumerate(self.members)]
            self._read([[token] for token in picks])
            for tokens, token in zip(chosen, picks, strict=True):
                tokens.append(token)
        return torch.tensor(chosen)

    def peek(self, embeddings: Tensor) -> Tensor:
        """Return hidden states of (R, K, D), seen in both directions, and forget them."""
        self._open()
        return self.decoding.step(self.members, embeddings, full=True, keep=False)

    def commit(self, embeddings: Tensor) -> Tensor:
        """Keep (R, K, D), seen in both directions; returns their hidden states."""
        self._open()
        nameless = [[None] * embeddings.shape[1]] * self.rows
        return self.decoding.step(self.members, embeddings, nameless, full=True)


@contextmanager
def evaluating(bridge: Any) -> Iterator[None]:
    """Put all modules into eval mode, and back into theirs."""
    training = [module for module in bridge.modules() if module.training]
    if training:
        bridge.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def block_size(bridge: Any) -> int:
    """Return the most positions that one round of the loop can add."""
    return max(sum(way.rows.count for way in bridge.outputs.values()), 1)


def check_room(bridge: Any, length: int) -> None:
    """Refuse a prompt of ``length`` positions that leaves no room for a reply.

    Raises:
        ContextError: The lengths of the prompt and of the context.
    """
    if length + block_size(bridge) > bridge.backbone.context:
        raise ContextError(
            f"the prompt has {length} positions but the context holds {bridge.backbone.context}, which leaves no room for "
            "a reply; shorten the dialogue or use fewer media."
        )


def decode(
    bridge: Any, decoding: Decoding, sampling: Sampling, *, pieces: bool, seed: int | None = None
) -> Iterator[tuple[int, Event]]:
    """Write the replies of all rows of a prefilled ``Decoding``, without gradients.

    Args:
        bridge: The bridge of ``decoding``, in eval mode.
        decoding: Prompts; grows by the replies, whose last token may stay unread.
        sampling: How tokens are chosen.
        pieces: Whether text is told piece by piece, which costs a look at the tokenizer for every token.
        seed: Seed of the first row; None takes the one of ``sampling``.

    Yields:
        Row and event; every row's last event is ``ReplyDone``.
    """
    backbone, block = bridge.backbone, block_size(bridge)
    seeds = [(sampling.seed if seed is None else seed) + row for row in range(len(decoding.held))]
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    writings = [Writing(backbone.tokenizer, backbone.stop) for _ in seeds]
    triggers = {bridge.first_ids[modality]: modality for modality in bridge.outputs}
    open_rows = set(range(len(seeds)))

    def pick(row: int, scores: Tensor) -> int:
        return sampling.pick(scores, generators[row])

    def close(row: int) -> Iterator[tuple[int, Event]]:
        rest = writings[row].close()
        if pieces and rest:
            yield row, TextDelta(rest)

    for _ in range(sampling.max_new_tokens):
        rows = sorted(open_rows)
        scores = bridge.logits(decoding.hidden[rows])
        columns = (
            scores.argmax(-1).tolist()
            if sampling.temperature == 0
            else [pick(row, scores[index]) for index, row in enumerate(rows)]
        )
        emitting: dict[int, list[int]] = {}
        for row, column in zip(rows, columns, strict=True):
            token = bridge.token_of(column)
            if token in triggers:
                yield from close(row)
                emitting.setdefault(token, []).append(row)
            elif token == backbone.eos or writings[row].write(token):
                yield from close(row)
                open_rows.discard(row)
                yield row, ReplyDone(writings[row].reply)
            else:
                decoding.waiting[row] = token
                if pieces and (text := writings[row].piece()):
                    yield row, TextDelta(text)
        for token, members in emitting.items():
            modality = triggers[token]
            places = {row: len(writings[row].reply.media) for row in members}
            yield from ((row, MediumStarted(modality, place)) for row, place in places.items())
            span = CacheSpan(decoding, members, token, pick)
            chosen_seeds = [seeds[row] for row in members]
            made = yield from make(bridge, modality, span, places, chosen_seeds, sampling.preview_every)
            for (row, place), medium in zip(places.items(), made, strict=True):
                writings[row].reply.parts.append(medium)
                yield row, MediumDone(modality, place, medium)
        if decoding.waiting:
            decoding.step([], decoding.hidden.new_zeros(0, 1, backbone.dim))
        if not open_rows or decoding.length + block > backbone.context:
            break
    for row in sorted(open_rows):
        yield from close(row)
        writings[row].reply.complete = False
        yield row, ReplyDone(writings[row].reply)


def make(
    bridge: Any, modality: str, span: CacheSpan, places: dict[int, int], seeds: list[int], every: int
) -> Generator[tuple[int, Event], None, list[Any]]:
    """Let a way out make one medium per row of the span, and tell of it every so many steps; returns the media.

    Previews come out of a call that has not returned yet, so with them the work is done in a thread, which ends at its next
    step where the caller goes away.

    Args:
        bridge: The bridge.
        modality: What is made.
        span: Positions for it.
        places: The span's rows, and which medium of the reply each makes.
        seeds: One per row.
        every: Sampling steps from one preview to the next; 0 gives none.

    Yields:
        Row and ``MediumPreview``.
    """
    way, first = bridge.outputs[modality], bridge.first_ids[modality]
    if not every:
        return list(way.render(span, seeds, first))
    told: SimpleQueue[Any] = SimpleQueue()
    left = threading.Event()

    def preview(first: int, step: int, steps: int, media: Callable[[], list[Any]]) -> None:
        if left.is_set():
            raise InterruptedError
        if step % every == 0 and step < steps:
            told.put((first, step, steps, media()))

    def work() -> None:
        try:
            with torch.no_grad():
                told.put(list(way.render(span, seeds, first)))
        except BaseException as error:
            told.put(error)

    span.preview = preview
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while isinstance(item := told.get(), tuple):
            first, step, steps, media = item
            shown = list(places.items())[first : first + len(media)]
            for (row, place), medium in zip(shown, media, strict=True):
                yield row, MediumPreview(modality, place, medium, step, steps)
    finally:
        left.set()
        worker.join()
    if isinstance(item, BaseException):
        raise item
    return item  # type: ignore[no-any-return]


@torch.no_grad()
def stream(
    bridge: Any,
    dialogues: Sequence[Sequence[Message]],
    sampling: Sampling,
    *,
    root: str | Path | None = None,
    pieces: bool = True,
) -> Iterator[tuple[int, Event]]:
    """Answer dialogues together, and tell what happens as it happens.

    Args:
        bridge: A ``Bridge``.
        dialogues: Dialogues in the message schema, each of which ends with a turn of the user.
        sampling: How replies are drawn; row i takes seed + i.
        root: Folder below which paths of media must lie; None allows any path.
        pieces: Whether text is told piece by piece.

    Yields:
        Number of the dialogue and event.

    Raises:
        ContextError: A prompt does not leave room for a reply.
        MessageError: A dialogue breaks the schema or holds a medium that the bridge has no way for.
        MediaError: A file can't be read.
    """
    with evaluating(bridge):
        sequences = bridge.prepare(dialogues, root=root, reply=True)
        check_room(bridge, max(len(sequence.ids) for sequence in sequences))
        decoding = Decoding(bridge, len(dialogues))
        decoding.prefill(sequences)
        yield from decode(bridge, decoding, sampling, pieces=pieces)


def generate(
    bridge: Any, dialogues: Sequence[Sequence[Message]], *, root: str | Path | None = None, **sampling: Any
) -> list[Reply]:
    """Answer dialogues together.

    Args:
        bridge: A ``Bridge``.
        dialogues: Dialogues in the message schema, each of which ends with a turn of the user.
        root: Folder below which paths of media must lie; None allows any path.
        **sampling: Fields of ``Sampling``; row i takes seed + i.

    Raises:
        ConfigError: A field of ``sampling`` is out of range.
        ContextError: A prompt does not leave room for a reply.
        MessageError: A dialogue breaks the schema or holds a medium that the bridge has no way for.
        MediaError: A file can't be read.
    """
    events = stream(bridge, dialogues, Sampling(**sampling), root=root, pieces=False)
    replies = {row: event.reply for row, event in events if isinstance(event, ReplyDone)}
    return [replies[row] for row in range(len(dialogues))]
