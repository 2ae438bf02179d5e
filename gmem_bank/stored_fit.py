"""Fitted coefficients as a factored bank stores them (f32, f16, or i8 with a scale a column and segment), and what that keeps.

Shapes: N rows, n rows of a segment, b rows of a block, D dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, segments
from gmem_bank.draft import Draft
from gmem_bank.errors import ConfigError
from gmem_bank.fitting import Fitted
from gmem_bank.provenance import Json
from gmem_bank.quality import overlap, summary
from gmem_bank.segment_rows import BLOCK_ROWS, Plan
from gmem_bank.storage import Payload
from gmem_bank.storage.rules import COEFFICIENT_DTYPES
from gmem_bank.storage.schema import Segment
from gmem_bank.threads import in_order

F16_LIMIT = 65_504
HIGHEST_GROW_BELOW = 0.9999
"""What is recorded as `grow_below` at most: float32 and i8 do not tell more apart, and a basis should not grow for that."""
NEAR_OPTIMUM = 1e-3
"""Part by which an error may pass the optimum before the report says so."""
SMALLEST_ERROR = 1e-5
"""Relative error that float32 coefficients and means leave anyway."""
NO_ROWS = np.zeros(0, np.int64)
VECTORS = ("snippets", "coefficients", "values", "index", "scale")
"""Entries of a segment that the new coefficients take the place of."""


def encode(block: NDArray[np.float32], dtype: str, scale: NDArray[np.float32]) -> NDArray[Any]:
    """Return (b, R) coefficients as they are stored; `scale` is that of i8."""
    if dtype == "i8":
        return factors.quantise_by(block, scale)
    if dtype == "f16" and np.abs(block).max(initial=0) > F16_LIMIT:
        raise ConfigError("a coefficient is beyond 65504, the largest f16: take --dtype f32 or i8", key="dtype")
    return segments.narrow(block, COEFFICIENT_DTYPES[dtype])


def decode(stored: NDArray[Any], dtype: str, scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the (b, R) float32 coefficients that are read from stored ones."""
    return segments.scaled(stored, scale if dtype == "i8" else None)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What stored coefficients keep of the rows."""

    cosines: NDArray[np.float64]
    """(N,) of each snippet to what is read of it; 0 where one has no direction."""
    lost: float
    """Σ ‖s - ŝ‖² over all rows, raw reconstructions."""
    sample: NDArray[np.float32]
    """(m, D): what is read of the sampled rows, before any normalisation."""

    def grow_below(self) -> float:
        """Return the 5th percentile of the cosines: what the bank asks of new rows."""
        return round(min(float(np.quantile(self.cosines, 0.05)), HIGHEST_GROW_BELOW), 6)

    def report(self, fitted: Fitted) -> dict[str, Json]:
        """Return energy, cosines, overlap and errors of what was fitted, for a report."""
        same, energy = overlap(fitted.sample, self.sample), fitted.energy
        return {
            "cosine": {name: round(value, 8) for name, value in summary(self.cosines).items()},
            "neighbour_overlap_at_10": None if same is None else round(same, 6),
            "neighbours_among": len(fitted.sample),
            "energy": min(1.0, float(fitted.column_energy.sum() / energy)) if energy > 0 else 1.0,
            "relative_error": float(np.sqrt(self.lost / energy)) if energy > 0 else 0.0,
        }

    def warnings(self, fitted: Fitted, dtype: str, optimum: float, known_to: float) -> list[str]:
        """Return what is to be said of an error that passes the optimum by more than a thousandth.

        Args:
            fitted: what was measured.
            dtype: of the stored coefficients.
            optimum: relative error of the best basis of this rank (Eckart and Young 1936).
            known_to: relative error below which that one is rounding.
        """
        if fitted.energy <= 0:
            return []
        most = (optimum * (1 + NEAR_OPTIMUM)) ** 2 + known_to**2 + SMALLEST_ERROR**2
        basis, stored = float(fitted.residuals.sum()) / fitted.energy, self.lost / fitted.energy
        if basis > most:
            return [
                f"the basis leaves a relative error of {np.sqrt(basis):.4g}, the best one of this rank {optimum:.4g}: the rows "
                "are beyond what float32 tells apart (a mean or a few rows far larger than the rest?)"
            ]
        if stored > most:
            return [
                f"{dtype} coefficients raise the relative error to {np.sqrt(stored):.4g} from {np.sqrt(basis):.4g}: "
                + ("f16 or f32 keep more" if dtype == "i8" else "f32 keeps more")
            ]
        return []


def _blocks(fitted: Fitted, size: int) -> Iterator[tuple[int, int, NDArray[np.float32]]]:
    """Yield (segment, first row, coefficients)."""
    row = 0
    for place in range(len(fitted.counts)):
        for block in fitted.coefficients(place, size):
            yield place, row, block
            row += len(block)


def measure(
    fitted: Fitted,
    dtype: str,
    sample: NDArray[np.int64] = NO_ROWS,
    *,
    plan: Plan,
) -> Kept:
    """Return what is kept by coefficients stored as "f32", "f16" or "i8".

    With s = p·B + μ + r, r orthogonal to B, and stored c for p: s·ŝ = Σ c (p + Bμ) + s·μ, ‖ŝ‖² = ‖c‖² + 2 c·Bμ + ‖μ‖² and
    ‖s - ŝ‖² = ‖r‖² + ‖p - c‖², so no snippet has to be rebuilt.
    """
    turned = fitted.basis.astype(np.float64) @ fitted.mean.astype(np.float64)
    centre = float(fitted.mean.astype(np.float64) @ fitted.mean.astype(np.float64))
    num_rows = sum(fitted.counts)
    cosines, lost = np.zeros(num_rows), fitted.residuals.copy()

    def work(item: tuple[int, int, NDArray[np.float32]]) -> NDArray[np.float32]:
        place, row, block = item
        scale, own = factors.scale_of(fitted.largest[place]), slice(row, row + len(block))
        read = decode(encode(block, dtype, scale), dtype, scale)
        wide = read.astype(np.float64)
        exact = wide if dtype == "f32" else block.astype(np.float64)
        squares, turns = np.vecdot(wide, wide), wide @ turned
        inner = (squares if dtype == "f32" else np.vecdot(wide, exact)) + turns + fitted.dots[own]
        norms = np.sqrt(np.maximum(squares + 2 * turns + centre, 0.0) * fitted.squares[own])
        cosines[own] = np.divide(inner, norms, out=np.zeros(len(block)), where=norms > 0)
        if dtype != "f32":
            lost[own] += np.square(exact - wide).sum(axis=1)
        inside = sample[np.searchsorted(sample, own.start) : np.searchsorted(sample, own.stop)] - row
        return factors.reconstruct(read[inside], fitted.basis, fitted.mean)

    parts = list(in_order(plan.num_workers, work, _blocks(fitted, plan.block_rows)))
    # rounding alone takes a cosine beyond 1
    return Kept(cosines=np.clip(cosines, -1, 1), lost=float(lost.sum()), sample=np.concatenate(parts))


def put_into(draft: Draft, fitted: Fitted, dtype: str, grow_below: float) -> None:
    """Make a draft the factored bank of fitted rows; their coefficients are read while it is written."""
    parts = []
    for place, segment in enumerate(draft.segments):
        scale = factors.scale_of(fitted.largest[place])
        shape = (segment.num_rows, len(fitted.basis))

        def blocks(place: int = place, scale: NDArray[np.float32] = scale) -> Iterator[memoryview]:
            for block in fitted.coefficients(place, BLOCK_ROWS):
                yield np.ascontiguousarray(encode(block, dtype, scale)).view(np.uint8).data.cast("B")

        vectors = {"coefficients": Payload(dtype=COEFFICIENT_DTYPES[dtype], shape=shape, blocks=blocks)}
        parts.append((segment, vectors | ({"scale": Payload.of(scale)} if dtype == "i8" else {})))
    _replace(draft, parts)
    values = np.sqrt(fitted.column_energy).astype(np.float32)
    draft.factorise(grow_below, basis=fitted.basis, mean=fitted.mean, singular_values=values)


def put_shapes(draft: Draft, rank: int, dtype: str, keep: int | None = None) -> None:
    """Make a draft what it would be with that rank, type and coefficients kept a row, but for the values: to learn its size."""
    parts = []
    for segment in draft.segments:
        columns, stored = min(keep or rank, rank), COEFFICIENT_DTYPES[dtype]
        names = {"coefficients": stored} if columns == rank else {"values": stored, "index": "U16"}
        vectors = {
            what: Payload(dtype=kind, shape=(segment.num_rows, columns), blocks=_no_blocks)
            for what, kind in names.items()
        }
        vectors |= {"scale": Payload(dtype="F32", shape=(rank,), blocks=_no_blocks)} if dtype == "i8" else {}
        parts.append((segment, vectors))
    _replace(draft, parts)
    zeros = np.zeros(rank, np.float32)
    wide = np.broadcast_to(np.float32(0), (rank, draft.bank.dim))
    draft.factorise(-0.123456, basis=np.asarray(wide), mean=np.zeros(draft.bank.dim, np.float32), singular_values=zeros)


def _no_blocks() -> Iterator[memoryview]:
    raise AssertionError("a shape has no bytes")


def _replace(draft: Draft, parts: Sequence[tuple[Segment, Mapping[str, Payload]]]) -> None:
    """Put new vectors in the place of the old ones; keys, sources and what is not understood stay."""
    entries = [
        {what: payload for what, payload in draft.segment_entries(segment).items() if what not in VECTORS}
        for segment, _ in parts
    ]
    draft.replace_segments(
        [(segment, {**own, **vectors}) for own, (segment, vectors) in zip(entries, parts, strict=True)]
    )
