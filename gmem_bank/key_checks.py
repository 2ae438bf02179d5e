"""Whether the keys of a bank are what the format says: UTF-8, usable, unique, and found by their table.

Whole segments are looked at as arrays of bytes; only hashing takes one step a key.

Shapes: N rows, n rows of a segment, S bytes of key text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.keys import require_offsets, sorted_table
from gmem_bank.naming import MAX_KEY_BYTES, key_problem

KEYS_AT_A_TIME = 4096


def check_keys(bank: MemoryBank) -> Iterator[str]:
    """Yield a problem, or "", after each small step; raises GMemError where nothing more can be said."""
    hashes = np.empty(len(bank), np.uint64)
    first = 0
    for segment in bank.header.segments:
        text = bank.stored.array(segment.entry("keys.bytes"))
        offsets = bank.stored.array(segment.entry("keys.offsets"))
        require_offsets(offsets, len(text), bank.path)
        yield from _check_text(text, offsets)
        sources = bank.stored.array(segment.entry("source"))
        if int(sources.max()) >= len(bank.sources):
            yield f"segment {segment.name}: a row points at source {sources.max()} of {len(bank.sources)}"
        for start in range(0, segment.num_rows, KEYS_AT_A_TIME):
            stop = min(start + KEYS_AT_A_TIME, segment.num_rows)
            hashes[first + start : first + stop] = _hashes(text, offsets[start : stop + 1])
            yield ""
        first += segment.num_rows
    yield from _check_table(bank, hashes)


def _hashes(text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the hashes of consecutive keys, as `keys.hashes_of` makes them from text."""
    base = int(offsets[0])
    data, bounds = text[base : int(offsets[-1])].tobytes(), (offsets - base).tolist()
    blake2b = hashlib.blake2b
    digests = [blake2b(data[a:b], digest_size=8).digest() for a, b in pairwise(bounds)]
    return np.frombuffer(b"".join(digests), "<u8").astype(np.uint64)


def _check_text(text: NDArray[np.uint8], offsets: NDArray[np.int64]) -> Iterator[str]:
    data = text.tobytes()
    try:
        data.decode()
    except UnicodeDecodeError as error:
        yield f"the keys are not UTF-8 at byte {error.start}"
        return
    begins = text[offsets[:-1]]
    suspicious = (np.diff(offsets) > MAX_KEY_BYTES) | (begins == ord("/")) | ((begins & 0xC0) == 0x80)
    if b"\0" in data or b".." in data:
        suspicious[:] = True
    for place in np.flatnonzero(suspicious).tolist():
        key = data[int(offsets[place]) : int(offsets[place + 1])].decode(errors="replace")
        problem = key_problem(key)
        if (begins[place] & 0xC0) == 0x80:
            problem = "begins inside a character"
        if problem:
            yield f"the key {key[:80]!r} {problem}"


def _check_table(bank: MemoryBank, hashes: NDArray[np.uint64]) -> Iterator[str]:
    hashes, rows = sorted_table(hashes)
    for place in np.flatnonzero(
        hashes[1:] == hashes[:-1]
    ).tolist():  # equal hashes are rare and allowed, equal keys are not
        first, second = bank.keys(rows[place : place + 2])
        if first == second:
            yield f"the key {first!r} occurs twice"
    if not np.array_equal(hashes, bank.stored.array("keys.hash")):
        yield "the table of key hashes does not belong to the keys"
    if not np.array_equal(rows, bank.stored.array("keys.row")):
        yield "the rows in the table of key hashes do not belong to the keys"
