"""The way in of NExT-GPT and OneLLM: a frozen encoder's tokens, projected into the sequence."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmbridge.errors import ConfigError
from mmbridge.registry import ways_in

register = ways_in.register


@register("encoded")
class Encoded(nn.Module):
    """Encode a medium with a frozen encoder and project its tokens to slots.

    Args:
        encoder: An encoder from ``mmbridge.encoders`` or any module with its members.
        projection: An input projection; widths that it was not given are derived by the bridge.
        attention: Whether slots see earlier slots only ("causal", as published) or all slots of their medium ("full").
        batch_size: Media that the encoder takes at once.
        tags: Whether a learned slot stands before and one after each medium: ``<Img>`` and ``</Img>`` of the released
            NExT-GPT weights, the start and end tags of OneLLM.
        like: Modality of the same bridge whose projection and tags this way in's start as, where a recipe's parent lacks it.
    """

    def __init__(
        self,
        encoder: Any,
        projection: Any,
        attention: Literal["causal", "full"] = "causal",
        batch_size: int = 64,
        tags: bool = False,
        like: str | None = None,
    ):
        super().__init__()
        if attention not in ("causal", "full"):
            raise ConfigError(f"attention inside a medium is 'causal' or 'full', not {attention!r}.")
        self.encoder, self.projection = encoder, projection
        self.attention, self.batch_size, self.tagged = attention, batch_size, tags
        self.like = like
        self.tags: Tags
        self._fingerprint: str | None = None

    def build(self, modality: str, dim: int) -> None:
        """Check the modality, derive the projection's widths and create the tags.

        Raises:
            ConfigError: The encoder reads another modality.
            ShapeError: The projection was built for other widths.
        """
        if self.encoder.modality != modality:
            raise ConfigError(
                f"input {modality!r} was given an encoder for {self.encoder.modality!r}; name the input after what it reads."
            )
        self.projection.build(self.encoder.spec.dim, dim)
        if self.tagged:
            self.tags = Tags(dim)

    @property
    def fingerprint(self) -> str:
        """Hash over the encoder's weights and preprocessing, computed once: the encoder is frozen."""
        if self._fingerprint is None:
            self._fingerprint = self.encoder.fingerprint
        return self._fingerprint

    @torch.no_grad()
    def features(self, media: Sequence[Any]) -> list[Tensor]:
        """Encode media (``Image``, ``Audio``, ...) to one tensor (T, dim) each."""
        parameter = next(self.encoder.parameters(), torch.empty(0))
        encoded: list[Tensor] = []
        for start in range(0, len(media), self.batch_size):
            raw = torch.stack([self.encoder.prepare(medium) for medium in media[start : start + self.batch_size]])
            encoded.extend(self.encoder(raw.to(parameter.device)))
        return encoded

    def length(self, features: Tensor) -> int:
        """Return the number of slots for features (T, dim), tags included."""
        return int(self.projection.num_tokens(features.shape[0])) + 2 * self.tagged

    def enter(self, features: Sequence[Tensor]) -> Tensor:
        """Project features, media of equal length together: returns (sum of slots, D) in the media's order."""
        parameter = next(self.projection.parameters())
        slots: list[Tensor] = [parameter] * len(features)
        routing: list[Tensor | None] = []
        by_length: dict[int, list[int]] = {}
        for index, tensor in enumerate(features):
            by_length.setdefault(tensor.shape[0], []).append(index)
        for members in by_length.values():
            stacked = torch.stack([features[index] for index in members]).to(parameter.device, parameter.dtype)
            for index, projected in zip(members, self.projection(stacked), strict=True):
                slots[index] = torch.cat([self.tags.start, projected, self.tags.end]) if self.tagged else projected
            routing.append(self.projection.routing)
        if len(routing) > 1 and routing[0] is not None:
            self.projection.routing = torch.cat(routing)  # of all calls, not of the last alone
        return torch.cat(slots)

    def losses(self) -> dict[str, Tensor]:
        """Return the projection's losses of the last ``enter``, such as ``balance`` of a mixture of experts."""
        return dict(self.projection.losses())

    def trainable(self) -> dict[str, nn.Module]:
        """Return the projection and, where there are some, the tags."""
        return {"projection": self.projection, **({"tags": self.tags} if self.tagged else {})}

    def describe(self) -> dict[str, Any]:
        """Return the manifest entry of the encoder."""
        return {"encoder": self.encoder.describe()}


class Tags(nn.Module):
    """A learned slot before a medium and one after it, ``start`` and ``end``, (1, dim) each."""

    def __init__(self, dim: int):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.end = nn.Parameter(torch.randn(1, dim) * 0.02)
