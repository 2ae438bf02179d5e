"""What stages that write share: errors that name the place, and progress and remarks as arguments."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from gmem_bank.errors import GMemError, WriteError

Progress = Callable[[int, int], None]
"""Told how much is done, and how much there is in all."""
Say = Callable[[str], None]
"""Told a remark."""


def no_progress(done: int, total: int) -> None:
    """Report nothing: the default of every function of the library."""


def no_remarks(text: str) -> None:
    """Say nothing: the default of every function of the library."""


@contextlib.contextmanager
def writing(path: Path, what: str, advice: str) -> Iterator[None]:
    """Turn an operating-system error in the block into a WriteError.

    Args:
        path: the output.
        what: could not be written, and where.
        advice: what to do, and what stands.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, GMemError):
            raise
        raise WriteError(f"could not write {what}: {error.strerror or error}. {advice}", path=path) from error
