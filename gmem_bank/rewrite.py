"""The same bank in another place, form or cut: save (convert), shard, compact. No value changes.

Shapes: n rows of a segment, R_k columns, m kept coefficients.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from gmem_bank import kinds, segments, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.draft import MAX_SEGMENTS, Draft
from gmem_bank.editing import EditReport, editing, labels_needed
from gmem_bank.errors import ConfigError, GMemError, OutputExistsError
from gmem_bank.keys import filtered as filtered_keys
from gmem_bank.keys import require_offsets
from gmem_bank.storage import Payload, atomic, previous, real_target, write
from gmem_bank.storage.schema import Header, Segment

KNOWN = {"snippets", "coefficients", "values", "index", "scale", "keys.bytes", "keys.offsets", "source"}
"""What a segment may hold, as far as this version knows."""


def save(bank: MemoryBank, output: str | os.PathLike[str], *, overwrite: bool = True) -> Header:
    """Write a bank to another file or folder, in the form that the suffix names; rows, values and history stay.

    Args:
        bank: an open bank.
        output: .safetensors, .h5 or .gmem (a folder); source paths are made relative to it.
        overwrite: False refuses where something is there.

    Returns:
        The header as written; its fingerprint is the bank's unless a source path changed.

    Raises:
        FormatError: the suffix names no kind of bank.
        OutputExistsError: something is there, and overwriting was not asked for.
        LockedError, WriteError: another writer, or no room; what was there stands.
    """
    target = real_target(output)
    with atomic.locked(target):
        header, payloads = Draft(bank, target).finish(None)
        if not overwrite and target.exists():
            return _there_already(target, replace(header, hashes=bank.header.hashes))
        if target.exists() and target.resolve() == bank.path.resolve():
            _require_unchanged(bank)
        written = write(target, header, {name: streams.verified(payload) for name, payload in payloads.items()})
        previous.tidy(target, labels_needed(written))
        return written


def _require_unchanged(bank: MemoryBank) -> None:
    """Raise GMemError where the file is no longer the bank that was opened: writing that one back would undo an edit."""
    there = kinds.open(bank.path).header
    if (there.fingerprint, there.history) != (bank.fingerprint, bank.header.history):
        raise GMemError(f"{bank.path} was edited since it was opened: open it again", path=bank.path)


def _there_already(target: Path, wanted: Header) -> Header:
    """Return the header of the bank at a path if it is the one that would be written; raises OutputExistsError."""
    with contextlib.suppress(GMemError):
        found = kinds.open(target).header
        if found.to_json() == wanted.to_json():
            return found
    raise OutputExistsError(f"{target} exists: choose another name, or give --overwrite", path=target)


def shard(
    bank_path: str | os.PathLike[str], output: str | os.PathLike[str], *, rows_per_segment: int | None = None
) -> EditReport:
    """Write a bank as a folder with one file a segment.

    Args:
        bank_path: the bank.
        output: folder to write, ending in .gmem.
        rows_per_segment: cut segments that have more rows; None keeps them as they are, and the bank's fingerprint with them.

    Raises:
        ConfigError: rows_per_segment below 1, or so low that more segments would be made than the format is meant for.
    """
    if rows_per_segment is not None and rows_per_segment < 1:
        raise ConfigError(f"rows_per_segment must be at least 1, got {rows_per_segment}", key="rows_per_segment")
    if rows_per_segment is None:
        return _as_it_is(bank_path, output)
    with editing(bank_path, "shard", {"rows_per_segment": rows_per_segment}, output=output) as edit:
        if edit.made is not None:
            return edit.unchanged()
        draft = edit.draft()
        parts = [part for segment in draft.segments for part in _cut(draft, segment, rows_per_segment)]
        if len(parts) > MAX_SEGMENTS:
            raise ConfigError(
                f"{rows_per_segment} rows a segment makes {len(parts)} segments, more than {MAX_SEGMENTS}: take more rows",
                key="rows_per_segment",
            )
        draft.replace_segments(_numbered(parts))
        return edit.finish(draft, num_rows=len(edit.bank), details={"num_segments": len(parts)})


def _as_it_is(bank_path: str | os.PathLike[str], output: str | os.PathLike[str]) -> EditReport:
    header = save(kinds.open(bank_path), output, overwrite=False)
    return EditReport(
        operation="shard", bank=str(bank_path), output=str(output), num_rows=header.num_rows,
        details={"num_segments": len(header.segments)}, fingerprint=header.fingerprint,
    )  # fmt: skip


def _numbered(parts: Sequence[tuple[Segment, dict[str, Payload]]]) -> list[tuple[Segment, dict[str, Payload]]]:
    return [
        (Segment(name=str(number), num_rows=segment.num_rows, extras=segment.extras), entries)
        for number, (segment, entries) in enumerate(parts)
    ]


def _cut(draft: Draft, segment: Segment, rows: int) -> list[tuple[Segment, dict[str, Payload]]]:
    entries = draft.segment_entries(segment)
    if set(entries) - KNOWN:
        odd = sorted(set(entries) - KNOWN)[0]
        raise GMemError(
            f"{draft.bank.path}: segment {segment.name} has an entry {odd!r} of a later version: it is not cut"
        )
    bounds = [*range(0, segment.num_rows, rows), segment.num_rows]
    if len(bounds) == 2:
        return [(segment, entries)]
    for payload in entries.values():
        for _ in streams.checked(payload):  # once for all parts
            pass
    text, offsets = streams.read(entries["keys.bytes"]), streams.read(entries["keys.offsets"])
    require_offsets(offsets, len(text), draft.bank.path)
    parts = []
    for begin, end in pairwise(bounds):
        own = {
            what: streams.sliced(payload, begin, end)
            for what, payload in entries.items()
            if not what.startswith("keys.") and what != "scale"
        }
        own |= {"scale": entries["scale"]} if "scale" in entries else {}
        mask = (np.arange(segment.num_rows) >= begin) & (np.arange(segment.num_rows) < end)
        kept_text, kept_offsets = filtered_keys(text, offsets, mask)
        own |= {"keys.bytes": Payload.of(kept_text), "keys.offsets": Payload.of(kept_offsets)}
        parts.append((Segment(name="0", num_rows=end - begin, extras=segment.extras), own))
    return parts


def compact(
    bank_path: str | os.PathLike[str],
    *,
    output: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Join the segments of a bank; with a file as output a folder of shards becomes one file.

    Neighbouring segments of one type are joined exactly. Where i8 segments have different scales, or types differ, they stay
    apart, and the report says how many segments are left.

    Args:
        bank_path: the bank.
        output: bank to write; default: replace the bank.
        dry_run: write nothing.
        undo: keep the bank as it was for `undo`.
    """
    with editing(bank_path, "compact", {}, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None or (edit.in_place and len(edit.bank.header.segments) == 1):
            count = len(edit.bank.header.segments)
            return edit.unchanged(details={"segments_before": count, "num_segments": count})
        draft = edit.draft()
        before = len(draft.segments)
        join_segments(draft)
        return edit.finish(
            draft, num_rows=len(edit.bank), details={"segments_before": before, "num_segments": len(draft.segments)}
        )


def join_segments(draft: Draft) -> None:
    """Join neighbouring segments that are alike; where more than MAX_SEGMENTS are left, join all of them as f32."""
    alike = [list(run) for _, run in groupby(draft.segments, key=lambda s: _alike(draft.segment_entries(s)))]
    if len(alike) > MAX_SEGMENTS:
        entries = [_as_f32(draft, segment) for segment in draft.segments]
        parts = [_joined(draft.segments, entries)]
    else:
        parts = [_joined(run, [draft.segment_entries(segment) for segment in run]) for run in alike]
    draft.replace_segments(_numbered(parts))


def join_if_many(draft: Draft) -> None:
    """Join segments where an edit has made more than MAX_SEGMENTS of them."""
    if len(draft.segments) > MAX_SEGMENTS:
        join_segments(draft)


def _alike(entries: dict[str, Payload]) -> tuple[Any, ...]:
    """Return what two segments must share to be joined without a change of value."""
    if set(entries) - KNOWN:  # of a later minor version: kept as they are
        return tuple(sorted(entries)), id(entries)
    kinds_of = tuple((what, entries[what].dtype) for what in ("snippets", "coefficients", "values") if what in entries)
    return (*kinds_of, streams.read(entries["scale"]).tobytes() if "scale" in entries else b"")


def _joined(run: Sequence[Segment], entries: Sequence[dict[str, Payload]]) -> tuple[Segment, dict[str, Payload]]:
    if len(run) == 1:
        return run[0], entries[0]
    own: dict[str, Payload] = {}
    for what in ("snippets", "coefficients", "values", "index"):
        if what in entries[0]:
            columns = max(e[what].shape[1] for e in entries)
            own[what] = streams.chained([streams.widened(e[what], columns) for e in entries])
    if "scale" in entries[0]:
        own["scale"] = entries[0]["scale"]
    own["source"] = streams.chained([e["source"] for e in entries])
    own["keys.bytes"] = streams.chained([e["keys.bytes"] for e in entries])
    own["keys.offsets"] = Payload.of(_joined_offsets([streams.read(e["keys.offsets"]) for e in entries]))
    return Segment(name="0", num_rows=sum(segment.num_rows for segment in run)), own


def _joined_offsets(offsets: Sequence[Any]) -> Any:
    joined, start = [np.zeros(1, np.int64)], 0
    for own in offsets:
        joined.append(own[1:] + start)
        start += int(own[-1])
    return np.concatenate(joined)


def _as_f32(draft: Draft, segment: Segment) -> dict[str, Payload]:
    """Return a segment with its rows as f32 snippets or coefficients, exactly those that are read from it now."""
    entries = draft.segment_entries(segment)
    own = {what: p for what, p in entries.items() if what in ("keys.bytes", "keys.offsets", "source")}
    if "snippets" in entries:
        own["snippets"] = segments.snippets_as_f32(entries["snippets"], draft.bank.header.space)
    else:
        own["coefficients"] = segments.coefficients_as_f32(entries, draft.payloads["basis"].shape[0])
    return own
