"""Recipes: what one training stage builds, trains and reads, as dataclasses that mirror a YAML file.

A part stands in a recipe by registry name with its arguments beside it (``{name: grouping, num_tokens: 4}``), never by
import path. Reading a recipe checks keys, types and ranges and imports no torch; ``Recipe.validate`` also asks the
registries whether the named parts exist and take these arguments. Hidden sizes and preprocessing are deliberately
absent: parts publish them (``mmbridge.specs``).
"""

import fnmatch
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import yaml

from mmbridge import hub
from mmbridge.errors import ConfigError
from mmbridge.modality import MEDIA
from mmbridge.registry import Registry, backbones, decoders, encoders, projections, suggest, ways_in, ways_out
from mmbridge.schema import build, convert, mapping, parse_yaml, plain, plain_fields

OUTPUT_LOSSES = ("alignment", "denoising")
"""Losses of a way out, unless its class names others in ``loss_names``."""

_NESTED: dict[str, Registry] = {"encoder": encoders, "projection": projections, "decoder": decoders}
_DATA_KEYS = {
    "name": ("name", "samples", "validation_samples", "inputs", "outputs", "mix", "turns", "pool", "pairs"),
    "path": ("path", "validation", "root", "temperature"),
}
_MIXING_KEYS = ("weights", "temperature", "replay")


@dataclass
class Part:
    """A part by registry name; arguments called encoder, projection or decoder are parts themselves."""

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_plain(cls, value: Any, path: str) -> Self:
        """Read ``{name: ..., **arguments}``; ``path`` names the section in errors.

        Raises:
            ConfigError: Not a section, or one without a name.
        """
        arguments = dict(mapping(value, path))
        name = arguments.pop("name", None)
        if not isinstance(name, str):
            raise ConfigError(f"{path} needs a 'name' that says which part it is, such as {{name: linear}}.")
        nested = {key: cls.from_plain(item, f"{path}.{key}") for key, item in arguments.items() if key in _NESTED}
        return cls(name, {**arguments, **nested})

    def to_dict(self) -> dict[str, Any]:
        """Return ``{name: ..., **arguments}`` as plain data."""
        return {"name": self.name, **plain(self.arguments)}


@dataclass
class BridgeConfig:
    """A bridge: its backbone, and by modality the ways in and the ways out."""

    backbone: Part
    inputs: dict[str, Part] = field(default_factory=dict)
    outputs: dict[str, Part] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as ``Bridge.from_config`` takes it."""
        return plain_fields(self)

    def part_names(self) -> list[str]:
        """Return the names of the parts that can train."""
        projections = [part.arguments["projection"] for part in self.inputs.values() if "projection" in part.arguments]
        shared = dict.fromkeys(projection.arguments.get("experts") for projection in projections)
        trains = {
            part.arguments["encoder"].arguments.get("trains")
            for part in self.inputs.values()
            if "encoder" in part.arguments
        }
        shared |= {"encoder": None} if "encoder" in trains else {}
        names = [f"inputs.shared.{name}" for name in shared if name]
        for group, parts, more in (("inputs", self.inputs, []), ("outputs", self.outputs, ["rows"])):
            for modality, part in parts.items():
                inside = ["projection"] if "projection" in part.arguments else []
                inside += ["tags"] if part.arguments.get("tags") else []
                encoder = part.arguments.get("encoder")
                inside += ["tokenizer"] if encoder is not None and encoder.arguments.get("trains") else []
                names += [f"{group}.{modality}.{name}" for name in inside + more]
        given = {
            "lora": self.backbone.arguments.get("lora") is not None,
            "weights": self.backbone.arguments.get("trainable"),
        }
        return names + [f"backbone.{name}" for name, there in given.items() if there]

    def loss_names(self) -> list[str]:
        """Return the names of the losses that a bridge of these parts may give; may import torch."""
        named = [
            (modality, getattr(ways_out.get(part.name), "loss_names", OUTPUT_LOSSES))
            for modality, part in self.outputs.items()
        ] + [
            (modality, getattr(projections.get(part.arguments["projection"].name), "loss_names", ()))
            for modality, part in self.inputs.items()
            if "projection" in part.arguments
        ]
        return ["text"] + [f"{modality}.{loss}" for modality, losses in named for loss in losses]

    def validate(self) -> None:
        """Ask the registries whether every part exists and takes its arguments; builds nothing, but may import torch.

        Raises:
            ConfigError: Unknown modality, part or argument, a missing argument, or one of a wrong type.
        """
        _check_part(backbones, self.backbone, "bridge.backbone")
        for group, parts, registry in (("inputs", self.inputs, ways_in), ("outputs", self.outputs, ways_out)):
            for modality, part in parts.items():
                path = f"bridge.{group}.{modality}"
                if modality not in MEDIA:
                    raise ConfigError(f"{path} is not a known medium{suggest(modality, list(MEDIA))}")
                _check_part(registry, part, path)
        for modality in self.inputs:
            self._check_like(modality)

    def _check_like(self, modality: str) -> None:
        """Follow ``like`` from way in to way in; each must be there, have a projection of the same kind, and not come again."""
        chain = [modality]
        while (like := self.inputs[chain[-1]].arguments.get("like")) is not None:
            path = f"bridge.inputs.{chain[-1]}.like is {like!r}, "
            if like in chain:
                raise ConfigError(f"{path}which would start as itself; name a modality that it is not started from.")
            if like not in self.inputs:
                others = [name for name in self.inputs if name not in chain]
                raise ConfigError(f"{path}which is no way in of this bridge{suggest(like, others)}")
            ours, theirs = (
                getattr(self.inputs[name].arguments.get("projection"), "name", None) for name in (chain[-1], like)
            )
            if ours != theirs:
                raise ConfigError(
                    f"{path}whose projection is a {theirs!r}, but this one is a {ours!r}; give both the same, or remove 'like'."
                )
            chain.append(like)


@dataclass
class ReplayConfig:
    """What earlier stages learned, mixed into a later one.

    Args:
        share: Its part of the training data.
        of: Names of what it is, as for the weights.
    """

    share: float = field(metadata={"least": 0, "most": 1})
    of: list[str]


@dataclass
class DataConfig:
    """Where dialogues come from: a generated world (``name``) or JSONL files of messages (``path``), never both.

    Args:
        name: "synthetic" for the procedural world (``mmbridge.data.synthetic``, which has the defaults).
        samples: Dialogues to generate for training.
        validation_samples: Dialogues to generate for validation; 0 for none.
        inputs: Media that come in.
        outputs: Media that are asked for.
        mix: Weights of the kinds of dialogue.
        turns: Chance that a dialogue goes on by a further turn.
        pool: Media per modality among which dialogues draw.
        pairs: Which two media come in together, such as "audio+video".
        path: JSONL file to train on, or several by name.
        validation: JSONL file to validate on, or several by name; null for none.
        root: Folder that media paths are relative to; null for the folder of each JSONL file.
        weights: How often each of ``inputs``, or each of several files, is drawn (see ``mmbridge.data.mixing``).
        temperature: How far large files are drawn less often than their sizes say.
        replay: What earlier stages learned, and its share.
    """

    name: Literal["synthetic"] | None = None
    samples: int | None = field(default=None, metadata={"least": 1})
    validation_samples: int | None = field(default=None, metadata={"least": 0})
    inputs: list[str] | None = None
    outputs: list[str] | None = None
    mix: dict[str, float] | None = None
    turns: float | None = field(default=None, metadata={"least": 0, "most": 0.9})
    pool: int | None = field(default=None, metadata={"least": 1})
    pairs: list[str] | None = None
    path: str | dict[str, str] | None = None
    validation: str | dict[str, str] | None = None
    root: str | None = None
    weights: dict[str, float] | None = None
    temperature: float | None = None
    replay: ReplayConfig | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.path is None):
            raise ConfigError("data needs either 'name' (synthetic) or 'path' (a JSONL file of messages), not both.")
        given, other = ("name", "path") if self.path is None else ("path", "name")
        for key in _DATA_KEYS[other]:
            if getattr(self, key) is not None:
                raise ConfigError(f"data.{key} goes with data.{other}, but data.{given} is given; remove one of them.")
        for key in _MIXING_KEYS if isinstance(self.path, str) else ():
            if getattr(self, key) is not None:
                raise ConfigError(f"data.{key} needs several files; give data.path as {{name: file, name: file}}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain data with the keys that are given: those of a world, or those of a file."""
        return {key: value for key, value in plain_fields(self).items() if value is not None}


@dataclass
class OptimizerConfig:
    """AdamW and its schedule.

    Args:
        lr: Peak learning rate.
        betas: Decay rates of the running averages.
        weight_decay: Decoupled weight decay.
        warmup: Share of the steps over which the learning rate rises.
        schedule: What follows the warm-up: down in a line or a cosine, or constant.
        floor: Where a line or a cosine ends, as a share of ``lr``.
        clip: Largest norm of the gradients; null for no clipping.
    """

    lr: float = field(default=4e-4, metadata={"least": 0})
    betas: tuple[float, float] = field(default=(0.9, 0.999), metadata={"least": 0, "most": 1})
    weight_decay: float = field(default=0.001, metadata={"least": 0})
    warmup: float = field(default=0.1, metadata={"least": 0, "most": 1})
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    floor: float = field(default=0.0, metadata={"least": 0, "most": 1})
    clip: float | None = field(default=1.0, metadata={"least": 0})


@dataclass
class RunConfig:
    """The loop.

    Args:
        steps: Optimiser steps.
        batch_size: Dialogues of one forward pass on one device.
        accumulate: Forward passes per optimiser step.
        precision: Lightning's name of the number format.
        seed: Seed of everything random.
        validate_every: Steps between validations.
        save_every: Steps between checkpoints.
        checkpoint_activations: Recompute the backbone's activations in the backward pass instead of storing them.
        workers: Processes that read data; 0 reads in the main process.
    """

    steps: int = field(default=1000, metadata={"least": 1})
    batch_size: int = field(default=8, metadata={"least": 1})
    accumulate: int = field(default=1, metadata={"least": 1})
    precision: Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed"] = "32-true"
    seed: int = field(default=0, metadata={"least": 0})
    validate_every: int = field(default=200, metadata={"least": 1})
    save_every: int = field(default=100, metadata={"least": 1})
    checkpoint_activations: bool = False
    workers: int = field(default=0, metadata={"least": 0})


@dataclass(kw_only=True)
class Recipe:
    """One training stage.

    Args:
        schema: Version of this layout.
        stage: What the stage is for.
        parent: Bridge to start from: a folder, a shipped name, or null for fresh projections. Several are given with patterns
            over the names of the parts that each gives, such as ``{runs/reader: ["inputs.*"], mmbridge/tiny: ["outputs.*"]}``.
        bridge: The parts.
        train: Patterns (``*`` matches anything) over part names; exactly the matching parts train.
        losses: Weights by name: "text", "<output>.alignment", "<output>.denoising", "<input>.balance".
        data: Where dialogues come from.
        optimizer: AdamW and its schedule.
        run: The loop.
        name: What the recipe was loaded as, which names its output folder; not part of the file.
    """

    schema: Literal[1]
    stage: Literal["encoder_alignment", "decoder_alignment", "instruction_tuning"]
    parent: str | dict[str, list[str]] | None = None
    bridge: BridgeConfig
    train: list[str]
    losses: dict[str, float]
    data: DataConfig
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)
    name: str = field(default="recipe", compare=False, metadata={"in_file": False})

    @classmethod
    def load(cls, source: str | Path, overrides: Iterable[str] = ()) -> Self:
        """Read a recipe from a YAML file or by the name of a shipped one, and apply overrides.

        Args:
            source: A path, or a name such as "tiny/encoder_alignment".
            overrides: ``dotted.key=value`` each, the value in YAML ("run.steps=10").

        Raises:
            ConfigError: No such recipe, bad YAML (with file and line), an unknown key or a wrong value (with its path).
        """
        file = find_recipe(source)
        name = str(source) if not Path(source).is_file() else file.stem
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"recipe {file} can't be read ({error}); it must be a YAML file in UTF-8.") from None
        values = plain(parse_yaml(text, str(file)))  # plain: sections that share a YAML anchor become copies
        if not isinstance(values, dict):
            raise ConfigError(f"recipe {file} holds no 'key: value' pairs; start from a copy made by `mmbridge cp`.")
        pairs = [_split_override(override) for override in overrides]
        _switch_data(values, [key for key, value in pairs if value is not None])
        for key, value in pairs:
            _override(values, key, value)
        try:
            recipe = cls.from_dict(values)
        except ConfigError as error:
            raise ConfigError(f"recipe {source}: {error}") from None
        recipe.name = name
        return recipe

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read plain data, the inverse of ``to_dict``.

        Raises:
            ConfigError: An unknown or missing key, or a wrong value, with its path.
        """
        return build(cls, values, "")

    @property
    def parents(self) -> dict[str, list[str]]:
        """The bridges to start from, with patterns over the names of the parts that each gives."""
        if isinstance(self.parent, dict):
            return self.parent
        return {} if self.parent is None else {self.parent: ["*"]}

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for YAML or JSON."""
        return plain_fields(self)

    def to_yaml(self) -> str:
        """Return the text of a YAML file that loads as this recipe."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=120)

    def save(self, path: str | Path) -> None:
        """Write the recipe as YAML, by way of a temporary file beside it.

        Raises:
            ConfigError: The file can't be written.
        """
        path = Path(path)
        draft = path.with_name(f".{path.name}.draft-{os.getpid()}")
        try:
            draft.write_text(self.to_yaml(), encoding="utf-8")
            draft.replace(path)
        except OSError as error:
            raise ConfigError(
                f"recipe {path} can't be written ({error.strerror}); give a folder that exists."
            ) from None
        finally:
            draft.unlink(missing_ok=True)

    def validate(self) -> None:
        """Check parts, losses and patterns against the registries and each other; builds nothing, but may import torch.

        Raises:
            ConfigError: What is wrong, with its path and what is accepted.
        """
        self.bridge.validate()
        parts, losses = self.bridge.part_names(), self.bridge.loss_names()
        if not self.train:
            raise ConfigError(f"train is empty, so nothing would be trained; name parts of {', '.join(parts)}.")
        for pattern in self.train:
            if not fnmatch.filter(parts, pattern):
                raise ConfigError(
                    f"train has {pattern!r}, which matches no part of this bridge{suggest(pattern, parts)}"
                )
        for loss, weight in self.losses.items():
            if loss not in losses:
                raise ConfigError(f"losses.{loss} is no loss of this bridge{suggest(loss, losses)}")
            if weight < 0:
                raise ConfigError(f"losses.{loss} is {weight}, but a weight must be at least 0.")
        if not any(self.losses.values()):
            raise ConfigError(f"losses has no weight above 0, so nothing would be learned; known: {', '.join(losses)}.")


def recipe_names(pattern: str = "*") -> list[str]:
    """Return the names of the shipped recipes that match a glob pattern, sorted."""
    folder = hub.package_folder("recipes")
    names = [file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml")]
    return sorted(fnmatch.filter(names, pattern))


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe given by path or by shipped name.

    Raises:
        ConfigError: There is none; the message suggests close names.
    """
    if Path(source).is_file():
        return Path(source)
    if str(source) in recipe_names():
        return hub.package_folder("recipes") / f"{source}.yaml"
    raise ConfigError(f"{str(source)!r} is neither a file nor a shipped recipe{suggest(str(source), recipe_names())}")


def _split_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} is not of the form key=value, such as run.steps=10.")
    return key, parse_yaml(text, f"override {override!r}")


def _switch_data(values: dict[str, Any], overridden: list[str]) -> None:
    """Let an override of data.path replace a generated world with all its settings, and one of data.name a file."""
    data = values.get("data")
    for given, other in (("path", "name"), ("name", "path")):
        if f"data.{given}" in overridden and isinstance(data, dict):
            for key in (*_DATA_KEYS[other], *_MIXING_KEYS):  # these name what the other has
                data.pop(key, None)


def _override(values: dict[str, Any], key: str, value: Any) -> None:
    # the names of losses hold dots themselves
    path = key.split(".", 1) if key.startswith("losses.") else key.split(".")
    section = values
    for depth, step in enumerate(path[:-1]):
        where = ".".join(path[: depth + 1])
        if section.get(step) is None:
            if depth and step not in section:
                raise ConfigError(f"override {key}: the recipe has no section {where!r}{suggest(step, list(section))}")
            section[step] = {}
        section = section[step]
        if not isinstance(section, dict):
            raise ConfigError(f"override {key}: {where} is {section!r:.60}, not a section; set {where} itself.")
    section[path[-1]] = value


def _check_part(registry: Registry, part: Part, path: str) -> None:
    try:
        registry.check(part.name, part.arguments)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    parameters = inspect.signature(registry.get(part.name), eval_str=True).parameters
    for key, value in part.arguments.items():
        if isinstance(value, Part):
            _check_part(_NESTED[key], value, f"{path}.{key}")
        else:
            convert(parameters[key].annotation, value, f"{path}.{key}")
