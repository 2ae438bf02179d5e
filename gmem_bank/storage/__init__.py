"""Where banks lie: one logical content (`schema`), one store per file form."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from gmem_bank.errors import FormatError
from gmem_bank.storage import safetensors_store
from gmem_bank.storage.safetensors_store import Payload, StoredBank
from gmem_bank.storage.schema import Header

__all__ = ["Payload", "Store", "open_stored", "real_target", "require_known_suffix", "write"]

_STORES: dict[str, Callable[[str | os.PathLike[str]], Store]] = {".safetensors": StoredBank}
"""Suffix → what opens such a file."""


class Store(Protocol):
    """An open bank file, whatever its form: what the rest of the package may ask of it."""

    path: Path
    header: Header

    @property
    def num_bytes(self) -> int:
        """Size of the file in bytes."""

    def __contains__(self, name: str) -> bool: ...

    def names(self) -> list[str]:
        """Return the names of all entries, in the order they lie in the file."""

    def dtype(self, name: str) -> str:
        """Return an entry's type as the format spells it."""

    def array(self, name: str) -> NDArray[Any]:
        """Return an entry as a read-only array over a memory map (bfloat16 as uint16 bits)."""

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield an entry's bytes without mapping it."""

    def require_sound(self, *names: str) -> None:
        """Raise CorruptError unless entries match their hashes."""

    def payload(self, name: str) -> Payload:
        """Return an entry ready to be copied into another file, its hash taken over."""


def require_known_suffix(path: str | os.PathLike[str]) -> Path:
    """Return the path; raises FormatError where its suffix names no store."""
    target = Path(path)
    if target.is_dir():
        raise FormatError(f"{target} is a folder: name a file for the bank", path=target)
    if target.suffix.lower() not in _STORES:
        raise FormatError(f"{target}: a bank file ends in {' or '.join(_STORES)}; rename it", path=target)
    return target


def real_target(output: str | os.PathLike[str]) -> Path:
    """Return the file to write: a link is followed, so that the bank it leads to is the one replaced and locked."""
    target = require_known_suffix(output)
    return target.resolve() if target.is_symlink() else target


def open_stored(path: str | os.PathLike[str]) -> Store:
    """Open a bank file; raises BankNotFoundError, FormatError or CorruptError."""
    return _STORES[require_known_suffix(path).suffix.lower()](path)


def write(path: str | os.PathLike[str], header: Header, payloads: Mapping[str, Payload]) -> Header:
    """Write a bank file atomically; see `safetensors_store.write`."""
    return safetensors_store.write(require_known_suffix(path), header, payloads)
