"""Work on a batch of images while the next ones are decoded: processes decode, one thread works, the caller writes.

Shapes: none here.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import tee
from typing import TypeVar

from gmem_bank.decode_pool import Decoded, DecodePool, decode_batch, default_workers
from gmem_bank.listing import Item
from gmem_bank.provenance import Json

WORTH_WORKERS = 256
"""Images from which on starting processes (0.2 s) pays."""
Result = TypeVar("Result")


def encoded_ahead(
    batches: Iterable[list[Item]],
    preprocessing: Mapping[str, Json],
    num_workers: int,
    work: Callable[[Sequence[Item], Decoded], Result],
) -> Generator[Result, None, None]:
    """Yield what `work` makes of each batch: its images, and what decoding gave.

    With worker processes, `work` runs in one thread of its own and its next batch waits for it there: a device does not idle
    while this thread waits for pixels and the caller writes. Without them everything runs here, one after the other.
    """
    if not num_workers:
        for own in batches:
            yield work(own, decode_batch(own, preprocessing))
        return
    waiting: deque[Future[Result]] = deque()
    ahead, asked = tee(batches)
    with DecodePool(preprocessing, num_workers) as pool, _one_thread() as thread:
        for own, decoded in zip(asked, pool.batches(ahead), strict=True):
            waiting.append(thread.submit(work, own, decoded))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _one_thread() -> Iterator[ThreadPoolExecutor]:
    """Give a thread for the encoder; at an interrupt what it has not begun is dropped."""
    executor = ThreadPoolExecutor(1, "encode")
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)


def workers_for(asked: int | None, num_missing: int) -> int:
    """Return how many processes decode: as asked, else one a core where there are enough images to be worth their start."""
    if asked is not None:
        return asked
    return default_workers() if num_missing >= WORTH_WORKERS else 0
