"""Factories of tiny real parts: each writes a folder of random weights, or returns plain data that builds the part."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from decoders.tiny_decoders import stable_diffusion
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

IMAGEBIND = {
    "embed_dim": 12,
    "vision": {"dim": 16, "depth": 1, "heads": 2, "image_size": 16, "patch": 8, "video_clips": 2, "video_crops": 1},
}
MIXTURE = {
    "name": "mixture_of_experts", "num_tokens": 2, "dim_hidden": 16, "num_experts": 2, "depth": 1, "num_heads": 2,
    "dim_feedforward": 16,
}  # fmt: skip
WORDS = (
    "User: What is it? What colour is it? Draw a red one. Describe the picture.",
    "Assistant: It is red. It is green. It is blue. Here is a red square. It is dark. It is bright.",
    "User: Which digit is it?",
    "Assistant: It is a zero, one, two, three, four, five, six, seven, eight, nine.",
)


def llama(folder: Path, words: Sequence[str] = WORDS, **sizes: Any) -> str:
    """Write a LLaMA of two layers of width 32, with a byte-level BPE tokenizer trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(list(words) * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    config = LlamaConfig(
        **{
            "vocab_size": len(fast),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **sizes,
        }
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def imagebind(folder: Path) -> str:
    """Write an ImageBind whose vision tower reads 16 x 16 pictures."""
    from mmbridge.encoders.imagebind import ImageBindModel
    from mmbridge.encoders.imagebind_modules import ImageBindConfig

    torch.manual_seed(1)
    ImageBindModel(ImageBindConfig.from_dict(IMAGEBIND), ("image",)).save_pretrained(folder)
    return str(folder)


def parts(folder: Path) -> dict[str, str]:
    """Write a backbone, an encoder and a decoder; returns their folders as "llama", "imagebind" and "sd"."""
    return {
        "llama": llama(folder / "llama"),
        "imagebind": imagebind(folder / "imagebind"),
        "sd": str(stable_diffusion(folder / "sd")["source"]),
    }


def bridge_config(
    parts: dict[str, str], *, out: bool = True, lora: bool = False, output: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return a bridge as plain data: pictures in, and with ``out`` pictures out."""
    backbone: dict[str, Any] = {"name": "causal_lm", "source": parts["llama"], "template": "plain"}
    if lora:
        backbone["lora"] = {"rank": 2, "alpha": 4}
    signals = {
        "name": "signals",
        "projection": {
            "name": "signal_transformer", "dim_hidden": 16, "num_heads": 2, "num_encoder_layers": 1,
            "num_decoder_layers": 1, "dim_feedforward": 32,
        },
        "decoder": {"name": "stable_diffusion", "source": parts["sd"]},
        "num_signals": 3,
        **(output or {}),
    }  # fmt: skip
    return {
        "backbone": backbone,
        "inputs": {
            "image": {
                "name": "encoded",
                "encoder": {"name": "imagebind", "modality": "image", "weights": parts["imagebind"]},
                "projection": {"name": "linear"},
            }
        },
        "outputs": {"image": signals} if out else {},
    }


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220)}


def colours_file(folder: Path, count: int = 24, seed: int = 0) -> Path:
    """Write pictures of three colours and a JSONL file: every third dialogue asks for a picture, the others name a colour."""
    from mmbridge.media import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    lines = []
    for number in range(count):
        name = list(COLOURS)[number % 3]
        noise = torch.randint(-25, 25, (3, 16, 16), generator=generator)
        pixels = (torch.tensor(COLOURS[name])[:, None, None] + noise).clamp(0, 255).to(torch.uint8)
        file = f"{seed}-{number}.png"
        Image(pixels).save(folder / file)
        picture = {"type": "image", "path": file}
        if number // 3 % 3 == 2:
            asked: Any = f"Draw a {name} one."
            reply: Any = [{"type": "text", "text": f"It is {name}."}, {**picture, "caption": f"a {name} one"}]
        else:
            asked = [picture, {"type": "text", "text": "What colour is it?"}]
            reply = f"It is {name}."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
        lines.append(json.dumps({"messages": messages}))
    path = folder / f"data-{seed}.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def recipe(
    parts: dict[str, str], data: Path, validation: Path | None = None, *, stage: str = "instruction_tuning", **run: Any
) -> dict[str, Any]:
    """Return a recipe as plain data."""
    training = {
        "encoder_alignment": (["inputs.*.projection"], {"text": 1.0}),
        "decoder_alignment": (["outputs.*"], {"image.alignment": 1.0}),
        "instruction_tuning": (["*"], {"text": 1.0, "image.alignment": 1.0}),
    }
    train, losses = training[stage]
    return {
        "schema": 1,
        "stage": stage,
        "parent": None,
        "bridge": bridge_config(parts, lora=stage == "instruction_tuning"),
        "train": train,
        "losses": losses,
        "data": {"path": str(data), "validation": str(validation) if validation else None},
        "optimizer": {"lr": 0.003, "warmup": 0.1},
        "run": {"steps": 12, "batch_size": 4, "validate_every": 6, "save_every": 4, **run},
    }
