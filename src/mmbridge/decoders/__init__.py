"""Decoders: frozen modules from a condition to media; each file is imported when its name is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbridge.decoders.audioldm import AudioLDM
    from mmbridge.decoders.audioldm2 import AudioLDM2
    from mmbridge.decoders.base import Decoder
    from mmbridge.decoders.ltx import LTX
    from mmbridge.decoders.modelscope import ModelScope
    from mmbridge.decoders.stable_diffusion import StableDiffusion

__all__ = ["LTX", "AudioLDM", "AudioLDM2", "Decoder", "ModelScope", "StableDiffusion"]

_FILES = {
    "AudioLDM": "audioldm",
    "AudioLDM2": "audioldm2",
    "Decoder": "base",
    "LTX": "ltx",
    "ModelScope": "modelscope",
    "StableDiffusion": "stable_diffusion",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
