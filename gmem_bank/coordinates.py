"""Rows and queries as unit vectors whose inner products are cosines, for factored banks without reconstructing a snippet.

Cosines between queries and reconstructions s = c·B + μ need only the span of the basis and the mean, of R + 1 dimensions. With
orthonormal axes Q of that span and [B; μ] = L·Q, ⟨q, s⟩ = ⟨Q·q, [c, 1]·L⟩: for orthonormal B that is ⟨Bq, c⟩ + ⟨q, μ⟩, turned
so that 1/‖s‖ needs no number of its own, and any index of unit vectors takes it. Dense banks are their own coordinates.

Shapes: N rows, B queries or rows asked for, D dimensions, R rank, E coordinates (D, or R + 1 where that is less).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import ConfigError, EncoderMismatchError
from gmem_bank.interface import SupportsFactors
from gmem_bank.space import TINY_NORM, scale_to_unit, to_space

if TYPE_CHECKING:
    from gmem_bank.bank import MemoryBank

BLOCK_BYTES = 64 << 20
PLAIN = (1e-20, 1e30)
"""Squared lengths of queries that float32 holds, and that are no shorter than TINY_NORM."""


class Coordinates:
    """How the rows of a bank, and queries to it, become unit vectors of E dimensions.

    Args:
        bank: any open bank.
    """

    def __init__(self, bank: MemoryBank) -> None:
        self.bank = bank
        self.axes: NDArray[np.float32] | None = None
        """(E, D) orthonormal rows that queries are projected on; None: the identity."""
        self.dim = bank.dim
        """E."""
        self._is_unit = bank.is_unit_as_stored
        self._factored = bank if isinstance(bank, SupportsFactors) else None
        if isinstance(bank, SupportsFactors):
            self.axes, self._load, self._shift = frame_of(bank.basis, bank.mean)
            self.dim = len(self.axes)

    def queries(self, queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (B, E) coordinates of (B, D) queries, which count by direction alone; a query of zeros stays zero."""
        return self.of_unit(to_space(np.ascontiguousarray(queries, np.float32), "unit"))

    def of_unit(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (B, E) coordinates of (B, D) queries of length 1."""
        return unit if self.axes is None else unit @ self.axes.T

    def values(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what coordinates are made of: (B, D) snippets, or the (B, R) coefficients of a factored bank."""
        return self.bank.snippets(rows) if self._factored is None else self._factored.coefficients(rows)

    def of_values(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (B, E) unit coordinates of rows from their values; a row without a direction stays zero."""
        if self.axes is None:
            return values if self.bank.space == "unit" else to_space(values, "unit")
        turned = values @ self._load
        turned += self._shift
        return scale_to_unit(turned)

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the (B, E) unit coordinates of rows, any order, repetitions allowed."""
        return self.of_values(self.values(rows))

    def cosines(self, rows: NDArray[np.int64], queries: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the (B, c) cosines of queries to their own rows, of dense banks without writing a normalised row.

        Args:
            rows: (B, c).
            queries: (B, E) coordinates of queries of length 1.
        """
        if self.axes is not None:
            return _products(self.of(rows.reshape(-1)), rows, queries)
        vectors = self.bank.directions(rows.reshape(-1))
        if self._is_unit:
            return _products(vectors, rows, queries)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.sqrt(np.vecdot(vectors, vectors))
        if not norms.max(initial=0.0) < np.inf:  # values whose squares f32 does not hold
            return _products(scale_to_unit(vectors), rows, queries)
        products = _products(vectors, rows, queries)
        products /= np.maximum(norms, np.float32(TINY_NORM)).reshape(rows.shape)
        return products

    def blocks(
        self, rows: NDArray[np.int64], least: int = 1
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]]:
        """Yield (rows, values, coordinates) of some rows at a time, `least` or more, in bounded memory."""
        for chunk in self.row_chunks(rows, least):
            values = self.values(chunk)
            yield chunk, values, self.of_values(values)

    def row_chunks(self, rows: NDArray[np.int64], least: int = 1) -> Iterator[NDArray[np.int64]]:
        """Yield rows, as many at a time as 64 MiB of coordinates; what was mapped for one chunk is let go before the next."""
        step = max(least, BLOCK_BYTES // (4 * self.dim))
        for start in range(0, len(rows), step):
            yield rows[start : start + step]
            self.bank.stored.release()


def _products(
    vectors: NDArray[np.float32], rows: NDArray[np.int64], queries: NDArray[np.float32]
) -> NDArray[np.float32]:
    products: NDArray[np.float32] = np.matmul(vectors.reshape(*rows.shape, -1), queries[:, :, None])[:, :, 0]
    return products


def frame_of(
    basis: NDArray[np.float32], mean: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """Return orthonormal axes of the span of basis and mean, and what takes coefficients there: c·load + shift.

    Args:
        basis: (R, D) float32.
        mean: (D,) float32.

    Returns:
        (E, D) axes, (R, E) load and (E,) shift, float32, by a QR decomposition in float64.
    """
    spanning = np.vstack([basis, mean]).astype(np.float64)
    axes, load = np.linalg.qr(spanning.T)
    parts = (axes.T, load.T[:-1], load.T[-1])
    return tuple(np.ascontiguousarray(part, np.float32) for part in parts)  # type: ignore[return-value]


def require_active(bank: MemoryBank, num_rows: int) -> None:
    """Raise ConfigError where a bank has no active rows."""
    if not num_rows:
        raise ConfigError(
            f"every row of {bank.path} is masked, so there is none to find: 'gmem-bank unmask' lifts a mask", key="k"
        )


def require_queries(bank: MemoryBank, queries: NDArray[np.float32], k: int, num_rows: int) -> None:
    """Raise where queries cannot be asked.

    Args:
        bank: who is asked.
        queries: (B, D) float32.
        k: neighbours wanted.
        num_rows: rows to choose from.

    Raises:
        EncoderMismatchError: another dimension.
        ConfigError: k is out of range, no row is active, or a query is not finite.
    """
    if queries.ndim != 2 or queries.shape[1] != bank.dim:
        raise EncoderMismatchError(
            f"queries of shape {list(queries.shape)} for a bank of dimension {bank.dim}", path=bank.path
        )
    require_active(bank, num_rows)
    if not 1 <= k <= num_rows:
        raise ConfigError(f"k must be 1 to {num_rows}, the active rows of {bank.path}; got {k}", key="k")
    with np.errstate(over="ignore", invalid="ignore"):
        squares = np.vecdot(queries, queries)
    if squares.min(initial=PLAIN[1]) >= PLAIN[0] and squares.max(initial=PLAIN[0]) <= PLAIN[1]:
        return  # finite, and long enough: no query has to be looked at number by number
    bad = np.flatnonzero(~np.isfinite(queries).all(axis=1))
    if len(bad):
        raise ConfigError(f"a query is not finite: number {bad[0]} of {len(queries)}", key="queries")
    short = np.linalg.norm(queries.astype(np.float64), axis=1) < TINY_NORM
    if (short & queries.any(axis=1)).any():
        number = int(np.flatnonzero(short & queries.any(axis=1))[0])
        raise ConfigError(
            f"query number {number} of {len(queries)} is shorter than {TINY_NORM}: it has no direction in float32; scale it up",
            key="queries",
        )
