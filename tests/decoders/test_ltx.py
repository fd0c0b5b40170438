"""The LTX-Video decoder against diffusers' own pipeline, and flow matching against its formulas."""

import json
import math

import pytest
import torch
from decoders import tiny_decoders
from decoders.tiny_decoders import TOKENS
from diffusers import FlowMatchEulerDiscreteScheduler
from torch.testing import assert_close

from mmbridge.decoders import LTX
from mmbridge.decoders.denoising import flow_matching_loss
from mmbridge.errors import ConfigError, ShapeError
from mmbridge.media import Video
from mmbridge.specs import ConditionSpec

CAPTIONS = ["a red blob", "red", "wide"]
WIDTH = 24
SIZES = {"frames": 5, "fps": 5, "resolution": [32, 32]}


@pytest.fixture(scope="module")
def parts():
    return tiny_decoders.ltx_parts()


@pytest.fixture
def model(tmp_path):
    return tiny_decoders.ltx(tmp_path / "folder")["source"]


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def videos(count):
    generator = torch.Generator().manual_seed(0)
    return [Video(torch.randint(256, (5, 3, 32, 32), generator=generator, dtype=torch.uint8), 5) for _ in range(count)]


def test_encode_is_what_diffusers_encodes(parts):
    states, seen, _, _ = tiny_decoders.ltx_pipeline(parts).encode_prompt(
        CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=TOKENS
    )
    decoder = LTX.from_components(**parts, **SIZES)
    condition, mask = decoder.encode(CAPTIONS)
    assert decoder.spec == ConditionSpec(TOKENS, WIDTH + 1)
    assert_close(condition[..., :-1], states * seen[..., None], rtol=0, atol=0)
    assert_close(condition[..., -1], seen.float())
    assert torch.equal(mask, seen)


def test_sample_is_what_diffusers_films(parts):
    pipeline = tiny_decoders.ltx_pipeline(parts)
    states, seen, empty, unseen = pipeline.encode_prompt(CAPTIONS[:1], max_sequence_length=TOKENS)
    (wanted,) = pipeline(
        prompt_embeds=states,
        prompt_attention_mask=seen,
        negative_prompt_embeds=empty,
        negative_prompt_attention_mask=unseen,
        height=32,
        width=32,
        num_frames=5,
        frame_rate=5,
        num_inference_steps=3,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(6),
        output_type="pt",
    ).frames
    decoder = LTX.from_components(**parts, **SIZES)
    # what is masked is zero here and a state there, which changes nothing but rounding
    (made,) = decoder.sample(decoder.encode(CAPTIONS[:1])[0], seed=6, steps=3, guidance=3.0)
    difference = (made.frames.int() - Video.load(wanted, fps=5).frames.int()).abs()
    assert made.frames.shape == (5, 3, 32, 32) and made.fps == 5
    assert difference.max() <= 1


def test_target_and_scale_are_the_pipelines_own(parts):
    decoder = LTX.from_components(**parts, **SIZES)
    target = decoder.target(videos(2))
    assert target.shape == (2, 8, 2, 4, 4) and decoder.latent_shape == (4, 2, 4, 4)
    mean = target[:, :4]
    wanted = (mean - parts["vae"].latents_mean.view(1, -1, 1, 1, 1)) / parts["vae"].latents_std.view(1, -1, 1, 1, 1)
    assert_close(decoder.scale_latents(mean), wanted)


def test_loss_is_the_error_of_the_velocity(parts):
    decoder = LTX.from_components(**parts, **SIZES)
    condition, target = decoder.encode(CAPTIONS[:2])[0], decoder.target(videos(2))
    loss = decoder.loss(condition, target, torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(2)
    mean, log_variance = target.chunk(2, dim=1)
    latents = decoder.scale_latents(mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator))
    noise = torch.randn(latents.shape, generator=generator)
    shift = 0.5 + (1.15 - 0.5) * (32 - 8) / (64 - 8)
    odds = torch.randn(2, generator=generator).exp() * math.exp(shift)
    sigma = (odds / (1 + odds)).view(-1, 1, 1, 1, 1)
    mixed = (1 - sigma) * latents + sigma * noise
    with torch.no_grad():
        guess = parts["transformer"](
            hidden_states=mixed.flatten(2).transpose(1, 2),
            encoder_hidden_states=condition[..., :-1],
            timestep=1000 * sigma.flatten(),
            encoder_attention_mask=condition[..., -1] > 0.5,
            num_frames=2,
            height=4,
            width=4,
            rope_interpolation_scale=(4 / 5, 8, 8),
            return_dict=False,
        )[0]
    wanted = (noise - latents).flatten(2).transpose(1, 2)
    assert_close(loss, (guess - wanted).square().mean(), rtol=1e-4, atol=0)


def test_the_odds_of_noise_are_shifted_as_while_sampling():
    """diffusers shifts the times of sampling by the same rule, here from a half to its odds times exp(shift)."""
    shift, seen = 1.3, []
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    clean = torch.randn(64, 3, 2, generator=torch.Generator().manual_seed(1))

    def solve(mixed, sigmas):
        seen.append(sigmas)
        return (mixed - clean) / sigmas.view(-1, 1, 1)

    loss = flow_matching_loss(solve, clean, shift, torch.Generator().manual_seed(2))
    assert loss < 1e-8, "who knows the clean sample can tell the way from it"
    generator = torch.Generator().manual_seed(2)
    torch.randn(clean.shape, generator=generator)
    plain = torch.sigmoid(torch.randn(64, generator=generator))
    assert_close(seen[0], scheduler.time_shift(shift, 1.0, plain))


def test_settings_and_misfits(model):
    decoder = LTX(model)
    assert (decoder.frames, decoder.fps, decoder.resolution, decoder.guidance) == (5, 5.0, (32, 32), 2.0)
    with pytest.raises(
        ConfigError, match="have 6 frames but need a positive number that is 1 more than a multiple of 4"
    ):
        _ = LTX(model, frames=6).frames
    with pytest.raises(ConfigError, match="positive multiples of 32 pixels"):
        _ = LTX(model, resolution=[32, 40]).resolution
    (model / "mmbridge.json").write_text("{}")
    published = LTX(model)
    assert (published.frames, published.fps, published.resolution, published.guidance) == (161, 25.0, (512, 704), 3.0)
    edit(model / "vae" / "config.json", latent_channels=8)
    with pytest.raises(ShapeError, match="transformer takes 4 channels but its VAE makes 8"):
        _ = LTX(model).spec
    edit(model / "text_encoder" / "config.json", d_model=32)
    with pytest.raises(ShapeError, match="attends to conditions of width 24 but its text encoder gives width 32"):
        _ = LTX(model).spec
