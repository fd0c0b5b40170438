"""The ModelScope decoder against diffusers' own pipeline and the papers' formulas."""

import json

import pytest
import torch
from decoders import tiny_decoders
from decoders.tiny_decoders import DIM, FRAMES, RESOLUTION, SCHEDULE, TOKENS
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler
from torch.testing import assert_close

from mmbridge.decoders import ModelScope, StableDiffusion
from mmbridge.errors import ConfigError, ShapeError
from mmbridge.media import Image, Video
from mmbridge.specs import ConditionSpec

CAPTIONS = ["a red blob", "red", "wide"]


@pytest.fixture
def parts(tmp_path):
    return tiny_decoders.modelscope_parts(tmp_path / "files")


@pytest.fixture
def model(tmp_path):
    return tiny_decoders.modelscope(tmp_path / "folder")["source"]


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def videos(count, frames=FRAMES, height=RESOLUTION, width=RESOLUTION):
    generator = torch.Generator().manual_seed(0)
    shape = (frames, 3, height, width)
    return [Video(torch.randint(256, shape, generator=generator, dtype=torch.uint8), 8) for _ in range(count)]


def pixels(made):
    return torch.stack([video.frames for video in made]).int()


def test_encode_is_what_diffusers_encodes(parts):
    wanted, _ = tiny_decoders.modelscope_pipeline(parts).encode_prompt(CAPTIONS, "cpu", 1, False)
    decoder = ModelScope.from_components(**parts)
    condition, mask = decoder.encode(CAPTIONS)
    assert_close(condition, wanted, rtol=0, atol=0)
    assert decoder.spec == ConditionSpec(TOKENS, DIM) and mask.any(1).all()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerAncestralDiscreteScheduler])
def test_sample_is_what_diffusers_films(parts, scheduler):
    options = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    parts["scheduler"] = scheduler(**SCHEDULE, steps_offset=1, **options)
    pipeline = tiny_decoders.modelscope_pipeline(parts)
    condition, empty = (pipeline.encode_prompt(texts, "cpu", 1, False)[0] for texts in (CAPTIONS, [""]))
    decoder = ModelScope.from_components(**parts, frames=FRAMES, fps=4)
    seen = []
    made = decoder.sample(
        condition, seed=5, steps=3, guidance=3.0, preview=lambda *news: seen.append((*news[:3], news[3]()))
    )
    assert [news[:3] for news in seen] == [(row, step, 3) for row in range(len(CAPTIONS)) for step in (1, 2, 3)]
    last = pixels([news[3][0] for news in seen[2::3]])
    assert (last - pixels(made)).abs().max() <= 1  # of 255, by rounding
    for row, video in enumerate(made):
        (wanted,) = pipeline(
            prompt_embeds=condition[[row]],
            negative_prompt_embeds=empty,
            num_frames=FRAMES,
            num_inference_steps=3,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(5 + row),
            output_type="pt",
        ).frames
        assert torch.equal(video.frames, Video.load(wanted, fps=4).frames)
    assert (made[0].frames.shape, made[0].fps) == ((FRAMES, 3, RESOLUTION, RESOLUTION), 4)
    assert torch.equal(pixels(decoder.sample(condition[1:2], seed=6, steps=3, guidance=3.0))[0], pixels(made)[1])


def test_sizes_come_from_the_arguments_then_the_folder_then_the_class(model):
    def sizes(**arguments):
        decoder = ModelScope(model, **arguments)
        return decoder.frames, decoder.fps, decoder.resolution

    assert sizes() == (FRAMES, 4.0, (RESOLUTION, RESOLUTION))
    assert sizes(frames=5, fps=6, resolution=[16, 24]) == (5, 6.0, (16, 24))
    edit(model / "mmbridge.json", resolution=[24, 16])
    assert sizes() == (FRAMES, 4.0, (24, 16))
    (model / "mmbridge.json").write_text("{}")
    assert sizes() == (24, 8.0, (RESOLUTION, RESOLUTION))
    assert (ModelScope(model).steps, ModelScope(model).guidance) == (50, 9.0)
    with pytest.raises(ConfigError, match=r"videos have 0 frames but need a positive number\."):
        sizes(frames=0)
    for resolution in ([20, 16], [16], 16):
        with pytest.raises(ConfigError, match=r"must be \[height, width\], positive multiples of 8 pixels"):
            sizes(resolution=resolution)


def test_oblong_videos(model):
    decoder = ModelScope(model, frames=2, resolution=[8, 24])
    condition, _ = decoder.encode(CAPTIONS[:1])
    assert decoder.sample(condition)[0].frames.shape == (2, 3, 8, 24)
    target = decoder.target(videos(1, 7, 20, 30))
    assert target.shape == (1, 8, 2, 4, 12)
    assert decoder.loss(condition, target).isfinite()
    assert decoder.fingerprint != ModelScope(model).fingerprint


def test_target_holds_the_moments_of_evenly_spread_frames(parts):
    decoder = ModelScope.from_components(**parts, frames=FRAMES)
    (video,) = videos(1, 9)
    with torch.no_grad():
        posterior = parts["vae"].encode(video.frames[[1, 4, 7]] / 127.5 - 1).latent_dist
    wanted = torch.cat([posterior.mean, posterior.logvar], dim=1).transpose(0, 1)[None]
    assert_close(decoder.target([video]), wanted, atol=1e-5, rtol=1e-5)
    short = decoder.target([Video(video.frames[:1], 8)])
    assert_close(short[:, :, 0], short[:, :, -1], rtol=0, atol=0)


def test_loss_is_that_of_the_papers(parts):
    decoder = ModelScope.from_components(**parts, frames=FRAMES)
    condition = torch.randn(2, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    target = decoder.target(videos(2))
    loss = decoder.loss(condition, target, torch.Generator().manual_seed(2), None)

    generator = torch.Generator().manual_seed(2)
    mean, log_variance = target.chunk(2, dim=1)
    latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
    latents = latents * parts["vae"].config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    steps = torch.randint(0, 1000, (2,), generator=generator)
    alpha_bar = parts["scheduler"].alphas_cumprod[steps].view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        guess = parts["unet"](alpha_bar.sqrt() * latents + (1 - alpha_bar).sqrt() * noise, steps, condition).sample
    assert_close(loss, (guess - noise).square().mean(), rtol=1e-4, atol=0)
    with pytest.raises(
        ShapeError, match=r"\(2, 8, 2, 8, 8\) instead of \(2, 8, 3, 8, 8\); make it with this decoder's"
    ):
        decoder.loss(condition, target[:, :, 1:])


def test_decoders_to_pictures_and_videos_share_equal_components(model, shipped):
    """ModelScope's VAE is Stable Diffusion's; here the text encoder is too."""
    film, paint = ModelScope(model), StableDiffusion(shipped)
    film.loss(film.encode(CAPTIONS)[0], film.target(videos(3)))
    paint.loss(paint.encode(CAPTIONS)[0], paint.target([Image(torch.zeros(3, 16, 16, dtype=torch.uint8))] * 3))
    assert film.vae is paint.vae and film.text_encoder is paint.text_encoder
    assert film.unet is not paint.unet


def test_components_of_different_models_are_refused(model):
    edit(model / "unet" / "config.json", cross_attention_dim=24)
    with pytest.raises(ShapeError, match="UNet attends to conditions of width 24 but its text encoder gives width 16"):
        _ = ModelScope(model).spec
