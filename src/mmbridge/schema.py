"""YAML to typed dataclasses and back: every error names the path of the value, what was given and what is wanted.

Annotations are the schema. A field's metadata may give bounds (``least``, ``most``) or keep it out of files
(``in_file: False``); a class with a ``from_plain`` classmethod reads itself.
"""

import dataclasses
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from mmbridge.errors import ConfigError
from mmbridge.registry import suggest

T = TypeVar("T")

_SCALARS: dict[Any, tuple[Any, str]] = {
    bool: (bool, "true or false"),
    int: (int, "a whole number"),
    float: (int | float, "a number"),
    str: (str, "a string (in quotes, if it looks like something else)"),
    Path: (str, "a path"),
}


class _Loader(yaml.SafeLoader):
    """Safe YAML that also reads 4e-4 as a number and refuses a key that is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1, which PyYAML follows, wants a dot and a signed exponent in a number; people write 4e-4 and 1e3.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]{1,3}$"), list("-+0123456789")
)


def parse_yaml(text: str, label: str) -> Any:
    """Read YAML, safely.

    Args:
        text: One YAML document.
        label: What errors call it, such as a file name.

    Raises:
        ConfigError: It is not YAML; the message starts with label and line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(
            f"{label}{line}: not valid YAML: {error.problem or error.context}; correct that line."
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"{label}: not valid YAML: {str(error).splitlines()[0]}; save it as plain UTF-8 text."
        ) from None


def plain(value: Any) -> Any:
    """Return a value as plain data for YAML or JSON: dataclasses become dicts, tuples lists."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return plain_fields(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def plain_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a dataclass that belong in a file, as plain data."""
    return {entry.name: plain(getattr(value, entry.name)) for entry in _fields(type(value))}


def mapping(value: Any, path: str) -> dict[str, Any]:
    """Return ``value``, which must be a mapping with words as keys.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, dict):
        raise _wrong(path, value, "a section of 'key: value' pairs")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(
                f"{path or 'the file'} has the key {key!r}, which YAML reads as no word; put it in quotes."
            )
    return value


def build(kind: type[T], value: Any, path: str) -> T:
    """Build a dataclass from plain data.

    Args:
        kind: The dataclass.
        value: Plain data.
        path: Dotted path that names ``value`` in errors; "" for the whole file.

    Raises:
        ConfigError: An unknown or missing key, a wrong type, or a value out of range.
    """
    dot = f"{path}." if path else ""
    entries = {entry.name: entry for entry in _fields(kind)}
    hints = get_type_hints(kind)
    for key in mapping(value, path):
        if key not in entries:
            raise ConfigError(f"{dot}{key} is not a known key{suggest(key, list(entries))}")
    arguments = {}
    for key, entry in entries.items():
        if key in value:
            arguments[key] = convert(hints[key], value[key], dot + key)
            _check_range(arguments[key], entry.metadata, dot + key)
        elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{dot}{key} is missing; add it.")
    return kind(**arguments)


def convert(kind: Any, value: Any, path: str) -> Any:
    """Return a value of plain data as what a type annotation asks for.

    Raises:
        ConfigError: It is something else.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path)
    if origin is Literal:
        # type and value, since 1 == True
        if (type(value), value) not in [(type(option), option) for option in arguments]:
            raise ConfigError(
                f"{path} is {value!r:.60}, which is not accepted{suggest(str(value), list(map(str, arguments)))}"
            )
        return value
    if origin is dict:
        return {key: convert(arguments[1], item, f"{path}.{key}") for key, item in mapping(value, path).items()}
    if origin in (list, tuple, Sequence):
        return _convert_sequence(origin, arguments, value, path)
    if hasattr(kind, "from_plain"):
        return kind.from_plain(value, path)
    if dataclasses.is_dataclass(kind):
        return build(kind, value, path)  # type: ignore[arg-type]
    if kind not in _SCALARS:  # a class that plain data has no notion of: whoever takes it judges
        return value
    accepted, wanted = _SCALARS[kind]
    is_bool = isinstance(value, bool) and kind is not bool
    if not isinstance(value, accepted) or is_bool or (kind is float and not math.isfinite(value)):
        raise _wrong(path, value, wanted)
    return float(value) if kind is float else value


def _convert_union(options: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None and types.NoneType in options:
        return None
    kinds = [option for option in options if option is not types.NoneType]
    known = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
    if isinstance(value, dict):  # of a dataclass and a plain mapping, the dataclass knows the keys
        kinds = known or [kind for kind in kinds if get_origin(kind) is dict] or kinds
    errors = []
    for kind in kinds:
        try:
            return convert(kind, value, path)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _convert_sequence(origin: Any, arguments: tuple[Any, ...], value: Any, path: str) -> Any:
    length = len(arguments) if origin is tuple and Ellipsis not in arguments else None
    if not isinstance(value, list | tuple) or (length is not None and len(value) != length):
        raise _wrong(path, value, "a list" if length is None else f"a list of {length}")
    kinds = arguments if length is not None else (arguments[0],) * len(value)
    items = [
        convert(kind, item, f"{path}[{index}]") for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
    ]
    return items if origin is list else tuple(items)


def _fields(kind: Any) -> Iterator[dataclasses.Field[Any]]:
    return (entry for entry in dataclasses.fields(kind) if entry.metadata.get("in_file", True))


def _check_range(value: Any, metadata: Mapping[str, Any], path: str) -> None:
    if isinstance(value, tuple):
        for index, item in enumerate(value):
            _check_range(item, metadata, f"{path}[{index}]")
    elif value is not None and "least" in metadata and value < metadata["least"]:
        raise _wrong(path, value, f"at least {metadata['least']}")
    elif value is not None and "most" in metadata and value > metadata["most"]:
        raise _wrong(path, value, f"at most {metadata['most']}")


def _wrong(path: str, value: Any, wanted: str) -> ConfigError:
    return ConfigError(f"{path or 'the file'} is {value!r:.60}, but must be {wanted}.")
