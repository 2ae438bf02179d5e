"""Fréchet distance between two sets of features, each taken for a Gaussian; float64, from streamed moments.

Shapes: n rows, D dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gmem_bank import Moments
from gmem_bank.errors import ConfigError
from gmem_gen.estimates import Estimate, around, jackknife_deviation, parts_left_out

BLOCK_ROWS = 4096


def moments_of(features: NDArray[np.floating], counts: NDArray[np.int64] | None = None) -> Moments:
    """Return count, mean and scatter of rows, block by block.

    Args:
        features: (n, D) of any real type; sums are float64.
        counts: (n,) how often each row is taken; None: once.
    """
    blocks = range(0, len(features), BLOCK_ROWS)
    weights = [None if counts is None else counts[start : start + BLOCK_ROWS] for start in blocks]
    return merged(
        (_block_moments(features[start : start + BLOCK_ROWS], own) for start, own in zip(blocks, weights, strict=True)),
        features.shape[1],
    )


def merged(parts: Iterable[Moments], dim: int) -> Moments:
    """Return the moments of the rows of all parts; in any grouping the same, to float64 rounding."""
    total = Moments(count=0, mean=np.zeros(dim), scatter=np.zeros((dim, dim)))
    for part in parts:
        total = total.merged(part)
    return total


def _block_moments(block: NDArray[np.floating], counts: NDArray[np.int64] | None) -> Moments:
    wide = np.asarray(block, np.float64)
    taken = np.ones(len(wide)) if counts is None else counts.astype(np.float64)
    total = taken.sum()
    mean = taken @ wide / max(total, 1.0)
    centred = wide - mean
    return Moments(count=int(total), mean=mean, scatter=(centred * taken[:, None]).T @ centred)


def covariance(moments: Moments) -> NDArray[np.float64]:
    """Return the (D, D) unbiased covariance; raises ConfigError for fewer than two rows, which have none."""
    if moments.count < 2:
        raise ConfigError(f"a covariance needs two rows or more, there are {moments.count}", key="num")
    return moments.scatter / (moments.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """Return the Fréchet distance of two Gaussians (Dowson and Landau 1982; as FID, arXiv 1706.08500, eq. 6), not negative.

    ‖μ₁ - μ₂‖² + tr Σ₁ + tr Σ₂ - 2 tr (Σ₁^½ Σ₂ Σ₁^½)^½. The last trace is the sum of the singular values of Σ₁^½ Σ₂^½, with the
    roots from symmetric eigendecompositions: no matrix square root of a product, so rank-deficient covariances give a
    distance like any other, and small eigenvalues are not squared before their root is taken.

    Raises:
        ConfigError: other dimensions, moments that are not finite, or fewer than two rows.
    """
    if first.mean.shape != second.mean.shape:
        raise ConfigError(f"features of {len(first.mean)} and of {len(second.mean)} dimensions cannot be compared")
    apart = first.mean - second.mean
    one, two = covariance(first), covariance(second)
    if not (np.isfinite(one).all() and np.isfinite(two).all() and np.isfinite(apart).all()):
        raise ConfigError("the features are not finite, or too large to be squared: there is no distance between them")
    overlap = np.linalg.svd(_root(one).T @ _root(two), compute_uv=False).sum()
    return max(0.0, float(apart @ apart + np.trace(one) + np.trace(two) - 2 * overlap))


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return A with A·Aᵀ = the symmetric matrix, directions that hold only rounding left out: (D, at most D)."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    root: NDArray[np.float64] = vectors[:, kept] * np.sqrt(values[kept])
    return root


def frechet_estimate(
    samples: NDArray[np.floating], reference: Moments, *, num_parts: int, rng: np.random.Generator
) -> Estimate:
    """Return the Fréchet distance of (n, D) samples to a reference, with a jackknife interval over the samples.

    The reference is held fixed: the interval is of the spread, how far the figure would move with other samples of the same
    model. The bias of a finite n, which is upwards, is not in it. Parts are left out instead of rows repeated, since a covariance
    of repeated rows has a lower rank: at n = 2 D the bootstrap's spread is four times too wide.

    Args:
        samples: (n, D).
        reference: moments of m rows.
        num_parts: into how many equal parts the samples are cut, of which each is left out in turn, n at most; fewer than 2
            give no interval.
        rng: draws the parts.

    Returns:
        the estimate; without an interval, too, where n less a part is D or fewer: a jackknife can be three times too wide then.
    """
    value = frechet_distance(moments_of(samples), reference)
    n, dim = samples.shape
    parts = min(num_parts, n)
    if parts < 2 or n - -(-n // parts) <= dim:
        return Estimate(value=value)
    root = _root(covariance(reference))
    fixed = float((root**2).sum())

    def measure(counts: NDArray[np.int64]) -> float:
        """Return the distance by eigenvalues of Aᵀ Σ A, which is quick, and good to some 1e-6: enough for a deviation."""
        found = moments_of(samples, counts)
        own, apart = covariance(found), found.mean - reference.mean
        overlap = np.sqrt(np.maximum(np.linalg.eigvalsh(root.T @ own @ root), 0.0)).sum()
        return float(apart @ apart + np.trace(own) + fixed - 2 * overlap)

    left_out = np.array([measure(counts) for counts in parts_left_out(n, parts, rng)])
    return around(value, jackknife_deviation(left_out), least=0.0)
