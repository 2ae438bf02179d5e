"""Samples in one .npz, as ADM's evaluation reads it.

Shapes: B samples in all, b samples of a batch, H×W pixels, C channels.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from gmem_bank.errors import ConfigError, OutputExistsError
from gmem_gen.stores import Plan, add_up, json_in, require_same_plan, write_json, writing

CHUNK = 1 << 22


class ArrayStore:
    """An .npz as ADM's evaluation reads it: `arr_0` (B, H, W, C) uint8 and, where there are classes, `arr_1` (B,) int64 labels.

    The file is laid out whole beside its place, so that a disk without room for it is known at once, filled through a memory
    map, and renamed when every sample is in it.

    Args:
        path: .npz, new or of this plan, with its record beside it.
        plan: all that decides the samples.
        shape: (B, H, W, C).
        labels: (B,) int64, or None.
        overwrite: replace an .npz of other samples instead of refusing it.

    Raises:
        ConfigError: not an .npz.
        OutputExistsError: something that is not ours, or other samples, are there, be they half drawn.
        WriteError: no room.
    """

    def __init__(
        self, path: Path, plan: Plan, shape: tuple[int, ...], labels: NDArray[np.int64] | None = None, *,
        overwrite: bool = False,
    ) -> None:  # fmt: skip
        require_npz(path, plan, overwrite=overwrite)
        self.path, self.plan, self.shape, self.record = path, plan, shape, record_beside(path)
        self.staging = path.with_name(f".{path.name}.partial")
        self._tally = f"tally-{zlib.crc32(json.dumps(plan, sort_keys=True).encode()):08x}-"  # of calls with this plan
        self.partial, self._counts = self.staging / "samples.npz", self.staging / "done"
        self.complete = self._is_whole()
        if self.complete:
            return
        with writing(path):
            self.staging.mkdir(parents=True, exist_ok=True)
            with self._alone():  # of several processes one lays the file out
                self._lay_out(labels, overwrite=overwrite)
                self._images = np.memmap(self.partial, np.uint8, "r+", _data_offset(self.partial), shape)
                self._done = np.memmap(self._counts, np.bool_, "r+", shape=shape[:1])

    def _is_whole(self) -> bool:
        return self.path.exists() and (json_in(self.record) or {}).get("plan") == self.plan

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other processes out; raises FileNotFoundError where one of them has taken what was drawn to its place."""
        place = self.staging / "lock"
        with place.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not os.path.samestat(place.stat(), os.fstat(lock.fileno())):
                raise FileNotFoundError(errno.ENOENT, "another process has just finished there", str(place))
            yield

    def _lay_out(self, labels: NDArray[np.int64] | None, *, overwrite: bool) -> None:
        marker = self.staging / "plan.json"
        found = json_in(marker)
        if found == self.plan:
            return
        if found is not None and not overwrite:
            require_same_plan(self.staging, found, self.plan)
        marker.unlink(missing_ok=True)  # first, as it says that the rest is whole
        for left in self.staging.iterdir():
            if left.name != "lock":
                left.unlink()
        with zipfile.ZipFile(self.partial, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as entry:
                npy.write_array_header_1_0(entry, {"descr": "|u1", "fortran_order": False, "shape": self.shape})
                left_over = int(np.prod(self.shape))
                while left_over:
                    left_over -= entry.write(bytes(min(left_over, CHUNK)))
            if labels is not None:
                with archive.open("arr_1.npy", "w") as entry:
                    npy.write_array(entry, labels, allow_pickle=False)
        self._counts.write_bytes(bytes(self.shape[0]))
        write_json(marker, self.plan)  # last: what it stands beside is whole

    def done(self) -> NDArray[np.bool_]:
        """Return (B,) which samples are kept already."""
        return np.ones(self.shape[0], np.bool_) if self.complete else np.array(self._done)

    def write(self, places: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Keep (b, H, W, C) samples; of a file that is whole already they are there."""
        if self.complete:
            return
        with writing(self.path):
            self._images[places] = images
            self._images.flush()
            self._done[places] = True

    def read(self, place: int) -> NDArray[np.uint8]:
        """Return the (H, W, C) pixels of a kept sample."""
        if self.complete:
            return np.array(np.memmap(self.path, np.uint8, "r", _data_offset(self.path), self.shape)[place])
        return np.array(self._images[place])

    def tally(self, name: str, counts: Mapping[str, int]) -> dict[str, int]:
        """Add counts to those of a process, and return the counts of all."""
        if self.complete:
            return {"images": 0, "evaluations": 0, "nfe": 0}
        with writing(self.path):
            return add_up(self.staging, self._tally, name, counts)

    def finish(self, record: Mapping[str, Any]) -> list[Path]:
        """Complete the file's checksum, and rename it to its place, the record first.

        Raises:
            OutputExistsError: another call has put samples of its own there, or is about to.
        """
        if not self.complete:
            with writing(self.path):
                try:
                    with self._alone():
                        self._put_in_place(record)
                except FileNotFoundError:  # finished by another process, as long as it drew the same
                    self._require_ours(self._is_whole())
        self.complete = True
        return [self.path, self.record]

    def _put_in_place(self, record: Mapping[str, Any]) -> None:
        same = json_in(self.staging / "plan.json") == self.plan
        self._require_ours(same and bool(np.fromfile(self._counts, np.bool_).all()))
        self._images.flush()
        _seal(self.partial)
        write_json(self.record, record)
        self.partial.replace(self.path)
        aside = tempfile.mkdtemp(prefix=f".{self.path.name}.", dir=self.path.parent)
        shutil.rmtree(
            self.staging.rename(aside), ignore_errors=True
        )  # at once, so that nobody begins in half of a folder

    def _require_ours(self, ours: bool) -> None:
        if not ours:
            raise OutputExistsError(
                f"{self.path}: another call has begun other samples there with --overwrite, so those of this one are not kept: "
                "run it again with another place",
                path=self.path,
            )


def require_npz(path: Path, plan: Plan | None = None, *, overwrite: bool = False) -> None:
    """Raise unless samples may be written to an .npz there.

    Args:
        path: the .npz.
        plan: of what is to be drawn; None: only whether the file is ours is looked at.
        overwrite: samples of another plan may be replaced.

    Raises:
        ConfigError: not an .npz.
        OutputExistsError: something that is not ours, or samples of another plan, are there.
    """
    if path.suffix.lower() != ".npz":
        raise ConfigError(f"{path}: an array of samples is an .npz file", key="npz")
    record = record_beside(path)
    if not path.exists() and not record.exists():
        return
    found = json_in(record)
    if not isinstance(found, dict) or "nfe" not in found:
        raise OutputExistsError(
            f"{path} or {record.name} exists and holds no samples of ours: choose another name for --npz", path=path
        )
    if path.exists() and plan is not None and not overwrite:
        require_same_plan(path, found.get("plan"), plan)


def mapped_samples(path: Path) -> NDArray[np.uint8]:
    """Return the (B, H, W, C) samples of a finished .npz of ours as a map of the file: they take no memory."""
    shape, offset = _layout(path)
    return np.memmap(path, np.uint8, "r", offset, shape)


def record_beside(path: Path) -> Path:
    """Return where the record of an .npz lies: FILE.npz.json, so that a grid of the same name has a record of its own."""
    return path.with_name(path.name + ".json")


def _entry_start(stream: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Return where the bytes of an archive's entry begin: after a local header of 30 bytes, the name and the extra field."""
    stream.seek(info.header_offset + 26)
    name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
    return info.header_offset + 30 + name + extra


def _data_offset(path: Path) -> int:
    """Return where in an .npz of ours the values of arr_0 begin."""
    return _layout(path)[1]


def _layout(path: Path) -> tuple[tuple[int, ...], int]:
    """Return the shape of arr_0 in an .npz of ours, and where its values begin."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        stream.seek(_entry_start(stream, archive.getinfo("arr_0.npy")))
        npy.read_magic(stream)
        shape, _, _ = npy.read_array_header_1_0(stream)
        return shape, stream.tell()


def _seal(path: Path) -> None:
    """Put the checksum of arr_0, whose values have changed since it was laid out, where the zip format has it."""
    with zipfile.ZipFile(path) as archive:
        info, directory = archive.infolist()[0], archive.start_dir
    with path.open("rb+") as stream:
        stream.seek(_entry_start(stream, info))
        left, checksum = info.file_size, 0
        while left:
            block = stream.read(min(left, CHUNK))
            checksum, left = zlib.crc32(block, checksum), left - len(block)
        for place in (
            info.header_offset + 14,
            directory + 16,
        ):  # local header, and first entry of the central directory
            stream.seek(place)
            stream.write(checksum.to_bytes(4, "little"))
        stream.flush()
        os.fsync(stream.fileno())
