"""What a run has to do with the machine: device, threads, versions, and a polite end on a signal."""

from __future__ import annotations

import contextlib
import platform
import signal
from collections.abc import Iterator

import numpy as np
import torch

import gmem_bank
from gmem_bank.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """Return a usable device; "auto" takes a GPU where there is one; raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {error}", key="device") from error
    return device


@contextlib.contextmanager
def cpu_threads(wanted: int) -> Iterator[None]:
    """Run with a number of CPU threads, and put the old number back; 0 leaves PyTorch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {
        "gmem": gmem_bank.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


class StopRequest:
    """Set by SIGINT or SIGTERM: the training saves and ends after the step in hand."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @contextlib.contextmanager
    def listening(self, enabled: bool) -> Iterator[None]:
        """Catch the signals inside the block; a second one acts as usual."""
        if not enabled:
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def handle(number: int, _frame: object) -> None:
            self.signal = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
