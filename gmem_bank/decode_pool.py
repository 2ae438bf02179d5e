"""Images decoded ahead of the encoder by worker processes, in the order of the listing and in bounded memory.

Workers are plain programs (see `decode_worker` and `decode_process`), each with one thread here that keeps it busy. A worker
that dies takes nothing with it but its jobs, which are given to a new one once.

Shapes: B images of a batch, b readable ones, S×S pixels of a crop.
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gmem_bank.decode_process import JOBS_AHEAD, WorkerProcess
from gmem_bank.decode_worker import decode_one
from gmem_bank.errors import GMemError
from gmem_bank.listing import Item
from gmem_bank.provenance import Json

JOB_IMAGES = 8
"""Images a worker is given at a time: few, so that the workers end a batch together."""
JOB_BYTES = 4 << 20
"""Pixels of a job at most, beyond those of one image."""
AHEAD_BYTES = 32 << 20
"""Decoded pixels that may wait for the encoder."""
MOST_AHEAD = 4
"""Batches that may wait: more would only make memory depend on who is faster."""


def default_workers() -> int:
    """Return how many processes decode where nothing is asked for: one a core that this process may use, up to 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(16, cores)


@dataclass(frozen=True)
class Decoded:
    """What decoding a batch gave."""

    hashes: list[str]
    """B times the sha256 of an image's bytes, "" where there are none."""
    reasons: list[str | None]
    """B times why there is no crop; None: there is one."""
    crops: NDArray[np.uint8]
    """(b, S, S, 3), of the readable images in order."""


def decode_batch(items: Sequence[Item], preprocessing: Mapping[str, Json]) -> Decoded:
    """Decode images in this process."""
    size = int(preprocessing["crop_size"])
    found = [decode_one(item, preprocessing) for item in items]
    crops = [pixels for _, pixels in found if not isinstance(pixels, str)]
    return Decoded(
        [digest for digest, _ in found],
        [reason if isinstance(reason, str) else None for _, reason in found],
        np.stack(crops) if crops else np.zeros((0, size, size, 3), np.uint8),
    )


@dataclass
class _Job:
    """Images for one worker, and where their crops go."""

    items: Sequence[Item]
    crops: NDArray[np.uint8]
    facts: Future[list[tuple[str, str | None]]] = field(default_factory=Future)
    deaths: int = 0


class DecodePool:
    """Decodes batches ahead; a context manager.

    There is one worker at first, and another whenever a batch has to be waited for: none idles beside an encoder that is slower.

    Args:
        preprocessing: an encoder's record, with crop_size S.
        num_workers: processes at most; 0 decodes in this one, without looking ahead.
    """

    def __init__(self, preprocessing: Mapping[str, Json], num_workers: int) -> None:
        self._preprocessing = dict(preprocessing)
        self._crop = (int(preprocessing["crop_size"]),) * 2 + (3,)
        self._job_images = max(1, min(JOB_IMAGES, JOB_BYTES // int(np.prod(self._crop))))
        self._closing = False
        self._changing = threading.Lock()
        self._wanted = threading.Semaphore(1)
        self._workers: list[WorkerProcess] = []
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._serve, name=f"decode-{number}", daemon=True) for number in range(num_workers)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> DecodePool:
        return self

    def __exit__(self, *_: object) -> None:
        with self._changing:  # after this no process is started and no job taken
            self._closing = True
            for worker in self._workers:
                worker.kill()
        for _thread in self._threads:
            self._wanted.release()
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        while not self._jobs.empty():  # whoever waits for these, in another thread, is not left waiting
            if job := self._jobs.get():
                job.facts.cancel()

    def batches(self, batches: Iterable[Sequence[Item]]) -> Iterator[Decoded]:
        """Yield the decoded images of each batch, in order; as many batches ahead as AHEAD_BYTES hold, at least two."""
        if not self._threads:
            for batch in batches:
                yield decode_batch(batch, self._preprocessing)
            return
        waiting: deque[tuple[NDArray[np.uint8], list[_Job]]] = deque()
        for batch in batches:
            waiting.append(self._begin(batch))
            if len(waiting) >= max(2, min(MOST_AHEAD, AHEAD_BYTES // max(1, waiting[-1][0].nbytes))):
                yield self._collected(*waiting.popleft())
        while waiting:
            yield self._collected(*waiting.popleft())

    def _begin(self, batch: Sequence[Item]) -> tuple[NDArray[np.uint8], list[_Job]]:
        """Hand out the jobs of a batch, whose crops go into one array."""
        crops, most = np.empty((len(batch), *self._crop), np.uint8), self._job_images
        jobs = [_Job(batch[at : at + most], crops[at : at + most]) for at in range(0, len(batch), most)]
        with self._changing:
            if self._closing:
                raise ValueError("the pool is closed")
            for job in jobs:
                self._jobs.put(job)
        return crops, jobs

    def _collected(self, crops: NDArray[np.uint8], jobs: Sequence[_Job]) -> Decoded:
        if not all(job.facts.done() for job in jobs):
            self._wanted.release()
        parts = [job.facts.result() for job in jobs]
        facts = [fact for part in parts for fact in part]
        if any(reason is not None for _, reason in facts):  # close the gaps
            counts = [sum(reason is None for _, reason in part) for part in parts]
            crops = np.concatenate([job.crops[:count] for job, count in zip(jobs, counts, strict=True)])
        return Decoded([digest for digest, _ in facts], [reason for _, reason in facts], crops)

    def _serve(self) -> None:
        """Keep one worker busy, with a job ahead of the one that it does, until the pool is closed."""
        worker: WorkerProcess | None = None
        sent: deque[_Job] = deque()
        self._wanted.acquire()
        while self._take_jobs(sent):
            job = sent[0]
            try:
                worker = worker or self._start()
                for more in list(sent)[worker.num_waiting :]:
                    worker.send(more.items)
                facts = worker.receive(job.crops)
            except (OSError, ValueError) as error:
                worker = self._drop(worker)
                job.deaths += 1
                if job.deaths > 1:
                    sent.popleft().facts.set_exception(_died_twice(job, error))
            except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
                worker = self._drop(worker)
                sent.popleft().facts.set_exception(error)
            else:
                sent.popleft().facts.set_result(facts)
        self._drop(worker)
        for job in sent:
            job.facts.cancel()

    def _take_jobs(self, sent: deque[_Job]) -> bool:
        """Add what a worker may be sent; False: the pool is closed. Waits only where there is nothing else to wait for.

        A job ahead is taken where there is one for every other worker too.
        """
        while not self._closing and (not sent or (len(sent) < JOBS_AHEAD and self._jobs.qsize() >= len(self._threads))):
            try:
                job = self._jobs.get(block=not sent)
            except queue.Empty:  # another was faster
                break
            if job is None:
                return False
            sent.append(job)
        return not self._closing

    def _start(self) -> WorkerProcess:
        with self._changing:
            if self._closing:
                raise ValueError("the pool is closed")
            try:
                worker = WorkerProcess(self._preprocessing, self._job_images)
            except OSError as error:
                raise GMemError(
                    f"a process that decodes images could not be started ({error.strerror or error}): take fewer with "
                    "--workers, or none with --workers 0"
                ) from error
            self._workers.append(worker)
        return worker

    def _drop(self, worker: WorkerProcess | None) -> WorkerProcess | None:
        """End a worker that is of no more use; gives what takes its place, none yet."""
        if worker is not None:
            with self._changing:
                self._workers.remove(worker)
            worker.end()
        return None


def _died_twice(job: _Job, error: Exception) -> GMemError:
    found = GMemError(
        f"a process that decodes images died twice on the same {len(job.items)} ({error}), from {job.items[0].key!r} to "
        f"{job.items[-1].key!r}: decode in this process with --workers 0 to see which is at fault"
    )
    found.__cause__ = error
    return found
