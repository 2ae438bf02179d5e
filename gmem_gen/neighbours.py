"""Precision, recall, density and coverage: what balls around nearest neighbours say of two sets of features.

Balls are closed, as in the papers: a point on the surface is inside, so that ties, copies and radii of 0 count.
Distances are float64, between rows less the reference's mean; two that differ by no more than rounding are equal.

Shapes: n samples, m reference rows, k neighbours, D dimensions, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import ConfigError

DEFAULT_NEIGHBOURS = 5
"""k, as published for density and coverage."""
BLOCK_ROWS = 1024
ROUNDING = 64 * float(np.finfo(np.float64).eps)
"""Of a squared distance, as a share of the largest squared norms that such distances are differences of."""


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """Per-row values whose means are the four measures."""

    precise: NDArray[np.float64]
    """(n,) 1 where a sample lies in a reference row's ball (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 2): precision."""
    recalled: NDArray[np.float64]
    """(m,) 1 where a reference row lies in a sample's ball (eq. 2): recall."""
    density: NDArray[np.float64]
    """(n,) reference balls that a sample lies in, over k (Naeem et al. 2020, arXiv 2002.09797, eq. 5): density."""
    covered: NDArray[np.float64]
    """(m,) 1 where a reference row's ball holds a sample (eq. 6): coverage."""

    def measures(self) -> dict[str, NDArray[np.float64]]:
        """Return name → per-row values."""
        return {"precision": self.precise, "recall": self.recalled, "density": self.density, "coverage": self.covered}


def squared_distances(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (n, m) squared Euclidean distances of float64 rows, to `ROUNDING`."""
    sums = squared_norms(first)[:, None] + squared_norms(second)
    distances: NDArray[np.float64] = np.maximum(sums - 2 * (first @ second.T), 0.0)
    return distances


def squared_norms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (n,) squared norms."""
    norms: NDArray[np.float64] = np.einsum("nd,nd->n", rows, rows)
    return norms


def _blocks(rows: NDArray[np.float64]) -> Iterator[tuple[int, NDArray[np.float64]]]:
    for start in range(0, len(rows), BLOCK_ROWS):
        yield start, rows[start : start + BLOCK_ROWS]


def squared_radii(rows: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return (n,) the squared distance of each row to its k-th nearest other row; rows equal to it count as others."""
    radii = np.empty(len(rows))
    for start, block in _blocks(rows):
        nearest = np.full((len(block), k), np.inf)
        for other_start, other in _blocks(rows):
            distances = squared_distances(block, other)
            if start == other_start:
                np.fill_diagonal(distances, np.inf)  # a row is no neighbour of its own
            nearest = np.partition(np.hstack([nearest, distances]), k - 1, axis=1)[:, :k]
        radii[start : start + len(block)] = nearest.max(axis=1)
    return radii


def neighbourhoods(
    samples: NDArray[np.floating], reference: NDArray[np.floating], *, k: int = DEFAULT_NEIGHBOURS
) -> Neighbourhoods:
    """Compare samples with a reference, in blocks: memory beyond the float64 rows does not grow with n or m.

    Args:
        samples: (n, D).
        reference: (m, D).
        k: which neighbour decides the radius of a ball.

    Raises:
        ConfigError: k or fewer rows on a side, or rows that are not finite.
    """
    fewest = min(len(samples), len(reference))
    if not 1 <= k < fewest:
        raise ConfigError(
            f"the {k}. nearest neighbour needs more than {k} rows on each side, there are {fewest}", key="k"
        )
    centre = np.asarray(reference, np.float64).mean(axis=0)
    ours, real = np.asarray(samples, np.float64) - centre, np.asarray(reference, np.float64) - centre
    if not (np.isfinite(ours).all() and np.isfinite(real).all()):
        raise ConfigError("features that are not finite have no neighbours")
    slack = ROUNDING * (squared_norms(ours).max() + squared_norms(real).max())
    our_reach, real_reach = squared_radii(ours, k) + slack, squared_radii(real, k) + slack
    inside = np.zeros(len(ours), np.int64)
    recalled, covered = np.zeros(len(real), np.bool_), np.zeros(len(real), np.bool_)
    for start, block in _blocks(ours):
        own = slice(start, start + len(block))
        for other_start, other in _blocks(real):
            there = slice(other_start, other_start + len(other))
            distances = squared_distances(block, other)
            in_real = distances <= real_reach[there]
            inside[own] += in_real.sum(axis=1)
            covered[there] |= in_real.any(axis=0)
            recalled[there] |= (distances <= our_reach[own][:, None]).any(axis=0)
    return Neighbourhoods(
        precise=(inside > 0).astype(np.float64), recalled=recalled.astype(np.float64), density=inside / k,
        covered=covered.astype(np.float64),
    )  # fmt: skip
