"""Encoding in batches that survive a kill.

Batches are cut on the listing, not on the images that turn out readable, so an interrupted run that is taken up again
gives the same bytes as one that was left alone.

Shapes: N rows, B images of a batch, D dimensions.
"""

from __future__ import annotations

import contextlib
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.batch_size import BatchSize, resolve
from gmem_bank.decode_pool import Decoded, decode_batch
from gmem_bank.encoders import Encoder
from gmem_bank.errors import EncoderError, GMemError, SourceError, is_out_of_memory
from gmem_bank.listing import Digest, Item, Items, Listing, Skipped
from gmem_bank.lookahead import encoded_ahead, workers_for
from gmem_bank.progress import Progress
from gmem_bank.space import Space, to_space, unusable_rows
from gmem_bank.staging import Batch, Staging, make_plan


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The readable images of a job, in order; snippets stay on disk until they are asked for."""

    jobs: Jobs
    places: NDArray[np.int64]
    """(N,) which of the job's images gave a snippet."""
    skipped: list[Skipped]
    digests: list[str]
    """Content digest of each listing."""
    num_resumed: int
    """Images whose snippets an earlier, interrupted run had left."""
    staging: Staging

    @property
    def keys(self) -> list[str]:
        """N keys."""
        return [self.jobs.key(int(place)) for place in self.places]

    @property
    def listing_ids(self) -> NDArray[np.int64]:
        """(N,) which of the job's listings each row came from."""
        return np.searchsorted(self.jobs.ends, self.places, side="right").astype(np.int64)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield the snippets batch by batch."""
        for index in range(self.jobs.num_batches):
            batch = self.staging.load(index)
            if batch is None:
                raise SourceError(f"a finished batch in {self.staging.folder} was damaged: run the same command again")
            yield batch.snippets


class Jobs:
    """The images of several listings one after the other, cut into batches on the listings, whatever turns out readable."""

    def __init__(self, listings: Sequence[Listing], batch_size: int) -> None:
        self.listings, self.batch_size = listings, batch_size
        self.ends = list(accumulate(len(listing.items) for listing in listings))
        self.num_images = self.ends[-1] if self.ends else 0
        self.num_batches = -(-self.num_images // batch_size)

    def _find(self, place: int) -> tuple[Items, int]:
        number = bisect_right(self.ends, place)
        return self.listings[number].items, place - (self.ends[number - 1] if number else 0)

    def key(self, place: int) -> str:
        """Return the key of an image."""
        items, index = self._find(place)
        return items.key(index)

    def span(self, index: int) -> tuple[int, int]:
        """Return the first image of a batch, and the one after its last."""
        start = index * self.batch_size
        return start, min(start + self.batch_size, self.num_images)

    def batch(self, index: int) -> list[Item]:
        """Return the images of a batch."""
        found = (self._find(place) for place in range(*self.span(index)))
        return [items[place] for items, place in found]


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
    jobs = Jobs(listings, batch_size)
    staging = Staging(staging_folder, make_plan(listings, encoder, batch_size))
    places = array("q")
    digests = [Digest() for _ in listings]
    skipped: list[Skipped] = []
    num_resumed = 0
    for index, batch, resumed in _batches(jobs, staging, encoder, num_workers, progress):
        start, stop = jobs.span(index)
        num_resumed += resumed
        places.extend(batch.places)
        skipped.extend(batch.skipped)
        for place, content in zip(range(start, stop), batch.hashes, strict=True):
            digests[bisect_right(jobs.ends, place)].add([jobs.key(place), content])
        progress(stop, jobs.num_images)
    if not places:
        staging.discard()
        raise SourceError(
            f"none of the {jobs.num_images} images could be used; the first: {skipped[0].path}: {skipped[0].reason}"
        )
    return Encoded(
        jobs=jobs, places=np.frombuffer(places, np.int64), skipped=skipped,
        digests=[digest.hexdigest() for digest in digests], num_resumed=num_resumed, staging=staging,
    )  # fmt: skip


def _batches(
    jobs: Jobs, staging: Staging, encoder: Encoder, num_workers: int | None, progress: Progress
) -> Iterator[tuple[int, Batch, int]]:
    """Yield (index, batch, images of it that an earlier run had done) in order; new ones are kept on disk."""
    finished = [staging.has(index) for index in range(jobs.num_batches)]
    missing = [index for index, done in enumerate(finished) if not done]
    workers = workers_for(num_workers, sum(stop - start for start, stop in map(jobs.span, missing)))
    starts = iter(missing)

    def work(own: Sequence[Item], decoded: Decoded) -> Batch:
        return _encode_batch(own, decoded, jobs.span(next(starts))[0], encoder)

    encoded = encoded_ahead((jobs.batch(index) for index in missing), encoder.spec.preprocessing, workers, work)
    with contextlib.closing(encoded):
        for index, done in enumerate(finished):
            start, stop = jobs.span(index)
            batch = staging.load(index) if done else None
            if batch is not None:
                yield index, batch, stop - start
                continue
            progress(start, jobs.num_images)  # before the work, so that a rate counts this run's images only
            batch = _encode_again(jobs, index, encoder) if done else next(encoded)
            staging.save(index, batch)
            yield index, batch, 0


def _encode_again(jobs: Jobs, index: int, encoder: Encoder) -> Batch:
    """Return a batch that lay damaged in the staging folder."""
    own = jobs.batch(index)
    return _encode_batch(own, decode_batch(own, encoder.spec.preprocessing), jobs.span(index)[0], encoder)


def encode_in_memory(
    listing: Listing, encoder: Encoder, *, batch_size: BatchSize, progress: Progress
) -> tuple[list[Item], NDArray[np.float32], list[Skipped]]:
    """Encode a listing without keeping anything on disk: for queries.

    Returns:
        The usable items, their (B, D) snippets in the encoder's space, and what was passed over.

    Raises:
        SourceError: not one image could be used.
    """
    batches = []
    batch_size = resolve(batch_size, encoder)
    for start in range(0, len(listing.items), batch_size):
        own = listing.items[start : start + batch_size]
        batches.append(_encode_batch(own, decode_batch(own, encoder.spec.preprocessing), start, encoder))
        progress(min(start + batch_size, len(listing.items)), len(listing.items))
    skipped = [entry for batch in batches for entry in batch.skipped]
    items = [listing.items[place] for batch in batches for place in batch.places]
    if not items:
        raise SourceError(
            f"none of the {len(listing.items)} images could be used; the first: {skipped[0].path}: {skipped[0].reason}"
        )
    return items, np.concatenate([batch.snippets for batch in batches]), skipped


def _encode_batch(items: Sequence[Item], decoded: Decoded, start: int, encoder: Encoder) -> Batch:
    spec, hashes, crops = encoder.spec, decoded.hashes, decoded.crops
    places = [start + place for place, reason in enumerate(decoded.reasons) if reason is None]
    skipped = [
        Skipped(path=item.key, reason=reason)
        for item, reason in zip(items, decoded.reasons, strict=True)
        if reason is not None
    ]
    if not len(crops):
        return Batch(places=[], hashes=hashes, snippets=np.zeros((0, spec.dim), np.float32), skipped=skipped)
    snippets = checked(run(encoder, encoder.encode, crops), len(crops), encoder)
    space: Space = "unit" if spec.space == "unit" else "raw"
    reasons = unusable_rows(snippets, space)
    skipped += [
        Skipped(path=items[places[row] - start].key, reason=f"the image is sound, but {reason}")
        for row, reason in reasons.items()
    ]
    kept = [row for row in range(len(places)) if row not in reasons]
    return Batch(
        places=[places[row] for row in kept], hashes=hashes, snippets=to_space(snippets[kept], space), skipped=skipped
    )


def run(
    encoder: Encoder, method: Callable[[NDArray[np.uint8]], NDArray[np.float32]], crops: NDArray[np.uint8]
) -> NDArray[np.float32]:
    """Return what a method of the encoder gives; raises EncoderError where it fails, but lets a lack of memory pass as that."""
    try:
        return method(crops)
    except GMemError:
        raise
    except Exception as error:  # a plug-in may fail in any way
        if is_out_of_memory(error):
            raise
        raise EncoderError(
            f"encoder {encoder.spec.name!r} failed: {type(error).__name__}: {error}", key=encoder.spec.name
        ) from error


def checked(snippets: NDArray[np.float32], num_images: int, encoder: Encoder) -> NDArray[np.float32]:
    """Return what an encoder gave for some images; raises EncoderError where it is no (num_images, D) float32 array."""
    wanted = (num_images, encoder.spec.dim)
    if not isinstance(snippets, np.ndarray) or snippets.shape != wanted or snippets.dtype != np.float32:
        got = (
            f"{snippets.dtype} {list(snippets.shape)}" if isinstance(snippets, np.ndarray) else type(snippets).__name__
        )
        raise EncoderError(
            f"encoder {encoder.spec.name!r} returned {got}, expected float32 {list(wanted)}: a bug in it"
        )
    return snippets
