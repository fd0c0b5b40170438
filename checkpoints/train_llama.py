"""Rebuild checkpoints/tiny-llama: a tokenizer and a small LLaMA that answers questions about scenes described in text.

    python checkpoints/train_llama.py                       # all of it, about 25 minutes on one core
    python checkpoints/train_llama.py --steps 50 --out /tmp/try

It never sees a medium or a signal token: scenes come as sentences of the synthetic world's grammar. Held-out factor
combinations are not left out here; they are left out of everything that trains a bridge.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from common import warmup_cosine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from mmbridge.messages import TextPiece, parse_messages, render
from mmbridge.synthetic import Dialogues, Scene, caption, sentence
from mmbridge.synthetic.dialogues import MIX

HERE = Path(__file__).parent
SOURCES = ("image", "video", "audio", "text")
MEDIA = ("image", "video", "audio")
CONFLICTS = [scene for scene in Scene.all() if {scene.place.split()[-1], scene.motion} == {"left", "right"}]
SHARES = {
    "describe": 0.12, "question": 0.2, "draw": 0.14, "convert": 0.14, "text": 0.08, "chat": 0.04, "edit": 0.16,
    "pair": 0.08, "several": 0.07, "refuse": 0.04,
}  # fmt: skip


def draw_scene(rng: np.random.Generator, source: str) -> tuple[Scene, int]:
    # "on the right, moving left": rare, and copying the nearest word of the kind is right everywhere else.
    return (CONFLICTS[rng.integers(len(CONFLICTS))] if rng.random() < 0.2 else Scene.random(rng)), 0


def spell(dialogues: Dialogues, rng: np.random.Generator) -> list[dict]:
    """A dialogue whose media are sentences in place of what comes in; what goes out is not there."""
    messages = []
    for exchange in dialogues.compose(rng):
        about = [
            sentence(caption(shown.scene, shown.modality, rng if rng.random() < 0.7 else None))
            for shown in exchange.shown
        ]
        messages += [
            {"role": "user", "content": " ".join([*about, exchange.asked])},
            {"role": "assistant", "content": exchange.answer},
        ]
    return messages


DIALOGUES = Dialogues(draw_scene, SHARES, SOURCES, MEDIA, turns=0.3)


def dialogue(rng: np.random.Generator) -> list[dict]:
    return spell(DIALOGUES, rng)


def train_tokenizer(rng: np.random.Generator, size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = []
    for _ in range(6000):
        for message in dialogue(rng):
            texts.append(("User: " if message["role"] == "user" else "Assistant: ") + message["content"] + "\n")
    for scene in Scene.all()[::7]:
        texts += [caption(scene, source, rng) for source in SOURCES] + [caption(scene, source) for source in SOURCES]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def encode(tokenizer: PreTrainedTokenizerFast, messages: list[dict]) -> tuple[list[int], list[bool]]:
    (piece,) = render(parse_messages(messages), "plain", bos="<s>", eos="</s>")
    assert isinstance(piece, TextPiece)
    encoded = tokenizer(piece.text, add_special_tokens=False, return_offsets_mapping=True)
    said = [any(start < high <= end for start, end in piece.supervised) for _, high in encoded["offset_mapping"]]
    return encoded["input_ids"], said


def batch(
    tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, rows: int, length: int = 161
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pack dialogues into rows: ids, weights, positions (each (rows, length)) and which dialogue each token belongs to."""
    ids, weights, positions, owners = (
        np.zeros((rows, length), dtype) for dtype in (np.int64, np.float32, np.int64, np.int64)
    )
    for row in range(rows):
        filled, number = 0, 1
        while filled < length:
            tokens, said = encode(tokenizer, dialogue(rng))
            tokens, said = tokens[: length - filled], said[: length - filled]
            place = slice(filled, filled + len(tokens))
            ids[row, place], positions[row, place], owners[row, place] = tokens, np.arange(len(tokens)), number
            weights[row, place] = [1.0 if flag else 0.1 for flag in said]
            weights[row, filled] = 0  # the start of a dialogue can't be foretold from the one before
            filled, number = filled + len(tokens), number + 1
    return tuple(torch.from_numpy(array) for array in (ids, weights, positions, owners))  # type: ignore[return-value]


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> dict[str, float]:
    """Share of last replies that are right to the letter, by kind of dialogue, by greedy decoding."""
    tasks = {kind: (kind, MEDIA) for kind in MIX if kind not in ("draw", "convert", "chat")}
    tasks |= {f"{kind} {medium}": (kind, (medium,)) for kind in ("draw", "convert") for medium in MEDIA}
    measured = {}
    for task, (kind, outputs) in tasks.items():
        rng = np.random.default_rng(seed)
        dialogues = Dialogues(lambda rng, source: (Scene.random(rng), 0), {kind: 1.0}, SOURCES, outputs)
        prompts, answers = [], []
        for _ in range(count):
            *before, wanted = spell(dialogues, rng)
            (piece,) = render(parse_messages(before), "plain", bos="<s>", eos="</s>", reply=True)
            assert isinstance(piece, TextPiece)
            prompts.append(piece.text)
            answers.append(wanted["content"])
        tokens = tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt",
            return_token_type_ids=False,
        )  # fmt: skip
        out = model.generate(**tokens, max_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=2)
        replies = tokenizer.batch_decode(out[:, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [reply.strip() == wanted for reply, wanted in zip(replies, answers, strict=True)]
        measured[task] = float(np.mean(right))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="go on from these weights")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-llama")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = np.random.default_rng(options.seed)
    if options.start:
        model = LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(options.start)
    else:
        tokenizer = train_tokenizer(rng, 1024)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=160,
                intermediate_size=448,
                num_hidden_layers=4,
                num_attention_heads=5,
                max_position_embeddings=512,
                bos_token_id=1,
                eos_token_id=2,
                pad_token_id=0,
                tie_word_embeddings=False,
            )
        )
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = warmup_cosine(options.steps, min(100, options.steps // 5 + 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup)
    started = time.time()
    for step in range(options.steps):
        ids, weights, positions, owners = batch(tokenizer, rng, options.batch_size)
        owners = owners[:, :-1]
        mask = (owners[:, None, :, None] == owners[:, None, None, :]).tril()  # (B, 1, T, T)
        logits = model(ids[:, :-1], attention_mask=mask, position_ids=positions[:, :-1]).logits
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        weight = weights[:, 1:]
        loss = (losses * weight).sum() / weight.sum()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            said = weight == 1
            print(
                f"step {step} loss {loss:.3f} answers {losses[said].mean():.4f} {time.time() - started:.0f} s",
                flush=True,
            )
        if step and step % 300 == 0:
            model.eval()
            print(accuracy(model, tokenizer, 50, 99), flush=True)
            model.train()
            model.save_pretrained(options.out)
            tokenizer.save_pretrained(options.out)
    model.eval()
    seconds = time.time() - started
    measured = accuracy(model, tokenizer, 200, 12345)
    print(measured, flush=True)
    model.half().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    (options.out / "measured.json").write_text(
        json.dumps({"steps": options.steps, "seconds": round(seconds), "accuracy": measured}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
