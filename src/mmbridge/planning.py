"""What a recipe will need at full size: parameters, memory, work and time, from configurations alone.

The bridge is built on the meta device: no weights are read or downloaded, nothing is computed. Parameters, and the bytes of
weights, gradients and optimiser states, are counted and exact. Activations, work and time are estimates, made by the
formulas in ``layer_bytes``, ``Work`` and ``Plan.hours``; what they leave out is said there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mmbridge.bridge import Bridge
from mmbridge.config import Recipe
from mmbridge.data.synthetic import POOL, SyntheticData
from mmbridge.encoders.imagebind import ImageBindModel
from mmbridge.errors import ConfigError
from mmbridge.registry import suggest
from mmbridge.training.freezing import freeze
from mmbridge.training.stages import check_stage

TEXT = 128
"""Positions of text that a dialogue is taken to have; half of them are the assistant's."""

MFU = 0.4
"""Share of the published peak that training is taken to reach (model FLOPs utilisation, arXiv 2204.02311, appendix B)."""

_STORED = 4  # bytes of a number in a FeatureStore


@dataclass(frozen=True)
class Gpu:
    """A device by its data sheet: dense bfloat16 (float32 sums) and float32 peaks in TFLOP/s, memory in GB (1e9 bytes)."""

    bf16: float
    fp32: float
    memory: float


GPUS = {
    "H200": Gpu(989, 67, 141),
    "H100": Gpu(989, 67, 80),
    "A100-80GB": Gpu(312, 19.5, 80),
    "A100-40GB": Gpu(312, 19.5, 40),
    "L40S": Gpu(362, 91.6, 48),
    "RTX 4090": Gpu(165.2, 82.6, 24),
}
"""NVIDIA's data sheets (SXM variants of H200, H100 and A100; Ada architecture paper for RTX 4090), without sparsity."""


def find_gpu(name: str) -> str:
    """Return the name of a known device, whatever its case.

    Raises:
        ConfigError: Unknown; the message suggests close names.
    """
    for known in GPUS:
        if known.upper() == name.upper():
            return known
    raise ConfigError(f"unknown GPU {name!r}{suggest(name.upper(), list(GPUS))}")


@dataclass(frozen=True)
class PartSize:
    """A part of the bridge.

    Attributes:
        name: As in ``Bridge.parts`` and ``Bridge.frozen``; a decoder's components stand apart.
        parameters: Numbers in it, without those that an earlier part shares.
        trained: Whether the stage trains it.
        bytes: What its weights take on the device; 0 where the stage does not load it.
        shares: Whether all its parameters are those of an earlier part.
    """

    name: str
    parameters: int
    trained: bool
    bytes: int
    shares: bool


@dataclass(frozen=True)
class Work:
    """FLOPs of one dialogue.

    A matrix product by N weights takes 2 N FLOPs per position; backward, the gradient of what came in takes 2 N more, also
    through frozen weights, and the gradient of the weights 2 N more where they train (Kaplan et al., arXiv 2001.08361,
    section 2.1). The backbone is counted so, without the products of attention scores; encoders, projections and what denoises
    are counted by torch on the meta device. Recomputing checkpointed activations takes the backbone's forward once more.

    Attributes:
        forward: Trained path, forward.
        backward: Trained path, backward, with recomputed activations.
        frozen: Encoders and conditions, once per medium, since the results are cached.
    """

    forward: int
    backward: int
    frozen: int


@dataclass(frozen=True)
class Plan:
    """What a stage needs. Memory in bytes.

    Attributes:
        recipe: What was planned.
        parts: All parts in order.
        published: Models of which the bridge loads some towers: source, parameters of all towers, parameters loaded.
        positions: Length that a dialogue is taken to have.
        weights: Parameters of what the stage loads.
        gradients: Of what trains.
        optimizer: AdamW's two moments per trained number, and a step count of 4 bytes per trained tensor.
        activations: Estimate of what a batch stores for the backward pass: ``layer_bytes`` for the backbone, logits, and what
            ``trace`` finds for projections and denoising, scaled to the computed precision.
        casts: Half-precision copies that autocast makes of float32 weights in the trained path.
        cache_per_sample: Frozen results of one dialogue on the disk.
        samples: Dialogues of the training data; None where the file is not there.
        cache: Largest size of the cache for ``samples``; None where they are unknown.
        work: FLOPs of one dialogue.
    """

    recipe: Recipe
    parts: tuple[PartSize, ...]
    published: tuple[tuple[str, int, int], ...]
    positions: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    casts: int
    cache_per_sample: int
    samples: int | None
    cache: int | None
    work: Work

    @property
    def total(self) -> int:
        """Estimated peak of a step, without buffers, the device's own context, fragmentation and temporary values."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.casts

    @property
    def seen(self) -> int:
        """Dialogues that the run trains on, repeated ones included."""
        run = self.recipe.run
        return run.steps * run.batch_size * run.accumulate

    def fits(self, gpu: str) -> bool:
        """Tell whether the estimated peak is below a device's memory."""
        return self.total < GPUS[gpu].memory * 1e9

    def hours(self, gpu: str, mfu: float = MFU) -> float:
        """Return the hours that a device takes at ``mfu`` of its peak: the steps, then the frozen work of all samples.

        Steps count at the bfloat16 peak, or the float32 peak for precision "32-true"; frozen work, whose weights are
        float32, at the float32 peak. Validation, reading of data and generation are left out.
        """
        run, device = self.recipe.run, GPUS[gpu]
        peak = device.fp32 if run.precision == "32-true" else device.bf16
        steps = self.seen * (self.work.forward + self.work.backward) / peak
        samples = self.samples if self.samples is not None else self.seen
        return (steps + samples * self.work.frozen / device.fp32) / (mfu * 1e12) / 3600


def plan(recipe: Recipe, text: int = TEXT) -> Plan:
    """Plan a stage on one device.

    A dialogue is taken to have ``text`` positions of text, one medium of the longest way in that trains (where none does, of the
    longest one in instruction tuning), and one medium of each way out that has a loss.

    Args:
        recipe: The stage.
        text: Positions of text in a dialogue.

    Raises:
        ConfigError: The recipe is wrong or contradicts its stage.
        ShapeError: Parts do not fit.
        CheckpointError: A configuration is missing.
    """
    recipe.validate()
    with torch.device("meta"):
        bridge = Bridge.from_config(recipe.bridge.to_dict())
        for way in bridge.outputs.values():
            for name in _components(way.decoder):
                way.decoder.component(name)
    trained = freeze(bridge, recipe.train)
    check_stage(recipe.stage, trained, recipe.losses)
    return _Planner(recipe, bridge, trained, text).plan()


class _Planner:
    """One planned bridge, measured piece by piece."""

    def __init__(self, recipe: Recipe, bridge: Any, trained: list[str], text: int):
        self.recipe, self.bridge, self.trained, self.text = recipe, bridge, trained, text
        run = recipe.run
        self.width = 4 if run.precision == "32-true" else 2  # bytes of a computed number
        active = {name for name, weight in recipe.losses.items() if weight > 0 and not name.endswith(".balance")}
        self.active = [name for name in bridge.outputs if any(loss.startswith(f"{name}.") for loss in active)]
        self.denoising = [name for name in self.active if f"{name}.denoising" in active]
        self.learning = {
            name
            for name, way in bridge.inputs.items()
            if any(value.requires_grad for value in way.projection.parameters())
        }
        if self.learning:
            self.entering = [name for name in bridge.inputs if name in self.learning]
        else:
            self.entering = list(bridge.inputs) if recipe.stage == "instruction_tuning" else []
        # Whether gradients cross the backbone: something before it or in it trains.
        self.crossed = any(
            name.startswith("inputs.") or name.endswith((".rows", ".lora", ".weights")) for name in trained
        )

    def plan(self) -> Plan:
        recipe, bridge = self.recipe, self.bridge
        parts, weights = self._parts()
        training = [parameter for parameter in bridge.parameters() if parameter.requires_grad]
        gradients = sum(parameter.numel() * self._bytes(parameter) for parameter in training)
        tokens = {name: _tokens(bridge.inputs[name]) for name in self.entering}
        slots = {name: bridge.inputs[name].length(value) for name, value in tokens.items()}
        longest = max(slots, key=lambda name: (slots[name], len(tokens[name])), default=None)
        positions = (
            self.text + max(slots.values(), default=0) + sum(bridge.outputs[name].length() for name in self.active)
        )
        stored, forward, backward = self._backbone(positions)
        frozen = cached_in = cached_out = casts = 0
        if longest is not None:
            way = bridge.inputs[longest]
            features = tokens[longest].unsqueeze(0)
            work, kept = trace(way.projection, features)
            forward += work
            if longest in self.learning:
                stored, backward = stored + kept * self.width // 4, backward + 2 * work
            frozen += self._encoder(way.encoder)
            cached_in = features.numel() * _STORED
        for name in self.active:
            way = bridge.outputs[name]
            states = torch.empty(1, way.num_states, bridge.backbone.dim, device="meta", requires_grad=True)
            work, kept = trace(way.projection, states)
            learns = f"outputs.{name}.projection" in self.trained
            stored, forward = stored + kept * self.width // 4, forward + work
            backward += work * (learns + self.crossed)
            decoder, spec = way.decoder, way.decoder.spec
            cached_out += spec.tokens * spec.dim * _STORED
            for component in getattr(decoder, "encoders", ()):
                frozen += 2 * _matrices(decoder.component(component)) * decoder.caption_tokens
            if name in self.denoising:
                work, kept, target, encoding = self._denoising(decoder)
                stored += kept * self.width // decoder.anchor.element_size()
                forward, backward = forward + work, backward + work
                cached_out, frozen = cached_out + target * _STORED, frozen + encoding
        if recipe.run.precision in ("bf16-mixed", "16-mixed"):
            path = {id(value): value for value in training}
            for name in self.denoising:
                decoder = bridge.outputs[name].decoder
                path.update({id(value): value for value in decoder.component(decoder.denoiser).parameters()})
            casts = sum(2 * value.numel() for value in path.values() if value.ndim > 1 and self._bytes(value) == 4)
        samples = self._samples()
        cache = None if samples is None else samples * cached_out + self._media(samples) * cached_in
        return Plan(
            recipe, tuple(parts), tuple(self._published()), positions, weights, gradients,
            2 * gradients + 4 * len(training), stored * recipe.run.batch_size, casts, cached_in + cached_out, samples, cache,
            Work(forward, backward, frozen),
        )  # fmt: skip

    def _bytes(self, parameter: Tensor) -> int:
        """Return the bytes of a number of a parameter, as training holds it on an accelerator."""
        if self.recipe.run.precision == "bf16-true":
            return 2
        if id(parameter) in self._in_backbone:
            usual = "float32" if self.bridge.backbone.trainable else "bfloat16"
            dtype: torch.dtype = getattr(torch, self.recipe.bridge.backbone.arguments.get("dtype") or usual)
            return dtype.itemsize
        return parameter.element_size()

    @property
    def _in_backbone(self) -> set[int]:
        if not hasattr(self, "_base"):
            adapters = {id(value) for value in self.bridge.backbone.adapters.values()}
            self._base = {id(value) for value in self.bridge.backbone.parameters()} - adapters
        return self._base

    def _parts(self) -> tuple[list[PartSize], int]:
        """Return all parts and the bytes of the weights that the stage loads."""
        bridge = self.bridge
        own = {id(value) for part in bridge.backbone.parts().values() for value in part.values()}
        base = [value for value in bridge.backbone.parameters() if id(value) not in own]
        named = {"backbone": base} if base else {}  # of one that is trainable all is the part backbone.weights
        loaded = {"backbone"}
        for modality, way in bridge.inputs.items():
            name = f"inputs.{modality}.encoder"
            named[name] = list(way.encoder.parameters())
            loaded.add(name)
        for modality, way in bridge.outputs.items():
            for component in _components(way.decoder):
                name = f"outputs.{modality}.decoder.{component}"
                named[name] = list(way.decoder.component(component).parameters())
                if modality in self.active and (self._renders(modality) or component in way.decoder.encoders):
                    loaded.add(name)
        for name, parameters in bridge.parts().items():
            named[name] = list(parameters.values())
            loaded.add(name)
        parts: list[PartSize] = []
        counted: set[int] = set()
        for name, values in named.items():
            fresh = {id(value): value for value in values if id(value) not in counted}
            counted |= fresh.keys()
            size = sum(value.numel() * self._bytes(value) for value in fresh.values()) if name in loaded else 0
            total = sum(value.numel() for value in fresh.values())
            parts.append(PartSize(name, total, name in self.trained, size, bool(values) and not fresh))
        return parts, sum(part.bytes for part in parts)

    def _renders(self, modality: str) -> bool:
        """Return whether the stage uses the whole decoder: to denoise, or to show samples while it validates."""
        data = self.recipe.data
        validates = data.validation is not None if data.path is not None else data.validation_samples != 0
        return modality in self.denoising or validates

    def _published(self) -> list[tuple[str, int, int]]:
        """Return models of several towers: source, parameters of all towers, parameters of those in this bridge."""
        towers: dict[str, list[ImageBindModel]] = {}
        for way in self.bridge.inputs.values():
            model = getattr(way.encoder, "model", None)
            if isinstance(model, ImageBindModel) and way.encoder.source is not None:
                towers.setdefault(way.encoder.source, []).append(model)
        found = []
        for source, models in towers.items():
            with torch.device("meta"):
                whole = nn.ModuleList([ImageBindModel(models[0].config)])
            sizes = [sum(value.numel() for value in group.parameters()) for group in (whole, nn.ModuleList(models))]
            found.append((source, sizes[0], sizes[1]))
        return found

    def _backbone(self, positions: int) -> tuple[int, int, int]:
        """Return the bytes that one dialogue stores, and its FLOPs forward and backward."""
        backbone, run = self.bridge.backbone, self.recipe.run
        config = backbone.model.config
        layers = int(config.num_hidden_layers)
        adapters = sum(value.numel() for value in backbone.adapters.values())
        weights = _matrices(backbone.model)  # with adapters, without embeddings
        head = backbone.vocabulary_size * backbone.dim
        if not getattr(config, "tie_word_embeddings", False):
            weights -= head
        answers = self.text // 2 + len(self.active)
        body, scores = 2 * weights * positions, 2 * head * answers
        forward = body + scores
        if not self.crossed:
            return 0, forward, 0
        whole = "backbone.weights" in self.trained
        learned = forward if whole else 2 * adapters * positions if "backbone.lora" in self.trained else 0
        backward = forward + learned + (body if run.checkpoint_activations else 0)
        layer = layer_bytes(config, self.width, whole)
        if "backbone.lora" in self.trained:
            layer += self._adapter_bytes() // layers
        stored = layers * self.width * backbone.dim + layer if run.checkpoint_activations else layers * layer
        logits = answers * backbone.vocabulary_size * (self.width + 8)  # as computed, in float32, and normalised
        return positions * (stored + 4 * backbone.dim) + logits, forward, backward

    def _adapter_bytes(self) -> int:
        """Return the bytes per position that adapters store: their input, its dropout mask of bytes, the low-rank input."""
        lora = self.bridge.backbone.lora
        return sum(
            value.shape[1] * (self.width + (lora.dropout > 0)) + value.shape[0] * self.width
            for name, value in self.bridge.backbone.adapters.items()
            if ".lora_A." in name
        )

    def _encoder(self, encoder: Any) -> int:
        """Return the FLOPs of encoding one medium."""
        if encoder.input is None:  # tensors of any shape: by the rule of ``Work``
            return 2 * _matrices(encoder) * (encoder.spec.tokens or 1)
        return trace(encoder, torch.empty(1, *encoder.input.shape, device="meta"))[0]

    def _denoising(self, decoder: Any) -> tuple[int, int, int, int]:
        """Return, for one medium, the FLOPs and stored bytes of denoising, the numbers of its target and the FLOPs of that."""
        dtype, spec = decoder.anchor.dtype, decoder.spec
        with torch.no_grad():
            pixels = torch.empty(1, *decoder.pixel_shape, device="meta", dtype=dtype)
            encoding, _ = trace(decoder.component("vae"), pixels, decoder.moments)
        condition = torch.empty(1, spec.tokens, spec.dim, device="meta", dtype=dtype, requires_grad=True)
        noisy = torch.empty(1, *decoder.latent_shape, device="meta", dtype=dtype)
        time = torch.zeros(1, dtype=torch.long, device="meta")
        denoiser = decoder.component(decoder.denoiser)
        work, kept = trace(denoiser, condition, lambda x: decoder.denoise(noisy, time, x))
        return work, kept, 2 * math.prod(decoder.latent_shape), encoding

    def _samples(self) -> int | None:
        data = self.recipe.data
        if data.path is None:
            return data.samples if data.samples is not None else len(SyntheticData())
        paths = [Path(path) for path in ([data.path] if isinstance(data.path, str) else data.path.values())]
        if not all(path.is_file() for path in paths):
            return None
        count = 0
        for path in paths:
            with path.open("rb") as file:
                count += sum(bool(line.strip()) for line in file)
        return count

    def _media(self, samples: int) -> int:
        """Return how many media can come in at most: a generated world draws them from a pool per modality."""
        data = self.recipe.data
        if data.path is not None:
            return samples
        return min(samples, (data.pool or POOL) * len(data.inputs or self.bridge.inputs))


def layer_bytes(config: Any, width: int, trained: bool = False) -> int:
    """Return the bytes per position that a layer of a LLaMA-like backbone keeps for the backward pass.

    8 h + width (2 h + 2 k + 3 f), for hidden size h, keys of size k and feed-forward size f: two norms in float32; queries,
    keys, values and the attention's output; the gate, its activation and the other branch. Counted as by Korthikanti et al.,
    arXiv 2205.05198, section 4.1, whose GPT layer keeps 34 h + 5 a s; but inputs of frozen matrices are not kept, there is no
    dropout, and fused attention keeps no scores (their 5 a s term). With checkpoints a layer keeps its input, ``width`` h
    (their section 5), and one layer at a time is recomputed in full. What trains keeps its input too, 8 h + width (2 h + f) more;
    5 h in half precision, where autocast makes a copy for each matrix. On a CPU, autograd keeps within 3 % of this (tests).

    Args:
        config: A transformers configuration.
        width: Bytes of a computed number.
        trained: Whether the layer's weights, in float32, train.
    """
    hidden, heads = int(config.hidden_size), int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    keys = size * int(getattr(config, "num_key_value_heads", None) or heads)
    inner = int(getattr(config, "intermediate_size", None) or 4 * hidden)
    frozen = 8 * hidden + width * (2 * size * heads + 2 * keys + 3 * inner)
    return frozen + trained * (8 * hidden + width * ((2 if width == 4 else 5) * hidden + inner))


def trace(module: nn.Module, x: Tensor, call: Callable[[Tensor], Any] | None = None) -> tuple[int, int]:
    """Run a module on the meta device.

    Args:
        module: The module, on the meta device.
        x: What it gets.
        call: Runs it; None calls it.

    Returns:
        FLOPs of the forward pass, counted by torch, and the bytes that autograd keeps, parameters aside.
    """
    own = {value.untyped_storage()._cdata for value in module.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = tensor  # the tensor too, so that its storage is not used anew
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks, _FusedAttention():
        (call or module)(x)
    return counter.get_total_flops(), sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Attention as on an accelerator, which keeps no scores; on the meta device torch would choose the one that does."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **options)
        given = {
            **dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), args, strict=False)),
            **options,
        }
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            given["query"], given["key"], given["value"], given.get("attn_mask"), True,
            given.get("dropout_p", 0.0), given.get("is_causal", False), scale=given.get("scale"),
        )[0]  # fmt: skip


def _components(decoder: Any) -> list[str]:
    """Return the names of a decoder's components that have weights."""
    return [name for name, kind in getattr(decoder.components, "classes", {}).items() if kind is not None]


def _tokens(way: Any) -> Tensor:
    """Return what an encoder gives for one medium, (T, dim), on the meta device."""
    return torch.empty(way.encoder.spec.tokens or 1, way.encoder.spec.dim, device="meta")


def _matrices(module: nn.Module) -> int:
    """Return the parameters that multiply at every position: all but embeddings."""
    tables = {id(value) for part in module.modules() if isinstance(part, nn.Embedding) for value in part.parameters()}
    return sum(value.numel() for value in module.parameters() if id(value) not in tables)
