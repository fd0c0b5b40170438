"""Ways out: how a medium leaves the sequence."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbridge.outputs.signals import Signals

_LAZY = {"Signals": "signals"}
__all__ = ["Signals"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"mmbridge.outputs.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'mmbridge.outputs' has no attribute {name!r}")
