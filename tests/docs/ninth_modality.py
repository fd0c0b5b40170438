"""What test_ninth_modality.py runs in a process of its own, where the page's package is installed: prints a line of JSON.

python ninth_modality.py FOLDER OVERRIDE ...
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from mmbridge import Bridge
from mmbridge.config import Recipe
from mmbridge.data.tasks import answer_tasks, make_task
from mmbridge.synthetic import Scene, judge
from mmbridge.training.run import train

PROJECTION = {
    "name": "mixture_of_experts", "num_tokens": 8, "dim_hidden": 96, "depth": 1, "num_heads": 4, "dim_feedforward": 256,
    "normalize": "sigmoid", "experts": "experts",
}  # fmt: skip


def way_in(modality):
    encoder = {"name": "universal", "modality": modality, "weights": "mmbridge/tiny-universal"}
    return {"name": "encoded", "encoder": encoder, "projection": PROJECTION, "tags": True}


PARENT = {
    "schema": 1,
    "stage": "encoder_alignment",
    "bridge": {
        "backbone": {"name": "causal_lm", "source": "mmbridge/tiny-llama", "template": "plain", "lora": None},
        "inputs": {"image": way_in("image"), "depth": way_in("depth")},
        "outputs": {},
    },
    "train": ["inputs.*"],
    "losses": {"text": 1.0},
    "data": {
        "name": "synthetic",
        "samples": 2000,
        "inputs": ["image", "depth"],
        "outputs": [],
        "mix": {"describe": 1.0},
        "pool": 400,
    },
    "optimizer": {"lr": 5e-3, "betas": [0.9, 0.98], "warmup": 0.05},
    "run": {"steps": 60, "batch_size": 16, "validate_every": 1000, "save_every": 1000},
}


def answers(bridge, modality, count):
    """Scenes that training never shows, and what a bridge says of them."""
    rng = np.random.default_rng(5)
    scenes = [Scene.random(rng, "unseen", modality) for _ in range(count)]
    tasks = [make_task(modality, "text", scene, 10_000_000 + i) for i, scene in enumerate(scenes)]
    return scenes, [reply.text for reply in answer_tasks(bridge, tasks)]


def main(folder, overrides):
    torch.set_num_threads(1)
    (folder / "parent.yaml").write_text(json.dumps(PARENT), encoding="utf-8")
    parent = train(Recipe.load(folder / "parent.yaml"), folder / "eight", progress=False)
    recipe = Recipe.load(folder / "parent.yaml", [*overrides, f"parent={parent}"])
    child = train(recipe, folder / "nine", progress=False)

    before, after = (
        {
            f"{file.stem}: {name}": tensor
            for file in (bridge / "parts").glob("*")
            for name, tensor in load_file(file).items()
        }
        for bridge in (parent, child)
    )
    bridges = Bridge.from_pretrained(parent), Bridge.from_pretrained(child)
    scenes, said = answers(bridges[1], "thermal", 48)
    read = [judge("text", text) for text in said]
    factors = {
        name: float(np.mean([found[name] == getattr(scene, name) for scene, found in zip(scenes, read, strict=True)]))
        for name in ("shape", "size", "place")
    }
    result = {
        "changed": [name for name, tensor in before.items() if not torch.equal(tensor, after[name])],
        "kept": len(before),
        "added": sorted({name.partition(":")[0] for name in after.keys() - before.keys()}),
        "image": [answers(bridge, "image", 12)[1] for bridge in bridges],
        "thermal": factors,
        "transformers": len({id(way.encoder.transformer) for way in bridges[1].inputs.values()}),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
