"""Numbers with what is known of their error: an estimate and the interval around it.

Shapes: n values, r resamples, g parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054
"""Of the standard normal distribution, at half of what CONFIDENCE leaves out."""
BLOCK_DRAWS = 4_000_000
"""Indices drawn at once: 32 MB."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number and its 95 % interval; without one where resampling was not asked for or means nothing."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        """Return {"value", "low", "high"}, to nine significant digits: what differs further is rounding."""
        return {name: None if number is None else float(f"{number:.9g}") for name, number in vars(self).items()}

    def describe(self) -> str:
        """Return the number and its interval, as "0.912 [0.88, 0.94]"."""
        interval = "" if self.low is None or self.high is None else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{interval}"


def random_numbers(seed: int, *purpose: int) -> np.random.Generator:
    """Return random numbers of their own for each purpose, so that leaving one figure out changes no other."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *purpose])))


def bootstrap_mean(
    values: NDArray[np.floating | np.bool_], *, num_resamples: int, rng: np.random.Generator,
    groups: NDArray[np.int64] | None = None,
) -> Estimate:  # fmt: skip
    """Return the mean of values with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: (n,) one a sample, n at least 1.
        num_resamples: r; 0 gives no interval.
        rng: draws the resamples.
        groups: (n,) numbers from 0 without a gap: values of one number are taken together, or not at all; None: each alone.
    """
    wide = np.asarray(values, np.float64)
    if not num_resamples:
        return Estimate(value=float(wide.mean()))
    sums = wide if groups is None else np.bincount(groups, wide)
    sizes = None if groups is None else np.bincount(groups).astype(np.float64)
    at_once = max(1, BLOCK_DRAWS // len(sums))
    means = []
    for done in range(0, num_resamples, at_once):
        drawn = rng.integers(0, len(sums), (min(at_once, num_resamples - done), len(sums)))
        means.append(sums[drawn].mean(axis=1) / (1.0 if sizes is None else sizes[drawn].mean(axis=1)))
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Estimate(value=float(wide.mean()), low=float(low), high=float(high))


def around(value: float, deviation: float, least: float = -np.inf, most: float = np.inf) -> Estimate:
    """Return an estimate with the interval value ± 1.96 deviations, cut off at what the figure can be."""
    reach = NORMAL_QUANTILE * deviation
    return Estimate(value=value, low=max(least, value - reach), high=min(most, value + reach))


def jackknife_deviation(left_out: NDArray[np.float64]) -> float:
    """Return the standard deviation of a figure, from its (g,) values with each of g equal parts of the samples left out.

    ((g - 1) / g Σ (θ₍ᵢ₎ - θ̄)²)^½. For a figure that does not depend on the order of the samples it is too large rather than too
    small in the mean (Efron and Stein 1981, theorem 2): right where samples act each for itself, up to √2 too large where they
    act in pairs alone.
    """
    count = len(left_out)
    return float(np.sqrt((count - 1) / count * ((left_out - left_out.mean()) ** 2).sum()))


def parts_left_out(num_values: int, num_parts: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Yield for each of equal parts, drawn at random, the (n,) counts of how often each value is taken: 0 in it, else 1."""
    part = rng.permutation(num_values) % num_parts
    for left_out in range(num_parts):
        yield (part != left_out).astype(np.int64)
