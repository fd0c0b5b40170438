"""Judges of IMU traces and brain scans: mechanics read the one, the known code the other; nothing is learned."""

from __future__ import annotations

from functools import cache

import numpy as np

from mmbridge.errors import MediaError
from mmbridge.synthetic.fmri import NUM_VOXELS, voxel_code
from mmbridge.synthetic.geometry import TRAVEL
from mmbridge.synthetic.imu import GRAVITY, IMU_SAMPLE_RATE, SWINGS, TURN
from mmbridge.synthetic.relief import PITCH
from mmbridge.synthetic.scene import CARRIES, FACTORS

_BAND = (3.6, 20.0)  # hertz between which swings are looked for; straight motions are slower


def judge_imu(trace: np.ndarray, sample_rate: float = IMU_SAMPLE_RATE) -> dict[str, str | None]:
    """Read size and motion from a trace that shows the whole movement.

    Turning is circling; otherwise the accelerations, less their mean, are integrated twice to where the movement led. The
    strongest frequency of the swing along z tells the size.

    Args:
        trace: (6, T) floats: accelerations in m/s², gravity included, then turn rates in rad/s, along and about x, y and z.
        sample_rate: Samples per second, at least 50.

    Returns:
        The value of each factor, None where the trace does not show one (no gravity, less than a second).

    Raises:
        MediaError: the array is not such a trace of finite numbers, or the rate is too low.
    """
    trace = np.asarray(trace)
    fits = trace.ndim == 2 and len(trace) == 6 and trace.dtype.kind == "f" and sample_rate >= 50
    if not fits or not np.isfinite(trace).all():
        raise MediaError(
            f"judge_imu got an array of shape {trace.shape} and type {trace.dtype} at {sample_rate} Hz; it accepts (6, T) "
            "finite floats at 50 Hz or more, three accelerations before three turn rates"
        )
    verdict: dict[str, str | None] = dict.fromkeys(CARRIES["imu"])
    forces, rates = trace[:3].astype(np.float64), trace[3:].astype(np.float64)
    if trace.shape[1] < sample_rate or abs(np.median(np.linalg.norm(forces, axis=0)) - GRAVITY) > 2:
        return verdict
    verdict["size"] = _size(forces[2], sample_rate)

    turn = abs(rates[2].mean())
    if turn > 0.3 * TURN:
        steady = rates[2].std() < 0.3 * turn and abs(turn - TURN) < 0.3 * TURN
        verdict["motion"] = "circling" if steady else None
        return verdict
    if abs(forces[1].mean() - GRAVITY) > 2:
        return verdict  # upright, the sensor feels gravity along y
    moved = forces[:2] - forces[:2].mean(axis=1, keepdims=True)
    x, y = np.cumsum(np.cumsum(moved, axis=1), axis=1)[:, -1] / sample_rate**2  # metres from start to end
    across, along = sorted((abs(x), abs(y)))
    if along < 0.6 * TRAVEL * PITCH:
        verdict["motion"] = "still"
    elif along < 4 * TRAVEL * PITCH and across < 0.6 * along:
        verdict["motion"] = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("up" if y > 0 else "down")
    return verdict


def _size(force: np.ndarray, sample_rate: float) -> str | None:
    """The size whose swing is nearest to the strongest frequency, if that frequency stands out."""
    windowed = (force - force.mean()) * np.hanning(len(force))
    power = np.abs(np.fft.rfft(windowed, n=4 * len(force))) ** 2
    frequency = np.fft.rfftfreq(4 * len(force), 1 / sample_rate)
    power = np.where((frequency > _BAND[0]) & (frequency < _BAND[1]), power, 0)
    peak = frequency[np.argmax(power)]
    if power[np.abs(frequency - peak) < 1.5].sum() < 0.6 * max(power.sum(), 1e-12):
        return None
    size = min(SWINGS, key=lambda name: abs(np.log(peak / SWINGS[name])))
    return size if abs(np.log(peak / SWINGS[size])) < 0.2 else None


def judge_fmri(voxels: np.ndarray) -> dict[str, str | None]:
    """Read all factors from a brain scan of the one subject, by least squares on the known code.

    Args:
        voxels: (512,) floats, of any strength.

    Returns:
        The value of each factor, None where the scan does not show one.

    Raises:
        MediaError: the array is not such a scan of finite numbers.
    """
    voxels = np.asarray(voxels)
    if voxels.shape != (NUM_VOXELS,) or voxels.dtype.kind != "f" or not np.isfinite(voxels).all():
        raise MediaError(
            f"judge_fmri got an array of shape {voxels.shape} and type {voxels.dtype}; it accepts ({NUM_VOXELS},) finite "
            "floats, the voxels of the subject whose code is known"
        )
    verdict: dict[str, str | None] = dict.fromkeys(CARRIES["fmri"])
    strengths = _decoder() @ voxels  # (28,)
    explained = voxel_code() @ strengths
    if explained @ explained < 0.4 * (voxels @ voxels) or not voxels.any():
        return verdict
    ends = np.cumsum([len(values) for values in FACTORS.values()])
    for (factor, values), part in zip(FACTORS.items(), np.split(strengths, ends[:-1]), strict=True):
        second, first = np.sort(part)[-2:]
        verdict[factor] = values[int(np.argmax(part))] if first > 0 and second < 0.5 * first else None
    return verdict


@cache
def _decoder() -> np.ndarray:
    """(28, 512) least-squares inverse of the code."""
    return np.linalg.pinv(voxel_code())
