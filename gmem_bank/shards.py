"""Arrays with keys in a folder of safetensors shards: patch tokens, latents and whatever else a training reads beside a bank.

The folder holds `00000.safetensors`, `00001.safetensors`, … (`values`, `keys.bytes`, `keys.offsets`, and what else was said of
each row or shard) and, once all are there, `index.json`. Shards are written whole, one after the other, so that interrupted
work goes on where it stopped. `values` comes first and begins at a page of the file: a row is read by one call, and by no more
than its own pages.

Shapes: N rows, n rows of a shard, E shape of one row's array.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.errors import CorruptError, OutputExistsError, SourceError, UnknownKeyError, first_three
from gmem_bank.open_files import OpenFile, OpenFiles
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json, canonical_json
from gmem_bank.segments import narrow, widen
from gmem_bank.shard_file import REMEDY, STORED, ShardFile, write_shard
from gmem_bank.shard_index import INDEX, PLAN, read_index, shard_name, write_index
from gmem_bank.storage import atomic
from gmem_bank.storage.payload import Payload

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""--dtype on the command line → type of the values in the files."""
READERS = 4
"""Threads that read shards through."""


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
            if not overwrite and present != {PLAN}:  # a plan alone is of work that failed before its first shard
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
        """Whether the index is there, and is one; raises FormatError where a later version wrote it."""
        try:
            return bool(read_index(self.folder))
        except (SourceError, CorruptError):
            return False

    def has(self, number: int) -> bool:
        """Say whether a shard is there."""
        return (self.folder / shard_name(number)).is_file()

    def is_sound(self, number: int) -> bool:
        """Say whether a shard is there and, read through, what was written."""
        try:
            ShardFile(self.folder / shard_name(number)).require_sound()
        except (SourceError, CorruptError):
            return False
        return True

    def reopen(self) -> None:
        """Take the index away, where shards that it describes will be made anew."""
        (self.folder / INDEX).unlink(missing_ok=True)

    def write(
        self, number: int, keys: Sequence[str], values: NDArray[np.float32], *, dtype: str = "f32",
        entries: Mapping[str, NDArray[Any]] | None = None,
    ) -> None:  # fmt: skip
        """Write the (n, *E) values of n keys as one shard.

        Args:
            number: of the shard.
            keys: n.
            values: rounded to the nearest of `dtype`.
            dtype: one of DTYPES.
            entries: more arrays about the rows or the shard, by name.

        Raises:
            GMemError: a value does not fit into f16.
            WriteError: the disk refused.
        """
        text, offsets = key_tables.encode(keys)
        arrays = {
            "values": narrow(values, DTYPES[dtype]),
            "keys.bytes": text,
            "keys.offsets": offsets,
            **(entries or {}),
        }
        kinds = {name: DTYPES[dtype] if name == "values" else Payload.of(array).dtype for name, array in arrays.items()}
        write_shard(self.folder / shard_name(number), arrays, kinds)

    def entry(self, number: int, name: str) -> NDArray[Any]:
        """Return an entry of a shard that is there."""
        return ShardFile(self.folder / shard_name(number)).entry(name)

    def finish(self, num_shards: int, facts: Mapping[str, Json]) -> None:
        """Write the index, and with it declare the work done."""
        counts: list[int] = []
        shape: tuple[int, ...] = ()
        dtype = ""
        for number in range(num_shards):
            shard = ShardFile(self.folder / shard_name(number))
            counts.append(len(shard))
            shape, dtype = shard.shape, shard.dtype
        write_index(self.folder, counts, shape, dtype, facts)


class Shards:
    """Arrays by key, each row by one read, from any thread.

    Args:
        folder: as `ShardWriter` left it.

    Raises:
        SourceError: no such folder, or unfinished.
        FormatError, CorruptError: not shards, of a later version, or damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        record = read_index(self.folder)
        self.facts: dict[str, Json] = record["facts"]
        """What was said of them: the encoder's fingerprint and more."""
        self.shape: tuple[int, ...] = tuple(record["shape"])
        """E."""
        self._counts: list[int] = record["num_rows"]
        self._dtype = record["dtype"]
        self._starts = np.cumsum([0, *self._counts])
        self._files = OpenFiles()
        # a damaged or foreign file is found at once, not in the middle of a training
        self._shards = [self._checked(number) for number in range(len(self._counts))]

    def _checked(self, number: int) -> ShardFile:
        shard = ShardFile(self.folder / shard_name(number))
        if (len(shard), list(shard.shape), shard.dtype) != (self._counts[number], list(self.shape), self._dtype):
            raise CorruptError(f"{shard.path} is not the shard that {INDEX} describes: {REMEDY}", path=shard.path)
        return shard

    def __len__(self) -> int:
        return int(self._starts[-1])

    def require_sound(self, progress: Progress = no_progress) -> None:
        """Read every file through once; raises CorruptError for one that is not what was written.

        Args:
            progress: told rows checked and rows in all.
        """
        with ThreadPoolExecutor(READERS) as pool:
            checks = pool.map(ShardFile.require_sound, self._shards)
            for done, _ in zip(self._starts[1:].tolist(), checks, strict=True):
                progress(done, len(self))

    def keys(self) -> list[str]:
        """Return all N keys."""
        return [key for shard in self._shards for key in shard.all_keys()]

    def entry(self, name: str) -> NDArray[Any]:
        """Return what was said of every row, (N, …), or of every shard, one after the other; raises CorruptError for nothing."""
        return np.concatenate([shard.entry(name) for shard in self._shards])

    @cached_property
    def _table(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """The (N,) hashes of the keys ascending, and their rows: 16 bytes a key where a dictionary takes 220."""
        every = (key for shard in self._shards for key in shard.all_keys())
        return key_tables.sorted_table(key_tables.hashes_of(every))

    def _find(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the (B,) rows of keys, -1 where there is none."""
        return key_tables.find(*self._table, keys, self._keys_of)

    def _keys_of(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the keys of rows; reads the text of their shards."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        inside = rows - self._starts[owners]
        keys = [""] * len(rows)
        for owner in np.unique(owners).tolist():
            stored = list(self._shards[owner].all_keys())
            for place in np.flatnonzero(owners == owner).tolist():
                keys[place] = stored[inside[place]]
        return keys

    def holds(self, keys: Sequence[str]) -> NDArray[np.bool_]:
        """Return (B,) which of the keys are there."""
        held: NDArray[np.bool_] = self._find(keys) >= 0
        return held

    def rows_for(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the (B,) rows of keys, in their order; raises UnknownKeyError that names the first three unknown."""
        found = self._find(keys)
        unknown = [keys[place] for place in np.flatnonzero(found < 0).tolist()]
        if unknown:
            raise UnknownKeyError(
                f"{self.folder} has nothing for {len(unknown)} keys, such as {first_three(unknown)}",
                path=self.folder,
                key=unknown[0],
            )
        return found

    def read(self, rows: NDArray[np.int64] | Sequence[int]) -> NDArray[np.float32]:
        """Return the (B, *E) float32 arrays of rows; raises IndexError for one out of range."""
        return widen(self.read_stored(rows))

    def read_stored(self, rows: NDArray[np.int64] | Sequence[int]) -> NDArray[Any]:
        """Return the (B, *E) arrays of rows as they are stored: float32, float16, or bfloat16's bits as uint16.

        Each row is one read of its own bytes, in the order of the files.

        Raises:
            IndexError: a row out of range.
            CorruptError: a file was cut short since it was opened.
            SourceError: a file is gone.
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not (int(rows.min()) >= 0 and int(rows.max()) < len(self)):
            raise IndexError(f"rows must be 0 to {len(self) - 1}")
        found = np.empty((len(rows), *self.shape), STORED[self._dtype])
        whole = found.reshape(len(rows), -1).view(np.uint8) if found.size else np.empty((len(rows), 0), np.uint8)
        buffers = memoryview(whole.reshape(-1).data) if found.size else memoryview(b"")
        size = whole.shape[1]
        order = np.argsort(rows, kind="stable")
        owners = np.searchsorted(self._starts, rows[order], side="right") - 1
        inside = rows[order] - self._starts[owners]
        for place, owner, row in zip(order.tolist(), owners.tolist(), inside.tolist(), strict=True):
            shard = self._shards[owner]
            buffer = buffers[place * size : (place + 1) * size]
            if self._file(shard.path).read_into(buffer, shard.start + row * size) != size:
                raise CorruptError(f"{shard.path} was cut short", path=shard.path)
        return found

    def _file(self, path: Path) -> OpenFile:
        try:
            return self._files.get(path)
        except OSError as error:
            raise SourceError(f"could not read {path}: {error.strerror or error}", path=path) from error
