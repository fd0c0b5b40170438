"""Files <-> tensors: pictures, sounds and videos, read, prepared for encoders, and written. Nothing else.

Names are imported when they are first used, so that importing this package loads no torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from mmbridge.errors import MediaError

if TYPE_CHECKING:
    from mmbridge.media.audio import Audio, prepare_audio
    from mmbridge.media.image import Image, prepare_image
    from mmbridge.media.mel import kaldi_fbank
    from mmbridge.media.video import Video, crop_video, prepare_video

_HOMES = {
    "Audio": "audio",
    "Image": "image",
    "Video": "video",
    "crop_video": "video",
    "kaldi_fbank": "mel",
    "prepare_audio": "audio",
    "prepare_image": "image",
    "prepare_video": "video",
}
_CLASSES = {"image": "Image", "audio": "Audio", "video": "Video"}

__all__ = [
    "Audio",
    "Image",
    "Video",
    "crop_video",
    "kaldi_fbank",
    "load",
    "prepare_audio",
    "prepare_image",
    "prepare_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def load(
    modality: str, source: object, root: str | os.PathLike[str] | None = None, **options: Any
) -> "Image | Audio | Video":
    """Read a medium.

    Args:
        modality: "image", "audio" or "video".
        source: Whatever the ``load`` of ``Image``, ``Audio`` or ``Video`` takes.
        root: Folder that paths are relative to and may not leave.
        options: What that ``load`` takes besides, such as ``sample_rate`` or ``max_frames``.

    Raises:
        MediaError: The modality is unknown, or the source can't be read.
    """
    if modality not in _CLASSES:
        raise MediaError(f"there is no modality {modality!r} that is read from files; accepted: {', '.join(_CLASSES)}.")
    medium: Image | Audio | Video = __getattr__(_CLASSES[modality]).load(source, root=root, **options)
    return medium
