"""Patch tokens of a bank's images, for losses that compare a generator's features with an encoder's (REPA, arXiv 2410.06940).

Shapes: N rows, B images of a batch, T patch tokens of an image, D dimensions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.batch_size import AUTO, BatchSize, resolve
from gmem_bank.decode_pool import Decoded
from gmem_bank.encoders import Encoder, SupportsPatchTokens, require_same_encoder
from gmem_bank.encoding import encoded_ahead, run, workers_for
from gmem_bank.errors import ConfigError, EncoderError, SourceError
from gmem_bank.interface import ImagesFrom
from gmem_bank.listing import Digest, Item
from gmem_bank.locating import locate
from gmem_bank.naming import FLIP_SUFFIX
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import IMAGE_KINDS, Json
from gmem_bank.segments import narrow
from gmem_bank.shards import DTYPES, Shards, ShardWriter
from gmem_bank.storage import atomic
from gmem_bank.storage.rules import SNIPPET_DTYPES

SHARD_BYTES = 16 << 20
"""Of f32 tokens: what an interrupted run may have to do again."""


@dataclass(frozen=True, kw_only=True)
class TokensReport:
    """What was written."""

    output: str
    num_rows: int
    shape: list[int]
    """[T, D]."""
    num_shards: int
    num_resumed: int
    """Shards that an earlier, interrupted run had left."""
    seconds: float

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def write_tokens(
    bank: MemoryBank,
    encoder: Encoder,
    output: str | os.PathLike[str],
    *,
    dtype: str = "f16",
    flip: bool = False,
    images: ImagesFrom = None,
    batch_size: BatchSize = AUTO,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> TokensReport:
    """Encode the images of a bank's active rows into a folder of shards by key (`Shards` reads it); resumable.

    Args:
        bank: rows without an image (arrays, interpolations) are left out.
        encoder: the one that made the bank, with patch tokens.
        output: folder for the shards.
        dtype: "f16" or "f32".
        flip: also the mirrored twin of every image, under its key with "#flip".
        images: where the images are, instead of where the provenance says.
        batch_size: images per call of the encoder.
        num_workers: as in `build`.
        overwrite: replace shards that were made otherwise.
        progress: told images done and images in all.

    Raises:
        EncoderError: the encoder has no patch tokens.
        EncoderMismatchError: it did not make the bank.
        SourceError: an image is gone or cannot be decoded; finished shards stay, and the same call goes on.
        OutputExistsError: the folder holds something else.
    """
    started = time.perf_counter()
    require_same_encoder(encoder.spec, bank.encoder)
    if not isinstance(encoder, SupportsPatchTokens):
        raise EncoderError(
            f"encoder {encoder.spec.describe()} has no patch tokens: DINOv2 and other vision transformers have"
        )
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}", key="dtype")
    job = _Job(bank, encoder, images, flip=flip, batch_size=resolve(batch_size, encoder))
    folder = Path(output)
    with atomic.locked(folder):
        writer = ShardWriter(folder, job.plan(dtype), overwrite=overwrite)
        missing = [] if writer.finished else [number for number in range(job.num_shards) if not writer.has(number)]
        with contextlib.closing(job.encode(missing, num_workers, progress)) as encoded:
            for number, keys, tokens in encoded:
                writer.write(number, keys, narrow(tokens, SNIPPET_DTYPES[dtype]))
        if not writer.finished:
            writer.finish(job.num_shards, {"holds": "patch tokens", "encoder": encoder.spec.to_json()})
    shards = Shards(folder)
    return TokensReport(
        output=str(folder), num_rows=len(shards), shape=list(shards.shape), num_shards=job.num_shards,
        num_resumed=job.num_shards - len(missing), seconds=round(time.perf_counter() - started, 3),
    )  # fmt: skip


class _Job:
    """The images of a bank, cut into shards of whole batches."""

    def __init__(self, bank: MemoryBank, encoder: Encoder, images: ImagesFrom, *, flip: bool, batch_size: int) -> None:
        assert isinstance(encoder, SupportsPatchTokens)
        self._bank, self._encoder, self._images, self._batch_size = bank, encoder, images, batch_size
        rows = bank.rows()
        with_image = np.array([source.kind in IMAGE_KINDS for source in bank.sources])
        rows = rows[with_image[bank.source_ids(rows)]]
        if not len(rows):
            raise SourceError(f"no active row of {bank.path} has an image", path=bank.path)
        keys = bank.keys(rows)
        self._places = list(zip(keys, rows.tolist(), strict=True))
        if flip:
            self._places = [twin for place in self._places for twin in _with_twin(*place, set(keys))]
        blank = np.zeros((1, *[int(encoder.spec.preprocessing["crop_size"])] * 2, 3), np.uint8)
        per_shard = max(1, SHARD_BYTES // (batch_size * encoder.encode_tokens(blank).nbytes)) * batch_size
        self._shards = [self._places[start : start + per_shard] for start in range(0, len(self._places), per_shard)]

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_shards(self) -> int:
        """Shards in all."""
        return len(self._shards)

    def plan(self, dtype: str) -> dict[str, Json]:
        """Return what decides the shards: which images, where they are, their sizes and times of change."""
        facts = Digest()
        for key, row in self._places:
            item = self._item(key, row)
            facts.add([key, item.path.resolve().as_posix(), *_stamp(item), item.place])
        return {
            "encoder": self._encoder.spec.fingerprint, "software": self._encoder.spec.software,
            "batch_size": self._batch_size, "dtype": dtype, "images": facts.hexdigest(),
        }  # fmt: skip

    def encode(
        self, numbers: Sequence[int], num_workers: int | None, progress: Progress
    ) -> Generator[tuple[int, list[str], NDArray[np.float32]], None, None]:
        """Yield (number, keys, (n, T, D) tokens) of shards."""
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
        with contextlib.closing(
            encoded_ahead(batches, self._encoder.spec.preprocessing, workers, self._tokens)
        ) as encoded:
            for number, shard in wanted:
                parts = []
                for _ in range(0, len(shard), size):
                    parts.append(next(encoded))
                    done += len(parts[-1])
                    progress(done, len(self))
                yield number, [key for key, _ in shard], np.concatenate(parts)

    def _tokens(self, own: Sequence[Item], decoded: Decoded) -> NDArray[np.float32]:
        assert isinstance(self._encoder, SupportsPatchTokens)
        for item, reason in zip(own, decoded.reasons, strict=True):
            if reason is not None:
                raise SourceError(
                    f"the image of row {item.key!r} cannot be used: {reason}. It could be read when the bank was built: restore "
                    "it, or give another folder with --images",
                    key=item.key,
                )
        return run(self._encoder, self._encoder.encode_tokens, decoded.crops)

    def _item(self, key: str, row: int) -> Item:
        stored = key.removesuffix(FLIP_SUFFIX)
        source = self._bank.sources[int(self._bank.source_ids(np.array([row]))[0])]
        found = locate(stored, source, self._bank.folder, self._images)
        return replace(found, key=key, flipped=key.endswith(FLIP_SUFFIX))


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
