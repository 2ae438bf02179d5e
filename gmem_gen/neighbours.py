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
"""Of a squared distance, as a share of the squared norms that it is a difference of."""


@dataclass(frozen=True, kw_only=True)
class Neighbourhoods:
    """Per-row values whose means are the four measures, and what two of them are without a sample."""

    precise: NDArray[np.float64]
    """(n,) 1 where a sample lies in a reference row's ball (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 2): precision."""
    recalled: NDArray[np.float64]
    """(m,) 1 where a reference row lies in a sample's ball (eq. 2): recall."""
    density: NDArray[np.float64]
    """(n,) reference balls that a sample lies in, over k (Naeem et al. 2020, arXiv 2002.09797, eq. 5): density."""
    covered: NDArray[np.float64]
    """(m,) 1 where a reference row's ball holds a sample (eq. 6): coverage."""

    recall_without: NDArray[np.float64] | None
    """(n,) recall with each sample left out in turn, radii included: those of its neighbours reach one further. None where n is
    k + 1: the others would not have k neighbours."""
    coverage_without: NDArray[np.float64]
    """(n,) coverage with each sample left out in turn."""

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
    radii: NDArray[np.float64] = nearest_rows(rows, k)[0][:, -1]
    return radii


def nearest_rows(rows: NDArray[np.float64], k: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the (n, k) squared distances, ascending, and positions of each row's k nearest others; infinity where none is."""
    distances, places = np.full((len(rows), k), np.inf), np.zeros((len(rows), k), np.int64)
    for start, block in _blocks(rows):
        own = slice(start, start + len(block))
        for other_start, other in _blocks(rows):
            found = squared_distances(block, other)
            if start == other_start:
                np.fill_diagonal(found, np.inf)  # a row is no neighbour of its own
            there = np.broadcast_to(np.arange(other_start, other_start + len(other)), found.shape)
            both, named = np.hstack([distances[own], found]), np.hstack([places[own], there])
            least = np.argpartition(both, k - 1, axis=1)[:, :k]
            distances[own], places[own] = (np.take_along_axis(one, least, axis=1) for one in (both, named))
    order = np.argsort(distances, axis=1, kind="stable")
    return np.take_along_axis(distances, order, axis=1), np.take_along_axis(places, order, axis=1)


def _reach(rows: NDArray[np.float64], radii: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return squared radii and their rounding: a row r away from y has a squared norm of 2‖y‖² + 2r² at most."""
    reach: NDArray[np.float64] = radii + ROUNDING * (3 * squared_norms(rows) + 2 * radii)
    return reach


def _centred(samples: NDArray[np.floating], reference: NDArray[np.floating]) -> list[NDArray[np.float64]]:
    """Return both in float64, less the reference's mean; raises ConfigError for rows that are not finite."""
    centre = np.asarray(reference, np.float64).mean(axis=0)
    found = [np.asarray(rows, np.float64) - centre for rows in (samples, reference)]
    if not all(np.isfinite(rows).all() for rows in found):
        raise ConfigError("features that are not finite have no neighbours")
    return found


def neighbourhoods(
    samples: NDArray[np.floating], reference: NDArray[np.floating], *, k: int = DEFAULT_NEIGHBOURS
) -> Neighbourhoods:
    """Compare samples with a reference, in blocks: memory beyond the float64 rows does not grow with n·m.

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
    ours, real = _centred(samples, reference)
    near, places = nearest_rows(ours, k + 1)
    balls = _Balls(
        rows=ours, reach=_reach(ours, near[:, k - 1]), reach_next=_reach(ours, near[:, k]), neighbours=places[:, :k]
    )
    inside, recalled, covered = np.zeros(len(ours), np.int64), [], []
    recall_change, coverage_change = np.zeros(len(ours), np.int64), np.zeros(len(ours), np.int64)
    real_reach = _reach(real, squared_radii(real, k))
    for start, block in _blocks(real):
        found = balls.against(block, real_reach[start : start + len(block)])
        inside += found.inside
        recalled.append(found.recalling.count > 0)
        covered.append(found.covering.count > 0)
        recall_change += found.recall_change
        coverage_change -= found.covering.losses(len(ours))
    recall, coverage = (np.concatenate(parts).astype(np.float64) for parts in (recalled, covered))
    return Neighbourhoods(
        precise=(inside > 0).astype(np.float64), recalled=recall, density=inside / k, covered=coverage,
        recall_without=(recall.sum() + recall_change) / len(real) if len(ours) > k + 1 else None,
        coverage_without=(coverage.sum() + coverage_change) / len(real),
    )  # fmt: skip


@dataclass(kw_only=True)
class _Sole:
    """How many samples reach each of b reference rows, and which it is where there is one."""

    count: NDArray[np.int64]
    total: NDArray[np.int64]
    """Sum of the positions of those that do."""

    def add(self, hits: NDArray[np.bool_], start: int) -> None:
        """Count (rows of a block of samples that begins at `start`, b) more."""
        self.count += hits.sum(axis=0)
        self.total += np.arange(start, start + len(hits)) @ hits

    def losses(self, num_samples: int) -> NDArray[np.int64]:
        """Return (n,) how many rows are reached by this sample alone."""
        return np.bincount(self.total[self.count == 1], minlength=num_samples)


@dataclass(frozen=True, kw_only=True)
class _Against:
    """What samples and a block of b reference rows are to each other."""

    inside: NDArray[np.int64]
    """(n,) balls of the block that a sample lies in."""
    covering: _Sole
    """Samples in each row's ball."""
    recalling: _Sole
    """Samples in whose ball each row is."""
    recall_change: NDArray[np.int64]
    """(n,) how many more rows of the block are recalled without this sample; below 0 fewer."""


@dataclass(frozen=True, kw_only=True)
class _Balls:
    """Samples and the balls around them."""

    rows: NDArray[np.float64]
    reach: NDArray[np.float64]
    """(n,) squared, to the k-th neighbour."""
    reach_next: NDArray[np.float64]
    """(n,) squared, to the neighbour after it: what a ball reaches once one of its k neighbours is left out."""
    neighbours: NDArray[np.int64]
    """(n, k) positions."""

    def against(self, block: NDArray[np.float64], real_reach: NDArray[np.float64]) -> _Against:
        """Compare the samples with b reference rows and their squared reach."""
        inside = np.zeros(len(self.rows), np.int64)
        covering, recalling = (
            _Sole(count=np.zeros(len(block), np.int64), total=np.zeros(len(block), np.int64)) for _ in "12"
        )
        rings = []
        norms = squared_norms(block)
        for start, ours in _blocks(self.rows):
            own = slice(start, start + len(ours))
            least = squared_distances(ours, block) - ROUNDING * (squared_norms(ours)[:, None] + norms)
            in_real = least <= real_reach
            inside[own] = in_real.sum(axis=1)
            covering.add(in_real, start)
            in_ours = least <= self.reach[own][:, None]
            recalling.add(in_ours, start)
            ring = (least <= self.reach_next[own][:, None]) & ~in_ours & (recalling.count < 2)
            sample, row = np.nonzero(ring)
            rings.append(np.stack([sample + start, row]))
        change = self._recall_change(recalling, np.concatenate(rings, axis=1))
        return _Against(inside=inside, covering=covering, recalling=recalling, recall_change=change)

    def _recall_change(self, recalling: _Sole, rings: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return (n,) rows gained less rows lost without each sample.

        Args:
            recalling: which balls hold b rows.
            rings: (2, p) samples and rows that their balls would hold, were one of their k neighbours left out.
        """
        n, b = len(self.rows), len(recalling.count)
        sample, row = rings
        left_out = self.neighbours[sample]  # (p, k)
        pairs = np.unique(left_out * b + row[:, None])  # each sample and row that its absence would have recalled, once
        without, there = pairs // b, pairs % b
        gained = np.bincount(without[recalling.count[there] == 0], minlength=n)
        kept = (recalling.count[there] == 1) & (recalling.total[there] == without)
        return gained + np.bincount(without[kept], minlength=n) - recalling.losses(n)
