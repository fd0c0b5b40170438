"""Rebuild checkpoints/tiny-universal: the picture tower of checkpoints/tiny-imagebind as the transformer of a universal encoder.

    python checkpoints/make_universal.py                    # a second

That tower is a CLIP-ViT with GELU, whose patches span two frames; of a picture both are the same, so that the two halves of their
weights add up. Nothing is trained. The sizes of the other tokenizers are those of the synthetic world; they have no weights here
and train in the stages in which their modality comes in (recipes/tiny/onellm-*.yaml).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmbridge.encoders import ImageBind, UniversalEncoder
from mmbridge.encoders.tokenizers import AudioSizes, FmriSizes, ImageSizes, ImuSizes, PointSizes
from mmbridge.encoders.universal import UniversalConfig

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
        image=ImageSizes(vision["patch"], vision["image_size"], tuple(vision["mean"]), tuple(vision["std"]),
                         video_clips=4, video_seconds=0.25, video_crops=1),
        audio=AudioSizes(audio["patch"], audio["stride"], audio["mel_bins"], audio["frames"], audio["sample_rate"],
                         audio["seconds"], audio["mean"], audio["std"]),
        pointcloud=PointSizes(groups=64, neighbours=16, channels=6, points=1024),
        imu=ImuSizes(kernel=16, stride=8, steps=200, channels=6, sample_rate=100.0),
        fmri=FmriSizes(voxels=512, tokens=8),
    )  # fmt: skip


def weights() -> dict[str, torch.Tensor]:
    state = load_file(SOURCE / "model.safetensors")
    made = {
        "transformer.class_embedding": state[f"{STEM}cls_token"][0, 0],
        "tokenizers.image.positions": state[f"{STEM}pos_embedding_helper.pos_embed"][0],
        "tokenizers.image.projection.weight": state[f"{STEM}rgbt_stem.proj.1.weight"].float().sum(2).half(),
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
def check() -> float:
    """Return the largest difference between the two encoders' tokens, before ImageBind's last matrix, of pictures of noise."""
    pictures = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    bound = ImageBind("image", SOURCE, tokens="patch")
    stem, trunk, head = (
        getattr(bound.model, name)["vision"] for name in ("modality_preprocessors", "modality_trunks", "modality_heads")
    )
    wanted = head[0](trunk(stem(pictures)))
    return float((UniversalEncoder("image", TARGET)(pictures) - wanted).abs().max())


def main() -> None:
    TARGET.mkdir(exist_ok=True)
    (TARGET / "config.json").write_text(json.dumps(sizes().to_dict(), indent=2) + "\n")
    save_file(weights(), TARGET / "model.safetensors")
    print(f"largest difference from the tower it was made of: {check():.1e}")


if __name__ == "__main__":
    main()
