"""Merge banks of one encoder into one: dense ones row by row, factored ones on one common basis.

Shapes: N rows, n rows of a bank or segment, D dimensions, R_i rank of a bank, R the common rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import kinds, refitting, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.draft import Draft, NewRows
from gmem_bank.editing import Edit, EditReport, editing
from gmem_bank.encoders import require_same_encoder
from gmem_bank.errors import ConceptExistsError, ConfigError, EncoderMismatchError
from gmem_bank.kinds import FactoredBank
from gmem_bank.ops import PathLike
from gmem_bank.parts import check_parts
from gmem_bank.rewrite import join_if_many
from gmem_bank.vectors import stored_dtype

ON_DUPLICATE = ("error", "first")


def merge(
    bank_path: PathLike,
    others: Sequence[PathLike],
    *,
    on_duplicate: str = "error",
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Add the rows of other banks to a bank; concepts of one name become one, masks and histories are kept.

    Factored banks are brought to one basis, by the eigenvectors of the scatter matrix of all their reconstructions: exact to
    float32 rounding for f32 coefficients; i8 ones are quantised anew, and the report says what that cost. Coefficient masks end.

    Args:
        bank_path: the first bank.
        others: the banks whose rows follow, in order.
        on_duplicate: what to do with a key that an earlier bank has: "error", or "first" (the earlier row stays).
        output: bank file to write; default: replace the first bank.
        dry_run: write nothing, and report what would be done.
        undo: keep what `undo` needs.

    Raises:
        EncoderMismatchError: encoders, dimensions, spaces or kinds differ; both are named.
        ConceptExistsError: a key occurs twice, and `on_duplicate` is "error".
    """
    if on_duplicate not in ON_DUPLICATE:
        raise ConfigError(f"on_duplicate must be {' or '.join(ON_DUPLICATE)}, not {on_duplicate!r}", key="on_duplicate")
    if not others:
        raise ConfigError("give at least one bank to merge with the first")
    banks = [kinds.open(path) for path in others]
    arguments = {
        "banks": [{"fingerprint": b.fingerprint, "num_rows": len(b), "history": list(b.history)} for b in banks],
        "on_duplicate": on_duplicate,
    }
    with editing(bank_path, "merge", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None:
            if not dry_run:
                refitting.clear(edit.target)  # of this very command, killed after its last write
            return edit.unchanged()
        for other in banks:
            _require_alike(edit.bank, other)
        return _merged(edit, banks, on_duplicate)


def _merged(edit: Edit, banks: Sequence[MemoryBank], on_duplicate: str) -> EditReport:
    parts = check_parts([edit.bank, *banks])
    draft = edit.draft()
    taken = absorb_banks(draft, [edit.bank, *banks], on_duplicate)
    details: dict[str, Any] = parts | {
        "num_banks": 1 + len(banks), "num_duplicates": taken.num_dropped,
        "num_memberships_of_earlier_rows": taken.num_joined,
    }  # fmt: skip
    if draft.num_rows == len(edit.bank) and not taken.num_joined and edit.in_place:
        return edit.unchanged(details=details)
    if isinstance(edit.bank, FactoredBank):
        every: list[MemoryBank] = [edit.bank, *banks]
        dtype = "f32" if all(stored_dtype(bank) == "f32" for bank in every) else stored_dtype(edit.bank)
        details |= refitting.rebase(draft, every, taken.origins, dtype, write=not edit.dry_run)
    join_if_many(draft)
    added = draft.num_rows - len(edit.bank)
    report = edit.finish(draft, num_rows=added, num_added=added, details=details)
    if not edit.dry_run:
        refitting.clear(edit.target)
    return report


@dataclass(frozen=True, kw_only=True)
class Absorbed:
    """What a draft has taken from other banks."""

    origins: list[int]
    """For each segment, which bank it came from."""
    num_dropped: int
    """Rows left out because an earlier bank has their key."""
    num_joined: int
    """Memberships that earlier rows have gained."""


def absorb_banks(draft: Draft, banks: Sequence[MemoryBank], on_duplicate: str) -> Absorbed:
    """Append the rows of other banks to a draft as they are stored, with their concepts, masks and sources.

    Args:
        draft: of the first bank.
        banks: all of them, the first one included.
        on_duplicate: as in `merge`.

    Raises:
        ConceptExistsError: as in `merge`.
    """
    origins = [0] * len(draft.segments)
    placed = [(banks[0], np.arange(len(banks[0]), dtype=np.int64))]  # each bank, and where its rows are in the draft
    num_dropped = num_joined = 0
    for number, other in enumerate(banks[1:], 1):
        known = _places_of_known_keys(placed, other)
        twice = np.flatnonzero(known >= 0)
        if len(twice) and on_duplicate == "error":
            raise ConceptExistsError(
                f"{other.path} has {len(twice)} keys that an earlier bank has, such as {_shown(other, twice)}: "
                "take --on-duplicate first when merging, or remove them",
                path=other.path, key=other.keys(twice[:1])[0],
            )  # fmt: skip
        num_dropped += len(twice)
        theirs = Draft(other, draft.target)
        place = known.copy()
        if len(twice) < len(other):
            place[place < 0] = np.arange(draft.num_rows, draft.num_rows + len(other) - len(twice))
            if len(twice):
                keep = np.ones(len(other), np.bool_)
                keep[twice] = False
                theirs.keep(keep)
            _absorb(draft, theirs)
            origins += [number] * len(theirs.segments)
        placed.append((other, place))
        num_joined += _join_concepts(draft, other, known)
    return Absorbed(origins=origins, num_dropped=num_dropped, num_joined=num_joined)


def _join_concepts(draft: Draft, other: MemoryBank, known: NDArray[np.int64]) -> int:
    """Let rows that stay for one of the same key belong to what the other belonged to; return how many memberships are new.

    Args:
        draft: with the bank's other rows absorbed.
        other: the bank.
        known: (N,) place in the draft of its rows whose key was there before, -1 for the others.
    """
    concepts, gained = dict(draft.concepts()), 0
    for name in other.names:
        places = known[other.all_rows_of(name)]
        old = concepts.get(name, np.zeros(0, np.int64))
        new = np.setdiff1d(places[places >= 0], old)
        if len(new):
            concepts[name] = np.union1d(old, new)
            gained += len(new)
    if gained:
        draft.set_concepts(concepts)
    return gained


def _require_alike(bank: MemoryBank, other: MemoryBank) -> None:
    require_same_encoder(other.encoder, bank.encoder)
    if bank.header.kind != other.header.kind:
        raise EncoderMismatchError(
            f"{bank.path} is {bank.header.kind}, {other.path} is {other.header.kind}: only banks of one kind are merged",
            path=other.path,
        )


def _places_of_known_keys(
    placed: Sequence[tuple[MemoryBank, NDArray[np.int64]]], other: MemoryBank
) -> NDArray[np.int64]:
    """Return for each row of a bank where in the draft its key is already, or -1; only keys of equal hash are compared."""
    hashes, rows = other.stored.array("keys.hash"), other.stored.array("keys.row")
    known = np.full(len(other), -1, np.int64)
    for bank, places in placed:
        candidates = np.sort(np.asarray(rows[np.isin(hashes, bank.stored.array("keys.hash"))], np.int64))
        candidates = candidates[known[candidates] < 0]
        found = bank.find_rows(other.keys(candidates)) if len(candidates) else candidates
        known[candidates[found >= 0]] = places[found[found >= 0]]
    return known


def _shown(bank: MemoryBank, rows: NDArray[np.int64]) -> str:
    return ", ".join(map(repr, bank.keys(rows[:3])))


def _absorb(draft: Draft, theirs: Draft) -> None:
    """Append all segments of another draft, with its sources, concepts and mask."""
    first_row, first_source, start = draft.num_rows, len(draft.sources), 0
    draft.sources += theirs.sources
    hashes, rows = theirs.table()
    by_row = np.empty(theirs.num_rows, np.uint64)
    by_row[rows] = hashes
    active = theirs.active()
    for segment in theirs.segments:
        entries = theirs.segment_entries(segment)
        span = slice(start, start + segment.num_rows)
        start += segment.num_rows
        own = {what: p for what, p in entries.items() if not what.startswith("keys.") and what != "source"}
        draft.append(
            NewRows(
                num_rows=segment.num_rows,
                vectors=own,
                key_text=(streams.read(entries["keys.bytes"]), streams.read(entries["keys.offsets"])),
                hashes=by_row[span],
                sources=streams.read(entries["source"]).astype(np.int64) + first_source,
                active=None if active[span].all() else active[span],
                extras=segment.extras,
            )
        )
    draft.extend_concepts({name: members + first_row for name, members in theirs.concepts().items()})
