"""Count, mean and scatter matrix of snippets: what decides their principal directions, added up from any number of parts.

Shapes: n rows of a part, b rows of a chunk, D dimensions, R rank.
"""

from __future__ import annotations

import hashlib
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
"""Energy, as a share of the largest direction's, below which a direction of float64 sums holds rounding only."""
ROUNDING32 = float(np.finfo(np.float32).eps)
"""Of a chunk's float32 products, as a share of their Frobenius norm: what they leave undecided of any direction, and more."""
BLOCK_ROWS = 32
MOST_BETWEEN = 16.0
"""Energy between the means of a chunk's blocks, as a multiple of that within, up to which products may be float32's."""
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
    rounding: float = 0.0
    """Energy of a direction that may be rounding of float32 products alone; 0: they were float64. Chunks round independently."""

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
        return Moments(
            count=count, mean=self.mean + apart * (other.count / count), scatter=scatter,
            rounding=float(np.hypot(self.rounding, other.rounding)),
        )  # fmt: skip


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
    """What one chunk adds: its moments about a point near its own mean."""

    count: int
    near: NDArray[np.float32]
    """(D,) the point."""
    off: NDArray[np.float64]
    """(D,) mean of the rows less that point."""
    gram: NDArray[np.floating]
    """(D, D) Σ (s - near)(s - near)ᵀ; float32 where its products were."""
    rounding: float
    """As in `Moments`."""


def sum_chunk(rows: NDArray[np.float32], *, wide: bool) -> ChunkSums:
    """Return the sums of (b, D) rows, b at least 1; the rows are overwritten.

    Each chunk is shifted by its own mean: in a bank sorted by class another chunk's would leave the distance of two classes in
    every product, and float32 would lose the small directions beside it.

    Args:
        rows: (b, D) float32.
        wide: take products in float64. Else in float32, unless the squares are none that it can hold, or the chunk has classes
            that are far apart.
    """
    ones = np.ones(len(rows), np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # a row that is not finite is named by who asked
        near = ones @ rows / np.float32(len(rows))
        near = np.where(np.isfinite(near), near, np.float32(0))
        if not wide:
            shifted = np.subtract(rows, near, out=rows)
            gram = shifted.T @ shifted if not _far_apart(shifted) else np.zeros((1, 1), np.float32)
            most, norm = float(np.diagonal(gram).max()), float(np.linalg.norm(gram))
            if SQUARABLE[0] < most / len(rows) < SQUARABLE[1]:
                off = shifted.mean(axis=0, dtype=np.float64)
                return ChunkSums(count=len(rows), near=near, off=off, gram=gram, rounding=ROUNDING32 * norm)
        exact = shifted.astype(np.float64) if not wide else rows.astype(np.float64) - near
        return ChunkSums(count=len(rows), near=near, off=exact.mean(axis=0), gram=exact.T @ exact, rounding=0.0)


def _far_apart(shifted: NDArray[np.float32]) -> bool:
    """Return whether (b, D) rows about their mean are of classes so far apart that float32 would drown what is within."""
    blocks = shifted[: len(shifted) // BLOCK_ROWS * BLOCK_ROWS].reshape(-1, BLOCK_ROWS, shifted.shape[1])
    means = np.ones(BLOCK_ROWS, np.float32) @ blocks / np.float32(BLOCK_ROWS)
    between, total = BLOCK_ROWS * float(np.vdot(means, means)), float(np.vdot(shifted, shifted))
    return between > MOST_BETWEEN * (total - between)


class RunningSums:
    """Moments of chunks in float64, merged in the order they are given.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self.scatter = np.zeros((dim, dim))
        self.rounding = 0.0

    def add(self, chunk: ChunkSums) -> None:
        """Add a chunk, as `Moments.merged` does, in place: one product of two columns a chunk."""
        count, apart = self.count + chunk.count, chunk.near + chunk.off - self.mean
        columns = np.stack([apart, chunk.off], axis=1)
        self.scatter += chunk.gram
        self.scatter += columns * [self.count * chunk.count / count, -chunk.count] @ columns.T
        self.mean += apart * (chunk.count / count)
        self.count, self.rounding = count, float(np.hypot(self.rounding, chunk.rounding))

    def moments(self) -> Moments:
        """Return the moments of all rows so far."""
        return Moments(count=self.count, mean=self.mean, scatter=self.scatter, rounding=self.rounding)


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

    def load(self, dim: int) -> tuple[RunningSums, int, str] | None:
        """Return sums, the number of chunks in them and the digest of what was read; None: none that are whole and of this plan.

        Args:
            dim: D.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.folder / "sums.safetensors", framework="numpy") as stored:
                facts, sums = stored.metadata(), RunningSums(dim)
                mean, scatter = stored.get_tensor("mean"), stored.get_tensor("scatter")
            own = {name: facts[name] for name in ("plan", "count", "chunks", "read", "rounding")}
            if own["plan"] != self._plan or facts["sha256"] != _digest(own, mean, scatter):
                return None
            if (mean.shape, scatter.shape) != ((dim,), (dim, dim)) or {mean.dtype, scatter.dtype} != {np.dtype("f8")}:
                return None
            sums.count, sums.mean, sums.scatter = int(own["count"]), mean, scatter
            sums.rounding = float(own["rounding"])
            return sums, int(own["chunks"]), own["read"]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def save(self, sums: RunningSums, num_chunks: int, read: str, *, final: bool = False) -> None:
        """Keep sums, atomically, where the last ones are SAVE_SECONDS old or these are the final ones.

        Args:
            sums: so far.
            num_chunks: in them.
            read: digest of what was read of the last chunk's segment, to its end.
            final: keep them in any case.
        """
        from safetensors.numpy import save

        if not final and time.monotonic() - self._saved < SAVE_SECONDS:
            return
        facts = {
            "plan": self._plan, "count": str(sums.count), "chunks": str(num_chunks), "read": read,
            "rounding": repr(sums.rounding),
        }  # fmt: skip
        facts["sha256"] = _digest(facts, sums.mean, sums.scatter)
        data = save({"mean": sums.mean, "scatter": sums.scatter}, metadata=facts)
        atomic.write_bytes(self.folder / "sums.safetensors", data)
        self._saved = time.monotonic()


def _digest(facts: dict[str, str], *arrays: NDArray[np.float64]) -> str:
    digest = hashlib.sha256(canonical_json(facts).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).view(np.uint8).data.cast("B"))
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Directions:
    """Principal directions, largest energy first."""

    basis: NDArray[np.float64]
    """(R, D) orthonormal rows, the largest entry of each positive."""
    energies: NDArray[np.float64]
    """(R,) squared singular values."""


def floor_of(moments: Moments, largest: float) -> float:
    """Return the energy up to which a direction may hold rounding only, given that of the largest direction."""
    return max(max(largest, 0.0) * NOTHING, moments.rounding)


def principal(moments: Moments, most: int | None = None) -> Directions:
    """Return the eigenvectors of the scatter matrix of largest energy, those within rounding left out; at least one.

    Args:
        moments: of all rows.
        most: directions at most; None: all.
    """
    from scipy.linalg import eigh

    dim = len(moments.mean)
    first = 0 if most is None else max(dim - most, 0)
    energies, vectors = eigh(moments.scatter, subset_by_index=(first, dim - 1), driver="evr")
    energies, vectors = energies[::-1], vectors[:, ::-1]
    kept = max(int((energies > floor_of(moments, energies[0])).sum()), 1)
    return Directions(basis=factors.signed(vectors[:, :kept].T), energies=np.maximum(energies[:kept], 0.0))


def spectrum_of(moments: Moments) -> NDArray[np.float64]:
    """Return the (D,) eigenvalues of the scatter matrix, descending; 0 where one is within rounding."""
    from scipy.linalg import eigvalsh

    energies = np.asarray(eigvalsh(moments.scatter), np.float64)[::-1]
    return np.where(energies > floor_of(moments, energies[0]), energies, 0.0)
