"""Which rank a compression takes: asked for, or the smallest that keeps enough, or the largest that fits.

Shapes: N rows, b rows of a chunk, D dimensions, R rank.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors
from gmem_bank.errors import ConfigError
from gmem_bank.fitting import project_block
from gmem_bank.moments import Directions
from gmem_bank.provenance import Json
from gmem_bank.scalars import real, whole
from gmem_bank.segment_rows import Chunk, Plan, SegmentRows
from gmem_bank.storage.rules import COEFFICIENT_DTYPES
from gmem_bank.stored_fit import decode, encode
from gmem_bank.threads import in_order

FEW_ROWS = 256
"""Held at a time in float64, for all ranks."""
ROUNDING = 1e-12
"""Of a share of energy: what float64 sums leave undecided."""


@dataclass(frozen=True, kw_only=True)
class Goal:
    """How far to compress: exactly one of the first four."""

    rank: int | None = None
    """Components to keep; fewer where the rows span fewer."""
    energy: float | None = None
    """Share of the centred squared norm to keep, above 0, at most 1."""
    target_cosine: float | None = None
    """Mean cosine of snippets to what is read of them that must be reached, above 0, below 1."""
    max_bytes: int | None = None
    """Size of the whole bank on disk that must not be passed."""
    dtype: str = "f32"
    """How coefficients are stored: f32, f16 or i8."""

    def check(self, dim: int) -> None:
        """Raise ConfigError where it is not one goal, or one that no bank of this dimension can have."""
        given = {name: value for name, value in asdict(self).items() if name != "dtype" and value is not None}
        if len(given) != 1:
            got = f"got {', '.join(given)}" if given else "none was given"
            raise ConfigError(f"give exactly one of rank, energy, target_cosine and max_bytes; {got}", key="rank")
        if self.dtype not in COEFFICIENT_DTYPES:
            raise ConfigError(f"dtype must be {', '.join(COEFFICIENT_DTYPES)}, not {self.dtype!r}", key="dtype")
        if self.rank is not None and not 1 <= (whole(self.rank) or 0) <= dim:
            raise ConfigError(f"rank must be 1 to {dim}, the bank's dimension; got {self.rank}", key="rank")
        if self.energy is not None and not 0 < real(self.energy) <= 1:
            raise ConfigError(f"energy must be above 0 and at most 1, got {self.energy}", key="energy")
        if self.target_cosine is not None and not 0 < real(self.target_cosine) < 1:
            raise ConfigError(f"target_cosine must be between 0 and 1, got {self.target_cosine}", key="target_cosine")
        if self.max_bytes is not None and (whole(self.max_bytes) or 0) < 1:
            raise ConfigError(f"max_bytes must be a whole number, at least 1, got {self.max_bytes}", key="max_bytes")

    def to_json(self) -> dict[str, Json]:
        """Return what was asked for, for the history."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def plain(self) -> Goal:
        """Return the goal in Python's own numbers where it has NumPy's, which are none of JSON's; what is no number stays."""
        given = asdict(self)
        for name in ("rank", "max_bytes"):
            given[name] = given[name] if whole(given[name]) is None else whole(given[name])
        for name in ("energy", "target_cosine"):
            given[name] = given[name] if math.isnan(real(given[name])) else real(given[name])
        return Goal(**given)


def rank_for_energy(energies: NDArray[np.float64], share: float) -> int:
    """Return the fewest components that hold a share of the energy.

    Args:
        energies: (D,) all of them, descending.
        share: above 0, at most 1.
    """
    sums = np.cumsum(energies)
    if sums[-1] <= 0:
        return 1
    return min(int(np.searchsorted(sums / sums[-1], share - ROUNDING)) + 1, len(energies))


def rank_for_bytes(size: Callable[[int], int], most: int, max_bytes: int, dtype: str) -> int:
    """Return the largest rank whose bank fits.

    Args:
        size: bytes of the whole bank by rank.
        most: highest rank there is.
        max_bytes: limit.
        dtype: of coefficients, for the message.

    Raises:
        ConfigError: not even rank 1 fits; how much that takes is said.
    """
    least = size(1)
    if least > max_bytes:
        raise ConfigError(
            f"{max_bytes:,} bytes are too few: at rank 1 the bank takes {least:,}, its keys and tables included; give at least "
            "that" + (", or --dtype i8" if dtype != "i8" else ""),
            key="max_bytes",
        )
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(middle) <= max_bytes else (low, middle - 1)
    return low


def rank_for_cosine(
    rows: Sequence[SegmentRows], directions: Directions, mean: NDArray[np.float64], plan: Plan, goal: Goal
) -> int:  # fmt: skip
    """Return the smallest rank whose stored coefficients reach the mean cosine.

    Raises:
        ConfigError: no rank does; the best that can be reached is said.
    """
    assert goal.target_cosine is not None
    curve = mean_cosines(rows, directions.basis.astype(np.float32), mean.astype(np.float32), plan, goal.dtype)
    reached = np.flatnonzero(curve >= goal.target_cosine)
    if not len(reached):
        best = int(curve.argmax())
        raise ConfigError(
            f"a mean cosine of {goal.target_cosine} cannot be reached with {goal.dtype} coefficients: the best is "
            f"{np.floor(curve[best] * 1e6) / 1e6:.6f}, at rank {best + 1}"
            + ("; f16 or f32 reach more" if goal.dtype == "i8" else ""),
            key="target_cosine",
        )
    return int(reached[0]) + 1


def mean_cosines(
    rows: Sequence[SegmentRows], basis: NDArray[np.float32], mean: NDArray[np.float32], plan: Plan, dtype: str
) -> NDArray[np.float64]:  # fmt: skip
    """Return the (R,) mean cosines of snippets to what is read of them, for every rank up to R, in one pass.

    i8 takes a pass more: each column's scale is that of its largest coefficient, whatever the rank.
    """
    scales = np.zeros((len(rows), len(basis)), np.float32)
    if dtype == "i8":
        found_largest = in_order(plan.num_workers, lambda c: _largest(rows, c, basis, mean), _all_chunks(rows, plan))
        with contextlib.closing(found_largest) as parts:
            for chunk, largest in parts:
                np.maximum(scales[chunk.segment], largest, out=scales[chunk.segment])
        scales = np.array([factors.scale_of(largest) for largest in scales])
    turned = basis.astype(np.float64) @ mean.astype(np.float64)
    centre = float(mean.astype(np.float64) @ mean.astype(np.float64))

    def work(chunk: Chunk) -> tuple[NDArray[np.float64], int]:
        found = project_block(rows[chunk.segment], chunk, basis, mean)
        exact, squares, dots = found.coefficients, found.squares, found.dots
        total = np.zeros(len(basis))
        for start in range(0, len(exact), FEW_ROWS):
            part = slice(start, start + FEW_ROWS)
            read = decode(encode(exact[part], dtype, scales[chunk.segment]), dtype, scales[chunk.segment])
            wide = read.astype(np.float64)
            inner = np.cumsum(wide * (exact[part] + turned), axis=1) + dots[part, None]
            norms = np.cumsum(wide * (wide + 2 * turned), axis=1) + centre
            norms = np.sqrt(np.maximum(norms, 0.0) * squares[part, None])
            cosines = np.divide(inner, norms, out=np.zeros_like(inner), where=norms > 0)
            total += np.clip(cosines, -1, 1).sum(axis=0)
        return total, len(exact)

    total, count = np.zeros(len(basis)), 0
    with contextlib.closing(in_order(plan.num_workers, work, _all_chunks(rows, plan))) as sums:
        for cosines, number in sums:
            total, count = total + cosines, count + number
    return total / count


def _all_chunks(rows: Sequence[SegmentRows], plan: Plan) -> Iterator[Chunk]:
    return (chunk for segment in rows for chunk in segment.chunks(plan.chunk_rows))


def _largest(
    rows: Sequence[SegmentRows], chunk: Chunk, basis: NDArray[np.float32], mean: NDArray[np.float32]
) -> tuple[Chunk, NDArray[np.float32]]:
    found = project_block(rows[chunk.segment], chunk, basis, mean)
    return chunk, np.abs(found.coefficients).max(axis=0)
