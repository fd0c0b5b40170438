"""The field's own metrics, as functions of plain lists and arrays; none loads a network.

Names are imported when they are first used, so that importing this package loads nothing.
"""

import importlib
from typing import Any

_HOMES = {
    "answer_accuracy": "answers",
    "bleu": "captions",
    "cider_d": "captions",
    "clip_score": "embeddings",
    "clipsim": "embeddings",
    "frechet_distance": "embeddings",
    "gaussian_distance": "embeddings",
    "mean_cosine": "embeddings",
    "meteor": "captions",
    "normalise_answer": "answers",
    "rouge_l": "captions",
    "tokenize": "captions",
    "vqa_accuracy": "answers",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
