"""Where banks lie: one logical content (`schema`), one store per file form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from gmem_bank.errors import FormatError
from gmem_bank.storage import safetensors_store
from gmem_bank.storage.safetensors_store import Payload, StoredBank
from gmem_bank.storage.schema import Header

__all__ = ["Payload", "StoredBank", "open_stored", "require_known_suffix", "write"]

SUFFIXES = (".safetensors",)


def require_known_suffix(path: str | os.PathLike[str]) -> Path:
    """Return the path; raises FormatError where its suffix names no store."""
    target = Path(path)
    if target.suffix.lower() not in SUFFIXES:
        raise FormatError(f"{target}: a bank file ends in {' or '.join(SUFFIXES)}; rename it", path=target)
    return target


def open_stored(path: str | os.PathLike[str]) -> StoredBank:
    """Open a bank file; raises BankNotFoundError, FormatError or CorruptError."""
    return StoredBank(path)


def write(path: str | os.PathLike[str], header: Header, payloads: Mapping[str, Payload]) -> Header:
    """Write a bank file atomically; see `safetensors_store.write`."""
    return safetensors_store.write(require_known_suffix(path), header, payloads)
