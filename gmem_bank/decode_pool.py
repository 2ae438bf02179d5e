"""Images decoded ahead of the encoder by worker processes, in the order of the listing and in bounded memory.

Workers are plain programs on pipes (see `decode_worker`): each has one thread here to talk to it, and one inside. A worker that
dies takes nothing with it but its job, which is given to a new one once.

Shapes: S×S pixels of a crop.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.decode_worker import decode_one, record_of
from gmem_bank.errors import GMemError
from gmem_bank.listing import Item
from gmem_bank.provenance import Json

JOB_IMAGES = 8
"""Images a worker is given at a time: few, so that the workers end a batch together."""
AHEAD_BYTES = 32 << 20
"""Decoded pixels that may wait for the encoder."""
MOST_AHEAD = 4
"""Batches that may wait: more would only make memory depend on who is faster."""
PIPE_BYTES = 1 << 20
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

ROOT = Path(__file__).resolve().parents[1]
WORKER = (
    "-P", "-c",
    "import sys; at = next((i for i, p in enumerate(sys.path) if p.endswith('-packages')), len(sys.path)); "
    "sys.path.insert(at, sys.argv[1]); from gmem_bank.decode_worker import main; sys.exit(main())",
    str(ROOT),
)  # fmt: skip
"""What Python is told to run: this package, from where it was imported here, and nothing from the working folder."""

Decoded = tuple[str, NDArray[np.uint8] | str]
"""sha256 of the image's bytes, and its crop, or why there is none."""


def default_workers() -> int:
    """Return how many processes decode where nothing is asked for: one a core that this process may use, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


class DecodePool:
    """Decodes batches ahead; a context manager.

    Args:
        preprocessing: an encoder's record, with crop_size S.
        num_workers: processes; 0 decodes in this one, without looking ahead.
    """

    def __init__(self, preprocessing: Mapping[str, Json], num_workers: int) -> None:
        self._preprocessing = dict(preprocessing)
        self._size = int(preprocessing["crop_size"])
        self._local = threading.local()
        self._closing = False
        self._starting = threading.Lock()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(num_workers, "decode") if num_workers else None

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._starting:  # no process is started after this
            self._closing = True
        for process in self._processes:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with contextlib.suppress(OSError):  # what was not yet sent to a worker that is gone
                        stream.close()

    def batches(self, batches: Iterable[Sequence[Item]]) -> Iterator[list[Decoded]]:
        """Yield the decoded images of each batch, in order; as many batches ahead as AHEAD_BYTES hold, at least two."""
        if self._threads is None:
            for batch in batches:
                yield [decode_one(item, self._preprocessing) for item in batch]
            return
        waiting: deque[list[Future[list[Decoded]]]] = deque()
        for batch in batches:
            waiting.append([self._threads.submit(self._run, job) for job in _cut(batch)])
            if len(waiting) >= max(2, min(MOST_AHEAD, AHEAD_BYTES // (len(batch) * self._size**2 * 3))):
                yield _collected(waiting.popleft())
        while waiting:
            yield _collected(waiting.popleft())

    def _run(self, items: Sequence[Item]) -> list[Decoded]:
        try:
            return self._ask(items)
        except (OSError, ValueError):
            if self._closing:
                raise
            self._local.process = None
        try:
            return self._ask(items)
        except (OSError, ValueError) as error:
            self._local.process = None
            raise GMemError(
                f"a process that decodes images died twice on the same {len(items)} ({error}), from {items[0].key!r} to "
                f"{items[-1].key!r}: decode in this process with --workers 0 to see which is at fault"
            ) from error

    def _ask(self, items: Sequence[Item]) -> list[Decoded]:
        process = self._process()
        assert process.stdin is not None
        assert process.stdout is not None
        record = {"items": [record_of(item) for item in items], "preprocessing": self._preprocessing}
        process.stdin.write(json.dumps(record).encode() + b"\n")
        process.stdin.flush()
        facts: list[Any] = json.loads(process.stdout.readline() or b"?")
        return [(digest, reason if reason is not None else self._pixels(process)) for digest, reason in facts]

    def _pixels(self, process: subprocess.Popen[bytes]) -> NDArray[np.uint8]:
        pixels = np.empty((self._size, self._size, 3), np.uint8)
        if process.stdout.readinto(pixels.data.cast("B")) != pixels.nbytes:  # type: ignore[union-attr]
            raise ValueError("its answer was cut short")
        return pixels

    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] | None = getattr(self._local, "process", None)
        if process is None:
            with self._starting:
                if self._closing:
                    raise ValueError("the pool is closed")
                process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
                    [sys.executable, *WORKER],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **ONE_THREAD},
                )  # fmt: skip
                self._processes.append(process)
            _widen_pipe(process.stdout)
            self._local.process = process
        return process


def _widen_pipe(stream: Any) -> None:
    """Let a worker write several crops without waiting for whoever reads them, where the system can."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):
            fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _cut(batch: Sequence[Item]) -> list[Sequence[Item]]:
    return [batch[start : start + JOB_IMAGES] for start in range(0, len(batch), JOB_IMAGES)]


def _collected(parts: list[Future[list[Decoded]]]) -> list[Decoded]:
    return [found for part in parts for found in part.result()]
