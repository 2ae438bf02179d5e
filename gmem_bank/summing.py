"""The first pass of a fit: the sums over a draft's rows that decide their principal directions, in bounded memory.

The fit looks at all rows, masked ones too: a mask can be taken back, and its rows should then read as well as others.

Shapes: N rows, n rows of a segment, b rows of a chunk, D dimensions, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from gmem_bank import moments
from gmem_bank.errors import CorruptError
from gmem_bank.moments import Moments, RunningSums, SumStore
from gmem_bank.progress import Progress, no_progress
from gmem_bank.segment_rows import Chunk, Plan, SegmentRows
from gmem_bank.threads import in_order

WIDE_PRODUCTS = 1 << 32
"""N·D² up to which products are taken in float64: it costs nothing that one would notice."""


def gather_moments(
    rows: Sequence[SegmentRows],
    plan: Plan,
    store: SumStore | None = None,
    progress: Progress = no_progress,
) -> Moments:
    """Return the moments of a draft's rows.

    Args:
        rows: of its segments.
        plan: how much to hold at a time.
        store: where an interrupted pass over dense rows is taken up; None: nowhere.
        progress: told rows done and rows in all.

    Raises:
        CorruptError: a row is not finite.
    """
    dense = [segment for segment in rows if segment.basis is None]
    found = _sum_dense(dense, plan, store, progress) if dense else moments.no_rows(rows[0].dim)
    for segment in rows:
        if segment.basis is not None:
            found = found.merged(_sum_coefficients(segment, plan))
            progress(segment.first + segment.num_rows, rows[-1].first + rows[-1].num_rows)
    return found


class _OtherBytesError(Exception):
    """What is read now is not what kept sums are of."""


def _sum_dense(rows: Sequence[SegmentRows], plan: Plan, store: SumStore | None, progress: Progress) -> Moments:
    kept = store.load(rows[0].dim) if store is not None else None
    with contextlib.suppress(_OtherBytesError):
        if kept is not None:
            return _sum_on(rows, plan, store, progress, kept)
    return _sum_on(rows, plan, store, progress, (RunningSums(rows[0].dim), 0, ""))


def _sum_on(
    rows: Sequence[SegmentRows], plan: Plan, store: SumStore | None, progress: Progress, begun: tuple[RunningSums, int, str]
) -> Moments:  # fmt: skip
    num_rows, dim = sum(segment.num_rows for segment in rows), rows[0].dim
    wide = num_rows * dim * dim <= WIDE_PRODUCTS
    sums, finished, read = begun

    def work(chunk: Chunk) -> tuple[moments.ChunkSums, str]:
        found = moments.sum_chunk(chunk.values, wide=wide)
        if not np.isfinite(found.gram).all():
            _require_finite(rows, chunk)
        return found, chunk.digest

    done = finished
    progress(min(finished * plan.chunk_rows, num_rows), num_rows)
    with contextlib.closing(in_order(plan.num_workers, work, _chunks_from(rows, plan, finished, read))) as parts:
        for found, read in parts:
            sums.add(found)
            done += 1
            if store is not None:
                store.save(sums, done, read)
            progress(min(done * plan.chunk_rows, num_rows), num_rows)
    if store is not None and done > finished:
        store.save(sums, done, read, final=True)
    return sums.moments()


def _require_finite(rows: Sequence[SegmentRows], chunk: Chunk) -> None:
    """Name the row whose sums are not finite; the chunk's values have been shifted, which leaves NaN and infinity as they are."""
    segment = next(segment for segment in rows if segment.number == chunk.segment)
    segment.require_finite(chunk, chunk.values)
    raise CorruptError(f"{segment.path}: rows from {chunk.first} on have values whose squares float64 cannot hold")


def _chunks_from(rows: Sequence[SegmentRows], plan: Plan, finished: int, read: str) -> Iterator[Chunk]:
    """Yield the chunks after the first `finished` ones, every entry checked against its hash before its last chunk.

    Of a segment taken up in its middle the first rows are read again; another digest than `read` raises `_OtherBytesError`.
    """
    for segment in rows:
        count = -(-segment.num_rows // plan.chunk_rows)
        if finished >= count:
            finished -= count
            continue
        for number, chunk in enumerate(segment.chunks(plan.chunk_rows, check=True), 1):
            if number > finished:
                yield chunk
            elif number == finished and chunk.digest != read:
                raise _OtherBytesError
        finished = 0


def _sum_coefficients(segment: SegmentRows, plan: Plan) -> Moments:
    """Return the moments of a factored segment's reconstructions, exactly: in float64, and in its own few dimensions."""
    assert segment.basis is not None
    assert segment.mean is not None
    rank = len(segment.basis)
    count, total, gram = 0, np.zeros(rank), np.zeros((rank, rank))
    for chunk in segment.chunks(plan.chunk_rows, check=True):
        segment.require_finite(chunk, chunk.values)
        values = chunk.values.astype(np.float64)
        count, total = count + len(values), total + values.sum(axis=0)
        gram += values.T @ values
    return moments.from_coefficients(count, total, gram, segment.basis, segment.mean)
