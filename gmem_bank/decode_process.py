"""A worker process of `decode_worker`, as its pool sees it: pipes for what is said, and memory of both for pixels.

The memory has no name: the kernel frees it when both processes are gone, however they went. Each worker has its own, so one
that is killed while it writes can spoil nothing but the job that is done again.

Shapes: n images of a job, S×S pixels.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.decode_worker import record_of
from gmem_bank.listing import Item
from gmem_bank.provenance import Json

JOBS_AHEAD = 2
"""Jobs that a worker has at a time: the second one waits in its pipe, so that it need not wait for us."""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

ROOT = Path(__file__).resolve().parents[1]
WORKER = (
    "-P", "-c",
    "import sys; at = next((i for i, p in enumerate(sys.path) if p.endswith('-packages')), len(sys.path)); "
    "sys.path.insert(at, sys.argv[1]); from gmem_bank.decode_worker import main; sys.exit(main(int(sys.argv[2])))",
    str(ROOT),
)  # fmt: skip
"""What Python is told to run: this package, from where it was imported here, and nothing from the working folder."""


class WorkerProcess:
    """A process that decodes jobs, in the order in which it is sent them; JOBS_AHEAD at most at a time.

    Args:
        preprocessing: an encoder's record, with crop_size S.
        job_images: images of a job at most.

    Raises:
        OSError: there is no room for another process or its memory.
    """

    def __init__(self, preprocessing: Mapping[str, Json], job_images: int) -> None:
        self._preprocessing = dict(preprocessing)
        side = int(preprocessing["crop_size"])
        self._shape = (JOBS_AHEAD, job_images, side, side, 3)
        self._num_sent = self._num_received = 0
        descriptor = _shared_memory(int(np.prod(self._shape)))
        try:
            self._pixels = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8).reshape(self._shape)
            self._process = subprocess.Popen(  # noqa: S603 - our own module, by our own interpreter
                [sys.executable, *WORKER, str(descriptor)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[descriptor], env={**os.environ, **ONE_THREAD},
            )  # fmt: skip
        finally:
            os.close(descriptor)

    @property
    def num_waiting(self) -> int:
        """Jobs that it was sent and has not answered."""
        return self._num_sent - self._num_received

    @property
    def pid(self) -> int:
        """Number of the process."""
        return self._process.pid

    def send(self, items: Sequence[Item]) -> None:
        """Give it a job; raises OSError where it is gone."""
        assert self.num_waiting < JOBS_AHEAD
        slot = self._num_sent % JOBS_AHEAD
        job = {
            "items": [record_of(item) for item in items],
            "preprocessing": self._preprocessing,
            "place": slot * int(np.prod(self._shape[1:])),
        }
        stdin = self._process.stdin
        assert stdin is not None
        stdin.write(json.dumps(job).encode() + b"\n")
        stdin.flush()
        self._num_sent += 1

    def receive(self, into: NDArray[np.uint8]) -> list[tuple[str, str | None]]:
        """Wait for the answer to its first job.

        Args:
            into: (n, S, S, 3); the crops of the readable images are put first, in order.

        Returns:
            sha256 of each image's bytes and None, or why there is no crop.

        Raises:
            OSError, ValueError: it died.
        """
        stdout = self._process.stdout
        assert stdout is not None
        facts = [(str(digest), reason) for digest, reason in json.loads(stdout.readline() or b"?")]
        if len(facts) != len(into):
            raise ValueError(f"it answered {len(facts)} images instead of {len(into)}")
        num_readable = sum(reason is None for _, reason in facts)
        into[:num_readable] = self._pixels[self._num_received % JOBS_AHEAD, :num_readable]
        self._num_received += 1
        return facts

    def kill(self) -> None:
        """Kill it; whoever waits for its answer hears of that."""
        self._process.kill()

    def end(self) -> None:
        """Kill it, wait for its end, and close its pipes."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):  # what was not yet sent to a worker that is gone
                    stream.close()


def _shared_memory(num_bytes: int) -> int:
    """Return the descriptor of a file without a name, in memory where the system can; raises OSError where there is no room."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("gmem pixels")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)  # or a page that cannot be had would end us with SIGBUS
        else:
            os.ftruncate(descriptor, num_bytes)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
