"""pyarrow, or an error that says how to get it, and what is known of an Arrow stream before its values are read.

Shapes: none here.
"""

from __future__ import annotations

import struct
from typing import Any

from gmem_bank.errors import MissingDependencyError


def require_pyarrow() -> Any:
    """Return the pyarrow module, its Parquet part with it; raises MissingDependencyError that names the extra."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet and Arrow tables need pyarrow: pip install pyarrow (the extra gmem[parquet])", extra="parquet"
        ) from error
    return pyarrow


HEADER_TYPE, HEADER = 1, 2
"""Fields of a Message (Message.fbs of Apache Arrow)."""
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
DICTIONARY_DATA = 1
COMPRESSION = 3


def is_compressed(metadata: bytes) -> bool:
    """Say by the metadata of an Arrow message (a FlatBuffer) whether its buffers have to be unpacked; ValueError if damaged."""
    try:
        (root,) = struct.unpack_from("<I", metadata)
        place = _field(metadata, root, HEADER_TYPE)
        kind = metadata[place] if place else 0
        if kind not in (DICTIONARY_BATCH, RECORD_BATCH):
            return False
        batch = _table(metadata, root, HEADER)
        if kind == DICTIONARY_BATCH:
            batch = _table(metadata, batch, DICTIONARY_DATA)
        return bool(_field(metadata, batch, COMPRESSION))
    except (struct.error, IndexError) as error:
        raise ValueError(f"the metadata of a batch is damaged: {error}") from error


def _field(data: bytes, table: int, number: int) -> int:
    """Return where a field of a table lies, 0 where it is left out (FlatBuffers internals: a table points to its vtable)."""
    (back,) = struct.unpack_from("<i", data, table)
    (size,) = struct.unpack_from("<H", data, table - back)
    place = 4 + 2 * number
    offset = struct.unpack_from("<H", data, table - back + place)[0] if place < size else 0
    return table + offset if offset else 0


def _table(data: bytes, table: int, number: int) -> int:
    """Return where the table lies that a field refers to."""
    place = _field(data, table, number)
    if not place:
        raise IndexError(f"no field {number}")
    return int(place + struct.unpack_from("<I", data, place)[0])
