"""The procedural world: scenes of named factors, their renderings, their words, and judges that read them back.

One scene is rendered as picture, video, sound, depth map, normal map, point cloud, IMU trace, brain scan and text; nothing is
learned anywhere in this folder, so what a judge says about a medium is a measurement. docs/world.md defines the world exactly.
"""

import importlib
import importlib.metadata

from mmbridge.synthetic.audio import SAMPLE_RATE, render_audio
from mmbridge.synthetic.conversation import chat_pairs, describe_request, question
from mmbridge.synthetic.dialogues import Dialogues
from mmbridge.synthetic.fmri import NUM_VOXELS, render_fmri, voxel_code
from mmbridge.synthetic.image import render_image
from mmbridge.synthetic.imu import IMU_SAMPLE_RATE, render_imu
from mmbridge.synthetic.judges import (
    judge,
    judge_audio,
    judge_depth,
    judge_fmri,
    judge_image,
    judge_imu,
    judge_normal,
    judge_pointcloud,
    judge_video,
)
from mmbridge.synthetic.language import caption, parse, sentence, shared_caption
from mmbridge.synthetic.relief import NUM_POINTS, render_depth, render_normal, render_pointcloud
from mmbridge.synthetic.renderers import RENDERERS, register_renderer
from mmbridge.synthetic.requests import convert_request, make_request
from mmbridge.synthetic.scene import CARRIES, FACTORS, Scene
from mmbridge.synthetic.video import FRAMES_PER_SECOND, render_video

__all__ = [
    "CARRIES",
    "FACTORS",
    "FRAMES_PER_SECOND",
    "IMU_SAMPLE_RATE",
    "NUM_POINTS",
    "NUM_VOXELS",
    "RENDERERS",
    "SAMPLE_RATE",
    "Dialogues",
    "Scene",
    "caption",
    "chat_pairs",
    "convert_request",
    "describe_request",
    "judge",
    "judge_audio",
    "judge_depth",
    "judge_fmri",
    "judge_image",
    "judge_imu",
    "judge_normal",
    "judge_pointcloud",
    "judge_video",
    "make_request",
    "parse",
    "question",
    "register_renderer",
    "render_audio",
    "render_depth",
    "render_fmri",
    "render_image",
    "render_imu",
    "render_normal",
    "render_pointcloud",
    "render_video",
    "sentence",
    "shared_caption",
    "voxel_code",
]

for _entry in importlib.metadata.entry_points(group="mmbridge.synthetic"):  # other packages' modalities
    importlib.import_module(_entry.module)
