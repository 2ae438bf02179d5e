"""Which images of a listing a build takes: patterns, order, number, part of several."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import ConfigError, SourceError
from gmem_bank.listing import Listing, RowGroups, Skipped
from gmem_bank.provenance import Json
from gmem_bank.table_files import WHOLE_BYTES


@dataclass(frozen=True, kw_only=True)
class Narrowing:
    """What to take; the fields are applied in this order."""

    include: tuple[str, ...] = ()
    """Shell patterns over keys; an image must match one, if there are any."""
    exclude: tuple[str, ...] = ()
    """Shell patterns over keys; an image must match none."""
    shuffle_seed: int | None = None
    """Puts the images into a random order, those of tables by runs of row groups (`in_runs`); None keeps the sorted one."""
    limit: int | None = None
    """Takes this many from the front."""
    flip: bool = False
    """Adds a mirrored twin after each image, under its key with "#flip"."""
    num_shards: int = 1
    shard: int = 0
    """Takes one of num_shards parts, cut between batches, so that the parts merged in order are the whole, bit for bit."""

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"limit must be at least 1, got {self.limit}", key="limit")
        if self.shuffle_seed is not None and self.shuffle_seed < 0:
            raise ConfigError(f"shuffle_seed must be 0 or more, got {self.shuffle_seed}", key="shuffle_seed")
        if self.num_shards < 1 or not 0 <= self.shard < self.num_shards:
            raise ConfigError(f"shard must be 0 to num_shards - 1, got {self.shard} of {self.num_shards}", key="shard")

    def to_json(self) -> dict[str, Json]:
        """Return the fields that are not at their default, for the history."""
        given, plain = asdict(self), asdict(Narrowing())
        return {n: list(v) if isinstance(v, tuple) else v for n, v in given.items() if v != plain[n]}


def narrowed(listing: Listing, wanted: Narrowing, batch_size: int) -> Listing:
    """Return the listing with only the images that are wanted.

    Args:
        listing: a source's images.
        wanted: which of them.
        batch_size: parts are cut at multiples of it.

    Raises:
        SourceError: no image is left.
    """
    matches = _matcher(wanted)
    places = np.fromiter((place for place, key in enumerate(listing.items.all_keys()) if matches(key)), np.int64)
    left_out = len(listing.items) - len(places)
    if wanted.shuffle_seed is None:
        places = places[: wanted.limit]
    else:
        random = np.random.Generator(np.random.PCG64(wanted.shuffle_seed))
        places = places[random.permutation(len(places))][: wanted.limit]
        places = places if listing.groups is None else in_runs(places, listing.groups, random)
    if not len(places):
        raise SourceError(
            f"none of the {len(listing.items)} images in {listing.root} is left by the patterns", path=listing.root
        )
    note = [Skipped(path=str(listing.root), reason=f"{left_out} images left out by the patterns")] if left_out else []
    all_of_it = len(places) == len(listing.items) and wanted.shuffle_seed is None
    items = listing.items if all_of_it else listing.items.take(places.tolist())
    items = items.with_flips() if wanted.flip else items
    taken = replace(listing, items=items, ignored=(*listing.ignored, *note), groups=None)
    if wanted.num_shards == 1:
        return taken
    num_batches = -(-len(items) // batch_size)
    if num_batches < wanted.num_shards:
        raise SourceError(
            f"{len(items)} images are {num_batches} batches of {batch_size}: too few for {wanted.num_shards} shards; give "
            "every part the same smaller batch size"
        )
    begin, end = (num_batches * part // wanted.num_shards * batch_size for part in (wanted.shard, wanted.shard + 1))
    return replace(taken, items=items.take(range(begin, min(end, len(items)))))


def in_runs(places: NDArray[np.int64], groups: RowGroups, random: np.random.Generator) -> NDArray[np.int64]:
    """Return images that were drawn in an order in which every row group is read once.

    The groups are put into a random order and cut into runs that fit in memory; inside a run the images stay in the order in
    which they were drawn, except that a group too large for memory has a run of its own and is read from front to back. Where
    all groups fit in one run, nothing changes.

    Args:
        places: (N,) images in the order in which they were drawn.
        groups: which of them are read together.
        random: draws the order of the groups.
    """
    sizes = np.asarray(groups.sizes, np.int64)
    group = np.searchsorted(np.asarray(groups.starts, np.int64), places, side="right") - 1
    runs, run, filled = np.zeros(len(sizes), np.int64), 0, 0
    for one in random.permutation(np.unique(group)):
        if filled and filled + sizes[one] > WHOLE_BYTES:
            run, filled = run + 1, 0
        filled += int(sizes[one])
        runs[one] = run
    within = np.where(sizes[group] > WHOLE_BYTES, places, np.arange(len(places)))
    return places[np.lexsort((within, runs[group]))]


def _matcher(wanted: Narrowing) -> Callable[[str], bool]:
    """Return what says of a key whether the patterns want it; they are translated once, not for each of a million keys."""
    include, exclude = _any_of(wanted.include), _any_of(wanted.exclude)
    return lambda key: (not wanted.include or bool(include(key))) and not exclude(key)


def _any_of(patterns: Sequence[str]) -> Callable[[str], object]:
    """Return what matches a key that any of some shell patterns describes whole."""
    return re.compile("|".join(fnmatch.translate(pattern) for pattern in patterns) or r"(?!)").match
