"""IMU traces of scenes: the motion as accelerations and turn rates, the size as the pace of a swing; two seconds at 100 Hz.

The sensor rides on the object, mounted with a small unknown yaw. Its axes are the scene's, x to the right, y upwards and z
towards the viewer; at rest it reads gravity along y. On an orbit it turns with the orbit, as on the hand of a clock.
"""

from __future__ import annotations

import numpy as np

from mmbridge.synthetic.geometry import TRAVEL
from mmbridge.synthetic.image import generator
from mmbridge.synthetic.relief import PITCH
from mmbridge.synthetic.scene import Scene

IMU_SAMPLE_RATE = 100
IMU_SAMPLES = 2 * IMU_SAMPLE_RATE
GRAVITY = 9.81
"""m/s²."""
SWINGS = {"small": 15.0, "medium": 9.0, "large": 5.4}
"""Hertz of the swing along z: the more mass, the slower."""
TURN = np.pi
"""Radians per second on an orbit, either way round: once in two seconds."""
HEADINGS = {"left": (-1, 0), "right": (1, 0), "up": (0, 1), "down": (0, -1)}


def render_imu(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a trace of an inertial sensor.

    A straight motion starts and ends at rest, with the least jerk on its way (Flash and Hogan, 1985).

    Args:
        scene: What moves; its shape, colour and place are ignored.
        seed: Chooses timing, speed, swing, mounting, bias and noise; same scene and seed, same samples.

    Returns:
        (6, 200) float32 at 100 Hz: accelerations along x, y and z in m/s², gravity included, then turn rates about x, y and
        z in rad/s.
    """
    rng = generator(scene, "imu", seed)
    time = np.arange(IMU_SAMPLES) / IMU_SAMPLE_RATE
    accelerations, rates = np.zeros((2, 3, IMU_SAMPLES))
    travel = TRAVEL * PITCH * rng.uniform(0.9, 1.1)
    start, seconds = rng.uniform(0.1, 0.4), rng.uniform(1.1, 1.5)
    angle, turn = rng.uniform(0, 2 * np.pi), TURN * rng.uniform(0.95, 1.05) * rng.choice([-1, 1])
    if scene.motion == "circling":
        angle = angle + turn * time  # of the sensor's x axis, which points away from the centre
        accelerations[0] = GRAVITY * np.sin(angle) - travel * turn**2
        accelerations[1] = GRAVITY * np.cos(angle)
        rates[2] = turn
    else:
        accelerations[1] = GRAVITY
        if scene.motion != "still":
            part = np.clip((time - start) / seconds, 0, 1)
            pace = 2 * travel / seconds**2 * (60 * part - 180 * part**2 + 120 * part**3)
            accelerations[:2] += np.array(HEADINGS[scene.motion])[:, None] * pace

    swing = 2 * np.pi * (SWINGS[scene.size] * rng.uniform(0.95, 1.05) * time + rng.random())
    accelerations[2] += rng.uniform(0.4, 0.8) * np.sin(swing)
    rates[0] += rng.uniform(0.05, 0.1) * np.cos(swing)

    yaw = np.deg2rad(rng.uniform(-15, 15))
    mounting = np.array([[np.cos(yaw), 0, -np.sin(yaw)], [0, 1, 0], [np.sin(yaw), 0, np.cos(yaw)]])
    trace = np.concatenate([mounting @ accelerations, mounting @ rates])
    bias = rng.uniform(-1, 1, 6) * np.repeat([0.15, 0.03], 3)
    noise = np.repeat([rng.uniform(0.04, 0.1), rng.uniform(0.005, 0.02)], 3)
    return (trace + bias[:, None] + noise[:, None] * rng.standard_normal(trace.shape)).astype(np.float32)
