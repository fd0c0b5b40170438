"""Encoders: frozen modules from raw media tensors to tokens; each file is imported when its name is first used."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmbridge.encoders.base import Encoder
    from mmbridge.encoders.imagebind import ImageBind, ImageBindModel
    from mmbridge.encoders.imagebind_modules import ImageBindConfig
    from mmbridge.encoders.openclip import OpenClip
    from mmbridge.encoders.timm_backbone import Timm
    from mmbridge.encoders.universal import UniversalConfig, UniversalEncoder

__all__ = [
    "Encoder",
    "ImageBind",
    "ImageBindConfig",
    "ImageBindModel",
    "OpenClip",
    "Timm",
    "UniversalConfig",
    "UniversalEncoder",
]

_FILES = {
    "Encoder": "base",
    "ImageBind": "imagebind",
    "ImageBindConfig": "imagebind_modules",
    "ImageBindModel": "imagebind",
    "OpenClip": "openclip",
    "Timm": "timm_backbone",
    "UniversalConfig": "universal",
    "UniversalEncoder": "universal",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"mmbridge.encoders.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
