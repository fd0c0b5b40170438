"""The loop: text, trigger, span, medium, text again; for a batch of dialogues.

The loop knows nothing of how a medium is made. When a row emits a trigger, the way out is handed a span with four verbs over
the shared key-value cache; rows in the same phase step together, the others wait masked. Each row has its own random
stream, so that its reply does not depend on its neighbours.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge.errors import ConfigError, ContextError
from mmbridge.messages import Message
from mmbridge.sequence import attention_of, collate, positions_of

SUFFIXES = {"image": ".png", "audio": ".wav", "video": ".mp4"}


@dataclass
class Reply:
    """What the assistant answers: strings and media in order.

    Attributes:
        parts: Strings and media (``Image``, ``Audio``, ``Video``).
        complete: False where ``max_new_tokens`` or the context ended the reply.
    """

    parts: list[Any] = field(default_factory=list)
    complete: bool = True

    @property
    def text(self) -> str:
        """The words, joined."""
        return " ".join(part for part in self.parts if isinstance(part, str))

    @property
    def media(self) -> list[Any]:
        """The media, in order."""
        return [part for part in self.parts if not isinstance(part, str)]

    @property
    def message(self) -> Message:
        """The reply as a message, with media under ``data``; append it to the dialogue to go on."""
        content = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": part.modality, "data": part}
            for part in self.parts
        ]
        return {"role": "assistant", "content": content}

    def save(self, folder: str | Path) -> Message:
        """Write ``reply.json`` and the media beside it; returns the message with file names.

        Raises:
            MediaError: A medium can't be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content: list[dict[str, Any]] = []
        for part in self.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
                continue
            name = (
                f"{part.modality}-{sum(entry['type'] == part.modality for entry in content)}{SUFFIXES[part.modality]}"
            )
            part.save(folder / name)
            content.append({"type": part.modality, "path": name})
        message = {"role": "assistant", "content": content}
        draft = folder / ".reply.json.draft"
        draft.write_text(json.dumps(message, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        draft.replace(folder / "reply.json")
        return message


class Decoding:
    """The state of a batch while it is decoded: the cache, its mask, and each row's last hidden state."""

    def __init__(self, bridge: Any, embeddings: Tensor, mask: Tensor, attention: Tensor):
        self.bridge = bridge
        self.cache = bridge.backbone.new_cache()
        self.mask = mask  # (B, S), True at real positions of the cache
        self.hidden = bridge.backbone(embeddings, attention, positions_of(mask), self.cache)[:, -1]  # (B, D)
        self.waiting: dict[int, int] = {}  # rows whose last token is chosen but not yet read

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return self.mask.shape[1]

    def read(self, embeddings: Tensor, real: Tensor, *, full: Tensor | None = None) -> Tensor:
        """Read a chunk (B, K, D), of which ``real`` (B, K) says what counts; in ``full`` rows (B,) all positions see each other."""
        past = self.mask
        self.mask = torch.cat([past, real], dim=1)
        positions = positions_of(self.mask)[:, past.shape[1] :]
        attention = self.mask.long()
        if full is not None:
            chunk = real.shape[1]
            inside = torch.ones(chunk, chunk, dtype=torch.bool, device=real.device)
            inside = torch.where(full[:, None, None], inside, inside.tril()) & real[:, None, :]
            inside = inside | torch.eye(chunk, dtype=torch.bool, device=real.device)
            attention = torch.cat([past[:, None, :].expand(-1, chunk, -1), inside], dim=2)[:, None]
        return self.bridge.backbone(embeddings, attention, positions, self.cache)

    def step(self, rows: Sequence[int], embeddings: Tensor, *, full: bool = False, keep: bool = True) -> Tensor:
        """Read embeddings (R, K, D) into some rows, and the waiting token of every other row; returns (R, K, D)."""
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
            ids = torch.tensor([self.waiting[row] for row in others], device=device)
            filled[others, 0] = self.bridge.embed_ids(ids).to(filled.dtype)
            real[others, 0] = True
        whole = torch.zeros(count, dtype=torch.bool, device=device).index_fill(0, index, True) if full else None
        before = self.mask
        hidden = self.read(filled, real, full=whole)
        if not keep:
            self.cache.crop(-chunk)
            self.mask = before
            return hidden[index]
        if len(rows):
            self.hidden = self.hidden.index_copy(0, index, hidden[index, -1])
        for row in others:
            self.hidden[row] = hidden[row, 0]
            del self.waiting[row]
        return hidden[index]


class CacheSpan:
    """The span of ``mmbridge.outputs.base.Span`` over a ``Decoding``; the trigger itself has not been read yet."""

    def __init__(self, decoding: Decoding, members: Sequence[int], trigger: int, pick: Any):
        self.decoding, self.members, self.pick = decoding, list(members), pick
        self.rows = len(self.members)
        self.trigger: int | None = trigger

    def _embed(self, ids: Tensor) -> Tensor:
        return self.decoding.bridge.embed_ids(ids.to(self.decoding.mask.device)).to(self.decoding.hidden.dtype)

    def _open(self) -> None:
        if self.trigger is not None:
            trigger = torch.full((self.rows, 1), self.trigger)
            self.trigger = None
            self.decoding.step(self.members, self._embed(trigger))

    def force(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put these ids, which start with the trigger, into every row in one pass; returns hidden states and embeddings."""
        self.trigger = None
        embeddings = self._embed(torch.tensor(list(ids)).expand(self.rows, -1))
        return self.decoding.step(self.members, embeddings), embeddings

    def sample(self, allowed: Sequence[int], count: int) -> Tensor:
        """Sample ``count`` ids one by one among ``allowed`` (ids that have a row in the head); returns (R, count)."""
        self._open()
        columns = torch.tensor([self.decoding.bridge.column_of(token) for token in allowed])
        chosen = []
        for _ in range(count):
            scores = self.decoding.bridge.logits(self.decoding.hidden[self.members])[:, columns]
            picks = [self.pick(row, scores[index]) for index, row in enumerate(self.members)]
            ids = torch.tensor([[allowed[index]] for index in picks])
            self.decoding.step(self.members, self._embed(ids))
            chosen.append(ids)
        return torch.cat(chosen, dim=1)

    def peek(self, embeddings: Tensor) -> Tensor:
        """Return hidden states of (R, K, D), seen in both directions, and forget them."""
        self._open()
        return self.decoding.step(self.members, embeddings, full=True, keep=False)

    def commit(self, embeddings: Tensor) -> Tensor:
        """Keep (R, K, D), seen in both directions; returns their hidden states."""
        self._open()
        return self.decoding.step(self.members, embeddings, full=True)


@torch.no_grad()
def generate(
    bridge: Any,
    dialogues: Sequence[Sequence[Message]],
    *,
    root: str | Path | None = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Reply]:
    """Answer dialogues together.

    Args:
        bridge: A ``Bridge``.
        dialogues: Dialogues in the message schema, each of which ends with a turn of the user.
        root: Folder below which paths of media must lie; None allows any path.
        max_new_tokens: Longest reply in tokens; a medium counts as one.
        temperature: 0 takes the likeliest token; otherwise tokens are sampled.
        top_p: Share of the probability that sampling draws from.
        seed: Seed of sampling and of the decoders.

    Raises:
        ContextError: A prompt does not leave room for a reply.
        MessageError: A dialogue breaks the schema or holds a medium that the bridge has no way for.
        MediaError: A file can't be read.
    """
    if temperature < 0 or not 0 < top_p <= 1 or max_new_tokens < 1:
        raise ConfigError(
            "temperature must be at least 0, top_p in (0, 1] and max_new_tokens at least 1, not "
            f"{temperature}, {top_p}, {max_new_tokens}."
        )
    modes = [(module, module.training) for module in bridge.modules()]
    bridge.eval()
    try:
        return _generate(bridge, dialogues, root, max_new_tokens, temperature, top_p, seed)
    finally:
        for module, mode in modes:
            module.training = mode


def _generate(
    bridge: Any,
    dialogues: Sequence[Sequence[Message]],
    root: str | Path | None,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[Reply]:
    backbone = bridge.backbone
    block = max(sum(way.rows.count for way in bridge.outputs.values()), 1)  # the most that one round can add
    batch = collate(bridge.prepare(dialogues, root=root, reply=True), left=True, seed=seed).to(backbone.device)
    if batch.ids.shape[1] + block > backbone.context:
        raise ContextError(
            f"the prompt has {batch.ids.shape[1]} positions but the context holds {backbone.context}, which leaves no room for "
            "a reply; shorten the dialogue or use fewer media."
        )
    decoding = Decoding(bridge, bridge.embed(batch), batch.mask, attention_of(batch.mask, bridge.full_spans(batch)))
    generators = [torch.Generator().manual_seed(seed + row) for row in range(len(dialogues))]

    def pick(row: int, scores: Tensor) -> int:
        if temperature == 0:
            return int(scores.argmax())
        shares = (scores.float().cpu() / temperature).softmax(-1)
        if top_p < 1:
            ordered, order = shares.sort(descending=True)
            ordered[ordered.cumsum(-1) - ordered >= top_p] = 0
            shares = torch.zeros_like(shares).scatter(0, order, ordered)
        return int(torch.multinomial(shares, 1, generator=generators[row]))

    replies = [Reply() for _ in dialogues]
    words: list[list[int]] = [[] for _ in dialogues]
    open_rows = set(range(len(dialogues)))

    def flush(row: int) -> None:
        text = backbone.tokenizer.decode(words[row], skip_special_tokens=True).strip()
        if text:
            replies[row].parts.append(text)
        words[row] = []

    triggers = {bridge.first_ids[modality]: modality for modality in bridge.outputs}
    for _ in range(max_new_tokens):
        rows = sorted(open_rows)
        scores = bridge.logits(decoding.hidden[rows])
        columns = (
            scores.argmax(-1).tolist()
            if temperature == 0
            else [pick(row, scores[index]) for index, row in enumerate(rows)]
        )
        chosen = {row: bridge.token_of(column) for row, column in zip(rows, columns, strict=True)}
        emitting: dict[int, list[int]] = {}
        for row, token in chosen.items():
            if token == backbone.eos:
                flush(row)
                open_rows.discard(row)
            elif token in triggers:
                flush(row)
                emitting.setdefault(token, []).append(row)
            else:
                words[row].append(token)
                decoding.waiting[row] = token
        for token, members in emitting.items():
            span = CacheSpan(decoding, members, token, pick)
            made = bridge.outputs[triggers[token]].render(span, [seed + row for row in members], token)
            for row, medium in zip(members, made, strict=True):
                replies[row].parts.append(medium)
        if decoding.waiting:
            decoding.step([], decoding.hidden.new_zeros(0, 1, backbone.dim))
        if not open_rows or decoding.length + block > backbone.context:
            break
    for row in open_rows:
        flush(row)
        replies[row].complete = False
    return replies
