"""List parts, recipes and weights by name.

Without a kind everything is listed. PATTERN is a glob (* matches anything).
"""

import argparse
import ast
import fnmatch
from collections.abc import Callable
from pathlib import Path

EXAMPLES = """\
  mmbridge ls
  mmbridge ls encoders
  mmbridge ls recipes 'tiny/*'
"""

_PARTS = {
    "encoders": "encoders", "projections": "projections", "backbones": "backbones", "decoders": "decoders",
    "inputs": "ways_in", "outputs": "ways_out",
}  # fmt: skip
KINDS = (*_PARTS, "media", "templates", "recipes", "checkpoints")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("kind", nargs="?", metavar="KIND", help=" | ".join(KINDS))
    parser.add_argument("pattern", nargs="?", default="*", metavar="PATTERN", help="names to list (*)")


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    from mmbridge.errors import ConfigError
    from mmbridge.registry import suggest

    if arguments.kind is not None and arguments.kind not in KINDS:
        raise ConfigError(f"there is no kind {arguments.kind!r} to list{suggest(arguments.kind, list(KINDS))}")
    for kind in KINDS if arguments.kind is None else [arguments.kind]:
        names, summarise = listing(kind)
        indent = ""
        if arguments.kind is None:
            print(kind)
            indent = "  "
        width = max(map(len, names), default=0)
        for name in fnmatch.filter(names, arguments.pattern):
            print(f"{indent}{name:<{width}}  {summarise(name)}".rstrip())


def listing(kind: str) -> tuple[list[str], Callable[[str], str]]:
    """Return the names of a kind and a function from a name to one line about it; loads no torch."""
    from mmbridge import config, hub, messages, modality, registry

    if kind == "media":
        folder = Path(hub.__file__).parent / "media"
        return list(modality.MEDIA), lambda name: _first_docstring_line(folder, name)
    if kind == "templates":
        return messages.template_names(), lambda name: ""
    if kind == "recipes":
        return config.recipe_names(), lambda name: _first_comment(config.find_recipe(name))
    if kind == "checkpoints":
        return hub.shipped_names(), lambda name: _size(hub.resolve(name))
    parts: registry.Registry = getattr(registry, _PARTS[kind])
    return parts.names(), lambda name: _first_docstring_line(parts.folder, name)


def _first_comment(file: Path) -> str:
    """Return the first sentence of the comment that opens a recipe."""
    comment = " ".join(line.lstrip("# ") for line in file.read_text(encoding="utf-8").split("\n\n")[0].splitlines())
    return comment.split(". ")[0].rstrip(".") if comment else ""


def _size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.rglob('*') if file.is_file()) / 1e6:.1f} MB"


def _first_docstring_line(folder: Path, name: str) -> str:
    """Return the summary of a part's class from its source, which is not imported; "" for parts of other packages."""
    for file in folder.glob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            for call in getattr(node, "decorator_list", []):
                if isinstance(call, ast.Call) and call.args and getattr(call.args[0], "value", None) == name:
                    return (ast.get_docstring(node) or "").split("\n")[0]  # type: ignore[arg-type]
    return ""
