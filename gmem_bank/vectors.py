"""Snippets on their way into a bank: narrowed for a dense one, projected (and the basis grown) for a factored one.

Shapes: n new rows, D dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, segments, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.draft import Draft
from gmem_bank.errors import CorruptError
from gmem_bank.factors import Blocks
from gmem_bank.kinds import FactoredBank
from gmem_bank.storage import Payload
from gmem_bank.storage.rules import COEFFICIENT_DTYPES, SNIPPET_DTYPES
from gmem_bank.threads import one_thread_a_product

REPORTED_ROWS = 4096
"""Up to so many new rows a report has the cosine of each."""
ROUNDING = 1e-6
"""Of a cosine between float32 snippets."""


def stored_dtype(bank: MemoryBank) -> str:
    """Return how a bank stores its last rows: "f32", "f16", "bf16" or "i8"."""
    names = SNIPPET_DTYPES | COEFFICIENT_DTYPES
    last, stored = bank.header.segments[-1], bank.stored
    entry = next(e for e in ("snippets", "values", "coefficients") if last.entry(e) in stored)
    return next(name for name, dtype in names.items() if dtype == stored.dtype(last.entry(entry)))


def coefficients_kept(bank: MemoryBank) -> int | None:
    """Return how many coefficients a row keeps at most in the segments that have a coefficient mask; None: none has."""
    names = [segment.entry("values") for segment in bank.header.segments]
    return max((bank.stored.shape(name)[1] for name in names if name in bank.stored), default=None)


@one_thread_a_product()
def new_vectors(
    draft: Draft, blocks: Blocks, num_rows: int, *, grow_below: float | None = None
) -> tuple[dict[str, Payload], dict[str, Any]]:
    """Return what new rows are stored as, in the numeric type of the bank's last segment, and what was lost by it.

    A sparse bank keeps all coefficients of its new rows: which to drop is for `mask` to decide.

    A factored bank's basis grows where projection alone would lose what is new (see `factors.grow`); the draft then gets
    the grown basis.

    Args:
        draft: the new bank.
        blocks: the snippets; read once more each time the payload is.
        num_rows: n.
        grow_below: cosine that each new snippet's reconstruction must reach; None takes the bank's own, -1 never grows.

    Returns:
        The entries, and for a factored bank what the report says: "rank", "grown_directions", "grow_below", the cosines of the
        new snippets to what is kept of them ("cosine" in short, and of up to 4,096 rows "cosines", a row each), what projection
        onto the old basis alone would have kept ("cosine_by_projection", "cosines_by_projection"), and in "warnings" how many
        rows are below what was asked for, since coefficients are stored so coarsely.
    """
    bank = draft.bank
    if not isinstance(bank, FactoredBank):
        return {"snippets": segments.snippet_payload(blocks, num_rows, bank.dim, stored_dtype(bank))}, {}
    target = grow_below if grow_below is not None else recorded_grow_below(bank)
    grown = factors.grow(blocks, bank.basis, bank.mean, below=target)
    basis, num_grown = grown.basis, len(grown.basis) - bank.rank

    def coefficients() -> Iterator[NDArray[np.float32]]:
        return (factors.project(own, basis, bank.mean) for own in factors.row_chunks(blocks()))

    largest, energy = _sizes(coefficients(), len(basis))
    if num_grown:
        entries = {"basis": basis}
        if bank.singular_values is not None:
            entries["singular_values"] = np.concatenate([bank.singular_values, np.sqrt(energy[bank.rank :])])
        draft.set_factors(grown=True, **entries)
    payloads = _coefficient_entries(coefficients, (num_rows, len(basis)), largest, stored_dtype(bank))
    after = _cosines_as_stored(blocks, payloads, basis, bank.mean)
    details = {
        "rank": len(basis), "grown_directions": num_grown, "grow_below": target,
        "cosine_by_projection": _kept(grown.cosines_before), "cosine": _kept(after),
        "warnings": _warnings(after, target, stored_dtype(bank)),
    }  # fmt: skip
    if num_rows <= REPORTED_ROWS:
        details["cosines_by_projection"] = [round(value, 6) for value in grown.cosines_before.tolist()]
        details["cosines"] = [round(value, 6) for value in after.tolist()]
    return payloads, details


def _sizes(coefficients: Iterable[NDArray[np.float32]], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the (R,) largest absolute values and the (R,) sums of squares of the columns of (b, R) coefficients."""
    largest, energy = np.zeros(rank, np.float32), np.zeros(rank)
    for own in coefficients:
        largest = np.maximum(largest, np.abs(own).max(axis=0))
        energy += np.square(own, dtype=np.float64).sum(axis=0)
    return largest, energy


def _cosines_as_stored(
    blocks: Blocks, payloads: dict[str, Payload], basis: NDArray[np.float32], mean: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Return the (n,) cosines of snippets to what is read of them, i8 steps and all."""
    read = streams.row_blocks(segments.coefficients_as_f32(payloads, len(basis)))
    return np.concatenate([
        factors.cosines(snippets, factors.reconstruct(own, basis, mean))
        for snippets, own in zip(factors.row_chunks(blocks()), read, strict=True)
    ])  # fmt: skip


def _warnings(cosines: NDArray[np.float64], target: float, dtype: str) -> list[str]:
    """Return what is to be said where rows lose more than was asked for by the type of their coefficients alone."""
    below = cosines < target - ROUNDING
    if not below.any():
        return []
    return [
        f"{int(below.sum())} of {len(cosines)} new rows have a cosine below the {target:g} asked for, the lowest "
        f"{cosines.min():.5f}: the basis reaches it, but this bank stores coefficients as {dtype}"
    ]


def _kept(cosines: NDArray[np.float64]) -> dict[str, float]:
    return {"mean": float(cosines.mean()), "median": float(np.median(cosines)), "min": float(cosines.min())}


def recorded_grow_below(bank: MemoryBank) -> float:
    """Return the cosine that a factored bank asks of new rows; raises CorruptError where it is none."""
    value = bank.header.extras.get("grow_below", factors.GROW_BELOW)
    if not isinstance(value, int | float) or isinstance(value, bool) or not -1 <= value <= 1:
        raise CorruptError(f"{bank.path}: its grow_below is {value!r}, expected -1 to 1", path=bank.path)
    return float(value)


def coefficient_payloads(coefficients: NDArray[np.float32], dtype: str) -> dict[str, Payload]:
    """Return (n, R) coefficients as the entries of a segment: "f32", "f16", or "i8" with a scale a column."""
    largest = np.abs(coefficients).max(axis=0, initial=0.0)
    return _coefficient_entries(lambda: [coefficients], coefficients.shape, largest, dtype)


def _coefficient_entries(
    blocks: Blocks, shape: tuple[int, ...], largest: NDArray[np.float32], dtype: str
) -> dict[str, Payload]:
    """Return the entries of a segment from blocks of its coefficients, `shape` in all, and the largest of each column."""
    stored, scale = COEFFICIENT_DTYPES[dtype], factors.scale_of(largest)

    def narrowed(block: NDArray[np.float32]) -> NDArray[Any]:
        return np.ascontiguousarray(
            factors.quantise_by(block, scale) if dtype == "i8" else segments.narrow(block, stored)
        )

    coefficients = Payload(
        dtype=stored, shape=shape,
        blocks=lambda: (narrowed(block).view(np.uint8).data.cast("B") for block in blocks() if block.size),
    )  # fmt: skip
    return {"coefficients": coefficients} | ({"scale": Payload.of(scale)} if dtype == "i8" else {})
