"""Where banks lie: one logical content (`schema`, `rules`), one store per form of file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from gmem_bank.errors import BankNotFoundError, FormatError
from gmem_bank.storage.payload import Payload
from gmem_bank.storage.schema import Header
from gmem_bank.storage.stored import StoredBank

__all__ = [
    "Payload",
    "StoredBank",
    "is_bank_path",
    "num_bytes",
    "open_stored",
    "real_target",
    "require_known_suffix",
    "write",
]

_STORES = {
    ".safetensors": "safetensors_store", ".h5": "hdf5_store", ".hdf5": "hdf5_store", ".gmem": "folder_store",
}  # fmt: skip
"""Suffix → the module that opens and writes such a bank."""
FOLDER_SUFFIX = ".gmem"


def _store(path: Path) -> Any:
    return import_module(f"{__name__}.{_STORES[path.suffix.lower()]}")


def is_folder_form(path: Path) -> bool:
    """Say whether a path names a bank of the folder form."""
    return path.suffix.lower() == FOLDER_SUFFIX


def is_bank_path(path: str | os.PathLike[str]) -> bool:
    """Say whether a path ends as a bank does, there or not."""
    return Path(path).suffix.lower() in _STORES


def require_known_suffix(path: str | os.PathLike[str]) -> Path:
    """Return the path; raises FormatError where its suffix names no store."""
    target = Path(path)
    if target.is_dir() and not is_folder_form(target):
        raise FormatError(f"{target} is a folder: name a file for the bank, or a folder ending in .gmem", path=target)
    if not is_bank_path(target):
        raise FormatError(f"{target}: a bank ends in {', '.join(_STORES)} (a folder); rename it", path=target)
    return target


def real_target(output: str | os.PathLike[str]) -> Path:
    """Return the file to write: a link is followed, so that the bank it leads to is the one replaced and locked."""
    target = require_known_suffix(output)
    if target.name.startswith(".undo-"):
        raise FormatError(f"{target} is a state that 'undo' goes back to: it is not written to", path=target)
    return target.resolve() if target.is_symlink() else target


def open_stored(path: str | os.PathLike[str]) -> StoredBank:
    """Open a bank file or folder; raises BankNotFoundError, FormatError or CorruptError."""
    if not Path(path).exists():
        raise BankNotFoundError(
            f"no bank at {path}: build one with 'gmem-bank build SOURCE -o {path}', or name another with --bank",
            path=path,
        )
    target = require_known_suffix(path)
    stored: StoredBank = _store(target).open_bank(target)
    return stored


def write(path: str | os.PathLike[str], header: Header, payloads: Mapping[str, Payload]) -> Header:
    """Write a bank atomically in the form that its suffix names; see `safetensors_store.write`."""
    target = require_known_suffix(path)
    written: Header = _store(target).write(target, header, payloads)
    return written


def num_bytes(path: str | os.PathLike[str], header: Header, payloads: Mapping[str, Payload]) -> int:
    """Return how large the bank would be that `write` makes of these; the payloads' bytes are not asked for."""
    size: int = _store(require_known_suffix(path)).num_bytes(header, payloads)
    return size
