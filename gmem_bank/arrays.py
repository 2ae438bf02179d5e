"""Snippets from files of arrays: npy, npz, safetensors, HDF5, Parquet; read without pickle, keys with them where there are any.

Shapes: n rows, D dimensions.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.arrow import require_pyarrow
from gmem_bank.errors import SourceError

ARRAY_SUFFIXES = (".npy", ".npz", ".safetensors", ".h5", ".hdf5", ".parquet")
SNIPPET_NAMES = ("snippets", "embeddings", "features", "vectors", "vector", "embedding")
PLAIN_TYPES = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
"""Of safetensors files, those that NumPy has."""
PARQUET_BYTES = {"DOUBLE": 8, "INT64": 8, "FLOAT": 4, "INT32": 4}
BLOCK_ROWS = 8192
MOST_EXPANSION = 200
"""Bytes that a byte of a compressed file may become: arrays of numbers do not shrink like that."""
MODEST_BYTES = 64 << 20
"""Of a table that is read whatever it takes on disk."""
BATCH_ROWS = 1024
KEY_NAMES = ("keys", "paths", "names", "ids", "key", "path", "name", "id")


@dataclass(kw_only=True)
class ArrayRows:
    """Rows of an array file."""

    path: Path
    snippets: NDArray[Any]
    """(n, D) numbers: of a .npy file a read-only map."""
    keys: list[str]
    """n keys: those of the file, else "0", "1", … with leading zeros."""
    has_keys: bool = False
    """Whether the keys are the file's."""

    @cached_property
    def digest(self) -> str:
        """sha256 over keys and values."""
        state = hashlib.sha256("\n".join(self.keys).encode())
        for start in range(0, len(self.snippets), BLOCK_ROWS):
            state.update(np.ascontiguousarray(self.snippets[start : start + BLOCK_ROWS]).view(np.uint8).data)
        return state.hexdigest()


def is_array_file(path: Path) -> bool:
    """Say whether a path is an array file by its suffix."""
    return path.suffix.lower() in ARRAY_SUFFIXES and not path.is_dir()


def read_array(path: str | os.PathLike[str]) -> ArrayRows:
    """Read an array file.

    A file with several arrays must name the right one "snippets" ("embeddings", "features", "vectors"); "keys" ("paths",
    "names", "ids"), where there is such an array of text, names the rows.

    Raises:
        SourceError: unreadable, ambiguous, not (n, D) numbers, or keys that do not fit.
    """
    path = Path(path)
    try:
        named = _read_any(path)
    except SourceError:
        raise
    except (OSError, ValueError, KeyError, ImportError, EOFError, RuntimeError, zlib.error) as error:
        raise SourceError(f"could not read {path}: {why_unreadable(error)}", path=path) from error
    keys = next((named.pop(name) for name in KEY_NAMES if name in named), None)
    name = next((name for name in SNIPPET_NAMES if name in named), None) or (
        next(iter(named)) if len(named) == 1 else None
    )
    if not named and name is None:
        raise SourceError(f"{path} has no array at its top level: save one there, named 'snippets'", path=path)
    if name is None:
        raise SourceError(f"{path} has the arrays {sorted(named)[:8]}: name the one to take 'snippets'", path=path)
    values = named[name]
    if values.ndim != 2 or not values.size or values.dtype.kind not in "fiu":
        raise SourceError(
            f"{path}: array {name!r} is {values.dtype} of shape {list(values.shape)}, expected numbers (n, D)",
            path=path,
        )
    return ArrayRows(path=path, snippets=values, keys=_keys(path, keys, len(values)), has_keys=keys is not None)


def why_unreadable(error: Exception) -> str:
    """Return why a file of arrays cannot be read, in our words where NumPy found pickled objects in it."""
    pickled = any(words in str(error) for words in ("Python objects", "Object arrays", "pickled"))
    return "it holds pickled Python objects, which can run code and are never read" if pickled else str(error)


def _read_any(path: Path) -> dict[str, NDArray[Any]]:
    suffix = path.suffix.lower()
    if path.stat().st_size == 0:
        raise ValueError("it is empty")
    if suffix == ".npz":
        _require_modest(path)
    if suffix == ".npy":
        return {"snippets": np.load(path, mmap_mode="r", allow_pickle=False)}
    if suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            return dict(stored.items())
    if suffix == ".safetensors":
        return _read_safetensors(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    import h5py

    with h5py.File(path, "r") as stored:
        if any(not isinstance(stored.get(name, getlink=True), h5py.HardLink) for name in stored):
            raise SourceError(f"{path} has links to somewhere else, which are not followed", path=path)
        return {name: _plain(path, item) for name, item in stored.items() if isinstance(item, h5py.Dataset)}


def _plain(path: Path, dataset: Any) -> NDArray[Any]:
    """Return a dataset whose values lie in the file itself, plainly; raises SourceError."""
    properties = dataset.id.get_create_plist()
    if dataset.is_virtual or properties.get_external_count() or properties.get_nfilters():
        raise SourceError(
            f"{path}: dataset {dataset.name!r} is virtual, filtered (compressed) or lies in another file, which is not read: "
            "'h5repack -f NONE' makes it plain",
            path=path,
        )
    if dataset.nbytes > path.stat().st_size:
        raise SourceError(
            f"{path}: dataset {dataset.name!r} has {dataset.nbytes:,} bytes, the file has fewer", path=path
        )
    return np.asarray(dataset.asstr()[()] if dataset.dtype.kind == "O" else dataset[()])


def _require_modest(path: Path) -> None:
    """Raise SourceError where a zip would unpack to far more than it holds."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except zipfile.BadZipFile as error:
        raise SourceError(f"could not read {path}: {error}", path=path) from error
    if unpacked > MOST_EXPANSION * path.stat().st_size:
        raise SourceError(f"{path} would unpack to {unpacked:,} bytes: save it without compression", path=path)


def _read_parquet(path: Path) -> dict[str, NDArray[Any]]:
    """Return the columns of vectors (lists of one length) and of keys (texts)."""
    arrow = require_pyarrow()
    try:
        file = arrow.parquet.ParquetFile(path)
        wanted = [f.name for f in file.schema_arrow if _is_vector(arrow.types, f.type) or f.name in KEY_NAMES]
        _require_modest_columns(path, file.metadata, wanted)
        table = _read_columns(path, arrow, file, wanted)
    except arrow.ArrowException as error:
        raise SourceError(f"could not read {path}: {error}", path=path) from error
    return {name: _numpy_column(path, name, table.column(name).combine_chunks()) for name in wanted}


def _require_modest_columns(path: Path, metadata: Any, wanted: Sequence[str]) -> None:
    """Raise SourceError where columns would unpack to far more than the file holds: equal numbers are stored once."""
    size = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for leaf in map(group.column, range(metadata.num_columns)):
            if leaf.path_in_schema.partition(".")[0] in wanted:
                width = PARQUET_BYTES.get(leaf.physical_type, 1)
                size += max(leaf.total_uncompressed_size, leaf.num_values * width)
    _require_at_most(path, size)


def _read_columns(path: Path, arrow: Any, file: Any, wanted: Sequence[str]) -> Any:
    """Return columns, a few rows at a time, since of texts the file does not say how long they are."""
    batches, size = [], 0
    for batch in file.iter_batches(BATCH_ROWS, columns=wanted):
        size += batch.nbytes
        _require_at_most(path, size)
        batches.append(batch)
    return arrow.Table.from_batches(batches) if batches else file.read(columns=wanted)


def _require_at_most(path: Path, size: int) -> None:
    if size > max(MODEST_BYTES, MOST_EXPANSION * path.stat().st_size):
        raise SourceError(
            f"{path} would unpack to {size:,} bytes or more: save it as .npy or .safetensors",
            path=path,
        )


def _is_vector(types: Any, kind: Any) -> bool:
    lists = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(lists and (types.is_floating(kind.value_type) or types.is_integer(kind.value_type)))


def _numpy_column(path: Path, name: str, column: Any) -> NDArray[Any]:
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise SourceError(f"{path}: row {row} has no value in column {name!r}", path=path, row=row)
    if not hasattr(column, "flatten") or not _is_vector(require_pyarrow().types, column.type):
        return np.asarray(column.to_pylist())
    lengths = np.asarray(column.value_lengths())
    if len(lengths) and (lengths != lengths[0]).any():
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise SourceError(
            f"{path}: the vector of row {row} has {lengths[row]} numbers, the first {lengths[0]}", path=path, row=row
        )
    return np.asarray(column.flatten().to_numpy(zero_copy_only=False)).reshape(len(column), -1)


def _read_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as stored:
            if "gmem" in (stored.metadata() or {}):
                raise SourceError(f"{path} is a bank: join it with 'gmem-bank merge'", path=path)
            kinds = {name: stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118 - not a dictionary
            odd = sorted(name for name, kind in kinds.items() if kind not in (*PLAIN_TYPES, "BF16"))
            if odd:
                raise SourceError(
                    f"{path}: array {odd[0]!r} is of the type {kinds[odd[0]]}, which is not read: save it as F32, F16 or BF16",
                    path=path, tensor=odd[0],
                )  # fmt: skip
            plain = {name: stored.get_tensor(name) for name, kind in kinds.items() if kind != "BF16"}
        return plain | _read_bfloat16(path, [name for name, kind in kinds.items() if kind == "BF16"])
    except (SafetensorError, TypeError) as error:
        raise SourceError(f"could not read {path}: {error}", path=path) from error


def _read_bfloat16(path: Path, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Return arrays of bfloat16, which NumPy does not have, as float32: the same numbers."""
    if not names:
        return {}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        return {name: stored.get_tensor(name).float().numpy() for name in names}


def _keys(path: Path, stored: NDArray[Any] | None, num_rows: int) -> list[str]:
    if stored is None:
        return [f"{row:0{len(str(num_rows - 1))}d}" for row in range(num_rows)]
    if stored.shape != (num_rows,) or stored.dtype.kind not in "USO":
        raise SourceError(
            f"{path}: its keys are {stored.dtype} of shape {list(stored.shape)}, expected {num_rows} texts", path=path
        )
    try:
        return [key.decode() if isinstance(key, bytes) else str(key) for key in stored.tolist()]
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: its keys are not UTF-8: {error}", path=path) from error
