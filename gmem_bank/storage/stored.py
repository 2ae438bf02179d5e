"""An open bank, whatever form its file has: header, and entries as read-only maps.

A store's own module finds out where each entry lies; from there on all forms are the same bytes.
"""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import BankNotFoundError, CorruptError, FormatError, GMemError
from gmem_bank.storage import rules, schema
from gmem_bank.storage.payload import NUMPY_DTYPE, Payload

BLOCK_BYTES = 4 << 20


class OpenFile:
    """A file held open: a bank that is replaced later stays, for whoever has it open, the one it was.

    Args:
        path: the file.

    Raises:
        BankNotFoundError, FormatError: absent, or unreadable.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = _open(path)
        weakref.finalize(self, os.close, self.descriptor)
        self.size = os.fstat(self.descriptor).st_size
        self._map: mmap.mmap | None = None

    def pread(self, num_bytes: int, position: int) -> bytes:
        """Return bytes at a position, fewer at the end of the file."""
        return os.pread(self.descriptor, num_bytes, position)

    def mapped(self) -> mmap.mmap:
        """Return the map of the whole file, made on first use."""
        if self._map is None:
            self._map = mmap.mmap(self.descriptor, 0, access=mmap.ACCESS_READ)
        return self._map

    def release(self) -> None:
        """Let go of the pages that the map has touched: they stay in the system's cache, not in this process."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an entry lies."""

    file: OpenFile
    dtype: str
    shape: tuple[int, ...]
    begin: int
    """Bytes from the start of the file."""
    end: int


class StoredBank:
    """An open bank: header, and entries as read-only maps.

    Args:
        path: what the user named.
        header: checked against the places here.
        places: entry name → where it lies, in file order.
        num_bytes: size of the bank on disk.

    Raises:
        CorruptError: header and entries disagree.
    """

    def __init__(self, path: Path, header: schema.Header, places: Mapping[str, Place], num_bytes: int) -> None:
        rules.check_entries(header, places)
        self.path = path
        self.header = header
        self.num_bytes = num_bytes
        self._places = dict(places)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def names(self) -> list[str]:
        """Return the names of all entries, in the order they lie on disk."""
        return list(self._places)

    def dtype(self, name: str) -> str:
        """Return an entry's type as the format spells it."""
        return self._places[name].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an entry's sizes."""
        return self._places[name].shape

    def place(self, name: str) -> Place:
        """Return where an entry lies."""
        return self._places[name]

    def array(self, name: str) -> NDArray[Any]:
        """Return an entry as a read-only array over the memory map (bfloat16 as uint16 bits)."""
        place = self._places[name]
        dtype = np.dtype(NUMPY_DTYPE[place.dtype])
        if place.begin == place.end:
            return np.zeros(place.shape, dtype)
        count = (place.end - place.begin) // dtype.itemsize
        return np.frombuffer(place.file.mapped(), dtype, count, place.begin).reshape(place.shape)

    def blocks(self, name: str, size: int = BLOCK_BYTES, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        """Yield an entry's bytes, or those from `begin` to `end`, without mapping it, `size` at a time."""
        place = self._places[name]
        position, stop = place.begin + begin, place.end if end is None else place.begin + end
        while position < stop:
            block = place.file.pread(min(size, stop - position), position)
            if len(block) < min(size, stop - position):
                path = place.file.path
                raise CorruptError(f"{path} was cut short after it was opened", path=path, tensor=name)
            position += len(block)
            yield block

    def release(self) -> None:
        """Let go of mapped pages, after a pass over many rows; later reads map them again."""
        for file in {id(place.file): place.file for place in self._places.values()}.values():
            file.release()

    def payload(self, name: str) -> Payload:
        """Return an entry ready to be copied into another file, its hash taken over."""
        place = self._places[name]
        return Payload(
            dtype=place.dtype, shape=place.shape, blocks=lambda: self.blocks(name),
            sha256=self.header.hashes[name], label=f"{self.path}: entry {name!r}",
            part=lambda begin, end: self.blocks(name, BLOCK_BYTES, begin, end),
            file=place.file.path, name=name,
        )  # fmt: skip

    def payloads(self) -> dict[str, Payload]:
        """Return every entry ready to be copied."""
        return {name: self.payload(name) for name in self._places}


def naming(error: GMemError, path: Path) -> None:
    """Put the path into an error that was raised deep inside a file, and what to do about it."""
    if error.path is None:
        advice = " Restore it from a copy or build it again." if isinstance(error, CorruptError) else ""
        error.path = path
        error.message = f"{path}: {error.message}.{advice}"


def _open(path: Path) -> int:
    try:
        if path.is_dir():
            raise FormatError(f"{path} is a folder, not a bank file", path=path)
        return os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise BankNotFoundError(
            f"no bank at {path}: build one with 'gmem-bank build SOURCE -o {path}', or name another with --bank",
            path=path,
        ) from error
    except OSError as error:
        raise FormatError(f"could not read {path}: {error.strerror or error}", path=path) from error
