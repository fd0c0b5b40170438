"""The AudioLDM 2 decoder against diffusers' own pipeline."""

import json

import pytest
import torch
from decoders import tiny_decoders
from decoders.tiny_decoders import TOKENS
from torch.testing import assert_close
from transformers import GPT2LMHeadModel

from mmbridge.decoders import AudioLDM2
from mmbridge.errors import ConfigError, ShapeError
from mmbridge.specs import ConditionSpec

CAPTIONS = ["a red blob", "red", "wide"]
GENERATED, OWN, STATES = 3, 16, 24  # positions and widths of the tiny parts

SETTINGS = {"mel": {"n_fft": 32, "win_length": 32, "high": 500}}


@pytest.fixture
def parts(tmp_path):
    return tiny_decoders.audioldm2_parts(tmp_path / "files")


@pytest.fixture
def model(tmp_path):
    return tiny_decoders.audioldm2(tmp_path / "folder")["source"]


@pytest.fixture
def pipeline(parts):
    """diffusers' own, whose loop asks for methods of transformers' generation."""
    language_model = GPT2LMHeadModel(parts["language_model"].config).eval()
    language_model.transformer = parts["language_model"]
    return tiny_decoders.audioldm2_pipeline({**parts, "language_model": language_model})


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_encode_is_what_diffusers_encodes(parts, pipeline):
    decoder = AudioLDM2.from_components(**parts, tokens=TOKENS, settings=SETTINGS)
    assert decoder.spec == ConditionSpec(GENERATED + TOKENS, STATES + 1)
    condition, mask = decoder.encode(CAPTIONS)
    for row, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            states, seen, generated = pipeline.encode_prompt([caption], "cpu", 1, False, max_new_tokens=GENERATED)
        length = states.shape[1]
        assert_close(condition[row, :GENERATED, :OWN], generated[0], atol=1e-5, rtol=1e-5)  # it keeps a cache
        assert_close(condition[row, GENERATED : GENERATED + length, :STATES], states[0], rtol=0, atol=0)
        assert seen.all() and mask[row].tolist() == [True] * (GENERATED + length) + [False] * (TOKENS - length)
        assert not condition[row, :GENERATED, OWN:-1].any() and not condition[row, GENERATED + length :].any()
    assert_close(condition[..., -1], mask.float())
    assert_close(decoder.encode(CAPTIONS[1:2])[0][0], condition[1], atol=1e-5, rtol=1e-5)


def test_sample_is_what_diffusers_plays(parts, pipeline):
    decoder = AudioLDM2.from_components(**parts, tokens=TOKENS, settings=SETTINGS)
    condition, _ = decoder.encode([CAPTIONS[0]])
    empty = decoder.unconditional()[None]

    def prompt(prefix, rows):
        return {
            f"{prefix}prompt_embeds": rows[:, GENERATED:, :STATES],
            f"{prefix}generated_prompt_embeds": rows[:, :GENERATED, :OWN],
            f"{prefix}attention_mask": rows[:, GENERATED:, -1].long(),
        }

    (wanted,) = pipeline(
        **prompt("", condition),
        **prompt("negative_", empty),
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).audios
    seen = []
    (made,) = decoder.sample(
        condition, seed=5, steps=4, guidance=3.0, preview=lambda *news: seen.append((*news[:3], news[3]()))
    )
    assert_close(made.samples, wanted, rtol=0, atol=0)
    assert [news[:3] for news in seen] == [(0, step, 4) for step in (1, 2, 3, 4)]
    assert_close(seen[-1][3][0].samples, wanted[0] if wanted.ndim > 1 else wanted, rtol=0, atol=1e-6)
    (alone,) = pipeline(
        CAPTIONS[0],
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
        max_new_tokens=GENERATED,
    ).audios
    assert_close(decoder.sample(condition, seed=5, steps=4, guidance=1.0)[0].samples, alone, atol=1e-5, rtol=1e-4)


def test_padding_is_not_seen(parts):
    decoder = AudioLDM2.from_components(**parts, tokens=TOKENS, settings=SETTINGS)
    condition, mask = decoder.encode(["red"])
    noisy, time = torch.randn(1, *decoder.latent_shape), torch.tensor([500])
    changed = torch.where(mask[..., None], condition, torch.tensor([7.0] * STATES + [0.4]))
    with torch.no_grad():
        before, after, seen = (
            decoder.denoise(noisy, time, rows) for rows in (condition, changed, changed + (changed == 0.4))
        )
    assert_close(after, before)
    assert (seen - before).abs().max() > 1e-6


def test_settings_and_misfits(model):
    assert (AudioLDM2(model).steps, AudioLDM2(model).guidance, AudioLDM2(model).spec.tokens) == (3, 2.0, GENERATED + 64)
    assert AudioLDM2(model).fingerprint != AudioLDM2(model, tokens=8).fingerprint
    with pytest.raises(ConfigError, match="tokens=0 positions for a caption but needs at least 1"):
        AudioLDM2(model, tokens=0)
    edit(model / "projection_model" / "config.json", text_encoder_dim=9)
    with pytest.raises(ShapeError, match="text encoder projects to width 16 but its projection model takes 9"):
        _ = AudioLDM2(model).spec
    edit(model / "text_encoder_2" / "config.json", d_model=32)
    with pytest.raises(ShapeError, match=r"UNet attends to states of widths \[16, 24\] but .* give \[16, 32\]"):
        _ = AudioLDM2(model).spec
