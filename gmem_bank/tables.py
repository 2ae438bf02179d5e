"""Images in tables: Parquet and Arrow files, and folders of the Hugging Face datasets library.

Shapes: N rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from gmem_bank.arrow import require_pyarrow
from gmem_bank.columns import Columns, class_names, labelled_key, numbered
from gmem_bank.decoding import MAX_FILE_BYTES
from gmem_bank.errors import SourceError
from gmem_bank.listing import Items, Listing, Skipped
from gmem_bank.naming import key_problem
from gmem_bank.sources import class_folder_problem, matching_files, printable_path

SUFFIXES = (".parquet", ".arrow")
LABEL_NAMES = ("label", "labels", "class")
DATASET_FILES = ("state.json", "dataset_info.json")
SPLITS = "dataset_dict.json"
WHOLE_BYTES = 128 << 20
"""A row group up to this size is kept in memory, so that rows may be read in any order; a larger one is read as a stream."""
STREAM_ROWS = 32


def is_dataset_folder(path: Path) -> bool:
    """Say whether a folder was written by `datasets.save_to_disk`."""
    return (path / SPLITS).is_file() or all((path / name).is_file() for name in DATASET_FILES)


def list_tables(source: str | Path, *, prefix: str = "", columns: Columns | None = None) -> Listing:
    """List the images in a column of tables, row by row.

    Keys are "<file's stem>/<number>"; where there is a column of classes, "<class>/<stem>-<number>"; or what the key column says.

    Args:
        source: a .parquet or .arrow file, a glob pattern of them, or a folder of `datasets.save_to_disk`.
        prefix: put before each key.
        columns: which columns to take; None: the only one with images (bytes, or {bytes, path}), and a column "label" of texts or
            of named classes.

    Raises:
        SourceError: unreadable, no column of images, or two rows with one key.
        MissingDependencyError: pyarrow is not installed.
    """
    asked = columns or Columns()
    paths = table_paths(source)
    table = _opened(paths[0])
    image = _image_column(table, asked.image, paths[0])
    label = asked.label_among(_usual_labels(table), table.names, paths[0])
    items, ignored = Items(Path(source), prefix, inside="table", column=image), []
    for path in paths:
        table, modified = _opened(path), path.stat().st_mtime_ns
        for name in filter(None, (image, label, asked.key)):
            table.require(name)
        for row, key in enumerate(_keys(table, label, asked.key)):
            reason = (
                "its key has no text"
                if key is None
                else key_problem(prefix + key) or class_folder_problem(prefix + key)
            )
            if reason:
                ignored.append(
                    Skipped(path=f"{path.name}:{row}", reason=f"its key {printable_path(str(key))!r} {reason}")
                )
            else:
                items.append(f"{prefix}{key}", 0, modified, path=path, place=row)
    if not items:
        raise SourceError(f"no rows in {source}", path=str(source))
    _require_distinct(items, source)
    record = {
        name: value for name, value in (("image", image), ("label", label), ("key", asked.key)) if value is not None
    }
    return Listing(
        root=Path(source), items=items, ignored=tuple(ignored), kind="table", columns=record,
        classes=bool(prefix or label or asked.key),
    )  # fmt: skip


def has_image_column(path: Path) -> bool:
    """Say whether a table has a column that can hold images; raises SourceError where it cannot be read."""
    return bool(_image_columns(_opened(path)))


def table_paths(source: str | Path) -> list[Path]:
    """Return the files of a table source, in order; raises SourceError."""
    folder = Path(source)
    if not folder.is_dir():
        return matching_files(source)
    if (folder / SPLITS).is_file():
        splits = sorted(path.name for path in folder.iterdir() if path.is_dir())
        raise SourceError(
            f"{folder} holds the splits {splits}: give one of them, such as {folder / splits[0]}", path=folder
        )
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"{folder} has no readable state.json: {error}", path=folder) from error
    if state.get("_indices_data_files") or any("/" in name for name in names):
        raise SourceError(f"{folder} is a view of other rows: write it whole with flatten_indices() first", path=folder)
    return [folder / name for name in names]


def read_cell(path: Path, column: str, row: int) -> bytes:
    """Return the bytes of the image in a row of a table; raises SourceError."""
    table = _opened(path)
    table.require(column)
    value = table.cell(column, row)
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes) or not value:
        raise SourceError(f"{path}: row {row} has no bytes in column {column!r}", path=path, row=row)
    if len(value) > MAX_FILE_BYTES:
        raise SourceError(
            f"{path}: row {row} has more than {MAX_FILE_BYTES >> 20} MiB for one image", path=path, row=row
        )
    return value


def _opened(path: Path) -> _Table:
    try:
        return _open(path, path.stat().st_mtime_ns)
    except OSError as error:
        raise SourceError(f"could not read {path}: {error}", path=path) from error


@lru_cache(maxsize=8)
def _open(path: Path, _modified: int) -> _Table:
    arrow = require_pyarrow()
    kind = _ParquetTable if path.suffix.lower() == ".parquet" else _ArrowTable
    try:
        return kind(path, arrow)
    except (OSError, arrow.ArrowException) as error:
        raise SourceError(f"{path} is not a readable table: {error}", path=path) from error


class _Table:
    """One file; `cell` reads a value, `column` yields all values of a narrow column."""

    path: Path
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

    def column(self, name: str) -> Iterator[Any]:
        """Yield the values of a column, row by row."""
        raise NotImplementedError

    def cell(self, name: str, row: int) -> Any:
        """Return one value."""
        raise NotImplementedError


class _ArrowTable(_Table):
    """A stream or file of Arrow, mapped: nothing is read before it is asked for."""

    def __init__(self, path: Path, arrow: Any) -> None:
        source = arrow.memory_map(str(path))
        try:
            reader = arrow.ipc.open_file(source)
        except arrow.ArrowInvalid:
            reader = arrow.ipc.open_stream(source)
        self.path, self._table = path, reader.read_all()
        self.schema, self.num_rows = self._table.schema, self._table.num_rows

    def column(self, name: str) -> Iterator[Any]:
        for chunk in self._table.column(name).chunks:
            yield from chunk.to_pylist()

    def cell(self, name: str, row: int) -> Any:
        if not 0 <= row < self.num_rows:
            raise SourceError(f"{self.path} has {self.num_rows} rows, none numbered {row}", path=self.path, row=row)
        return self._table.column(name)[row].as_py()


class _ParquetTable(_Table):
    """A Parquet file, read by row group."""

    def __init__(self, path: Path, arrow: Any) -> None:
        self.path, self._arrow = path, arrow
        self._file = arrow.parquet.ParquetFile(path)
        self.schema, self.num_rows = self._file.schema_arrow, self._file.metadata.num_rows
        sizes = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = [sum(sizes[:g]) for g in range(len(sizes) + 1)]
        self._batches: Iterator[Any] = iter(())
        self._at: tuple[str, int] = ("", -1)
        self._first = 0
        self._values: Any = None

    def column(self, name: str) -> Iterator[Any]:
        for batch in self._file.iter_batches(columns=[name]):
            yield from batch.column(0).to_pylist()

    def cell(self, name: str, row: int) -> Any:
        if not 0 <= row < self.num_rows:
            raise SourceError(f"{self.path} has {self.num_rows} rows, none numbered {row}", path=self.path, row=row)
        group = next(g for g in range(len(self._starts) - 1) if row < self._starts[g + 1])
        try:
            self._seek(name, group, row)
        except (OSError, self._arrow.ArrowException) as error:
            self._at = ("", -1)
            raise SourceError(f"{self.path}: row {row} cannot be read: {error}", path=self.path, row=row) from error
        return self._values[row - self._first].as_py()

    def _seek(self, name: str, group: int, row: int) -> None:
        """Bring the batch with a row into memory: forwards through its row group, or from its beginning."""
        if self._at != (name, group) or row < self._first:
            size = self._file.metadata.row_group(group).total_byte_size
            rows = self._starts[group + 1] - self._starts[group]
            self._batches = self._file.iter_batches(
                STREAM_ROWS if size > WHOLE_BYTES else max(1, rows), row_groups=[group], columns=[name]
            )
            self._at, self._first, self._values = (name, group), self._starts[group], None
        while self._values is None or row >= self._first + len(self._values):
            self._first += 0 if self._values is None else len(self._values)
            batch = next(self._batches, None)
            if batch is None:
                raise OSError("its row group ends before")
            self._values = batch.column(0)


def _image_columns(table: _Table) -> list[str]:
    """Return the columns that can hold images: bytes, or {bytes, path} as the datasets library has them."""
    types = require_pyarrow().types

    def can_hold(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and can_hold(kind.field("bytes").type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return [name for name in table.names if can_hold(table.schema.field(name).type)]


def _image_column(table: _Table, asked: str | None, path: Path) -> str:
    """Return the column of images: the one asked for, or the only one that can hold any."""
    found = _image_columns(table)
    if asked is not None:
        table.require(asked)
        if asked not in found:
            raise SourceError(
                f"{path}: column {asked!r} is {table.schema.field(asked).type}, expected binary, or a struct with 'bytes'",
                path=path, key=asked,
            )  # fmt: skip
        return asked
    if len(found) != 1:
        none = f"has no column of images (binary) among {table.names[:12]}"
        problem = f"has the columns {found} that can hold images" if found else none
        raise SourceError(f"{path} {problem}: --image-column says which to take", path=path)
    return found[0]


def _usual_labels(table: _Table) -> list[str]:
    """Return columns that name classes: texts, or numbers whose names the file has."""
    types = require_pyarrow().types
    usual = [name for name in LABEL_NAMES if name in table.names]
    return [n for n in usual if types.is_string(table.schema.field(n).type) or _names_of_classes(table, n)]


def _names_of_classes(table: _Table, column: str) -> list[str]:
    """Return the names that the datasets library keeps for the numbers of a column, [] where there are none."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _keys(table: _Table, label: str | None, key: str | None) -> Iterator[str | None]:
    """Yield the key of every row, None where its key column has none."""
    names = [] if label is None else _names_of_classes(table, label)
    labels = [] if label is None else list(table.column(label))
    if names:
        labels = [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in labels]
    classes = None if label is None else class_names(labels, table.path)
    given = None if key is None else table.column(key)
    for row in range(table.num_rows):
        if given is None:
            yield labelled_key(classes, row, numbered(table.path.stem, row, table.num_rows, flat=classes is not None))
        else:
            value = next(given)
            yield None if value in (None, "") else labelled_key(classes, row, str(value))


def _require_distinct(items: Items, source: str | Path) -> None:
    seen: set[str] = set()
    for key in items.all_keys():
        if key in seen:
            raise SourceError(f"two rows of {source} have the key {key!r}: keys must differ within a bank", key=key)
        seen.add(key)
