"""What every open bank is: rows, keys, mask, concepts, provenance, images. `kinds` adds how snippets are read.

Shapes: N rows, n active rows, B rows asked for, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.errors import CorruptError, MaskedRowError, UnknownKeyError, first_three, suggest
from gmem_bank.interface import INTERFACE_VERSION, ImagesFrom
from gmem_bank.provenance import IMAGE_KINDS, EncoderSpec, Source
from gmem_bank.space import Space, all_finite
from gmem_bank.storage import StoredBank
from gmem_bank.storage.schema import Header

BLOCK_BYTES = 64 << 20


class MemoryBank:
    """Rows, keys, mask, concepts and provenance of any kind of bank; a subclass reads the snippets."""

    def __init__(self, stored: StoredBank) -> None:
        self._stored = stored
        counts = [segment.num_rows for segment in self.header.segments]
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    # -- what the header says

    @property
    def header(self) -> Header:
        """All of the bank that is not an array."""
        return self._stored.header

    @property
    def stored(self) -> StoredBank:
        """The open file."""
        return self._stored

    @property
    def path(self) -> Path:
        """The file."""
        return self._stored.path

    @property
    def folder(self) -> Path:
        """The folder that source paths are relative to."""
        return self._stored.path.resolve().parent

    @property
    def interface_version(self) -> tuple[int, int]:
        """(major, minor) of the interface."""
        return INTERFACE_VERSION

    @property
    def dim(self) -> int:
        """D."""
        return self.header.dim

    @property
    def space(self) -> Space:
        """Space of the snippets: "raw" or "unit"."""
        return "unit" if self.header.space == "unit" else "raw"

    @property
    def encoder(self) -> EncoderSpec:
        """What made the snippets."""
        return self.header.encoder

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of header and content, history excluded."""
        return self.header.fingerprint

    @property
    def sources(self) -> tuple[Source, ...]:
        """Where rows came from."""
        return self.header.sources

    @property
    def history(self) -> tuple[Any, ...]:
        """The operations that led here, oldest first."""
        return self.header.history

    def __len__(self) -> int:
        return self.header.num_rows

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.path)!r}, rows={len(self)}, dim={self.dim}, space={self.space!r})"

    # -- rows and keys

    @cached_property
    def _active(self) -> NDArray[np.bool_] | None:
        if "active" not in self._stored:
            return None
        active: NDArray[np.bool_] = self._stored.array("active").view(np.uint8).astype(np.bool_)
        return active

    def rows(self) -> NDArray[np.int64]:
        """Return the (n,) active rows, ascending."""
        if self._active is None:
            return np.arange(len(self), dtype=np.int64)
        return np.flatnonzero(self._active).astype(np.int64)

    def unmasked(self) -> MemoryBank:
        """Return the same open bank with its mask lifted, for data derived from all rows that the mask is applied to later."""
        twin = type(self)(self._stored)
        twin.__dict__["_active"] = None
        return twin

    def rows_for(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the (B,) rows of keys, order kept; raises UnknownKeyError naming the first three unknown ones."""
        found = self.find_rows(keys)
        unknown = [keys[place] for place in np.flatnonzero(found < 0).tolist()]
        if unknown:
            raise UnknownKeyError(
                f"{self.path} has no row with key {first_three(unknown)}", path=self.path, key=unknown[0]
            )
        return found

    def find_rows(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the (B,) rows of keys, order kept, -1 where the bank has no such key."""
        if not keys:
            return np.zeros(0, np.int64)
        return key_tables.find(self._stored.array("keys.hash"), self._stored.array("keys.row"), keys, self.keys)

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the keys of rows, order kept; masked rows have keys too."""
        keys: list[str] = [""] * len(rows)
        for name, places, local in self._by_segment(self._checked(rows)):
            offsets = self._stored.array(f"{name}/keys.offsets")
            text = self._stored.array(f"{name}/keys.bytes")
            for place, row in zip(places.tolist(), local.tolist(), strict=True):
                begin, end = int(offsets[row]), int(offsets[row + 1])
                if not 0 <= begin < end <= len(text):
                    raise CorruptError(
                        f"{self.path}: the key of row {row} in segment {name} is damaged", path=self.path
                    )
                keys[place] = key_tables.decode(bytes(text[begin:end]), self.path)
        return keys

    def _checked(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise UnknownKeyError(f"rows must be a list of integers, got {wanted.dtype} of shape {list(wanted.shape)}")
        if wanted.size and (wanted.min() < 0 or wanted.max() >= len(self)):
            row = int(wanted[(wanted < 0) | (wanted >= len(self))][0])
            raise UnknownKeyError(f"{self.path} has rows 0 to {len(self) - 1}, not {row}", path=self.path, row=row)
        return wanted.astype(np.int64, copy=False)

    def _by_segment(self, rows: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.int64]]]:
        """Yield (segment name, places in `rows`, rows inside the segment)."""
        owner = np.searchsorted(self._starts, rows, side="right") - 1
        for index in np.unique(owner):
            places = np.flatnonzero(owner == index)
            yield self.header.segments[index].name, places, rows[places] - self._starts[index]

    # -- snippets

    def snippets(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a new (B, D) float32 array in the bank's space.

        Args:
            rows: (B,) integers, any order, repetitions allowed.

        Raises:
            UnknownKeyError: a row outside 0..N-1.
            MaskedRowError: a masked row.
            CorruptError: a value that is not finite.
        """
        return self._gathered(rows, self._gather)

    def directions(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a new (B, D) float32 array of vectors in the direction of the snippets, of any length; raises as `snippets`."""
        return self._gathered(rows, self._gather_directions)

    @property
    def is_unit_as_stored(self) -> bool:
        """Whether `directions` are of length 1 already."""
        return False

    def _gathered(
        self, rows: NDArray[np.int64], gather: Callable[[str, NDArray[np.int64], bool], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        wanted = self._allowed(rows)
        first_look = not self._looked_at[wanted].all()
        if len(self.header.segments) == 1:
            result = gather(self.header.segments[0].name, wanted, not first_look)
        else:
            result = np.empty((len(wanted), self.dim), np.float32)
            for name, places, local in self._by_segment(wanted):
                result[places] = gather(name, local, not first_look)
        if first_look:
            if not all_finite(result):
                self._name_bad_row(result, wanted)
            self._looked_at[wanted] = True
        return result

    @cached_property
    def _looked_at(self) -> NDArray[np.bool_]:
        """(N,): rows whose snippets were found finite; they do not change, so each is looked at once."""
        return np.zeros(len(self), np.bool_)

    def _allowed(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return rows of the bank that are not masked; raises UnknownKeyError or MaskedRowError."""
        wanted = self._checked(rows)
        if self._active is not None and not self._active[wanted].all():
            row = int(wanted[~self._active[wanted]][0])
            raise MaskedRowError(f"row {row} of {self.path} is masked", path=self.path, row=row)
        return wanted

    def _name_bad_row(self, values: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        row = int(rows[~np.isfinite(values).all(axis=1)][0])
        raise CorruptError(
            f"{self.path}: the snippet of row {row} is not finite: build it again", path=self.path, row=row
        )

    def snippet_blocks(self, rows: NDArray[np.int64], block: int = 0) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (start, snippets of rows[start:start+block]) in bounded memory, mapped pages let go after each block.

        Args:
            rows: (n,) active rows.
            block: rows at a time; 0 takes as many as 64 MiB hold.
        """
        step = block or max(1, BLOCK_BYTES // (4 * self.dim))
        for start in range(0, len(rows), step):
            yield start, self.snippets(rows[start : start + step])
            self._stored.release()

    def _gather(self, segment: str, rows: NDArray[np.int64], finite: bool) -> NDArray[np.float32]:
        """Return the snippets of a segment's rows, a new array in the bank's space; `finite`: they were looked at before."""
        raise AssertionError(f"{type(self).__name__} does not read snippets: {segment}, {len(rows)} rows, {finite}")

    def _gather_directions(self, segment: str, rows: NDArray[np.int64], finite: bool) -> NDArray[np.float32]:
        return self._gather(segment, rows, finite)

    # -- concepts

    @property
    def names(self) -> tuple[str, ...]:
        """Concepts, in file order."""
        return self.header.concepts

    @cached_property
    def _concept_index(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.names)}

    def concept_sizes(self) -> dict[str, int]:
        """Return name → number of rows, masked ones included, in file order."""
        if not self.names:
            return {}
        return dict(zip(self.names, np.diff(self._stored.array("concepts.offsets")).tolist(), strict=True))

    def all_rows_of(self, concept: str) -> NDArray[np.int64]:
        """Return a concept's rows, masked ones included, ascending; raises UnknownKeyError with the nearest names."""
        if concept not in self._concept_index:
            known = ", ".join(self.names[:8]) + (", …" if len(self.names) > 8 else "") if self.names else "none"
            message = f"{self.path} has no concept {concept!r} (it has: {known}).{suggest(concept, self.names)}"
            raise UnknownKeyError(message, path=self.path, key=concept)
        index = self._concept_index[concept]
        offsets, rows = self._stored.array("concepts.offsets"), self._stored.array("concepts.rows")
        begin, end = int(offsets[index]), int(offsets[index + 1])
        members: NDArray[np.int64] = np.array(rows[begin:end], np.int64)
        if not 0 <= begin <= end <= len(rows) or (members.size and (members.min() < 0 or members.max() >= len(self))):
            raise CorruptError(f"{self.path}: the rows of concept {concept!r} are damaged", path=self.path, key=concept)
        return members

    def rows_of(self, concept: str) -> NDArray[np.int64]:
        """Return the active rows of a concept, ascending; raises UnknownKeyError with the nearest names."""
        members = self.all_rows_of(concept)
        if self._active is not None:
            members = np.asarray(members[self._active[members]], dtype=np.int64)
        return members

    # -- images

    def image_rows(self) -> NDArray[np.int64]:
        """Return the active rows that came from an image, ascending."""
        from_image = np.array([source.kind in IMAGE_KINDS for source in self.sources])
        rows: NDArray[np.int64] = self.rows()
        return np.asarray(rows[from_image[self.source_ids(rows)]], dtype=np.int64)

    def source_ids(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the (B,) positions in `sources` of rows' sources; masked rows have one too."""
        ids = np.empty(len(rows), np.int64)
        for name, places, local in self._by_segment(self._checked(rows)):
            ids[places] = self._stored.array(f"{name}/source")[local]
        if ids.size and ids.max() >= len(self.sources):
            raise CorruptError(
                f"{self.path}: a row points at source {ids.max()} of {len(self.sources)}", path=self.path
            )
        return ids

    def missing_images(self, rows: NDArray[np.int64], images: ImagesFrom = None) -> NDArray[np.int64]:
        """Return those of the rows whose image is not where the provenance, or the folder `images`, says it is.

        Args:
            rows: (B,) rows that came from an image.
            images: folder that holds the images under their keys, instead of the recorded one; rows of an inserted
                concept fall back on the folder they were inserted from.
        """
        from gmem_bank.locating import is_there

        wanted = np.asarray(rows, np.int64)
        places = zip(self.keys(wanted), self.source_ids(wanted).tolist(), strict=True)
        there = [is_there(key, self.sources[source], self.folder, images) for key, source in places]
        return wanted[~np.array(there, np.bool_)]

    def read_image(self, row: int, images: ImagesFrom = None) -> NDArray[np.uint8]:
        """Return the (H, W, 3) uint8 RGB image of a row.

        Raises:
            SourceError: the image is absent or cannot be decoded, or the row has none.
        """
        from gmem_bank.locating import read_pixels

        rows = np.array([row])
        [key], [source] = self.keys(rows), self.source_ids(rows).tolist()
        return read_pixels(key, self.sources[source], self.folder, images)

    def nearest(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the (B, k) cosines, descending, and the (B, k) active rows nearest to (B, D) queries (needs FAISS).

        A query of zeros is refused, as it has no direction; what else is, see `index.search_flat`.
        """
        from gmem_bank.coordinates import require_nonzero
        from gmem_bank.index import search_flat

        if queries.ndim == 2 and queries.shape[1] == self.dim:
            require_nonzero(queries)
        return search_flat(self, queries, k)
