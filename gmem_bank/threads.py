"""Items read ahead and worked on by threads, in order; and linear algebra with one thread a call."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Limit:
    """The limit that is set while any caller is within; threadpoolctl's own would be lifted in the order of its setting."""

    lock = threading.Lock()
    depth = 0
    held: Any = None


@contextlib.contextmanager
def one_thread_a_product() -> Iterator[None]:
    """Let linear algebra use one thread a call: results then do not depend on how many cores there are.

    Small calls are faster so, too: threads that wait for each other on busy cores lose milliseconds a call. The limit is the
    process's: it is set by the first of several callers at a time, and lifted by the last.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with _Limit.lock:
        if not _Limit.depth:
            _Limit.held = threadpool_limits(1, user_api="blas")
        _Limit.depth += 1
    try:
        yield
    finally:
        with _Limit.lock:
            _Limit.depth -= 1
            if not _Limit.depth:
                _Limit.held.restore_original_limits()


def read_ahead(items: Iterable[Item], most: int) -> Generator[Item]:
    """Yield items that another thread gets, up to `most` ahead; what it raises is raised here."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(most)
    stopped = threading.Event()

    def put(entry: tuple[bool, Any]) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(entry, timeout=0.1)
                return

    def run() -> None:
        try:
            for item in items:
                put((True, item))
                if stopped.is_set():
                    return
            put((False, None))
        except BaseException as error:  # noqa: BLE001 - raised again where the items are asked for
            put((False, error))

    reader = threading.Thread(target=run, daemon=True)
    reader.start()
    try:
        while (entry := ready.get())[0]:
            yield entry[1]
        if entry[1] is not None:
            raise entry[1]
    finally:
        stopped.set()
        reader.join()


def in_order(num_workers: int, work: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """Yield what `work` makes of each item, in order, a few at a time in threads; another one reads the items.

    Each thread's products have one thread of their own, so that results do not depend on how many cores there are. A caller who
    may stop early closes it, or threads and limit outlast the call.
    """
    waiting: deque[Future[Result]] = deque()
    ahead = contextlib.closing(read_ahead(items, 1))
    with one_thread_a_product(), ThreadPoolExecutor(num_workers) as pool, ahead as ready:
        try:
            for item in ready:
                waiting.append(pool.submit(work, item))
                if len(waiting) > num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
