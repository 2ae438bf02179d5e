"""Undo the last edit of a bank: what was appended is dropped again, anything else is taken from the state that was kept.

Either way the bank is then, byte for byte, the file that it was.

Shapes: N rows.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gmem_bank import keys as key_tables
from gmem_bank import kinds, segments, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.editing import EditReport, labels_needed
from gmem_bank.errors import CorruptError, GMemError
from gmem_bank.storage import Payload, atomic, previous, real_target, write
from gmem_bank.storage.rules import BANK_WIDE
from gmem_bank.storage.schema import Header


def undo(bank_path: str | os.PathLike[str], *, dry_run: bool = False) -> EditReport:
    """Take back the last edit; the bank is byte for byte what it was before it.

    Args:
        bank_path: the bank.
        dry_run: say what would be undone, and write nothing.

    Raises:
        GMemError: there is no edit, or the bank before it is no longer kept.
        LockedError, WriteError: another writer, or the disk refused; the bank stands.
    """
    target = real_target(bank_path)
    kinds.open(target)  # where there is no bank, no folder is made for its lock
    with contextlib.nullcontext() if dry_run else atomic.locked(target):
        bank = kinds.open(target)
        if len(bank.history) < 2 or "parent" not in bank.history[-1]:
            raise GMemError(f"{target}: nothing to undo, it is as {_first_operation(bank)} left it", path=target)
        last = bank.history[-1]
        before = _truncate(bank, last, dry_run) if "appended" in last else _restore(bank, last, dry_run)
        if not dry_run:
            previous.tidy(target, labels_needed(before))
    return EditReport(
        operation="undo", bank=str(bank_path), output=str(target), num_rows=before.num_rows, dry_run=dry_run,
        num_removed=max(0, len(bank) - before.num_rows), num_added=max(0, before.num_rows - len(bank)),
        details={"undone": last["operation"], "arguments": last.get("arguments", {})}, fingerprint=before.fingerprint,
    )  # fmt: skip


def _first_operation(bank: MemoryBank) -> str:
    return f"'{bank.history[0]['operation']}'" if bank.history else "its maker"


def _restore(bank: MemoryBank, last: Mapping[str, Any], dry_run: bool) -> Header:
    label = f"{len(bank.history) - 1}-{str(last['parent'])[:12]}"
    if label not in previous.labels(bank.path):
        raise GMemError(
            f"{bank.path}: the bank before {last['operation']!r} is not kept. Of edits that do more than append only the last "
            "can be undone, once, and not where it was made with --no-undo or with -o, or the file was moved since",
            path=bank.path,
        )
    kept = previous.open_previous(bank.path, label)
    for payload in kept.payloads().values():  # a damaged state must not take the place of a sound bank
        for _ in streams.checked(payload):
            pass
    header = kept.header
    if header.fingerprint != last["parent"] or header.history != bank.history[:-1]:
        raise GMemError(f"{bank.path}: the state kept is not the one before {last['operation']!r}", path=bank.path)
    if not dry_run:
        previous.restore(bank.path, label)
    return header


def _truncate(bank: MemoryBank, last: Mapping[str, Any], dry_run: bool) -> Header:
    """Write the bank without what its last edit appended; its fingerprint proves that it is the same as before."""
    header, payloads = _front(bank, last["appended"])
    hashes = {name: payload.sha256 or _hash_of(payload) for name, payload in payloads.items()}
    header = replace(header, hashes=hashes)
    if header.fingerprint != last["parent"]:
        raise GMemError(
            f"{bank.path}: without what {last['operation']!r} appended it is not the bank that was there before: the edit was "
            "made with -o from another place, where that bank still is",
            path=bank.path,
        )
    if not dry_run:
        write(bank.path, replace(header, hashes={}), payloads)
    return header


def _front(bank: MemoryBank, appended: Mapping[str, Any]) -> tuple[Header, dict[str, Payload]]:
    """Return header and entries of the bank with the ends of its lists cut off."""
    old = bank.header
    kept = old.segments[: len(old.segments) - _count(appended, "segments")]
    if not kept:
        raise CorruptError(f"{bank.path}: its history says that every segment was appended", path=bank.path)
    gone = tuple(f"{segment.name}/" for segment in old.segments[len(kept) :])
    num_rows = sum(segment.num_rows for segment in kept)
    names = old.concepts[: len(old.concepts) - _count(appended, "concepts")]
    version = appended.get("version", list(old.version))
    header = replace(
        old, version=(version[0], version[1]), segments=kept, concepts=names, history=old.history[:-1],
        sources=old.sources[: len(old.sources) - _count(appended, "sources")],
    )  # fmt: skip
    stored = bank.stored
    payloads = {n: p for n, p in stored.payloads().items() if n not in BANK_WIDE and not n.startswith(gone or ("/",))}
    keep = np.arange(len(bank)) < num_rows
    table = streams.read(stored.payload("keys.hash")), streams.read(stored.payload("keys.row"))
    payloads |= segments.key_table_payloads(*key_tables.filtered_table(*table, keep))
    members = {name: bank.all_rows_of(name) for name in names}
    payloads |= segments.concept_payloads({name: rows[rows < num_rows] for name, rows in members.items()})
    if "active" in stored and not appended.get("active"):
        payloads["active"] = streams.sliced(stored.payload("active"), 0, num_rows)
    for name in ("basis", "singular_values"):
        if name in payloads and _count(appended, "rank"):
            payloads[name] = streams.sliced(payloads[name], 0, payloads[name].shape[0] - _count(appended, "rank"))
    return header, payloads


def _count(appended: Mapping[str, Any], what: str) -> int:
    count = appended.get(what, 0)
    if type(count) is not int or count < 0:
        raise CorruptError(f"the history says that {count!r} {what} were appended")
    return count


def _hash_of(payload: Payload) -> str:
    import hashlib

    digest = hashlib.sha256()
    for block in payload.blocks():
        digest.update(block)
    return digest.hexdigest()
