"""Arrays with keys in a folder of safetensors shards: patch tokens, latents and whatever else a training reads beside a bank.

The folder holds `00000.safetensors`, `00001.safetensors`, … (`values`, `keys.bytes`, `keys.offsets`, and what else was said of
each row or shard) and, once all are there, `index.json`. Shards are written whole, one after the other, so that interrupted
work goes on where it stopped. `values` comes first and begins at a page of the file: a row is read by one call, and by no more
than its own pages.

Shapes: N rows, n rows of a shard, E shape of one row's array.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.errors import CorruptError, FormatError, OutputExistsError, SourceError, UnknownKeyError, first_three
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json, canonical_json, sha256_of
from gmem_bank.segments import narrow, widen
from gmem_bank.shard_file import REMEDY, STORED, ShardFile, write_shard
from gmem_bank.storage import atomic
from gmem_bank.storage.payload import Payload

INDEX = "index.json"
PLAN = "plan.json"
FORMAT = "gmem-shards"
VERSION = 1
DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""--dtype on the command line → type of the values in the files."""
READERS = 4
"""Threads that read shards through."""
MOST_OPEN = 512
"""Shards that are open at a time, or half of the files that the process may open, where that is less."""


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
            return bool(_read_index(self.folder))
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
        record: dict[str, Json] = {
            "format": FORMAT, "version": VERSION, "num_rows": [*counts], "shape": [*shape], "dtype": dtype, "facts": dict(facts),
        }  # fmt: skip
        record["sha256"] = sha256_of(record)
        atomic.write_bytes(self.folder / INDEX, (canonical_json(record) + "\n").encode())


class _File:
    """An open file, closed when the last who reads it lets go."""

    def __init__(self, path: Path) -> None:
        self.descriptor = -1  # where opening fails
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        if hasattr(os, "posix_fadvise"):  # rows are asked for in any order: what follows them is not wanted
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill a buffer from an offset; returns what could be read."""
        done = os.preadv(self.descriptor, [buffer], offset)
        while 0 < done < len(buffer):
            more = os.preadv(self.descriptor, [buffer[done:]], offset + done)
            if not more:
                break
            done += more
        return done


class _Files:
    """The files that were used last, open."""

    def __init__(self) -> None:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = max(1, min(MOST_OPEN, soft // 2 if soft > 0 else MOST_OPEN))
        self._open: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, path: Path) -> _File:
        """Return an open file."""
        with self._lock:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = self._opened(path)
                if len(self._open) > self._most:
                    self._open.popitem(last=False)
            self._open.move_to_end(path)
            return file

    def _opened(self, path: Path) -> _File:
        """Open a file; where the process may open no more, after letting go of those that were used first."""
        while True:
            try:
                return _File(path)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or not self._open:
                    raise
                self._open.popitem(last=False)
                self._most = max(1, len(self._open))


def _read_index(folder: Path) -> dict[str, Any]:
    """Return what the index says; raises SourceError, or FormatError, or CorruptError for what can be made anew."""
    path = folder / INDEX
    if not path.is_file():
        state = (
            "unfinished: run the command that makes it again" if (folder / PLAN).is_file() else "no folder of shards"
        )
        raise SourceError(f"{folder} is {state}", path=folder)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT and isinstance(record["version"], int)
        fields = [record[name] for name in ("num_rows", "shape", "dtype", "facts")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CorruptError(f"{path} is not an index of shards: {reason}: {REMEDY}", path=path) from error
    if not known or record["version"] > VERSION or not isinstance(fields[3], dict):
        raise FormatError(f"{path} is of a version that this gmem does not know: install a newer one", path=path)
    digest = record.pop("sha256", None)  # indexes of earlier versions have none
    if digest is not None and digest != sha256_of(record):
        raise CorruptError(f"{path} is damaged: its text has changed: {REMEDY}", path=path)
    return dict(record)


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
        record = _read_index(self.folder)
        self.facts: dict[str, Json] = record["facts"]
        """What was said of them: the encoder's fingerprint and more."""
        self.shape: tuple[int, ...] = tuple(record["shape"])
        """E."""
        self._counts: list[int] = record["num_rows"]
        self._dtype = record["dtype"]
        self._starts = np.cumsum([0, *self._counts])
        self._files = _Files()
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
        hashes, rows = self._table
        wanted = key_tables.hashes_of(keys)
        begin, end = (np.searchsorted(hashes, wanted, side=side) for side in ("left", "right"))
        found = np.full(len(keys), -1, np.int64)
        for further in range(int((end - begin).max(initial=0))):  # more than once where hashes collide
            places = np.flatnonzero((found < 0) & (begin + further < end))
            candidates = rows[begin[places] + further]
            same = self._are(candidates, [keys[place] for place in places.tolist()])
            found[places[same]] = candidates[same]
        return found

    def _are(self, rows: NDArray[np.int64], keys: Sequence[str]) -> NDArray[np.bool_]:
        """Return (B,) whether rows have these keys; reads the text of their shards."""
        owners = np.searchsorted(self._starts, rows, side="right") - 1
        inside = rows - self._starts[owners]
        same = np.zeros(len(rows), np.bool_)
        for owner in np.unique(owners).tolist():
            stored, places = list(self._shards[owner].all_keys()), np.flatnonzero(owners == owner)
            same[places] = [stored[inside[place]] == keys[place] for place in places.tolist()]
        return same

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

    def _file(self, path: Path) -> _File:
        try:
            return self._files.get(path)
        except OSError as error:
            raise SourceError(f"could not read {path}: {error.strerror or error}", path=path) from error
