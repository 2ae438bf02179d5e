"""Files that are read in places, in any order and from any thread: the ones used last stay open."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from pathlib import Path

MOST_OPEN = 512
"""Files that are open at a time, or half of those that the process may open, where that is less."""


class OpenFile:
    """An open file, closed when the last who reads it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1  # where opening fails
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if hasattr(os, "posix_fadvise"):  # rows are asked for in any order: what follows them is not wanted
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from an offset; returns what could be read."""
        done = os.preadv(self.descriptor, [buffer], offset)
        while 0 < done < len(buffer):
            more = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if not more:
                break
            done += more
        return done


class OpenFiles:
    """The files that were used last, open."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, min(MOST_OPEN, soft // 2 if soft > 0 else MOST_OPEN))
        self._open: OrderedDict[Path, OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> OpenFile:
        """Return an open file."""
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = self._opened(path)
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return file

    def _opened(self, path: Path) -> OpenFile:
        """Open a file; where the process may open no more, after letting go of those that were used first."""
        while True:
            try:
                return OpenFile(path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                self._open.popitem(last=False)
                self._most = max(1, len(self._open))
