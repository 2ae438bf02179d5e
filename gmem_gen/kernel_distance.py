"""Kernel distance (KID): unbiased squared maximum mean discrepancy with a polynomial kernel (Bińkowski et al. 2018, 1801.01401).

Shapes: n samples, m reference rows, s rows of a subset, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import ConfigError
from gmem_gen.estimates import Estimate, around

MOST_IN_SUBSET = 1000
"""As published; the estimate is unbiased at any size."""
NUM_SUBSETS = 100
DEGREE = 3
BLOCK_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class KernelDistance:
    """KID over subsets."""

    estimate: Estimate
    """The mean over subsets; may be below 0, as unbiased estimates of 0 are."""
    deviation: float
    """Standard deviation over subsets, as published beside KID."""
    subset_size: int
    num_subsets: int


def polynomial_kernel(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the (n, m) kernel (x·y / D + 1)³ in float64."""
    one, two = np.asarray(first, np.float64), np.asarray(second, np.float64)
    kernel: NDArray[np.float64] = (one @ two.T / one.shape[1] + 1.0) ** DEGREE
    return kernel


def squared_discrepancy(first: NDArray[np.floating], second: NDArray[np.floating]) -> float:
    """Return the unbiased MMD² of (n, D) and (m, D) rows, n and m at least 2 (Gretton et al. 2012, eq. 3)."""
    n, m = len(first), len(second)
    own, other = polynomial_kernel(first, first), polynomial_kernel(second, second)
    between = polynomial_kernel(first, second).mean()
    within = (own.sum() - np.trace(own)) / (n * (n - 1)) + (other.sum() - np.trace(other)) / (m * (m - 1))
    return float(within - 2 * between)


def discrepancy_variance(samples: NDArray[np.floating], reference: NDArray[np.floating]) -> float:
    """Return the unbiased variance of MMD² over samples, the reference held fixed; unbiased, so it may fall below 0.

    But for a constant MMD² is U, the mean over pairs i ≠ j of h(xᵢ, xⱼ) = k(xᵢ, xⱼ) - b(xᵢ) - b(xⱼ), b the mean kernel with the
    reference. Its variance is E U² - (E U)², and the mean of h(xᵢ, xⱼ) h(xₗ, xₒ) over four different rows estimates (E U)²
    without bias. Of h less U it is (2 Σᵢⱼ h² - 4 Σᵢ (Σⱼ h)²) / n (n - 1) (n - 2) (n - 3), and U² is 0.

    Args:
        samples: (n, D), n at least 4.
        reference: (m, D).
    """
    n = len(samples)
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, n, BLOCK_ROWS)]
    to_real = np.concatenate([_mean_kernel(samples[block], reference) for block in blocks])
    shift = to_real.mean()  # brings h near 0: a constant changes no variance, and large numbers would cancel
    sums, squares = np.zeros(n), 0.0
    for block in blocks:
        for other in blocks:
            h = polynomial_kernel(samples[block], samples[other])
            h -= to_real[block][:, None] + (to_real[other] - shift)
            if block == other:
                np.fill_diagonal(h, 0.0)
            sums[block] += h.sum(axis=1)
            squares += float(np.einsum("ij,ij->", h, h))
    mean = sums.sum() / (n * (n - 1))
    centred, squares = sums - (n - 1) * mean, squares - n * (n - 1) * mean**2
    return float((4 * (centred**2).sum() - 2 * squares) / (n * (n - 1) * (n - 2) * (n - 3)))


def _mean_kernel(block: NDArray[np.floating], reference: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the mean kernel of each row with all rows of the reference."""
    total = np.zeros(len(block))
    for start in range(0, len(reference), BLOCK_ROWS):
        total += polynomial_kernel(block, reference[start : start + BLOCK_ROWS]).sum(axis=1)
    return total / len(reference)


def kernel_distance(
    samples: NDArray[np.floating], reference: NDArray[np.floating], *, rng: np.random.Generator, subset_size: int | None = None,
    num_subsets: int = NUM_SUBSETS,
) -> KernelDistance:  # fmt: skip
    """Return KID of samples against a reference.

    The interval is of the samples, with the reference held fixed, and of the draw of the subsets: its variance is that of the
    MMD² of all rows, which the mean over subsets estimates, and the variance of that mean over draws.

    Args:
        samples: (n, D).
        reference: (m, D).
        rng: draws the subsets.
        subset_size: s, at most half of the smaller set; None: that half, but 1,000 at most.
        num_subsets: how many are drawn, 2 or more.

    Raises:
        ConfigError: fewer than four rows on a side, or a size out of range.
    """
    fewest = min(len(samples), len(reference))
    size = min(MOST_IN_SUBSET, fewest // 2) if subset_size is None else subset_size
    if not 2 <= size <= fewest // 2 or num_subsets < 2:
        raise ConfigError(
            f"KID takes two or more subsets of at least 2 and at most half of the {fewest} rows, not {num_subsets} of {size}",
            key="subset_size",
        )
    values = [squared_discrepancy(_drawn(samples, size, rng), _drawn(reference, size, rng)) for _ in range(num_subsets)]
    value, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    spread = (max(discrepancy_variance(samples, reference), 0.0) + deviation**2 / num_subsets) ** 0.5
    return KernelDistance(
        estimate=around(value, spread), deviation=deviation, subset_size=size, num_subsets=num_subsets
    )


def _drawn(rows: NDArray[np.floating], size: int, rng: np.random.Generator) -> NDArray[np.floating]:
    return rows[rng.choice(len(rows), size, replace=False)]
