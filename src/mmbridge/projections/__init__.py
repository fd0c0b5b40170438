"""Projections: the trained modules between frozen parts, tokens in and tokens out.

Input projections carry encoder tokens to the backbone (``Linear``, ``MLP``, ``Grouping``, ``Resampler``,
``MixtureOfExperts``); output projections carry signal states to a decoder's condition (``SignalTransformer``, ``Pooled``).
Plain ``nn.Module``s that need torch and nothing else, usable alone; ``upcycle``, ``add_modality`` and ``balance_loss`` are for
mixtures of experts. A name loads its file when it is first used (PEP 562).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbridge.projections.base import InputProjection, OutputProjection, Projection
    from mmbridge.projections.grouping import Grouping
    from mmbridge.projections.linear import MLP, Linear
    from mmbridge.projections.mixture import MixtureOfExperts, add_modality, balance_loss, upcycle
    from mmbridge.projections.pooled import Pooled
    from mmbridge.projections.resampler import Resampler
    from mmbridge.projections.signal_transformer import SignalTransformer

_LAZY = {
    "Grouping": "grouping",
    "InputProjection": "base",
    "Linear": "linear",
    "MLP": "linear",
    "MixtureOfExperts": "mixture",
    "OutputProjection": "base",
    "Pooled": "pooled",
    "Projection": "base",
    "Resampler": "resampler",
    "SignalTransformer": "signal_transformer",
    "add_modality": "mixture",
    "balance_loss": "mixture",
    "upcycle": "mixture",
}
__all__ = [
    "MLP",
    "Grouping",
    "InputProjection",
    "Linear",
    "MixtureOfExperts",
    "OutputProjection",
    "Pooled",
    "Projection",
    "Resampler",
    "SignalTransformer",
    "add_modality",
    "balance_loss",
    "upcycle",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
