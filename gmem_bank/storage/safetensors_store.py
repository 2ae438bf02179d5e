"""The safetensors store: a bank in one file, read through a memory map, written in one pass.

Shapes: whatever the schema says; this module moves entries, it does not know what they mean.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import BankNotFoundError, CorruptError, FormatError, GMemError
from gmem_bank.storage import atomic, container, schema
from gmem_bank.storage.container import Container, Entry

BLOCK_BYTES = 4 << 20
NUMPY_DTYPE = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "I8": "i1", "BOOL": "?", "F64": "<f8", "I32": "<i4", "I16": "<i2",
}  # fmt: skip
"""bfloat16 has no NumPy type: its bits are held as uint16."""


class StoredBank:
    """An open bank file: header, and entries as read-only maps.

    Args:
        path: the file.

    Raises:
        BankNotFoundError, FormatError, CorruptError: with the path in the message.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            # The descriptor is held: a bank that is replaced later stays, for whoever has it open, the one it was.
            self._descriptor = _open(self.path)
            weakref.finalize(self, os.close, self._descriptor)
            self.container = _read_container(self._descriptor)
            self.header = _read_header(self.container)
            schema.check_entries(self.header, self.container.entries)
        except GMemError as error:
            if error.path is None:
                error.path = self.path
                error.message = f"{self.path}: {error.message}.{_advice(error)}"
            raise
        self._map: mmap.mmap | None = None

    @property
    def num_bytes(self) -> int:
        """Size of the file in bytes."""
        return os.fstat(self._descriptor).st_size

    def __contains__(self, name: str) -> bool:
        return name in self.container.entries

    def array(self, name: str) -> NDArray[Any]:
        """Return an entry as a read-only array over the memory map (bfloat16 as uint16 bits)."""
        entry = self.container.entries[name]
        count = int(np.prod(entry.shape, dtype=np.int64))
        flat = np.frombuffer(
            self._mapped(), dtype=NUMPY_DTYPE[entry.dtype], count=count, offset=self.container.data_start + entry.begin
        )
        return flat.reshape(entry.shape)

    def names(self) -> list[str]:
        """Return the names of all entries, in the order they lie in the file."""
        entries = self.container.entries
        return sorted(entries, key=lambda name: entries[name].begin)

    def dtype(self, name: str) -> str:
        """Return an entry's type as the container spells it."""
        return self.container.entries[name].dtype

    def blocks(self, name: str) -> Iterator[bytes]:
        """Yield an entry's bytes without mapping it."""
        entry = self.container.entries[name]
        position, end = self.container.data_start + entry.begin, self.container.data_start + entry.end
        while position < end:
            block = os.pread(self._descriptor, min(BLOCK_BYTES, end - position), position)
            if not block:
                raise CorruptError(f"{self.path} was cut short after it was opened", path=self.path, tensor=name)
            position += len(block)
            yield block

    def require_sound(self, *names: str) -> None:
        """Raise CorruptError unless entries match their hashes: what is written anew from them gets new hashes."""
        for name in names:
            digest = hashlib.sha256()
            for block in self.blocks(name):
                digest.update(block)
            if digest.hexdigest() != self.header.hashes[name]:
                raise CorruptError(
                    f"{self.path}: entry {name!r} does not match its hash, so nothing is made from it: restore the bank from a "
                    "copy or build it again",
                    path=self.path,
                    tensor=name,
                )

    def payload(self, name: str) -> Payload:
        """Return an entry ready to be copied into another file, its hash taken over."""
        entry = self.container.entries[name]
        return Payload(
            dtype=entry.dtype, shape=entry.shape, blocks=lambda: self.blocks(name), sha256=self.header.hashes[name]
        )

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
        return self._map


def _advice(error: GMemError) -> str:
    if isinstance(error, CorruptError):
        return " Restore it from a copy or build it again."
    return ""


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


def _read_container(descriptor: int) -> Container:
    size = os.fstat(descriptor).st_size
    length = container.header_bytes_of(os.pread(descriptor, container.PREFIX_BYTES, 0), size)
    return container.parse(os.pread(descriptor, length, container.PREFIX_BYTES), size)


def _read_header(parsed: Container) -> schema.Header:
    text = parsed.metadata.get(schema.METADATA_KEY)
    if text is None:
        raise FormatError("a safetensors file, but not a gmem bank: it has no 'gmem' metadata")
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"the bank's header is not valid JSON: {error}") from error
    return schema.parse_header(record)


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One entry on its way into a file."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes | memoryview]]
    """Yields the bytes, little-endian and C-ordered, in order."""
    sha256: str | None = None
    """Hash of the bytes where it is known already (a copied entry)."""

    @classmethod
    def of(cls, array: NDArray[Any], dtype: str | None = None) -> Payload:
        """Wrap an array in memory; `dtype` names the stored type where NumPy's does not tell (BF16 bits)."""
        names = {np.dtype(spelling): name for name, spelling in NUMPY_DTYPE.items() if name != "BF16"}
        contiguous = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray turns 0-d into 1-d
        return cls(
            dtype=dtype or names[contiguous.dtype],
            shape=contiguous.shape,
            blocks=lambda: [contiguous.view(np.uint8).data.cast("B")] if contiguous.size else [],
        )


def write(path: str | os.PathLike[str], header: schema.Header, payloads: Mapping[str, Payload]) -> schema.Header:
    """Write a bank in one pass, atomically; equal banks give equal bytes.

    The header carries the hashes of what follows it, so its room is reserved (hashes have a fixed length), the entries
    are written and hashed, and the header comes last, before the fsync and the rename.

    Args:
        path: where to; an existing file is replaced, never changed in place.
        header: everything but the hashes, which are computed here.
        payloads: entry name → bytes.

    Returns:
        The header as written, hashes included.

    Raises:
        WriteError: the disk refused; the previous file stands.
    """
    target = Path(path)
    hashes = {name: payload.sha256 or schema.EMPTY_HASH for name, payload in payloads.items()}
    entries = container.lay_out({name: (payload.dtype, payload.shape) for name, payload in payloads.items()})
    reserved = _render(replace(header, hashes=hashes), entries)
    if len(reserved) > container.MAX_HEADER_BYTES:
        raise FormatError(f"the header of {target} would take {len(reserved):,} bytes, more than the format allows")
    needed = len(reserved) + max((entry.end for entry in entries.values()), default=0)
    with atomic.replacing(target, needed=needed) as stream:
        stream.write(reserved)
        for name in sorted(entries, key=lambda n: entries[n].begin):
            hashes[name] = _write_entry(stream, name, entries[name], payloads[name])
        final = replace(header, hashes=hashes)
        schema.check_entries(final, entries)
        rendered = _render(final, entries)
        assert len(rendered) == len(reserved), "the header changed its length"
        stream.seek(0)
        stream.write(rendered)
    return final


def _render(header: schema.Header, entries: Mapping[str, Entry]) -> bytes:
    return container.render(entries, {schema.METADATA_KEY: header.to_json()})


def _write_entry(stream: BinaryIO, name: str, entry: Entry, payload: Payload) -> str:
    digest = None if payload.sha256 else hashlib.sha256()
    written = 0
    for block in payload.blocks():
        stream.write(block)
        written += len(block)
        if digest is not None:
            digest.update(block)
    assert written == entry.end - entry.begin, f"{name}: {written} bytes for {entry.end - entry.begin}"
    return payload.sha256 or digest.hexdigest()  # type: ignore[union-attr]
