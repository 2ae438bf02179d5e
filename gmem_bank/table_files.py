"""One Parquet or Arrow file: its columns, and the value of a row, with a bounded number of bytes in memory.

Shapes: N rows, G row groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from gmem_bank.arrow import is_compressed, require_pyarrow
from gmem_bank.errors import SourceError

WHOLE_BYTES = 128 << 20
"""The values of a row group up to this size are kept in memory, so that rows may be read in any order; more are a stream."""
CACHED_BYTES = 256 << 20
"""Of such values in a process, over all files; those used longest ago are dropped."""
STREAM_ROWS = 32
STREAM_BUFFER = 1 << 20
OPEN_FILES = 64
COLUMN_ROWS = 8192
MAGIC = b"ARROW1\0\0"
"""With which a file of Arrow begins; a stream follows."""


def opened(path: Path) -> TableFile:
    """Return an open table, the same as before where the file did not change; raises SourceError."""
    try:
        facts = path.stat()
    except OSError as error:
        raise SourceError(f"could not read {path}: {error}", path=path) from error
    return _open(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=OPEN_FILES)
def _open(path: Path, modified: int, size: int) -> TableFile:
    arrow = require_pyarrow()
    kind = _ParquetTable if path.suffix.lower() == ".parquet" else _ArrowTable
    try:
        table = kind(path, arrow)
    except (OSError, arrow.ArrowException) as error:
        raise SourceError(f"{path} is not a readable table: {error}", path=path) from error
    table.identity = (path, modified, size)
    return table


class TableFile(ABC):
    """One file; `cell` reads a value, `column` yields all values of a narrow column."""

    path: Path
    identity: tuple[Path, int, int]
    """Path, time of change and size: the same content under it, also after the file was closed and opened again."""
    schema: Any
    num_rows: int

    @property
    def names(self) -> list[str]:
        """Columns."""
        return list(self.schema.names)

    def require(self, name: str) -> None:
        """Raise SourceError where there is no such column."""
        if name not in self.names:
            raise SourceError(f"{self.path} has no column {name!r}; it has {self.names[:12]}", path=self.path, key=name)

    @abstractmethod
    def groups(self, name: str) -> list[tuple[int, int]]:
        """Return (first row, bytes to read for any value of a column) of the parts that a file is read by; 0 where mapped."""

    @abstractmethod
    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of a column, row by row."""

    def cell(self, name: str, row: int) -> Any:
        """Return one value; raises SourceError."""
        if not 0 <= row < self.num_rows:
            raise SourceError(f"{self.path} has {self.num_rows} rows, none numbered {row}", path=self.path, row=row)
        return self._value(name, row)

    @abstractmethod
    def _value(self, name: str, row: int) -> Any:
        """Return the value of a row that is there."""


class _ArrowTable(TableFile):
    """A stream or file of Arrow, mapped: nothing is read before it is asked for, and no value before its column was checked."""

    def __init__(self, path: Path, arrow: Any) -> None:
        self.path, self._arrow = path, arrow
        source = arrow.memory_map(str(path))
        begin = len(MAGIC) if source.read(len(MAGIC)) == MAGIC else 0
        source.seek(begin)
        try:
            packed = any(is_compressed(message.metadata.to_pybytes()) for message in _messages(arrow, source))
        except ValueError as error:
            raise SourceError(f"{path} is not a readable table: {error}", path=path) from error
        if packed:
            raise SourceError(
                f"{path} is compressed, so that it would have to be unpacked whole: write it without compression, or as Parquet",
                path=path,
            )
        source.seek(begin)
        self._table = arrow.ipc.open_stream(source).read_all()
        self._checked: dict[str, Any] = {}
        self.schema, self.num_rows = self._table.schema, self._table.num_rows

    def groups(self, name: str) -> list[tuple[int, int]]:  # noqa: ARG002 - the same for any column
        return [(0, 0)]

    def _column(self, name: str) -> Any:
        """Return a column whose offsets lead to its own bytes: pyarrow believes what a file says, and would read elsewhere."""
        if name not in self._checked:
            column = self._table.column(name)
            try:
                column.validate(full=True)
            except self._arrow.ArrowException as error:
                raise SourceError(
                    f"{self.path}: column {name!r} is damaged: {error}", path=self.path, key=name
                ) from error
            self._checked[name] = column
        return self._checked[name]

    def column(self, name: str) -> Iterator[Any]:
        for chunk in self._column(name).chunks:
            for start in range(0, len(chunk), COLUMN_ROWS):
                yield from chunk.slice(start, COLUMN_ROWS).to_pylist()

    def _value(self, name: str, row: int) -> Any:
        return self._column(name)[row].as_py()


def _messages(arrow: Any, source: Any) -> Iterator[Any]:
    """Yield the messages of an Arrow stream; of a mapped one no body is read."""
    reader = arrow.ipc.MessageReader.open_stream(source)
    while True:
        try:
            yield reader.read_next_message()
        except StopIteration:
            return


class _ParquetTable(TableFile):
    """A Parquet file, read by row group."""

    def __init__(self, path: Path, arrow: Any) -> None:
        self.path, self._arrow = path, arrow
        self._file = arrow.parquet.ParquetFile(path)
        self.schema, self.num_rows = self._file.schema_arrow, self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = list(accumulate(sizes, initial=0))
        self._large: set[tuple[str, int]] = set()

    def groups(self, name: str) -> list[tuple[int, int]]:
        return [(start, self._bytes(name, group)) for group, start in enumerate(self._starts[:-1])]

    def _bytes(self, name: str, group: int) -> int:
        about = self._file.metadata.row_group(group)
        leaves = (about.column(place) for place in range(about.num_columns))
        own = (leaf for leaf in leaves if leaf.path_in_schema == name or leaf.path_in_schema.startswith(f"{name}."))
        return sum(int(leaf.total_uncompressed_size) for leaf in own)

    def column(self, name: str) -> Iterator[Any]:
        for batch in self._file.iter_batches(COLUMN_ROWS, columns=[name]):
            yield from batch.column(0).to_pylist()

    def _value(self, name: str, row: int) -> Any:
        group = bisect_right(self._starts, row) - 1
        try:
            values = _MEMORY.whole(self, name, group)
            if values is None:
                return _MEMORY.stream(self, name, group, row).value(row)
            return values[row - self._starts[group]].as_py()
        except (OSError, self._arrow.ArrowException) as error:
            _MEMORY.forget_stream()
            raise SourceError(f"{self.path}: row {row} cannot be read: {error}", path=self.path, row=row) from error

    def read_group(self, name: str, group: int) -> Any:
        """Return the values of a row group as a chunked array, or None where they are too many bytes to keep."""
        if (name, group) in self._large or self._bytes(name, group) > WHOLE_BYTES:
            return None
        parts, size = [], 0
        for batch in self._file.iter_batches(STREAM_ROWS, row_groups=[group], columns=[name]):
            parts.append(batch.column(0))
            size += parts[-1].nbytes
            if size > WHOLE_BYTES:  # equal values are stored once, so the file may have said less
                self._large.add((name, group))
                return None
        if sum(map(len, parts)) != self._starts[group + 1] - self._starts[group]:
            raise OSError("its row group ends before")
        return self._arrow.chunked_array(parts)

    def batches(self, name: str, group: int) -> tuple[int, Iterator[Any]]:
        """Return the first row of a row group, and its values in batches, read through a small buffer."""
        parquet = self._arrow.parquet
        file = parquet.ParquetFile(self.path, metadata=self._file.metadata, buffer_size=STREAM_BUFFER)
        found = file.iter_batches(STREAM_ROWS, row_groups=[group], columns=[name])
        return self._starts[group], (batch.column(0) for batch in found)


class _Stream:
    """The values of one row group, forwards."""

    def __init__(self, first: int, batches: Iterator[Any]) -> None:
        self._batches = batches
        self.first, self._values = first, next(batches, ())

    def value(self, row: int) -> Any:
        """Return the value of a row that is not before the batch of the last one."""
        while row >= self.first + len(self._values):
            self.first += len(self._values)
            self._values = next(self._batches, None)
            if self._values is None:
                raise OSError("its row group ends before")
        return self._values[row - self.first].as_py()


_Place = tuple[tuple[Path, int, int], str, int]


class _Memory:
    """What a process keeps of Parquet files: values of row groups up to CACHED_BYTES, and one stream."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Place, Any] = OrderedDict()
        self.num_bytes = 0
        self._stream: tuple[_Place, _Stream] | None = None

    def whole(self, table: _ParquetTable, name: str, group: int) -> Any:
        """Return the values of a row group, or None where they are too many to be kept."""
        place = (table.identity, name, group)
        if place in self._kept:
            self._kept.move_to_end(place)
            return self._kept[place]
        values = table.read_group(name, group)
        if values is None:
            return None
        self._kept[place] = values
        self.num_bytes += values.nbytes
        while len(self._kept) > 1 and self.num_bytes > CACHED_BYTES:
            self.num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return values

    def stream(self, table: _ParquetTable, name: str, group: int, row: int) -> _Stream:
        """Return the stream of a row group: that which there is, or one from its beginning where it has passed the row."""
        place = (table.identity, name, group)
        if self._stream is None or self._stream[0] != place or row < self._stream[1].first:
            self._stream = None
            self._stream = place, _Stream(*table.batches(name, group))
        return self._stream[1]

    def forget_stream(self) -> None:
        """Begin anew with the next row."""
        self._stream = None


_MEMORY = _Memory()
