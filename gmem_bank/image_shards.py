"""What some function makes of a bank's images, as shards by key: decoded by workers ahead of it, resumable after a kill.

Shapes: N rows, B images of a batch, S×S pixels of a crop, E shape of what is made of one image.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.decode_pool import Decoded
from gmem_bank.errors import ConfigError, SourceError, unusable_images
from gmem_bank.interface import ImagesFrom
from gmem_bank.listing import Digest, Item
from gmem_bank.locating import locate
from gmem_bank.lookahead import encoded_ahead, workers_for
from gmem_bank.naming import FLIP_SUFFIX
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import IMAGE_KINDS, Json
from gmem_bank.segments import narrow, widen
from gmem_bank.shards import DTYPES, Shards, ShardWriter
from gmem_bank.storage import atomic

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """What is made of images."""

    preprocessing: Mapping[str, Json]
    """Record of the crop, as an encoder has it: crop_size S and how."""
    make: Callable[[NDArray[np.uint8]], Arrays]
    """(b, S, S, 3) uint8 crops → "values" (b, *E) float32 and, if there is more to say of each image, (b, …) by other names."""
    plan: Mapping[str, Json]
    """Everything that decides the values, beside the images themselves."""
    facts: Callable[[Iterable[NDArray[np.float64]]], Mapping[str, Json]]
    """What `of_shard` gave, shard by shard → what the index says."""
    of_shard: Callable[[NDArray[np.float32]], NDArray[np.float64]] | None = None
    """The (n, *E) values of a shard, rounded as they are stored → an entry "sums" of it."""


@dataclass(frozen=True, kw_only=True)
class ShardsReport:
    """What was written."""

    output: str
    num_rows: int
    shape: list[int]
    """E."""
    num_shards: int
    num_resumed: int
    """Shards that an earlier, interrupted run had left."""
    num_damaged: int
    """Shards that were there and not as they were written: made anew."""
    seconds: float

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def write_image_shards(
    bank: MemoryBank,
    work: ImageWork,
    output: str | os.PathLike[str],
    *,
    rows: NDArray[np.int64] | None = None,
    dtype: str = "f16",
    flip: bool = False,
    images: ImagesFrom = None,
    batch_size: int,
    rows_per_shard: int,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ShardsReport:
    """Write what is made of the images of a bank's rows into a folder of shards by key (`Shards` reads it); resumable.

    Args:
        bank: where the images are, and their keys.
        work: what is made of them.
        output: folder for the shards.
        rows: active rows with an image; None: all of them.
        dtype: how the values are stored: "f16", "f32" or "bf16".
        flip: also the mirrored twin of every image, under its key with "#flip".
        images: where the images are, instead of where the provenance says.
        batch_size: images per call of `work.make`.
        rows_per_shard: at most, in whole batches: what an interrupted run may have to do again.
        num_workers: processes that decode; None: one a core where there are enough images.
        overwrite: replace shards that were made otherwise.
        progress: told images done and images in all.

    Raises:
        SourceError: images are gone or cannot be decoded, all of them named; shards without them are written, and the same
            call goes on.
        OutputExistsError: the folder holds something else.
    """
    started = time.perf_counter()
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}", key="dtype")
    rows = image_rows(bank) if rows is None else rows
    job = _Job(bank, work, rows, images, flip=flip, batch_size=batch_size, rows_per_shard=rows_per_shard)
    folder = Path(output)
    with atomic.locked(folder):
        writer = ShardWriter(folder, {**work.plan, **job.plan(), "dtype": dtype}, overwrite=overwrite)
        there = [number for number in range(job.num_shards) if writer.has(number)]
        sound = {number for number in there if writer.is_sound(number)}
        missing = [number for number in range(job.num_shards) if number not in sound]
        if missing or not writer.finished:
            writer.reopen()
        with contextlib.closing(job.encode(missing, num_workers, progress)) as encoded:
            for number, keys, arrays in encoded:
                _write(writer, number, keys, arrays, work, dtype)
        if not writer.finished:
            sums = (writer.entry(number, "sums") for number in range(job.num_shards) if work.of_shard)
            writer.finish(job.num_shards, work.facts(sums))
    shards = Shards(folder)
    return ShardsReport(
        output=str(folder), num_rows=len(shards), shape=list(shards.shape), num_shards=job.num_shards,
        num_resumed=len(sound), num_damaged=len(there) - len(sound), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip


def image_rows(bank: MemoryBank) -> NDArray[np.int64]:
    """Return the active rows that have an image, ascending; raises SourceError where there is none."""
    rows = bank.rows()
    with_image = np.array([source.kind in IMAGE_KINDS for source in bank.sources])
    found: NDArray[np.int64] = rows[with_image[bank.source_ids(rows)]]
    if not len(found):
        raise SourceError(f"no active row of {bank.path} has an image", path=bank.path)
    return found


def _write(writer: ShardWriter, number: int, keys: list[str], arrays: Arrays, work: ImageWork, dtype: str) -> None:
    more = {name: array for name, array in arrays.items() if name != "values"}
    if work.of_shard is not None:
        more["sums"] = work.of_shard(widen(narrow(arrays["values"], DTYPES[dtype])))
    writer.write(number, keys, arrays["values"], dtype=dtype, entries=more)


class _Job:
    """The images of a bank, cut into shards of whole batches."""

    def __init__(
        self, bank: MemoryBank, work: ImageWork, rows: NDArray[np.int64], images: ImagesFrom, *, flip: bool,
        batch_size: int, rows_per_shard: int,
    ) -> None:  # fmt: skip
        self._bank, self._work, self._images, self._batch_size = bank, work, images, batch_size
        keys = bank.keys(rows)
        self._places = list(zip(keys, rows.tolist(), strict=True))
        if flip:
            have = set(keys)
            self._places = [twin for place in self._places for twin in _with_twin(*place, have)]
        per_shard = max(1, rows_per_shard // batch_size) * batch_size
        self._shards = [self._places[start : start + per_shard] for start in range(0, len(self._places), per_shard)]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return len(self._shards)

    def plan(self) -> dict[str, Json]:
        """Return what decides the shards: which images, where they are, their sizes and times of change."""
        facts = Digest()
        for key, row in self._places:
            item = self._item(key, row)
            facts.add([key, item.path.resolve().as_posix(), *_stamp(item), item.place])
        return {"batch_size": self._batch_size, "images": facts.hexdigest()}

    def encode(
        self, numbers: Sequence[int], num_workers: int | None, progress: Progress
    ) -> Generator[tuple[int, list[str], Arrays], None, None]:
        """Yield (number, keys, arrays) of shards."""
        wanted = [(number, self._shards[number]) for number in numbers]
        num_missing, size = sum(len(shard) for _, shard in wanted), self._batch_size
        done = len(self) - num_missing
        batches = (
            [self._item(*place) for place in shard[at : at + size]]
            for _, shard in wanted
            for at in range(0, len(shard), size)
        )
        workers = workers_for(num_workers, num_missing)
        progress(done, len(self))
        unusable: dict[str, str] = {}  # all are found before any is told; shards without them are written meanwhile
        with contextlib.closing(
            encoded_ahead(batches, self._work.preprocessing, workers, _all(self._work.make))
        ) as made:
            for number, shard in wanted:
                parts: list[Arrays] = []
                for at in range(0, len(shard), size):
                    part = next(made)
                    if isinstance(part, _Unusable):
                        unusable |= part.reasons
                    else:
                        parts.append(part)
                    done += len(shard[at : at + size])
                    progress(done, len(self))
                if len(parts) * size >= len(shard):
                    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
                    yield number, [key for key, _ in shard], joined
        if unusable:
            raise unusable_images(unusable, num_missing)

    def _item(self, key: str, row: int) -> Item:
        stored = key.removesuffix(FLIP_SUFFIX)
        source = self._bank.sources[int(self._bank.source_ids(np.array([row]))[0])]
        found = locate(stored, source, self._bank.folder, self._images)
        return replace(found, key=key, flipped=key.endswith(FLIP_SUFFIX))


@dataclass(frozen=True)
class _Unusable:
    """Of a batch: its images that cannot be read, key → why."""

    reasons: dict[str, str]


def _all(
    make: Callable[[NDArray[np.uint8]], Arrays],
) -> Callable[[Sequence[Item], Decoded], Arrays | _Unusable]:
    """Return what works on a decoded batch, all of whose images have to be there."""

    def work(own: Sequence[Item], decoded: Decoded) -> Arrays | _Unusable:
        reasons = {item.key: why for item, why in zip(own, decoded.reasons, strict=True) if why is not None}
        return _Unusable(reasons) if reasons else make(decoded.crops)

    return work


def _with_twin(key: str, row: int, have: set[str]) -> list[tuple[str, int]]:
    """Return a row, and its mirrored twin unless it is one or has one in the bank."""
    twin = key + FLIP_SUFFIX
    return [(key, row)] if key.endswith(FLIP_SUFFIX) or twin in have else [(key, row), (twin, row)]


def _stamp(item: Item) -> tuple[int, int]:
    """Return size and time of change of the file that an image lies in; -1 where it is gone."""
    try:
        facts = item.path.stat()
    except OSError:
        return -1, -1
    return facts.st_size, facts.st_mtime_ns
