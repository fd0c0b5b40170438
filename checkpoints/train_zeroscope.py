"""Rebuild checkpoints/tiny-zeroscope: a small text-to-video model of the ModelScope class over the synthetic world.

    python checkpoints/train_zeroscope.py text              # a minute
    python checkpoints/train_zeroscope.py frames --frames runs/frames     # draw single frames: half an hour on one core
    python checkpoints/train_zeroscope.py unet --frames runs/frames       # move what they show: about an hour
    python checkpoints/train_zeroscope.py measure           # gold caption -> video, read by the judges

The folder is an ordinary diffusers pipeline folder. As ModelScope's did (arXiv 2308.06571), its UNet starts from a text-to-image
model, checkpoints/tiny-sd, whose VAE it shares; layers across frames start as the identity.
"""

import argparse
import json
import time
import types
from pathlib import Path

import numpy as np
import torch
from common import Average, warmup_cosine
from diffusers import AutoencoderKL, DDIMScheduler, TextToVideoSDPipeline, UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch.nn import functional as F
from train_stable_diffusion import LATENTS
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from mmbridge.synthetic import CARRIES, FACTORS, Scene, caption, render_video
from mmbridge.synthetic.geometry import path
from mmbridge.synthetic.image import draw
from mmbridge.synthetic.judges import judge, judge_video
from mmbridge.synthetic.language import shared_caption

HERE = Path(__file__).parent
TOKENS, FRAMES, STEPS, GUIDANCE = 24, 4, 10, 2.0
DIRECTIONS = ("left", "right", "up", "down")
TRAVEL = (
    3.5  # pixels of 64 to either side, less than 5 as elsewhere: tiny-sd knows five places, and no object between them
)


def draw_scene(rng: np.random.Generator) -> Scene:
    """Any scene, or (two in five) one of those that are hardest to draw: small crosses and stars, orbits."""
    scene = Scene.random(rng)
    if rng.random() > 0.4:
        return scene
    if rng.random() < 0.4:
        scene = scene.replace(motion="circling")
    return scene.replace(size="small", shape=str(rng.choice(["cross", "cross", "star"])))


def videos(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, list[Scene]]:
    """Return (count * FRAMES, 3, 32, 32) floats in -1..1, and the scenes: renderings at half their size."""
    scenes = [draw_scene(rng) for _ in range(count)]
    pixels = np.concatenate([render_video(scene, int(rng.integers(2**31)), FRAMES, TRAVEL) for scene in scenes])
    return F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, 2), scenes


def moving(rng: np.random.Generator, count: int) -> tuple[torch.Tensor, list[Scene]]:
    """The same for ``count`` scenes, each of which moves in all four directions, all else alike."""
    scenes, pixels = [], []
    for _ in range(count):
        scene, seed = draw_scene(rng), int(rng.integers(2**31))
        for motion in DIRECTIONS:
            scenes.append(scene.replace(motion=motion))
            pixels.append(draw(scene, path(motion, FRAMES, travel=TRAVEL), np.random.default_rng(seed)))
    frames = torch.from_numpy(np.concatenate(pixels)).permute(0, 3, 1, 2)
    return F.avg_pool2d(frames.float() / 127.5 - 1, 2), scenes


def draw_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A canonical caption, another phrasing, or one that leaves factors open: a picture's or a sound's, or any other."""
    draw = rng.random()
    if draw < 0.15:
        known = ["shape", "size", *(factor for factor in ("colour", "place", "motion") if rng.random() < 0.5)]
        return shared_caption(scene, [factor for factor in FACTORS if factor in known], "video")
    modality = "video" if draw < 0.8 else "image" if draw < 0.9 else "audio"
    return caption(scene, modality, None if rng.random() < 0.55 else rng)


def tokens(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> torch.Tensor:
    return tokenizer(captions, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt").input_ids


def judged(made: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    found = [judge_video(frames) for frames in made]
    right = {
        factor: [values[factor] == getattr(scene, factor) for values, scene in zip(found, scenes, strict=True)]
        for factor in CARRIES["video"]
    }
    shares = {factor: float(np.mean(flags)) for factor, flags in right.items()}
    shares["all"] = float(np.mean(np.all(list(right.values()), axis=0)))
    return shares


@torch.no_grad()
def measure(pipe: TextToVideoSDPipeline, count: int, seed: int, varied: bool = False) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    scenes = [Scene.random(rng) for _ in range(count)]
    made = []
    for start in range(0, count, 20):
        words = [caption(scene, "video", rng if varied else None) for scene in scenes[start : start + 20]]
        frames = pipe(
            words, num_inference_steps=STEPS, guidance_scale=GUIDANCE, height=32, width=32, num_frames=FRAMES,
            generator=torch.Generator().manual_seed(seed + start), output_type="np",
        ).frames  # fmt: skip
        made.append((np.asarray(frames) * 255).round().astype(np.uint8))
    return judged(np.concatenate(made), scenes)


def train_text(options: argparse.Namespace) -> None:
    """Go on from tiny-sd's text encoder: read motion too, and say the rest as before, so that tiny-sd's layers fit."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(HERE / "tiny-sd" / "tokenizer", model_max_length=TOKENS)
    before = CLIPTextModel.from_pretrained(HERE / "tiny-sd" / "text_encoder", dtype=torch.float32).eval()
    config = CLIPTextConfig(**{**before.config.to_dict(), "max_position_embeddings": TOKENS})
    text = CLIPTextModel(config)
    weights = before.state_dict()
    (name,) = [name for name in weights if "position_embedding.weight" in name]
    known = weights[name]
    weights[name] = torch.cat([known, known[-1:].expand(TOKENS - len(known), -1)])
    text.load_state_dict(weights, strict=False)
    readouts = torch.nn.ModuleDict({factor: torch.nn.Linear(96, len(values)) for factor, values in FACTORS.items()})
    parameters = [*text.parameters(), *readouts.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr or 1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps, 50))
    rng = np.random.default_rng(options.seed)
    short = before.config.max_position_embeddings
    for step in range(options.steps):
        scenes = [Scene.random(rng) for _ in range(48)]
        words = [draw_caption(scene, rng) for scene in scenes]
        pictured = [caption(scene, "image", None if rng.random() < 0.6 else rng) for scene in scenes[:16]]
        states = text(tokens(tokenizer, words + pictured)).last_hidden_state  # (B, T, D)
        with torch.no_grad():
            wanted = before(tokens(tokenizer, pictured)[:, :short]).last_hidden_state
        loss, right = 2 * F.mse_loss(states[len(words) :, :short], wanted), []
        for factor, readout in readouts.items():
            named = torch.tensor([
                scene.indices[factor] if judge("text", sentence)[factor] is not None else -100
                for scene, sentence in zip(scenes, words, strict=True)
            ])  # fmt: skip
            for read in (states[: len(words), -1], states[: len(words)].mean(1)):
                scores = readout(read)
                loss = loss + F.cross_entropy(scores, named)
                right.append((scores.argmax(1) == named)[named >= 0].float().mean().item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step} loss {loss:.4f} read {np.mean(right):.3f}", flush=True)
    text.save_pretrained(options.out / "text_encoder")
    tokenizer.save_pretrained(options.out / "tokenizer")


def quicker(unet: UNet3DConditionModel) -> None:
    """Compute the same in four fifths of the time on a CPU: convolutions across frames as 2D ones, attention as products."""

    def across(self: torch.nn.Conv3d, states: torch.Tensor) -> torch.Tensor:
        made = F.conv2d(states.flatten(3), self.weight.squeeze(-1), self.bias, padding=(1, 0))
        return made.unflatten(3, states.shape[3:])

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.forward = types.MethodType(across, module)
    unet.set_attn_processor(AttnProcessor())


def draws(name: str) -> bool:
    """Whether a layer is one of tiny-sd's that draw: not across frames, and not reading the caption."""
    return not any(part in name for part in ("temp_", "transformer_in", "attn2"))


def inflate(frames: Path | None) -> UNet3DConditionModel:
    """Return a UNet of single frames, tiny-sd's by default, with layers across frames that change nothing yet."""
    flat = UNet2DConditionModel.from_pretrained(frames or HERE / "tiny-sd" / "unet", torch_dtype=torch.float32)
    unet = UNet3DConditionModel(
        sample_size=8, in_channels=LATENTS, out_channels=LATENTS, block_out_channels=flat.config.block_out_channels,
        down_block_types=("CrossAttnDownBlock3D",) * 3, up_block_types=("CrossAttnUpBlock3D",) * 3, layers_per_block=1,
        cross_attention_dim=flat.config.cross_attention_dim, attention_head_dim=flat.config.attention_head_dim,
        norm_num_groups=flat.config.norm_num_groups,
    )  # fmt: skip
    shapes = {name: value.shape for name, value in unet.state_dict().items()}
    unet.load_state_dict({name: value.view(shapes[name]) for name, value in flat.state_dict().items()}, strict=False)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ("temp_attentions" in name or "transformer_in" in name) and "proj_out" in name:
                parameter.zero_()
    return unet


class Displacements(torch.nn.Module):
    """Reads from the blocks of a UNet whereto an object moves, and where it should be in each frame: deep supervision.

    A word for a direction and the number of a frame are worth nothing alone, so the loss of the frames hardly asks for
    their product: without this the UNet learned that things move, and not whereto, in 15,000 videos.
    """

    def __init__(self, unet: UNet3DConditionModel):
        super().__init__()
        self.seen: list[torch.Tensor] = []
        widths = unet.config.block_out_channels
        blocks = [*unet.down_blocks[1:], unet.mid_block, *unet.up_blocks[:-1]]
        for block in blocks:
            block.register_forward_hook(
                lambda module, given, made: self.seen.append(made[0] if isinstance(made, tuple) else made)
            )
        sizes = [*widths[1:], widths[-1], *widths[::-1][: len(unet.up_blocks) - 1]]
        self.heads = torch.nn.ModuleList(torch.nn.Linear(size, 2 + len(DIRECTIONS)) for size in sizes)

    def loss(self, directions: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
        """Return the error of the rows that are told a direction, and forget what was seen.

        Args:
            directions: (rows,), number of the direction that a row's caption names, -1 for none.
            paths: (directions, frames, 2).
        """
        seen, self.seen = self.seen, []
        told, total = directions >= 0, torch.zeros(())
        if not told.any():
            return total
        for head, states in zip(self.heads, seen, strict=True):
            pooled = F.layer_norm(states.mean((2, 3)), states.shape[1:2]).unflatten(0, (-1, FRAMES))
            read = head(pooled[told])  # (rows, frames, 2 + directions)
            direction = F.cross_entropy(read[..., 2:].mean(1), directions[told])
            total = total + F.mse_loss(read[..., :2], paths[directions[told]]) + 0.3 * direction
        return total / len(seen)


def frozen(folder: Path) -> tuple[AutoencoderKL, CLIPTextModel, PreTrainedTokenizerFast, DDIMScheduler]:
    """Return what no UNet changes: tiny-sd's VAE and schedule, and this folder's text encoder and tokenizer."""
    vae = AutoencoderKL.from_pretrained(HERE / "tiny-sd" / "vae", torch_dtype=torch.float32).eval()
    text = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).requires_grad_(False)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    return vae, text, tokenizer, DDIMScheduler.from_pretrained(HERE / "tiny-sd" / "scheduler")


def train_frames(options: argparse.Namespace) -> None:
    """Teach tiny-sd's UNet to draw a video's frames one by one: it knows five places, and no object between them."""
    vae, text, tokenizer, scheduler = frozen(options.out)
    unet = UNet2DConditionModel.from_pretrained(HERE / "tiny-sd" / "unet", torch_dtype=torch.float32)
    if options.start:
        known = UNet3DConditionModel.from_pretrained(options.start / "unet", torch_dtype=torch.float32).state_dict()
        unet.load_state_dict({name: known[name].view(value.shape) for name, value in unet.state_dict().items()})
    rng = np.random.default_rng(options.seed)
    scenes, stored = [draw_scene(rng) for _ in range(options.videos)], []
    for start in range(0, len(scenes), 64):
        pixels = np.stack([
            render_video(scene, int(rng.integers(2**31)), FRAMES, TRAVEL)[rng.integers(FRAMES)]
            for scene in scenes[start : start + 64]
        ])  # fmt: skip
        images = F.avg_pool2d(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, 2)
        with torch.no_grad():
            stored.append(vae.encode(images).latent_dist.mean * vae.config.scaling_factor)
    store = torch.cat(stored)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.lr or 7e-4, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps, 100))
    average, losses, started = Average(unet, decay=0.997), [], time.time()
    for step in range(options.steps):
        chosen = torch.randint(len(store), (FRAMES * options.batch_size,))
        captions = ["" if rng.random() < 0.1 else draw_caption(scenes[index], rng) for index in chosen.tolist()]
        latents, noise = store[chosen], torch.randn(len(chosen), *store.shape[1:])
        timesteps = torch.randint(0, 1000, (len(chosen),))
        condition = text(tokens(tokenizer, captions)).last_hidden_state
        predicted = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, condition).sample
        loss = F.mse_loss(predicted, scheduler.get_velocity(latents, noise, timesteps))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        losses.append(loss.item())
        if step % 250 == 249 or step == options.steps - 1:
            print(f"step {step} loss {np.mean(losses[-250:]):.4f} {time.time() - started:.0f} s", flush=True)
            average.swap()
            unet.save_pretrained(options.frames)
            average.swap()


def train_unet(options: argparse.Namespace) -> None:
    vae, text, tokenizer, scheduler = frozen(options.out)
    before = options.start and UNet3DConditionModel.from_pretrained(options.start / "unet", torch_dtype=torch.float32)
    unet = before or inflate(options.frames)
    if before and options.frames:
        drawing = {name: value for name, value in inflate(options.frames).state_dict().items() if draws(name)}
        unet.load_state_dict(drawing, strict=False)
    quicker(unet.eval())  # in evaluation mode throughout: its layers across frames would drop a tenth
    pipe = TextToVideoSDPipeline(vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(options.seed)
    started = time.time()
    stored, scenes = [], []
    with torch.no_grad():
        while len(scenes) < options.videos:
            images, shown = videos(rng, 32) if len(scenes) < options.videos / 2 else moving(rng, 8)
            latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
            stored.append(latents.unflatten(0, (-1, FRAMES)).transpose(1, 2))
            scenes += shown
    store = torch.cat(stored)  # (N, C, F, H, W)
    first_moving = next(i for i in range(0, len(scenes), 32) if [s.motion for s in scenes[i : i + 4]] == [*DIRECTIONS])
    print(f"{len(store)} videos in {time.time() - started:.0f} s, std {store.std():.3f}", flush=True)
    lr = options.lr or 1e-3
    across = [p for name, p in unet.named_parameters() if not draws(name)]
    within = [p for name, p in unet.named_parameters() if draws(name)]
    displacements = Displacements(unet)
    groups = [
        {"params": [*across, *displacements.parameters()], "lr": lr},
        {"params": within, "lr": options.drawing * lr},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps, 100))
    average = Average(unet, decay=0.995)
    torch.manual_seed(options.seed)
    rows = options.batch_size
    paths = torch.from_numpy(np.stack([path(motion, FRAMES, travel=1.0) for motion in DIRECTIONS])).float()
    for step in range(options.steps):
        # What a direction means in a frame depends on the word and on the frame together; half of the rows show all four with
        # everything else alike, noise included, so that nothing else tells them apart.
        pairs = rows // 8 if rng.random() < options.alike else 0
        chosen = torch.randint(len(store), (rows,))
        quads = torch.randint((len(store) - first_moving) // 4, (pairs,)) * 4 + first_moving
        chosen[: 4 * pairs] = (quads[:, None] + torch.arange(4)).flatten()
        captions = ["" if rng.random() < 0.1 else draw_caption(scenes[index], rng) for index in chosen.tolist()]
        captions[: 4 * pairs] = [
            caption(scenes[index], "video", None if rng.random() < 0.5 else rng)
            for index in chosen[: 4 * pairs].tolist()
        ]
        latents = store[chosen]
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, 1000, (rows,))
        strongest = torch.randint(850, 1000, (rows,))
        timesteps = torch.where(torch.rand(rows) < options.strongest, strongest, timesteps)
        noise[: 4 * pairs] = noise[: 4 * pairs : 4].repeat_interleave(4, 0)
        timesteps[: 4 * pairs] = timesteps[: 4 * pairs : 4].repeat_interleave(4)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        condition = text(tokens(tokenizer, captions)).last_hidden_state
        predicted = unet(noisy, timesteps, condition).sample
        wanted = scheduler.get_velocity(latents, noise, timesteps)
        # An object moves by a third of a latent position a frame, a small part of the loss. Where the noise is strongest,
        # nothing but the caption tells how, and differences of frames are free of what nobody can know, such as the ground.
        weight = torch.where(timesteps >= 850, 4.0, 1.0)
        moved = (predicted.diff(dim=2) - wanted.diff(dim=2)).square().mean((1, 2, 3, 4))
        said = [judge("text", sentence)["motion"] for sentence in captions]
        told = displacements.loss(torch.tensor([DIRECTIONS.index(m) if m in DIRECTIONS else -1 for m in said]), paths)
        loss = F.mse_loss(predicted, wanted) + options.moved * (weight * moved).mean() + told
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        if step % 50 == 0:
            early = moved[timesteps >= 850].mean()
            print(
                f"step {step} loss {loss:.4f} moved {early:.4f} told {told:.4f} {time.time() - started:.0f} s",
                flush=True,
            )
        if step % 250 == 249 or step == options.steps - 1:
            average.swap()
            displacements.seen = []
            print(step, measure(pipe, 20, 11), flush=True)
            pipe.save_pretrained(options.out)
            average.swap()
            displacements.seen = []
    print(f"UNet done in {time.time() - started:.0f} s", flush=True)


def finish(options: argparse.Namespace) -> None:
    """Store in fp16, reload, and measure what is shipped."""
    pipe = TextToVideoSDPipeline.from_pretrained(options.out, torch_dtype=torch.float16)
    pipe.save_pretrained(options.out)
    # The very bytes of tiny-sd's VAE, so that both decoders share one in memory.
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (options.out / "vae" / name).write_bytes((HERE / "tiny-sd" / "vae" / name).read_bytes())
    for file in options.out.rglob("*.json"):  # where it was built is nobody's concern
        config = json.loads(file.read_text())
        if isinstance(config, dict) and config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2) + "\n")
    pipe = TextToVideoSDPipeline.from_pretrained(options.out, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    report = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "canonical captions": measure(pipe, options.count, 4321),
        "varied captions": measure(pipe, options.count, 4322, varied=True),
    }
    print(json.dumps(report, indent=2))
    (options.out / "measured.json").write_text(json.dumps(report, indent=2) + "\n")
    facts = {
        "steps": STEPS,
        "guidance": GUIDANCE,
        "frames": FRAMES,
        "fps": 2,
        "resolution": [32, 32],
        "licence": "Apache-2.0",
    }
    (options.out / "mmbridge.json").write_text(json.dumps(facts, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["text", "frames", "unet", "measure"])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--videos", type=int, default=4000)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--strongest", type=float, default=0.3, help="share of training steps at the strongest noise")
    parser.add_argument("--drawing", type=float, default=0.5, help="share of the learning rate for layers that draw")
    parser.add_argument(
        "--frames", type=Path, help="UNet of single frames, which `frames` writes and whose drawing layers `unet` takes"
    )
    parser.add_argument(
        "--alike", type=float, default=1.0, help="share of steps with groups of one scene moving four ways"
    )
    parser.add_argument("--moved", type=float, default=1.0, help="weight of differences between frames")
    parser.add_argument("--start", type=Path, help="go on from the UNet of this folder")
    parser.add_argument("--count", type=int, default=200, help="videos to measure, twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "tiny-zeroscope")
    options = parser.parse_args()
    if options.part == "frames" and options.frames is None:
        parser.error("frames needs --frames, the folder to write")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    {"text": train_text, "frames": train_frames, "unet": train_unet, "measure": finish}[options.part](options)


if __name__ == "__main__":
    main()
