"""Judges: right on fresh renders and ordinary files, silent on noise, strict about what is not one object or voice."""

import io

import av
import numpy as np
import pytest
from PIL import Image, ImageFilter

from mmbridge.errors import ConfigError, MediaError
from mmbridge.synthetic import (
    FACTORS,
    SAMPLE_RATE,
    Scene,
    caption,
    judge,
    judge_audio,
    judge_image,
    judge_video,
    render_audio,
    render_image,
    render_video,
)

RENDERERS = {"image": render_image, "video": render_video, "audio": render_audio}


def accuracy(modality, count, change=lambda medium: medium, seed=0, **arguments):
    """Share of right readings per factor over `count` random scenes, each rendered with a seed of its own."""
    rng = np.random.default_rng([seed, count])
    right = dict.fromkeys(Scene.all()[0].factors(modality), 0)
    for number in range(count):
        scene = Scene.random(rng)
        verdict = judge(modality, change(RENDERERS[modality](scene, 1000 * seed + number)), **arguments)
        for factor, value in scene.factors(modality).items():
            right[factor] += verdict[factor] == value
    return {factor: hits / count for factor, hits in right.items()}


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=50)
    return np.asarray(Image.open(file))


def resized(pixels, side):
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC))


def blurred(pixels):
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(0.8)))


def h264(frames):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=4, options={"crf": "30"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def mp3(samples):
    """Through a 44.1 kHz stereo MP3 at 64 kbit/s and back to mono."""
    time = np.arange(len(samples) * 44100 // SAMPLE_RATE) / 44100
    both = np.tile(np.interp(time, np.arange(len(samples)) / SAMPLE_RATE, samples).astype(np.float32), (2, 1))
    file = io.BytesIO()
    with av.open(file, "w", format="mp3") as container:
        stream = container.add_stream("libmp3lame", rate=44100, layout="stereo")
        stream.bit_rate = 64000
        frame = av.AudioFrame.from_ndarray(both, format="fltp", layout="stereo")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    file.seek(0)
    with av.open(file) as container:
        return np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1).mean(axis=0)


def noisy(samples):
    """With white noise 20 dB below the sound."""
    noise = np.random.default_rng(len(samples)).standard_normal(len(samples))
    return (samples + 0.1 * np.sqrt(np.mean(samples**2)) * noise).astype(np.float32)


@pytest.mark.parametrize("modality", RENDERERS)
def test_fresh_renders_are_read_right(modality):
    assert min(accuracy(modality, 500).values()) >= 0.99


@pytest.mark.parametrize(
    "change", [jpeg, blurred, lambda pixels: resized(pixels, 40), lambda pixels: resized(pixels, 512)]
)
def test_pictures_survive_ordinary_files(change):
    assert min(accuracy("image", 200, change, seed=1).values()) >= 0.97


@pytest.mark.parametrize("change", [lambda frames: np.stack([jpeg(frame) for frame in frames]), h264])
def test_videos_survive_ordinary_files(change):
    assert min(accuracy("video", 60, change, seed=2).values()) >= 0.97


@pytest.mark.parametrize(("change", "sample_rate"), [(noisy, SAMPLE_RATE), (mp3, 44100)])
def test_sounds_survive_noise_and_ordinary_files(change, sample_rate):
    assert min(accuracy("audio", 60, change, seed=3, sample_rate=sample_rate).values()) >= 0.97


NOISES = {
    "image": lambda rng: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8),
    "video": lambda rng: rng.integers(0, 256, (8, 64, 64, 3), dtype=np.uint8),
    "audio": lambda rng: rng.uniform(-1, 1, 32000),
}


@pytest.mark.parametrize("modality", NOISES)
def test_noise_is_not_above_chance(modality):
    rng = np.random.default_rng(0)
    count = 100
    right = dict.fromkeys(Scene.all()[0].factors(modality), 0)
    for _ in range(count):
        verdict = judge(modality, NOISES[modality](rng))
        for factor, value in Scene.random(rng).factors(modality).items():
            right[factor] += verdict[factor] == value
    for factor, hits in right.items():
        assert hits / count <= 1 / len(FACTORS[factor]) + 0.05


def test_an_empty_ground_shows_nothing():
    ramp = np.linspace(60, 140, 64).astype(np.uint8)
    empty = np.broadcast_to(ramp[:, None], (64, 64, 3)).copy()
    assert set(judge_image(empty).values()) == {None}
    assert set(judge_video(np.stack([empty] * 8)).values()) == {None}


def test_two_objects_are_not_taken_for_one():
    rng = np.random.default_rng(0)
    for seed in range(40):
        first = render_image(Scene.random(rng).replace(place="top left", size="medium"), seed).copy()
        second = render_image(Scene.random(rng).replace(place="bottom right", size="medium"), seed)
        first[32:, 32:] = second[32:, 32:]
        assert set(judge_image(first).values()) == {None}


def test_a_grey_object_has_no_colour():
    scene = Scene("square", "red", "large", "centre", "still")
    grey = np.asarray(Image.fromarray(render_image(scene, 0)).convert("L").convert("RGB"))
    assert judge_image(grey)["colour"] is None


def test_a_video_that_jumps_has_no_motion():
    scene = Scene("square", "red", "medium", "top left", "still")
    jumping = np.stack([render_image(scene.replace(place=place), 1) for place in FACTORS["place"] for _ in range(2)])
    order = [0, 8, 3, 6, 1, 9, 2, 7, 4, 5]
    assert judge_video(jumping[order])["motion"] is None


def test_motions_that_are_mirrored_are_read_mirrored():
    scene = Scene("ring", "green", "medium", "top left", "left")
    video = render_video(scene, 0)
    assert judge_video(video[:, :, ::-1]) == scene.replace(place="top right", motion="right").factors("video")
    assert judge_video(video[::-1])["motion"] == "right"


@pytest.mark.parametrize(("frames", "travel"), [(4, 5.0), (5, 9.0), (16, 7.0)])
def test_clips_of_other_lengths_show_the_whole_movement(frames, travel):
    for seed in range(12):
        scene = Scene.random(np.random.default_rng(seed))
        video = render_video(scene, seed, frames, travel)
        assert len(video) == frames
        assert judge("video", video) == scene.factors("video")


def test_long_videos_and_unequal_sides():
    scene = Scene("cross", "purple", "medium", "bottom left", "circling")
    video = np.repeat(render_video(scene, 0), 6, axis=0)
    wide = np.stack([np.asarray(Image.fromarray(frame).resize((160, 120))) for frame in video])
    assert judge_video(wide) == scene.factors("video")


@pytest.mark.parametrize("samples", [np.zeros(32000), np.zeros(0), np.full(32000, 0.5), np.ones(900)])
def test_silence_and_scraps_carry_nothing(samples):
    assert set(judge_audio(samples, SAMPLE_RATE).values()) == {None}


def test_a_sound_reversed_falls_instead_of_rising():
    scene = Scene("square", "red", "medium", "centre", "up")
    assert judge_audio(render_audio(scene, 0)[::-1], SAMPLE_RATE)["motion"] == "down"


def test_a_sound_at_another_speed_has_another_size():
    sound = render_audio(Scene("triangle", "red", "large", "centre", "still"), 0)
    assert judge_audio(sound, SAMPLE_RATE) == {"shape": "triangle", "size": "large", "motion": "still"}
    assert judge_audio(sound, round(SAMPLE_RATE * 400 / 220))["size"] == "medium"


def test_text_goes_through_the_same_door():
    scene = Scene("star", "blue", "small", "centre", "down")
    assert judge("text", caption(scene)) == scene.factors()
    assert judge("text", "a star") == dict.fromkeys(FACTORS) | {"shape": "star"}


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (
            lambda: judge_image(np.zeros((64, 64), np.uint8)),
            MediaError,
            r"judge_image got .*\(64, 64\).*accepts \(H, W, 3\)",
        ),
        (lambda: judge_image(np.zeros((64, 64, 3))), MediaError, "float64.*uint8.*convert or resize"),
        (lambda: judge_image(np.zeros((16, 16, 3), np.uint8)), MediaError, "at least 32x32 pixels"),
        (lambda: judge_video(np.zeros((2, 64, 64, 3), np.uint8)), MediaError, "judge_video.*at least 4 frames"),
        (lambda: judge_audio(np.full(32000, np.nan), 16000), MediaError, "judge_audio got.*finite"),
        (lambda: judge_audio(np.zeros((2, 32000)), 16000), MediaError, r"\(2, 32000\).*mono"),
        (lambda: judge_audio(np.zeros(32000), 4000), MediaError, "4000 Hz.*8000 Hz or more"),
        (lambda: judge("sound", np.zeros(32000)), ConfigError, "modality 'sound' is not known"),
    ],
)
def test_bad_media_are_refused_in_one_sentence(wrong, error, words):
    with pytest.raises(error, match=words):
        wrong()
