"""Public benchmarks over data in their official layouts; nothing is downloaded.

Names are imported when they are first used; ``BENCHMARKS`` loads no torch.
"""

import importlib
from typing import Any

_HOMES = {
    "BENCHMARKS": "table",
    "Benchmark": "base",
    "Request": "base",
    "format_result": "run",
    "read_requests": "base",
    "run_benchmark": "run",
    "score": "scoring",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
