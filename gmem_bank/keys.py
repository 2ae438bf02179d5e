"""Row keys as arrays: UTF-8 bytes with offsets, and a sorted table of 64-bit hashes that finds rows without a dictionary.

Shapes: N rows, B keys asked for, S bytes of key text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError, GMemError
from gmem_bank.naming import key_problem


def check_key(key: str) -> str:
    """Return the key; raises GMemError where it cannot be one."""
    problem = key_problem(key)
    if problem:
        raise GMemError(f"the key {key[:60]!r} {problem}: rename the file", key=key)
    return key


def encode(keys: Sequence[str]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the (S,) uint8 text and the (N+1,) int64 offsets of keys."""
    text = bytearray()
    offsets = np.zeros(len(keys) + 1, np.int64)
    for row, key in enumerate(keys, 1):
        text += check_key(key).encode()
        offsets[row] = len(text)
    return np.frombuffer(text, np.uint8), offsets


def decode(text: bytes, path: Path) -> str:
    """Return a stored key; raises CorruptError, naming the bank's path, where it is not UTF-8."""
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise CorruptError(f"{path}: the key {text[:40]!r} is not UTF-8", path=path) from error


def require_offsets(offsets: NDArray[np.int64], size: int, path: Path) -> NDArray[np.int64]:
    """Return the offsets; raises CorruptError where they do not cut a text of `size` bytes into keys."""
    if offsets[0] != 0 or offsets[-1] != size or (np.diff(offsets) < 1).any():
        raise CorruptError(f"{path}: the offsets of the keys are damaged", path=path, tensor="keys.offsets")
    return offsets


def filtered(
    text: NDArray[np.uint8], offsets: NDArray[np.int64], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Return the text and offsets of only those keys that the (N,) mask keeps."""
    lengths = np.diff(offsets)
    kept = np.zeros(int(mask.sum()) + 1, np.int64)
    np.cumsum(lengths[mask], out=kept[1:])
    return text[np.repeat(mask, lengths)], kept


def filtered_table(
    hashes: NDArray[np.uint64], rows: NDArray[np.int64], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the table of only those rows that the (N,) mask keeps, renumbered; nothing is hashed or sorted again."""
    stays = mask[rows]
    renumbered = np.cumsum(mask) - 1
    return hashes[stays], renumbered[rows[stays]].astype(np.int64)


def hashes_of(keys: Iterable[str]) -> NDArray[np.uint64]:
    """Return the (N,) uint64 hashes of keys: the first 8 bytes of blake2b(key, digest_size=8), little-endian."""
    digests = bytearray()
    for key in keys:
        digests += hashlib.blake2b(key.encode(errors="backslashreplace"), digest_size=8).digest()
    return np.frombuffer(digests, "<u8").astype(np.uint64)


def sorted_table(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the hashes ascending and the rows they belong to (equal hashes by row)."""
    order = np.argsort(hashes, kind="stable")
    return hashes[order], order.astype(np.int64)


def extended_table(
    hashes: NDArray[np.uint64], rows: NDArray[np.int64], new: NDArray[np.uint64], first_row: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return the table with new rows first_row, first_row+1, … merged in, without sorting the old ones again."""
    new_hashes, new_rows = sorted_table(new)
    positions = np.searchsorted(hashes, new_hashes, side="right")
    return np.insert(hashes, positions, new_hashes), np.insert(rows, positions, new_rows + first_row)


def duplicates(keys: Sequence[str]) -> list[str]:
    """Return the keys that occur more than once, each once, in order of first repetition."""
    seen: set[str] = set()
    twice = dict.fromkeys(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
    return list(twice)


def find(
    hashes: NDArray[np.uint64], rows: NDArray[np.int64], keys: Sequence[str],
    texts_of: Callable[[NDArray[np.int64]], Sequence[str]],
) -> NDArray[np.int64]:  # fmt: skip
    """Return the (B,) rows of keys by a sorted table, -1 where there is none; of equal keys the first.

    A hash is a hint: a row's own text decides, among all rows of the hash where several share it.

    Args:
        hashes: (N,) ascending.
        rows: (N,) that they belong to, equal hashes by row.
        keys: B.
        texts_of: (n,) rows → their keys.
    """
    wanted = hashes_of(keys)
    begins, ends = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
    found = np.full(len(keys), -1, np.int64)
    for further in range(int((ends - begins).max(initial=0))):
        places = np.flatnonzero((found < 0) & (begins + further < ends))
        candidates = rows[begins[places] + further]
        texts = texts_of(candidates)
        same = [text == keys[place] for text, place in zip(texts, places.tolist(), strict=True)]
        found[places[same]] = candidates[same]
    return found
