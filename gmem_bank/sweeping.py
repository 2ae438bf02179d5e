"""What each way to compress a bank would keep, and how large the bank would be: a table to choose from.

Shapes: m rows of a sample, D dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors
from gmem_bank.bank import MemoryBank
from gmem_bank.compression import job_of, moments_of, require_directions, size_of
from gmem_bank.editing import editing
from gmem_bank.errors import ConfigError
from gmem_bank.kinds import FactoredBank
from gmem_bank.moments import Moments, principal, spectrum_of
from gmem_bank.ops import PathLike
from gmem_bank.plotting import draw_spectrum, require_drawable
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json
from gmem_bank.quality import knn_accuracy, labels_of, overlap, sample_rows, summary
from gmem_bank.scalars import require_whole, whole
from gmem_bank.segment_rows import PROBED_BYTES
from gmem_bank.storage.rules import COEFFICIENT_DTYPES
from gmem_bank.stored_fit import decode, encode
from gmem_bank.thinning import break_even, largest
from gmem_bank.threads import one_thread_a_product

SAMPLE_ROWS = 4096
MEASURED = 14
"""Copies of a row of the sample, in float32's bytes, that are held at a time at full rank: coefficients and their order,
snippets before and after, and both in float64."""
FEWEST = 8
"""Rank to begin with."""
FEWEST_KEPT = 4
COLUMNS = ("rank", "dtype", "keep", "bytes", "ratio", "energy", "mean", "p1", "min", "overlap", "knn")


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to compress."""

    rank: int
    dtype: str
    keep: int | None
    """Largest coefficients kept a row; None: all."""
    bytes: int
    """Of the whole bank."""
    larger_by_mask: bool
    """Whether the coefficient mask takes more room than all coefficients do; `mask` then refuses unless it is allowed."""
    energy: float
    cosine: dict[str, float]
    """mean, p1, p5, median and min."""
    neighbour_overlap_at_10: float | None
    knn_accuracy: float | None


@dataclass(frozen=True, kw_only=True)
class SweepReport:
    """The table."""

    bank: str
    num_rows: int
    dim: int
    rank: int
    """Of the bank as it is: R of a factored one, else D."""
    num_sampled: int
    """Active rows that all but bytes and energy are measured on."""
    bytes: int
    """Of the bank as it is."""
    knn_accuracy: float | None
    """How often most of the 10 nearest others have a row's concept, in the bank as it is; None: fewer than two concepts."""
    ways: list[Way] = field(default_factory=list)

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return asdict(self)

    def table(self) -> str:
        """Return the table as text."""
        first = (self.rank, "as it is", "all", self.bytes, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, self.knn_accuracy)
        lines = [first, *(self._line(way) for way in self.ways)]
        cells = [COLUMNS, *([_cell(value) for value in line] for line in lines)]
        widths = [max(len(row[place]) for row in cells) for place in range(len(COLUMNS))]
        rows = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
        note = f"{self.bank}: {self.num_rows:,} rows × {self.dim}; cosines, overlap@10 and 10-NN of {self.num_sampled:,} rows"
        marked = any(way.larger_by_mask for way in self.ways)
        last = ["* takes more room than all coefficients: 'mask' makes it only with --allow-larger"] if marked else []
        return "\n".join([note, *rows, *last])

    def _line(self, way: Way) -> tuple[object, ...]:
        cosine = [way.cosine[name] for name in ("mean", "p1", "min")]
        ratio = self.bytes / way.bytes
        figures = (way.bytes, ratio, way.energy, *cosine, way.neighbour_overlap_at_10, way.knn_accuracy)
        keep = "all" if way.keep is None else f"{way.keep} *" if way.larger_by_mask else way.keep
        return (way.rank, way.dtype, keep, *figures)


def _larger(rank: int, dtype: str, keep: int | None) -> bool:
    return keep is not None and keep > break_even(rank, {"f32": 4, "f16": 2, "i8": 1}[dtype])


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def sweep(
    bank_path: PathLike,
    *,
    ranks: Sequence[int] | None = None,
    dtypes: Sequence[str] = tuple(COEFFICIENT_DTYPES),
    memory_limit: int | None = None,
    seed: int = 0,
    plot: PathLike | None = None,
    progress: Progress = no_progress,
) -> SweepReport:
    """Return what ranks, types and coefficient masks (all, the larger half, the largest quarter) keep; no bank is written.

    Energy is that of all rows; what is measured on snippets is so on at most 4,096 active ones, whose largest coefficients also
    give the scales of i8.

    Args:
        bank_path: the bank, dense or factored.
        ranks: to try, each 1 to D; None: powers of two from 8 on.
        dtypes: of "f32", "f16" and "i8".
        memory_limit: as in `compress`.
        seed: draws the sample.
        plot: .html or .png file for the spectrum.
        progress: told rows done, and twice the rows in all: the other half is measuring.

    Raises:
        ConfigError: a rank or type that cannot be, or every row is masked.
        CorruptError: a row is not finite.
    """
    if plot is not None:
        require_drawable(Path(plot))
    require_whole("seed", seed, 0)
    with editing(bank_path, "compress", {}, output=None, dry_run=True) as edit:
        bank = edit.bank
        wanted = (
            tuple(ranks) if ranks is not None else tuple(1 << power for power in range(3, 17) if 1 << power <= bank.dim)
        )
        wanted = tuple(whole(rank) or 0 for rank in wanted)
        if not all(1 <= rank <= bank.dim for rank in wanted) or not set(dtypes) <= set(COEFFICIENT_DTYPES):
            raise ConfigError(
                f"ranks must be 1 to {bank.dim} and dtypes of {', '.join(COEFFICIENT_DTYPES)}", key="ranks"
            )
        if not len(bank.rows()):
            raise ConfigError(f"every row of {bank.path} is masked: unmask some to measure on", path=bank.path)
        job = job_of(edit, [], memory_limit, progress)
        rows = sample_rows(bank.rows(), job.plan.most_rows(SAMPLE_ROWS, MEASURED * 4 * bank.dim + PROBED_BYTES), seed)
        found = moments_of(job)
        require_directions(found, bank)
        if plot is not None:
            draw_spectrum(bank, np.sqrt(spectrum_of(found)), plot)
        labels = labels_of([bank.all_rows_of(name) for name in bank.names], rows)
        sample = _Sample(
            snippets=_raw_snippets(bank, rows), labels=labels if len(bank.names) > 1 else np.full(len(rows), -1)
        )
        with one_thread_a_product():
            measured = list(_ways(found, wanted or (min(bank.dim, FEWEST),), dtypes, sample))
        ways = [replace(way, bytes=size_of(job, edit, way.rank, way.dtype, way.keep)) for way in measured]
        progress(2 * len(bank), 2 * len(bank))
    return SweepReport(
        bank=str(bank.path), num_rows=len(bank), dim=bank.dim,
        rank=bank.rank if isinstance(bank, FactoredBank) else bank.dim, num_sampled=len(rows), bytes=bank.stored.num_bytes,
        knn_accuracy=knn_accuracy(sample.snippets, sample.labels), ways=ways,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """What is measured on."""

    snippets: NDArray[np.float32]
    """(m, D)."""
    labels: NDArray[np.int64]
    """(m,): number of the concept, -1: none."""


def _ways(found: Moments, ranks: Sequence[int], dtypes: Sequence[str], sample: _Sample) -> Iterator[Way]:
    """Yield what each way keeps of a sample; bytes are still open."""
    energies = spectrum_of(found)
    total = energies.sum()
    shares = (
        np.minimum(np.cumsum(energies) / total, 1) if total > 0 else np.ones(len(energies))
    )  # equal rows: nothing is left out
    directions = principal(found, max(ranks))
    basis, mean = directions.basis.astype(np.float32), found.mean.astype(np.float32)
    for rank in dict.fromkeys(min(rank, len(basis)) for rank in ranks):
        exact: NDArray[np.float32] = np.asarray((sample.snippets - mean) @ basis[:rank].T, np.float32)
        scale = factors.scale_of(np.abs(exact).max(axis=0))
        for dtype in dtypes:
            read = decode(encode(exact, dtype, scale), dtype, scale)
            for keep in (None, *(rank // part for part in (2, 4) if rank // part >= FEWEST_KEPT)):
                kept = read if keep is None else np.where(largest(read, keep), read, np.float32(0))
                after = factors.reconstruct(kept, basis[:rank], mean)
                yield Way(
                    rank=rank, dtype=dtype, keep=keep, bytes=0, larger_by_mask=_larger(rank, dtype, keep),
                    energy=float(shares[rank - 1]),
                    cosine=summary(factors.cosines(sample.snippets, after)),
                    neighbour_overlap_at_10=overlap(sample.snippets, after), knn_accuracy=knn_accuracy(after, sample.labels),
                )  # fmt: skip


def _raw_snippets(bank: MemoryBank, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (m, D) snippets; of a factored bank what is reconstructed, before any normalisation."""
    if isinstance(bank, FactoredBank):
        return factors.reconstruct(bank.coefficients(rows), bank.basis, bank.mean)
    return bank.snippets(rows)
