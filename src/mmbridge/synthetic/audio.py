"""Sounds of scenes: shape is the timbre, size the pitch and motion the contour of the pitch; two seconds at 16 kHz."""

from __future__ import annotations

import numpy as np

from mmbridge.synthetic.image import generator
from mmbridge.synthetic.scene import Scene

SAMPLE_RATE = 16000
NUM_SAMPLES = 2 * SAMPLE_RATE
PITCHES = {"small": 720.0, "medium": 400.0, "large": 220.0}
"""Middle of the contour, in hertz."""
HARMONICS = {
    "circle": (1.0,),
    "square": (1.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.25),
    "triangle": (1.0, 0.8),
    "star": (1.0, 0.85, 0.75, 0.65, 0.55, 0.45, 0.38, 0.3),
    "cross": (1.0, 0.0, 0.0, 0.8),
    "ring": (0.3, 1.0, 0.8),
}
"""Amplitude of the first, second, ... harmonic."""
GLIDE = 5.0
"""Semitones from the lowest to the highest point of a glide, a hill or a valley."""
VIBRATO_DEPTH, VIBRATO_RATE = 2.0, 3.0
"""Semitones to either side, and cycles per second."""


def contour(motion: str, progress: np.ndarray, seconds: float, phase: float = 0.0) -> np.ndarray:
    """Deviation from the base pitch, in semitones, averaging about zero.

    Args:
        motion: Name of the motion.
        progress: (T,) from 0 where the sound starts to 1 where it ends.
        seconds: How long the sound lasts.
        phase: Where the vibrato of "circling" starts, in radians.
    """
    if motion == "still":
        return np.zeros_like(progress)
    if motion == "circling":
        return VIBRATO_DEPTH * np.sin(2 * np.pi * VIBRATO_RATE * seconds * progress + phase)
    ramp = progress if motion in ("up", "down") else 1 - np.abs(2 * progress - 1)
    return (-GLIDE if motion in ("down", "left") else GLIDE) * (ramp - 0.5)


def render_audio(scene: Scene, seed: int) -> np.ndarray:
    """Render a scene as a sound.

    Args:
        scene: What to sound; its colour and place are ignored.
        seed: Chooses tuning, onset, envelope, loudness, spectral tilt and noise; same scene and seed, same samples.

    Returns:
        (32000,) float32 in [-1, 1], mono, 16 kHz.
    """
    rng = generator(scene, "audio", seed)
    start = int(rng.uniform(0, 0.1) * SAMPLE_RATE)
    stop = NUM_SAMPLES - int(rng.uniform(0, 0.1) * SAMPLE_RATE)
    time = np.arange(stop - start) / SAMPLE_RATE
    seconds = len(time) / SAMPLE_RATE

    depth = rng.uniform(0.92, 1.08)
    bend = depth * contour(scene.motion, time / seconds, seconds * rng.uniform(0.92, 1.08), rng.uniform(0, 2 * np.pi))
    pitch = PITCHES[scene.size] * rng.uniform(0.98, 1.02) * np.exp2(bend / 12)
    turn = np.exp(2j * np.pi / SAMPLE_RATE * np.cumsum(pitch)).astype(np.complex64)

    tilt = rng.uniform(-0.15, 0.15)
    tone = np.zeros(len(time), np.float32)
    partial = np.ones_like(turn)
    for number, amplitude in enumerate(HARMONICS[scene.shape], start=1):
        partial *= turn  # harmonic k turns k times as fast
        weight = amplitude * number**tilt * rng.uniform(0.88, 1.12) * np.exp(2j * np.pi * rng.random())
        if amplitude:
            tone += np.real(partial * np.complex64(weight))

    attack, release = rng.uniform(0.01, 0.08), rng.uniform(0.05, 0.15)
    fade = np.minimum(1, np.minimum((time + 1e-3) / attack, (seconds - time) / release))
    tone *= (fade * np.exp(-rng.uniform(0.0, 0.6) * time)).astype(np.float32)

    loudness = rng.uniform(0.25, 0.9)
    sound = rng.standard_normal(NUM_SAMPLES, dtype=np.float32) * np.float32(loudness * 10 ** rng.uniform(-3, -2.2))
    sound[start:stop] += tone * np.float32(loudness / np.abs(tone).max())
    return np.clip(sound, -1, 1)
