"""``mmbridge.projections`` is a leaf: it needs torch and nothing else, and says so by what it loads."""

import doctest
import importlib
import subprocess
import sys

import pytest

import mmbridge.projections

FOREIGN = (
    "einops",
    "transformers",
    "diffusers",
    "lightning",
    "safetensors",
    "peft",
    "timm",
    "open_clip",
    "torchvision",
)
SCRIPT = f"""
import sys
import mmbridge.projections
assert "torch" not in sys.modules, "the package itself loads torch"
for name in mmbridge.projections.__all__:
    getattr(mmbridge.projections, name)
import torch
projection = mmbridge.projections.Grouping(8, 6, 2, num_concepts=(3,), depths=(1, 1, 1), dim_hidden=8, num_heads=2)
assert projection(torch.randn(1, 5, 8)).shape == (1, 2, 6)
print([name for name in {FOREIGN!r} if name in sys.modules])
own = sorted(name.removeprefix("mmbridge.") for name in sys.modules if name.startswith("mmbridge."))
print([name for name in own if not name.startswith("projections")])
"""


def test_loads_nothing_beyond_torch_errors_and_registry():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    foreign, own = done.stdout.splitlines()
    assert foreign == "[]"
    assert set(eval(own)) <= {"errors", "registry", "specs"}


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match=r"mmbridge\.projections.*'Groupng'"):
        _ = mmbridge.projections.Groupng
    assert "Grouping" in dir(mmbridge.projections)


@pytest.mark.parametrize("module", ["grouping", "linear", "mixture", "pooled", "resampler", "signal_transformer"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"mmbridge.projections.{module}"))
    assert result.attempted > 0 and result.failed == 0
