"""Encoding in batches that survive a kill: each finished batch lies in a hidden folder beside the bank until it is used.

Batches are cut on the listing, not on the images that turn out readable, so an interrupted run that is taken up again
gives the same bytes as one that was left alone.

Shapes: B images of a batch, D dimensions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.decode_pool import Decoded, DecodePool, default_workers
from gmem_bank.decode_worker import decode_one
from gmem_bank.encoders import Encoder
from gmem_bank.errors import EncoderError, SourceError
from gmem_bank.progress import Progress
from gmem_bank.provenance import Json, canonical_json
from gmem_bank.sources import Item, Listing, Skipped, digest_of
from gmem_bank.space import Space, to_space, unusable_rows
from gmem_bank.storage import atomic

PLAN = "plan.json"
WORTH_WORKERS = 256
"""Images from which on starting processes (0.2 s) pays."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one batch gave."""

    places: list[int]
    """Positions in the listing of the images that gave a snippet."""
    hashes: list[str]
    """sha256 of every file of the batch, "" where it could not be read."""
    snippets: NDArray[np.float32]
    """(B, D)."""
    skipped: list[Skipped]


class Staging:
    """Finished batches of one encoding job.

    Args:
        folder: where they lie; made if absent.
        plan: everything that decides the batches. A folder with another plan is emptied first.
    """

    def __init__(self, folder: Path, plan: Json) -> None:
        self.folder = folder
        text = canonical_json(plan)
        if not folder.is_dir() or _read_text(folder / PLAN) != text:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise atomic.explain(error, folder) from error
            atomic.write_bytes(folder / PLAN, text.encode())

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    def save(self, index: int, batch: Batch) -> None:
        """Keep a finished batch, atomically."""
        from safetensors.numpy import save

        record = {
            "places": batch.places,
            "hashes": batch.hashes,
            "skipped": [skipped.to_json() for skipped in batch.skipped],
        }
        data = save({"snippets": np.ascontiguousarray(batch.snippets)}, metadata={"batch": canonical_json(record)})
        atomic.write_bytes(self._path(index), data)

    def has(self, index: int) -> bool:
        """Say whether a finished batch is there; it may still turn out damaged."""
        return self._path(index).is_file()

    def load(self, index: int) -> Batch | None:
        """Return a finished batch, or None where it is absent or damaged (it is then encoded again)."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(index), framework="numpy") as stored:
                snippets, record = stored.get_tensor("snippets"), json.loads(stored.metadata()["batch"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return Batch(
            places=record["places"],
            hashes=record["hashes"],
            snippets=snippets,
            skipped=[Skipped(**skipped) for skipped in record["skipped"]],
        )

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The readable images of a job, in order; snippets stay on disk until they are asked for."""

    items: list[Item]
    listing_ids: NDArray[np.int64]
    """Which of the job's listings each item came from."""
    skipped: list[Skipped]
    digests: list[str]
    """Content digest of each listing."""
    num_resumed: int
    """Images whose snippets an earlier, interrupted run had left."""
    staging: Staging
    num_batches: int

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the snippets batch by batch."""
        for index in range(self.num_batches):
            batch = self.staging.load(index)
            if batch is None:
                raise SourceError(f"a finished batch in {self.staging.folder} was damaged: run the same command again")
            yield batch.snippets


def encode_listings(
    listings: Sequence[Listing],
    encoder: Encoder,
    *,
    staging_folder: Path,
    batch_size: int,
    progress: Progress,
    num_workers: int | None = None,
) -> Encoded:
    """Encode every image of the listings, taking up where an earlier run with the same plan stopped.

    Args:
        listings: what to encode; their keys must differ.
        encoder: its spec names the space that the snippets are brought to.
        staging_folder: where finished batches are kept.
        batch_size: images per call of the encoder; part of the plan.
        progress: told images done and images in all.
        num_workers: processes that decode images ahead of the encoder; 0 decodes in this one, None takes one a core where there
            are enough images to be worth their start.

    Raises:
        SourceError: not one image could be used, or keys occur twice.
        EncoderError: the encoder returned something else than (B, D) numbers.
    """
    items = [item for listing in listings for item in listing.items]
    listing_ids = np.repeat(np.arange(len(listings)), [len(listing.items) for listing in listings])
    staging = Staging(staging_folder, _plan(listings, encoder, batch_size))
    places: list[int] = []
    hashes: list[str] = []
    skipped: list[Skipped] = []
    num_resumed = 0
    starts = range(0, len(items), batch_size)
    for batch, stop, resumed in _batches(items, batch_size, staging, encoder, num_workers, progress):
        num_resumed += resumed
        places.extend(batch.places)
        hashes.extend(batch.hashes)
        skipped.extend(batch.skipped)
        progress(stop, len(items))
    if not places:
        staging.discard()
        raise SourceError(
            f"none of the {len(items)} images could be used; the first: {skipped[0].path}: {skipped[0].reason}"
        )
    contents = [(item.key, digest) for item, digest in zip(items, hashes, strict=True)]
    bounds = np.cumsum([0, *(len(listing.items) for listing in listings)]).tolist()
    return Encoded(
        items=[items[place] for place in places],
        listing_ids=listing_ids[places],
        skipped=skipped,
        digests=[digest_of(contents[begin:end]) for begin, end in pairwise(bounds)],
        num_resumed=num_resumed,
        staging=staging,
        num_batches=len(starts),
    )


def _batches(
    items: Sequence[Item],
    batch_size: int,
    staging: Staging,
    encoder: Encoder,
    num_workers: int | None,
    progress: Progress,
) -> Iterator[tuple[Batch, int, int]]:
    """Yield (batch, images up to its end, images of it that an earlier run had done) in order; new ones are kept on disk."""
    starts = range(0, len(items), batch_size)
    finished = [staging.has(index) for index in range(len(starts))]
    missing = [items[start : start + batch_size] for start, done in zip(starts, finished, strict=True) if not done]
    with DecodePool(encoder.spec.preprocessing, _num_workers(num_workers, missing)) as pool:
        decoded = pool.batches(missing)
        for index, start in enumerate(starts):
            own = items[start : start + batch_size]
            batch = staging.load(index) if finished[index] else None
            if batch is not None:
                yield batch, start + len(own), len(own)
                continue
            progress(start, len(items))  # before the work, so that a rate counts this run's images only
            images = (
                [decode_one(item, encoder.spec.preprocessing) for item in own] if finished[index] else next(decoded)
            )
            batch = _encode_batch(own, images, start, encoder)
            staging.save(index, batch)
            yield batch, start + len(own), 0


def _num_workers(asked: int | None, batches: Sequence[Sequence[Item]]) -> int:
    if asked is not None:
        return asked
    return default_workers() if sum(map(len, batches)) >= WORTH_WORKERS else 0


def _plan(listings: Sequence[Listing], encoder: Encoder, batch_size: int) -> Json:
    """Return everything that decides the batches: a file that was replaced in the meantime changes it."""
    return {
        "encoder": encoder.spec.fingerprint,
        "batch_size": batch_size,
        "listings": [
            [listing.root.resolve().as_posix(), listing.prefix, [[i.key, i.size, i.modified] for i in listing.items]]
            for listing in listings
        ],
    }


def discard_own(folder: Path, listings: Sequence[Listing], encoder: Encoder, batch_size: int) -> None:
    """Remove finished batches that a job with this very plan has left; another job's stay."""
    if _read_text(folder / PLAN) == canonical_json(_plan(listings, encoder, batch_size)):
        shutil.rmtree(folder, ignore_errors=True)


def encode_in_memory(
    listing: Listing, encoder: Encoder, *, batch_size: int, progress: Progress
) -> tuple[list[Item], NDArray[np.float32], list[Skipped]]:
    """Encode a listing without keeping anything on disk: for queries.

    Returns:
        The usable items, their (B, D) snippets in the encoder's space, and what was passed over.

    Raises:
        SourceError: not one image could be used.
    """
    batches = []
    for start in range(0, len(listing.items), batch_size):
        own = listing.items[start : start + batch_size]
        batches.append(_encode_batch(own, [decode_one(i, encoder.spec.preprocessing) for i in own], start, encoder))
        progress(min(start + batch_size, len(listing.items)), len(listing.items))
    skipped = [entry for batch in batches for entry in batch.skipped]
    items = [listing.items[place] for batch in batches for place in batch.places]
    if not items:
        raise SourceError(
            f"none of the {len(listing.items)} images could be used; the first: {skipped[0].path}: {skipped[0].reason}"
        )
    return items, np.concatenate([batch.snippets for batch in batches]), skipped


def _encode_batch(items: Sequence[Item], decoded: Sequence[Decoded], start: int, encoder: Encoder) -> Batch:
    spec = encoder.spec
    hashes = [digest for digest, _ in decoded]
    crops = [found for _, found in decoded if not isinstance(found, str)]
    places = [start + place for place, (_, found) in enumerate(decoded) if not isinstance(found, str)]
    skipped = [
        Skipped(path=item.key, reason=found)
        for item, (_, found) in zip(items, decoded, strict=True)
        if isinstance(found, str)
    ]
    if not crops:
        return Batch(places=[], hashes=hashes, snippets=np.zeros((0, spec.dim), np.float32), skipped=skipped)
    snippets = _checked(encoder.encode(np.stack(crops)), len(crops), encoder)
    space: Space = "unit" if spec.space == "unit" else "raw"
    reasons = unusable_rows(snippets, space)
    skipped += [Skipped(path=items[places[row] - start].key, reason=reason) for row, reason in reasons.items()]
    kept = [row for row in range(len(places)) if row not in reasons]
    return Batch(
        places=[places[row] for row in kept], hashes=hashes, snippets=to_space(snippets[kept], space), skipped=skipped
    )


def _checked(snippets: NDArray[np.float32], num_images: int, encoder: Encoder) -> NDArray[np.float32]:
    wanted = (num_images, encoder.spec.dim)
    if not isinstance(snippets, np.ndarray) or snippets.shape != wanted or snippets.dtype != np.float32:
        got = (
            f"{snippets.dtype} {list(snippets.shape)}" if isinstance(snippets, np.ndarray) else type(snippets).__name__
        )
        raise EncoderError(
            f"encoder {encoder.spec.name!r} returned {got}, expected float32 {list(wanted)}: a bug in it"
        )
    return snippets
