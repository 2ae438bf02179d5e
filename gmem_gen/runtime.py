"""What a run has to do with the machine: device, threads, versions, and a polite end on a signal."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import signal
import sys
from collections.abc import Iterator

import numpy as np
import torch

import gmem_bank
from gmem_bank.errors import ConfigError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Of glibc's mallopt: how much free memory goes back to the system, from which size on it is asked for piece by piece."""
_KEPT = {_TRIM_THRESHOLD: 2**31 - 1, _MMAP_THRESHOLD: 32 << 20}
_AFTERWARDS = 64 << 20
"""To trim at: where glibc's own adjustment, which a setting ends for good, comes to with large tensors."""


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
        raise ConfigError(
            f"device {name!r} cannot be used here ({error}): use --device cpu or auto", key="device"
        ) from error
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


@contextlib.contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Keep freed memory for the next step instead of giving it back to the system, on a CPU with glibc.

    A step frees and takes the same tensors, and fetching their pages anew costs 5 % of it; at the end all is given back.
    """
    try:
        library = ctypes.CDLL("libc.so.6") if device.type == "cpu" and sys.platform == "linux" else None
        tune, trim = (library.mallopt, library.malloc_trim) if library else (None, None)
    except (OSError, AttributeError):  # another C library
        tune = trim = None
    if tune is None or trim is None:
        yield
        return
    for parameter, value in _KEPT.items():
        tune(parameter, value)
    try:
        yield
    finally:
        tune(_TRIM_THRESHOLD, _AFTERWARDS)
        trim(0)


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
