"""A dialogue with a picture in every turn: what a turn costs a chat, and what it costs to encode and read everything again.

The shipped bridge answers, with its ways in but without its decoder, whose sampling costs both sides the same. Its language
model knows 512 positions and twenty turns take more, so the context is raised; positions are rotary, so that nothing but what
the replies say depends on it, and what they say does not change what they cost. Both sides answer the same dialogue turn by
turn, in turns, in one process. Seconds are the process's own CPU seconds with one thread, so that what else the machine does
counts little; the least of several repeats is taken.

    python benchmarks/chat.py
    python benchmarks/chat.py --turns 40 --repeats 1
    python benchmarks/chat.py --dim 512            a LLaMA of random weights, nearer to the size of real ones
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mmbridge import Bridge, Chat
from mmbridge.media import Image
from mmbridge.synthetic import Scene, render_image
from mmbridge.synthetic.scene import FACTORS

QUESTIONS = ("What do you see?", "What colour is it?", "Where is it?", "What shape is it?", "How big is it?")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=20, metavar="N", help="turns of the dialogue (20)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of which the fastest counts (3)")
    about = "width of a LLaMA of 8 layers and random weights in place of the shipped one"
    parser.add_argument("--dim", type=int, metavar="N", help=about)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bridge = create_bridge(given.dim, Path(folder))
    run(bridge, 2)  # warms up
    runs = [run(bridge, given.turns) for _ in range(given.repeats)]
    report([min_of([measured[turn] for measured in runs]) for turn in range(given.turns)])


def create_bridge(dim: int | None, folder: Path) -> Bridge:
    """Return the shipped bridge without its ways out; with ``dim``, around a LLaMA that is written to ``folder``."""
    shipped = Bridge.from_pretrained("mmbridge/tiny")
    if dim is None:
        return Bridge(shipped.backbone, dict(shipped.inputs)).eval()
    config = shipped.config()
    settings = shipped.backbone.model.config.to_dict()
    sizes = {"hidden_size": dim, "intermediate_size": 4 * dim, "num_hidden_layers": 8, "head_dim": 64}
    heads = {"num_attention_heads": dim // 64, "num_key_value_heads": dim // 64}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**{**settings, **sizes, **heads, "dtype": "float32"})).save_pretrained(folder)
    shipped.backbone.tokenizer.save_pretrained(folder)
    backbone = {"name": "causal_lm", "source": str(folder), "template": "plain"}
    bridge = Bridge.from_config({**config, "backbone": backbone, "outputs": {}}).eval()
    bridge.backbone.tokenizer  # noqa: B018  reads the folder, which goes
    return bridge


def run(bridge: Bridge, turns: int) -> list[dict[str, float]]:
    """Answer the dialogue once on both sides; returns one record per turn."""
    bridge.backbone.model.config.max_position_embeddings = 64 * (turns + 8)
    options: dict[str, Any] = {"max_new_tokens": 8}
    chat = Chat(bridge, **options)
    read: list[int] = []
    hook = bridge.backbone.register_forward_hook(lambda module, given, output: read.append(output.shape[1]))
    records = []
    for turn in range(turns):
        content = [{"type": "image", "data": picture(turn)}, {"type": "text", "text": QUESTIONS[turn % len(QUESTIONS)]}]
        whole = [*chat.messages, {"role": "user", "content": content}]
        read.clear()
        ours, reply = timed(lambda content=content: chat.send(content))
        new = sum(read)
        read.clear()
        again, other = timed(lambda whole=whole: bridge.generate(whole, **options))
        if reply.text != other.text:
            raise SystemExit(f"turn {turn + 1}: the chat says {reply.text!r}, the whole dialogue gives {other.text!r}")
        records.append({"new": new, "whole": sum(read), "chat": ours, "again": again})
    hook.remove()
    return records


def picture(number: int) -> Image:
    """Return a picture that no other turn has."""
    scene = Scene(**{factor: values[number % len(values)] for factor, values in FACTORS.items()})
    return Image.load(render_image(scene, seed=number))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return CPU seconds and result."""
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def min_of(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the least of every figure."""
    return {name: min(record[name] for record in records) for name in records[0]}


def report(records: Sequence[dict[str, float]]) -> None:
    """Print a table, the growth of a turn's cost over the dialogue, and the ratio at its end."""
    print("turn  positions read: chat  again    seconds: chat    again   again / chat   chat, ms per position")
    for turn, record in enumerate(records, 1):
        print(
            f"{turn:4}  {record['new']:20.0f}  {record['whole']:5.0f}    {record['chat']:13.3f}  {record['again']:7.3f}"
            f"   {record['again'] / record['chat']:12.1f}   {1000 * record['chat'] / record['new']:21.2f}"
        )
    last = records[-1]
    if len(records) > 2:
        turns = np.arange(1, len(records) + 1)
        for name, seconds in (("chat", "chat"), ("again", "again")):
            slope, start = np.polyfit(turns, [record[seconds] for record in records], 1)
            print(f"{name}: {1000 * start:.1f} ms + {1000 * slope:.2f} ms per turn that went before (least squares)")
        slope, start = np.polyfit(turns, [record["new"] for record in records], 1)
        print(f"new positions: {start:.1f} + {slope:.2f} per turn that went before")
    print(
        f"turn {len(records)}: reading everything again takes {last['again'] / last['chat']:.1f} times as long as the chat"
    )


if __name__ == "__main__":
    main()
