"""Rebuild checkpoints/tiny-sd: a small Stable Diffusion (CLIP text encoder, VAE, UNet) that draws the synthetic world.

    python checkpoints/train_stable_diffusion.py vae        # about 15 minutes on one core
    python checkpoints/train_stable_diffusion.py text       # a minute
    python checkpoints/train_stable_diffusion.py unet --steps 10000     # about an hour on one core
    python checkpoints/train_stable_diffusion.py measure    # gold caption -> picture, read by the judges

The folder is an ordinary diffusers pipeline folder. As in Stable Diffusion, the text encoder is trained first and frozen
while the UNet learns: here linear read-outs of its states name the factors of a caption.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import Average, caption_tokenizer, warmup_cosine
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from mmbridge.synthetic import CARRIES, FACTORS, Scene, caption, render_image
from mmbridge.synthetic.judges import judge, judge_image

HERE = Path(__file__).parent
TOKENS, STEPS, GUIDANCE, LATENTS = 20, 20, 2.0, 8


def pictures(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, list[Scene]]:
    """Return (count, 3, 32, 32) floats in -1..1, and their scenes: renderings at half their size."""
    scenes = [Scene.random(rng) for _ in range(count)]
    pixels = np.stack([render_image(scene, int(rng.integers(2**31))) for scene in scenes])
    return F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, 2), scenes


def to_pixels(images: torch.Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def judged(pixels: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    found = [judge_image(image) for image in pixels]
    right = {
        factor: [values[factor] == getattr(scene, factor) for values, scene in zip(found, scenes, strict=True)]
        for factor in CARRIES["image"]
    }
    shares = {factor: float(np.mean(flags)) for factor, flags in right.items()}
    shares["all"] = float(np.mean(np.all(list(right.values()), axis=0)))
    return shares


@torch.no_grad()
def whiten(vae: AutoencoderKL, inputs: torch.Tensor) -> None:
    """Give the principal directions of the inputs' latents like variances, within the two 1x1 convolutions around them.

    The ground's brightness would otherwise be three quarters of what the UNet has to predict, and the object's form and
    place a hundredth.
    """
    channels = vae.config.latent_channels
    posterior = torch.cat([vae.encode(part).latent_dist.parameters for part in inputs.split(128)])
    mean, noise = (
        posterior[:, :channels].movedim(1, -1).reshape(-1, channels),
        posterior[:, channels:].exp().mean((0, 2, 3)),
    )
    centre = mean.mean(0)
    values, directions = torch.linalg.eigh((mean - centre).T.cov())
    scales = (values + 0.01 * values.sum()).rsqrt()  # the last directions are hardly more than the posterior's noise
    forth, back = scales[:, None] * directions.T, directions / scales
    first, last = vae.quant_conv, vae.post_quant_conv
    first.bias[:channels] = forth @ (first.bias[:channels] - centre)
    first.weight[:channels] = torch.einsum("ij,jkhw->ikhw", forth, first.weight[:channels])
    first.weight[channels:] = 0
    first.bias[channels:] = (forth.square() @ noise).log()
    last.bias += last.weight[:, :, 0, 0] @ centre
    last.weight.copy_(torch.einsum("ijhw,jk->ikhw", last.weight, back))
    latents = (mean - centre) @ forth.T
    print(
        "standard deviations of the whitened latents",
        [round(value, 2) for value in latents.std(0).tolist()],
        flush=True,
    )
    vae.register_to_config(scaling_factor=float(1 / latents.std()))


def train_vae(options: argparse.Namespace) -> None:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENTS,
        norm_num_groups=4,  # groups of few channels would normalise brightness away
        sample_size=32,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)
    with torch.no_grad():
        # Start with little posterior noise (standard deviation 0.08); at 1 it drowns colour and outline for long.
        vae.quant_conv.bias[LATENTS:] -= 5
    if options.start:
        vae = AutoencoderKL.from_pretrained(options.start / "vae").to(memory_format=torch.channels_last)
        # The UNet has been trained, or is being trained, on the latents as they are.
        vae.encoder.requires_grad_(False), vae.quant_conv.requires_grad_(False)
    print(f"VAE {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)
    rng = np.random.default_rng(options.seed)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=options.lr or 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps, 50))
    average = Average(vae, decay=0.995)
    started = time.time()
    for step in range(options.steps):
        images = pictures(rng, options.batch_size)[0].to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            posterior = vae.encode(images).latent_dist
            output = vae.decode(posterior.sample()).sample
        output = output.float()
        # Objects are a small, saturated part of the picture; unweighted, the median ground is a good answer to everything.
        # Their surroundings count as much, or holes and notches are filled; and every object counts alike, small or large.
        saturated = F.max_pool2d(images.amax(1, keepdim=True) - images.amin(1, keepdim=True), 7, 1, 3)
        weight = 1 + 0.8 * saturated / saturated.mean((1, 2, 3), keepdim=True)
        difference = output - images
        loss = (weight * (difference.abs() + 2 * difference.square())).mean() + 1e-6 * posterior.kl().float().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        if step % 50 == 0:
            print(f"step {step} loss {loss:.4f} {time.time() - started:.0f} s", flush=True)
        if step % 300 == 299 or step == options.steps - 1:
            average.swap()
            with torch.no_grad():
                images, scenes = pictures(np.random.default_rng(7), 256)
                latents = vae.encode(images).latent_dist.mean
                print(judged(to_pixels(vae.decode(latents).sample), scenes), float(latents.std()), flush=True)
            vae.save_pretrained(options.out / "vae")
            average.swap()
    average.swap()
    if not options.start:
        whiten(vae, pictures(np.random.default_rng(8), 1024)[0])
        vae.save_pretrained(options.out / "vae")
    print(f"VAE done in {time.time() - started:.0f} s", flush=True)


def pipeline(
    vae: AutoencoderKL, text: CLIPTextModel, unet: UNet2DConditionModel, tokenizer: PreTrainedTokenizerFast
) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        # With noise prediction and a last step that is not pure noise, where the object stands is read from what shines
        # through and hardly ever from the caption (arXiv 2305.08891).
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    made = StableDiffusionPipeline(
        vae=vae, text_encoder=text, unet=unet, tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def tokens(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def partial(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that leaves colour or place open, as captions of sounds do."""
    words = f"a {scene.size} {scene.colour + ' ' if rng.random() < 0.3 else ''}{scene.shape}"
    return words + (f" {caption(scene, 'image').split(scene.shape + ' ')[1]}" if rng.random() < 0.2 else "")


@torch.no_grad()
def measure(
    pipe: StableDiffusionPipeline, count: int, seed: int, varied: bool = False
) -> tuple[dict[str, float], np.ndarray]:
    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    made = []
    for start in range(0, count, 50):
        words = [caption(scene, "image", rng if varied else None) for scene in scenes[start : start + 50]]
        images = pipe(
            words, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=32, width=32,
            generator=torch.Generator().manual_seed(seed + start), output_type="np",
        ).images  # fmt: skip
        made.append((images * 255).round().astype(np.uint8))
    return judged(np.concatenate(made), scenes), np.concatenate(made)


def draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A canonical caption, another phrasing, or one that leaves factors open."""
    draw = rng.random()
    return partial(scene, rng) if draw < 0.25 else caption(scene, "image", None if draw < 0.7 else rng)


def train_text(options: argparse.Namespace) -> None:
    tokenizer = caption_tokenizer(options.seed, 640, TOKENS)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=TOKENS, projection_dim=96, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )
    )  # fmt: skip
    readouts = torch.nn.ModuleDict({name: torch.nn.Linear(96, len(FACTORS[name])) for name in CARRIES["image"]})
    parameters = [*text.parameters(), *readouts.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr or 2e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps, 50))
    rng = np.random.default_rng(options.seed)
    for step in range(options.steps):
        scenes = [Scene.random(rng) for _ in range(64)]
        words = [draw_caption(scene, rng) for scene in scenes]
        states = text(tokens(tokenizer, words)).last_hidden_state  # (B, T, D)
        loss, right = torch.zeros(()), []
        for factor, readout in readouts.items():
            # What a caption leaves open has no loss.
            wanted = torch.tensor([
                scene.indices[factor] if judge("text", sentence)[factor] is not None else -100
                for scene, sentence in zip(scenes, words, strict=True)
            ])  # fmt: skip
            for read in (states[:, -1], states.mean(1)):
                scores = readout(read)
                loss = loss + F.cross_entropy(scores, wanted)
                right.append((scores.argmax(1) == wanted)[wanted >= 0].float().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss:.4f} read {np.mean(right):.3f}", flush=True)
    text.save_pretrained(options.out / "text_encoder")
    tokenizer.save_pretrained(options.out / "tokenizer")


def train_unet(options: argparse.Namespace) -> None:
    vae = AutoencoderKL.from_pretrained(options.out / "vae").eval()
    text = CLIPTextModel.from_pretrained(options.out / "text_encoder").requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(options.out / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=LATENTS,
        out_channels=LATENTS,
        # Down to 2x2, where the padding of a convolution tells every corner from every other: nothing else in a UNet says where.
        block_out_channels=(64, 96, 96),
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    if options.start:
        unet = UNet2DConditionModel.from_pretrained(options.start / "unet")
    print(
        f"UNet {sum(p.numel() for p in unet.parameters()) / 1e6:.2f} M, "
        f"text {sum(p.numel() for p in text.parameters()) / 1e6:.2f} M",
        flush=True,
    )
    pipe = pipeline(vae, text, unet, tokenizer)
    noising = pipe.scheduler
    rng = np.random.default_rng(options.seed)
    started = time.time()
    latents, words = [], []
    with torch.no_grad():
        while len(words) < options.images:
            images, scenes = pictures(rng, 128)
            latents.append(vae.encode(images).latent_dist.mean * vae.config.scaling_factor)
            words += scenes
    store = torch.cat(latents)
    print(f"{len(store)} latents in {time.time() - started:.0f} s, std {store.std():.3f}", flush=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.lr or 1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps, 100))
    average = Average(unet, decay=0.995)
    torch.manual_seed(options.seed)
    for step in range(options.steps):
        chosen = torch.randint(len(store), (options.batch_size,))
        captions = ["" if rng.random() < 0.1 else draw_caption(words[index], rng) for index in chosen.tolist()]
        noise = torch.randn_like(store[chosen])
        timesteps = torch.randint(0, 1000, (options.batch_size,))
        # Where the object stands shines through all but the strongest noise, so that is where the caption is needed.
        strongest = torch.randint(850, 1000, (options.batch_size,))
        timesteps = torch.where(torch.rand(options.batch_size) < 0.1, strongest, timesteps)
        noisy = noising.add_noise(store[chosen], noise, timesteps)
        condition = text(tokens(tokenizer, captions)).last_hidden_state
        predicted = unet(noisy, timesteps, condition).sample
        loss = F.mse_loss(predicted, noising.get_velocity(store[chosen], noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        if step % 100 == 0:
            print(f"step {step} loss {loss:.4f} {time.time() - started:.0f} s", flush=True)
        if (step % 400 == 399) or step == options.steps - 1:
            average.swap()
            unet.eval()
            print(step, measure(pipe, 60, 11)[0], flush=True)
            pipe.save_pretrained(options.out)
            average.swap()
            unet.train()
    print(f"UNet done in {time.time() - started:.0f} s", flush=True)


def finish(options: argparse.Namespace) -> None:
    """Store in fp16, reload, and measure what is shipped."""
    pipe = StableDiffusionPipeline.from_pretrained(options.out, torch_dtype=torch.float16, safety_checker=None)
    pipe.save_pretrained(options.out)
    for file in options.out.rglob("*.json"):  # where it was built is nobody's concern
        config = json.loads(file.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")
    pipe = StableDiffusionPipeline.from_pretrained(options.out, torch_dtype=torch.float32, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    canonical, _ = measure(pipe, options.count, 4321)
    varied, _ = measure(pipe, options.count, 4322, varied=True)
    report = {"steps": STEPS, "guidance": GUIDANCE, "canonical captions": canonical, "varied captions": varied}
    print(json.dumps(report, indent=2))
    (options.out / "measured.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "mmbridge.json").write_text(
        json.dumps({"steps": STEPS, "guidance": GUIDANCE, "licence": "Apache-2.0"}, indent=2) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["vae", "text", "unet", "measure"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=24000)
    parser.add_argument("--lr", type=float)
    parser.add_argument(
        "--start", type=Path, help="go on from this folder: with the VAE's decoder alone, or with the UNet"
    )
    parser.add_argument("--count", type=int, default=400, help="pictures to measure, twice")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "tiny-sd")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    {"vae": train_vae, "text": train_text, "unet": train_unet, "measure": finish}[options.part](options)


if __name__ == "__main__":
    main()
