"""The Stable Diffusion decoder against diffusers' own pipeline and the papers' formulas."""

import io
import json
import logging
import subprocess
import sys

import pytest
import torch
from decoders import tiny_decoders
from decoders.tiny_decoders import DIM, RESOLUTION, SCHEDULE, TOKENS
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, EulerDiscreteScheduler, PNDMScheduler
from diffusers.training_utils import compute_snr
from torch.testing import assert_close

from mmbridge.decoders import StableDiffusion
from mmbridge.errors import CheckpointError, ConfigError, MediaError, ShapeError
from mmbridge.media import Image
from mmbridge.specs import ConditionSpec

CAPTIONS = ["a red blob", "red", "wide"]


def edit(file, **changes):
    values = json.loads(file.read_text())
    file.write_text(json.dumps({**values, **changes}))


def pictures(count, side=RESOLUTION, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [Image(torch.randint(256, (3, side, side), generator=generator, dtype=torch.uint8)) for _ in range(count)]


def pixels(images):
    return torch.stack([image.pixels for image in images]).int()


# Loading ------------------------------------------------------------------------------------------------------------


def test_spec_needs_the_configurations_only_and_no_diffusers(folder):
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    code = f"""
import sys
from mmbridge import decoders
decoder = decoders.StableDiffusion({str(folder)!r})
assert (decoder.spec.tokens, decoder.spec.dim, decoder.resolution) == {(TOKENS, DIM, RESOLUTION)}
assert (decoder.steps, decoder.guidance) == (3, 2.0)
print([name for name in ("diffusers", "transformers") if name in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_importing_the_package_loads_no_torch():
    code = "import sys, mmbridge.decoders; print('torch' in sys.modules, 'Decoder' in dir(mmbridge.decoders))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False True", result.stderr


def test_components_are_loaded_when_they_are_first_used(shipped):
    decoder = StableDiffusion(shipped)
    assert decoder.spec == ConditionSpec(TOKENS, DIM) and not list(decoder.parameters())
    condition, _ = decoder.encode(CAPTIONS)
    assert [name for name, _ in decoder.named_children()] == ["text_encoder"]
    decoder.loss(condition, decoder.target(pictures(3)))
    assert {name for name, _ in decoder.named_children()} == {"text_encoder", "unet", "vae"}


def test_published_models_are_planned_on_the_meta_device_without_their_weights(shipped):
    """Their configurations travel with the package, so nothing is downloaded."""
    with torch.device("meta"):
        published = StableDiffusion("stable-diffusion-v1-5/stable-diffusion-v1-5")
        local = StableDiffusion(shipped)
    assert (published.spec, published.resolution) == (ConditionSpec(77, 768), 512)
    assert (local.spec, local.resolution) == (ConditionSpec(TOKENS, DIM), RESOLUTION)


def test_defaults_come_from_the_folder_then_from_the_class_and_arguments_win(shipped, folder):
    (folder / "mmbridge.json").unlink()
    plain, given = StableDiffusion(folder), StableDiffusion(shipped, steps=7, guidance=0.0)
    assert [(decoder.steps, decoder.guidance) for decoder in (plain, given)] == [(50, 7.5), (7, 0.0)]


@pytest.mark.parametrize("content", ["[]", '{"steps": "many"}'])
def test_defaults_that_make_no_sense_are_refused(folder, content):
    (folder / "mmbridge.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"mmbridge\.json must hold an object such as .*steps"):
        _ = StableDiffusion(folder).steps


def test_the_licence_is_told_once_per_source(folder, caplog):
    (folder / "mmbridge.json").unlink()
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\nA model.\n")
    with caplog.at_level(logging.INFO, "mmbridge"):
        for _ in range(2):
            StableDiffusion(folder).encode(CAPTIONS)
    assert [record.message for record in caplog.records] == [f"{folder}: licence creativeml-openrail-m"]
    assert StableDiffusion(folder).describe()["licence"] == "creativeml-openrail-m"


def test_loading_and_sampling_write_nothing_to_the_screen(shipped, capfd):
    decoder = StableDiffusion(shipped)
    condition, _ = decoder.encode(CAPTIONS)
    decoder.sample(condition, steps=2)
    assert capfd.readouterr() == ("", "")
    decoder.sample(condition, steps=2, progress=True)
    assert "2/2" in capfd.readouterr().err


# Conditions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
def test_encode_is_what_diffusers_encodes(components, masked):
    components["text_encoder"].config.use_attention_mask = masked
    wanted, _ = tiny_decoders.stable_diffusion_pipeline(components).encode_prompt(CAPTIONS, "cpu", 1, False)
    condition, mask = StableDiffusion.from_components(**components).encode(CAPTIONS)
    assert_close(condition, wanted, rtol=0, atol=0)
    assert not condition.requires_grad and condition.shape == (3, TOKENS, DIM)
    words = components["tokenizer"](CAPTIONS)["input_ids"]
    assert mask.dtype == torch.bool and mask.sum(1).tolist() == [len(ids) for ids in words]
    assert mask[0].tolist() == sorted(mask[0].tolist(), reverse=True), "own positions come first"


def test_tokenizers_are_loaded_from_either_kind_of_files(shipped, folder):
    from transformers import PreTrainedTokenizerFast

    wanted, mask = StableDiffusion(shipped).encode(CAPTIONS)
    fast = PreTrainedTokenizerFast(
        tokenizer_file=str(shipped / "tokenizer" / "tokenizer.json"),
        model_max_length=TOKENS,
        pad_token="<|endoftext|>",
    )
    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    fast.save_pretrained(folder / "tokenizer")
    condition, its_mask = StableDiffusion(folder).encode(CAPTIONS)
    assert_close((condition, its_mask), (wanted, mask), rtol=0, atol=0)

    for file in (folder / "tokenizer").iterdir():
        file.unlink()
    (folder / "tokenizer").rmdir()
    tiny_decoders.write_clip_vocabulary(folder / "tokenizer")
    (folder / "tokenizer" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "pad_token": "<|endoftext|>"})
    )
    condition, its_mask = StableDiffusion(folder).encode(CAPTIONS)
    assert_close((condition, its_mask), (wanted, mask), rtol=0, atol=0)


def test_a_caption_that_is_too_long_is_cut_and_said_so(shipped, caplog):
    condition, mask = StableDiffusion(shipped).encode(["red " * 30, "red"])
    assert condition.shape == (2, TOKENS, DIM) and mask[0].all()
    assert f"1 of 2 captions were cut at {TOKENS} tokens" in caplog.text


@pytest.mark.parametrize("captions", [[], "a red blob"])
def test_encode_takes_a_list(shipped, captions):
    with pytest.raises(ConfigError, match="takes a list of one or more captions"):
        StableDiffusion(shipped).encode(captions)


def test_weights_saved_with_the_prefix_of_older_libraries_load(shipped, folder):
    from safetensors.torch import load_file, save_file

    file = folder / "text_encoder" / "model.safetensors"
    state = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in load_file(file).items()}
    state["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    save_file(state, file, metadata={"format": "pt"})
    assert_close(StableDiffusion(folder).encode(CAPTIONS), StableDiffusion(shipped).encode(CAPTIONS), rtol=0, atol=0)


# Sampling -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler, EulerAncestralDiscreteScheduler]
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_sample_is_what_diffusers_paints(components, scheduler, prediction):
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    components["scheduler"] = scheduler(**SCHEDULE, steps_offset=1, prediction_type=prediction, **options)
    if scheduler is DDIMScheduler:
        components["scheduler"].register_to_config(clip_sample=False)
    pipeline = tiny_decoders.stable_diffusion_pipeline(components)
    condition, empty = pipeline.encode_prompt(CAPTIONS, "cpu", 1, True)
    wanted = pipeline(
        prompt_embeds=condition,
        negative_prompt_embeds=empty,
        num_inference_steps=4,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6, 7)],
        output_type="pil",
    ).images
    decoder = StableDiffusion.from_components(**components)
    made = decoder.sample(condition, seed=5, steps=4, guidance=3.0)
    assert made[0].pixels.shape == (3, RESOLUTION, RESOLUTION)
    # The empty caption is encoded alone here and in a batch there, which may round differently.
    assert_close(pixels(made), pixels([Image.load(picture) for picture in wanted]), atol=1, rtol=0)


def test_a_seed_gives_the_same_picture_whatever_its_neighbours(shipped):
    decoder = StableDiffusion(shipped)
    condition, _ = decoder.encode(CAPTIONS)
    first = pixels(decoder.sample(condition, seed=[1, 2, 3]))
    assert torch.equal(first, pixels(decoder.sample(condition, seed=1))), "one number counts up along the rows"
    assert torch.equal(first, pixels(decoder.sample(condition, seed=[1, 2, 3]))), "equal seeds, equal pictures"
    turned = pixels(decoder.sample(condition.flip(0), seed=[3, 2, 1])).flip(0)
    assert torch.equal(first, turned)
    alone = pixels(decoder.sample(condition[1:2], seed=2))
    assert_close(alone[0], first[1], atol=1, rtol=0)  # other batch sizes may round differently
    others = pixels(decoder.sample(condition, seed=[1, 9, 3]))
    assert torch.equal(others[0], first[0]) and (others[1] - first[1]).abs().max() > 8


def test_guidance_and_steps_matter(shipped):
    decoder = StableDiffusion(shipped)
    condition, _ = decoder.encode(CAPTIONS)
    default = pixels(decoder.sample(condition))
    assert torch.equal(default, pixels(decoder.sample(condition, steps=3, guidance=2.0))), "the folder's own"
    assert not torch.equal(default, pixels(decoder.sample(condition, steps=5)))
    assert not torch.equal(default, pixels(decoder.sample(condition, guidance=60.0)))


def test_the_empty_caption_is_encoded_once_and_never_without_guidance(components):
    calls = []
    components["text_encoder"].register_forward_hook(lambda *_: calls.append(1))
    decoder = StableDiffusion.from_components(**components, steps=1)
    condition = torch.randn(2, TOKENS, DIM)
    decoder.sample(condition, guidance=1.0)
    assert len(calls) == 0
    for seed in range(3):
        decoder.sample(condition, seed=seed)
    assert len(calls) == 1
    assert components["scheduler"].num_inference_steps is None, "sampling leaves no trace in the components"


def test_the_text_encoder_does_not_stay_for_the_empty_caption_alone(shipped):
    decoder = StableDiffusion(shipped)
    decoder.sample(torch.zeros(1, TOKENS, DIM))
    assert not decoder.is_loaded("text_encoder") and decoder.is_loaded("unet")
    decoder.encode(CAPTIONS)
    decoder.unconditional()
    assert decoder.is_loaded("text_encoder")


def test_the_resolution_can_be_chosen(shipped):
    decoder = StableDiffusion(shipped, resolution=24)
    condition, _ = decoder.encode(CAPTIONS[:1])
    assert decoder.sample(condition)[0].pixels.shape == (3, 24, 24)
    assert decoder.loss(condition, decoder.target(pictures(1))).isfinite()
    with pytest.raises(ConfigError, match="resolution is 20 but must be a positive multiple of 8"):
        _ = StableDiffusion(shipped, resolution=20).resolution


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_half_precision(shipped, dtype):
    decoder = StableDiffusion(shipped, dtype=dtype)
    condition, _ = decoder.encode(CAPTIONS)
    assert condition.dtype == torch.bfloat16
    reference = StableDiffusion(shipped)
    assert_close(condition.float(), reference.encode(CAPTIONS)[0], atol=0.05, rtol=0.05)
    target = decoder.target(pictures(3))
    loss = decoder.loss(condition, target, torch.Generator().manual_seed(0))
    wanted = reference.loss(condition.float(), target.float(), torch.Generator().manual_seed(0))
    assert loss.dtype == torch.float32
    assert_close(loss, wanted, rtol=0.05, atol=0)
    assert (pixels(decoder.sample(condition)) - pixels(reference.sample(condition.float()))).abs().float().mean() < 4
    assert all(parameter.dtype == torch.bfloat16 for parameter in decoder.parameters())


def test_weights_stored_in_half_precision_load_as_asked(components, tmp_path):
    for name in ("unet", "vae", "text_encoder"):
        components[name].half()
    tiny_decoders.stable_diffusion_pipeline(components).save_pretrained(tmp_path / "half")
    decoder = StableDiffusion(tmp_path / "half")
    decoder.loss(decoder.encode(CAPTIONS)[0], decoder.target(pictures(3)))
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.float32}


def test_a_cast_decoder_loads_what_is_missing_in_its_new_dtype(shipped):
    decoder = StableDiffusion(shipped)
    decoder.encode(CAPTIONS)
    decoder.to(torch.bfloat16)
    decoder.loss(decoder.encode(CAPTIONS)[0], decoder.target(pictures(3)))
    assert {parameter.dtype for parameter in decoder.parameters()} == {torch.bfloat16}


def test_unusable_requests_are_refused(shipped):
    decoder = StableDiffusion(shipped)
    condition = torch.zeros(2, TOKENS, DIM)
    with pytest.raises(ShapeError, match=rf"\(B, {TOKENS}, {DIM}\) with B >= 1 but was given \(2, {TOKENS}, 8\)"):
        decoder.sample(condition[..., :8])
    with pytest.raises(ShapeError, match=r"was given \(0, 12, 16\)"):
        decoder.sample(condition[:0])
    with pytest.raises(ConfigError, match="3 seeds were given for 2 conditions"):
        decoder.sample(condition, seed=[1, 2, 3])
    with pytest.raises(ConfigError, match=r"sampling steps is 0 but must be in 1\.\.1000"):
        decoder.sample(condition, steps=0)
    with pytest.raises(MediaError, match=r"computed NaN in torch\.float32"):
        decoder.sample(condition * float("nan"))
    with pytest.raises(ConfigError, match="dtype of a decoder is 'int8' but must be one of float32"):
        StableDiffusion(shipped, dtype="int8")


# The denoising loss -------------------------------------------------------------------------------------------------


def test_target_holds_the_moments_of_the_posterior(components):
    decoder = StableDiffusion.from_components(**components)
    images = pictures(2)
    target = decoder.target(images)
    inputs = torch.stack([image.pixels for image in images]) / 127.5 - 1
    with torch.no_grad():
        posterior = components["vae"].encode(inputs).latent_dist
    assert_close(target, torch.cat([posterior.mean, posterior.logvar], dim=1), atol=1e-5, rtol=1e-5)
    assert not target.requires_grad
    assert decoder.target(pictures(1, side=40)).shape == (1, 8, 8, 8), "pictures of any size are resized"
    with pytest.raises(MediaError, match="needs one or more images"):
        decoder.target([])


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [5.0, None])
def test_loss_is_that_of_the_papers(components, scheduler, prediction, gamma):
    components["scheduler"] = scheduler(**SCHEDULE, prediction_type=prediction)
    decoder = StableDiffusion.from_components(**components)
    images, condition = pictures(6), torch.randn(6, TOKENS, DIM, generator=torch.Generator().manual_seed(1))

    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        posterior = components["vae"].encode(torch.stack([image.pixels for image in images]) / 127.5 - 1).latent_dist
        latents = posterior.sample(generator) * components["vae"].config.scaling_factor
        noise = torch.randn(latents.shape, generator=generator)
        steps = torch.randint(0, 1000, (6,), generator=generator)
        alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
        total = 0.0
        for row, step in enumerate(steps.tolist()):  # one by one, in the terms of arXiv 2303.09556
            signal, sigma = alpha_bar[step].sqrt(), (1 - alpha_bar[step]).sqrt()
            noisy = signal * latents[row] + sigma * noise[row]
            guess = components["unet"](noisy[None], step, condition[row][None]).sample[0]
            wanted = noise[row] if prediction == "epsilon" else signal * noise[row] - sigma * latents[row]
            snr = (signal / sigma) ** 2
            weight = 1.0 if gamma is None else min(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
            total += weight * (guess - wanted).pow(2).mean() / 6
    loss = decoder.loss(condition, decoder.target(images), torch.Generator().manual_seed(2), gamma)
    assert_close(loss, total, rtol=1e-4, atol=0)
    assert_close(compute_snr(DDIMScheduler(**SCHEDULE), steps)[-1], snr, rtol=1e-3, atol=0)


def test_gradients_reach_the_condition_and_no_frozen_weight(shipped):
    decoder = StableDiffusion(shipped).train()
    condition, target = decoder.encode(CAPTIONS)[0], decoder.target(pictures(3))
    frozen = {name: value.clone() for name, value in decoder.state_dict().items()}
    condition.requires_grad_()
    optimizer = torch.optim.SGD([condition], lr=0.1)
    losses = []
    for _ in range(4):
        loss = decoder.loss(condition, target, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True) and losses[0] > losses[-1], "the condition learns"
    assert condition.grad.abs().sum(dim=(1, 2)).gt(0).all()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in decoder.parameters())
    assert not any(module.training for module in decoder.modules())
    assert all(torch.equal(value, frozen[name]) for name, value in decoder.state_dict().items() if name in frozen)


def test_loss_under_autocast(shipped):
    decoder = StableDiffusion(shipped)
    condition, target = decoder.encode(CAPTIONS)[0].requires_grad_(), decoder.target(pictures(3))
    plain = decoder.loss(condition, target, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = decoder.loss(condition, target, torch.Generator().manual_seed(0))
    mixed.backward()
    assert_close(mixed, plain, rtol=0.02, atol=0)
    assert condition.grad.isfinite().all()


def test_weights_loaded_under_inference_mode_still_pass_gradients(shipped):
    """Validation loops run in inference mode and may be the first to paint."""
    decoder = StableDiffusion(shipped)
    with torch.inference_mode():
        decoder.sample(torch.zeros(1, TOKENS, DIM))
        decoder.encode(CAPTIONS)
    condition = torch.zeros(3, TOKENS, DIM, requires_grad=True)
    decoder.loss(condition, decoder.target(pictures(3))).backward()
    assert condition.grad.abs().sum() > 0
    decoder.sample(condition)


def test_targets_that_do_not_fit_are_refused(shipped):
    decoder = StableDiffusion(shipped)
    condition, target = decoder.encode(CAPTIONS)[0], decoder.target(pictures(3))
    with pytest.raises(
        ShapeError, match=r"\(2, 8, 8, 8\) instead of \(3, 8, 8, 8\); make it with this decoder's target"
    ):
        decoder.loss(condition, target[:2])
    with pytest.raises(ShapeError, match=r"\(3, 4, 8, 8\) instead of \(3, 8, 8, 8\)"):
        decoder.loss(condition, target[:, :4])
    with pytest.raises(ShapeError, match=r"takes conditions of shape \(B, 12, 16\)"):
        decoder.loss(condition[:, :5], target)


# Parts that do not fit ----------------------------------------------------------------------------------------------


def test_components_of_different_models_are_refused(folder):
    edit(folder / "text_encoder" / "config.json", hidden_size=24)
    with pytest.raises(ShapeError, match="UNet attends to conditions of width 16 but its text encoder gives width 24"):
        _ = StableDiffusion(folder).spec
    edit(folder / "text_encoder" / "config.json", hidden_size=DIM)
    edit(folder / "vae" / "config.json", latent_channels=9)
    with pytest.raises(ShapeError, match="UNet takes 4 channels but its VAE makes 9"):
        _ = StableDiffusion(folder).spec


def test_a_folder_of_another_model_is_refused(folder):
    (folder / "unet" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"configuration of unet in decoder .* has no 'cross_attention_dim'"):
        _ = StableDiffusion(folder).spec


def test_a_unet_of_unequal_sides_needs_a_resolution(folder):
    edit(folder / "unet" / "config.json", sample_size=[8, 12])
    with pytest.raises(ConfigError, match=r"sample_size \[8, 12\]; give a resolution"):
        _ = StableDiffusion(folder).resolution


def test_pictures_survive_saving(shipped, tmp_path):
    decoder = StableDiffusion(shipped)
    picture = decoder.sample(decoder.encode(CAPTIONS[:1])[0])[0]
    picture.save(tmp_path / "out.png")
    assert torch.equal(Image.load(io.BytesIO((tmp_path / "out.png").read_bytes()).getvalue()).pixels, picture.pixels)
