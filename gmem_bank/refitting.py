"""Refit a factored bank to the rows that are left: basis, mean and all coefficients anew, for deletion on request.

Shapes: N rows, D dimensions, R rank.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gmem_bank.bank import MemoryBank
from gmem_bank.draft import Draft
from gmem_bank.errors import ConfigError
from gmem_bank.fitting import project_rows
from gmem_bank.kinds import FactoredBank
from gmem_bank.moments import principal
from gmem_bank.provenance import Json
from gmem_bank.segment_rows import plan_for, rows_of
from gmem_bank.storage.rules import COEFFICIENT_DTYPES
from gmem_bank.stored_fit import measure, put_into
from gmem_bank.summing import gather_moments


def require_factored(bank: MemoryBank) -> None:
    """Raise ConfigError where a bank has no basis."""
    if not isinstance(bank, FactoredBank):
        raise ConfigError(f"{bank.path} is dense: it has no basis to refit, its rows simply go", path=bank.path)


def refit(draft: Draft, *, write: bool) -> dict[str, Json]:
    """Fit a draft's rows anew; directions that only removed rows used are gone, and the rank with them.

    Rows keep what the old factors held of them, to float32 rounding (f16 and i8 coefficients are rounded anew). What was left
    out of the old basis does not come back. Coefficient masks end: on other directions all coefficients are in use.

    Args:
        draft: of a factored bank, after the removal.
        write: False: only say what rank would be left.

    Returns:
        {"basis": "refitted", "rank_before", "rank", "coefficient_mask": "ended" where there was one, "cosine"}.

    Raises:
        CorruptError: an entry is damaged.
    """
    bank = draft.bank
    assert isinstance(bank, FactoredBank), "only a factored bank has a basis"
    plan, rows = plan_for(bank.dim, draft.num_rows), rows_of(draft, [bank], [0] * len(draft.segments))
    found = gather_moments(rows, plan)
    directions = principal(found, bank.rank)
    facts: dict[str, Json] = {"basis": "refitted", "rank_before": bank.rank, "rank": len(directions.basis)}
    sparse = any(segment.entry("values") in draft.payloads for segment in draft.segments)
    facts |= {"coefficient_mask": "ended"} if sparse else {}
    if not write:
        return facts
    fitted = project_rows(rows, directions.basis, found.mean, plan, _folder(draft.target) / "coefficients")
    dtype = _dtype_of(draft)
    quality = measure(fitted, dtype, plan=plan)
    facts["cosine"] = {"mean": round(float(quality.cosines.mean()), 8), "min": round(float(quality.cosines.min()), 8)}
    put_into(draft, fitted, dtype, quality.grow_below())
    return facts


def rebase(
    draft: Draft, banks: Sequence[MemoryBank], origins: Sequence[int], dtype: str, *, write: bool
) -> dict[str, Json]:
    """Bring the rows of several factored banks to one basis that spans them all; `grow_below` is the lowest of theirs.

    Args:
        draft: of the first bank, with the segments of the others appended.
        banks: all of them.
        origins: for each segment the bank that it came from.
        dtype: how coefficients are stored.
        write: False: only say what rank there would be.

    Returns:
        {"rank", "coefficient_dtype", "coefficient_mask": "ended" where there was one, and, written, "relative_error" (‖s - ŝ‖
        over ‖s - mean‖ of all rows together), "cosine", "grow_below"}.

    Raises:
        CorruptError: an entry is damaged.
    """
    plan, rows = plan_for(draft.bank.dim, draft.num_rows), rows_of(draft, banks, origins)
    found = gather_moments(rows, plan)
    directions = principal(found)
    facts: dict[str, Json] = {"rank": len(directions.basis), "coefficient_dtype": dtype}
    sparse = any("values" in draft.segment_entries(segment) for segment in draft.segments)
    facts |= {"coefficient_mask": "ended"} if sparse else {}
    if not write:
        return facts
    fitted = project_rows(rows, directions.basis, found.mean, plan, _folder(draft.target) / "coefficients")
    quality = measure(fitted, dtype, plan=plan)
    asked = [bank.header.extras.get("grow_below") for bank in banks]
    lowest = min([quality.grow_below(), *(float(value) for value in asked if isinstance(value, int | float))])
    put_into(draft, fitted, dtype, lowest)
    error = float(np.sqrt(quality.lost / fitted.energy)) if fitted.energy > 0 else 0.0
    cosine = {"mean": round(float(quality.cosines.mean()), 8), "min": round(float(quality.cosines.min()), 8)}
    return facts | {"relative_error": error, "cosine": cosine, "grow_below": lowest}


def _folder(target: Path) -> Path:
    return target.with_name(f".{target.name}.refit")


def clear(target: Path) -> None:
    """Remove what `refit` has left beside a bank."""
    shutil.rmtree(_folder(target), ignore_errors=True)


def _dtype_of(draft: Draft) -> str:
    """Return the type of the last segment's coefficients."""
    names = {stored: name for name, stored in COEFFICIENT_DTYPES.items()}
    last = draft.segments[-1]
    first = draft.payloads.get(last.entry("coefficients"), draft.payloads.get(last.entry("values")))
    assert first is not None
    return names[first.dtype]
