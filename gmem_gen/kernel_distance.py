"""Kernel distance (KID): unbiased squared maximum mean discrepancy with a polynomial kernel (Bińkowski et al. 2018, 1801.01401).

Shapes: n samples, m reference rows, s rows of a subset, D dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import ConfigError
from gmem_gen.estimates import NORMAL_QUANTILE, Estimate

MOST_IN_SUBSET = 1000
"""As published; the estimate is unbiased at any size."""
NUM_SUBSETS = 100
DEGREE = 3


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


def kernel_distance(
    samples: NDArray[np.floating], reference: NDArray[np.floating], *, rng: np.random.Generator, subset_size: int | None = None,
    num_subsets: int = NUM_SUBSETS,
) -> KernelDistance:  # fmt: skip
    """Return KID of samples against a reference.

    The interval is by subsampling (Politis and Romano 1994): subsets of s of n rows, drawn without replacement, vary s⁻¹ - n⁻¹
    where all rows vary n⁻¹, so the spread of the subsets is brought to n by √(s / (n - s)). n is that of the smaller set.

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
    reach = NORMAL_QUANTILE * deviation * (size / (fewest - size)) ** 0.5
    estimate = Estimate(value=value, low=value - reach, high=value + reach)
    return KernelDistance(estimate=estimate, deviation=deviation, subset_size=size, num_subsets=num_subsets)


def _drawn(rows: NDArray[np.floating], size: int, rng: np.random.Generator) -> NDArray[np.floating]:
    return rows[rng.choice(len(rows), size, replace=False)]
