"""The composition: ways in, a backbone, ways out, one sequence; the only place where parts meet."""

import dataclasses
import fnmatch
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from mmbridge import hub, media, registry
from mmbridge.conversion import probe
from mmbridge.errors import CheckpointError, ConfigError, DataError, MessageError, MMBridgeError, ShapeError
from mmbridge.generation import Sampling, generate, stream
from mmbridge.messages import MediumPart, MediumPiece, Message, parse_messages, render
from mmbridge.replies import Event, Reply
from mmbridge.sequence import Batch, MediumSpan, TokenSequence, assemble, attention_of, check_supported

log = logging.getLogger("mmbridge")

# Arguments of parts that are parts themselves, and the registry that builds them.
_NESTED = {"encoder": registry.encoders, "projection": registry.projections, "decoder": registry.decoders}


Adapt = Callable[[str, dict[str, Tensor], Mapping[str, Tensor]], dict[str, Tensor]]
"""What ``Bridge.load_parts`` may be given: a part's name, its stored tensors and those here, to what is read."""


class Store(Protocol):
    """Where frozen results are kept; ``mmbridge.data.features.FeatureStore`` is the one that ships."""

    def fetch(
        self, fingerprint: str, parts: Sequence[MediumPart], compute: Any, root: str | Path | None = None
    ) -> list[Any]:
        """Return what ``compute(parts)`` gives, computed only for parts that are not stored yet; paths are below ``root``."""


class Bridge(nn.Module):
    """Any media in, any media out, through a language model.

    Args:
        backbone: The language model, from ``mmbridge.backbones``.
        inputs: Ways in by modality, from ``mmbridge.inputs``.
        outputs: Ways out by modality, from ``mmbridge.outputs``.

    Raises:
        ShapeError: Two parts do not fit; the sentence names both and the widths.
        ConfigError: A part reads or makes another modality than it is named for.

    Calling a bridge on a ``Batch`` returns its losses by name: ``text``, and ``<modality>.<loss>`` for each way out and in.
    """

    def __init__(
        self, backbone: Any, inputs: Mapping[str, Any] | None = None, outputs: Mapping[str, Any] | None = None
    ):
        super().__init__()
        self.backbone = backbone
        self.inputs = nn.ModuleDict(inputs or {})
        self.outputs = nn.ModuleDict(outputs or {})
        self.first_ids: dict[str, int] = {}
        self._shared: dict[str, nn.Module] = {}  # what several ways in have, by the name they share it under
        for modality, way in self.inputs.items():
            if hasattr(way, "share"):
                self._build(f"input {modality!r}", way.share, self._shared)
            self._build(f"input {modality!r}", way.build, modality, backbone.dim)
        following = backbone.vocabulary_size
        for modality, way in self.outputs.items():
            self._build(f"output {modality!r}", way.build, modality, backbone)
            self.first_ids[modality] = following
            following += way.rows.count
        self.lineage: list[dict[str, Any]] = []

    @staticmethod
    def _build(name: str, build: Any, *arguments: Any) -> None:
        try:
            build(*arguments)
        except (ShapeError, ConfigError) as error:
            message = str(error)
            raise type(error)(message if name in message else f"{name}: {message}") from None

    # Sequences -------------------------------------------------------------------------------------------------------

    def prepare(
        self,
        dialogues: Sequence[Sequence[Message]],
        *,
        root: str | Path | None = None,
        reply: bool = False,
        store: Store | None = None,
        targets: bool = False,
    ) -> list[TokenSequence]:
        """Turn dialogues into sequences: load media, encode them together, render and tokenise.

        Args:
            dialogues: Dialogues in the message schema.
            root: Folder below which paths of media must lie; None allows any path.
            reply: Whether sequences end with the prompt for the assistant's reply.
            store: Where frozen features and targets are kept; None computes them now.
            targets: Whether media of the assistant get targets, for training.

        Raises:
            MessageError: A dialogue breaks the schema or holds a medium that the bridge has no way for.
            MediaError: A file can't be read.
            DataError: A medium of the assistant lacks what its target needs.
        """
        tokenizer = self.backbone.tokenizer
        marks = {
            "bos": tokenizer.bos_token or "",
            "eos": tokenizer.eos_token or "",
            "specials": tokenizer.all_special_tokens,
        }
        rendered = []
        wanted: dict[tuple[str, bool], list[tuple[int, int, MediumPart]]] = {}
        for number, dialogue in enumerate(dialogues):
            pieces = render(parse_messages(dialogue), self.backbone.template, reply=reply, **marks)
            rendered.append(pieces)
            found = [piece for piece in pieces if isinstance(piece, MediumPiece)]
            for index, piece in enumerate(found):
                check_supported(piece.part, piece.supervised, self.inputs, self.outputs)
                wanted.setdefault((piece.part.type, piece.supervised), []).append((number, index, piece.part))
        contents: dict[tuple[int, int], Any] = {}
        for (modality, leaving), entries in wanted.items():
            if leaving and not targets:
                continue
            way = self.outputs[modality] if leaving else self.inputs[modality]
            # Only what a result depends on, so that nothing else is read or makes a stored result look new.
            unread: dict[str, Any] = (
                {"caption": None} if not leaving else {} if way.reads_media else {"path": None, "data": None}
            )
            parts = [dataclasses.replace(part, **unread) for _, _, part in entries]

            def compute(parts: Sequence[MediumPart], way: Any = way, leaving: bool = leaving) -> list[Any]:
                if leaving:
                    return way.targets([load_part(part, root) for part in parts], [part.caption for part in parts])
                loaded = [load_part(part, root) for part in parts]
                empty = next((part for part, medium in zip(parts, loaded, strict=True) if medium is None), None)
                if empty is not None:
                    raise MessageError(f"a medium of type {empty.type!r} that the user gives has no 'path' or 'data'.")
                return way.features(loaded)

            values = compute(parts) if store is None else store.fetch(way.fingerprint, parts, compute, root)
            contents.update({(number, index): value for (number, index, _), value in zip(entries, values, strict=True)})
        return [
            assemble(
                pieces,
                [contents.get((number, index)) for index in range(sum(isinstance(piece, MediumPiece) for piece in pieces))],
                self.backbone, self.inputs, self.outputs, self.first_ids,
            )
            for number, pieces in enumerate(rendered)
        ]  # fmt: skip

    def embed(self, batch: Batch) -> Tensor:
        """Return input embeddings (B, T, D): words, new rows, and slots of media that come in."""
        embeddings = self.embed_ids(batch.ids)
        spans, slots = [], []
        for modality, placed in batch.entering.items():
            slots.append(self.inputs[modality].enter([span.content for span in placed]))
            spans += placed
        if not spans:
            return embeddings
        places = torch.cat([flat_places(span, batch.ids.shape[1]) for span in spans]).to(embeddings.device)
        filled = embeddings.flatten(0, 1).index_copy(0, places, torch.cat(slots).to(embeddings.dtype))
        return filled.view_as(embeddings)

    def embed_ids(self, ids: Tensor) -> Tensor:
        """Look up ids (...,), the backbone's and the new ones -> (..., D)."""
        size = self.backbone.vocabulary_size
        embeddings = self.backbone.embed(ids.clamp(max=size - 1))
        if not self.outputs:
            return embeddings
        rows = torch.cat([way.rows.embedding for way in self.outputs.values()]).to(embeddings.dtype)
        return torch.where((ids >= size).unsqueeze(-1), rows[(ids - size).clamp(min=0)], embeddings)

    def full_spans(self, batch: Batch) -> list[MediumSpan]:
        """Return the spans inside which attention goes both ways."""
        pairs = ((self.inputs, batch.entering), (self.outputs, batch.leaving))
        return [
            span
            for ways, spans in pairs
            for name, placed in spans.items()
            if ways[name].attention == "full"
            for span in placed
        ]

    def logits(self, hidden: Tensor) -> Tensor:
        """Score what may come next: (..., D) -> (..., V + emitted rows); added tokens stand behind the base vocabulary."""
        scores = self.backbone.logits(hidden)
        if not self.outputs:
            return scores
        head = torch.cat([way.rows.head for way in self.outputs.values()]).to(hidden.dtype)
        return torch.cat([scores, F.linear(hidden, head)], dim=-1)

    @property
    def emitted_ids(self) -> list[int]:
        """Ids of the added tokens that the model may choose, in the order of ``logits``."""
        return [
            self.first_ids[modality] + index
            for modality, way in self.outputs.items()
            for index in range(way.rows.head.shape[0])
        ]

    def token_of(self, column: int) -> int:
        """Return the id that a column of ``logits`` stands for."""
        size = self.backbone.vocabulary_size
        return column if column < size else self.emitted_ids[column - size]

    def column_of(self, token: int) -> int:
        """Return the column of ``logits`` that an id has."""
        size = self.backbone.vocabulary_size
        return token if token < size else size + self.emitted_ids.index(token)

    # Training --------------------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of a batch by name, each a scalar.

        Every trainable part takes part in the graph, also where the batch lacks its modality; otherwise distributed
        training would wait for its gradient for ever.
        """
        embeddings = self.embed(batch)
        hidden = self.backbone(embeddings, attention_of(batch.mask, self.full_spans(batch)))
        flat, flat_embeddings = hidden.flatten(0, 1), embeddings.flatten(0, 1)  # (B * T, D)
        losses: dict[str, Tensor] = {}
        if len(batch.answers):
            emitted = torch.tensor(self.emitted_ids, device=batch.answers.device)
            size = self.backbone.vocabulary_size
            answers = batch.answers
            if len(emitted):
                column = (answers.unsqueeze(-1) == emitted).int().argmax(-1) + size
                answers = torch.where(answers >= size, column, answers)
            losses["text"] = F.cross_entropy(self.logits(flat[batch.predicting]).float(), answers)
        for modality, spans in batch.leaving.items():
            if any(span.content is None for span in spans):
                raise DataError(
                    f"the batch has media of type {modality!r} to make but no targets; prepare it with targets=True."
                )
            places = torch.stack([flat_places(span, batch.ids.shape[1]) for span in spans]).to(flat.device)  # (N, K)
            made = self.outputs[modality].losses(
                flat[places], flat_embeddings[places], [span.content for span in spans], batch.seed
            )
            losses.update({f"{modality}.{name}": value for name, value in made.items()})
        losses |= {f"{name}.{key}": loss for name in batch.entering for key, loss in self.inputs[name].losses().items()}
        idle = [
            parameter
            for ways, present in ((self.inputs, batch.entering), (self.outputs, batch.leaving))
            for name, way in ways.items()
            if name not in present
            for part in way.trainable().values()
            for parameter in part.parameters()
            if parameter.requires_grad
        ]
        if idle and losses:
            name = next(iter(losses))
            losses[name] = losses[name] + 0.0 * torch.stack([parameter.flatten()[0] for parameter in idle]).sum()
        return losses

    def parts(self) -> dict[str, dict[str, nn.Parameter]]:
        """Return the parameters that can train, by part: ``inputs.image.projection``, ``inputs.shared.<name>``, ..."""
        parts = {f"inputs.shared.{name}": dict(module.named_parameters()) for name, module in self._shared.items()}
        shared = {id(value) for parameters in parts.values() for value in parameters.values()}
        parts |= {
            name: {key: value for key, value in module.named_parameters() if id(value) not in shared}
            for name, module in self.trainable().items()
        }
        return parts | {f"backbone.{name}": part for name, part in self.backbone.parts().items()}

    def trainable(self) -> dict[str, nn.Module]:
        """Return the modules of the ways in and out that can train, by part: ``inputs.image.projection``, ..."""
        return {
            f"{side}.{modality}.{name}": module
            for side, ways in (("inputs", self.inputs), ("outputs", self.outputs))
            for modality, way in ways.items()
            for name, module in way.trainable().items()
        }

    def frozen(self) -> dict[str, dict[str, Any]]:
        """Return the manifest entries of the frozen parts by name: ``backbone``, ``inputs.image.encoder``, ..."""
        entries = {"backbone": self.backbone.describe()}
        for side, ways in (("inputs", self.inputs), ("outputs", self.outputs)):
            for modality, way in ways.items():
                entries.update({f"{side}.{modality}.{name}": entry for name, entry in way.describe().items()})
        return entries

    # Use -------------------------------------------------------------------------------------------------------------

    def generate(self, messages: Sequence[Any], **options: Any) -> Any:
        """Answer a dialogue with a ``Reply``, or a list of dialogues together with a list of them.

        Args:
            messages: A dialogue (list of messages) or a list of dialogues.
            **options: ``root`` and the fields of ``mmbridge.generation.Sampling``.
        """
        batched = bool(messages) and isinstance(messages[0], list | tuple)
        replies: list[Reply] = generate(self, messages if batched else [messages], **options)
        return replies if batched else replies[0]

    def stream(self, messages: Sequence[Message], root: str | Path | None = None, **sampling: Any) -> Iterator[Event]:
        """Answer one dialogue, and tell of the reply while it is made; arguments are those of ``generate``."""
        return (event for _, event in stream(self, [messages], Sampling(**sampling), root=root))

    # Saving ----------------------------------------------------------------------------------------------------------

    def config(self) -> dict[str, Any]:
        """Return the bridge as plain data: registry names and arguments, as in a recipe.

        Raises:
            ConfigError: A part is not registered or was given an argument that is not plain data.
        """
        return {
            "backbone": part_config(self.backbone, "backbone"),
            "inputs": {name: part_config(way, f"inputs.{name}") for name, way in self.inputs.items()},
            "outputs": {name: part_config(way, f"outputs.{name}") for name, way in self.outputs.items()},
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build a bridge from plain data, as in a recipe; under ``torch.device("meta")`` without any weights.

        Raises:
            ConfigError: Unknown names or arguments.
            ShapeError: Parts do not fit.
        """
        backbone = create_part(registry.backbones, config["backbone"])
        inputs = {name: create_part(registry.ways_in, part) for name, part in (config.get("inputs") or {}).items()}
        outputs = {name: create_part(registry.ways_out, part) for name, part in (config.get("outputs") or {}).items()}
        return cls(backbone, inputs, outputs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the trained parts, the configuration and a manifest of the frozen parts.

        These are a few megabytes, or as large as the language model where all its weights can train.

        The manifest also holds a few numbers of what each projection computes, for ``mmbridge verify``.

        Raises:
            CheckpointError: Writing failed; what was there before is unchanged.
        """
        config, frozen, modules = self.config(), self.frozen(), self.trainable()
        with hub.atomic_folder(Path(folder)) as draft:
            entries = {}
            (draft / "parts").mkdir()
            for name, parameters in self.parts().items():
                file = draft / "parts" / f"{name}.safetensors"
                save_file({key: value.detach().cpu().contiguous() for key, value in parameters.items()}, file)
                count = sum(value.numel() for value in parameters.values())
                check = probe.entry(name, modules.get(name))
                entries[name] = {"sha256": hub.file_sha256(file), "parameters": count, **check}
            hub.write_facts(draft, config, entries, frozen, lineage=self.lineage)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Self:
        """Open a saved bridge: a folder, a training run, a hub id or a shipped name such as ``mmbridge/tiny``.

        Raises:
            CheckpointError: A file is missing or altered; the message names it and its hash.
        """
        folder = find_bridge(source)
        manifest = hub.read_json(folder / "manifest.json")
        bridge = cls.from_config(hub.localised(hub.read_json(folder / "config.json"), folder))
        bridge.load_parts(source)
        present = bridge.frozen()
        for name, entry in manifest["frozen"].items():
            found = present[name]["sha256"]
            if entry["sha256"] and found != entry["sha256"]:
                raise CheckpointError(
                    f"the frozen part {name!r} of {str(source)!r} is not the one it was trained with: its weights have hash "
                    f"{str(found)[:16]}..., the manifest wants {entry['sha256'][:16]}...; restore the original weights."
                )
        bridge.lineage = manifest["lineage"]
        bridge.eval()
        return bridge

    def load_parts(
        self, source: str | Path, *, strict: bool = True, only: Sequence[str] = ("*",), adapt: Adapt | None = None
    ) -> list[str]:
        """Read trained parts from a saved bridge.

        Args:
            source: Where the other bridge is.
            strict: Whether every part of this bridge must be there; otherwise parts that are missing keep their start.
            only: Patterns over the names of the parts to read.
            adapt: Changes the tensors of a part before they are compared, given its name, what is stored and what is here.

        Returns:
            Names of the parts that were read.

        Raises:
            CheckpointError: A part is missing, altered, or of another shape.
        """
        folder = find_bridge(source)
        entries = hub.read_json(folder / "manifest.json")["parts"]
        parts = {
            name: part for name, part in self.parts().items() if any(fnmatch.fnmatchcase(name, one) for one in only)
        }
        absent = [name for name in parts if name not in entries]
        unknown = [name for name in entries if name not in parts]
        if strict and (absent or unknown):
            raise CheckpointError(
                f"{str(source)!r} does not fit this bridge: it lacks {absent or 'nothing'} and has {unknown or 'nothing'} more."
            )
        read = [name for name in parts if name in entries]
        for name in read:
            parameters = parts[name]
            file = folder / "parts" / f"{name}.safetensors"
            wanted = entries[name]["sha256"]
            if not file.is_file():
                raise CheckpointError(
                    f"{file} is missing (its hash should be {wanted[:16]}...); restore it from a good copy."
                )
            found = hub.file_sha256(file)
            if found != wanted:
                raise CheckpointError(
                    f"{file} was altered: its hash is {found[:16]}..., the manifest wants {wanted[:16]}...; restore it."
                )
            tensors = adapt(name, load_file(file), parameters) if adapt else load_file(file)
            shapes = {key: tuple(value.shape) for key, value in tensors.items()}
            ours = {key: tuple(value.shape) for key, value in parameters.items()}
            if shapes != ours:
                clash = sorted(set(shapes.items()) ^ set(ours.items()))[0]
                raise CheckpointError(
                    f"{file} does not fit part {name!r}, first at {clash[0]} {clash[1]}; build the bridge it was saved from."
                )
            with torch.no_grad():
                for key, value in tensors.items():
                    parameters[key].copy_(value)
        return read


def find_bridge(source: str | Path) -> Path:
    """Return the folder of a saved bridge: the source itself, or ``bridge`` in it where the source is a training run."""
    folder = hub.resolve(source)
    inside = folder / "bridge"
    return inside if (inside / "manifest.json").is_file() and not (folder / "manifest.json").exists() else folder


def load_part(part: MediumPart, root: str | Path | None) -> Any:
    """Load a part's medium; None where it has only a caption."""
    source = part.data if part.data is not None else part.path
    if source is None:
        return None
    return media.load(part.type, source, root=root, **part.options)


def flat_places(span: MediumSpan, length: int) -> Tensor:
    """Return the positions of a span as indices into the flattened (B, T)."""
    start = span.row * length + span.start
    return torch.arange(start, start + span.length)


def part_config(part: Any, path: str) -> dict[str, Any]:
    """Return a part as its registry name and arguments."""
    if not hasattr(part, "arguments"):
        raise ConfigError(
            f"{path} ({type(part).__name__}) is not a registered part; decorate it with @register to save it."
        )
    config: dict[str, Any] = {"name": part.registry_name}
    for key, value in part.arguments.items():
        if key in _NESTED:
            config[key] = part_config(value, f"{path}.{key}")
            continue
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Path):
            value = str(value)
        try:
            config[key] = json.loads(json.dumps(value))
        except TypeError:
            raise ConfigError(
                f"{path}.{key} is a {type(value).__name__}, which a configuration can't hold; pass plain data."
            ) from None
    return config


def create_part(parts: registry.Registry, config: Mapping[str, Any]) -> Any:
    """Build a part and the parts inside it."""
    arguments = {
        key: create_part(_NESTED[key], value) if key in _NESTED else value
        for key, value in config.items()
        if key != "name"
    }
    try:
        return parts.create(config["name"], **arguments)
    except TypeError as error:
        raise ConfigError(f"{parts.kind} {config['name']!r}: {error}") from error
    except KeyError:
        raise ConfigError(f"a {parts.kind} needs the key 'name'; known: {', '.join(parts.names())}.") from None


__all__ = ["Bridge", "MMBridgeError", "Store", "create_part", "load_part", "part_config"]
