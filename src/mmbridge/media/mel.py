"""Kaldi-compatible log-mel filter banks in plain torch.

The definition is Kaldi's (Povey et al., "The Kaldi speech recognition toolkit", ASRU 2011; ``feat/feature-fbank.cc``
and ``feat/mel-computations.cc``), which ImageBind, AST and others were trained on. Absent: VTLN warping and MFCC.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from mmbridge.errors import MediaError

_FLOOR = torch.finfo(torch.float32).eps
_WINDOWS = {
    "hanning": lambda phase: 0.5 - 0.5 * torch.cos(phase),
    "povey": lambda phase: (0.5 - 0.5 * torch.cos(phase)) ** 0.85,
    "hamming": lambda phase: 0.54 - 0.46 * torch.cos(phase),
    "blackman": lambda phase: 0.42 - 0.5 * torch.cos(phase) + 0.08 * torch.cos(2 * phase),
    "rectangular": torch.ones_like,
}


def kaldi_fbank(
    samples: Tensor,
    sample_rate: int,
    num_mel_bins: int,
    *,
    frame_length_ms: float = 25.0,
    frame_shift_ms: float = 10.0,
    window: str = "hanning",
    use_energy: bool = False,
    htk_compat: bool = True,
    dither: float = 0.0,
    low_freq: float = 20.0,
    high_freq: float = 0.0,
    preemphasis: float = 0.97,
    remove_dc_offset: bool = True,
    snip_edges: bool = True,
) -> Tensor:
    """Compute log-mel energies of a sound.

    Args:
        samples: Shape (T,).
        sample_rate: Samples a second.
        num_mel_bins: Triangular filters, evenly spaced in mel.
        frame_length_ms: Length of a frame in milliseconds.
        frame_shift_ms: Step between frames in milliseconds.
        window: "hanning", "povey", "hamming", "blackman" or "rectangular".
        use_energy: Add a column with the log energy of each frame (before pre-emphasis and window).
        htk_compat: That column comes last and not first.
        dither: Standard deviation of the noise added to each sample.
        low_freq: Lower edge of the first filter in Hz.
        high_freq: Upper edge of the last filter in Hz; 0 or below counts from half the sample rate.
        preemphasis: Coefficient of x[i] - c * x[i - 1] within a frame.
        remove_dc_offset: Subtract each frame's mean first.
        snip_edges: Only frames that lie inside the sound; otherwise one frame each shift, with mirrored edges.

    Returns:
        Natural logarithms, shape (frames, num_mel_bins), one column more with ``use_energy``; no frames where the sound
        is shorter than one.

    Raises:
        MediaError: The window is unknown, or the filters' edges don't lie in order within half the sample rate.
    """
    if window not in _WINDOWS:
        raise MediaError(f"there is no window {window!r}; accepted: {', '.join(_WINDOWS)}.")
    length = int(sample_rate * frame_length_ms * 0.001)
    shift = int(sample_rate * frame_shift_ms * 0.001)
    frames = _cut(samples.double(), length, shift, snip_edges)  # (F, length); float32 would blur quiet bins by 1e-3
    if dither:
        frames = frames + dither * torch.randn_like(frames)
    if remove_dc_offset:
        frames = frames - frames.mean(dim=1, keepdim=True)
    energy = frames.square().sum(dim=1, keepdim=True).clamp_min(_FLOOR).log()
    frames = frames - preemphasis * F.pad(frames[:, None], (1, 0), mode="replicate")[:, 0, :-1]
    phase = torch.arange(length, dtype=torch.float64) * (2 * math.pi / (length - 1))
    frames = frames * _WINDOWS[window](phase).to(frames)
    padded = 1 << (length - 1).bit_length()
    power = torch.fft.rfft(frames, n=padded).abs().square()[:, :-1]  # Kaldi's filters leave the Nyquist bin out
    filters = _mel_filters(num_mel_bins, padded, sample_rate, low_freq, high_freq).to(frames)
    mel = (power @ filters.T).clamp_min(_FLOOR).log()
    if use_energy:
        mel = torch.cat([mel, energy] if htk_compat else [energy, mel], dim=1)
    return mel.to(samples.dtype)


def _cut(samples: Tensor, length: int, shift: int, snip_edges: bool) -> Tensor:
    """Cut (T,) into overlapping frames (F, length)."""
    total = len(samples)
    if snip_edges:
        return samples.unfold(0, length, shift) if total >= length else samples.new_empty(0, length)
    count = (total + shift // 2) // shift
    before = length // 2 - shift // 2
    after = max(0, (count - 1) * shift + length - before - total)
    positions = torch.arange(-before, total + after, device=samples.device) % (2 * max(total, 1))
    mirrored = torch.where(positions < total, positions, 2 * total - 1 - positions)
    return samples[mirrored].unfold(0, length, shift)[:count] if count else samples.new_empty(0, length)


@lru_cache(maxsize=16)
def _mel_filters(bins: int, padded: int, sample_rate: int, low: float, high: float) -> Tensor:
    """Return triangular filters (bins, padded // 2), the triangles being straight on the mel scale."""
    nyquist = sample_rate / 2
    high = high if high > 0 else nyquist + high
    if not 0 <= low < high <= nyquist:
        raise MediaError(
            f"mel filters from {low:g} to {high:g} Hz don't fit a sound of {sample_rate} Hz; "
            f"accepted: 0 <= low_freq < high_freq <= {nyquist:g}."
        )
    edges = torch.linspace(_mel(low), _mel(high), bins + 2, dtype=torch.float64)
    left, centre, right = (edges[i : i + bins, None] for i in range(3))
    hertz = torch.arange(padded // 2, dtype=torch.float64) * (sample_rate / padded)
    mel = 1127.0 * torch.log1p(hertz / 700.0)
    return torch.minimum((mel - left) / (centre - left), (right - mel) / (right - centre)).clamp_min(0)


def _mel(hertz: float) -> float:
    return 1127.0 * math.log1p(hertz / 700.0)
