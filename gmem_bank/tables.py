"""Images in tables: Parquet and Arrow files, and folders of the Hugging Face datasets library.

Shapes: N rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gmem_bank.arrow import require_pyarrow
from gmem_bank.columns import Columns, class_names, labelled_key, numbered
from gmem_bank.decoding import MAX_FILE_BYTES
from gmem_bank.errors import SourceError
from gmem_bank.key_places import KeyPlaces
from gmem_bank.listing import Items, Listing, RowGroups, Skipped
from gmem_bank.naming import image_key_problem
from gmem_bank.sources import class_folder_problem, matching_files, printable_path
from gmem_bank.table_files import TableFile, opened

SUFFIXES = (".parquet", ".arrow")
LABEL_NAMES = ("label", "labels", "class")
DATASET_FILES = ("state.json", "dataset_info.json")
SPLITS = "dataset_dict.json"


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
    table = opened(paths[0])
    image = _image_column(table, asked.image, paths[0])
    label = asked.label_among(_usual_labels(table), table.names, paths[0])
    items = Items(Path(source), prefix, inside="table", column=image)
    ignored = _unnamed_labels(table) if asked.label is None else []
    groups = RowGroups()
    for path in paths:
        table = opened(path)
        for name in filter(None, (image, label, asked.key)):
            table.require(name)
        _require_names(table, asked.key)
        _append(items, ignored, groups, table, _keys(table, label, asked.key))
    if not items:
        raise SourceError(f"no rows in {source}", path=str(source))
    twice = KeyPlaces(items).repeated()
    if twice:
        key = items.key(twice[1])
        advice = "; leave --key-column out to number the rows" if asked.key else ", so rename one of the files"
        raise SourceError(f"two rows of {source} have the key {key!r}: keys must differ within a bank{advice}", key=key)
    record = {
        name: value for name, value in (("image", image), ("label", label), ("key", asked.key)) if value is not None
    }
    return Listing(
        root=Path(source), items=items, ignored=tuple(ignored), kind="table", columns=record,
        classes=bool(prefix or label or asked.key), groups=groups,
    )  # fmt: skip


def _require_names(table: TableFile, key: str | None) -> None:
    """Raise SourceError where a key column holds neither texts nor whole numbers."""
    types = require_pyarrow().types
    kind = None if key is None else table.schema.field(key).type
    if kind is not None and not (types.is_string(kind) or types.is_large_string(kind) or types.is_integer(kind)):
        raise SourceError(
            f"{table.path}: column {key!r} is {kind}, expected texts or whole numbers for keys",
            path=table.path,
            key=key,
        )


def _unnamed_labels(table: TableFile) -> list[Skipped]:
    """Return a remark for each column of classes that is not taken by itself: numbers that the file has no names for."""
    taken = _usual_labels(table)
    return [
        Skipped(
            path=table.path.name,
            reason=f"column {name!r} has numbers without names: --label-column {name} makes them classes",
        )
        for name in LABEL_NAMES if name in table.names and name not in taken
    ]  # fmt: skip


def _append(
    items: Items, ignored: list[Skipped], groups: RowGroups, table: TableFile, keys: Iterator[str | None]
) -> None:
    """Add the rows of one file, with the places at which its row groups begin."""
    path, prefix, modified = table.path, items.prefix, table.path.stat().st_mtime_ns
    sizes = dict(table.groups(items.column))
    for row, key in enumerate(keys):
        if row in sizes:
            groups.append(len(items), sizes[row])
        reason = "has no text" if key is None else _key_problem(prefix + key)
        if reason:
            text = f"its key {printable_path(str(key))!r} {reason}"
            ignored.append(Skipped(path=f"{path.name}:{row}", reason=text))
        else:
            items.append(f"{prefix}{key}", 0, modified, path=path, place=row)


def _key_problem(key: str) -> str:
    return image_key_problem(key) or class_folder_problem(key)


def has_image_column(path: Path) -> bool:
    """Say whether a table has a column that can hold images; raises SourceError where it cannot be read."""
    return bool(_image_columns(opened(path)))


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
    table = opened(path)
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


def _image_columns(table: TableFile) -> list[str]:
    """Return the columns that can hold images: bytes, or {bytes, path} as the datasets library has them."""
    types = require_pyarrow().types

    def can_hold(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and can_hold(kind.field("bytes").type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    return [name for name in table.names if can_hold(table.schema.field(name).type)]


def _image_column(table: TableFile, asked: str | None, path: Path) -> str:
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


def _usual_labels(table: TableFile) -> list[str]:
    """Return columns that name classes: texts, or numbers whose names the file has."""
    types = require_pyarrow().types
    usual = [name for name in LABEL_NAMES if name in table.names]
    return [n for n in usual if types.is_string(table.schema.field(n).type) or _names_of_classes(table, n)]


def _names_of_classes(table: TableFile, column: str) -> list[str]:
    """Return the names that the datasets library keeps for the numbers of a column, [] where there are none."""
    try:
        features = json.loads((table.schema.metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features[column]["names"]]
    except (KeyError, ValueError, TypeError):
        return []


def _keys(table: TableFile, label: str | None, key: str | None) -> Iterator[str | None]:
    """Yield the key of every row, None where its key column has none."""
    classes = None if label is None else class_names(_labels(table, label), table.path)
    given = None if key is None else table.column(key)
    for row in range(table.num_rows):
        if given is None:
            yield labelled_key(classes, row, numbered(table.path.stem, row, table.num_rows, flat=classes is not None))
        else:
            value = next(given)
            yield None if value in (None, "") else labelled_key(classes, row, str(value))


def _labels(table: TableFile, label: str) -> Iterator[object]:
    """Yield the class of every row, by its name where the file has names for numbers."""
    names = _names_of_classes(table, label)
    for value in table.column(label):
        yield names[value] if names and isinstance(value, int) and 0 <= value < len(names) else value
