"""All judges behind one name: what does this medium show?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mmbridge.synthetic.audio import SAMPLE_RATE
from mmbridge.synthetic.audio_judge import judge_audio
from mmbridge.synthetic.imu import IMU_SAMPLE_RATE
from mmbridge.synthetic.language import parse
from mmbridge.synthetic.relief_judges import judge_depth, judge_normal, judge_pointcloud
from mmbridge.synthetic.scene import CARRIES, lookup
from mmbridge.synthetic.signal_judges import judge_fmri, judge_imu
from mmbridge.synthetic.visual_judges import judge_image, judge_video

__all__ = [
    "judge",
    "judge_audio",
    "judge_depth",
    "judge_fmri",
    "judge_image",
    "judge_imu",
    "judge_normal",
    "judge_pointcloud",
    "judge_video",
]

JUDGES: dict[str, Callable[[Any], dict[str, str | None]]] = {
    "image": judge_image,
    "video": judge_video,
    "depth": judge_depth,
    "normal": judge_normal,
    "pointcloud": judge_pointcloud,
    "fmri": judge_fmri,
}
"""Judges of media that have no sample rate."""


def judge(modality: str, medium: Any, sample_rate: float | None = None) -> dict[str, str | None]:
    """Read from a medium the factors that its modality carries; None where it does not show one.

    Args:
        modality: "text", "image", "video", "audio", "depth", "normal", "pointcloud", "imu", "fmri" or a registered one.
        medium: A string, (H, W, 3) uint8, (F, H, W, 3) uint8 or (T,) floats; (H, W) metres, (H, W, 3) vectors,
            (N, 6) or (N, 3) points, (6, T) samples or (512,) voxels, all floats; of a registered modality the medium itself.
        sample_rate: Of a sound or an IMU trace, in samples per second; by default that of renderings.

    Raises:
        ConfigError: the modality is not known.
        MediaError: the medium is not of that modality.
    """
    carried = CARRIES[lookup("modality", modality, tuple(CARRIES))]
    if modality == "text":
        return dict.fromkeys(carried) | parse(medium, carried)
    if modality == "audio":
        return judge_audio(medium, sample_rate or SAMPLE_RATE)
    if modality == "imu":
        return judge_imu(medium, sample_rate or IMU_SAMPLE_RATE)
    return JUDGES[modality](medium)
