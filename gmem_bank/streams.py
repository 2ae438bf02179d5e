"""Entries as streams: filtered, joined and re-coded row by row while they are copied, never loaded whole.

What is made from a stored entry is checked against that entry's hash as it passes; a damaged one stops the writing before
anything takes its place.

Shapes: n rows of an entry, b rows of a block.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError
from gmem_bank.storage.payload import NUMPY_DTYPE, Payload

BLOCK_BYTES = 4 << 20


def checked(payload: Payload) -> Iterator[bytes | memoryview]:
    """Yield a payload's bytes; raises CorruptError at the end where they do not match the hash that it came with."""
    if payload.sha256 is None:
        yield from payload.blocks()
        return
    digest = hashlib.sha256()
    for block in payload.blocks():
        digest.update(block)
        yield block
    if digest.hexdigest() != payload.sha256:
        raise CorruptError(
            f"{payload.label or 'an entry'} does not match its hash, so nothing is made from it: restore the bank from a copy "
            "or build it again"
        )


def verified(payload: Payload) -> Payload:
    """Return the payload, its bytes checked against its hash while they are copied."""
    return replace(payload, blocks=lambda: checked(payload), part=None, name="")


def read(payload: Payload) -> NDArray[Any]:
    """Return a payload as a new array; raises CorruptError where it does not match its hash."""
    data = b"".join(checked(payload))
    return np.frombuffer(bytearray(data), NUMPY_DTYPE[payload.dtype]).reshape(payload.shape)


def row_blocks(payload: Payload) -> Iterator[NDArray[Any]]:
    """Yield (b, …) read-only arrays of whole rows in the stored type; raises CorruptError as `checked` does."""
    dtype = np.dtype(NUMPY_DTYPE[payload.dtype])
    row_bytes = dtype.itemsize * math.prod(payload.shape[1:])
    rest = b""
    for block in checked(payload):
        data = rest + bytes(block) if rest else block
        whole = len(data) // row_bytes * row_bytes
        if whole:
            yield np.frombuffer(memoryview(data)[:whole], dtype).reshape(-1, *payload.shape[1:])
        rest = bytes(memoryview(data)[whole:])


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).view(np.uint8).data.cast("B")


def mapped(
    payload: Payload, change: Callable[[NDArray[Any]], NDArray[Any]], dtype: str, shape: tuple[int, ...]
) -> Payload:
    """Return a payload of `shape` and `dtype` whose row blocks are `change` of the old one's."""

    def blocks() -> Iterator[memoryview]:
        for block in row_blocks(payload):
            changed = change(block)
            if changed.size:
                yield _bytes(changed)

    return Payload(dtype=dtype, shape=shape, blocks=blocks)


def filtered(payload: Payload, keep: NDArray[np.bool_]) -> Payload:
    """Return only the rows that the (n,) mask keeps; the payload itself, hash included, where it keeps all."""
    if keep.all():
        return payload

    def blocks() -> Iterator[memoryview]:
        start = 0
        for block in row_blocks(payload):
            kept = block[keep[start : start + len(block)]]
            start += len(block)
            if len(kept):
                yield _bytes(kept)

    return replace(payload, shape=(int(keep.sum()), *payload.shape[1:]), blocks=blocks, sha256=None, part=None, name="")


def sliced(payload: Payload, begin: int, end: int) -> Payload:
    """Return rows begin to end; the payload itself where that is all of them.

    Of a stored entry only those rows are read, so they are not checked: whoever cuts one checks it whole, once.
    """
    if (begin, end) == (0, payload.shape[0]):
        return payload
    part = payload.part
    if part is not None:
        row_bytes = np.dtype(NUMPY_DTYPE[payload.dtype]).itemsize * math.prod(payload.shape[1:])
        shape = (end - begin, *payload.shape[1:])
        own = lambda: part(begin * row_bytes, end * row_bytes)  # noqa: E731
        return replace(payload, shape=shape, blocks=own, sha256=None, part=None, name="")
    keep = np.zeros(payload.shape[0], np.bool_)
    keep[begin:end] = True
    return filtered(payload, keep)


def chained(payloads: Sequence[Payload]) -> Payload:
    """Return the rows of several payloads of one type and row shape, one after the other."""
    if len(payloads) == 1:
        return payloads[0]
    first = payloads[0]
    assert len({(p.dtype, p.shape[1:]) for p in payloads}) == 1, "only alike entries can be joined"
    return Payload(
        dtype=first.dtype,
        shape=(sum(p.shape[0] for p in payloads), *first.shape[1:]),
        blocks=lambda: (block for payload in payloads for block in checked(payload)),
    )


def widened(payload: Payload, columns: int) -> Payload:
    """Return an (n, m) payload with zeros added on the right up to `columns`."""
    if payload.shape[1] == columns:
        return payload
    missing = columns - payload.shape[1]
    return mapped(payload, lambda b: np.pad(b, ((0, 0), (0, missing))), payload.dtype, (payload.shape[0], columns))
