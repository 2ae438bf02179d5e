"""Settings of a whole process, changed while they are needed and then put back, whichever thread comes and goes first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

Value = TypeVar("Value")


class HeldSetting(Generic[Value]):
    """One setting: the first to enter saves it, the last to leave restores it, so that no thread saves what another has set.

    Args:
        read: returns the value as it is.
        write: sets it.
        exclusive: let one thread at a time hold it, where each needs a value of its own.
    """

    def __init__(self, read: Callable[[], Value], write: Callable[[Value], None], *, exclusive: bool = False) -> None:
        self._read, self._write = read, write
        self._turn = threading.Lock() if exclusive else None
        self._lock, self._depth = threading.Lock(), 0
        self._saved: list[Value] = []

    @contextmanager
    def holding(self, value: Value) -> Iterator[None]:
        """Have the setting at a value until the block is left."""
        if self._turn is None:
            with self._held(value):
                yield
            return
        with self._turn, self._held(value):
            yield

    @contextmanager
    def _held(self, value: Value) -> Iterator[None]:
        with self._lock:
            if not self._depth:
                self._saved = [self._read()]
            self._depth += 1
            self._write(value)
        try:
            yield
        finally:
            with self._lock:
                self._depth -= 1
                if not self._depth:
                    self._write(self._saved.pop())
