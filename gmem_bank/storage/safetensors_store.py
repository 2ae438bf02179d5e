"""The safetensors store: a bank in one file, written in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

from gmem_bank.errors import FormatError, GMemError
from gmem_bank.storage import atomic, container, rules, schema
from gmem_bank.storage.container import Container, Entry
from gmem_bank.storage.payload import Payload, known_hashes, pour
from gmem_bank.storage.stored import OpenFile, Place, StoredBank, naming


def open_bank(path: Path) -> StoredBank:
    """Open a bank file: its header only.

    Raises:
        BankNotFoundError, FormatError, CorruptError: with the path in the message.
    """
    try:
        file = OpenFile(path)
        parsed = read_container(file)
        return StoredBank(path, _read_header(parsed), places_of(file, parsed), file.size)
    except GMemError as error:
        naming(error, path)
        raise


def read_container(file: OpenFile) -> Container:
    """Return what the header of a safetensors file says, distrusted; raises CorruptError."""
    length = container.header_bytes_of(file.pread(container.PREFIX_BYTES, 0), file.size)
    return container.parse(file.pread(length, container.PREFIX_BYTES), file.size)


def places_of(file: OpenFile, parsed: Container) -> dict[str, Place]:
    """Return where each entry of a safetensors file lies, in file order."""
    start = parsed.data_start
    return {
        entry.name: Place(file=file, dtype=entry.dtype, shape=entry.shape, begin=start + entry.begin, end=start + entry.end)
        for entry in sorted(parsed.entries.values(), key=lambda e: (e.begin, e.end))
    }  # fmt: skip


def _read_header(parsed: Container) -> schema.Header:
    text = parsed.metadata.get(schema.METADATA_KEY)
    if text is None:
        raise FormatError("a safetensors file, but not a gmem bank: it has no 'gmem' metadata")
    return schema.parse_header_text(text)


def write(path: Path, header: schema.Header, payloads: Mapping[str, Payload]) -> schema.Header:
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
    entries = container.lay_out({name: (payload.dtype, payload.shape) for name, payload in payloads.items()})
    reserved = _render(replace(header, hashes=known_hashes(payloads)), entries)
    if len(reserved) > container.MAX_HEADER_BYTES:
        raise FormatError(f"the header of {path} would take {len(reserved):,} bytes, more than the format allows")
    needed = len(reserved) + max((entry.end for entry in entries.values()), default=0)
    with atomic.replacing(path, needed=needed) as stream:
        stream.write(reserved)
        final = replace(header, hashes=write_entries(stream, entries, payloads))
        rules.check_entries(final, entries)
        rendered = _render(final, entries)
        assert len(rendered) == len(reserved), "the header changed its length"
        stream.seek(0)
        stream.write(rendered)
    return final


def num_bytes(header: schema.Header, payloads: Mapping[str, Payload]) -> int:
    """Return the size of the file that `write` would make."""
    entries = container.lay_out({name: (payload.dtype, payload.shape) for name, payload in payloads.items()})
    reserved = _render(replace(header, hashes=known_hashes(payloads)), entries)
    return len(reserved) + max((entry.end for entry in entries.values()), default=0)


def write_entries(stream: BinaryIO, entries: Mapping[str, Entry], payloads: Mapping[str, Payload]) -> dict[str, str]:
    """Write the data of a safetensors file at the stream's position; return name → sha256."""
    in_order = sorted(entries, key=lambda name: entries[name].begin)
    return {name: pour(stream, name, payloads[name], entries[name].end - entries[name].begin) for name in in_order}


def _render(header: schema.Header, entries: Mapping[str, Entry]) -> bytes:
    return container.render(entries, {schema.METADATA_KEY: header.to_json()})
