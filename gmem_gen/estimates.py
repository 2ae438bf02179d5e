"""Numbers with what is known of their error: an estimate and the interval around it.

Shapes: n values, r resamples.
"""

from __future__ import annotations

from collections.abc import Callable
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
    values: NDArray[np.floating | np.bool_], *, num_resamples: int, rng: np.random.Generator
) -> Estimate:
    """Return the mean of values with its percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Args:
        values: (n,) one a sample, n at least 1.
        num_resamples: r; 0 gives no interval.
        rng: draws the resamples.
    """
    wide = np.asarray(values, np.float64)
    if not num_resamples:
        return Estimate(value=float(wide.mean()))
    at_once = max(1, BLOCK_DRAWS // len(wide))
    means = [
        wide[rng.integers(0, len(wide), (min(at_once, num_resamples - done), len(wide)))].mean(axis=1)
        for done in range(0, num_resamples, at_once)
    ]
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(np.concatenate(means), [tail, 100 - tail])
    return Estimate(value=float(wide.mean()), low=float(low), high=float(high))


def bootstrap_deviation(
    value: float, num_values: int, measure: Callable[[NDArray[np.int64]], float], *, num_resamples: int,
    rng: np.random.Generator,
) -> Estimate:  # fmt: skip
    """Return an estimate with the interval value ± 1.96 standard deviations of the resamples.

    For figures that a resample shifts: rows that occur twice make a distribution look narrower than it is, so percentiles of
    resamples lie beside the figure, while their spread is still that of the figure.

    Args:
        value: of the sample itself.
        num_values: n.
        measure: (n,) counts of how often each row is taken → the figure.
        num_resamples: r; fewer than 2 give no interval.
        rng: draws the resamples.
    """
    if num_resamples < 2:
        return Estimate(value=value)
    draws = (np.bincount(rng.integers(0, num_values, num_values), minlength=num_values) for _ in range(num_resamples))
    deviation = float(np.std([measure(counts) for counts in draws], ddof=1))
    reach = NORMAL_QUANTILE * deviation
    return Estimate(value=value, low=max(0.0, value - reach), high=value + reach)
