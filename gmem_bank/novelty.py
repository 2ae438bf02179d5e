"""How new rows stand to a bank: their distance to it beside the bank's own neighbour distances, and near-duplicates.

Shapes: n new rows, B probes, D dimensions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.errors import MissingDependencyError
from gmem_bank.index import require_faiss, search_flat

SAMPLE_ROWS = 50_000
"""Up to this many active rows a bank is compared with whole; of a larger one, this many are drawn."""
NUM_PROBES = 2_000
"""Rows whose own nearest neighbours are looked up."""
NEAR_DUPLICATE = 0.98
"""Cosine from which a new row is called a near-duplicate."""
SHOWN = 20


def compare_with_bank(
    bank: MemoryBank, snippets: NDArray[np.float32], keys: list[str], *, seed: int = 0
) -> dict[str, Any]:
    """Return how near new snippets are to a bank's rows.

    Args:
        bank: before they are inserted.
        snippets: (n, D) float32, in the bank's space.
        keys: n keys.
        seed: draws the sample of a bank with more than 50,000 active rows, and the probes.

    Returns:
        {"rows_compared", "sampled", "new": quantiles of the cosine of each new row to its nearest in the bank, "bank": the
        same between rows of the bank, "num_near_duplicates", "near_duplicates": up to 20 of {"key", "nearest", "cosine"}}.

    Raises:
        MissingDependencyError: FAISS is not installed.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    rows = bank.rows()
    sampled = len(rows) > SAMPLE_ROWS
    if sampled:
        rows = np.sort(rng.choice(rows, SAMPLE_ROWS, replace=False))
    scores, found = search_flat(bank, snippets, 1, rows)
    nearest, places = scores[:, 0], found[:, 0]
    near = np.flatnonzero(nearest >= NEAR_DUPLICATE)
    shown = near[np.argsort(-nearest[near], kind="stable")][:SHOWN]
    names = bank.keys(places[shown])
    return {
        "rows_compared": len(rows),
        "sampled": sampled,
        "new": _quantiles(nearest),
        "bank": _own_neighbours(bank, rows, rng),
        "num_near_duplicates": len(near),
        "near_duplicates": [
            {"key": keys[i], "nearest": name, "cosine": round(float(nearest[i]), 6)}
            for i, name in zip(shown.tolist(), names, strict=True)
        ],
    }


def _own_neighbours(bank: MemoryBank, rows: NDArray[np.int64], rng: np.random.Generator) -> dict[str, float] | None:
    """Return quantiles of the cosine between rows of the bank and their nearest other row; None for a single row."""
    if len(rows) < 2:
        return None
    probes = rows if len(rows) <= NUM_PROBES else np.sort(rng.choice(rows, NUM_PROBES, replace=False))
    scores, found = search_flat(bank, bank.snippets(probes), 2, rows)
    itself_first = found[:, 0] == probes  # rows that are equal may come in either order
    return _quantiles(np.where(itself_first, scores[:, 1], scores[:, 0]))


def _quantiles(cosines: NDArray[np.float32]) -> dict[str, float]:
    places = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(float(np.quantile(cosines, q)), 6) for name, q in places.items()}


def wants_report(bank: MemoryBank, report: bool | None) -> bool:
    """Say whether to compare new rows with a bank: as asked, or by itself where it is small and FAISS is installed."""
    if report is not None:
        return report and len(bank.rows()) > 0
    if not 0 < len(bank.rows()) <= SAMPLE_ROWS:
        return False
    try:
        require_faiss()
    except MissingDependencyError:
        return False
    return True
