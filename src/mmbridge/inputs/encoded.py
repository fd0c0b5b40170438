"""The way in of NExT-GPT and OneLLM: an encoder's tokens, projected into the sequence."""

from collections.abc import MutableMapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmbridge.errors import ConfigError
from mmbridge.registry import ways_in

register = ways_in.register


@register("encoded")
class Encoded(nn.Module):
    """Encode a medium with a frozen encoder and project its tokens to slots.

    Features are the encoder's tokens. While a part of the encoder trains (the tokenizer of ``encoders.UniversalEncoder``),
    they are its raw inputs, and encoding is a part of ``enter``.

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
        self._fingerprint: tuple[Any, str] = None, ""

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

    def share(self, pool: MutableMapping[str, nn.Module]) -> None:
        """Take part in what several ways in of a bridge have in common: experts, an encoder that trains."""
        for part in (self.projection, self.encoder):
            if hasattr(part, "share"):
                part.share(pool)

    @property
    def trains_encoder(self) -> bool:
        """Whether any part of the encoder trains now."""
        return any(parameter.requires_grad for parameter in self.encoder.parameters())

    @property
    def fingerprint(self) -> str:
        """Hash over what features depend on: preprocessing, and the encoder's weights unless some of them train."""
        if self.trains_encoder:
            return f"raw {type(self.encoder).__qualname__} {self.encoder.input!r} {self.encoder.options}"
        version = sum(parameter._version for parameter in self.encoder.parameters())  # which grows when one is changed
        if self._fingerprint[0] != version:
            self._fingerprint = version, self.encoder.fingerprint
        return self._fingerprint[1]

    @torch.no_grad()
    def features(self, media: Sequence[Any]) -> list[Tensor]:
        """Encode media (``Image``, ``Audio``, ...) to one tensor (T, dim) each; to a raw input if the encoder trains."""
        parameter = next(self.encoder.parameters(), torch.empty(0))
        work = self.encoder.gather if self.trains_encoder else self.encoder
        found: list[Tensor] = []
        for start in range(0, len(media), self.batch_size):
            raw = torch.stack([self.encoder.prepare(medium) for medium in media[start : start + self.batch_size]])
            found.extend(work(raw.to(parameter.device)))
        return found

    def length(self, features: Tensor) -> int:
        """Return the number of slots for the features of a medium, tags included."""
        tokens = self.encoder.spec.tokens if self.trains_encoder else features.shape[0]
        return int(self.projection.num_tokens(tokens)) + 2 * self.tagged

    def enter(self, features: Sequence[Tensor]) -> Tensor:
        """Project features, media of equal size together: returns (sum of slots, D) in the media's order."""
        parameter = next(self.projection.parameters())
        slots: list[Tensor] = [parameter] * len(features)
        routing: list[Tensor | None] = []
        by_shape: dict[torch.Size, list[int]] = {}
        for index, tensor in enumerate(features):
            by_shape.setdefault(tensor.shape, []).append(index)
        for members in by_shape.values():
            stacked = torch.stack([features[index] for index in members]).to(parameter.device, parameter.dtype)
            tokens = self.encoder.encode(stacked) if self.trains_encoder else stacked
            for index, projected in zip(members, self.projection(tokens), strict=True):
                slots[index] = torch.cat([self.tags.start, projected, self.tags.end]) if self.tagged else projected
            routing.append(self.projection.routing)
        if len(routing) > 1 and routing[0] is not None:
            self.projection.routing = torch.cat(routing)  # of all calls, not of the last alone
        return torch.cat(slots)

    def losses(self) -> dict[str, Tensor]:
        """Return the projection's losses of the last ``enter``, such as ``balance`` of a mixture of experts."""
        return dict(self.projection.losses())

    def trainable(self) -> dict[str, nn.Module]:
        """Return the projection and, where there are some, the tags and the encoder's light parts."""
        light = self.encoder.trainable() if hasattr(self.encoder, "trainable") else {}
        return {"projection": self.projection, **({"tags": self.tags} if self.tagged else {}), **light}

    def describe(self) -> dict[str, Any]:
        """Return the manifest entry of the encoder."""
        return {"encoder": self.encoder.describe()}


class Tags(nn.Module):
    """A learned slot before a medium and one after it, ``start`` and ``end``, (1, dim) each."""

    def __init__(self, dim: int):
        super().__init__()
        self.start = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.end = nn.Parameter(torch.randn(1, dim) * 0.02)
