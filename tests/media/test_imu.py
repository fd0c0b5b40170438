"""IMU traces: rates and times, channels, resampling, and what encoders get."""

import math

import numpy as np
import pytest
import torch
from media.measured import example, noise

from mmbridge.errors import MediaError
from mmbridge.media import Imu, prepare_imu
from mmbridge.specs import ImuInput

CHANNELS = "ax,ay,az,gx,gy,gz"


def table(samples: torch.Tensor, times: list[float] | None = None, header: str | None = None) -> bytes:
    lines = [header] if header else []
    for index, row in enumerate(samples.T.tolist()):
        lines.append(",".join(f"{value:.9g}" for value in [*([times[index]] if times else []), *row]))
    return "\n".join(lines).encode()


def wave(rate: float, seconds: float = 2.0, frequency: float = 3.0) -> torch.Tensor:
    """Six sines of different phase around different means, at the middles of the samples."""
    time = (torch.arange(round(seconds * rate)) + 0.5) / rate
    return torch.stack([torch.sin(2 * math.pi * frequency * time + phase) + 9.81 * phase for phase in range(6)])


@pytest.mark.parametrize("header", [None, CHANNELS, "# " + CHANNELS])
def test_tables_without_times_need_a_rate(header):
    samples = noise(6, 30)
    content = table(samples, header=header)
    assert torch.equal(Imu.load(content, sample_rate=50).samples, samples)
    with pytest.raises(
        MediaError, match=r"does not say its rate; pass sample_rate=, in samples a second, or add a column"
    ):
        Imu.load(content)


@pytest.mark.parametrize("header", [None, "time," + CHANNELS, "Timestamp," + CHANNELS])
def test_times_give_the_rate(header):
    samples = noise(6, 30)
    content = table(samples, [5 + index / 40 for index in range(30)], header)
    imu = Imu.load(content)
    assert imu.sample_rate == 40 and torch.equal(imu.samples, samples)
    with pytest.raises(MediaError, match=r"sample_rate=40 is for samples without times; these know their own rate"):
        Imu.load(content, sample_rate=40)


def test_times_may_stand_anywhere_under_their_name():
    samples = noise(6, 30)
    moved = torch.cat([samples[:3], torch.arange(30)[None] / 8, samples[3:]])
    imu = Imu.load(table(moved, header="ax,ay,az,time,gx,gy,gz"))
    assert imu.sample_rate == 8 and torch.equal(imu.samples, samples)


def test_uneven_times_are_made_even():
    times = np.sort(np.random.default_rng(0).uniform(0, 10, 400))
    samples = torch.from_numpy(np.stack([np.sin(times + phase) for phase in range(6)])).float()
    imu = Imu.load(table(samples, times.tolist()))
    even = times[0] + np.arange(400) / imu.sample_rate
    assert np.abs(imu.samples.numpy() - np.stack([np.sin(even + phase) for phase in range(6)])).max() < 0.01


def test_arrays_have_channels_first_or_last(tmp_path):
    samples = noise(6, 30)
    for source in (samples, samples.T, samples.numpy(), samples.T.numpy().astype(np.float64)):
        assert torch.equal(Imu.load(source, sample_rate=100).samples, samples)
    np.save(tmp_path / "a.npy", samples.numpy())
    imu = Imu.load("a.npy", sample_rate=100, root=tmp_path)
    assert torch.equal(imu.samples, samples) and repr(imu) == "Imu(0.30 s, 100 Hz)"
    imu.save(tmp_path / "b.npy")
    assert torch.equal(Imu.load(tmp_path / "b.npy", sample_rate=100).samples, samples)
    with pytest.raises(MediaError, match=r"a.npy' does not say its rate; pass sample_rate="):
        Imu.load(tmp_path / "a.npy")


@pytest.mark.parametrize("rate", [50.0, 199.7, 8000.0])
def test_odd_rates_survive_a_csv(rate, tmp_path):
    imu = Imu(noise(6, 40), rate)
    imu.save(tmp_path / "a.csv")
    again = Imu.load(tmp_path / "a.csv")
    assert again.sample_rate == rate and torch.equal(again.samples, imu.samples)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (np.zeros((3, 50)), {"sample_rate": 50}, r"has shape \(3, 50\); an IMU trace is \(6, T\) or \(T, 6\): three accele"),
        (np.zeros((6, 1)), {"sample_rate": 50}, r"samples of shape \(6, T\), at least 2 of them"),
        (np.zeros((6, 50)), {}, r"the array does not say its rate; pass sample_rate="),
        (np.zeros((6, 50)), {"sample_rate": 0.2}, r"of 0.2 samples a second can't be used; accepted: 1..100000 \(times are"),
        (example("imu"), {"sample_rate": 50}, r"sample_rate=50 is for samples without times"),
        (table(noise(5, 9)), {"sample_rate": 50}, r"has 5 columns \(without names\); an IMU trace has 6, three"),
        (table(noise(7, 9), header="a,b,c,d,e,f,g"), {}, r"has 7 columns \(a, b, c, d, e, f, g\); an IMU trace has 6"),
        (table(noise(6, 9), header="time,ax,ay,az,gx,gy"), {}, r"has 6 columns \(time, ax"),
        (table(noise(6, 9), [0.0] * 9), {}, r"do not grow from row to row; sort its rows, in seconds"),
        (table(noise(6, 9), [5.0 * index for index in range(9)]), {}, r"of 0.2 samples a second .*times are in seconds"),
    ],
)  # fmt: skip
def test_what_is_no_trace_is_refused(source, options, message):
    with pytest.raises(MediaError, match=message):
        Imu.load(source, **options)


@pytest.mark.parametrize(("old", "new"), [(50, 200), (400, 200), (199.7, 200), (1000, 50)])
def test_resampling_keeps_slow_motion_and_means(old, new):
    found, wanted = Imu(wave(old), old).resample(new).samples, wave(new)
    count = min(found.shape[1], wanted.shape[1])
    assert abs(found.shape[1] - wanted.shape[1]) <= 1
    assert (found[:, :count] - wanted[:, :count])[:, 5:-5].abs().max() < 0.06
    still = Imu(torch.full((6, 100), 9.81), old).resample(new)
    torch.testing.assert_close(still.samples, torch.full_like(still.samples, 9.81))  # up to the ends


def test_fast_motion_does_not_become_slow():
    fast = Imu(wave(1000, frequency=190.0) - 9.81 * torch.arange(6)[:, None], 1000.0).resample(50)
    assert fast.samples[:, 5:-5].abs().max() < 0.1


def test_prepared_traces_are_cut_or_filled_with_zeros():
    imu = Imu(noise(6, 50), 200.0)
    assert torch.equal(prepare_imu(imu, ImuInput(200.0, 30)), imu.samples[:, :30])
    filled = prepare_imu(imu, ImuInput(200.0, 70))
    assert torch.equal(filled[:, :50], imu.samples) and not filled[:, 50:].any()
    assert prepare_imu(imu, ImuInput(400.0, 64)).shape == (6, 64)
    with pytest.raises(MediaError, match=r"of 0.25 s can't be resampled to 1 samples a second"):
        prepare_imu(imu, ImuInput(1.0, 64))


def test_curves_have_a_panel_of_their_own():
    flat, high = torch.zeros(6, 40), torch.zeros(6, 40)
    high[4, 10:20] = 3.0
    difference = (Imu(flat, 10.0).draw().pixels != Imu(high, 10.0).draw().pixels).any(0)
    assert difference[:110].sum() == 0 < difference[125:].sum()
