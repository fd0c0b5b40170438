"""The import layers: a file imports from lower layers, from its own folder, and from the libraries it may use."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mmbridge

SOURCE = Path(mmbridge.__file__).parent
LAYERS = (
    {"errors", "specs"},
    {"registry"},
    {"modality"},
    {"schema", "hub", "media"},
    {"config", "messages"},
    {"encoders", "projections", "backbones", "decoders", "synthetic"},
    {"inputs", "outputs", "conversion"},
    {"sequence", "replies"},
    {"generation", "data"},  # the loop is given a bridge; it does not know the class
    {"bridge"},
    {"verification"},
    {"training", "evaluation", "chat", "published"},
    {"demo", "planning"},
    {"cli"},
    {"__main__"},
)
RANK = {unit: rank for rank, layer in enumerate(LAYERS) for unit in layer}
"""Layer of every file and folder of the package, lowest first."""

HEAVY = {
    "av": ("media/",),
    "diffusers": ("decoders/",),
    "lightning": ("training/",),
    "nibabel": ("media/fmri.py",),
    "open_clip": ("encoders/clip.py", "encoders/openclip.py", "encoders/imagebind.py"),
    "peft": ("backbones/lora.py",),
    "soundfile": ("media/",),
    "timm": ("encoders/timm_backbone.py",),
    "transformers": ("encoders/", "backbones/", "decoders/"),
}
"""Libraries that only some files may use."""

LIGHT = {
    "__init__",
    "__main__",
    "cli",
    "config",
    "errors",
    "hub",
    "messages",
    "modality",
    "registry",
    "schema",
    "specs",
}
"""What must stay loadable in a moment, and the few libraries that it may use."""
LIGHT_LIBRARIES = {"huggingface_hub", "jinja2", "safetensors", "yaml"}

FILES = sorted(SOURCE.rglob("*.py"))


def name_of(file: Path) -> str:
    return file.relative_to(SOURCE).as_posix()


def unit_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports anywhere, also inside functions and for type checkers only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            assert node.module is not None
            for alias in node.names if node.module == "mmbridge" else ():
                # ``from mmbridge import Bridge`` loads the module that the lazy name stands for
                yield mmbridge._LAZY.get(
                    alias.name, "mmbridge" if alias.name.startswith("__") else f"mmbridge.{alias.name}"
                )
            if node.module != "mmbridge":
                yield node.module


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imported_units(file: Path) -> set[str]:
    return {name.split(".")[1] for name in imports_of(parse(file)) if name.startswith("mmbridge.")}


def imported_libraries(file: Path) -> set[str]:
    return {name.split(".")[0] for name in imports_of(parse(file))} - {"mmbridge"} - sys.stdlib_module_names


def test_every_file_and_folder_has_a_layer():
    units = {unit_of(file) for file in FILES} - {"__init__"}
    assert units == set(RANK), "add new files and folders to LAYERS"


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_import_from_lower_layers_and_their_own_folder(file):
    unit = unit_of(file)
    if unit == "__init__":
        assert not imported_units(file), "names of the package are lazy"
        return
    above = [other for other in imported_units(file) - {unit} if RANK[other] >= RANK[unit]]
    assert not above, f"{name_of(file)} (layer {RANK[unit]}) imports {above}"
    misplaced = [
        library
        for library in imported_libraries(file)
        if library in HEAVY and not name_of(file).startswith(HEAVY[library])
    ]
    assert not misplaced, f"{name_of(file)} imports {misplaced}, which belong in {[HEAVY[name] for name in misplaced]}"


@pytest.mark.parametrize("file", [file for file in FILES if unit_of(file) in LIGHT], ids=name_of)
def test_light_files_use_light_libraries(file):
    assert imported_libraries(file) <= LIGHT_LIBRARIES


@pytest.mark.parametrize("file", [file for file in FILES if unit_of(file) == "projections"], ids=name_of)
def test_projections_are_a_leaf_on_torch(file):
    assert imported_libraries(file) <= {"torch"}
    assert imported_units(file) <= {"projections", "errors", "specs", "registry"}


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_stay_small_and_unpickle_nothing(file):
    assert len(file.read_text(encoding="utf-8").splitlines()) < 500
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
            safe = [keyword for keyword in node.keywords if keyword.arg == "weights_only"]
            assert safe and ast.unparse(safe[0].value) == "True", f"line {node.lineno} may run code from a file"
