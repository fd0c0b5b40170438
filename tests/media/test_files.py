"""What all media share: ``media.load``, content before names, the data root, and writing whole files or none."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mmbridge import media
from mmbridge.errors import MediaError
from mmbridge.media import Audio, Image, Video

SUFFIXES = {
    "image": ("png", "jpg", "webp"),
    "audio": ("wav", "flac", "ogg", "mp3", "mp4", "webm"),
    "video": ("mp4", "webm", "gif"),
}
KINDS = [(modality, suffix) for modality, suffixes in SUFFIXES.items() for suffix in suffixes]
CONTAINERS = ("mp4", "webm")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    """A folder with one file of each kind, named medium.<suffix>."""
    folder = tmp_path_factory.mktemp("shelf")
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=generator)
    sound = Audio(torch.rand(24000, generator=generator) - 0.5, 16000)
    everything = {"image": Image(frames[0]), "audio": sound, "video": Video(frames, 8.0, sound)}
    for modality, suffixes in SUFFIXES.items():
        for suffix in suffixes:
            if modality != "audio" or suffix not in CONTAINERS:
                everything[modality].save(folder / f"medium.{suffix}")
    return folder


def test_load_by_modality(shelf):
    assert isinstance(media.load("image", shelf / "medium.png"), Image)
    assert isinstance(media.load("audio", str(shelf / "medium.mp4")), Audio)
    assert isinstance(media.load("video", "medium.gif", root=shelf), Video)
    assert len(media.load("video", shelf / "medium.mp4", max_frames=2).frames) == 2
    assert media.load("audio", np.zeros(9), sample_rate=8).sample_rate == 8
    assert [cls.modality for cls in (Image, Audio, Video)] == ["image", "audio", "video"]
    with pytest.raises(
        MediaError, match=r"there is no modality 'smell' that is read from files; known: audio, depth, "
    ):
        media.load("smell", shelf / "medium.png")
    with pytest.raises(MediaError, match=r"no modality 'pointclod' .*; did you mean 'pointcloud'\?"):
        media.load("pointclod", shelf / "medium.png")


def test_importing_the_package_loads_no_torch():
    heavy = "{'torch', 'av', 'PIL', 'soundfile'}"
    code = f"import sys, mmbridge.media as m; assert not {heavy} & sys.modules.keys(); print(m.Image.modality)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout == "image\n", result.stderr
    assert set(media.__all__) == set(dir(media))
    with pytest.raises(AttributeError, match="no attribute 'Picture'"):
        media.Picture  # noqa: B018


@pytest.mark.parametrize(("modality", "suffix"), KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(shelf, tmp_path, modality, suffix, share):
    data = (shelf / f"medium.{suffix}").read_bytes()
    (tmp_path / f"cut.{suffix}").write_bytes(data[: int(len(data) * share)])
    form = {"jpg": "JPEG", "webp": "WebP", "webm": "WebM"}.get(suffix, suffix.upper())
    with pytest.raises(
        MediaError, match=rf"cut.{suffix}' is a damaged or truncated {form} file \(.+\); export or fetch it ag"
    ):
        media.load(modality, tmp_path / f"cut.{suffix}")


@pytest.mark.parametrize(("modality", "suffix"), KINDS)
def test_empty_files(tmp_path, modality, suffix):
    (tmp_path / f"empty.{suffix}").touch()
    with pytest.raises(
        MediaError, match=rf"empty.{suffix}' is empty \(0 bytes\); (an image|audio|a video) is read from .*, "
    ):
        media.load(modality, tmp_path / f"empty.{suffix}")
    with pytest.raises(MediaError, match=r"the 0 bytes given is empty"):
        media.load(modality, b"")


@pytest.mark.parametrize(("modality", "suffix"), KINDS)
def test_files_with_flipped_bits_are_read_or_refused_but_never_break(shelf, modality, suffix):
    generator = np.random.default_rng(0)
    data = (shelf / f"medium.{suffix}").read_bytes()
    for _ in range(12):
        noisy = bytearray(data)
        for place in generator.integers(12, len(data), 10):
            noisy[place] = generator.integers(256)
        try:
            assert media.load(modality, bytes(noisy)).modality == modality
        except MediaError as error:
            assert "bytes given" in str(error)


LOOKS = {
    "PNG": b"\x89PNG\r\n\x1a\n" + bytes(64),
    "GIF": b"GIF89a" + bytes(64),
    "TIFF": b"II*\0" + bytes(64),
    "BMP": b"BM" + bytes(64),
    "PDF": b"%PDF-1.7" + bytes(64),
    "ZIP": b"PK\x03\x04" + bytes(64),
    "gzip": b"\x1f\x8b" + bytes(64),
    "NumPy": b"\x93NUMPY" + bytes(64),
    "AVI": b"RIFF\0\0\0\0AVI " + bytes(64),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(64),
    "AVIF": b"\0\0\0\x18ftypavif" + bytes(64),
    "text": "A caption, not a medium: größer, 色.\n".encode() * 30,
}


@pytest.mark.parametrize("looks", LOOKS)
def test_mislabelled_files_are_named_for_what_they_are(tmp_path, looks):
    (tmp_path / "sound.wav").write_bytes(LOOKS[looks])
    expected = (
        rf"sound.wav' is not audio that can be read: it looks like {looks}; audio is read from WAV, FLAC, OGG, MP3"
    )
    with pytest.raises(MediaError, match=expected):
        media.load("audio", tmp_path / "sound.wav")


@pytest.mark.parametrize(("modality", "suffix"), KINDS)
def test_each_modality_refuses_the_files_of_the_others(shelf, modality, suffix):
    for other in SUFFIXES.keys() - {modality}:
        if (other, suffix) not in KINDS:
            with pytest.raises(MediaError, match=rf"medium.{suffix}' is not .* that can be read: it looks like"):
                media.load(other, shelf / f"medium.{suffix}")


def test_the_name_does_not_matter(shelf, tmp_path):
    (tmp_path / "no-suffix").write_bytes((shelf / "medium.png").read_bytes())
    assert isinstance(Image.load(tmp_path / "no-suffix"), Image)
    (tmp_path / "picture.png").write_bytes(os.urandom(4) + bytes(range(128, 256)))
    with pytest.raises(
        MediaError, match=r"picture.png' is not an image .* its format is not known; .* PNG, JPEG, WebP\."
    ):
        Image.load(tmp_path / "picture.png")


def test_a_play_list_opens_nothing(shelf, tmp_path):
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\nfile://{shelf}/medium.mp4\n")
    with pytest.raises(MediaError, match=r"list.mp4' is not a video that can be read: it looks like text"):
        Video.load(tmp_path / "list.mp4")


def test_paths_that_lead_to_no_file(tmp_path):
    with pytest.raises(MediaError, match=r"there is no file 'missing.png' to read an image from; check the path"):
        Image.load("missing.png")
    with pytest.raises(
        MediaError, match=r"there is no file 'https://[^']+' to read .*; addresses are not fetched, so download"
    ):
        Image.load("https://example.org/cat.png")
    with pytest.raises(MediaError, match=r"is not a file that audio can be read from, but a folder or a device"):
        Audio.load(tmp_path)
    os.mkfifo(tmp_path / "pipe.wav")
    with pytest.raises(MediaError, match=r"but a folder or a device"):
        Audio.load(tmp_path / "pipe.wav")
    for root in (None, tmp_path):
        with pytest.raises(MediaError, match=r"'a\\x00.png' can't be opened to read an image from: embedded null byte"):
            Image.load("a\0.png", root=root)


def test_the_data_root_holds(shelf, tmp_path):
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "inner" / "a.png").write_bytes((shelf / "medium.png").read_bytes())
    (tmp_path / "secret.png").write_bytes((shelf / "medium.png").read_bytes())
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "in.png").symlink_to(root / "inner" / "a.png")
    for inside in ("inner/a.png", "inner/../inner/a.png", "in.png", root / "inner" / "a.png"):
        assert isinstance(media.load("image", inside, root=root), Image)
    for outside in ("../secret.png", "inner/../../secret.png", str(tmp_path / "secret.png"), "out.png", "/etc/passwd"):
        with pytest.raises(
            MediaError, match=r"leads out of the data root '.*root'; media paths are relative to the data root"
        ):
            media.load("image", outside, root=root)
        with pytest.raises(MediaError, match="leads out of the data root"):
            media.load("video", Path(outside), root=str(root))


@pytest.mark.parametrize("suffix", ["", ".bmp", ".mov"])
def test_unknown_suffixes_are_refused(tmp_path, suffix):
    given = repr(suffix or "a file without a suffix")
    image, audio = Image(torch.zeros(3, 8, 8, dtype=torch.uint8)), Audio(torch.zeros(80), 8000)
    with pytest.raises(
        MediaError, match=rf"an image can't be written as {given}; accepted: .png, .jpg, .jpeg, .webp\."
    ):
        image.save(tmp_path / f"a{suffix}")
    with pytest.raises(MediaError, match=rf"audio can't be written as {given}; accepted: .wav, .flac, .ogg, .mp3\."):
        audio.save(tmp_path / f"a{suffix}")
    with pytest.raises(MediaError, match=rf"a video can't be written as {given}; accepted: .mp4, .webm, .gif\."):
        Video(image.pixels[None], 8.0).save(tmp_path / f"a{suffix}")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 200, 200), dtype=np.uint8))
    Image(noise[:, :16, :16].contiguous()).save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            MediaError, match=r"a.png' can't be written \(File too large\); \d+ bytes are needed, nothing was"
        ):
            Image(noise).save(tmp_path / "a.png")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before
    Image(noise).save(tmp_path / "a.png")
    assert torch.equal(Image.load(tmp_path / "a.png").pixels, noise)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(MediaError, match=r"a.wav' can't be written: there is no folder '.*nowhere'; create it"):
        Audio(torch.zeros(80), 8000).save(tmp_path / "nowhere" / "a.wav")
