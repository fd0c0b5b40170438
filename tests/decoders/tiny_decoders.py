"""Tiny real decoders: each function writes a folder of random weights and returns what builds the decoder from it."""

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS, DIM, RESOLUTION = 12, 16, 16
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def write_clip_vocabulary(folder: Path) -> None:
    """Write the ``vocab.json`` and ``merges.txt`` of a CLIP tokenizer that knows letters and two merges."""
    letters = list(string.ascii_lowercase)
    entries = [*letters, *(letter + "</w>" for letter in letters), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({entry: number for number, entry in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")


def stable_diffusion_parts(folder: Path, **schedule: Any) -> dict[str, Any]:
    """Return the components of a Stable Diffusion of 16 x 16 pictures; ``folder`` takes the tokenizer's files."""
    write_clip_vocabulary(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=DIM,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=RESOLUTION,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=DIM,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        **{**SCHEDULE, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, **schedule}
    )
    for module in (unet, vae, text_encoder):
        module.eval()
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def stable_diffusion_pipeline(parts: dict[str, Any]) -> StableDiffusionPipeline:
    """Return diffusers' own pipeline of the components."""
    pipeline = StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def stable_diffusion(folder: Path) -> dict[str, Any]:
    """Write a Stable Diffusion folder and return the decoder's arguments."""
    stable_diffusion_pipeline(stable_diffusion_parts(folder / "files")).save_pretrained(folder / "model")
    (folder / "model" / "mmbridge.json").write_text('{"steps": 3, "guidance": 2.0, "licence": "Apache-2.0"}')
    return {"source": folder / "model"}
