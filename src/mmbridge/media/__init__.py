"""Files <-> tensors: media of every kind, read, prepared for encoders, and written. Nothing else.

Names are imported when they are first used, so that importing this package loads no torch.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from mmbridge.errors import MediaError
from mmbridge.modality import MEDIA
from mmbridge.registry import suggest

if TYPE_CHECKING:
    from mmbridge.media.audio import Audio, prepare_audio
    from mmbridge.media.fmri import Fmri, prepare_fmri
    from mmbridge.media.image import Image, prepare_image
    from mmbridge.media.imu import Imu, prepare_imu
    from mmbridge.media.maps import Depth, Normal, prepare_disparity, prepare_map
    from mmbridge.media.mel import kaldi_fbank
    from mmbridge.media.pointcloud import PointCloud, prepare_points
    from mmbridge.media.video import Video, crop_video, prepare_video

_HOMES = {
    "Audio": "audio",
    "Depth": "maps",
    "Fmri": "fmri",
    "Image": "image",
    "Imu": "imu",
    "Normal": "maps",
    "PointCloud": "pointcloud",
    "Video": "video",
    "crop_video": "video",
    "kaldi_fbank": "mel",
    "prepare_audio": "audio",
    "prepare_disparity": "maps",
    "prepare_fmri": "fmri",
    "prepare_image": "image",
    "prepare_imu": "imu",
    "prepare_map": "maps",
    "prepare_points": "pointcloud",
    "prepare_video": "video",
}

__all__ = [
    "Audio",
    "Depth",
    "Fmri",
    "Image",
    "Imu",
    "Normal",
    "PointCloud",
    "Video",
    "crop_video",
    "kaldi_fbank",
    "load",
    "prepare_audio",
    "prepare_disparity",
    "prepare_fmri",
    "prepare_image",
    "prepare_imu",
    "prepare_map",
    "prepare_points",
    "prepare_video",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def load(modality: str, source: object, root: str | os.PathLike[str] | None = None, **options: Any) -> Any:
    """Read a medium.

    Args:
        modality: "image", "audio", "video", "depth", "normal", "pointcloud", "imu", "fmri", or the name of a registered one.
        source: Whatever the ``load`` of its class takes: ``Image``, ``Audio``, ``Video``, ``Depth``, ``Normal``, ``PointCloud``,
            ``Imu``, ``Fmri``, or the registered one.
        root: Folder that paths are relative to and may not leave.
        options: What that ``load`` takes besides, such as ``sample_rate`` or ``max_frames``.

    Returns:
        An object of that class.

    Raises:
        MediaError: The modality is unknown, or the source can't be read.
    """
    if modality not in MEDIA:
        raise MediaError(f"there is no modality {modality!r} that is read from files{suggest(modality, list(MEDIA))}")
    return MEDIA[modality].load(source, root=root, **options)
