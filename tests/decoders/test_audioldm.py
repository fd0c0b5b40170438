"""The AudioLDM decoder against diffusers' own pipeline, the papers' formulas and a mel spectrogram by the definition."""

import json
import math

import numpy as np
import pytest
import torch
from decoders import tiny_decoders
from decoders.tiny_decoders import BINS, DIM, HOP, RATE, SCHEDULE, TOKENS
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch.testing import assert_close

from mmbridge.decoders import AudioLDM
from mmbridge.decoders.latent_diffusion import import_pipeline
from mmbridge.errors import CheckpointError, ConfigError, MissingExtraError, ShapeError
from mmbridge.media import Audio
from mmbridge.specs import ConditionSpec

CAPTIONS = ["a red blob", "red", "wide"]
MEL = {"n_fft": 32, "win_length": 32, "high": 500}


@pytest.fixture
def parts(tmp_path):
    return tiny_decoders.audioldm_parts(tmp_path / "files")


@pytest.fixture
def model(tmp_path):
    return tiny_decoders.audioldm(tmp_path / "folder")["source"]


@pytest.fixture
def decoder(parts):
    return AudioLDM.from_components(**parts, settings={"mel": MEL})


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def sounds(count, length=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Audio(torch.rand(length, generator=generator) - 0.5, RATE) for _ in range(count)]


def waves(made):
    return torch.stack([audio.samples for audio in made])


def test_encode_is_what_diffusers_encodes(parts, decoder):
    wanted = tiny_decoders.audioldm_pipeline(parts)._encode_prompt(CAPTIONS, "cpu", 1, False)
    condition, mask = decoder.encode(CAPTIONS)
    assert_close(condition[:, 0], wanted, rtol=0, atol=0)
    assert decoder.spec == ConditionSpec(1, DIM, normalized=True)
    assert mask.shape == (3, 1) and mask.all()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_sample_is_what_diffusers_plays(parts, scheduler):
    options = {"clip_sample": False} if scheduler is DDIMScheduler else {}
    parts["scheduler"] = scheduler(**SCHEDULE, steps_offset=1, **options)
    decoder = AudioLDM.from_components(**parts, settings={"mel": MEL})
    pipeline = tiny_decoders.audioldm_pipeline(parts)
    with torch.no_grad():
        condition, empty = (pipeline._encode_prompt(texts, "cpu", 1, False) for texts in (CAPTIONS, [""]))
    wanted = pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=empty.expand(3, -1),
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        output_type="pt",
    ).audios
    seen = []
    made = decoder.sample(
        condition[:, None], seed=5, steps=4, guidance=3.0, preview=lambda *news: seen.append((*news[:3], news[3]()))
    )
    assert_close(waves(made), wanted, rtol=0, atol=1e-7)  # one value in 200 differs in its last bit
    assert [news[:3] for news in seen] == [(0, step, 4) for step in (1, 2, 3, 4)]
    assert_close(waves(seen[-1][3]), wanted, rtol=0, atol=1e-6)
    assert {(audio.sample_rate, len(audio.samples)) for audio in made} == {(RATE, 64)}
    assert waves(made).std() > 1e-4


def test_sampling_says_nothing_and_needs_no_text_encoder_without_guidance(model, capfd):
    decoder = AudioLDM(model)
    decoder.sample(torch.nn.functional.normalize(torch.ones(1, 1, DIM), dim=-1), guidance=1.0)
    assert {name for name, _ in decoder.named_children()} == {"unet", "vae", "vocoder"}
    assert capfd.readouterr() == ("", "")


def test_defaults_come_from_folder_and_class(model):
    folder = AudioLDM(model)
    assert (folder.steps, folder.guidance, folder.seconds) == (3, 2.0, 0.064)
    edit(model / "mmbridge.json", seconds=0.05)
    assert (AudioLDM(model).seconds, AudioLDM(model, seconds=0.04).seconds) == (0.05, 0.04)
    (model / "mmbridge.json").write_text("{}")
    assert (AudioLDM(model).steps, AudioLDM(model).guidance) == (200, 2.5)


def test_sounds_of_any_length(model):
    decoder = AudioLDM(model, seconds=0.054)  # 13 frames and a half, which the VAE needs to be even
    condition, _ = decoder.encode(CAPTIONS[:1])
    assert len(decoder.sample(condition)[0].samples) == 54
    target = decoder.target(sounds(1))
    assert target.shape == (1, 8, 7, BINS // 2) and decoder.latent_shape == (4, 7, BINS // 2)
    assert decoder.loss(condition, target).isfinite()
    with pytest.raises(ConfigError, match=r"sounds last 0\.01 s but must last at least 0\.017 s"):
        _ = AudioLDM(model, seconds=0.01).seconds
    assert len({AudioLDM(model, seconds=seconds).fingerprint for seconds in (None, 0.064, 0.054)}) == 2


# The mel front end ------------------------------------------------------------------------------------------------


def by_definition(samples, n_fft, hop, bins, high, rate, pad):
    """Slaney's mel scale and areas, a periodic Hann window, mirrored ends; in NumPy, frame by frame."""

    def hertz(mel):
        return mel * 200 / 3 if mel < 15 else 1000 * math.exp((mel - 15) * math.log(6.4) / 27)

    top = high * 3 / 200 if high < 1000 else 15 + 27 * math.log(high / 1000) / math.log(6.4)
    edges = [hertz(top * index / (bins + 1)) for index in range(bins + 2)]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    padded = np.pad(samples, pad, mode="reflect")
    rows = []
    for start in range(0, len(samples), hop):
        spectrum = np.abs(np.fft.rfft(padded[start : start + n_fft] * window))
        row = []
        for low, centre, end in zip(edges, edges[1:], edges[2:], strict=False):
            line = np.arange(len(spectrum)) * rate / n_fft
            triangle = np.maximum(0, np.minimum((line - low) / (centre - low), (end - line) / (end - centre)))
            row.append(math.log(max(1e-5, float((triangle * 2 / (end - low) * spectrum).sum()))))
        rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(("high", "pad"), [(400, None), (3000, None), (400, 14)])
def test_log_mel_is_the_one_of_the_definition(parts, high, pad):
    """HiFi-GAN's own training mirrors 14 samples where AudioLDM's mirrors half a window."""
    rate = 1000 if high < 500 else 8000
    parts["vocoder"].config.sampling_rate = rate
    mel = {"n_fft": 32, "win_length": 32, "high": high, "pad": pad, "peak": None}
    decoder = AudioLDM.from_components(**parts, settings={"mel": mel})
    (sound,) = sounds(1, 64)
    sound = Audio(sound.samples, rate)
    wanted = by_definition(sound.samples.double().numpy(), 32, HOP, BINS, high, rate, pad or 16)
    assert_close(decoder.log_mel(sound), wanted.float(), atol=2e-4, rtol=0)


def test_published_sounds_are_normalised_then_cut_or_filled(decoder):
    (sound,) = sounds(1, 48)
    centred = sound.samples - sound.samples.mean()
    scaled = torch.nn.functional.pad(centred * 0.5 / centred.abs().max(), (0, 16))
    wanted = by_definition(scaled.double().numpy(), 32, HOP, BINS, 500, RATE, 16).float()
    assert_close(decoder.log_mel(sound), wanted, atol=2e-4, rtol=0)
    assert_close(decoder.log_mel(Audio(sound.samples / 4, RATE)), wanted, atol=2e-4, rtol=0)
    longer = Audio(torch.cat([sound.samples, sound.samples.new_zeros(200)]), RATE)
    assert decoder.log_mel(longer).shape == (16, BINS)
    assert decoder.log_mel(Audio(torch.zeros(64), RATE)).eq(math.log(1e-5)).all(), "silence is a sound"


def test_target_holds_the_moments_of_the_posterior(parts, decoder):
    media = sounds(2)
    target = decoder.target(media)
    with torch.no_grad():
        posterior = parts["vae"].encode(torch.stack([decoder.log_mel(sound)[None] for sound in media])).latent_dist
    assert_close(target, torch.cat([posterior.mean, posterior.logvar], dim=1), atol=1e-5, rtol=1e-5)
    assert target.shape == (2, 8, 8, BINS // 2)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_that_of_the_papers(parts, prediction):
    scheduler = parts["scheduler"] = DDIMScheduler(**SCHEDULE, prediction_type=prediction)
    decoder = AudioLDM.from_components(**parts, settings={"mel": MEL})
    condition = torch.nn.functional.normalize(
        torch.randn(4, 1, DIM, generator=torch.Generator().manual_seed(1)), dim=-1
    )
    target = decoder.target(sounds(4))
    loss = decoder.loss(condition, target, torch.Generator().manual_seed(2), 5.0)

    generator = torch.Generator().manual_seed(2)
    mean, log_variance = target.chunk(2, dim=1)
    latents = mean + (0.5 * log_variance).exp() * torch.randn(mean.shape, generator=generator)
    latents = latents * parts["vae"].config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    steps = torch.randint(0, 1000, (4,), generator=generator)
    total = 0.0
    with torch.no_grad():
        for row, step in enumerate(steps.tolist()):
            alpha_bar = scheduler.alphas_cumprod[step]
            signal, sigma, snr = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar / (1 - alpha_bar)
            noisy = (signal * latents[row] + sigma * noise[row])[None]
            guess = parts["unet"](noisy, step, None, class_labels=condition[row]).sample[0]
            wanted = noise[row] if prediction == "epsilon" else signal * noise[row] - sigma * latents[row]
            weight = min(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1)
            total += weight * (guess - wanted).pow(2).mean() / 4
    assert_close(loss, total, rtol=1e-4, atol=0)


# Parts that do not fit ----------------------------------------------------------------------------------------------

MISFITS = {
    "text": (
        "text_encoder",
        {"projection_dim": 9},
        "text encoder projects to width 9 but its UNet is steered by width 16",
    ),
    "film": ("unet", {"projection_class_embeddings_input_dim": None}, "width 16 but its UNet is steered by width 0"),
    "latents": ("vae", {"latent_channels": 9}, "UNet takes 4 channels but its VAE makes 9"),
    "picture": (
        "vae",
        {"in_channels": 3},
        "VAE takes 3 channels but a log-mel spectrogram, as its vocoder takes, has 1",
    ),
    "bins": ("vocoder", {"model_in_dim": 7}, "vocoder takes 7 mel bins but its VAE halves them"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_components_of_different_models_are_refused(model, case):
    part, change, sentence = MISFITS[case]
    edit(model / part / "config.json", **change)
    with pytest.raises(ShapeError, match=sentence):
        _ = AudioLDM(model).spec


def test_a_vocoder_for_another_mel_is_refused(model):
    edit(model / "mmbridge.json", mel={**MEL, "mel_bins": BINS, "hop_length": HOP})
    assert AudioLDM(model).spec.dim == DIM
    edit(model / "vocoder" / "config.json", model_in_dim=16)
    with pytest.raises(ShapeError, match=r"vocoder takes 16 mel bins but the mel front end of mmbridge\.json makes 8"):
        _ = AudioLDM(model).spec
    edit(model / "vocoder" / "config.json", model_in_dim=BINS, upsample_rates=[5, 2])
    with pytest.raises(ShapeError, match=r"vocoder makes 10 samples of a mel frame .* steps by 4"):
        _ = AudioLDM(model).spec


@pytest.mark.parametrize("mel", [[], {"bins": 8}, {"n_fft": None}, {"high": "8 kHz"}, {**MEL, "pad": 13}])
def test_mel_settings_that_make_no_sense_are_refused(model, mel):
    edit(model / "mmbridge.json", mel=mel)
    with pytest.raises(CheckpointError, match=r"'mel' in the mmbridge\.json .* must be an object of numbers"):
        _ = AudioLDM(model).spec


def test_missing_components_and_pipelines_are_named(parts):
    del parts["vocoder"]
    with pytest.raises(ConfigError, match="AudioLDM needs the components .*; vocoder is missing"):
        AudioLDM.from_components(**parts)
    with pytest.raises(MissingExtraError, match=r'has no LostPipeline.*pip install "diffusers==0\.42\.\*"'):
        import_pipeline("LostPipeline", "0.42")


def test_captions_are_cut_where_the_text_encoder_ends(model, caplog):
    assert AudioLDM(model).caption_tokens == TOKENS
    AudioLDM(model).encode(["red " * 30])
    assert f"1 of 1 captions were cut at {TOKENS} tokens" in caplog.text
