"""Judges of maps, points and signals: exact on renderings, right on files of them, silent on noise, strict about arrays."""

import io

import numpy as np
import pytest
from PIL import Image

from mmbridge.errors import MediaError
from mmbridge.synthetic import (
    FACTORS,
    Scene,
    judge,
    judge_depth,
    judge_fmri,
    judge_imu,
    judge_normal,
    judge_pointcloud,
    render_depth,
    render_fmri,
    render_imu,
    render_normal,
    render_pointcloud,
)

RENDERERS = {
    "depth": render_depth,
    "normal": render_normal,
    "pointcloud": render_pointcloud,
    "imu": render_imu,
    "fmri": render_fmri,
}
SCENE = Scene("star", "green", "large", "bottom left", "left")


def mistakes(modality, count, change=lambda medium: medium, seed=0, **arguments):
    """Factors read wrongly over `count` random scenes, each rendered with a seed of its own."""
    rng = np.random.default_rng([seed, count])
    wrong = []
    for number in range(count):
        scene = Scene.random(rng)
        verdict = judge(modality, change(RENDERERS[modality](scene, 1000 * seed + number)), **arguments)
        assert list(verdict) == list(scene.factors(modality))
        wrong += [(number, factor) for factor, value in scene.factors(modality).items() if verdict[factor] != value]
    return wrong


def png(picture):
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return np.asarray(Image.open(file))


def millimetres(depth):
    """Through a 16-bit PNG."""
    return png(np.round(depth * 1000).astype(np.uint16)).astype(np.float32) / 1000


def as_bytes(normal):
    """Through an 8-bit PNG."""
    return png(np.round((normal + 1) * 127.5).astype(np.uint8)).astype(np.float32) / 127.5 - 1


def csv(array):
    """Through a text file of float32 numbers."""
    file = io.StringIO()
    np.savetxt(file, array, fmt="%.4f", delimiter=",")
    file.seek(0)
    return np.loadtxt(file, delimiter=",", dtype=np.float32)


def resized(array, side):
    layers = [
        np.asarray(Image.fromarray(layer).resize((side, side), Image.Resampling.BICUBIC))
        for layer in np.moveaxis(np.atleast_3d(array), -1, 0)
    ]
    return np.stack(layers, axis=-1) if array.ndim == 3 else layers[0]


def noisy(sigma):
    def add(array):
        noise = np.random.default_rng(array.size).standard_normal(array.shape)
        return (array + sigma * noise).astype(np.float32)

    return add


def at_rate(rate):
    def resample(trace):
        time = np.arange(2 * rate) / rate
        return np.stack([np.interp(time, np.arange(200) / 100, line) for line in trace])

    return resample


@pytest.mark.parametrize(("modality", "count"), [("depth", 500), ("normal", 500), ("imu", 1000), ("fmri", 1000)])
def test_renderings_are_read_exactly(modality, count):
    assert not mistakes(modality, count)


def test_renderings_of_points_are_read_exactly():
    assert not mistakes("pointcloud", 120)


@pytest.mark.parametrize(
    ("modality", "change"),
    [
        ("depth", millimetres),
        ("depth", noisy(0.01)),
        ("depth", lambda depth: resized(depth, 40)),
        ("depth", lambda depth: resized(depth, 200)),
        ("normal", as_bytes),
        ("normal", noisy(0.03)),
        ("normal", lambda normal: 2 * normal),
        ("normal", lambda normal: as_bytes(resized(normal, 40).clip(-1, 1))),
        ("normal", lambda normal: resized(normal, 200)),
        ("pointcloud", csv),
        ("pointcloud", lambda points: points[:512]),
        ("imu", csv),
        ("imu", noisy(0.1)),
        ("fmri", csv),
        ("fmri", noisy(0.5)),
        ("fmri", lambda voxels: 100 * voxels),
        ("fmri", lambda voxels: (voxels - voxels.mean()) / voxels.std()),
    ],
)
def test_what_files_do_changes_nothing(modality, change):
    assert not mistakes(modality, 40 if modality == "pointcloud" else 100, change, seed=1)


@pytest.mark.parametrize("rate", [50, 200])
def test_traces_of_other_rates_are_read(rate):
    assert not mistakes("imu", 100, at_rate(rate), seed=2, sample_rate=rate)


NOISES = {
    "depth": (lambda rng: rng.uniform(1, 3, (64, 64)), lambda rng: rng.normal(2, 0.01, (64, 64))),
    "normal": (lambda rng: rng.normal(0, 1, (64, 64, 3)), lambda rng: rng.normal((0, 0, 1), 0.1, (64, 64, 3))),
    "pointcloud": (lambda rng: rng.uniform(-1, 1, (1024, 6)), lambda rng: rng.normal(0, 1, (1024, 6))),
    "imu": (lambda rng: rng.normal(0, 1, (6, 200)), lambda rng: rng.normal(0, 6, (6, 200))),
    "fmri": (lambda rng: rng.normal(0, 1, 512), lambda rng: rng.normal(0, 50, 512)),
}


@pytest.mark.parametrize("modality", NOISES)
def test_noise_shows_nothing(modality):
    rng = np.random.default_rng(0)
    for make in NOISES[modality]:
        for _ in range(30):
            assert set(judge(modality, make(rng)).values()) == {None}


@pytest.mark.parametrize(
    ("modality", "medium"),
    [
        ("depth", np.full((64, 64), 2.0)),
        ("depth", np.add.outer(np.linspace(1, 2, 64), np.linspace(0, 1, 64) ** 2)),
        ("depth", -render_depth(SCENE, 0)),
        ("normal", np.broadcast_to([0.0, 0.0, 1.0], (64, 64, 3))),
        ("normal", -render_normal(SCENE, 0)),
        ("pointcloud", np.zeros((500, 6))),
        ("pointcloud", np.full((500, 6), 9.0)),
        ("imu", np.zeros((6, 200))),
        ("imu", render_imu(SCENE, 0)[:, :60]),
        ("fmri", np.zeros(512)),
        ("fmri", np.ones(512)),
    ],
)
def test_empty_ground_dents_and_silence_show_nothing(modality, medium):
    assert set(judge(modality, medium).values()) == {None}


def test_two_objects_are_not_taken_for_one():
    for seed in range(20):
        depth = render_depth(SCENE.replace(place="top left", size="medium"), seed)
        assert judge_depth(depth)["place"] == "top left"
        line = np.linspace(-1, 1, 64)
        x, y = np.meshgrid(line, line)
        terms = np.stack([np.ones_like(x), x, y, x**2, y**2], axis=-1)
        ground = terms @ np.linalg.lstsq(terms[40:].reshape(-1, 5), depth[40:].ravel(), rcond=None)[0]
        stands_out = np.where(depth - ground < -0.05, depth - ground, 0)
        assert set(judge_depth(depth + np.roll(stands_out, (22, 22), (0, 1))).values()) == {None}


def test_what_is_mirrored_is_read_mirrored():
    depth, trace = render_depth(SCENE, 1), render_imu(SCENE, 1)
    assert judge_depth(depth[:, ::-1])["place"] == "bottom right"
    assert judge_normal(render_normal(SCENE, 1)[:, ::-1] * [-1, 1, 1])["place"] == "bottom right"
    assert judge_imu(trace * np.array([-1, 1, 1, 1, 1, 1])[:, None])["motion"] == "right"
    assert judge_imu(trace * np.array([0, 1, 1, 1, 1, 1])[:, None])["motion"] == "still"


def test_points_without_colour_have_none_and_their_order_is_nothing():
    points = render_pointcloud(SCENE, 2)
    assert judge_pointcloud(points[:, :3]) == SCENE.factors("pointcloud") | {"colour": None}
    grey = np.column_stack([points[:, :3], np.full((1024, 3), 0.5)])
    assert judge_pointcloud(grey)["colour"] is None
    assert judge_pointcloud(points[np.argsort(points[:, 0])]) == SCENE.factors("pointcloud")


def test_a_scan_of_half_a_scene_shows_half_of_it():
    scans = [render_fmri(SCENE.replace(motion=motion), 3) for motion in FACTORS["motion"]]
    assert judge_fmri(np.mean(scans, axis=0)) == SCENE.factors("fmri") | {"motion": None}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda: judge_depth(np.ones((64, 64), np.uint16)), "judge_depth got.*uint16.*divide millimetres"),
        (lambda: judge_depth(np.ones((16, 64))), r"\(16, 64\).*at least 32x32"),
        (lambda: judge_depth(np.full((64, 64), np.nan)), "finite"),
        (lambda: judge_normal(np.zeros((64, 64, 3), np.uint8)), "judge_normal got.*uint8.*map bytes"),
        (lambda: judge_normal(np.zeros((3, 64, 64))), r"\(3, 64, 64\).*\(H, W, 3\)"),
        (lambda: judge_pointcloud(np.zeros((2, 6))), r"judge_pointcloud got.*\(2, 6\).*at least 128 points"),
        (lambda: judge_pointcloud(np.zeros((500, 4))), r"\(500, 4\)"),
        (lambda: judge_pointcloud(np.full((500, 6), np.nan)), "finite"),
        (lambda: judge_imu(np.zeros((3, 200))), r"judge_imu got.*\(3, 200\).*three accelerations"),
        (lambda: judge_imu(np.zeros((6, 200)), 10), "10 Hz.*50 Hz or more"),
        (lambda: judge_fmri(np.zeros(500)), r"judge_fmri got.*\(500,\).*\(512,\)"),
    ],
)
def test_bad_arrays_are_refused_in_one_sentence(wrong, words):
    with pytest.raises(MediaError, match=words):
        wrong()
