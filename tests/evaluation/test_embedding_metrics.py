"""Fréchet distances and similarities against closed forms and another implementation."""

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from mmbridge.errors import DataError
from mmbridge.evaluation.metrics import clip_score, clipsim, frechet_distance, gaussian_distance, mean_cosine


def test_gaussians_with_a_common_basis_have_a_closed_form():
    # With C = Q diag(a) Q' and C' = Q diag(b) Q', the distance is |m - m'|^2 + sum (sqrt a - sqrt b)^2.
    rng = np.random.default_rng(0)
    basis, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    a, b = rng.uniform(0, 4, 5), np.array([0, 1, 2, 0, 3.0])  # two directions without any spread
    shift = np.array([1.0, 0, -2, 0, 0.5])
    found = gaussian_distance(np.zeros(5), basis * a @ basis.T, shift, basis * b @ basis.T)
    assert found == pytest.approx(5.25 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum(), abs=1e-9)


def test_frechet_distance_by_hand():
    # Means 1 and 5, variances 2 and 8 (over n - 1): 16 + 2 + 8 - 2 * sqrt(16) = 18.
    assert frechet_distance([[0], [2]], [[3], [7]]) == pytest.approx(18)


def test_frechet_distance_of_samples_is_that_of_their_distributions():
    rng = np.random.default_rng(1)
    made = rng.standard_normal((20_000, 3)) * [1, 2, 3]
    real = rng.standard_normal((20_000, 3)) * [2, 2, 1] + [0, 1, 0]
    assert frechet_distance(made, real) == pytest.approx(1 + 1 + 0 + 4, rel=0.05)
    assert frechet_distance(made, made) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_equals_another_implementation():
    rng = np.random.default_rng(2)
    made, real = rng.uniform(0, 1, (2, 30, 3, 2, 2))
    other = FrechetInceptionDistance(torch.nn.Flatten(), normalize=True, input_img_size=(3, 2, 2)).set_dtype(
        torch.float64
    )
    other.update(torch.tensor(real), real=True)
    other.update(torch.tensor(made), real=False)
    assert frechet_distance(made.reshape(30, -1), real.reshape(30, -1)) == pytest.approx(
        other.compute().item(), rel=1e-4
    )


def test_fewer_samples_than_dimensions_are_no_obstacle():
    rng = np.random.default_rng(3)
    made, real = rng.standard_normal((4, 50)), rng.standard_normal((6, 50)) + 3
    assert np.isfinite(frechet_distance(made, real))
    assert frechet_distance(made, made) == pytest.approx(0, abs=1e-9)


def test_similarities_by_hand():
    # cosines 1, 0.6 and -1
    media, texts = [[2.0, 0], [3, 4], [0, 1]], [[1.0, 0], [5, 0], [0, -2]]
    assert mean_cosine(media, texts) == pytest.approx(0.2)
    assert clip_score(media, texts) == pytest.approx(2.5 * (1 + 0.6 + 0) / 3)
    # frames of the first video: cosines 1 and 0; of the second: 0.6
    assert clipsim([[[2.0, 0], [0, 2.0]], [[3.0, 4]]], [[1.0, 0], [1.0, 0]]) == pytest.approx((0.5 + 0.6) / 2)


def test_what_can_not_be_measured():
    with pytest.raises(DataError, match="two or more embeddings"):
        frechet_distance([[1.0]], [[1.0], [2.0]])
    with pytest.raises(DataError, match="NaN"):
        frechet_distance([[1.0], [float("nan")]], [[1.0], [2.0]])
    with pytest.raises(DataError, match="two equal shapes"):
        clip_score([[1.0, 2]], [[1.0]])
    with pytest.raises(DataError, match="give one for each"):
        clipsim([], [])
