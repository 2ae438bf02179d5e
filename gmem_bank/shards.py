"""Arrays with keys in a folder of safetensors shards: patch tokens, latents and whatever else a training reads beside a bank.

The folder holds `00000.safetensors`, `00001.safetensors`, … (`values`, `keys.bytes`, `keys.offsets`) and, once all are there,
`index.json`. Shards are written whole, one after the other, so that interrupted work goes on where it stopped.

Shapes: N rows, n rows of a shard, E shape of one row's array.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.errors import CorruptError, FormatError, OutputExistsError, SourceError, UnknownKeyError, first_three
from gmem_bank.provenance import Json, canonical_json
from gmem_bank.storage import atomic, container

INDEX = "index.json"
PLAN = "plan.json"
FORMAT = "gmem-shards"
VERSION = 1
DTYPES = {"f32": np.float32, "f16": np.float16}
MOST_OPEN = 64
"""Shards that are mapped at a time."""
NAMES = {"F32": np.float32, "F16": np.float16}


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number:05d}.safetensors"


class ShardWriter:
    """Writes the shards of one job; a folder with another job's shards is refused.

    Args:
        folder: made if absent.
        plan: everything that decides the shards: with the same plan the work goes on, with another it is refused.
        overwrite: delete what another plan has left there.

    Raises:
        OutputExistsError: the folder holds something else.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Json], *, overwrite: bool = False) -> None:
        self.folder, self._plan = folder, canonical_json(dict(plan))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            present = {path.name for path in folder.iterdir() if not path.name.startswith(".")}
        except OSError as error:
            raise atomic.explain(error, folder) from error
        ours = {name for name in present if name in (INDEX, PLAN) or name.endswith(".safetensors")}
        same = PLAN in present and (folder / PLAN).read_text(encoding="utf-8") == self._plan
        if present != ours or (present and PLAN not in present):
            foreign = sorted(present - ours) or sorted(present)
            raise OutputExistsError(
                f"{folder} holds other files, such as {foreign[0]!r}: give an empty folder", path=folder
            )
        if present and not same:
            if not overwrite:
                raise OutputExistsError(
                    f"{folder} holds what was made from other rows or in another way: give another folder, or --overwrite",
                    path=folder,
                )
            for name in (INDEX, *sorted(present - {INDEX})):  # the index first: without it nothing is taken for whole
                (folder / name).unlink(missing_ok=True)
        if not same:
            atomic.write_bytes(folder / PLAN, self._plan.encode())

    @property
    def finished(self) -> bool:
        """Whether every shard and the index are there."""
        return (self.folder / INDEX).is_file()

    def has(self, number: int) -> bool:
        """Say whether a shard is there."""
        return (self.folder / shard_name(number)).is_file()

    def write(self, number: int, keys: Sequence[str], values: NDArray[Any]) -> None:
        """Write the (n, *E) values of n keys as one shard."""
        from safetensors.numpy import save

        text, offsets = key_tables.encode(keys)
        entries = {"values": np.ascontiguousarray(values), "keys.bytes": text, "keys.offsets": offsets}
        atomic.write_bytes(self.folder / shard_name(number), save(entries))

    def finish(self, num_shards: int, facts: Mapping[str, Json]) -> None:
        """Write the index, and with it declare the work done."""
        counts, shape, dtype = [], (), ""
        for number in range(num_shards):
            shard = _Shard(self.folder / shard_name(number))
            counts.append(len(shard))
            shape, dtype = shard.shape, shard.dtype
        record = {
            "format": FORMAT, "version": VERSION, "num_rows": counts, "shape": list(shape), "dtype": dtype, "facts": dict(facts),
        }  # fmt: skip
        atomic.write_bytes(self.folder / INDEX, (canonical_json(record) + "\n").encode())


class _Shard:
    """One file, mapped once: its entries are views of that map, which is let go with the last of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                prefix = stream.read(container.PREFIX_BYTES)
                header = stream.read(container.header_bytes_of(prefix, size))
            parsed = container.parse(header, size)
            whole = np.memmap(path, np.uint8, "r")
            self.dtype = parsed.entries["values"].dtype
            self.values = _view(whole, parsed, "values", NAMES[self.dtype])
            self._text = _view(whole, parsed, "keys.bytes", np.uint8)
            self._offsets = _view(whole, parsed, "keys.offsets", np.int64)
            key_tables.require_offsets(self._offsets, len(self._text), path)
        except OSError as error:
            raise SourceError(f"could not read {path}: {error.strerror or error}", path=path) from error
        except (KeyError, ValueError) as error:
            raise CorruptError(f"{path} is damaged: {error}", path=path) from error
        if len(self._offsets) != len(self.values) + 1:
            raise CorruptError(f"{path} has {len(self._offsets) - 1} keys for {len(self.values)} rows", path=path)
        self.shape = self.values.shape[1:]

    def __len__(self) -> int:
        return len(self.values)

    def all_keys(self) -> Iterator[str]:
        """Yield the keys."""
        text, offsets = self._text.tobytes(), self._offsets.tolist()
        return (key_tables.decode(text[a:b], self.path) for a, b in pairwise(offsets))


def _view(whole: NDArray[np.uint8], parsed: container.Container, name: str, dtype: Any) -> NDArray[Any]:
    entry = parsed.entries[name]
    own = np.asarray(whole)[parsed.data_start + entry.begin : parsed.data_start + entry.end]
    view: NDArray[Any] = own.view(dtype).reshape(entry.shape)
    return view


class Shards:
    """Arrays by key, read by memory map.

    Args:
        folder: as `ShardWriter` left it.

    Raises:
        SourceError: no such folder, or unfinished.
        FormatError, CorruptError: not shards, of a later version, or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        record = self._read_index()
        self.facts: dict[str, Json] = record["facts"]
        """What was said of them: the encoder's fingerprint and more."""
        self.shape: tuple[int, ...] = tuple(record["shape"])
        """E."""
        self._counts: list[int] = record["num_rows"]
        self._dtype = record["dtype"]
        self._starts = np.cumsum([0, *self._counts])
        self._open: OrderedDict[int, _Shard] = OrderedDict()
        for number in range(len(self._counts)):
            self._shard(number)  # a damaged or foreign file is found at once, not in the middle of a training

    def _read_index(self) -> dict[str, Any]:
        path = self.folder / INDEX
        if not path.is_file():
            state = (
                "unfinished: run the command that makes it again"
                if (self.folder / PLAN).is_file()
                else "no folder of shards"
            )
            raise SourceError(f"{self.folder} is {state}", path=self.folder)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            known = record["format"] == FORMAT and isinstance(record["version"], int)
            fields = [record[name] for name in ("num_rows", "shape", "dtype", "facts")]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{path} is not an index of shards: {error!r}", path=path) from error
        if not known or record["version"] > VERSION or not isinstance(fields[3], dict):
            raise FormatError(f"{path} is of a version that this gmem does not know: install a newer one", path=path)
        return dict(record)

    def _shard(self, number: int) -> _Shard:
        """Return a shard, mapped; of those least used the maps are let go, so that descriptors do not run out."""
        if number not in self._open:
            shard = _Shard(self.folder / shard_name(number))
            if (len(shard), list(shard.shape), shard.dtype) != (self._counts[number], list(self.shape), self._dtype):
                raise CorruptError(f"{shard.path} is not the shard that {INDEX} describes", path=shard.path)
            self._open[number] = shard
            if len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def keys(self) -> list[str]:
        """Return all N keys."""
        return [key for number in range(len(self._counts)) for key in self._shard(number).all_keys()]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys())}

    def rows_for(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the (B,) rows of keys, in their order; raises UnknownKeyError that names the first three unknown."""
        unknown = [key for key in keys if key not in self._rows]
        if unknown:
            raise UnknownKeyError(
                f"{self.folder} has nothing for {len(unknown)} keys, such as {first_three(unknown)}",
                path=self.folder,
                key=unknown[0],
            )
        return np.array([self._rows[key] for key in keys], np.int64)

    def read(self, rows: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float32]:
        """Return the (B, *E) float32 arrays of rows; raises IndexError for one out of range."""
        rows = np.asarray(rows, np.int64)
        if rows.size and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            raise IndexError(f"rows must be 0 to {len(self) - 1}")
        found = np.empty((len(rows), *self.shape), np.float32)
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(owners):
            places = np.flatnonzero(owners == number)
            found[places] = self._shard(number).values[rows[places] - self._starts[number]]
        return found
