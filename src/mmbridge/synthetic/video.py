"""Videos of scenes: the picture's object, moving about its place; 8 frames at 4 frames per second."""

from __future__ import annotations

import numpy as np

from mmbridge.synthetic.geometry import TRAVEL, path
from mmbridge.synthetic.image import draw, generator
from mmbridge.synthetic.scene import Scene

NUM_FRAMES = 8
FRAMES_PER_SECOND = 4


def render_video(scene: Scene, seed: int, num_frames: int = NUM_FRAMES, travel: float = TRAVEL) -> np.ndarray:
    """Render a scene as a clip of two seconds.

    Args:
        scene: What to show.
        seed: Chooses shade, jitter, ground, noise and where an orbit starts; same scene and seed, same bytes.
        num_frames: Frames of the clip, which show the whole movement.
        travel: Pixels from the place to either end of the path.

    Returns:
        (num_frames, 64, 64, 3) uint8.
    """
    rng = generator(scene, "video", seed)
    offsets = path(
        scene.motion, num_frames, phase=rng.uniform(0, 2 * np.pi), clockwise=rng.random() < 0.5, travel=travel
    )
    return draw(scene, offsets + rng.uniform(-0.25, 0.25, offsets.shape), rng)
