"""Rebuild checkpoints/tiny-universal: one picture transformer that reads sounds, points, motion and brain scans too.

    python checkpoints/train_universal.py start             # the transformer and the pictures' tokenizer; a second
    python checkpoints/train_universal.py audio             # then each tokenizer, minutes on one core
    python checkpoints/train_universal.py pointcloud
    python checkpoints/train_universal.py imu
    python checkpoints/train_universal.py fmri

The transformer is the picture tower of checkpoints/tiny-imagebind, a CLIP-ViT with GELU, whose patches span two frames, and is
never changed. Each of the other tokenizers learns through it, so that linear read-outs of single factors, thrown away afterwards,
find them in the class token and in the mean of the others. That of points starts as the pictures'. That of motion sensors is also
asked to add up what its two factors say (see ``spread``), for a bridge sees so few combinations of them.
"""

import argparse
import json
import time
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from common import Average, warmup_cosine
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from mmbridge.data.tasks import render_medium
from mmbridge.encoders import ImageBind, UniversalEncoder
from mmbridge.encoders.tokenizers import AudioSizes, FmriSizes, ImageSizes, ImuSizes, PointSizes
from mmbridge.encoders.universal import UniversalConfig
from mmbridge.synthetic import CARRIES, FACTORS, Scene

HERE = Path(__file__).parent
SOURCE, TARGET = HERE / "tiny-imagebind", HERE / "tiny-universal"
STEM, TRUNK, HEAD = "modality_preprocessors.vision.", "modality_trunks.vision.", "modality_heads.vision.0."
INSIDE = {
    "norm_1": "norm_attention", "norm_2": "norm_mlp", "attn.in_proj_": "attention.in_proj_", "attn.out_proj": "attention.out_proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip


def sizes() -> UniversalConfig:
    vision, audio = (json.loads((SOURCE / "config.json").read_text())[name] for name in ("vision", "audio"))
    return UniversalConfig(
        dim=vision["dim"], depth=vision["depth"], heads=vision["heads"], dim_feedforward=4 * vision["dim"], activation="gelu",
        image=ImageSizes(vision["patch"], vision["image_size"], tuple(vision["mean"]), tuple(vision["std"]), vision["video_clips"],
                         vision["video_seconds"], vision["video_crops"], tubelet=vision["frames"]),
        audio=AudioSizes(audio["patch"], audio["stride"], audio["mel_bins"], audio["frames"], audio["sample_rate"],
                         audio["seconds"], audio["mean"], audio["std"]),
        pointcloud=PointSizes(128, 256, 6, 1024, vision["patch"], vision["image_size"], tuple(vision["mean"]),
                              tuple(vision["std"])),
        imu=ImuSizes(kernel=40, stride=8, steps=200, channels=6, sample_rate=100.0, hidden=128),
        fmri=FmriSizes(voxels=512, tokens=8),
    )  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    state = load_file(SOURCE / "model.safetensors")
    made = {
        "transformer.class_embedding": state[f"{STEM}cls_token"][0, 0],
        "tokenizers.image.positions": state[f"{STEM}pos_embedding_helper.pos_embed"][0],
        "tokenizers.image.projection.weight": state[f"{STEM}rgbt_stem.proj.1.weight"],
    }
    renamed = {f"{TRUNK}pre_transformer_layer.0.": "transformer.norm_in.", HEAD: "transformer.norm_out."}
    for name, tensor in state.items():
        for before, after in renamed.items():
            if name.startswith(before):
                made[after + name.removeprefix(before)] = tensor
        if name.startswith(f"{TRUNK}blocks."):
            number, _, inside = name.removeprefix(f"{TRUNK}blocks.").partition(".")
            old = next(old for old in INSIDE if inside.startswith(old))
            made[f"transformer.blocks.{number}.{INSIDE[old]}{inside.removeprefix(old)}"] = tensor
    return {name: tensor.contiguous() for name, tensor in made.items()}


@torch.no_grad()
def start() -> None:
    """Write the transformer and the pictures' tokenizer, and tell how far they are from the tower that they were made of."""
    TARGET.mkdir(exist_ok=True)
    (TARGET / "config.json").write_text(json.dumps(sizes().to_dict(), indent=2) + "\n")
    present = load_file(TARGET / "model.safetensors") if (TARGET / "model.safetensors").exists() else {}
    others = {
        name: value for name, value in present.items() if not name.startswith(("transformer.", "tokenizers.image."))
    }
    save_file(others | weights(), TARGET / "model.safetensors")
    pictures = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model = ImageBind("image", SOURCE, tokens="patch").model
    stem, trunk, head = (
        getattr(model, name)["vision"] for name in ("modality_preprocessors", "modality_trunks", "modality_heads")
    )
    difference = (UniversalEncoder("image", TARGET)(pictures) - head[0](trunk(stem(pictures)))).abs().max()
    print(f"largest difference from the tower it was made of: {difference:.1e}")


@cache
def shaper(modality: str) -> UniversalEncoder:
    """An encoder that only says how media are prepared."""
    return UniversalEncoder(modality, config=sizes())


def make(job: tuple[str, int]) -> tuple[np.ndarray, tuple[int, ...]]:
    """Render one medium of a random scene, a third of them worn, as the encoder takes it."""
    modality, seed = job
    torch.set_num_threads(1)
    scene = Scene.random(np.random.default_rng([seed, 5]))
    raw = shaper(modality).prepare(render_medium(modality, scene, seed)).unsqueeze(0)
    return shaper(modality).gather(raw)[0].half().numpy(), tuple(scene.indices.values())


def make_pool(modality: str, count: int, first: int, workers: int) -> tuple[torch.Tensor, torch.Tensor]:
    with get_context("fork").Pool(workers) as pool:
        made = pool.map(make, [(modality, first + index) for index in range(count)], chunksize=64)
    return torch.from_numpy(np.stack([raw for raw, _ in made])), torch.tensor([labels for _, labels in made])


class ReadOuts(torch.nn.Module):
    """Factors from the class token, and from the mean of the others."""

    def __init__(self, modality: str, dim: int):
        super().__init__()
        self.factors = CARRIES[modality]
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(dim) for _ in range(2))
        self.layers = torch.nn.ModuleDict(
            {
                f"{factor}{kind}": torch.nn.Linear(dim, len(FACTORS[factor]))
                for factor in self.factors
                for kind in range(2)
            }
        )

    def forward(self, tokens: torch.Tensor) -> dict[str, list[torch.Tensor]]:
        pooled = [norm(x) for norm, x in zip(self.norms, (tokens[:, 0], tokens[:, 1:].mean(1)), strict=True)]
        return {factor: [self.layers[f"{factor}{kind}"](pooled[kind]) for kind in range(2)] for factor in self.factors}


def spread(tokens: torch.Tensor, labels: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """Return how far tokens are from sums of one code per value of each factor, codes of a factor being equally far apart.

    It is minus the logarithm of the share of the variance that a direction between codes has, averaged over the directions of
    a factor and summed over factors. What factors do together, and noise, lower all shares.

    Args:
        tokens: (B, T, dim).
        labels: (B, F) of factors.
        counts: Values of each factor.
    """
    features = tokens.flatten(1) - tokens.flatten(1).mean(0)
    values = torch.cat([F.one_hot(row, count).float() for row, count in zip(labels.T, counts, strict=True)], dim=1)
    values = values - values.mean(0)
    ridge = 1e-2 * torch.eye(values.shape[1])
    codes = torch.linalg.solve(values.T @ values + ridge, values.T @ features)  # least squares, of all factors at once
    variance = features.square().sum(1).mean()
    total = torch.zeros(())
    for part in codes.split(counts):
        part = part - part.mean(0)
        shares = part @ part.T / variance / len(part)
        shares = shares + 1 / len(part)  # so that the direction of the codes' sum, which is 0, counts as 1
        total = total - torch.logdet(shares) / (len(part) - 1)
    return total


def vary(raw: torch.Tensor, modality: str) -> torch.Tensor:
    """Roughen raw inputs a little: a pool is soon known by heart."""
    if modality == "audio":
        raw = raw + 0.2 * torch.randn(len(raw), 1, 1, 1, 1)
    noise = torch.randn_like(raw) * (torch.rand(len(raw), 1, 1) if modality == "imu" else 1)
    return raw + {"audio": 0.1, "pointcloud": 0.03, "imu": 0.2, "fmri": 0.5}[modality] * noise


def train(modality: str, options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    started = time.time()
    raw, labels = make_pool(modality, options.pool, 200_000_000, options.workers)
    held, held_labels = make_pool(modality, 600, 300_000_000, options.workers)
    print(
        f"{tuple(raw.shape)} mean {raw.float().mean():.2f} std {raw.float().std():.2f}, {time.time() - started:.0f} s",
        flush=True,
    )
    if not options.again:
        state = load_file(TARGET / "model.safetensors")
        others = {name: value for name, value in state.items() if not name.startswith(f"tokenizers.{modality}.")}
        save_file(others, TARGET / "model.safetensors")  # so that this one starts anew
    encoder = UniversalEncoder(modality, TARGET, trains="tokenizer")
    encoder.tokenizer.requires_grad_(True)
    reads = ReadOuts(modality, encoder.sizes.dim)
    trained = [*encoder.tokenizer.parameters(), *reads.parameters()]
    optimizer = torch.optim.AdamW(trained, options.lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_cosine(options.steps, 100))
    average = Average(encoder.tokenizer, reads, decay=0.99)
    rng = np.random.default_rng(options.seed)
    started = time.time()
    numbers = {factor: list(FACTORS).index(factor) for factor in CARRIES[modality]}
    counts = [len(FACTORS[factor]) for factor in numbers]

    @torch.no_grad()
    def measure() -> dict[str, list[float]]:
        reads.eval()
        found = [reads(encoder(part.float())) for part in held.split(100)]
        reads.train()
        report = {}
        for factor, number in numbers.items():
            guesses = [torch.cat([each[factor][kind] for each in found]).argmax(1) for kind in range(2)]
            report[factor] = [round(float((guess == held_labels[:, number]).float().mean()), 3) for guess in guesses]
        return report

    for step in range(options.steps):
        rows = torch.from_numpy(rng.choice(len(raw), options.batch, replace=False))
        tokens = encoder.encode(vary(raw[rows].float(), modality))
        found = reads(tokens)
        losses = {
            factor: sum(F.cross_entropy(logits, labels[rows, number]) for logits in found[factor])
            for factor, number in numbers.items()
        }
        if modality == "imu":
            losses["spread"] = spread(tokens, labels[rows][:, list(numbers.values())], counts)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        average.update()
        if step % 100 == 0:
            print(
                step,
                {factor: round(loss.item(), 3) for factor, loss in losses.items()},
                f"{time.time() - started:.0f} s",
                flush=True,
            )
        if step % 500 == 499 or step == options.steps - 1:
            average.swap()
            measured = measure()
            print(step, json.dumps(measured), flush=True)
            save(modality, encoder, {"steps": step + 1, "seconds": round(time.time() - started), "read-outs": measured})
            average.swap()


def save(modality: str, encoder: UniversalEncoder, report: dict) -> None:
    """Put a tokenizer into the file, beside the others."""
    state = load_file(TARGET / "model.safetensors")
    state |= {f"tokenizers.{modality}.{name}": value.half() for name, value in encoder.tokenizer.state_dict().items()}
    save_file(state, TARGET / "model.safetensors")
    path = TARGET / "measured.json"
    reports = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**reports, modality: report}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("start", "audio", "pointcloud", "imu", "fmri"))
    parser.add_argument("--again", action="store_true", help="go on from the tokenizer that is there")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--pool", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    start() if options.what == "start" else train(options.what, options)


if __name__ == "__main__":
    main()
