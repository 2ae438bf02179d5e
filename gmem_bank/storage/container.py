"""The safetensors container, standard library only: parse a header and distrust it, or lay a new one out.

The `safetensors` package reads whole tensors or writes whole files from memory; a bank must be mapped, gathered by row,
and rewritten without being loaded, so this module handles the container itself. Its files are read back by the package in
the tests, and the other way round.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gmem_bank.errors import CorruptError

ITEM_SIZE = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "I8": 1, "BOOL": 1}
"""Bytes per item of the types a bank uses."""
FOREIGN_ITEM_SIZE = {"F64": 8, "I32": 4, "I16": 2}
"""Further types of the container: not ours, but an extra entry may have them and survives a rewrite."""
MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 32
"""More than any array has; HDF5's limit too."""
ALIGNMENT = 64
PREFIX_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One tensor of a file: `begin` and `end` count bytes from the start of the data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Container:
    """What the header of a file says."""

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_start: int


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes."""
    return (ITEM_SIZE | FOREIGN_ITEM_SIZE)[dtype] * math.prod(shape)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a name occurs twice")
    return record


def header_bytes_of(prefix: bytes, file_size: int) -> int:
    """Return the length of the JSON header from a file's first 8 bytes.

    Raises:
        CorruptError: the file is shorter than it says, or the length is absurd.
    """
    if len(prefix) < PREFIX_BYTES:
        raise CorruptError(f"the file has {file_size} bytes: too short to be a bank")
    length = int.from_bytes(prefix, "little")
    if length > MAX_HEADER_BYTES or length < 2:
        raise CorruptError(f"its header length reads {length}: this is not a safetensors file, or its start is damaged")
    if PREFIX_BYTES + length > file_size:
        raise CorruptError(
            f"the header needs {PREFIX_BYTES + length} bytes, the file has {file_size}: it was cut short"
        )
    return length


def parse(header: bytes, file_size: int) -> Container:
    """Read a header's JSON text and check that entries tile the data exactly.

    Args:
        header: the JSON text (padding included).
        file_size: size of the whole file in bytes.

    Raises:
        CorruptError: naming the entry where one is at fault.
    """
    try:
        record = json.loads(header.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CorruptError(f"the header is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise CorruptError("the header is not a JSON object")
    metadata = record.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptError("the header's __metadata__ is not a table of strings")
    entries = {name: _parse_entry(name, value) for name, value in record.items()}
    data_start = PREFIX_BYTES + len(header)
    _check_tiling(entries.values(), file_size - data_start)
    return Container(entries=entries, metadata=metadata, data_start=data_start)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _parse_entry(name: str, value: object) -> Entry:
    def fail(reason: str) -> CorruptError:
        return CorruptError(f"entry {name!r}: {reason}", tensor=name)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise fail("must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE | FOREIGN_ITEM_SIZE:
        raise fail(f"unknown dtype {reprlib.repr(dtype)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_count(size) for size in shape):
        raise fail(f"shape {reprlib.repr(shape)} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise fail(f"data_offsets {reprlib.repr(offsets)} is not a pair of offsets")
    begin, end = offsets
    if end - begin != num_bytes(dtype, tuple(shape)):
        raise fail(
            f"{dtype} of shape {shape} needs {num_bytes(dtype, tuple(shape))} bytes, its offsets span {end - begin}"
        )
    return Entry(name=name, dtype=dtype, shape=tuple(shape), begin=begin, end=end)


def _check_tiling(entries: Iterable[Entry], data_size: int) -> None:
    position = 0
    for entry in sorted(entries, key=lambda e: (e.begin, e.end)):
        if entry.begin != position:
            raise CorruptError(
                f"entry {entry.name!r} starts at byte {entry.begin} of the data, expected {position}", tensor=entry.name
            )
        position = entry.end
    if position != data_size:
        reason = "it was cut short" if data_size < position else "something was appended to it"
        raise CorruptError(f"the header describes {position} bytes of data, the file has {data_size}: {reason}")


def lay_out(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Place tensors one after the other, largest item first (so that each is aligned to its item), then by name.

    Args:
        shapes: name → (dtype, shape).
    """
    sizes = ITEM_SIZE | FOREIGN_ITEM_SIZE
    entries, position = {}, 0
    for name in sorted(shapes, key=lambda n: (-sizes[shapes[n][0]], n)):
        dtype, shape = shapes[name]
        end = position + num_bytes(dtype, shape)
        entries[name] = Entry(name=name, dtype=dtype, shape=shape, begin=position, end=end)
        position = end
    return entries


def render(entries: Mapping[str, Entry], metadata: Mapping[str, str], alignment: int = ALIGNMENT) -> bytes:
    """Return length prefix and JSON header, padded with spaces so that the data starts on a boundary of so many bytes."""
    record: dict[str, Any] = {"__metadata__": dict(metadata)}
    for entry in sorted(entries.values(), key=lambda e: e.begin):
        record[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(PREFIX_BYTES + len(text)) % alignment)
    return len(text).to_bytes(PREFIX_BYTES, "little") + text
