"""The judge of sounds: it fits combs of harmonics to a spectrogram and compares the pitch track with the contours.

Nothing is learned. For each recipe of harmonics every frame is explained by the fundamental frequency that fits best;
the recipe that explains the whole sound best is the shape, its track of frequencies gives size and motion.
"""

from __future__ import annotations

import numpy as np

from mmbridge.errors import MediaError
from mmbridge.synthetic.audio import HARMONICS, PITCHES, contour
from mmbridge.synthetic.scene import CARRIES

_WINDOW = 0.064  # seconds
_PITCH_GRID = 170.0 * np.exp2(np.arange(0, 29.25, 0.25) / 12)  # hertz, quarter semitones up to 920 Hz
_BAND = (0.045, 40.0)  # half-width of a harmonic's band: this fraction of its frequency, and at least so many hertz
_RECIPES = np.array([recipe + (0.0,) * (8 - len(recipe)) for recipe in HARMONICS.values()])
_RECIPES = _RECIPES / np.linalg.norm(_RECIPES, axis=1, keepdims=True)  # (K, 8)
_NUMBERS = np.arange(1, 9)


def judge_audio(samples: np.ndarray, sample_rate: float) -> dict[str, str | None]:
    """Read shape, size and motion from a sound.

    Args:
        samples: (T,) floats, mono, of any level.
        sample_rate: Samples per second, at least 8000.

    Returns:
        The value of each factor, None where the sound does not carry one (noise, silence, less than a
        quarter of a second).

    Raises:
        MediaError: the array is not a mono sound of finite numbers, or the rate is too low.
    """
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind != "f" or not np.isfinite(samples).all() or sample_rate < 8000:
        raise MediaError(
            f"judge_audio got an array of shape {samples.shape} and type {samples.dtype} at {sample_rate} Hz; it "
            "accepts (T,) finite floats at 8000 Hz or more, so mix down to mono, drop NaN and resample first"
        )
    verdict: dict[str, str | None] = dict.fromkeys(CARRIES["audio"])
    time, energy, resolution = _spectrogram(samples, sample_rate)
    total = energy[:, -1]
    sounding = total > 0.02 * total.max(initial=1e-9)
    if sounding.sum() < 8:
        return verdict
    time, energy, total = time[sounding], energy[sounding], total[sounding]

    bands = np.sqrt(_band_energy(energy, resolution, _PITCH_GRID[:, None] * _NUMBERS))  # (F, P, 8)
    fit = (bands @ _RECIPES.T) / np.sqrt(total)[:, None, None]  # (F, P, K), 1 where a recipe explains everything
    weight = np.sqrt(total) / np.sqrt(total).sum()
    explained = weight @ fit.max(axis=1)  # (K,)
    best = int(np.argmax(explained))
    if explained[best] < 0.7:
        return verdict
    verdict["shape"] = tuple(HARMONICS)[best]

    tonal = fit[:, :, best].max(axis=1) > 0.6
    pitch = _refine(_PITCH_GRID[fit[tonal, :, best].argmax(axis=1)], energy[tonal], resolution, _RECIPES[best])
    verdict["motion"], base = _motion(time[tonal], 12 * np.log2(pitch), weight[tonal] / weight[tonal].sum())
    size = min(PITCHES, key=lambda name: abs(base - 12 * np.log2(PITCHES[name])))
    verdict["size"] = size if abs(base - 12 * np.log2(PITCHES[size])) < 4 else None
    return verdict


def _spectrogram(samples: np.ndarray, sample_rate: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Times of the frames (F,), energy below each frequency up to 7.5 kHz (F, N), and hertz per column."""
    length = round(_WINDOW * sample_rate)
    if len(samples) < 8 * length // 2:
        return np.zeros(0), np.zeros((0, 1)), 1.0
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(np.float32), length)[:: length // 2]
    padded = 2 ** int(np.ceil(np.log2(2 * length)))
    spectrum = np.fft.rfft(frames * np.hanning(length).astype(np.float32), n=padded)
    resolution = sample_rate / padded
    power = np.abs(spectrum[:, : int(7500 / resolution)]) ** 2
    power[:, : int(100 / resolution)] = 0  # no voice is that low; hum and offsets are
    time = (np.arange(len(frames)) * (length // 2) + length / 2) / sample_rate
    return time, np.cumsum(power, axis=1, dtype=np.float64), resolution


def _band_energy(energy: np.ndarray, resolution: float, frequency: np.ndarray) -> np.ndarray:
    """Energy around frequencies in hertz: (F, N) cumulative energy and (P, 8) frequencies -> (F, P, 8)."""
    half = np.maximum(_BAND[0] * frequency, _BAND[1])
    last = energy.shape[1] - 1
    low = np.clip(np.rint((frequency - half) / resolution).astype(int), 0, last)
    high = np.clip(np.rint((frequency + half) / resolution).astype(int), 0, last)
    return energy[:, high] - energy[:, low]


def _refine(pitch: np.ndarray, energy: np.ndarray, resolution: float, recipe: np.ndarray) -> np.ndarray:
    """Move each frame's fundamental frequency to the centre of gravity of its harmonics' bands (F,)."""
    power = np.diff(energy, axis=1, prepend=0)
    frequency = np.arange(energy.shape[1]) * resolution
    strongest = _NUMBERS[np.argsort(-recipe)[:2]][np.sort(-recipe)[:2] < 0]
    for _ in range(3):
        ratio = np.zeros((len(pitch), 0))
        mass = np.zeros((len(pitch), 0))
        for number in strongest:
            centre = pitch[:, None] * number
            inside = np.abs(frequency - centre) <= np.maximum(_BAND[0] * centre, _BAND[1])
            band = np.where(inside, power, 0)
            mass = np.column_stack([mass, band.sum(axis=1)])
            ratio = np.column_stack([ratio, band @ frequency / np.maximum(mass[:, -1], 1e-12) / number])
        pitch = (mass * ratio).sum(axis=1) / np.maximum(mass.sum(axis=1), 1e-12)
    return pitch


def _motion(time: np.ndarray, track: np.ndarray, weight: np.ndarray) -> tuple[str | None, float]:
    """Compare a pitch track in semitones with the contours; returns the motion and the base pitch in semitones."""
    progress = (time - time[0]) / (time[-1] - time[0])
    seconds = time[-1] - time[0]
    mean = float(weight @ track)
    power = float(weight @ (track - mean) ** 2)
    if power < 0.55**2:
        return "still", mean

    def regress(*curves: np.ndarray) -> tuple[float, np.ndarray]:
        basis = np.stack([np.ones_like(track), *curves], axis=1)
        root = np.sqrt(weight)
        solution = np.linalg.lstsq(basis * root[:, None], track * root, rcond=None)[0]
        return 1 - float(weight @ (track - basis @ solution) ** 2) / power, solution

    fits: dict[str, tuple[float, float]] = {}
    for rising, falling in (("up", "down"), ("right", "left")):
        share, (base, slope) = regress(contour(rising, progress, seconds))
        fits[rising if slope > 0 else falling] = (share, base)
    swings = [
        regress(*(contour("circling", progress, seconds * stretch, phase) for phase in (0, np.pi / 2)))
        for stretch in np.linspace(0.8, 1.2, 9)
    ]
    share, solution = max(swings, key=lambda fit: fit[0])
    fits["circling"] = (share, solution[0])
    best = max(fits, key=lambda name: fits[name][0])
    return (best if fits[best][0] > 0.5 else None), float(fits[best][1])
