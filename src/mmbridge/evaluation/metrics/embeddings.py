"""Metrics over embeddings, whichever network made them: Fréchet distances, CLIPScore, CLIPSIM.

A number compares only with numbers of the same network and the same preparation of media.
"""

from collections.abc import Sequence
from typing import Any

from mmbridge.errors import DataError

Array = Any  # np.ndarray, whose import this module leaves to its functions


def gaussian_distance(mean: Array, covariance: Array, other_mean: Array, other_covariance: Array) -> float:
    """Return the squared Fréchet distance of two Gaussians, |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), in float64.

    The trace of the root is the sum of the singular values of C^(1/2) C'^(1/2), so that covariances of few samples, which
    are singular, need no added noise.

    Shape: means (D,), covariances (D, D).

    Source: Dowson and Landau, J. Multivariate Anal. 12 (1982); FID: Heusel et al., arXiv 1706.08500, equation 6.
    """
    import numpy as np

    roots, spread = [], 0.0
    for matrix in (covariance, other_covariance):
        values, vectors = np.linalg.eigh(np.asarray(matrix, np.float64))
        values[values < values[-1] * len(values) * np.finfo(np.float64).eps] = 0  # rounding, which a root would enlarge
        roots.append((vectors * np.sqrt(values)) @ vectors.T)  # (D, D)
        spread += values.sum()
    cross = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    apart = np.asarray(mean, np.float64) - np.asarray(other_mean, np.float64)
    return max(float(apart @ apart + spread - 2 * cross), 0.0)


def frechet_distance(made: Array, real: Array) -> float:
    """Return the Fréchet distance of Gaussians fitted to two sets of embeddings: FID over Inception's, FAD over sounds'.

    Biased upwards by few samples: with fewer than a few thousand, compare equal numbers only.

    Args:
        made: Embeddings of what was made, (N, D).
        real: Embeddings of real media, (M, D).

    Source: Heusel et al., arXiv 1706.08500 (FID); Kilgour et al., arXiv 1812.08466 (FAD).

    Raises:
        DataError: Fewer than two embeddings in a set, different widths, or NaN.
    """
    import numpy as np

    sets = [np.asarray(values, np.float64) for values in (made, real)]
    shapes = [values.shape for values in sets]
    if any(values.ndim != 2 or len(values) < 2 for values in sets) or shapes[0][1] != shapes[1][1]:
        raise DataError(
            f"a Fréchet distance needs two sets (N, D) of two or more embeddings, not {shapes[0]} and {shapes[1]}."
        )
    if not all(np.isfinite(values).all() for values in sets):
        raise DataError("a Fréchet distance needs finite embeddings, but some are NaN or infinite.")
    moments = [(values.mean(0), np.atleast_2d(np.cov(values, rowvar=False))) for values in sets]
    return gaussian_distance(*moments[0], *moments[1])


def cosines(first: Array, second: Array) -> Array:
    """Return the cosine of each row of one array with the same row of another: (N, D), (N, D) -> (N,).

    Raises:
        DataError: Other shapes, or no rows.
    """
    import numpy as np

    left, right = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if left.ndim != 2 or left.shape != right.shape or not len(left):
        raise DataError(f"cosines need two equal shapes (N, D) with N > 0, not {left.shape} and {right.shape}.")
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return (left * right).sum(1) / lengths


def mean_cosine(media: Array, texts: Array) -> float:
    """Return the mean cosine of media and their texts, (N, D) each; over CLAP's embeddings, the CLAP score.

    Raises:
        DataError: Other shapes, or no rows.
    """
    return float(cosines(media, texts).mean())


def clip_score(images: Array, texts: Array) -> float:
    """Return CLIPScore, the mean of 2.5 * max(cosine, 0) over pictures and their captions, (N, D) each.

    Source: Hessel et al., "CLIPScore", arXiv 2104.08718, section 3; there captions start with "A photo depicts".

    Raises:
        DataError: Other shapes, or no rows.
    """
    return float((2.5 * cosines(images, texts).clip(min=0)).mean())


def clipsim(videos: Sequence[Array], texts: Array) -> float:
    """Return CLIPSIM, the mean over videos of the mean cosine of frames (F, D) with the video's text (D,).

    Source: Wu et al., "GODIVA", arXiv 2104.14806, section 4.

    Raises:
        DataError: Other shapes, or no videos.
    """
    import numpy as np

    if len(videos) != len(texts) or not len(videos):
        raise DataError(f"{len(videos)} videos can't be compared with {len(texts)} texts; give one for each.")
    pairs = zip(videos, texts, strict=True)
    return float(np.mean([mean_cosine(frames, np.tile(text, (len(frames), 1))) for frames, text in pairs]))
