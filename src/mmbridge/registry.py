"""Lazy registries: names of parts to the files that define them, without importing any of them.

A file in a part's folder that holds ``@register("name")`` is found by reading its text, so adding a part is adding a
file; torch is imported only when a part is created. Other packages add parts through the entry-point groups
``mmbridge.encoders``, ``mmbridge.projections`` and so on.
"""

import difflib
import fnmatch
import functools
import importlib
import importlib.metadata
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

from mmbridge.errors import ConfigError

_T = TypeVar("_T")
_DECORATOR = re.compile(r"^@register\(\s*[\"']([a-z0-9_]+)[\"']", re.MULTILINE)


def suggest(name: str, known: list[str]) -> str:
    """Return ``; did you mean 'x'?`` with at most three close matches, or all names where none is close."""
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.55)
    if close:
        return "; did you mean " + " or ".join(repr(match) for match in close) + "?"
    return f"; known: {', '.join(sorted(known))}."


def _record_arguments(part: type) -> None:
    """Make instances remember what they were built with, so that a bridge from Python can be saved as a recipe."""
    build = part.__init__  # type: ignore[misc]
    signature = inspect.signature(build)

    @functools.wraps(build)
    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        if type(self) is part:
            given = signature.bind(self, *args, **kwargs).arguments
            # Past nn.Module's own attribute handling, which is not ready before its constructor has run.
            object.__setattr__(self, "arguments", {key: value for key, value in list(given.items())[1:]})
        build(self, *args, **kwargs)

    part.__init__ = record  # type: ignore[misc]


def _origin(factory: Any) -> str:
    return f"{factory.__module__}.{factory.__qualname__}"


class Registry:
    """Names to factories for one kind of part.

    Args:
        kind: What the parts are, in the singular ("encoder"); the folder and entry-point group are its plural.
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.folder = Path(__file__).parent / f"{kind}s"
        self._factories: dict[str, Callable[..., Any]] = {}
        self._tiny: dict[str, dict[str, Any]] = {}

    @cached_property
    def _locations(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for file in sorted(self.folder.glob("*.py")):
            for name in _DECORATOR.findall(file.read_text(encoding="utf-8")):
                module = f"mmbridge.{self.kind}s.{file.stem}"
                if name in found:
                    raise ConfigError(f"{self.kind} {name!r} is registered in {found[name]} and {module}; rename one.")
                found[name] = module
        for entry in importlib.metadata.entry_points(group=f"mmbridge.{self.kind}s"):
            found.setdefault(entry.name, entry.module)
        return found

    def register(self, name: str, *, tiny: dict[str, Any] | None = None) -> Callable[[Any], Any]:
        """Decorate a class or function that builds the part called ``name``.

        Args:
            name: Registry name, snake case.
            tiny: Arguments with which contract tests build a small instance; None for a part that needs others.

        Raises:
            ConfigError: The name is taken by another factory.
        """

        def decorate(factory: Any) -> Any:
            present = self._factories.get(name)
            if present is not None and _origin(present) != _origin(factory):
                raise ConfigError(
                    f"{self.kind} {name!r} is registered by {_origin(present)} and {_origin(factory)}; rename one."
                )
            self._factories[name] = factory
            if tiny is not None:
                self._tiny[name] = tiny
            factory.registry_name = name
            if inspect.isclass(factory):
                _record_arguments(factory)
            return factory

        return decorate

    def names(self, pattern: str = "*") -> list[str]:
        """Return the known names that match a glob pattern, sorted; imports no part."""
        return sorted(fnmatch.filter(self._locations.keys() | self._factories.keys(), pattern))

    def get(self, name: str) -> Callable[..., Any]:
        """Return the factory called ``name``.

        Raises:
            ConfigError: Unknown name; the message suggests close ones.
        """
        if name not in self._factories:
            if name not in self._locations:
                raise ConfigError(f"unknown {self.kind} {name!r}{suggest(name, self.names())}")
            importlib.import_module(self._locations[name])
        return self._factories[name]

    def create(self, name: str, **arguments: Any) -> Any:
        """Build the part called ``name``.

        Raises:
            ConfigError: Unknown name or unknown argument.
        """
        self.check(name, arguments)
        return self.get(name)(**arguments)

    def check(self, name: str, arguments: dict[str, Any]) -> None:
        """Check argument names against the factory's signature, without building anything.

        Raises:
            ConfigError: An argument that the part does not take, or a missing one.
        """
        parameters = inspect.signature(self.get(name)).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        for key in arguments:
            if key not in parameters and not takes_any:
                raise ConfigError(f"{self.kind} {name!r} has no argument {key!r}{suggest(key, list(parameters))}")
        for key, parameter in parameters.items():
            variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if parameter.default is parameter.empty and key not in arguments and not variadic:
                raise ConfigError(f"{self.kind} {name!r} needs the argument {key!r}; add it.")

    def tiny(self, name: str) -> dict[str, Any] | None:
        """Return the arguments of a small instance for tests, or None."""
        self.get(name)
        return self._tiny.get(name)


class Table(Mapping[str, _T], Generic[_T]):
    """Names to what modules register under them; a module is imported when one of its names is first looked up.

    Names stand in a fixed order: mmbridge's own, those of other packages, then those of modules that nothing announces.

    Args:
        kind: What is registered, in the singular ("medium").
        group: Entry-point group in which other packages name their modules.
        modules: mmbridge's own names, and the modules that register them.
    """

    def __init__(self, kind: str, group: str, modules: Mapping[str, str]):
        self.kind, self.group, self._own = kind, group, modules
        self._values: dict[str, _T] = {}
        self._origins: dict[str, str] = {}

    @cached_property
    def _modules(self) -> dict[str, str]:
        others = importlib.metadata.entry_points(group=self.group)
        return {**self._own, **{entry.name: entry.module for entry in others if entry.name not in self._own}}

    def register(self, name: str, value: _T, by: Any = None) -> None:
        """Enter a name.

        Args:
            name: What it is looked up by.
            value: What stands under it.
            by: The class or function that tells whose entry it is; by default ``value``.

        Raises:
            ConfigError: Another class or function has entered it.
        """
        origin = _origin(value if by is None else by)
        present = self._origins.setdefault(name, origin)
        if present != origin:
            raise ConfigError(f"{self.kind} {name!r} is registered by {present} and {origin}; rename one.")
        self._values[name] = value

    def __getitem__(self, name: str) -> _T:
        if name not in self._values and name in self._modules:
            importlib.import_module(self._modules[name])
            if name not in self._values:
                raise ConfigError(
                    f"{self._modules[name]} registers no {self.kind} {name!r}, as the entry point in {self.group} says; "
                    "register it there, or correct the entry point."
                )
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        return name in self._modules or name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter({**self._modules, **self._values})

    def __len__(self) -> int:
        return len({**self._modules, **self._values})


encoders = Registry("encoder")
projections = Registry("projection")
backbones = Registry("backbone")
decoders = Registry("decoder")
ways_in = Registry("input")
ways_out = Registry("output")
