"""What a bridge asks of every way out, and the span with its four verbs that generation lends to it.

A way out owns the vocabulary rows of its tokens, the first of which is its trigger. In training, a medium of the assistant is a
span whose positions the way out filled (``exit_``); its loss reads the hidden states there. While generating, the loop emits
text until a trigger appears, then hands the way out a ``Span``; the same medium is made through ``force`` (``Signals``),
``sample`` (autoregressive ``Codes``), or ``peek`` and ``commit`` (masked ``Codes``, ``Latents``).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn

Preview = Callable[[int, int, int, Callable[[], list[Any]]], None]
"""What a decoder may call after each sampling step: the first row, the step from 1, their number, how to get the media so far."""


class Span(Protocol):
    """Positions lent to a way out for the rows of a batch that have just emitted its trigger; R rows.

    ``preview`` is for the decoder, if it can tell what a medium looks like so far; None where nobody looks.
    """

    rows: int
    preview: Preview | None

    def force(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Put these ids into every row, trigger first, in one pass; returns hidden states and embeddings, (R, K, D) each."""

    def sample(self, allowed: Sequence[int], count: int) -> Tensor:
        """Sample ``count`` ids one by one, only from ``allowed``; returns (R, count)."""

    def peek(self, embeddings: Tensor) -> Tensor:
        """Return hidden states (R, K, D) of embeddings (R, K, D) seen in both directions, without keeping them."""

    def commit(self, embeddings: Tensor) -> Tensor:
        """Keep embeddings (R, K, D) in the sequence, seen in both directions; returns their hidden states."""


class Output(Protocol):
    """A way out for one modality; ``reads_media`` says whether targets depend on media or on captions alone."""

    attention: Literal["causal", "full"]
    rows: nn.Module
    fingerprint: str
    reads_media: bool

    def build(self, modality: str, backbone: Any) -> None:
        """Derive widths and create vocabulary rows; called once, by the bridge."""

    def targets(self, media: Sequence[Any], captions: Sequence[str | None]) -> list[dict[str, Tensor]]:
        """Return frozen targets, one dict per medium; cacheable under ``fingerprint``."""

    def length(self, target: dict[str, Tensor]) -> int:
        """Return how many positions the medium's span takes, trigger included."""

    def ids(self, target: dict[str, Tensor]) -> list[int]:
        """Return the span's ids, counted from this output's first row."""

    def losses(
        self, hidden: Tensor, embeddings: Tensor, targets: Sequence[dict[str, Tensor]], seed: int
    ) -> dict[str, Tensor]:
        """Return losses by name for N spans: hidden states and input embeddings (N, K, D) each."""

    def render(self, span: Span, seeds: Sequence[int], first: int) -> list[Any]:
        """Make one medium per row of the span; ``first`` is the id of this output's first row."""

    def trainable(self) -> dict[str, nn.Module]:
        """Return the parts that can train, by name."""

    def describe(self) -> dict[str, Any]:
        """Return the manifest entries of the frozen parts."""
