"""Nearest rows by FAISS: exact search over the bank's active rows, streamed so that memory does not grow with the bank.

Shapes: B queries, n active rows, D dimensions, k neighbours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import ConfigError, EncoderMismatchError, MissingDependencyError
from gmem_bank.space import to_space

if TYPE_CHECKING:
    from gmem_bank.bank import MemoryBank

BLOCK_BYTES = 64 << 20


def require_faiss() -> Any:
    """Return the faiss module; raises MissingDependencyError that names the extra."""
    try:
        import faiss
    except ImportError as error:
        raise MissingDependencyError(
            "searching needs FAISS: pip install faiss-cpu (the extra gmem[cpu]), or on a GPU faiss-gpu (gmem[gpu])",
            extra="cpu",
        ) from error
    return faiss


def search_flat(
    bank: MemoryBank, queries: NDArray[np.float32], k: int, among: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the k active rows of highest cosine to each query, by comparing with every row.

    Args:
        bank: where to look.
        queries: (B, D) float32, of any length but zero.
        k: neighbours wanted; at most n.
        among: (n,) active rows to compare with, ascending; None: all of them.

    Returns:
        (B, k) float32 cosines, descending, and (B, k) int64 rows.

    Raises:
        MissingDependencyError: FAISS is not installed.
        EncoderMismatchError: the queries have another dimension.
        ConfigError: k is out of range.
    """
    faiss = require_faiss()
    rows = bank.rows() if among is None else among
    if queries.ndim != 2 or queries.shape[1] != bank.dim:
        raise EncoderMismatchError(
            f"queries of shape {list(queries.shape)} for a bank of dimension {bank.dim}", path=bank.path
        )
    if not 1 <= k <= len(rows):
        raise ConfigError(f"k must be 1 to {len(rows)}, the active rows of {bank.path}; got {k}", key="k")
    if not np.isfinite(queries).all():
        raise ConfigError("a query is not finite", key="queries")
    unit_queries = to_space(np.ascontiguousarray(queries, np.float32), "unit")
    best = np.full((len(queries), k), -np.inf, np.float32)
    found = np.full((len(queries), k), -1, np.int64)
    block = max(k, BLOCK_BYTES // (4 * bank.dim))
    for start, vectors in bank.snippet_blocks(rows, block):
        chunk = rows[start : start + block]
        unit = vectors if bank.space == "unit" else to_space(vectors, "unit")
        scores, places = faiss.knn(unit_queries, unit, min(k, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT)
        best, found = _merge(best, found, scores, chunk[places], k)
    return best, found


def _merge(
    best: NDArray[np.float32], found: NDArray[np.int64], scores: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    all_scores, all_rows = np.hstack([best, scores]), np.hstack([found, rows])
    order = np.argsort(-all_scores, axis=1, kind="stable")[:, :k]  # stable: of equal scores the lower row comes first
    return np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_rows, order, 1)
