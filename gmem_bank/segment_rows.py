"""The snippets of a draft's segments as streams of chunks.

Of a dense bank these are its snippets in its space, of a factored one the raw reconstructions. Masked rows come too.

Shapes: N rows, n rows of a segment, b rows of a chunk, D dimensions, R rank.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, segments, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.draft import Draft
from gmem_bank.errors import ConfigError, CorruptError
from gmem_bank.kinds import FactoredBank
from gmem_bank.quality import SAMPLE_ROWS
from gmem_bank.space import all_finite
from gmem_bank.storage import Payload
from gmem_bank.storage.stored import Place

CHUNK_ROWS = 2048
CHUNK_BYTES = 16 << 20
SUMMED_ROWS = 1024
"""Whose bytes have one sum."""
FEWEST_CHUNK_ROWS = 64
MOST_WORKERS = 4
ROW_BYTES = 60
"""Held of every row: its norms, cosine, and place in the table of keys."""

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some neighbouring rows of a segment."""

    segment: int
    first: int
    """Row of the first one in the draft."""
    values: NDArray[np.float32]
    """(b, D), to be overwritten at will; where they are stored as coefficients, (b, R)."""
    digest: str = ""
    """Where entries are checked, the SHA-256 of the segment's float32 values from its first row to the chunk's last."""


@dataclass(frozen=True, kw_only=True)
class SegmentRows:
    """The rows of one segment."""

    number: int
    """Position among the segments."""
    first: int
    """Row of the first one in the draft."""
    num_rows: int
    dim: int
    space: str
    entries: Mapping[str, Payload]
    basis: NDArray[np.float32] | None
    """(R, D) of the bank that the segment came from; None: it is dense."""
    mean: NDArray[np.float32] | None
    path: str
    """Of that bank, for messages."""
    place: Place | None = None
    """Where float32 snippets lie as they are, to be read straight into chunks."""
    sums: dict[tuple[int, int], int] = field(default_factory=dict)
    """(first row, rows) → sum of their bytes when they were read, of a segment whose bytes at that time had the right hash."""

    def stored(self, *, check: bool) -> Iterator[NDArray[np.float32]]:
        """Yield (b, D) snippets, or (b, R) coefficients of a factored segment.

        Args:
            check: raise CorruptError at the end where an entry does not match its hash.
        """
        entries = {what: payload if check else replace(payload, sha256=None) for what, payload in self.entries.items()}
        if self.basis is not None:
            yield from streams.row_blocks(segments.coefficients_as_f32(entries, len(self.basis)))
            return
        yield from streams.row_blocks(segments.snippets_as_f32(entries["snippets"], self.space))

    def snippets(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (b, D) snippets from what `stored` gives."""
        if self.basis is None or self.mean is None:
            return values
        return factors.reconstruct(values, self.basis, self.mean)

    def chunks(self, size: int, *, check: bool = False) -> Iterator[Chunk]:
        """Yield chunks of `size` rows, the last one shorter.

        Args:
            size: rows.
            check: raise CorruptError in the place of the last chunk where an entry does not match its hash; or, of rows that
                were read and hashed before, where they are not what they were then.
        """
        row, digest, known = self.first, hashlib.sha256(), check and self._is_summed(size)
        read = rechunked(self.stored(check=check), size, self.num_rows) if self.place is None else self._read(size)
        for values, last in with_last(read):  # one chunk behind, so that what is checked at the end is so before it
            if known and sum_of(values) != self.sums[row, len(values)]:
                self._require_hash()
            if check and not known:
                digest.update(values.view(np.uint8).data.cast("B"))
                self._note_sums(row, values)
                if last and self.place is not None and digest.hexdigest() != self.entries["snippets"].sha256:
                    self._require_hash()
            yield Chunk(segment=self.number, first=row, values=values, digest=digest.hexdigest() if check else "")
            row += len(values)

    def _is_summed(self, size: int) -> bool:
        starts = range(0, self.num_rows, size)
        return all((self.first + start, min(size, self.num_rows - start)) in self.sums for start in starts)

    def _note_sums(self, row: int, values: NDArray[np.float32]) -> None:
        if self.place is not None:
            for start in range(0, len(values), SUMMED_ROWS):
                part = values[start : start + SUMMED_ROWS]
                self.sums[row + start, len(part)] = sum_of(part)

    def _require_hash(self) -> None:
        """Raise CorruptError: what was read is not what the bank's hash is of, or not what was read before."""
        for _ in streams.checked(self.entries["snippets"]):  # raises, in the words of all edits
            pass
        raise CorruptError(f"{self.path} was changed while it was read: run the same command again", path=self.path)

    def _read(self, size: int) -> Iterator[NDArray[np.float32]]:
        """Yield chunks as `chunks` does, one copy of the file's bytes and no more."""
        assert self.place is not None
        position = self.place.begin
        for start in range(0, self.num_rows, size):
            values = np.empty((min(size, self.num_rows - start), self.dim), np.float32)
            view = values.view(np.uint8).data.cast("B")
            while view:
                count = os.preadv(self.place.file.descriptor, [view], position)
                if not count:
                    raise CorruptError(f"{self.path} was cut short after it was opened", path=self.path)
                view, position = view[count:], position + count
            yield values

    def require_finite(self, chunk: Chunk, values: NDArray[np.float32]) -> None:
        """Raise CorruptError that names the first row of a chunk whose (b, …) values are not finite."""
        if all_finite(values):
            return
        row = chunk.first + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise CorruptError(
            f"{self.path}: the snippet of row {row} is not finite, so nothing is made from it: 'gmem-bank verify' lists what "
            "is wrong; build it again, or remove the row",
            path=self.path, row=row,
        )  # fmt: skip


def sum_of(values: NDArray[np.float32]) -> int:
    """Return the sum of the bytes of (b, D) rows in words of 64 bits, modulo 2^64: what tells a second reading from the first."""
    words = values.reshape(-1).view(np.uint32)
    even = len(words) // 2 * 2
    return (int(words[:even].view(np.uint64).sum()) + int(words[even:].sum())) % (1 << 64)


def rows_of(draft: Draft, banks: Sequence[MemoryBank], origins: Sequence[int]) -> list[SegmentRows]:
    """Return the rows of each segment of a draft.

    Args:
        draft: of the first bank, with the segments of the others appended.
        banks: all of them.
        origins: for each segment the bank that it came from.
    """
    found, first = [], 0
    for number, (segment, origin) in enumerate(zip(draft.segments, origins, strict=True)):
        bank = banks[origin]
        factored = bank if isinstance(bank, FactoredBank) else None
        entries = draft.segment_entries(segment)
        found.append(
            SegmentRows(
                number=number, first=first, num_rows=segment.num_rows, dim=bank.dim, space=bank.space,
                entries=entries, place=_plain_place(bank, entries) if len(banks) == 1 else None, path=str(bank.path),
                basis=None if factored is None else factored.basis, mean=None if factored is None else factored.mean,
            )
        )  # fmt: skip
        first += segment.num_rows
    return found


def _plain_place(bank: MemoryBank, entries: Mapping[str, Payload]) -> Place | None:
    """Return where the snippets of a segment lie in the only bank's file, where they are float32 and whole.

    Of several banks an entry's name says nothing: each has a segment "0".
    """
    snippets = entries.get("snippets")
    if snippets is None or snippets.dtype != "F32" or snippets.name not in bank.stored or sys.byteorder != "little":
        return None
    return bank.stored.place(snippets.name)


def rechunked(blocks: Iterable[NDArray[np.float32]], size: int, num_rows: int) -> Iterator[NDArray[np.float32]]:
    """Yield the rows of (b, D) blocks as new arrays of `size` rows each, the last one of what is left."""
    filled, chunk = 0, np.empty((0, 0), np.float32)
    for block in blocks:
        taken = 0
        while taken < len(block):
            if not filled:
                chunk = np.empty((min(size, num_rows), block.shape[1]), np.float32)
            part = block[taken : taken + len(chunk) - filled]
            chunk[filled : filled + len(part)] = part
            filled, taken = filled + len(part), taken + len(part)
            if filled == len(chunk):
                num_rows -= filled
                yield chunk
                filled = 0


def with_last(items: Iterable[Item]) -> Iterator[tuple[Item, bool]]:
    """Yield each item once the next one is there, and whether it is the last one, of which there is at least one."""
    rest = iter(items)
    held = next(rest)
    for item in rest:
        yield held, False
        held = item
    yield held, True


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much is held at a time."""

    chunk_rows: int
    num_workers: int
    sample_rows: int
    """Rows that neighbours are looked for among, at most."""


def plan_for(dim: int, num_rows: int, memory_limit: int | None = None) -> Plan:
    """Return how large chunks are, and how many threads work on them.

    Args:
        dim: D.
        num_rows: N.
        memory_limit: bytes of working memory, beyond what Python and its libraries take; None: chunks of 16 MiB.

    Raises:
        ConfigError: the limit has no room for the scatter matrix and its eigenvectors.
    """
    workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, MOST_WORKERS)
    row_bytes, sample = 4 * dim, SAMPLE_ROWS
    rows = max(FEWEST_CHUNK_ROWS, min(CHUNK_ROWS, CHUNK_BYTES // row_bytes))
    if memory_limit is not None:
        workers = min(workers, 2)
        fixed, share = 8 * dim * dim * (3 + workers) + ROW_BYTES * num_rows, row_bytes * (5 * workers + 4)
        room = (memory_limit - fixed) // share
        if room < FEWEST_CHUNK_ROWS:
            least = fixed + FEWEST_CHUNK_ROWS * share
            raise ConfigError(
                f"a memory limit of {memory_limit:,} bytes is too small for {num_rows:,} rows of {dim} dimensions: give at least "
                f"{least:,}",
                key="memory_limit",
            )
        rows = min(rows, room)
        sample = max(2, min(sample, (memory_limit - fixed) // (10 * row_bytes)))
    return Plan(chunk_rows=1 << (rows.bit_length() - 1), num_workers=workers, sample_rows=sample)
