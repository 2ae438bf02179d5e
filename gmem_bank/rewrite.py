"""A new bank file from an old one: append a segment, or keep some of the rows. Nothing that stays is loaded.

Shapes: N rows of the old bank, n rows of a segment.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank import segments
from gmem_bank.bank import MemoryBank
from gmem_bank.provenance import EncoderSpec, Json, Source, relative_to_bank
from gmem_bank.storage import Payload, atomic, real_target, write
from gmem_bank.storage.schema import Header, Segment

BANK_WIDE = ("keys.hash", "keys.row", "concepts.rows", "concepts.offsets", "active")
"""Entries that belong to no segment and are written anew by every edit."""
BLOCK_BYTES = 16 << 20


def _relocated(bank: MemoryBank, target: Path) -> tuple[EncoderSpec, tuple[Source, ...]]:
    """Return encoder and sources with their paths relative to where the new bank will lie."""
    if target.resolve().parent == bank.folder:
        return bank.encoder, bank.sources

    def move(path: str) -> str:
        return relative_to_bank(bank.folder / path, target.parent)

    encoder, weights = bank.encoder, bank.encoder.weights_path
    moved = encoder if weights is None else replace(encoder, weights_path=move(weights))
    return moved, tuple(s if s.path is None else replace(s, path=move(s.path)) for s in bank.sources)


def _history(bank: MemoryBank, entry: Mapping[str, Json]) -> tuple[Mapping[str, Json], ...]:
    return (*bank.history, {**entry, "parent": bank.fingerprint})


def _copied(bank: MemoryBank, *without: str) -> dict[str, Payload]:
    stored = bank.stored
    return {name: stored.payload(name) for name in stored.names() if name not in without}


def save(bank: MemoryBank, output: str | os.PathLike[str]) -> Header:
    """Write a bank to another file; source paths are made relative to the new place, history and rows stay.

    Args:
        bank: an open bank.
        output: where to; an existing file is replaced atomically.

    Returns:
        The header as written; its fingerprint is the bank's unless a source path changed.

    Raises:
        FormatError: the suffix names no kind of bank file.
        LockedError, WriteError: another writer, or no room; what was there stands.
    """
    target = real_target(output)
    with atomic.locked(target):
        encoder, sources = _relocated(bank, target)
        return write(target, replace(bank.header, encoder=encoder, sources=sources), _copied(bank))


def append_segment(
    bank: MemoryBank,
    target: Path,
    concept: str,
    keys: Sequence[str],
    sources: Sequence[Source],
    source_ids: NDArray[np.int64],
    snippets: Payload,
    entry: Mapping[str, Json],
) -> Header:
    """Write the bank with one more segment and one more concept; old segments are copied, not loaded."""
    bank.stored.require_sound(*(name for name in BANK_WIDE if name in bank.stored))
    segment = Segment(name=str(1 + max(_number(s.name) for s in bank.header.segments)), num_rows=len(keys))
    encoder, old_sources = _relocated(bank, target)
    concepts = {name: bank.all_rows_of(name) for name in bank.names}
    concepts[concept] = np.arange(len(bank), len(bank) + len(keys), dtype=np.int64)
    header = replace(
        bank.header, segments=(*bank.header.segments, segment), encoder=encoder, sources=(*old_sources, *sources),
        concepts=tuple(concepts), history=_history(bank, entry),
    )  # fmt: skip
    table = key_tables.extended_table(
        bank.stored.array("keys.hash"), bank.stored.array("keys.row"), key_tables.hashes_of(keys), len(bank)
    )
    payloads = _copied(bank, *BANK_WIDE)
    payloads |= segments.segment_payloads(
        segment.name, key_tables.encode(keys), source_ids + len(old_sources), snippets
    )
    payloads |= segments.key_table_payloads(*table) | segments.concept_payloads(concepts)
    if "active" in bank.stored:
        payloads["active"] = Payload.of(np.concatenate([bank.stored.array("active"), np.ones(len(keys), np.bool_)]))
    return write(target, header, payloads)


def _number(name: str) -> int:
    return int(name) if name.isascii() and name.isdigit() else -1


def concepts_after(bank: MemoryBank, keep: NDArray[np.bool_], *, without: str) -> dict[str, NDArray[np.int64]]:
    """Return the concepts but one with their rows renumbered after only `keep` (N,) stays; those left empty are gone."""
    new_row = np.cumsum(keep) - 1
    rows = {name: bank.all_rows_of(name) for name in bank.names if name != without}
    kept = {name: new_row[members[keep[members]]] for name, members in rows.items()}
    return {name: members for name, members in kept.items() if len(members)}


def keep_rows(
    bank: MemoryBank,
    target: Path,
    keep: NDArray[np.bool_],
    concepts: Mapping[str, NDArray[np.int64]],
    entry: Mapping[str, Json],
) -> Header:
    """Write the bank with only some of its rows; a segment that loses none is copied, one that loses all is dropped."""
    bank.stored.require_sound(*(name for name in BANK_WIDE if name in bank.stored))
    payloads = _copied(bank, *BANK_WIDE)
    encoder, sources = _relocated(bank, target)
    used = np.unique(bank.source_ids(np.flatnonzero(keep)))
    kept_segments, start = [], 0
    for segment in bank.header.segments:
        mask = keep[start : start + segment.num_rows]
        start += segment.num_rows
        if not mask.all():
            payloads = {name: payload for name, payload in payloads.items() if not name.startswith(f"{segment.name}/")}
        if mask.any():
            kept_segments.append(Segment(name=segment.name, num_rows=int(mask.sum())))
        if mask.any() and not (mask.all() and len(used) == len(sources)):
            payloads |= _filtered(bank, segment, mask, used)
    payloads |= segments.concept_payloads(concepts)
    table = key_tables.filtered_table(bank.stored.array("keys.hash"), bank.stored.array("keys.row"), keep)
    payloads |= segments.key_table_payloads(*table)
    if "active" in bank.stored:
        payloads["active"] = Payload.of(np.asarray(bank.stored.array("active"))[keep])
    header = replace(
        bank.header, segments=tuple(kept_segments), encoder=encoder, sources=tuple(sources[index] for index in used),
        concepts=tuple(concepts), history=_history(bank, entry),
    )  # fmt: skip
    return write(target, header, payloads)


def _filtered(
    bank: MemoryBank, segment: Segment, mask: NDArray[np.bool_], used: NDArray[np.int64]
) -> dict[str, Payload]:
    """Return a segment's entries with only the rows of `mask`, its sources renumbered by their place in `used`."""
    name, stored, local = segment.name, bank.stored, np.flatnonzero(mask)
    stored.require_sound(*(segment.entry(what) for what in ("snippets", "keys.bytes", "keys.offsets", "source")))
    vectors = stored.array(f"{name}/snippets")
    step = max(1, BLOCK_BYTES // (vectors.shape[1] * vectors.dtype.itemsize))
    snippets = Payload(
        dtype=stored.dtype(f"{name}/snippets"),
        shape=(len(local), bank.dim),
        blocks=lambda: (
            np.ascontiguousarray(vectors[local[i : i + step]]).view(np.uint8).data.cast("B")
            for i in range(0, len(local), step)
        ),
    )
    key_text = key_tables.filtered(stored.array(f"{name}/keys.bytes"), stored.array(f"{name}/keys.offsets"), mask)
    source_ids = np.searchsorted(used, stored.array(f"{name}/source")[mask])
    whole = stored.payload(f"{name}/snippets")
    return segments.segment_payloads(name, key_text, source_ids, whole if mask.all() else snippets)
