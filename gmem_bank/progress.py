"""Progress as an argument: a callable that is told how much is done."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

Progress = Callable[[int, int], None]
"""Called with (items done, items in all); must be cheap."""


def no_progress(done: int, total: int) -> None:
    """Report nothing: the default of every library function."""


class ProgressBar:
    """A bar on stderr with rate and ETA, drawn by tqdm.

    Args:
        label: what is going on, such as "encode".
        unit: what is counted, such as "image".
        quiet: True draws nothing.
    """

    def __init__(self, label: str, unit: str, *, quiet: bool = False) -> None:
        self._label = label
        self._unit = unit
        self._quiet = quiet
        self._bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` items are done."""
        if self._quiet:
            return
        if self._bar is None:
            from tqdm import tqdm

            # A log file gets a line every ten seconds, not one every tenth of a second.
            interval = 0.2 if sys.stderr.isatty() else 10.0
            # Items done by an earlier run must not count towards this run's rate.
            self._bar = tqdm(
                total=total,
                initial=done,
                desc=self._label,
                unit=f" {self._unit}",
                file=sys.stderr,
                mininterval=interval,
            )
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()  # the last line stays; whatever comes next starts on its own

    def note(self, text: str) -> None:
        """Show a few words behind rate and ETA, such as a loss."""
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def say(self, text: str) -> None:
        """Print a line on stderr without tearing the bar."""
        if self._bar is None:
            print(text, file=sys.stderr, flush=True)  # noqa: T201
        else:
            self._bar.write(text, file=sys.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
