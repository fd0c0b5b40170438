"""The denoising loss against diffusers' SNR and against the formulas of the papers."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from mmbridge.decoders.denoising import denoising_loss, min_snr_weights, signal_to_noise
from mmbridge.errors import ConfigError


def schedule(prediction="epsilon", **options):
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDPMScheduler(**betas, prediction_type=prediction, **options)


@pytest.mark.parametrize("zero_terminal", [False, True])
def test_signal_to_noise_is_diffusers_own(zero_terminal):
    steps = torch.arange(1000)
    noising = schedule(rescale_betas_zero_snr=zero_terminal)
    assert_close(signal_to_noise(noising, steps), compute_snr(noising, steps), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_those_of_the_paper(prediction):
    snr = compute_snr(schedule(), torch.arange(1000))
    capped = torch.stack([snr, torch.full_like(snr, 5.0)]).amin(0)
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
    assert_close(min_snr_weights(snr, 5.0, prediction), capped / divisor)


def test_weights_at_a_signal_to_noise_ratio_of_zero_are_the_limits():
    zero = torch.zeros(1)
    assert [min_snr_weights(zero, 5.0, name).item() for name in ("epsilon", "v_prediction", "sample")] == [1, 0, 0]


def test_a_perfect_model_has_no_loss_and_gets_what_the_forward_process_makes():
    """A noisy sample mixes the clean one and noise by alpha_bar, so who knows the clean one can solve for noise."""
    noising = schedule()
    clean = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    seen = []

    def solve(noisy, timesteps):
        seen.append(timesteps)
        alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[timesteps]
        alpha_bar = alpha_bar[:, None, None, None]
        return (noisy - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt()

    loss = denoising_loss(solve, noising, clean, torch.Generator().manual_seed(2), min_snr_gamma=None)
    assert loss.ndim == 0 and loss < 1e-8
    assert len(set(seen[0].tolist())) > 1, "every sample has a timestep of its own"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_samples_are_weighted_before_the_mean(prediction):
    """With a model that answers 0 the error of each sample is its target's square, and so the whole loss is known."""
    clean = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(clean.shape, generator=generator)
    steps = torch.randint(1000, (8,), generator=generator)
    noising = schedule(prediction)
    signal, sigma = (
        values[steps][:, None, None, None]
        for values in (noising.alphas_cumprod.sqrt(), (1 - noising.alphas_cumprod).sqrt())
    )
    wanted = {"epsilon": noise, "v_prediction": signal * noise - sigma * clean, "sample": clean}[prediction]
    snr = compute_snr(noising, steps)
    weights = torch.minimum(snr, torch.tensor(5.0)) / {"epsilon": snr, "v_prediction": snr + 1, "sample": 1}[prediction]
    errors = torch.stack([(row**2).mean() for row in wanted])

    def lazy(noisy, timesteps):
        return torch.zeros_like(noisy)

    loss = denoising_loss(lazy, noising, clean, torch.Generator().manual_seed(4))
    assert_close(loss, (weights * errors).mean())
    assert not torch.isclose(loss, weights.mean() * errors.mean(), rtol=1e-3), "the case can tell the two orders apart"


def test_unknown_prediction_type_and_useless_gamma_are_refused():
    clean = torch.zeros(1, 4, 2, 2)
    with pytest.raises(ConfigError, match=r"prediction_type is 'flow_prediction'.*epsilon, v_prediction, sample"):
        denoising_loss(lambda x, t: x, schedule("flow_prediction"), clean)
    with pytest.raises(ConfigError, match="min_snr_gamma is 0 but must be positive"):
        denoising_loss(lambda x, t: x, schedule(), clean, min_snr_gamma=0.0)
