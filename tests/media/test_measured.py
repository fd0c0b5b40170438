"""What the media that are made of numbers share: round trips, damaged and hostile files, the root, drawings."""

import pickle
from io import BytesIO

import numpy as np
import pytest
import torch
from media.measured import example, values

from mmbridge import media
from mmbridge.errors import MediaError
from mmbridge.media import Audio, Image, Video
from mmbridge.modality import MEDIA

EXACT = {
    "depth": (".npy",),
    "normal": (".npy",),
    "pointcloud": (".npy", ".csv"),
    "imu": (".csv",),
    "fmri": (".npy",),
}
ALL = {**EXACT, "depth": (".npy", ".png"), "normal": (".npy", ".png"), "pointcloud": (".npy", ".csv", ".ply")}
KINDS = [(modality, suffix) for modality, suffixes in ALL.items() for suffix in suffixes]


@pytest.mark.parametrize("modality", EXACT)
def test_files_hold_every_bit(modality, tmp_path):
    medium = example(modality)
    assert set(EXACT) | {"image", "audio", "video"} == set(MEDIA) and MEDIA[modality].suffix in EXACT[modality]
    for suffix in EXACT[modality]:
        medium.save(tmp_path / f"medium{suffix}")
        again = media.load(modality, f"medium{suffix}", root=tmp_path)
        assert type(again) is type(medium) and again.modality == modality
        assert torch.equal(values(again), values(medium))
        assert again.content_hash == medium.content_hash
        assert media.load(modality, (tmp_path / f"medium{suffix}").read_bytes()).content_hash == medium.content_hash
    assert media.load(modality, medium) is medium


@pytest.mark.parametrize("modality", EXACT)
def test_the_hash_follows_every_value(modality):
    medium, other = example(modality), example(modality)
    before = medium.content_hash
    assert other.content_hash == before
    values(other).view(-1)[-1] += 1e-3
    assert other.content_hash != before


@pytest.mark.parametrize("modality", EXACT)
def test_drawings_show_what_is_there(modality):
    medium, other = example(modality), example(modality)
    drawn = medium.draw()
    assert isinstance(drawn, Image) and len(drawn.pixels.unique()) > 10
    assert torch.equal(medium.draw().pixels, drawn.pixels)
    changed = values(other).roll(1, dims=-1 if modality != "pointcloud" else 1)
    values(other)[:] = changed.clamp(0, 1) if modality == "pointcloud" else changed
    assert not torch.equal(other.draw().pixels, drawn.pixels)


@pytest.mark.parametrize("modality", EXACT)
def test_values_that_are_no_numbers_are_refused(modality):
    wrong = values(example(modality)).clone()
    wrong.view(-1)[3] = torch.nan
    options = {"sample_rate": 100.0} if modality == "imu" else {}
    with pytest.raises(MediaError, match=r"the tensor holds 1 NaN or infinite values; remove or replace them"):
        media.load(modality, wrong, **options)
    with pytest.raises(MediaError, match=r"1 NaN or infinite values"):
        type(example(modality))(wrong, *options.values())
    with pytest.raises(MediaError, match=r"float32 .* of shape \(.*; .*load converts"):
        type(example(modality))(wrong.double(), *options.values())
    with pytest.raises(MediaError, match=r"has dtype (torch.)?complex"):
        media.load(modality, wrong.to(torch.cfloat), **options, **({"scale": 1.0} if modality == "depth" else {}))


@pytest.mark.parametrize("modality", EXACT)
def test_what_is_no_medium_is_refused(modality, tmp_path):
    with pytest.raises(MediaError, match=r"can't be loaded from float; accepted: a path, bytes, "):
        media.load(modality, 3.5)
    with pytest.raises(MediaError, match=r"there is no file 'no.npy' to read an? .+ from; check the path"):
        media.load(modality, "no.npy")
    (tmp_path / "empty").touch()
    with pytest.raises(MediaError, match=r"is empty \(0 bytes\); an? .+ is read from "):
        media.load(modality, tmp_path / "empty")
    with pytest.raises(MediaError, match=r"it looks like PDF; an? .+ is read from .*NPY"):
        media.load(modality, b"%PDF-1.7" + bytes(64))
    with pytest.raises(MediaError, match=r"leads out of the data root"):
        media.load(modality, "../secret.npy", root=tmp_path)
    with pytest.raises(MediaError, match=r"can't be written as '.gif'; accepted: \."):
        example(modality).save(tmp_path / "a.gif")


@pytest.mark.parametrize("modality", EXACT)
def test_nothing_is_unpickled(modality):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a pickle was opened",))

    buffer = BytesIO()
    np.save(buffer, np.array([[Trap()] * 6] * 6, dtype=object), allow_pickle=True)
    with pytest.raises(MediaError, match=r"holds Python objects, which are never read; save an array of numbers"):
        media.load(modality, buffer.getvalue())
    with pytest.raises(MediaError):
        media.load(modality, pickle.dumps(Trap()))


@pytest.mark.parametrize("modality", EXACT)
def test_an_array_that_only_claims_to_be_large_is_refused(modality):
    buffer = BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<f4", "fortran_order": False, "shape": (2**40, 2**40, 2**40)}
    )
    with pytest.raises(MediaError, match=r"damaged or truncated NumPy file \(it holds 5 of \d+ bytes\)"):
        media.load(modality, buffer.getvalue() + b"12345")


@pytest.mark.parametrize(("modality", "suffix"), KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files_of_numbers(modality, suffix, share, tmp_path):
    example(modality).save(tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    if suffix == ".csv":  # whole rows of text are a shorter medium; a cut one is refused
        data = data[: data.rindex(b",", 0, int(len(data) * share))]
        with pytest.raises(MediaError, match=r"is not a table of numbers|holds no row of numbers|columns|has shape"):
            media.load(modality, data)
        return
    with pytest.raises(MediaError, match=r"damaged or truncated (NumPy|PNG|PLY) file \(.+\); export or fetch it ag"):
        media.load(modality, data[: int(len(data) * share)])


@pytest.mark.parametrize(("modality", "suffix"), KINDS)
def test_numbers_with_flipped_bits_are_read_or_refused_but_never_break(modality, suffix, tmp_path):
    example(modality).save(tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    generator = np.random.default_rng(0)
    for _ in range(40):
        noisy = bytearray(data)
        for place in generator.integers(4, min(len(data), 400), 4):
            noisy[place] = generator.integers(256)
        try:
            assert media.load(modality, bytes(noisy)).modality == modality
        except MediaError as error:
            assert "bytes given" in str(error) or "the " in str(error)


def test_a_full_table_has_a_limit(monkeypatch):
    monkeypatch.setattr("mmbridge.media.arrays.MAX_BYTES", 100)
    monkeypatch.setattr("mmbridge.media.arrays.check_size.__defaults__", (100,))
    buffer = BytesIO()
    np.save(buffer, np.zeros(200))
    with pytest.raises(MediaError, match=r"the 1728 bytes given holds 0 MiB; at most 0 MiB are read from NumPy"):
        media.load("fmri", buffer.getvalue())


def test_a_video_with_sound_is_two_media(tmp_path):
    frames = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sound = Audio(0.4 * torch.sin(torch.arange(16000) * 0.3), 16000)
    Video(frames, 8.0, sound).save(tmp_path / "clip.mp4")
    video, audio = (media.load(modality, "clip.mp4", root=tmp_path) for modality in ("video", "audio"))
    assert isinstance(video, Video) and isinstance(audio, Audio)
    assert torch.equal(video.audio.samples, audio.samples) and abs(audio.seconds - 1) < 0.1
    Video(frames, 8.0).save(tmp_path / "silent.mp4")
    with pytest.raises(MediaError, match=r"silent.mp4' holds no sound"):
        media.load("audio", tmp_path / "silent.mp4")
