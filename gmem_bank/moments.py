"""Count, mean and scatter matrix of snippets: what decides their principal directions, added up from any number of parts.

Shapes: n rows of a part, b rows of a chunk, D dimensions, R rank.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors
from gmem_bank.provenance import canonical_json
from gmem_bank.storage import atomic

SAVE_SECONDS = 2.0
"""Between two states of a pass that a kill leaves behind."""
NOTHING = 1e-13
"""Energy, as a share of the largest direction's, below which a direction holds rounding only."""
SQUARABLE = (1e-28, 1e28)
"""Largest mean square of a chunk's columns between which squares and their sums are float32's to hold."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """The first two moments of some rows; those of parts add up to those of the whole, to float64 rounding."""

    count: int
    mean: NDArray[np.float64]
    """(D,)."""
    scatter: NDArray[np.float64]
    """(D, D): Σ (s - mean)(s - mean)ᵀ."""

    @property
    def energy(self) -> float:
        """Squared norm of the centred rows, Σ ‖s - mean‖²."""
        return float(np.trace(self.scatter))

    def merged(self, other: Moments) -> Moments:
        """Return the moments of the rows of both (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        if not self.count or not other.count:
            return self if self.count else other
        count, apart = self.count + other.count, other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count=count, mean=self.mean + apart * (other.count / count), scatter=scatter)


def no_rows(dim: int) -> Moments:
    """Return the moments of no rows."""
    return Moments(count=0, mean=np.zeros(dim), scatter=np.zeros((dim, dim)))


def from_coefficients(
    count: int, total: NDArray[np.float64], gram: NDArray[np.float64], basis: NDArray[np.float32], mean: NDArray[np.float32]
) -> Moments:  # fmt: skip
    """Return the moments of reconstructions c·B + μ from those of their coefficients.

    Args:
        count: n.
        total: (R,) Σ c.
        gram: (R, R) Σ cᵀc.
        basis: (R, D) float32.
        mean: (D,) float32.
    """
    if not count:
        return no_rows(basis.shape[1])
    wide, centre = basis.astype(np.float64), total / count
    scatter = wide.T @ (gram - count * np.outer(centre, centre)) @ wide
    return Moments(count=count, mean=centre @ wide + mean, scatter=(scatter + scatter.T) / 2)


@dataclass(frozen=True, kw_only=True)
class ChunkSums:
    """What one chunk adds."""

    count: int
    total: NDArray[np.float64]
    """(D,) Σ (s - shift)."""
    gram: NDArray[np.floating]
    """(D, D) Σ (s - shift)(s - shift)ᵀ; float32 where its products were."""


def sum_chunk(rows: NDArray[np.float32], shift: NDArray[np.float32], *, wide: bool) -> ChunkSums:
    """Return the sums of (b, D) rows, which are overwritten.

    Args:
        rows: (b, D) float32.
        shift: (D,) float32 near the mean: without it a large mean would drown the small directions in float32.
        wide: take products in float64. Else in float32, unless the squares are none that it can hold.
    """
    if not len(rows):
        return ChunkSums(count=0, total=np.zeros(rows.shape[1]), gram=np.zeros((rows.shape[1],) * 2))
    with np.errstate(over="ignore", invalid="ignore"):  # a row that is not finite is named by who asked
        if not wide:
            shifted = np.subtract(rows, shift, out=rows)
            gram = shifted.T @ shifted
            if SQUARABLE[0] < float(np.diagonal(gram).max()) / len(rows) < SQUARABLE[1]:
                total = np.ones(len(rows), np.float32) @ shifted
                return ChunkSums(count=len(rows), total=total.astype(np.float64), gram=gram)
        exact = shifted.astype(np.float64) if not wide else rows.astype(np.float64) - shift
        return ChunkSums(count=len(rows), total=exact.sum(axis=0), gram=exact.T @ exact)


class RunningSums:
    """Sums of chunks in float64, in the order they are given.

    Args:
        shift: (D,) float32, taken from every row.
    """

    def __init__(self, shift: NDArray[np.float32]) -> None:
        self.shift = shift
        self.count = 0
        self.total = np.zeros(len(shift))
        self.gram = np.zeros((len(shift), len(shift)))

    def add(self, chunk: ChunkSums) -> None:
        """Add a chunk."""
        self.count += chunk.count
        self.total += chunk.total
        self.gram += chunk.gram

    def moments(self) -> Moments:
        """Return the moments of all rows so far."""
        if not self.count:
            return no_rows(len(self.shift))
        centre = self.total / self.count
        scatter = self.gram - self.count * np.outer(centre, centre)
        return Moments(count=self.count, mean=self.shift + centre, scatter=scatter)


class SumStore:
    """The sums of an unfinished pass, in a hidden folder beside the bank; another plan's are not taken up.

    Args:
        folder: where; made on first use.
        plan: everything that decides the sums.
    """

    def __init__(self, folder: Path, plan: dict[str, object]) -> None:
        self.folder = folder
        self._plan = canonical_json(plan)
        self._saved = time.monotonic()

    def load(self) -> tuple[RunningSums, int] | None:
        """Return sums and the number of chunks in them, or None where there are none of this plan."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / "sums.safetensors", framework="numpy") as stored:
                facts = stored.metadata()
                if facts["plan"] != self._plan:
                    return None
                sums = RunningSums(stored.get_tensor("shift"))
                sums.count, sums.total, sums.gram = (
                    int(facts["count"]), stored.get_tensor("total"), stored.get_tensor("gram"),
                )  # fmt: skip
                return sums, int(facts["chunks"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, sums: RunningSums, num_chunks: int, *, final: bool = False) -> None:
        """Keep sums, atomically, where the last ones are SAVE_SECONDS old or these are the final ones."""
        from safetensors.numpy import save

        if not final and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        facts = {"plan": self._plan, "count": str(sums.count), "chunks": str(num_chunks)}
        data = save({"shift": sums.shift, "total": sums.total, "gram": sums.gram}, metadata=facts)
        atomic.write_bytes(self.folder / "sums.safetensors", data)
        self._saved = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Principal directions, largest energy first."""

    basis: NDArray[np.float64]
    """(R, D) orthonormal rows, the largest entry of each positive."""
    energies: NDArray[np.float64]
    """(R,) squared singular values."""


def principal(moments: Moments, most: int | None = None) -> Directions:
    """Return the eigenvectors of the scatter matrix of largest energy, those without energy left out; at least one.

    Args:
        moments: of all rows.
        most: directions at most; None: all.
    """
    from scipy.linalg import eigh

    dim = len(moments.mean)
    first = 0 if most is None else max(dim - most, 0)
    energies, vectors = eigh(moments.scatter, subset_by_index=(first, dim - 1), driver="evr")
    energies, vectors = energies[::-1], vectors[:, ::-1]
    kept = max(int((energies > max(energies[0], 0.0) * NOTHING).sum()), 1)
    return Directions(basis=factors.signed(vectors[:, :kept].T), energies=np.maximum(energies[:kept], 0.0))


def spectrum_of(moments: Moments) -> NDArray[np.float64]:
    """Return all (D,) eigenvalues of the scatter matrix, descending, none below zero."""
    from scipy.linalg import eigvalsh

    return np.maximum(np.asarray(eigvalsh(moments.scatter), np.float64)[::-1], 0.0)
