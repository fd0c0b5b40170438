"""Evaluation: what a bridge gets right, measured exactly on the synthetic world, or by the field's benchmarks."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbridge.evaluation.any_to_any import Cell, evaluate
    from mmbridge.evaluation.benchmarks.run import run_benchmark

_LAZY = {"evaluate": "any_to_any", "Cell": "any_to_any", "run_benchmark": "benchmarks.run"}
__all__ = ["Cell", "evaluate", "run_benchmark"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"mmbridge.evaluation.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'mmbridge.evaluation' has no attribute {name!r}")
