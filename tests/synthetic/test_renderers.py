"""Renderers: seeded, varied, inside the frame, and blind to what their modality does not carry."""

import numpy as np
import pytest

from mmbridge.synthetic import FACTORS, SAMPLE_RATE, Scene, render_audio, render_image, render_video
from mmbridge.synthetic.geometry import AREAS, path, signed_distance

RENDERERS = {"image": render_image, "video": render_video, "audio": render_audio}
SCENE = Scene("triangle", "blue", "large", "top left", "left")


@pytest.mark.parametrize(
    ("modality", "shape", "dtype"),
    [("image", (64, 64, 3), np.uint8), ("video", (8, 64, 64, 3), np.uint8), ("audio", (32000,), np.float32)],
)
def test_format_and_seed(modality, shape, dtype):
    render = RENDERERS[modality]
    medium = render(SCENE, 5)
    assert medium.shape == shape and medium.dtype == dtype
    assert np.array_equal(medium, render(SCENE, 5))
    assert not np.array_equal(medium, render(SCENE, 6))


@pytest.mark.parametrize(
    ("modality", "changes"), [("image", {"motion": "up"}), ("audio", {"colour": "red", "place": "centre"})]
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
