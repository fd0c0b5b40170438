"""NExT-GPT's published files as parts of a bridge, and back (arXiv 2309.05519).

Two layouts are read. The released weights (``7b_tiva_v0/pytorch_model.pt``, and what that code's stages 1 and 2 save) hold one
linear input projection for image, video and audio, three output projections, LoRA, and the whole embedding and head, of which
only the rows of added tokens are kept: the base model keeps its own. Files of the newer code (``mm_input_projector.bin``,
``mm_output_projector.bin``) hold projections, and embedding and head likewise. Parts that a file lacks altogether are left
out; a part that is there must be whole.

How many signal tokens a medium has leaves no trace in the shapes: the published numbers are taken, ``SIGNALS``.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmbridge.backbones.lora import Lora
from mmbridge.conversion.keymap import KeyMap, Target, joined, listed
from mmbridge.conversion.nextgpt_keys import (
    EMBEDDING,
    HEAD,
    RELEASED,
    SIGNALS,
    find_layout,
    find_words,
    first_added,
    keymap,
    plan_projections,
)
from mmbridge.conversion.nextgpt_projections import Filling, grouping, linear, mlp, released_name, signal_transformer
from mmbridge.errors import CheckpointError, ConfigError
from mmbridge.registry import suggest

log = logging.getLogger("mmbridge")


def released(state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
    """Return the parts of a bridge that a published file holds, views of its tensors where nothing changes.

    The one input projection stands in all three ways in, as do the tags ``<Img>`` and ``</Img>``. Rows of embedding and head
    that differ from the base model's are not kept, but a warning tells of them.

    Args:
        state: Tensors by published names; on the meta device, their numbers are not looked at.
        base: The base model's ``EMBEDDING`` and ``HEAD``, to compare with; None compares nothing.

    Raises:
        CheckpointError: Missing, unexpected or non-finite tensors, or wrong shapes, listed.
    """
    parts = keymap(state).apply(state)
    broken = [
        f"{part}: {name}"
        for part, tensors in parts.items()
        for name, tensor in tensors.items()
        if not tensor.is_meta and not tensor.isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            f"NExT-GPT checkpoint has numbers that are not finite in {listed(broken)}. Give an undamaged file."
        )
    for name, found in compare_words(state, base).items() if base is not None else ():
        if found["differ"]:
            log.warning(
                "%d of %d rows of %s differ from the base model's, by %.2g at most; the base model's are used.",
                found["differ"], found["rows"], name, found["most"],
            )  # fmt: skip
        if found["unmatched"]:
            log.warning("%d rows of %s are in one of file and base model only.", found["unmatched"], name)
    return parts


def compare_words(state: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Compare the rows of a published file that are not kept with the base model's, in the file's precision.

    The published code trained the whole embedding and head, so that they differ a little from those of the base model.

    Args:
        state: Tensors by published names.
        base: The base model's ``EMBEDDING`` and ``HEAD``.

    Returns:
        For both names: ``rows`` that both have, how many ``differ``, by how much at ``most``, and the rows that only the file
        or only the base model has, ``unmatched``.

    Raises:
        CheckpointError: The base model lacks one of them, or has another width.
    """
    layout, names = find_layout(state), find_words(state)
    report = {}
    for name, own in names.items():
        if name not in base or own not in state:
            raise CheckpointError(f"{name} of the base model can't be compared: it is missing; give both models whole.")
        old = state[own][: first_added(state[own], layout)]
        rows = min(len(old), len(base[name]))
        if old.shape[1] != base[name].shape[1]:
            raise CheckpointError(
                f"the base model is {base[name].shape[1]} wide, the NExT-GPT checkpoint {old.shape[1]}; give the base model "
                "that it was trained on."
            )
        differ, most = 0, 0.0
        for start in range(0, rows, 4096):  # so that no whole matrix is copied
            chosen = slice(start, min(start + 4096, rows))
            apart = (old[chosen].float() - base[name][chosen].to(old.dtype).float()).abs().amax(1)
            differ, most = differ + int((apart > 0).sum()), max(most, float(apart.max()))
        unmatched = abs(len(old) - len(base[name]))
        report[name] = {"rows": rows, "differ": differ, "most": most, "unmatched": unmatched}
    return report


def beside(folder: Path) -> dict[str, Any]:
    """Return nothing: no file beside the weights tells what ``keymap`` and ``base_configs`` need."""
    return {}


def base_configs(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return nothing: a published file holds no model that stands alone."""
    return {}


def bridge_config(state: Mapping[str, Any], base: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return the bridge that opens a converted file as plain data, sizes read from the shapes.

    What the weights need is set: tags, spaces between the newer code's signals, pooled features of the released weights.
    Conditions for AudioLDM get unit norm, as it was trained with, which the published code leaves out: ``normalize: false``
    in the way out reproduces that.

    Args:
        state: Tensors, or anything with a shape, by published names.
        base: Where frozen parts are, by their names in a manifest: "backbone", "inputs.image.encoder",
            "outputs.image.decoder", ...; others are those that the weights were trained with.

    Raises:
        CheckpointError: The file is not whole.
        ConfigError: There is no such frozen part.
    """
    layout = find_layout(state)
    for name in base or ():
        if name not in layout.bases:
            raise ConfigError(f"NExT-GPT has no frozen part {name!r}{suggest(name, list(layout.bases))}")
    bases = {**layout.bases, **(base or {})}
    parts = keymap(state).parts
    way_in, ways_out = plan_projections(state, layout)
    backbone: dict[str, Any] = {
        "name": "causal_lm",
        "source": bases["backbone"],
        "template": layout.template,
        "stop": layout.stop,
        "lora": None,
    }
    if adapters := parts.get("backbone.lora"):
        rank = next(state[t.sources[0]].shape[0] for name, t in adapters.items() if ".lora_A." in name)
        targets = dict.fromkeys(name.split(".lora_")[0].rsplit(".", 1)[-1] for name in adapters)
        backbone["lora"] = {
            "rank": rank, "alpha": layout.alpha * rank, "dropout": layout.dropout, "targets": list(targets),
        }  # fmt: skip
    inputs = {
        modality: {
            "name": "encoded",
            "encoder": {
                "name": "imagebind",
                "modality": modality,
                "weights": bases[f"inputs.{modality}.encoder"],
                "tokens": layout.tokens,
            },
            "projection": _part(way_in),
            "tags": f"inputs.{modality}.tags" in parts,
        }
        for modality in (SIGNALS if way_in else ())
    }
    outputs = {
        modality: {
            "name": "signals",
            "projection": _part(filling),
            "decoder": {**layout.decoders[modality], "source": bases[f"outputs.{modality}.decoder"]},
            "num_signals": SIGNALS[modality],
            "alignment": "norm",
            "spaces": layout.spaces,
        }
        for modality, filling in ways_out.items()
    }
    return copy.deepcopy({"backbone": backbone, "inputs": inputs, "outputs": outputs})


def export(
    parts: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return a bridge's parts in the layout and under the names of the released weights, made as ``export_map`` tells.

    Args:
        parts: Parts by name, as in a saved bridge: linear input projections, tags, signal transformers, rows, LoRA or none.
        base: The base model's ``EMBEDDING`` and ``HEAD``, or a whole file of the released layout.
        dtype: Of the result; None for that of the input projection.

    Raises:
        CheckpointError: As for ``export_map``.
    """
    flat = joined({**parts, "base": base})
    targets = export_map(parts, base, dtype)
    return {name: target.make(*(flat[source] for source in target.sources)) for name, target in targets.items()}


def export_map(
    parts: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor], dtype: torch.dtype | None = None
) -> dict[str, Target]:
    """Return how each tensor of the released layout is made from sources called ``<part>/<name>`` and ``base/<name>``.

    Its code writes signal tokens one by one, so it asks for a head row of each, while a bridge holds that of the first:
    head rows that it lacks are taken from ``base`` where that is a file of the released layout, which brings them back as
    they were, and are zero otherwise.

    Args:
        parts: Parts by name, as in a saved bridge: linear input projections, tags, signal transformers, rows, LoRA or none.
        base: The base model's ``EMBEDDING`` and ``HEAD``, or a whole file of the released layout.
        dtype: Of the result; None for that of the input projection.

    Raises:
        CheckpointError: A part is missing or is not one of the released layout, or what that layout holds once differs between
            image, video and audio.
    """
    shared = {name: [f"inputs.{modality}.{name}" for modality in SIGNALS] for name in ("projection", "tags")}
    own = [f"outputs.{modality}.{name}" for modality in SIGNALS for name in ("projection", "rows")]
    wanted = {*shared["projection"], *shared["tags"], *own}
    faults = {
        "missing": sorted(wanted - parts.keys()),
        "unexpected": sorted(parts.keys() - wanted - {"backbone.lora"}),
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise CheckpointError(
            f"this bridge does not fit the released NExT-GPT layout: {found}. Export one with NExT-GPT's ways in and out."
        )
    for name, group in shared.items():
        first, *others = ({key: tensor.cpu() for key, tensor in parts[part].items()} for part in group)
        if any(
            first.keys() != other.keys() or any(not torch.equal(first[k], other[k]) for k in first) for other in others
        ):
            raise CheckpointError(
                f"the released NExT-GPT layout has one {name} for image, video and audio, but this bridge's differ; "
                "save it in mmbridge's own format."
            )
    names = {
        f"llama_proj.{name.removeprefix('layer.')}": f"inputs.image.projection/{name}"
        for name in parts["inputs.image.projection"]
    }
    for modality, prefix in RELEASED.outputs.items():
        part = f"outputs.{modality}.projection"
        names |= {prefix + released_name(name): f"{part}/{name}" for name in parts[part]}
    adapters = parts.get("backbone.lora", {})
    stem = "llama_model.base_model.model." if adapters else "llama_model."
    names |= {stem + name: f"backbone.lora/{name}" for name in adapters}
    state = joined({**parts, "base": base})
    chosen = dtype or state[next(iter(names.values()))].dtype
    made = {name: Target((source,)) for name, source in names.items()}
    made[stem + EMBEDDING], made[stem + HEAD] = _all_rows(parts, base)
    made = {name: Target(t.sources, partial(_plain, make=t.make, dtype=chosen)) for name, t in made.items()}
    meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state.items()}
    keymap(KeyMap({"file": made}).apply(meta)["file"])  # whatever is wrong with it is told there
    return made


def peft_adapter(
    adapters: Mapping[str, Tensor], lora: Lora, source: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a bridge's LoRA in peft's own format.

    Args:
        adapters: The part ``backbone.lora``.
        lora: Its settings.
        source: The base model, as ``transformers`` may open it.

    Returns:
        What belongs in ``adapter_model.safetensors`` and in ``adapter_config.json``.
    """
    tensors = {f"base_model.model.{name.replace('.default.', '.')}": tensor for name, tensor in adapters.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": source,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": list(lora.targets),
        "bias": "none",
        "inference_mode": True,
    }
    return tensors, config


def _part(filling: Filling[Any] | None) -> dict[str, Any]:
    """Return a projection as in a recipe, without the widths, which its neighbours tell."""
    module = filling.module if filling else None
    given = {} if module is None else dict(module.arguments)
    for width in ("dim_in", "dim_out", "num_queries"):
        given.pop(width, None)
    return {"name": module.registry_name if module else "", **given}


def _plain(*tensors: Tensor, make: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
    """Return what ``make`` makes, in one precision, from tensors that may be parameters of a bridge."""
    tensor: Tensor = make(*(tensor.detach().to(dtype) for tensor in tensors))
    return tensor.contiguous()


def _all_rows(parts: Mapping[str, Any], base: Mapping[str, Tensor]) -> tuple[Target, Target]:
    """Return how the whole embedding and head are made: old rows from the base, new ones from the parts."""
    words = find_words(base)
    if not words or any(name not in base for name in words.values()):
        raise CheckpointError(f"the base model lacks {EMBEDDING} or {HEAD}; give both.")
    count, width = base[words[EMBEDDING]].shape
    start = first_added(base[words[EMBEDDING]], RELEASED) if words[EMBEDDING] != EMBEDDING else count
    low, places = start + RELEASED.wrappers, []
    for modality, signals in SIGNALS.items():
        shape = tuple(parts[f"outputs.{modality}.rows"]["embedding"].shape)
        if shape != (signals, width):
            raise CheckpointError(
                f"outputs.{modality}.rows has the shape {shape}, but the released NExT-GPT layout has "
                f"{signals} signals and this base model width {width}; export a bridge that was built so."
            )
        places.append(low)
        low += signals
    rows = [f"outputs.{modality}.rows" for modality in SIGNALS]
    added = ["inputs.image.tags/start", "inputs.image.tags/end", *(f"{part}/embedding" for part in rows)]
    heads = [f"{part}/head" for part in rows]
    return (
        Target((f"base/{words[EMBEDDING]}", *added), partial(_embedding, start=start)),
        Target((f"base/{words[HEAD]}", *heads), partial(_head, places=tuple(places), count=low)),
    )


def _embedding(old: Tensor, *added: Tensor, start: int) -> Tensor:
    return torch.cat([old[:start], *(rows.to(old.device) for rows in added)])


def _head(old: Tensor, *added: Tensor, places: tuple[int, ...], count: int) -> Tensor:
    whole = old.new_zeros(count, old.shape[1])
    whole[: len(old)] = old
    for place, rows in zip(places, added, strict=True):
        whole[place] = rows[0]
    return whole


__all__ = [
    "base_configs",
    "beside",
    "bridge_config",
    "compare_words",
    "export",
    "export_map",
    "grouping",
    "keymap",
    "linear",
    "mlp",
    "peft_adapter",
    "released",
    "signal_transformer",
]
