"""What a bridge asks of every way in.

A medium takes a span of positions. Its content is split into what is frozen (``features``, which may be computed once
and stored) and what trains (``enter``). A span is filled either with embeddings (``Encoded``, ``Latents``) or with ids of new
vocabulary rows (``Codes``); ``attention`` says whether its positions see each other in both directions.
"""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from torch import Tensor, nn


class Input(Protocol):
    """A way in for one modality."""

    attention: Literal["causal", "full"]
    fingerprint: str

    def build(self, modality: str, dim: int) -> None:
        """Derive widths for a backbone of width ``dim``; called once, by the bridge."""

    def features(self, media: Sequence[Any]) -> list[Tensor]:
        """Return frozen features, one tensor per medium; cacheable under ``fingerprint`` and the medium's content hash."""

    def length(self, features: Tensor) -> int:
        """Return how many positions one medium with these features takes."""

    def enter(self, features: Sequence[Tensor]) -> Tensor:
        """Return what fills the spans, in order: embeddings (sum of lengths, D), with gradients to trainable parts."""

    def losses(self) -> dict[str, Tensor]:
        """Return the losses of the last ``enter`` by name, each a scalar; most ways in have none."""

    def trainable(self) -> dict[str, nn.Module]:
        """Return the parts that can train, by name."""

    def describe(self) -> dict[str, Any]:
        """Return the manifest entries of the frozen parts."""
