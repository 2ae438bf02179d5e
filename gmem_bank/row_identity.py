"""Which rows of a bank are rows that an index has already: by segments that are byte for byte the same, else row by row.

And so whether an index fits a bank, and where it does not, which command makes one that does.

Shapes: N rows, C columns of a block of values, b rows of a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError, StaleIndexError
from gmem_bank.interface import SupportsFactors
from gmem_bank.provenance import Json, sha256_of

if TYPE_CHECKING:
    from gmem_bank.bank import MemoryBank
    from gmem_bank.index_file import IndexState

VECTOR_ENTRIES = ("snippets", "coefficients", "scale", "values", "index")
HASH_SEED = 0x676D656D


def content_of(bank: MemoryBank) -> dict[str, Json]:
    """Return what of a bank decides where its rows lie, in JSON: not its mask, keys, concepts or history.

    "segments" lists [rows, sha256 over the hashes of its vectors]; "factors" hashes mean and basis, or is None.
    """
    hashes = bank.header.hashes
    segments = [
        [segment.num_rows, sha256_of({what: hashes.get(segment.entry(what)) for what in VECTOR_ENTRIES})]
        for segment in bank.header.segments
    ]
    factors = None
    if isinstance(bank, SupportsFactors):
        factors = {"rank": len(bank.basis), **_factor_hashes(bank, len(bank.basis))}
    return {
        "dim": bank.dim, "space": bank.space, "encoder": bank.encoder.fingerprint, "segments": segments, "factors": factors,
    }  # fmt: skip


def _factor_hashes(bank: Any, rank: int) -> dict[str, str]:
    parts = {"mean": bank.mean, "basis": bank.basis[:rank]}
    return {name: hashlib.sha256(np.ascontiguousarray(part).tobytes()).hexdigest() for name, part in parts.items()}


def same_factors(bank: MemoryBank, content: Mapping[str, Any]) -> bool:
    """Say whether coefficients mean what they meant: the mean, and the basis as far as it went, are as they were."""
    old = content["factors"]
    if not isinstance(bank, SupportsFactors) or old is None:
        return not isinstance(bank, SupportsFactors) and old is None
    known = {name: old[name] for name in ("mean", "basis")}
    return old["rank"] <= len(bank.basis) and _factor_hashes(bank, old["rank"]) == known


def hashes_of_values(values: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return (b,) uint64 hashes of (b, C) float32 values, multilinear modulo 2^64; zeros at the end do not count.

    So the coefficients of a row keep their hash when the basis grows.
    """
    weights = np.random.Generator(np.random.PCG64(HASH_SEED)).integers(
        1 << 64, size=values.shape[1], dtype=np.uint64, endpoint=False
    )
    bits = np.ascontiguousarray(values).view(np.uint32)
    hashes: NDArray[np.uint64] = np.einsum("bc,c->b", bits, weights, dtype=np.uint64, casting="safe")
    return hashes


def key_hashes(bank: MemoryBank) -> NDArray[np.uint64]:
    """Return the (N,) hashes of the keys, in the order of the rows; raises CorruptError where the table lacks a row."""
    table_rows = np.asarray(bank.stored.array("keys.row"))
    named = np.zeros(len(bank), np.bool_)
    if len(table_rows) == len(bank) and len(bank) and 0 <= table_rows.min() <= table_rows.max() < len(bank):
        named[table_rows] = True
    if not named.all():
        raise CorruptError(
            f"{bank.path}: its table of keys does not name each row once; 'gmem-bank verify {bank.path}' says what is damaged",
            path=bank.path, tensor="keys.row",
        )  # fmt: skip
    ordered = np.empty(len(bank), np.uint64)
    ordered[table_rows] = bank.stored.array("keys.hash")
    return ordered


def kept_segments(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return new rows, and the old row of each, of the segments whose vectors are byte for byte the same."""
    begins: dict[tuple[int, str], list[int]] = {}  # the size too: the old content is what a file says
    start = 0
    for num_rows, digest in old["segments"]:
        begins.setdefault((num_rows, digest), []).append(start)
        start += num_rows
    new_rows, old_rows, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for num_rows, digest in new["segments"]:
        if begins.get((num_rows, digest)):
            new_rows.append(np.arange(start, start + num_rows))
            old_rows.append(begins[num_rows, digest].pop(0) + np.arange(num_rows))
        start += num_rows
    return np.concatenate(new_rows), np.concatenate(old_rows)


def pair_up(
    old: tuple[NDArray[np.uint64], NDArray[np.uint64]], new: tuple[NDArray[np.uint64], NDArray[np.uint64]]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return places in `new` and in `old` that have the same key hash and value hash, each used once."""
    _, in_old, in_new = np.intersect1d(_as_pairs(*old), _as_pairs(*new), return_indices=True)
    return in_new.astype(np.int64), in_old.astype(np.int64)


def _as_pairs(keys: NDArray[np.uint64], values: NDArray[np.uint64]) -> NDArray[Any]:
    pairs = np.empty(len(keys), [("key", "<u8"), ("value", "<u8")])
    pairs["key"], pairs["value"] = keys, values
    return pairs


def is_related(bank: MemoryBank, state: IndexState) -> bool:
    """Say whether a bank is of the encoder of an index, and a later or earlier state of the bank that it was made for.

    A later one is known by the bank's history, an earlier one, after an undo, by a segment that both have.
    """
    content = state.facts["content"]
    if bank.encoder.fingerprint != content.get("encoder"):
        return False
    known = {bank.fingerprint, *(entry.get("parent") for entry in bank.history)}
    return state.facts["bank"] in known or len(kept_segments(content, content_of(bank))[0]) > 0


def require_fit(bank: MemoryBank, state: IndexState, path: Path) -> None:
    """Raise StaleIndexError unless the rows of a bank are those of an index, in that order."""
    if content_of(bank) == state.facts["content"]:
        return
    why = why_not_update(bank, state, path)
    if why is None:
        raise StaleIndexError(
            f"{path} is of another state of {bank.path}: 'gmem-bank index {bank.path} --update' brings it up to date, "
            "'search --exact' does without",
            path=path,
        )
    raise StaleIndexError(f"{why}, 'search --exact' does without", path=path)


def why_not_update(bank: MemoryBank, state: IndexState, path: Path) -> str | None:
    """Return why an index cannot follow its bank, and the command that makes a new one; None where it can."""
    again = f"'gmem-bank index {bank.path}' builds a new one"
    if not is_related(bank, state):
        return f"{path} was made for another bank than {bank.path}, or for a state of it that shares no segment with it: {again}"
    if bank.dim != state.facts["content"]["dim"] or not same_factors(bank, state.facts["content"]):
        return f"{bank.path} has been compressed or fitted anew since {path} was made, so that no row is what it was: {again}"
    return None
