"""Renderers: seeded, varied, inside the frame, and blind to what their modality does not carry."""

import numpy as np
import pytest

from mmbridge.synthetic import (
    FACTORS,
    SAMPLE_RATE,
    Scene,
    render_audio,
    render_depth,
    render_fmri,
    render_image,
    render_imu,
    render_normal,
    render_pointcloud,
    render_video,
    voxel_code,
)
from mmbridge.synthetic.geometry import AREAS, path, signed_distance

RENDERERS = {
    "image": render_image,
    "video": render_video,
    "audio": render_audio,
    "depth": render_depth,
    "normal": render_normal,
    "pointcloud": render_pointcloud,
    "imu": render_imu,
    "fmri": render_fmri,
}
SCENE = Scene("triangle", "blue", "large", "top left", "left")
PICTURE = [[39, 73, 193], [40, 83, 203], [37, 81, 205], [35, 82, 210]]
VIDEO = [[41, 80, 215], [36, 81, 219], [28, 85, 215], [35, 100, 231]]
SOUND = [-0.511825, -0.471888, -0.441193, -0.378381]


@pytest.mark.parametrize(
    ("modality", "shape", "dtype"),
    [
        ("image", (64, 64, 3), np.uint8),
        ("video", (8, 64, 64, 3), np.uint8),
        ("audio", (32000,), np.float32),
        ("depth", (64, 64), np.float32),
        ("normal", (64, 64, 3), np.float32),
        ("pointcloud", (1024, 6), np.float32),
        ("imu", (6, 200), np.float32),
        ("fmri", (512,), np.float32),
    ],
)
def test_format_and_seed(modality, shape, dtype):
    render = RENDERERS[modality]
    medium = render(SCENE, 5)
    assert medium.shape == shape and medium.dtype == dtype
    assert np.array_equal(medium, render(SCENE, 5))
    assert not np.array_equal(medium, render(SCENE, 6))


@pytest.mark.parametrize(
    ("modality", "changes"),
    [
        ("image", {"motion": "up"}),
        ("audio", {"colour": "red", "place": "centre"}),
        ("depth", {"motion": "up"}),
        ("normal", {"motion": "up"}),
        ("pointcloud", {"motion": "up"}),
        ("imu", {"shape": "star", "colour": "red", "place": "centre"}),
    ],
)
def test_what_a_modality_does_not_carry_leaves_no_trace(modality, changes):
    render = RENDERERS[modality]
    assert np.array_equal(render(SCENE, 1), render(SCENE.replace(**changes), 1))


@pytest.mark.parametrize("modality", RENDERERS)
def test_every_factor_that_a_modality_carries_changes_it(modality):
    for factor in SCENE.factors(modality):
        other = next(value for value in FACTORS[factor] if value != getattr(SCENE, factor))
        changed = RENDERERS[modality](SCENE.replace(**{factor: other}), 1)
        assert not np.array_equal(RENDERERS[modality](SCENE, 1), changed)


def test_the_largest_objects_stay_inside_the_frame():
    """The picture's outermost pixels hold no saturated colour, wherever the object moves."""
    rng = np.random.default_rng(0)
    for seed in range(150):
        scene = Scene.random(rng).replace(size="large", colour="red", place="top left")
        video = render_video(scene, seed).astype(int)
        saturation = (video.max(axis=-1) - video.min(axis=-1)) / 255
        rim = np.concatenate([saturation[:, 0].ravel(), saturation[:, -1].ravel(), saturation[:, :, 0].ravel()])
        assert rim.max() < 0.5 < saturation.max()


def test_grounds_span_dark_to_bright():
    corners = [render_image(SCENE.replace(place="bottom right"), seed)[:8, :8].mean() for seed in range(200)]
    assert min(corners) < 50 and max(corners) > 205


@pytest.mark.parametrize("shape", FACTORS["shape"])
def test_outlines_cover_their_stated_area_around_the_origin(shape):
    line = np.linspace(-1.3, 1.3, 1301)
    x, y = np.meshgrid(line, line)
    inside = signed_distance(shape, x, y) < 0
    assert inside.mean() * 2.6**2 == pytest.approx(AREAS[shape], rel=0.01)
    assert (x[inside].mean(), y[inside].mean()) == pytest.approx((0, 0), abs=0.005)


@pytest.mark.parametrize("motion", FACTORS["motion"])
def test_paths_average_to_the_place(motion):
    assert path(motion, 8, phase=0.7).mean(axis=0) == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("shape", FACTORS["shape"])
def test_sounds_keep_level_and_band(shape):
    for seed in range(20):
        sound = render_audio(Scene(shape, "red", "small", "centre", "circling"), seed)
        assert 0.2 < np.abs(sound).max() <= 1
        power = np.abs(np.fft.rfft(sound)) ** 2
        assert power[np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE) > 7000].sum() < 1e-3 * power.sum()


def test_pictures_videos_and_sounds_are_as_they_always_were():
    """The shipped parts were trained on them; the numbers are those of the world before it had other media."""
    picture, video, sound = (RENDERERS[name](SCENE, 5) for name in ("image", "video", "audio"))
    assert picture[12:28:4, 20] == pytest.approx(np.array(PICTURE), abs=1)
    assert video[3, 12:28:4, 20] == pytest.approx(np.array(VIDEO), abs=1)
    assert sound[8000:8004] == pytest.approx(np.array(SOUND), abs=1e-3)


def saturated(picture):
    """Where a picture shows its object, and where surely not."""
    spread = picture.max(axis=-1).astype(int) - picture.min(axis=-1)
    return spread > 0.7 * spread.max(), spread < 0.3 * spread.max()


@pytest.mark.parametrize("seed", range(8))
def test_picture_depth_normals_and_points_show_one_surface(seed):
    scene = Scene.random(np.random.default_rng(seed)).replace(colour="red")
    on, off = saturated(render_image(scene, seed))
    depth, normal, points = (RENDERERS[name](scene, seed) for name in ("depth", "normal", "pointcloud"))

    # The face is nearer than the ground around it by what it stands out.
    line = (np.arange(64) - 31.5) / 32
    x, y = np.meshgrid(line, line)
    terms = np.stack([np.ones_like(x), x, y, x**2, y**2], axis=-1)
    ground = terms @ np.linalg.lstsq(terms[off], depth[off], rcond=None)[0]
    inside = ground[on] - depth[on]
    assert np.median(inside) > 0.1 and (inside > 0.03).mean() > 0.95

    # Normals are unit vectors across that surface; steep outlines are left out, where differences are coarse.
    assert np.linalg.norm(normal, axis=-1) == pytest.approx(1, abs=1e-5)
    slopes = np.stack([np.gradient(depth, 1 / 32, axis=1), -np.gradient(depth, 1 / 32, axis=0)], axis=-1)
    gentle = np.abs(slopes).max(axis=-1) < 0.5
    assert np.abs((normal[..., :2] / normal[..., 2:] - slopes)[gentle]).mean() < 0.15
    found = normal[..., :2] / normal[..., 2:]
    assert np.corrcoef(found.ravel(), slopes.ravel())[0, 1] > 0.8

    # Points lie on it, and have the picture's colours.
    column = np.clip((points[:, 0] + 1) * 32, 0, 63.99).astype(int)
    row = np.clip((1 - points[:, 1]) * 32, 0, 63.99).astype(int)
    assert np.median(np.abs(-points[:, 2] - depth[row, column])) < 0.01
    assert np.median(np.abs(points[:, 3:] - render_image(scene, seed)[row, column] / 255)) < 0.02


def test_a_straight_motion_starts_and_ends_at_rest_and_an_orbit_turns_once():
    for seed in range(10):
        trace = render_imu(SCENE.replace(motion="right"), seed)
        moved = trace[:3] - trace[:3].mean(axis=1, keepdims=True)
        speed = np.cumsum(moved[0]) / 100
        assert speed.max() > 0.2 and abs(speed[-1]) < 0.05
        assert 0.2 < speed.sum() / 100 < 0.45, "metres"
        assert trace[1].mean() == pytest.approx(9.81, abs=0.3), "gravity"
        orbit = render_imu(SCENE.replace(motion="circling"), seed)
        assert abs(orbit[5].sum() / 100) == pytest.approx(2 * np.pi, rel=0.15)


def test_brain_scans_are_linear_in_the_factors():
    scans = np.mean([render_fmri(SCENE, seed) for seed in range(200)], axis=0)
    others = np.mean([render_fmri(SCENE.replace(shape="star", size="small"), seed) for seed in range(200)], axis=0)
    code = voxel_code()
    columns = [value for values in FACTORS.values() for value in values]
    wanted = code[:, columns.index("triangle")] - code[:, columns.index("star")]
    wanted = wanted + code[:, columns.index("large")] - code[:, columns.index("small")]
    assert np.corrcoef(scans - others, wanted)[0, 1] > 0.98
