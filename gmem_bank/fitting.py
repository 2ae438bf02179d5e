"""The second pass of a fit: the coefficients of a draft's rows on a basis, and what it leaves of them, in bounded memory.

Shapes: N rows, n rows of a segment, b rows of a chunk, D dimensions, R rank.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError
from gmem_bank.progress import Progress, no_progress
from gmem_bank.segment_rows import SUMMED_ROWS, Chunk, Plan, SegmentRows
from gmem_bank.storage import atomic
from gmem_bank.threads import in_order

PROJECT_ROWS = SUMMED_ROWS
"""Of a chunk of the second pass at most: it goes over its rows several times, and should stay in the cache."""
TELLING = 0.01
"""Share of a squared norm from which on a difference of two float32 sums says enough."""


@dataclass(kw_only=True)
class Fitted:
    """Coefficients of all rows on a basis, in a file beside the bank, and what was measured on the way."""

    basis: NDArray[np.float32]
    """(R, D)."""
    mean: NDArray[np.float32]
    """(D,)."""
    counts: list[int]
    """Rows of each segment."""
    largest: NDArray[np.float32]
    """(segments, R): largest absolute coefficient."""
    squares: NDArray[np.float64]
    """(N,) ‖s‖² of each snippet s."""
    dots: NDArray[np.float64]
    """(N,) s · mean."""
    residuals: NDArray[np.float64]
    """(N,) ‖s - c·B - mean‖², before the coefficients are stored in any type."""
    column_energy: NDArray[np.float64]
    """(R,) Σ c² over all rows."""
    energy: float = 0.0
    """Σ ‖s - mean‖² over all rows: what shares of energy and relative errors are of."""
    sample: NDArray[np.float32]
    """(m, D): the snippets that were asked for."""
    file: Path

    def coefficients(self, segment: int, size: int) -> Iterator[NDArray[np.float32]]:
        """Yield the (b, R) float32 coefficients of a segment in order, `size` rows at a time."""
        rank, first = len(self.basis), sum(self.counts[:segment])
        with self.file.open("rb") as stream:
            stream.seek(4 * rank * first)
            for start in range(0, self.counts[segment], size):
                rows = min(size, self.counts[segment] - start)
                block = np.fromfile(stream, np.float32, rows * rank)
                if len(block) < rows * rank:
                    raise CorruptError(f"{self.file} was cut short while it was read: run the same command again")
                yield block.reshape(rows, rank)


def project_rows(
    rows: Sequence[SegmentRows],
    basis: NDArray[np.float64],
    mean: NDArray[np.float64],
    plan: Plan,
    file: Path,
    *,
    sample: NDArray[np.int64] | None = None,
    progress: Progress = no_progress,
) -> Fitted:
    """Project all rows onto a basis; every stored entry that is read is checked against its hash.

    Args:
        rows: of a draft's segments.
        basis: (R, D) orthonormal rows; rounded to float32, as they are stored.
        mean: (D,); rounded likewise.
        plan: how much to hold at a time.
        file: where the coefficients go, (N, R) float32.
        sample: (m,) rows, ascending, whose snippets to keep.
        progress: told rows done and rows in all.

    Raises:
        CorruptError: an entry is damaged, or a row is not finite.
        WriteError: there is no room for the coefficients.
    """
    narrow, centre = basis.astype(np.float32), mean.astype(np.float32)
    num_rows, rank, wanted = rows[-1].first + rows[-1].num_rows, len(basis), np.zeros(0, np.int64)
    wanted = wanted if sample is None else sample
    fitted = Fitted(
        basis=narrow, mean=centre, counts=[segment.num_rows for segment in rows], file=file,
        largest=np.zeros((len(rows), rank), np.float32), squares=np.zeros(num_rows), dots=np.zeros(num_rows),
        residuals=np.zeros(num_rows), column_energy=np.zeros(rank),
        sample=np.empty((len(wanted), rows[0].dim), np.float32),
    )  # fmt: skip

    def work(chunk: Chunk) -> tuple[Chunk, NDArray[np.float32], float]:
        return chunk, *_project_chunk(fitted, rows[chunk.segment], chunk, wanted)

    chunks = (chunk for segment in rows for chunk in segment.chunks(min(plan.chunk_rows, PROJECT_ROWS), check=True))
    done = 0
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with (
            file.open("wb", buffering=0) as stream,
            contextlib.closing(in_order(plan.num_workers, work, chunks)) as parts,
        ):
            _reserve(stream.fileno(), 4 * rank * num_rows)
            for chunk, coefficients, energy in parts:
                _write_all(stream, coefficients)
                largest = np.abs(coefficients).max(axis=0)
                np.maximum(fitted.largest[chunk.segment], largest, out=fitted.largest[chunk.segment])
                fitted.column_energy += np.square(coefficients, dtype=np.float64).sum(axis=0)
                fitted.energy += energy
                done += len(coefficients)
                progress(done, num_rows)
    except OSError as error:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)
        raise atomic.explain(error, file, 4 * rank * num_rows) from error
    return fitted


def _reserve(descriptor: int, size: int) -> None:
    """Take the room for a file at once, so that a disk that is too full says so before the work; raises OSError."""
    if hasattr(os, "posix_fallocate") and size:
        os.posix_fallocate(descriptor, 0, size)


def _write_all(stream: RawIOBase, values: NDArray[np.float32]) -> None:
    left = np.ascontiguousarray(values).view(np.uint8).data.cast("B")
    while left:
        left = left[stream.write(left) or 0 :]


@dataclass(frozen=True, kw_only=True)
class Projected:
    """One chunk on a basis."""

    coefficients: NDArray[np.float32]
    """(b, R)."""
    squares: NDArray[np.float32]
    """(b,) ‖s‖²."""
    dots: NDArray[np.float32]
    """(b,) s · mean."""
    centred: NDArray[np.float32]
    """(b, D) s - mean."""
    sample: NDArray[np.float32]
    """The snippets asked for."""


def project_block(
    segment: SegmentRows,
    chunk: Chunk,
    basis: NDArray[np.float32],
    mean: NDArray[np.float32],
    sample: NDArray[np.int64] | None = None,
) -> Projected:
    """Return the coefficients of a chunk, whose values are overwritten.

    Args:
        segment: that it is of.
        chunk: b rows.
        basis: (R, D) float32.
        mean: (D,) float32.
        sample: places in the chunk of the snippets to keep.

    Raises:
        CorruptError: a row is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        snippets = segment.snippets(chunk.values)
        squares, dots = np.vecdot(snippets, snippets), snippets @ mean
        kept = snippets[np.zeros(0, np.int64) if sample is None else sample]
        centred = np.subtract(snippets, mean, out=snippets)
        coefficients = centred @ basis.T
    if not (np.isfinite(coefficients).all() and np.isfinite(squares).all()):
        segment.require_finite(chunk, centred)
        raise CorruptError(f"{segment.path}: rows from {chunk.first} on have values whose squares float32 cannot hold")
    return Projected(coefficients=coefficients, squares=squares, dots=dots, centred=centred, sample=kept)


def _project_chunk(
    fitted: Fitted, segment: SegmentRows, chunk: Chunk, wanted: NDArray[np.int64]
) -> tuple[NDArray[np.float32], float]:
    """Return the (b, R) coefficients of a chunk and its energy; note what is measured of its rows, in places of their own."""
    own = slice(chunk.first, chunk.first + len(chunk.values))
    low, high = np.searchsorted(wanted, [own.start, own.stop])
    found = project_block(segment, chunk, fitted.basis, fitted.mean, wanted[low:high] - chunk.first)
    fitted.squares[own], fitted.dots[own], fitted.sample[low:high] = found.squares, found.dots, found.sample
    norms = np.vecdot(found.centred, found.centred)
    fitted.residuals[own] = _residuals(found, fitted.basis, norms)
    return found.coefficients, float(norms.sum(dtype=np.float64))


def _residuals(found: Projected, basis: NDArray[np.float32], norms: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the (b,) squared norms of what the basis leaves of (b,) norms: by Pythagoras, but where that would be rounding."""
    left = norms - np.vecdot(found.coefficients, found.coefficients)
    if (left < TELLING * norms).any():
        rest = np.subtract(found.centred, found.coefficients @ basis, out=found.centred)
        left = np.vecdot(rest, rest)
    return np.asarray(left)
