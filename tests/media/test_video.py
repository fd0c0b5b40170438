"""Videos: every kind of file, array and tensor that is read, preparation, and every error."""

import struct
from fractions import Fraction
from io import BytesIO

import av
import numpy as np
import PIL.Image
import pytest
import torch

from mmbridge.errors import MediaError
from mmbridge.media import Audio, Image, Video, prepare_image, prepare_video
from mmbridge.specs import ImageInput, VideoInput

NORMALISED = {"mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28)}


def moving_square(count: int = 12, height: int = 48, width: int = 64) -> torch.Tensor:
    """A coloured square that crosses a shaded field, uint8 (count, 3, height, width)."""
    frames = torch.linspace(20, 120, width).to(torch.uint8).expand(count, 3, height, width).clone()
    for index in range(count):
        left = index * (width - 16) // max(count - 1, 1)
        frames[index, :, 12:28, left : left + 16] = torch.tensor([220, 40, 60], dtype=torch.uint8)[:, None, None]
    return frames


def shades(count: int, height: int = 8, width: int = 8) -> torch.Tensor:
    """Frames that are told apart by their shade: frame i is 10 * i."""
    return (10 * torch.arange(count, dtype=torch.uint8))[:, None, None, None].expand(count, 3, height, width).clone()


def shade_of(video: Video) -> list[int]:
    return (video.frames.float().mean(dim=(1, 2, 3)) / 10).round().int().tolist()


def gif(frames: torch.Tensor, milliseconds: list[int]) -> bytes:
    pictures = [PIL.Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in frames]
    buffer = BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=milliseconds)
    return buffer.getvalue()


def mux(kind: str, codec: str, times: list[int], sound: str | None = None, samples: int = 0) -> bytes:
    """Encode one shade for each time (in milliseconds), and a sound track of so many samples."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, 1000, {"crf": "5", "b": "0"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        if sound:
            track = container.add_stream(sound, 48000, layout="mono")
        container.start_encoding()
        for frame, time in zip(shades(len(times), 32, 32), times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
            picture.pts = time
            container.mux(stream.encode(picture))
        if times:
            container.mux(stream.encode())
        if samples:
            wave = av.AudioFrame.from_ndarray(np.zeros((1, samples), np.float32), "fltp", "mono")
            wave.sample_rate = 48000
            container.mux(track.encode(wave))
            container.mux(track.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(("suffix", "error"), [("mp4", 3.0), ("webm", 3.0), ("gif", 1.0), ("MP4", 3.0)])
@pytest.mark.parametrize("fps", [4, 12.5])
def test_save_and_load(tmp_path, suffix, error, fps):
    video = Video(moving_square(), fps)
    video.save(tmp_path / f"clip.{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"clip.{suffix}"]
    again = Video.load(tmp_path / f"clip.{suffix}")
    assert again.frames.shape == video.frames.shape and again.frames.dtype == torch.uint8
    assert again.fps == pytest.approx(fps) and again.audio is None
    assert (again.frames.float() - video.frames.float()).abs().mean() < error
    assert torch.equal(Video.load((tmp_path / f"clip.{suffix}").read_bytes()).frames, again.frames)


@pytest.mark.parametrize("fps", [0.5, 8, 23.976, 30000 / 1001, 60])
@pytest.mark.parametrize("suffix", ["mp4", "webm"])
def test_any_rate_survives(tmp_path, suffix, fps):
    Video(shades(9, 16, 16), fps).save(tmp_path / f"clip.{suffix}")
    video = Video.load(tmp_path / f"clip.{suffix}")
    assert video.fps == pytest.approx(fps, rel=1e-3) and len(video.frames) == 9


def test_crf_trades_size_for_closeness(tmp_path):
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64), dtype=np.uint8))
    for suffix in ("mp4", "webm"):
        sizes = []
        for crf in (15, 45):
            Video(noise, 8.0).save(tmp_path / f"{crf}.{suffix}", crf=crf)
            sizes.append((tmp_path / f"{crf}.{suffix}").stat().st_size)
        assert sizes[1] < sizes[0] / 2


@pytest.mark.parametrize("suffix", ["mp4", "webm"])
@pytest.mark.parametrize("rate", [16000, 48000, 11000])
def test_the_sound_track_comes_back_in_time(tmp_path, suffix, rate):
    time = torch.arange(rate, dtype=torch.float64) / rate
    wave = (0.4 * torch.sin(2 * torch.pi * (300 + 400 * time) * time)).float()
    Video(moving_square(8), 8.0, Audio(wave, rate)).save(tmp_path / f"clip.{suffix}")
    video = Video.load(tmp_path / f"clip.{suffix}")
    assert repr(video) == "Video(64x48, 8 frames, 8 fps, sound)"
    again = video.audio.resample(rate).samples
    inner = slice(rate // 10, rate - rate // 10)
    assert torch.corrcoef(torch.stack([again[inner], wave[inner]]))[0, 1] > 0.98
    assert Video.load(tmp_path / f"clip.{suffix}", with_audio=False).audio is None
    assert Video.load(video, with_audio=False).audio is None and Video.load(video) is video


def test_odd_sides_gain_a_row_or_column(tmp_path):
    Video(moving_square(4, 33, 47), 8.0).save(tmp_path / "odd.mp4")
    frames = Video.load(tmp_path / "odd.mp4").frames
    assert frames.shape == (4, 3, 34, 48)
    assert (frames[:, :, :33, :47].float() - moving_square(4, 33, 47).float()).abs().mean() < 3
    assert (frames[:, :, 33].float() - frames[:, :, 32].float()).abs().mean() < 3


def test_colours_survive_each_format(tmp_path):
    colours = torch.tensor([[230, 30, 40], [30, 200, 50], [30, 40, 220], [235, 225, 50], [0, 0, 0], [255, 255, 255]])
    frames = colours.to(torch.uint8).repeat_interleave(16, 0).T[None, :, None].expand(3, 3, 64, 96)
    for suffix in ("mp4", "webm", "gif"):
        Video(frames, 8.0).save(tmp_path / f"clip.{suffix}")
        centres = Video.load(tmp_path / f"clip.{suffix}").frames[-1, :, 32, 8::16].T.int()
        assert (centres - colours).abs().max() <= 4


def test_the_cameras_rotation_is_applied(tmp_path):
    Video(moving_square(), 8.0).save(tmp_path / "clip.mp4")
    data = (tmp_path / "clip.mp4").read_bytes()
    upright = Video.load(data).frames
    matrix = data.index(b"tkhd") + 44  # QuickTime: the track header's transformation, row by row
    for (a, b, c, d), turns in (((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)):  # turns: anticlockwise
        turned = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        frames = Video.load(data[:matrix] + turned + data[matrix + 36 :]).frames
        assert torch.equal(frames, torch.rot90(upright, turns, (2, 3)))


def test_a_variable_rate_becomes_constant():
    video = Video.load(gif(shades(5), [100, 100, 500, 100, 100]))
    assert video.fps == pytest.approx(10) and shade_of(video) == [0, 1, 2, 2, 2, 2, 2, 3, 4]
    for kind, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9")):
        video = Video.load(mux(kind, codec, [0, 40, 80, 240, 280, 320]))
        assert video.fps == pytest.approx(25) and shade_of(video)[:8] == [0, 1, 2, 2, 2, 2, 3, 4]


def test_equal_frames_of_a_gif_are_not_lost(tmp_path):
    frames = shades(6)[[0, 1, 1, 1, 2, 2]]
    Video(frames, 5.0).save(tmp_path / "still.gif")
    video = Video.load(tmp_path / "still.gif")
    assert video.fps == pytest.approx(5) and torch.equal(video.frames, frames)


def test_a_transparent_gif_is_composited_on_white():
    clear = PIL.Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    marked = clear.copy()
    marked.paste((255, 0, 0, 255), (0, 0, 4, 4))
    buffer = BytesIO()
    marked.save(buffer, "GIF", save_all=True, append_images=[clear], duration=100, disposal=2)
    frames = Video.load(buffer.getvalue()).frames
    assert frames[0, :, 2, 2].tolist() == [255, 0, 0] and frames[0, :, 6, 6].tolist() == [255] * 3
    assert frames[1, :, 2, 2].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["file", "video"])
def test_max_frames_keeps_evenly_spaced_frames(tmp_path, kind):
    video = Video(shades(20, 16, 16), 10.0)
    video.save(tmp_path / "clip.gif")
    source = tmp_path / "clip.gif" if kind == "file" else video
    few = Video.load(source, max_frames=5)
    assert shade_of(few) == [2, 6, 10, 14, 18] and few.fps == pytest.approx(2.5) and few.seconds == pytest.approx(2)
    assert shade_of(Video.load(source, max_frames=1)) == [10]
    assert len(Video.load(source, max_frames=99).frames) == 20


def test_an_empty_sound_track_is_none():
    assert Video.load(mux("webm", "libvpx-vp9", [0, 100, 200], sound="libopus")).audio is None


def test_arrays_and_tensors_agree():
    frames = moving_square()
    array = frames.permute(0, 2, 3, 1).numpy()
    for source in (frames, array, array / 255, (frames / 255).half()):
        video = Video.load(source, fps=8)
        assert video.fps == 8 and torch.equal(video.frames, frames)
    assert repr(video) == "Video(64x48, 12 frames, 8 fps)" and video.seconds == 1.5


def test_content_hash_covers_frames_rate_and_sound():
    video = Video(moving_square(), 8.0)
    sound = Audio(torch.ones(800), 8000)
    others = [Video(video.frames, 4.0), Video(video.frames.flip(0), 8.0), Video(video.frames, 8.0, sound)]
    assert len({video.content_hash, *(other.content_hash for other in others)}) == 4
    assert Video(moving_square(), 8.0).content_hash == video.content_hash


def test_prepare_video_takes_evenly_spaced_frames_of_evenly_spaced_clips():
    spec = VideoInput(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, clips=3, frames=3, seconds=1.0)
    clips = prepare_video(Video(shades(20), 5.0), spec)  # 4 s: clips start at 0, 1.5 and 3 s
    assert clips.shape == (3, 3, 3, 8, 8) and clips.dtype == torch.float32
    assert (clips[:, 0, :, 0, 0] * 25.5).round().tolist() == [[0, 2, 4], [8, 10, 12], [15, 17, 19]]


def test_prepare_video_repeats_a_short_video():
    spec = VideoInput(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, clips=2, frames=4, seconds=2.0)
    clips = prepare_video(Video(shades(2), 4.0), spec)
    assert (clips[:, 0, :, 0, 0] * 25.5).round().tolist() == [[0, 0, 0, 1]] * 2
    single = prepare_video(Video(shades(5)[4:], 4.0), spec)
    assert (single * 25.5).round().unique().tolist() == [4]


def test_prepare_video_agrees_with_prepare_image():
    frames = moving_square(1, 60, 90)
    video = prepare_video(Video(frames, 1.0), VideoInput(32, **NORMALISED, clips=1, frames=2, seconds=1.0))
    image = prepare_image(Image(frames[0]), ImageInput(32, **NORMALISED))
    torch.testing.assert_close(video[0, :, 0], image)
    torch.testing.assert_close(video[0, :, 1], image)


@pytest.mark.parametrize("upright", [False, True])
def test_three_crops_run_along_the_longer_side(upright):
    column = torch.arange(40, dtype=torch.uint8)
    frames = (column[:, None] if upright else column).expand(4, 3, 40, 8) if upright else column.expand(4, 3, 8, 40)
    video = Video(frames.contiguous(), 4.0)
    spec = VideoInput(size=8, mean=(0.0,) * 3, std=(1.0,) * 3, clips=2, frames=2, seconds=0.5, crops=3)
    clips = prepare_video(video, spec)
    assert clips.shape == (6, 3, 2, 8, 8)
    corners = (clips[:, 0, 0, 0, 0] * 255).round().int().tolist()
    assert corners == [0, 16, 32] * 2
    centre = prepare_video(video, VideoInput(8, (0.0,) * 3, (1.0,) * 3, clips=2, frames=2, seconds=0.5))
    assert torch.equal(centre, clips[1::3])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (np.zeros((2, 4, 4, 3)), {}, r"an array of frames does not say its rate; pass fps=, in frames a second"),
        ("clip.mp4", {"fps": 8}, r"fps=8 is for arrays and tensors; a file holds its own rate: load it without"),
        ("clip.mp4", {"max_frames": 0}, r"max_frames=0 leaves no frame of a video; it must be at least 1"),
        (np.zeros((2, 3, 4, 4)), {"fps": 8}, r"the array has shape \(2, 3, 4, 4\); a video is \(F, H, W, 3\)"),
        (torch.zeros(2, 4, 4, 3), {"fps": 8}, r"the tensor has shape \(2, 4, 4, 3\); a video is \(F, 3, H, W\)"),
        (torch.zeros(3, 4, 4), {"fps": 8}, r"the tensor has shape \(3, 4, 4\)"),
        (np.zeros((0, 4, 4, 3)), {"fps": 8}, r"the array is a video without frames or pixels: its shape is \(0, 4"),
        (torch.zeros(0, 3, 4, 4), {"fps": 8}, r"the tensor is a video without frames or pixels"),
        (np.full((1, 4, 4, 3), np.nan), {"fps": 8}, r"the array holds NaN or infinite values"),
        (torch.full((1, 3, 4, 4), 2.0), {"fps": 8}, r"the tensor spans 2..2; floats must lie in 0..1"),
        (np.zeros((1, 4, 4, 3), dtype=object), {"fps": 8}, r"the array has dtype object; accepted: uint8, or floats"),
        (torch.zeros(1, 3, 4, 4), {"fps": 0}, r"a video with 0 frames a second can't be used; accepted: 0.001..1000"),
        (torch.zeros(1, 3, 4, 4), {"fps": float("nan")}, r"a video with nan frames a second can't be used"),
        ([1, 2], {}, r"a video can't be loaded from list; accepted: a path, bytes, a NumPy array or torch"),
    ],
)  # fmt: skip
def test_what_is_no_video_is_refused(source, options, message):
    with pytest.raises(MediaError, match=message):
        Video.load(source, **options)


def test_files_that_hold_no_usable_video(tmp_path):
    Audio(torch.rand(8000), 8000).save(tmp_path / "sound.wav")
    with pytest.raises(
        MediaError, match=r"sound.wav' is not a video that can be read: it looks like WAV; a video is read"
    ):
        Video.load(tmp_path / "sound.wav")
    with av.open(tmp_path / "sound.mp4", "w") as container:
        stream = container.add_stream("aac", 8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match=r"sound.mp4' has no video track; load it as audio, or choose another file"):
        Video.load(tmp_path / "sound.mp4")
    with pytest.raises(MediaError, match=r"the \d+ bytes given is a video without frames; choose another file"):
        Video.load(mux("webm", "libvpx-vp9", [], sound="libopus", samples=4800))
    with pytest.raises(MediaError, match=r"damaged or truncated WebM file \(End of file\)"):
        Video.load(mux("webm", "libvpx-vp9", []))
    with pytest.raises(MediaError, match=r"damaged or truncated MP4 file \(it holds neither pictures nor sound\)"):
        Video.load(mux("mp4", "libx264", []))
    Video(shades(4, 16, 16), 8.0).save(tmp_path / "clip.mp4")
    data = (tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(
        MediaError, match=r"the video track of the \d+ bytes given is of a codec that is not known; encode it"
    ):
        Video.load(data.replace(b"avc1", b"xyz1"))
    with pytest.raises(MediaError, match=r"damaged or truncated MP4 file \(none of its frames can be decoded\)"):
        Video.load(data.replace(b"avc1", b"av01").replace(b"avcC", b"av1C"))


def test_a_file_whose_index_comes_first_is_known_to_be_cut(tmp_path):
    with av.open(tmp_path / "clip.mp4", "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", 8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for frame in np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(MediaError, match=r"damaged or truncated MP4 file \(it holds \d of 12 packets of a track\)"):
        Video.load(data[: len(data) // 2])


def test_frames_that_change_size_are_refused():
    buffer = BytesIO()
    with av.open(buffer, "w", format="webm") as container:
        stream = container.add_stream("libvpx-vp9", 8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.start_encoding()
        for size, first in ((32, 0), (64, 4)):
            codec = av.CodecContext.create("libvpx-vp9", "w")
            codec.width, codec.height, codec.pix_fmt, codec.time_base = size, size, "yuv420p", Fraction(1, 8)
            packets = []
            for time in range(first, first + 4):
                frame = av.VideoFrame(size, size, "yuv420p")
                frame.pts = time
                packets += codec.encode(frame)
            for packet in packets + codec.encode(None):
                packet.stream, packet.time_base = stream, Fraction(1, 8)
                container.mux(packet)
    with pytest.raises(MediaError, match=r"damaged or truncated WebM file \(its frames change size\)"):
        Video.load(buffer.getvalue())


def test_what_does_not_fit_into_memory_is_refused_before_it_is_decoded():
    long = gif(shades(3, 200, 200), [20, 20, 600_000])  # at 50 frames a second
    with pytest.raises(
        MediaError, match=r"would fill 3.4 GiB \(30002 frames\); at most 2 GiB.*max_frames=17895 or fewer"
    ):
        Video.load(long)
    assert len(Video.load(long, max_frames=4).frames) == 4
    huge = bytearray(gif(shades(2), [100, 100]))
    huge[6:10] = struct.pack("<HH", 9000, 9000)  # the size of the canvas
    with pytest.raises(MediaError, match=r"9000x9000 = 81 megapixels; at most 64 are read"):
        Video.load(bytes(huge))


def test_the_class_checks_its_frames():
    for frames in (torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.uint8)):
        with pytest.raises(
            MediaError, match=r"a video holds uint8 frames of shape \(F, 3, H, W\), not .*Video.load conver"
        ):
            Video(frames, 8.0)
    with pytest.raises(
        MediaError, match=r"a video without frames or pixels can't be used: its shape is \(0, 3, 4, 4\)"
    ):
        Video(torch.zeros(0, 3, 4, 4, dtype=torch.uint8), 8.0)


def test_prepare_and_save_errors(tmp_path):
    video = Video(shades(4, 16, 16), 8.0)
    with pytest.raises(MediaError, match=r"a video can't be prepared in 2 crops; accepted: 1 or 3"):
        prepare_video(video, VideoInput(8, **NORMALISED, clips=1, frames=2, seconds=1.0, crops=2))
    with pytest.raises(
        MediaError, match=r"a.webm': frames \(4, 3, 16, 16\) at 8 fps, crf 99 can't be encoded: Numerical"
    ):
        video.save(tmp_path / "a.webm", crf=99)
    with pytest.raises(MediaError, match=r"a.gif': frames \(4, 3, 16, 16\) at 0.001 fps.* can't be encoded"):
        Video(video.frames, 0.001).save(tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
