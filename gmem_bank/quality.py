"""What compression costs, in figures: cosines, neighbours that stay neighbours, and what neighbours say of a concept.

Shapes: n rows, m rows of a sample, p probes, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from gmem_bank.space import to_space

SAMPLE_ROWS = 8192
"""Rows among which neighbours are looked for."""
NUM_PROBES = 256
"""Of those, rows whose neighbours are compared."""
NEIGHBOURS = 10
TIE = 1e-6
"""Difference of two float32 cosines that says nothing."""
QUANTILES = {"p1": 0.01, "p5": 0.05, "median": 0.5}


def summary(cosines: NDArray[np.float64]) -> dict[str, float]:
    """Return mean, p1, p5, median and min of (n,) cosines."""
    places = {name: float(np.quantile(cosines, place)) for name, place in QUANTILES.items()}
    return {"mean": float(cosines.mean()), **places, "min": float(cosines.min())}


def sample_rows(rows: NDArray[np.int64], most: int, seed: int) -> NDArray[np.int64]:
    """Return at most so many of the rows, drawn by a seed, ascending."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.Generator(np.random.PCG64(seed)).choice(rows, most, replace=False))


def probes_of(count: int) -> NDArray[np.int64]:
    """Return the places of the probes among the rows of a sample, spread evenly."""
    return np.unique(np.linspace(0, count - 1, min(count, NUM_PROBES)).round().astype(np.int64))


def neighbours(snippets: NDArray[np.float32], probes: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """Return the (p, k) places of the rows of highest cosine to each probe, itself left out; in no order.

    Args:
        snippets: (m, D) float32, in any space.
        probes: (p,) places.
        k: at most m - 1.
    """
    return np.argpartition(-_cosines_to(snippets, probes), k - 1, axis=1)[:, :k]


def _cosines_to(snippets: NDArray[np.float32], probes: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the (p, m) cosines of each probe to all rows, itself left out."""
    unit = to_space(snippets, "unit")
    cosines = unit[probes] @ unit.T
    cosines[np.arange(len(probes)), probes] = -np.inf
    return np.asarray(cosines, np.float32)


def overlap(before: NDArray[np.float32], after: NDArray[np.float32]) -> float | None:
    """Return the share of the 10 nearest rows afterwards that are among them before as well; None for fewer than two rows.

    A row counts as one of the nearest before where its cosine is that of the tenth less TIE, or higher: which of equal rows come
    first is chance.

    Args:
        before: (m, D) float32.
        after: (m, D) float32, the same rows.
    """
    if len(before) < 2:
        return None
    probes, k = probes_of(len(before)), min(NEIGHBOURS, len(before) - 1)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda rows: _cosines_to(rows, probes), (before, after))
    return float((_share_kept(first, second, k) + _share_kept(second, first, k)) / 2)


def _share_kept(wanted: NDArray[np.float32], got: NDArray[np.float32], k: int) -> float:
    """Return the share of the k nearest by `got` that are among the k nearest by `wanted`, or level with the last of them."""
    tenth = np.partition(wanted, -k, axis=1)[:, -k]
    nearest = np.argpartition(-got, k - 1, axis=1)[:, :k]
    return float((np.take_along_axis(wanted, nearest, axis=1) >= tenth[:, None] - TIE).mean())


def knn_accuracy(snippets: NDArray[np.float32], labels: NDArray[np.int64]) -> float | None:
    """Return how often the majority of the 10 nearest other rows has a probe's label; of equal votes the lowest label wins.

    Args:
        snippets: (m, D) float32.
        labels: (m,) from 0; -1: none, the row neither asks nor votes.

    Returns:
        A share of the probes, or None where fewer than two rows have a label.
    """
    known = np.flatnonzero(labels >= 0)
    if len(known) < 2:
        return None
    own, names = snippets[known], labels[known]
    probes, k = probes_of(len(own)), min(NEIGHBOURS, len(own) - 1)
    votes = names[neighbours(own, probes, k)]
    won = np.array([np.bincount(row).argmax() for row in votes])
    return float((won == names[probes]).mean())


def labels_of(concepts: Sequence[NDArray[np.int64]], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each row the first concept that it belongs to, -1 where there is none.

    Args:
        concepts: rows of each.
        rows: (m,) ascending.
    """
    labels = np.full(len(rows), -1, np.int64)
    for number in range(len(concepts) - 1, -1, -1):
        labels[np.isin(rows, concepts[number])] = number
    return labels
