"""Messages and slots to one sequence: spans, labels and masks are born here and never searched for afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmbridge.errors import MessageError
from mmbridge.messages import MediumPart, MediumPiece, Piece

IGNORED = -100


@dataclass
class MediumSpan:
    """Where one medium stands: ``length`` positions from ``start`` on in row ``row``.

    ``content`` is its features (way in) or its target (way out; None while only its place matters).
    """

    modality: str
    start: int
    length: int
    content: Any
    row: int = 0


@dataclass
class TokenSequence:
    """One dialogue as ids (T,), labels (T,) and the spans of its media.

    Ids below V are the backbone's, ids from V on are rows of the outputs; positions of media that come in hold 0.
    Labels are ids to predict at their own position, ``IGNORED`` elsewhere.
    """

    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    entering: list[MediumSpan] = field(default_factory=list)
    leaving: list[MediumSpan] = field(default_factory=list)

    def after(self, start: int) -> "TokenSequence":
        """Return what follows the first ``start`` positions, which cut no medium."""
        entering, leaving = (
            [replace(span, start=span.start - start) for span in spans if span.start >= start]
            for spans in (self.entering, self.leaving)
        )
        return TokenSequence(self.ids[start:], self.labels[start:], entering, leaving)


@dataclass
class Batch:
    """Sequences side by side.

    Attributes:
        ids: (B, T).
        predicting: (S,) flat indices into (B, T) of the hidden states from which the next token is learned.
        answers: (S,) the ids to learn there.
        mask: (B, T) boolean, False on padding.
        entering: Spans of media that come in, by modality, with their features.
        leaving: Spans of media that go out, by modality, with their targets.
        seed: Seed of whatever noise the losses draw.
    """

    ids: Tensor
    predicting: Tensor
    answers: Tensor
    mask: Tensor
    entering: dict[str, list[MediumSpan]]
    leaving: dict[str, list[MediumSpan]]
    seed: int = 0

    def to(self, device: torch.device | str) -> "Batch":
        """Move ids, answers and mask; features and targets move when they are used."""
        ids, predicting, answers, mask = (
            tensor.to(device) for tensor in (self.ids, self.predicting, self.answers, self.mask)
        )
        return Batch(ids, predicting, answers, mask, self.entering, self.leaving, self.seed)


def check_supported(part: MediumPart, supervised: bool, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
    """Refuse a medium that the bridge has no way for.

    Raises:
        MessageError: Which modality is lacking, and which there are.
    """
    ways, verb = (outputs, "make") if supervised else (inputs, "read")
    if part.type not in ways:
        known = ", ".join(sorted(ways)) or "none"
        raise MessageError(f"this bridge can't {verb} media of type {part.type!r}; it can {verb}: {known}.")


def assemble(
    pieces: Sequence[Piece],
    contents: Sequence[Any],
    backbone: Any,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    first_ids: Mapping[str, int],
) -> TokenSequence:
    """Join the pieces of a rendered dialogue.

    Args:
        pieces: From ``mmbridge.messages.render``.
        contents: For each medium in order, its features (way in) or its target or None (way out).
        backbone: Tokenises text.
        inputs: Ways in by modality.
        outputs: Ways out by modality.
        first_ids: Id of the first row of each output.
    """
    sequence = TokenSequence()
    remaining = iter(contents)
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        if isinstance(piece, MediumPiece):
            modality, content = piece.part.type, next(remaining)
            start = len(sequence.ids)
            if piece.supervised:
                way = outputs[modality]
                ids = [first_ids[modality] + index for index in way.ids(content)]
                emitted = way.rows.head.shape[0]
                sequence.ids += ids
                sequence.labels += [token if token - first_ids[modality] < emitted else IGNORED for token in ids]
                sequence.leaving.append(MediumSpan(modality, start, len(ids), content))
            else:
                length = inputs[modality].length(content)
                sequence.ids += [0] * length
                sequence.labels += [IGNORED] * length
                sequence.entering.append(MediumSpan(modality, start, length, content))
            continue
        text = piece.text
        said = any(high == len(text) for _, high in piece.supervised)
        if isinstance(following, MediumPiece) and following.supervised and not said:
            # The space before a reply belongs to its first word; a reply that starts with a medium has none.
            text = text.rstrip(" ")
        ids, ranges = backbone.tokenize(text)
        sequence.ids += ids
        # A token that ends inside the assistant's words belongs to them, also if it starts with the space before them.
        sequence.labels += [
            token if any(start < high <= end for start, end in piece.supervised) else IGNORED
            for token, (_, high) in zip(ids, ranges, strict=True)
        ]
    return sequence


def collate(sequences: Sequence[TokenSequence], *, left: bool = False, seed: int = 0) -> Batch:
    """Put sequences side by side, padded on the right (training) or on the left (generation)."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    entering: dict[str, list[MediumSpan]] = {}
    leaving: dict[str, list[MediumSpan]] = {}
    for row, sequence in enumerate(sequences):
        shift = longest - len(sequence.ids) if left else 0
        place = slice(shift, shift + len(sequence.ids))
        ids[row, place] = torch.tensor(sequence.ids)
        labels[row, place] = torch.tensor(sequence.labels)
        mask[row, place] = True
        for spans, collected in ((sequence.entering, entering), (sequence.leaving, leaving)):
            for span in spans:
                placed = MediumSpan(span.modality, span.start + shift, span.length, span.content, row)
                collected.setdefault(span.modality, []).append(placed)
    labels[:, 0] = IGNORED  # nothing precedes the first position
    answered = (labels != IGNORED).flatten().nonzero().squeeze(1)
    return Batch(ids, answered - 1, labels.flatten()[answered], mask, entering, leaving, seed)


def positions_of(mask: Tensor) -> Tensor:
    """Return position ids (B, T) that count real positions only."""
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


def attention_of(mask: Tensor, full: Sequence[MediumSpan], past: int = 0) -> Tensor:
    """Return what a transformers backbone takes as attention mask.

    Args:
        mask: (B, T), False on padding.
        full: Spans inside which every position sees every other; they start to count behind ``past``.
        past: Leading positions that a cache holds, which ask for nothing themselves.

    Returns:
        The mask itself where all attention is causal, else (B, 1, T - past, T), True where attention is allowed.
    """
    if not full:
        return mask.long()
    length = mask.shape[1]
    causal = torch.ones(length - past, length, dtype=torch.bool, device=mask.device).tril(past)
    allowed = causal.repeat(len(mask), 1, 1)
    for span in full:
        start, stop = span.start, span.start + span.length
        allowed[span.row, start:stop, past + start : past + stop] = True
    # A padding row keeps its own position, since a row without any is undefined.
    own = torch.eye(length, dtype=torch.bool, device=mask.device)[past:]
    return ((allowed & mask[:, None, :]) | own)[:, None]
