"""Brain scans of scenes: all five factors in a fixed linear code of one subject's voxels, under noise."""

from __future__ import annotations

from functools import cache

import numpy as np

from mmbridge.synthetic.image import generator
from mmbridge.synthetic.scene import FACTORS, Scene

NUM_VOXELS = 512


@cache
def voxel_code() -> np.ndarray:
    """What each value of each factor adds to each voxel, for the one subject there is.

    Returns:
        (512, 28) standard normal numbers, a column for each value, in the order of ``FACTORS``.
    """
    code = np.random.default_rng(5128).standard_normal((NUM_VOXELS, sum(map(len, FACTORS.values()))))
    code.flags.writeable = False
    return code


def render_fmri(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as the activity of a brain that perceives it.

    Args:
        scene: What is perceived.
        seed: Chooses strength and noise; same scene and seed, same voxels.

    Returns:
        (512,) float32: the sum of the columns of ``voxel_code`` of the scene's values, which varies by about 2.2 from voxel
        to voxel, times a strength of 0.8 to 1.2, plus normal noise of 0.5 to 1.
    """
    rng = generator(scene, "fmri", seed)
    values = [getattr(scene, factor) == value for factor, known in FACTORS.items() for value in known]
    activity = rng.uniform(0.8, 1.2) * voxel_code() @ np.array(values, dtype=float)
    return (activity + rng.uniform(0.5, 1.0) * rng.standard_normal(NUM_VOXELS)).astype(np.float32)
