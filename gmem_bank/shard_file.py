"""One file of a folder of shards: laid out, written under a hash of its own, read, and checked.

Shapes: n rows, E shape of one row's array.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.errors import CorruptError, SourceError
from gmem_bank.provenance import canonical_json
from gmem_bank.storage import atomic, container
from gmem_bank.storage.payload import NUMPY_DTYPE

STORED = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
"""How NumPy holds values: bfloat16 as its bits."""
PAGE = 4096
HASH = "sha256"
"""Of the header's metadata: see `_hash_of`; files of earlier versions have none."""
CHUNK = 1 << 20
REMEDY = "the command that made the folder, given again, makes damaged shards anew"


def write_shard(path: Path, arrays: Mapping[str, NDArray[Any]], kinds: Mapping[str, str]) -> None:
    """Write a file whole, with the hash of what it says and holds.

    Args:
        path: replaced where it is there.
        arrays: "values" and what else there is, by name.
        kinds: the type of each in the file.

    Raises:
        WriteError: the disk refused.
    """
    laid = _lay_out({name: (kinds[name], array.shape) for name, array in arrays.items()})
    parts = [np.ascontiguousarray(arrays[name]).data.cast("B") if arrays[name].size else b"" for name in laid]
    header = container.render(laid, {HASH: _hash_of(laid, parts)}, PAGE)
    with atomic.replacing(path, needed=sum(array.nbytes for array in arrays.values())) as stream:
        stream.write(header)
        for part in parts:
            stream.write(part)


def _hash_of(entries: Mapping[str, container.Entry], data: Iterable[bytes | memoryview]) -> str:
    """Return the sha256 of where entries lie, as canonical JSON in the order of the data, and of the data."""
    placed = sorted(entries.values(), key=lambda entry: (entry.begin, entry.end, entry.name))
    laid = [[entry.name, entry.dtype, list(entry.shape), entry.begin, entry.end] for entry in placed]
    digest = hashlib.sha256(canonical_json(laid).encode())
    for part in data:
        digest.update(part)
    return digest.hexdigest()


def _lay_out(shapes: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, container.Entry]:
    """Place `values` first, where what follows stays aligned to its items, else largest items first."""
    size = container.num_bytes(*shapes["values"])
    if size % 8:
        return container.lay_out(shapes)
    rest = container.lay_out({name: shape for name, shape in shapes.items() if name != "values"})
    first = container.Entry(name="values", dtype=shapes["values"][0], shape=shapes["values"][1], begin=0, end=size)
    moved = {
        name: container.Entry(name=name, dtype=e.dtype, shape=e.shape, begin=e.begin + size, end=e.end + size)
        for name, e in rest.items()
    }
    return {"values": first, **moved}


class ShardFile:
    """What one file holds, and where; it is open only while it is read.

    Args:
        path: as `write_shard` left it.

    Raises:
        SourceError: it cannot be read.
        CorruptError: it is damaged, as far as its header tells.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                prefix = stream.read(container.PREFIX_BYTES)
                header = stream.read(container.header_bytes_of(prefix, size))
            self._parsed = container.parse(header, size)
            values = self._parsed.entries["values"]
            self.dtype, self._num_rows, self.shape = values.dtype, values.shape[0], values.shape[1:]
            self.row_bytes = container.num_bytes(values.dtype, values.shape[1:])
            self.start = self._parsed.data_start + values.begin
            if self.dtype not in STORED:
                raise ValueError(f"its values are {self.dtype}")
            keys = self._parsed.entries["keys.offsets"].shape
        except OSError as error:
            raise SourceError(f"could not read {path}: {error.strerror or error}", path=path) from error
        except (KeyError, ValueError, IndexError) as error:
            raise CorruptError(f"{path} is damaged: {error}: {REMEDY}", path=path) from error
        if keys != (self._num_rows + 1,):
            raise CorruptError(f"{path} has keys of shape {list(keys)} for {self._num_rows} rows", path=path)

    def __len__(self) -> int:
        return self._num_rows

    def entry(self, name: str) -> NDArray[Any]:
        """Return a whole entry as an array; raises CorruptError where there is none of that name."""
        entry = self._parsed.entries.get(name)
        if entry is None:
            raise CorruptError(f"{self.path} has no entry {name!r}", path=self.path, tensor=name)
        dtype = np.dtype(NUMPY_DTYPE[entry.dtype])
        with self.path.open("rb") as stream:
            stream.seek(self._parsed.data_start + entry.begin)
            array = np.fromfile(stream, dtype, math.prod(entry.shape))
        if array.size != math.prod(entry.shape):
            raise CorruptError(f"{self.path} was cut short", path=self.path, tensor=name)
        return array.reshape(entry.shape)

    def require_sound(self) -> None:
        """Raise CorruptError unless the file is, byte for byte, what was written; one without a hash is believed."""
        wanted = self._parsed.metadata.get(HASH)
        try:
            if wanted is not None and wanted != _hash_of(self._parsed.entries, self._data()):
                raise CorruptError(f"{self.path} is damaged: its bytes have changed: {REMEDY}", path=self.path)
        except OSError as error:
            raise SourceError(f"could not read {self.path}: {error.strerror or error}", path=self.path) from error

    def _data(self) -> Iterator[memoryview]:
        """Yield all that follows the header; one buffer is used again and again."""
        buffer = memoryview(bytearray(CHUNK))
        with self.path.open("rb", buffering=0) as stream:
            stream.seek(self._parsed.data_start)
            while size := stream.readinto(buffer):
                yield buffer[:size]

    def all_keys(self) -> Iterator[str]:
        """Yield the keys."""
        text, offsets = self.entry("keys.bytes"), self.entry("keys.offsets")
        key_tables.require_offsets(offsets, len(text), self.path)
        data = text.tobytes()
        return (key_tables.decode(data[a:b], self.path) for a, b in pairwise(offsets.tolist()))
