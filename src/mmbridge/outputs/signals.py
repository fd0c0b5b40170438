"""The way out of NExT-GPT and GILL: hidden states at signal tokens, projected into a decoder's condition.

Source: NExT-GPT, arXiv 2309.05519, sections 3 and 4.2; GILL, arXiv 2305.17216; appended queries as in MetaQueries, arXiv
2504.06256. Only the trigger competes with words; the rest of the block is forced in one pass, so that an incomplete or
out-of-order block can't exist. The block is not supervised token by token, since nothing ever reads those logits.
"""

import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmbridge.backbones.rows import NewRows
from mmbridge.errors import ConfigError, DataError, ShapeError
from mmbridge.outputs.base import Span
from mmbridge.registry import ways_out

register = ways_out.register


@register("signals")
class Signals(nn.Module):
    """Signal tokens that steer a frozen decoder.

    Args:
        projection: An output projection; sizes that it was not given are derived by the bridge.
        decoder: A decoder from ``mmbridge.decoders`` or any module with its members.
        num_signals: Positions whose states the projection reads (NExT-GPT: 4 for images, 8 for sounds, 24 for videos).
        mode: "emitted": the signals are vocabulary rows, the first of which is the trigger. "appended": a trigger row, after
            which learned queries are appended.
        alignment: "mse" between projected and caption condition, or "norm", the published mean L2 norm of the difference.
        denoising: Whether targets hold the medium itself for the decoder's denoising loss, besides its caption condition.
        spaces: Whether a row for the space stands between signals, so that a block has, and the projection reads,
            2 * ``num_signals`` - 1 positions. Reproduces the newer NExT-GPT code, whose tokenizer keeps these spaces.
        normalize: Whether conditions get unit rows where the decoder was trained with such. False reproduces NExT-GPT, which
            hands its audio condition to the decoder as it is.
    """

    attention: Literal["causal", "full"] = "causal"

    def __init__(
        self,
        projection: Any,
        decoder: Any,
        num_signals: int = 4,
        mode: Literal["emitted", "appended"] = "emitted",
        alignment: Literal["mse", "norm"] = "mse",
        denoising: bool = False,
        spaces: bool = False,
        normalize: bool = True,
    ):
        super().__init__()
        if mode not in ("emitted", "appended"):
            raise ConfigError(f"signals are 'emitted' or 'appended', not {mode!r}.")
        if alignment not in ("mse", "norm"):
            raise ConfigError(f"the alignment loss is 'mse' or 'norm', not {alignment!r}.")
        if not isinstance(num_signals, int) or num_signals < 1:
            raise ConfigError(f"num_signals must be a positive integer, not {num_signals!r}.")
        if spaces and mode == "appended":
            raise ConfigError(
                "spaces stand between signals that are 'emitted'; leave spaces=False with 'appended' ones."
            )
        self.projection, self.decoder = projection, decoder
        self.num_signals, self.mode, self.alignment, self.denoising = num_signals, mode, alignment, denoising
        self.normalize = normalize
        self.num_states = 2 * num_signals - 1 if spaces else num_signals  # that the projection reads
        self.rows: NewRows
        self._fingerprint: str | None = None

    def build(self, modality: str, backbone: Any) -> None:
        """Check the modality, derive the projection's sizes and create the signals' rows.

        Raises:
            ConfigError: The decoder makes another modality.
            ShapeError: The projection was built for other sizes.
        """
        if self.decoder.modality != modality:
            raise ConfigError(
                f"output {modality!r} was given a decoder for {self.decoder.modality!r}; name the output after what it makes."
            )
        spec = self.decoder.spec
        try:
            self.projection.build(backbone.dim, spec.dim, spec.tokens)
        except ShapeError as error:
            raise ShapeError(f"output {modality!r}: {error}") from None
        count = self.num_states + (self.mode == "appended")
        self.rows = NewRows(backbone.embedding, count, seed=count)

    @property
    def fingerprint(self) -> str:
        """Hash over whatever determines the targets, computed once: the decoder is frozen."""
        if self._fingerprint is None:
            self._fingerprint = f"{self.decoder.fingerprint}-{'denoising' if self.denoising else 'caption'}"
        return self._fingerprint

    @property
    def reads_media(self) -> bool:
        """Whether targets depend on the media, not on captions alone."""
        return self.denoising

    def targets(self, media: Sequence[Any], captions: Sequence[str | None]) -> list[dict[str, Tensor]]:
        """Return the caption's condition (tokens, dim) and, for the denoising loss, the decoder's own target.

        Raises:
            DataError: A medium without caption, or without content where the denoising loss needs it.
        """
        missing = next((index for index, caption in enumerate(captions) if caption is None), None)
        if missing is not None:
            raise DataError(
                f"medium {missing} that the assistant gives has no 'caption' to align to; add one to the part."
            )
        conditions, _ = self.decoder.encode([str(caption) for caption in captions])  # (N, tokens, dim)
        targets = [{"condition": condition} for condition in conditions]
        if self.denoising:
            if any(medium is None for medium in media):
                raise DataError("the denoising loss needs the media that the assistant gives, not only their captions.")
            for target, latent in zip(targets, self.decoder.target(list(media)), strict=True):
                target["latent"] = latent
        return targets

    def length(self, target: dict[str, Tensor] | None = None) -> int:
        """Return the length of a block, trigger included; it does not depend on the medium."""
        return self.rows.count

    def ids(self, target: dict[str, Tensor] | None = None) -> list[int]:
        """Return the block's ids, counted from this output's first row."""
        return list(range(self.rows.count))

    def condition(self, hidden: Tensor, embeddings: Tensor) -> Tensor:
        """Project a block's states to the decoder's condition.

        Args:
            hidden: Hidden states of the block, (N, K, D).
            embeddings: Input embeddings of the block, (N, K, D).

        Returns:
            (N, tokens, dim); unit rows where the decoder's spec says so, unless ``normalize`` is off.
        """
        states = (hidden + embeddings)[:, -self.num_states :]
        condition = self.projection(states.to(next(self.projection.parameters()).dtype))
        return F.normalize(condition, dim=-1) if self.normalize and self.decoder.spec.normalized else condition

    def losses(
        self, hidden: Tensor, embeddings: Tensor, targets: Sequence[dict[str, Tensor]], seed: int
    ) -> dict[str, Tensor]:
        """Return ``alignment`` and, where targets hold latents, ``denoising``.

        Args:
            hidden: (N, K, D), as for ``condition``.
            embeddings: (N, K, D).
            targets: One dict per block, from ``targets``.
            seed: Seed of the noise of the denoising loss.
        """
        condition = self.condition(hidden, embeddings)
        wanted = torch.stack([target["condition"] for target in targets]).to(condition)
        difference = (condition - wanted).float()
        # "norm" is the published loss; its gradient is undefined at zero, hence the floor.
        alignment = (
            difference.square().mean() if self.alignment == "mse" else difference.norm(dim=-1).clamp_min(1e-6).mean()
        )
        losses = {"alignment": alignment}
        if self.denoising:
            latent = torch.stack([target["latent"] for target in targets]).to(condition.device)
            generator = torch.Generator(device=condition.device).manual_seed(seed)
            losses["denoising"] = self.decoder.loss(condition, latent, generator=generator)
        return losses

    def render(self, span: Span, seeds: Sequence[int], first: int) -> list[Any]:
        """Force the block and let the decoder make one medium per row."""
        hidden, embeddings = span.force([first + index for index in range(self.rows.count)])
        looked_at = span.preview is not None and "preview" in inspect.signature(self.decoder.sample).parameters
        options = {"preview": span.preview} if looked_at else {}
        return list(self.decoder.sample(self.condition(hidden, embeddings), seed=list(seeds), **options))

    def trainable(self) -> dict[str, nn.Module]:
        """Return the projection and the signals' rows."""
        return {"projection": self.projection, "rows": self.rows}

    def describe(self) -> dict[str, Any]:
        """Return the manifest entry of the decoder."""
        return {"decoder": self.decoder.describe()}
