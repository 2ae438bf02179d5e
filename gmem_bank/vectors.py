"""Snippets on their way into a bank: narrowed for a dense one, projected (and the basis grown) for a factored one.

Shapes: n new rows, D dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, segments, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.draft import Draft
from gmem_bank.errors import CorruptError
from gmem_bank.kinds import FactoredBank
from gmem_bank.storage import Payload
from gmem_bank.storage.rules import COEFFICIENT_DTYPES, SNIPPET_DTYPES

Blocks = Callable[[], Iterable[NDArray[np.float32]]]
"""Yields (b, D) float32 snippets in the bank's space."""


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
        new snippets to what is kept of them ("cosines", a row each, and "cosine" in short), and what projection onto the old
        basis alone would have kept ("cosines_by_projection", "cosine_by_projection").
    """
    bank = draft.bank
    if not isinstance(bank, FactoredBank):
        return {"snippets": segments.snippet_payload(blocks, num_rows, bank.dim, stored_dtype(bank))}, {}
    snippets = np.concatenate(list(blocks()))
    target = grow_below if grow_below is not None else recorded_grow_below(bank)
    grown = factors.grow(snippets, bank.basis, bank.mean, below=target)
    num_grown = len(grown.basis) - bank.rank
    if num_grown:
        entries = {"basis": grown.basis}
        if bank.singular_values is not None:
            energy = np.linalg.norm(grown.coefficients[:, bank.rank :].astype(np.float64), axis=0)
            entries["singular_values"] = np.concatenate([bank.singular_values, energy])
        draft.set_factors(grown=True, **entries)
    payloads = coefficient_payloads(grown.coefficients, stored_dtype(bank))
    read = streams.read(
        segments.coefficients_as_f32(payloads, len(grown.basis))
    )  # as they are stored, i8 steps and all
    before, after = grown.cosines_before, factors.cosines(snippets, factors.reconstruct(read, grown.basis, bank.mean))
    details = {
        "rank": len(grown.basis), "grown_directions": num_grown, "grow_below": target,
        "cosine_by_projection": _kept(before), "cosine": _kept(after),
        "cosines_by_projection": [round(value, 6) for value in before.tolist()],
        "cosines": [round(value, 6) for value in after.tolist()],
    }  # fmt: skip
    return payloads, details


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
    if dtype == "i8":
        whole, scale = factors.quantise(coefficients)
        return {"coefficients": Payload.of(whole), "scale": Payload.of(scale)}
    return {
        "coefficients": Payload.of(segments.narrow(coefficients, COEFFICIENT_DTYPES[dtype]), COEFFICIENT_DTYPES[dtype])
    }
