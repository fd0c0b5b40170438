"""All judges behind one name: what does this medium show?"""

from __future__ import annotations

from typing import Any

from mmbridge.synthetic.audio import SAMPLE_RATE
from mmbridge.synthetic.audio_judge import judge_audio
from mmbridge.synthetic.language import parse
from mmbridge.synthetic.scene import CARRIES, lookup
from mmbridge.synthetic.visual_judges import judge_image, judge_video

__all__ = ["judge", "judge_audio", "judge_image", "judge_video"]


def judge(modality: str, medium: Any, sample_rate: int = SAMPLE_RATE) -> dict[str, str | None]:
    """Read from a medium the factors that its modality carries; None where it does not show one.

    Args:
        modality: "text", "image", "video" or "audio".
        medium: A string, (H, W, 3) uint8, (F, H, W, 3) uint8 or (T,) floats.
        sample_rate: Of a sound, in samples per second.

    Raises:
        ConfigError: the modality is not known.
        MediaError: the medium is not of that modality.
    """
    carried = CARRIES[lookup("modality", modality, tuple(CARRIES))]
    if modality == "text":
        return dict.fromkeys(carried) | parse(medium, carried)
    if modality == "audio":
        return judge_audio(medium, sample_rate)
    return judge_image(medium) if modality == "image" else judge_video(medium)
