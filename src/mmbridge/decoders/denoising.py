"""The denoising losses: noise a clean sample, let the model predict, weight by signal-to-noise ratio; or flow matching.

Sources: Ho et al., arXiv 2006.11239 (the forward process); Salimans and Ho, arXiv 2202.00512 (v-prediction); Hang et
al., arXiv 2303.09556 (min-SNR weights); Esser et al., arXiv 2403.03206 (flow matching). ``schedule`` is a
``DDPMScheduler``, whatever scheduler samples later: it alone adds noise as the model was trained on it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmbridge.errors import ConfigError

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def draw_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return standard normal noise of the shape and device of ``like``; the same on any device for a CPU generator."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def signal_to_noise(schedule: Any, timesteps: Tensor) -> Tensor:
    """Return the signal-to-noise ratio alpha_bar / (1 - alpha_bar) at ``timesteps`` (B,), shape (B,)."""
    alpha_bar = schedule.alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alpha_bar / (1 - alpha_bar)


def min_snr_weights(snr: Tensor, gamma: float, prediction: str) -> Tensor:
    """Return the min-SNR-gamma weight of each sample's squared error (arXiv 2303.09556, section 3.4).

    In terms of the clean sample the weight is min(SNR, gamma) for every prediction type. An error of the noise is SNR
    times that of the clean sample, an error of v is SNR + 1 times that.

    Args:
        snr: Signal-to-noise ratios (B,); 0 at the last step of a zero-terminal-SNR schedule.
        gamma: Where the weight is capped.
        prediction: "epsilon", "v_prediction" or "sample".

    Raises:
        ConfigError: ``gamma`` is not positive.
    """
    if gamma <= 0:
        raise ConfigError(f"min_snr_gamma is {gamma:g} but must be positive; None turns the weights off.")
    if prediction == "epsilon":
        return (gamma / snr).clamp(max=1)  # = min(snr, gamma) / snr, without 0 / 0
    capped = snr.clamp(max=gamma)
    return capped / (snr + 1) if prediction == "v_prediction" else capped


def denoising_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    schedule: Any,
    clean: Tensor,
    generator: torch.Generator | None = None,
    min_snr_gamma: float | None = 5.0,
) -> Tensor:
    """Return the mean over samples of the weighted squared error of one random noising of each.

    Args:
        predict: The model: noisy samples (B, C, ...) and timesteps (B,) to its prediction, shaped as the samples.
        schedule: The DDPMScheduler of the model's training.
        clean: Clean samples (B, C, ...), float32.
        generator: Draws the noise, then the timesteps.
        min_snr_gamma: Cap of the min-SNR weights; None weights all timesteps alike.

    Raises:
        ConfigError: Unknown prediction type, or a ``min_snr_gamma`` that is not positive.
    """
    prediction = schedule.config.prediction_type
    if prediction not in PREDICTIONS:
        raise ConfigError(
            f"the scheduler's prediction_type is {prediction!r}; the denoising loss knows {', '.join(PREDICTIONS)}."
        )
    noise = draw_normal(clean, generator)
    timesteps = torch.randint(
        schedule.config.num_train_timesteps,
        clean.shape[:1],
        generator=generator,
        device=clean.device if generator is None else generator.device,
    ).to(clean.device)
    match prediction:
        case "epsilon":
            wanted = noise
        case "v_prediction":
            wanted = schedule.get_velocity(clean, noise, timesteps)
        case _:
            wanted = clean
    predicted = predict(schedule.add_noise(clean, noise, timesteps), timesteps)
    errors = (predicted.float() - wanted).square().flatten(1).mean(dim=1)  # (B,): weights differ between samples
    if min_snr_gamma is not None:
        errors = errors * min_snr_weights(signal_to_noise(schedule, timesteps), min_snr_gamma, prediction)
    return errors.mean()


def flow_matching_loss(
    predict: Callable[[Tensor, Tensor], Tensor], clean: Tensor, shift: float, generator: torch.Generator | None = None
) -> Tensor:
    """Return the mean squared error of the velocity at one random point between each sample and noise.

    The points are sigmoid(n + shift) with standard normal n (arXiv 2403.03206, section 3.1): the logit-normal distribution,
    its odds multiplied by exp(shift) (section 5.3.2), as while sampling.

    Args:
        predict: The model: noisy samples (B, C, ...) and shares of noise (B,) in 0..1 to its velocity, noise - clean.
        clean: Clean samples (B, C, ...), float32.
        shift: Logarithm of the factor on the odds of noise.
        generator: Draws the noise, then the points.
    """
    noise = draw_normal(clean, generator)
    sigmas = torch.sigmoid(draw_normal(clean[(slice(None), *[0] * (clean.ndim - 1))], generator) + shift)  # (B,)
    mixed = torch.lerp(clean, noise, sigmas.view(-1, *[1] * (clean.ndim - 1)))
    return (predict(mixed, sigmas).float() - (noise - clean)).square().mean()
