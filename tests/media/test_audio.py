"""Sounds: every kind of file, array and tensor that is read, resampling, preparation, and every error."""

import struct
from io import BytesIO

import av
import numpy as np
import pytest
import soundfile
import torch
from scipy.signal import resample_poly

from mmbridge.errors import MediaError
from mmbridge.media import Audio, Video, kaldi_fbank, prepare_audio
from mmbridge.specs import AudioInput

IMAGEBIND = AudioInput(sample_rate=16000, mel_bins=128, frames=204, clips=3, seconds=2.0, mean=-4.268, std=9.138)


def chord(rate: int = 16000, seconds: float = 1.0, tones: tuple[float, ...] = (220.0, 660.0, 1500.0)) -> torch.Tensor:
    """A fading chord, float32 (T,)."""
    time = torch.arange(round(rate * seconds), dtype=torch.float64) / rate
    wave = sum(torch.sin(2 * torch.pi * tone * time) for tone in tones) * 0.25
    return (wave * (1 - 0.5 * time / seconds)).float()


def encode(samples: np.ndarray | torch.Tensor, rate: int, kind: str = "WAV", subtype: str | None = None) -> bytes:
    buffer = BytesIO()
    soundfile.write(buffer, np.asarray(samples), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def encode_by_av(samples: torch.Tensor, rate: int, kind: str, codec: str, **options: str) -> bytes:
    """Encode (C, T) samples by PyAV; ``options`` go to the codec, those that start with mux_ to the container."""
    buffer = BytesIO()
    container_options = {key[4:]: value for key, value in options.items() if key.startswith("mux_")}
    with av.open(buffer, "w", format=kind, options=container_options) as container:
        layout = "mono" if len(samples) == 1 else "stereo"
        codec_options = {key: value for key, value in options.items() if not key.startswith("mux_")}
        stream = container.add_stream(codec, rate, layout=layout, options=codec_options)
        frame = av.AudioFrame.from_ndarray(samples.contiguous().numpy(), format="fltp", layout=layout)
        frame.sample_rate, frame.pts = rate, 0
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.codec_context.frame_size)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    return buffer.getvalue()


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return torch.corrcoef(torch.stack([a, b]))[0, 1].item()


@pytest.mark.parametrize(
    ("suffix", "error"), [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05), ("WAV", 1e-4)]
)
@pytest.mark.parametrize("rate", [16000, 44100])
def test_save_and_load(tmp_path, suffix, error, rate):
    audio = Audio(chord(rate), rate)
    audio.save(tmp_path / f"sound.{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"sound.{suffix}"]
    again = Audio.load(tmp_path / f"sound.{suffix}")
    assert again.sample_rate == rate and again.samples.shape == audio.samples.shape
    assert (again.samples - audio.samples).abs().max() < error
    assert torch.equal(Audio.load((tmp_path / f"sound.{suffix}").read_bytes()).samples, again.samples)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
@pytest.mark.parametrize("channels", [1, 2, 6])
def test_wav_of_any_depth_and_number_of_channels(subtype, channels):
    samples = torch.stack([chord(8000, 0.2, (200.0 * (k + 1),)) for k in range(channels)])
    audio = Audio.load(encode(samples.T, 8000, subtype=subtype))
    assert audio.sample_rate == 8000
    assert (audio.samples - samples.mean(dim=0)).abs().max() < (0.02 if subtype in ("PCM_U8", "ULAW") else 1e-4)


def test_stereo_mp3_at_64_kbit():
    left, right = chord(44100, tones=(330.0,)), chord(44100, tones=(550.0,))
    data = encode_by_av(torch.stack([left, right]), 44100, "mp3", "libmp3lame", b="64000")
    assert len(data) < 64000 / 8 * 1.2
    audio = Audio.load(data)
    assert audio.sample_rate == 44100 and abs(len(audio.samples) - 44100) < 1300
    assert correlation(audio.samples[2000:40000], (left + right)[2000:40000]) > 0.99


def test_an_mp3_of_variable_bit_rate_without_length_is_read_to_its_end():
    quiet_then_noise = torch.cat(
        [chord(44100, 2), torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, 88200)).float()]
    )
    data = encode_by_av(
        quiet_then_noise[None], 44100, "mp3", "libmp3lame", mux_write_xing="0", flags="+qscale", global_quality="472"
    )
    assert Audio.load(data).seconds == pytest.approx(4.0, abs=0.06)


@pytest.mark.parametrize(
    ("kind", "codec", "rate"), [("ipod", "aac", 44100), ("mp4", "aac", 16000), ("webm", "libopus", 48000)]
)
def test_sound_tracks_of_containers(tmp_path, kind, codec, rate):
    wave = chord(rate)
    data = encode_by_av(torch.stack([wave, wave]), rate, kind, codec)
    (tmp_path / "sound.m4a").write_bytes(data)  # the name does not matter
    audio = Audio.load(tmp_path / "sound.m4a")
    assert audio.sample_rate == rate and abs(audio.seconds - 1) < 0.07
    assert correlation(audio.samples[2000 : rate - 2000], wave[2000 : rate - 2000]) > 0.99


def test_the_sound_of_a_video(tmp_path):
    Video(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 8.0, Audio(chord(), 16000)).save(tmp_path / "video.mp4")
    audio = Audio.load(tmp_path / "video.mp4")
    assert correlation(audio.samples[2000:14000], chord()[2000:14000]) > 0.99


def test_arrays_and_tensors_agree():
    stereo = torch.stack([chord(), chord().flip(0)])
    mono = stereo.mean(dim=0)
    for source in (
        stereo,
        stereo.T,
        stereo.numpy(),
        stereo.T.numpy(),
        stereo.double(),
        stereo.numpy().astype(">f8"),
        stereo.numpy().astype("g"),
    ):
        audio = Audio.load(source, sample_rate=16000)
        assert audio.sample_rate == 16000 and audio.samples.dtype == torch.float32
        torch.testing.assert_close(audio.samples, mono)
    for scale, dtype in ((2**15, np.int16), (2**31, np.int32)):
        whole = (mono.double() * (scale - 1)).round().numpy().astype(dtype)
        torch.testing.assert_close(Audio.load(whole, sample_rate=16000).samples, mono, atol=1e-4, rtol=0)
    bytes_ = (mono * 127 + 128).round().to(torch.uint8)
    torch.testing.assert_close(Audio.load(bytes_, sample_rate=16000).samples, mono, atol=0.02, rtol=0)
    torch.testing.assert_close(Audio.load(mono.bfloat16(), sample_rate=16000).samples, mono, atol=0.01, rtol=0)
    assert Audio.load(torch.zeros(1, 8), sample_rate=8).samples.shape == (8,)


def test_audio_is_itself():
    audio = Audio(chord(), 16000)
    assert Audio.load(audio) is audio
    assert repr(audio) == "Audio(1.00 s, 16000 Hz)"


def test_content_hash_covers_samples_and_rate(tmp_path):
    audio = Audio(chord(), 16000)
    audio.save(tmp_path / "a.wav")
    loaded = Audio.load(tmp_path / "a.wav")
    loaded.save(tmp_path / "a.flac")
    assert Audio.load(tmp_path / "a.flac").content_hash == loaded.content_hash
    assert (
        len({loaded.content_hash, Audio(loaded.samples, 8000).content_hash, Audio(-loaded.samples, 16000).content_hash})
        == 3
    )


def test_samples_beyond_full_scale_are_clipped_and_not_wrapped(tmp_path):
    Audio(2 * chord(), 16000).save(tmp_path / "loud.wav")
    assert correlation(Audio.load(tmp_path / "loud.wav").samples, chord()) > 0.95
    assert Audio.load(encode(3 * chord(), 16000, subtype="FLOAT")).samples.abs().max() == 1.0


RATES = [(44100, 16000), (48000, 16000), (16000, 48000), (11025, 16000), (8000, 16000), (44101, 16000), (16000, 22051)]


@pytest.mark.parametrize(("old", "new"), RATES)
def test_resampled_tones_stay_the_same_tones(old, new):
    lower, inner = min(old, new) / 2, slice(new // 40, -new // 40)
    for share in (0.01, 0.3, 0.6, 0.88):
        time = torch.arange(old // 8, dtype=torch.float64) / old
        tone = 0.5 * torch.sin(2 * torch.pi * share * lower * time)
        audio = Audio(tone.float(), old).resample(new)
        assert audio.sample_rate == new and len(audio.samples) == -(-(old // 8) * new // old)
        expected = 0.5 * torch.sin(2 * torch.pi * share * lower * torch.arange(len(audio.samples)).double() / new)
        assert (audio.samples - expected)[inner].abs().max() < 1e-3 * 0.5


@pytest.mark.parametrize(("old", "new"), [rates for rates in RATES if rates[0] > 16000])
def test_tones_above_the_new_band_vanish(old, new):
    for tone in (1.0 * new / 2, 1.1 * new / 2, 0.99 * old / 2):
        time = torch.arange(old // 8, dtype=torch.float64) / old
        wave = torch.sin(2 * torch.pi * tone * time).float()
        rest = Audio(wave, old).resample(new).samples[new // 40 : -new // 40]
        assert 20 * torch.log10(rest.square().mean().sqrt() / wave.square().mean().sqrt()) < -60


@pytest.mark.parametrize(("old", "new"), RATES[:5])
def test_resampling_agrees_with_scipy(old, new):
    generator = torch.Generator().manual_seed(0)
    wave = Audio(torch.rand(4000, generator=generator) - 0.5, 4000).resample(old)  # noise up to 2 kHz
    expected = resample_poly(wave.samples.double().numpy(), new, old, window=("kaiser", 8.0))
    actual = wave.resample(new).samples
    assert len(actual) == len(expected)
    inner = slice(new // 20, -new // 20)
    torch.testing.assert_close(actual[inner], torch.from_numpy(expected).float()[inner], atol=2e-3, rtol=0)


def test_resampling_to_the_same_rate_changes_nothing():
    audio = Audio(chord(), 16000)
    assert audio.resample(16000) is audio


def test_prepare_audio_is_the_normalised_filter_bank_of_each_clip():
    audio = Audio(chord(16000, 5.0) + 0.1, 16000)
    clips = prepare_audio(audio, IMAGEBIND)
    assert clips.shape == (3, 1, 128, 204) and clips.dtype == torch.float32
    for clip, start in zip(clips[:, 0], (0, 24000, 48000), strict=True):
        part = audio.samples[start : start + 32000]
        expected = kaldi_fbank(part - part.mean(), 16000, 128).T
        torch.testing.assert_close(clip[:, :198], (expected + 4.268) / 9.138)
        torch.testing.assert_close(clip[:, 198:], torch.full((128, 6), 4.268 / 9.138))


def test_prepare_audio_repeats_a_short_sound_and_cuts_long_clips():
    clips = prepare_audio(Audio(chord(16000, 0.5), 16000), IMAGEBIND)
    assert torch.equal(clips[0], clips[1]) and torch.equal(clips[0], clips[2])
    assert (clips[0, 0, :, 48:] == clips[0, 0, 0, 203]).all() and clips[0, 0, :, :48].std() > 0.1
    short = prepare_audio(Audio(chord(16000, 3.0), 16000), AudioInput(16000, 64, 100, 1, 2.0, 0.0, 1.0))
    assert short.shape == (1, 1, 64, 100)


def test_prepare_audio_resamples():
    low, high = (prepare_audio(Audio(chord(rate, 2.0), rate), IMAGEBIND) for rate in (16000, 44100))
    loud = low > 0  # quiet bins hold the rounding of either rate
    assert (low - high).abs()[loud].mean() < 0.01


@pytest.mark.parametrize("samples", [torch.zeros(16000), torch.full((16000,), 0.5), torch.full((16000,), 1e-8)])
def test_silence_is_a_sound_but_nothing_for_an_encoder(tmp_path, samples):
    audio = Audio.load(samples, sample_rate=16000)
    audio.save(tmp_path / "silence.wav")
    with pytest.raises(
        MediaError, match=r"the sound of 1.00 s is silent \(peak [\d.e+-]+\); an encoder has nothing to hear"
    ):
        prepare_audio(Audio.load(tmp_path / "silence.wav"), IMAGEBIND)


def test_prepare_audio_needs_a_frame():
    with pytest.raises(MediaError, match=r"the sound lasts 20 ms; an encoder needs at least 25 ms"):
        prepare_audio(Audio(chord(16000, 0.02), 16000), IMAGEBIND)


ARRAY = np.linspace(-0.5, 0.5, 100)


@pytest.mark.parametrize(
    ("source", "rate", "message"),
    [
        (ARRAY, None, r"an array of samples does not say its rate; pass sample_rate="),
        (torch.zeros(8), None, r"does not say its rate"),
        (Audio(torch.ones(9), 8), 16000, r"sample_rate=16000 is for arrays.*load it without, then call resample"),
        ("sound.wav", 16000, r"sample_rate=16000 is for arrays and tensors; a file holds its own rate"),
        (ARRAY, 0, r"a sample rate of 0 Hz can't be used; it must be at least 1"),
        (ARRAY * np.nan, 8000, r"the array holds NaN or infinite samples; replace them by numbers in -1..1"),
        (torch.full((9,), torch.inf), 8000, r"the tensor holds NaN or infinite samples"),
        (ARRAY * 60000, 8000, r"the array reaches 30000; floats must lie in -1..1: divide them by full scale"),
        (ARRAY.astype(np.int64), 8000, r"the array has dtype int64; accepted: floats in -1..1, int16, int32 or uint8"),
        (ARRAY.astype(object), 8000, r"the array has dtype object; accepted"),
        (torch.zeros(9, dtype=torch.int8), 8000, r"the tensor has dtype int8; accepted"),
        (np.zeros(0), 8000, r"shape \(0,\); audio is \(T,\), \(T, C\) or \(C, T\), with at least one sample"),
        (np.zeros((2, 3, 4)), 8000, r"the array has shape \(2, 3, 4\); audio is"),
        (np.array(0.5), 8000, r"the array has shape \(\); audio is"),
        (np.zeros((50, 60)), 8000, r"can't be told from samples: the shorter side is the channels, at most 32"),
        (np.zeros((8, 8)), 8000, r"channels can't be told from samples"),
        (np.zeros(8 * 602), 8, r"the sound lasts 602 s; at most 600 s are read: cut it first"),
        (3, None, r"audio can't be loaded from int; accepted: a path, bytes, a NumPy array or torch tensor with"),
    ],
)  # fmt: skip
def test_what_is_no_sound_is_refused(source, rate, message):
    with pytest.raises(MediaError, match=message):
        Audio.load(source, sample_rate=rate)


def with_nan() -> bytes:
    samples = np.zeros(100, dtype=np.float32)
    samples[50] = np.nan
    return encode(samples, 8000, subtype="FLOAT")


def test_files_that_hold_no_usable_sound(tmp_path):
    with pytest.raises(MediaError, match=r"the \d+ bytes given holds NaN or infinite samples"):
        Audio.load(with_nan())
    with pytest.raises(MediaError, match=r"the \d+ bytes given reaches 30000; floats must lie in -1..1"):
        Audio.load(encode(np.full(100, 30000.0), 8000, subtype="FLOAT"))
    with pytest.raises(
        MediaError, match=r"the 44 bytes given holds no WAV samples, or was cut off; export or fetch it again"
    ):
        Audio.load(encode(np.zeros(0), 8000))
    with pytest.raises(MediaError, match=r"the \d+ bytes given lasts 700 s; at most 600 s are read: cut it first"):
        Audio.load(encode(np.zeros(70_000), 100))
    long = encode_by_av(torch.zeros(1, 8000 * 602), 8000, "mp4", "aac")
    with pytest.raises(
        MediaError, match=r"the sound of the \d+ bytes given lasts longer than the 600 s that are read: cut it"
    ):
        Audio.load(long)
    Video(torch.zeros(4, 3, 32, 32, dtype=torch.uint8), 8.0).save(tmp_path / "mute.webm")
    with pytest.raises(MediaError, match=r"mute.webm' holds no sound; choose another file, or load a video as a video"):
        Audio.load(tmp_path / "mute.webm")


def test_an_ogg_with_a_damaged_page_is_refused():
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, 80_000)
    data = bytearray(encode(noise, 16000, "OGG"))
    data[len(data) // 3] ^= 0x55  # the page no longer agrees with its checksum, and libsndfile leaves it out
    with pytest.raises(MediaError, match=r"damaged or truncated OGG file \(it holds \d+ of 80000 samples\); export"):
        Audio.load(bytes(data))


def test_a_wav_from_a_pipe_has_no_length():
    data = bytearray(encode(chord(), 16000))
    data[4:8] = struct.pack("<I", 0xFFFFFFFF)
    data[40:44] = struct.pack("<I", 0xFFFFFFFF)
    assert len(Audio.load(bytes(data)).samples) == 16000


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        (torch.zeros(4, dtype=torch.float64), 8000, r"audio holds float32 samples of shape \(T,\), not torch.float64"),
        (torch.zeros(2, 4), 8000, r"not torch.float32 of shape \(2, 4\); Audio.load converts"),
        (torch.zeros(0), 8000, r"of shape \(0,\)"),
        (torch.tensor([0.0, torch.nan]), 8000, r"audio holds NaN or infinite samples"),
        (torch.zeros(4), 0, r"a sample rate of 0 Hz"),
    ],
)
def test_the_class_checks_its_samples(samples, rate, message):
    with pytest.raises(MediaError, match=message):
        Audio(samples, rate)


def test_rates_that_a_format_can_not_hold(tmp_path):
    with pytest.raises(MediaError, match=r"can't be resampled to 0 Hz; the rate must be at least 1"):
        Audio(chord(), 16000).resample(0)
    with pytest.raises(MediaError, match=r"a.mp3': MP3 can't hold 15000 Hz; resample to one of 8000, 11025, .*48000"):
        Audio(chord(15000), 15000).save(tmp_path / "a.mp3")
    with pytest.raises(MediaError, match=r"a.ogg': OGG can't hold 384000 Hz; resample to at most 200000"):
        Audio(chord(), 384000).save(tmp_path / "a.ogg")
    with pytest.raises(MediaError, match=r"a.flac': sound of 700000 Hz can't be encoded: .*sample rate\.$"):
        Audio(chord(), 700000).save(tmp_path / "a.flac")
    assert not list(tmp_path.iterdir())


def test_a_long_ogg_is_written(tmp_path):
    Audio(torch.zeros(2_400_000), 192_000).save(tmp_path / "long.ogg")  # in one piece this ends the process
    assert Audio.load(tmp_path / "long.ogg").seconds == 12.5
