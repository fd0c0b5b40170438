"""The filter bank against its definition, written out slowly, and against Kaldi's own numbers."""

import numpy as np
import pytest
import torch

from mmbridge.errors import MediaError
from mmbridge.media import kaldi_fbank


def tone_and_noise(rate: int, count: int) -> torch.Tensor:
    """A tone in noise from integer arithmetic, the same on every machine."""
    state = np.arange(count, dtype=np.uint64) * np.uint64(2654435761) % np.uint64(2**32)
    state = (state * np.uint64(1664525) + np.uint64(1013904223)) % np.uint64(2**32)
    state = (state ^ (state >> np.uint64(13))) * np.uint64(1664525) % np.uint64(2**32)
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(count) / rate)
    return torch.from_numpy((tone + 0.4 * (state / 2**32 - 0.5)).astype(np.float32))


def slow_fbank(signal: np.ndarray, rate: int, bins: int, low: float, high: float) -> np.ndarray:
    """Kaldi's definition with Hanning window, frame by frame and filter by filter, in float64."""
    length, shift, size = rate * 25 // 1000, rate * 10 // 1000, 1
    while size < length:
        size *= 2

    def mel(hertz: float) -> float:
        return 1127.0 * np.log(1.0 + hertz / 700.0)

    step = (mel(high) - mel(low)) / (bins + 1)
    rows = []
    for start in range(0, len(signal) - length + 1, shift):
        frame = [float(value) for value in signal[start : start + length]]
        mean = sum(frame) / length
        frame = [value - mean for value in frame]
        frame = [frame[0] - 0.97 * frame[0]] + [frame[i] - 0.97 * frame[i - 1] for i in range(1, length)]
        frame = [value * (0.5 - 0.5 * np.cos(2 * np.pi * i / (length - 1))) for i, value in enumerate(frame)]
        power = np.abs(np.fft.fft(frame + [0.0] * (size - length))) ** 2
        row = []
        for b in range(bins):
            left, centre, right = (mel(low) + (b + k) * step for k in range(3))
            energy = 0.0
            for i in range(size // 2):
                place = mel(i * rate / size)
                if left < place <= centre:
                    energy += power[i] * (place - left) / (centre - left)
                elif centre < place < right:
                    energy += power[i] * (right - place) / (right - centre)
            row.append(np.log(max(energy, np.finfo(np.float32).eps)))
        rows.append(row)
    return np.array(rows)


@pytest.mark.parametrize(("rate", "bins", "low", "high"), [(16000, 128, 20, 8000), (8000, 23, 60, 3800)])
def test_fbank_follows_the_definition(rate, bins, low, high):
    samples = tone_and_noise(rate, rate // 20) + 0.1  # the offset must vanish
    expected = torch.from_numpy(slow_fbank(samples.double().numpy(), rate, bins, low, high))
    actual = kaldi_fbank(samples.double(), rate, bins, low_freq=low, high_freq=high)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    single = kaldi_fbank(samples, rate, bins, low_freq=low, high_freq=high)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=0)


# From kaldi-native-fbank 1.22, the C++ code of Kaldi, at frames (first, middle, last) x columns (first, a third, last).
# It computes in float32, hence the tolerance.
GOLDEN = [
    ("imagebind", 16000, 128, {}, (48, 128),
     [[-6.3681, -1.7306, 2.2647], [-5.9127, -0.1361, 3.9606], [-7.0612, -2.2790, 3.3977]]),
    ("povey", 16000, 80, {"window": "povey"}, (48, 80),
     [[-6.4635, -1.2333, 2.9990], [-5.9700, 0.2972, 4.7026], [-7.0941, -1.7645, 4.0496]]),
    ("hamming, band", 8000, 40, {"window": "hamming", "low_freq": 60, "high_freq": -200}, (48, 40),
     [[-5.6201, -1.5946, 3.3609], [-7.1849, -1.7531, 3.2948], [-4.9367, -1.4136, 2.5143]]),
    ("energy last", 16000, 23, {"use_energy": True}, (48, 24),
     [[-4.1046, 0.7357, 3.2317], [-3.4447, 0.9542, 3.2041], [-4.6757, -0.0627, 3.1688]]),
    ("energy first", 16000, 23, {"use_energy": True, "htk_compat": False}, (48, 24),
     [[3.2317, 0.0349, 5.4030], [3.2041, 1.1805, 5.5765], [3.1688, -0.2887, 5.1475]]),
    ("mirrored edges", 16000, 40, {"snip_edges": False}, (50, 40),
     [[-3.5164, -0.0014, 4.5450], [-4.4360, 0.7808, 5.1560], [-4.8581, 1.2578, 5.1196]]),
    ("plain", 22050, 64, {"window": "rectangular", "remove_dc_offset": False, "preemphasis": 0.0}, (48, 64),
     [[3.0867, 4.2866, 4.5611], [2.9904, 3.5914, 5.1791], [3.6403, 3.2644, 4.9201]]),
    ("short frames", 16000, 40, {"window": "blackman", "frame_length_ms": 20, "frame_shift_ms": 5}, (97, 40),
     [[-5.6106, -1.2439, 4.5165], [-5.8751, 0.5427, 4.6600], [-6.4656, 0.0045, 4.5900]]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rate", "bins", "options", "shape", "values"), [g[1:] for g in GOLDEN], ids=[g[0] for g in GOLDEN]
)
def test_fbank_gives_kaldis_numbers(rate, bins, options, shape, values):
    mel = kaldi_fbank(tone_and_noise(rate, rate // 2), rate, bins, **options)
    assert mel.shape == shape
    frames, columns = [0, shape[0] // 2, shape[0] - 1], [0, shape[1] // 3, shape[1] - 1]
    torch.testing.assert_close(mel[frames][:, columns], torch.tensor(values), atol=1e-3, rtol=0)


def test_dither_adds_noise_of_the_given_strength():
    torch.manual_seed(0)
    quiet = torch.zeros(16000)
    assert kaldi_fbank(quiet, 16000, 23).max() == pytest.approx(np.log(np.finfo(np.float32).eps))
    difference = kaldi_fbank(quiet, 16000, 23, dither=1e-2) - kaldi_fbank(quiet, 16000, 23, dither=1e-3)
    assert difference.mean() == pytest.approx(2 * np.log(10), abs=0.1)


def test_a_sound_shorter_than_a_frame_has_none():
    assert kaldi_fbank(torch.ones(399), 16000, 40).shape == (0, 40)
    assert kaldi_fbank(torch.ones(400), 16000, 40).shape == (1, 40)
    assert kaldi_fbank(torch.ones(10), 16000, 40, snip_edges=False).shape == (0, 40)


def test_gradients_reach_the_samples():
    samples = tone_and_noise(16000, 800).requires_grad_()
    kaldi_fbank(samples, 16000, 40).sum().backward()
    assert samples.grad.abs().min() >= 0 and samples.grad.abs().max() > 0


def test_errors():
    with pytest.raises(MediaError, match=r"no window 'hann'; accepted: hanning, povey, hamming, blackman, rectangular"):
        kaldi_fbank(torch.ones(800), 16000, 40, window="hann")
    with pytest.raises(MediaError, match=r"from 20 to 9000 Hz don't fit a sound of 16000 Hz.*high_freq <= 8000"):
        kaldi_fbank(torch.ones(800), 16000, 40, high_freq=9000)
