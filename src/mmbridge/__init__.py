"""mmbridge: let a language model see, hear and answer in any medium by training only small bridges.

Importing this package loads no torch; names load their modules when they are first used (PEP 562).
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {"Bridge": "mmbridge.bridge", "Chat": "mmbridge.chat", "Reply": "mmbridge.replies"}
_MODULES = ("backbones", "decoders", "encoders", "evaluation", "inputs", "media", "outputs", "projections", "synthetic")
__all__ = ["Bridge", "Chat", "Reply", "__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"mmbridge.{name}")
    raise AttributeError(f"module 'mmbridge' has no attribute {name!r}")
