"""The three stages as declarations, and the Lightning module that runs any of them.

Source: NExT-GPT, arXiv 2309.05519, section 4: encoder-side alignment, decoder-side alignment, instruction tuning.
"""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.sequence import Batch


@dataclass(frozen=True)
class Rules:
    """What a stage may train, which losses it may have, and of which it needs one; as patterns."""

    trains: tuple[str, ...]
    losses: tuple[str, ...]
    needs: tuple[str, ...]


STAGES = {
    "encoder_alignment": Rules(("inputs.*",), ("text", "*.balance"), ("text",)),
    "decoder_alignment": Rules(("outputs.*",), ("*",), ("*.alignment", "*.denoising")),
    "instruction_tuning": Rules(("*",), ("*",), ("text",)),
}


def check_stage(stage: str, parts: Sequence[str], losses: Mapping[str, float]) -> None:
    """Check that a recipe does what its stage is for.

    Args:
        stage: Name of the stage.
        parts: Names of the parts that train.
        losses: Weights of the losses.

    Raises:
        ConfigError: A part or a loss that does not belong to the stage, or a loss that is missing.
    """
    if stage not in STAGES:
        raise ConfigError(f"unknown stage {stage!r}; known: {', '.join(STAGES)}.")
    rules = STAGES[stage]
    active = [name for name, weight in losses.items() if weight > 0]
    for what, names, patterns in (("trains", parts, rules.trains), ("has the losses", active, rules.losses)):
        for name in names:
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                raise ConfigError(
                    f"stage {stage!r} {what} {' and '.join(patterns)} only, but the recipe names {name!r}; remove it or "
                    "choose stage 'instruction_tuning'."
                )
    if not any(fnmatch.filter(active, pattern) for pattern in rules.needs):
        raise ConfigError(
            f"stage {stage!r} needs the loss {' or '.join(rules.needs)} with a weight above 0; add it to losses."
        )


def rate(step: int, steps: int, warmup: float, schedule: str, floor: float = 0.0) -> float:
    """Return the share of the peak learning rate in a step, counted from 0.

    It rises in a line over the first ``warmup`` share of the steps, then stays, or falls to ``floor`` in a line or a cosine.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    done = min((step - rising) / max(steps - rising, 1), 1.0)
    left = 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return floor + (1 - floor) * left


class Stage(LightningModule):
    """A bridge in training: weighted losses, AdamW on what trains, noise that depends on the step alone.

    Args:
        bridge: A ``Bridge`` whose trainable parts are set.
        losses: Weights of the losses by name; others are left out.
        optimizer: Settings of the optimiser, ``mmbridge.config.OptimizerConfig``.
        steps: Optimiser steps.
        log_every: Steps between the values that are kept for logs.
    """

    def __init__(self, bridge: Any, losses: Mapping[str, float], optimizer: Any, steps: int, *, log_every: int = 10):
        super().__init__()
        self.bridge = bridge
        self.weights = {name: weight for name, weight in losses.items() if weight > 0}
        self.settings, self.steps, self.log_every = optimizer, steps, log_every
        self.trained = [parameter for parameter in bridge.parameters() if parameter.requires_grad]
        self.recent: dict[str, list[Tensor]] = {}
        self.health = torch.zeros(())  # turns NaN when any loss or gradient norm was not finite, and stays so
        self.norm = torch.zeros(())
        self.strict_loading = False

    @property
    def _scales_losses(self) -> bool:
        return self.trainer.precision == "16-mixed"

    def is_logged(self, step: int) -> bool:
        """Tell whether values of a step, counted from 1, are kept."""
        return step == 1 or step % self.log_every == 0 or step == self.steps

    def weigh(self, losses: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted total of the losses that a batch has."""
        terms = [weight * losses[name] for name, weight in self.weights.items() if name in losses]
        if not terms:  # a batch without any medium to make, in a stage that only makes media
            terms = [0.0 * sum(parameter.sum() for parameter in self.trained)]
        return torch.stack(terms).sum()

    def training_step(self, batch: Batch, _: int) -> Tensor:
        """Return the total loss of a batch."""
        torch.manual_seed(batch.seed)  # so that dropout and sampled assignments are the same after a resume
        losses = self.bridge(batch)
        total = self.weigh(losses)
        self.health = self.health.to(total.device) + 0.0 * total.detach()
        if self.is_logged(self.global_step + 1):
            for name in self.weights:
                if name in losses:
                    self.recent.setdefault(f"train/loss/{name}", []).append(losses[name].detach())
            self.recent.setdefault("train/loss/total", []).append(total.detach())
        return total

    def validation_step(self, batch: Batch, *_: int) -> dict[str, Tensor]:
        """Return the named losses of a held batch and their total."""
        torch.manual_seed(batch.seed)
        losses = self.bridge(batch)
        return {**{name: losses[name] for name in self.weights if name in losses}, "total": self.weigh(losses)}

    def take_recent(self) -> dict[str, float]:
        """Return the means of the kept losses over the accumulated batches of the step, and forget them."""
        means = {name: float(torch.stack(values).mean()) for name, values in self.recent.items()}
        self.recent = {}
        return means

    def is_finite(self) -> bool:
        """Tell whether all losses and gradients so far were finite."""
        return bool(self.health.isfinite())

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW and its schedule."""
        settings = self.settings
        optimizer = torch.optim.AdamW(
            self.trained,
            settings.lr,
            betas=tuple(settings.betas),
            weight_decay=settings.weight_decay,
            fused=not self._scales_losses,  # gradients are clipped here, unscaled, which the fused kernel would do itself
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: rate(step, self.steps, settings.warmup, settings.schedule, settings.floor)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Clip the norm of the gradients and keep it for the logs."""
        limit = self.settings.clip if self.settings.clip is not None else math.inf
        self.norm = torch.nn.utils.clip_grad_norm_(self.trained, limit)
        if not self._scales_losses:  # which overflows now and then, and skips the step
            self.health = self.health + 0.0 * self.norm.detach()

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch; its features move when they are used."""
        return batch.to(device)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return what trains, and nothing else."""
        return {name: value.detach() for name, value in self.named_parameters() if value.requires_grad}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what trains.

        Raises:
            CheckpointError: The checkpoint was written for other parts.
        """
        wanted = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        found = {name: tuple(value.shape) for name, value in state_dict.items()}
        if wanted != found:
            clash = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
            raise CheckpointError(
                f"the checkpoint does not fit this recipe, first at {clash}; resume with the recipe it was made by."
            )
        return super().load_state_dict(state_dict, strict=False)
