"""Backbones: embeddings to hidden states; logits only where they are asked for."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbridge.backbones.causal_lm import CausalLM
    from mmbridge.backbones.lora import Lora
    from mmbridge.backbones.rows import NewRows

_LAZY = {"CausalLM": "causal_lm", "Lora": "lora", "NewRows": "rows"}
__all__ = ["CausalLM", "Lora", "NewRows"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(f"mmbridge.backbones.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'mmbridge.backbones' has no attribute {name!r}")
