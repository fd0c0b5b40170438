"""Ways in: how a medium enters the sequence."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbridge.inputs.encoded import Encoded

_LAZY = {"Encoded": "encoded"}
__all__ = ["Encoded"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"mmbridge.inputs.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'mmbridge.inputs' has no attribute {name!r}")
