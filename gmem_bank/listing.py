"""Which images a source has, in one order: kept as columns, so that a million of them fit into some 80 MB.

Shapes: none here.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import overload

from gmem_bank.naming import FLIP_SUFFIX
from gmem_bank.provenance import Json, Source, canonical_json, relative_to_bank


@dataclass(frozen=True, kw_only=True, slots=True)
class Skipped:
    """A file that gave no row, and why."""

    path: str
    reason: str
    loud: bool = False
    """True: more may be missing than this, so it is said before the others."""

    def to_json(self) -> dict[str, str]:
        """Return {"path": …, "reason": …}."""
        return {"path": self.path, "reason": self.reason}


def to_report(skipped: Iterable[Skipped]) -> list[dict[str, str]]:
    """Return what gave no row as JSON objects, in their order but for what is loud, which comes first."""
    return [entry.to_json() for entry in sorted(skipped, key=lambda entry: not entry.loud)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One image of a source."""

    key: str
    path: Path
    """Of the image's own file, or of the file that it lies in."""
    size: int
    """Bytes; 0 where only the file that it lies in knows."""
    modified: int
    """Nanoseconds; tells a resumed build that a file was replaced, and never enters a bank."""
    flipped: bool = False
    """True: the twin whose picture is mirrored left to right."""
    inside: str = ""
    """What it lies in: "" nothing, "tar", "pixels" (an array of images) or "table" (Parquet or Arrow)."""
    place: int = -1
    """Where in it: the offset of its first byte in a tar file, else the number of its row."""
    column: str = ""
    """The array of a .npz file, or the column of a table."""


class Items(Sequence[Item]):
    """The images of one source.

    Args:
        root: images that lie in files of their own are at root / (key without prefix).
        prefix: what every key begins with.
        inside: as in `Item`.
        column: as in `Item`.
    """

    def __init__(self, root: Path, prefix: str = "", *, inside: str = "", column: str = "") -> None:
        self.root, self.prefix, self.inside, self.column = root, prefix, inside, column
        self._text = bytearray()
        self._ends = array("q", [0])
        self._sizes, self._modified, self._places = array("q"), array("q"), array("q")
        self._files = array("i")
        self._flipped = bytearray()
        self._paths: dict[Path, int] = {}
        self._path_list: list[Path] = []

    def append(
        self, key: str, size: int, modified: int, *, path: Path | None = None, place: int = -1, flipped: bool = False
    ) -> None:
        """Add an image; `path` is the file that it lies in, None for a file of its own."""
        self._text += key.encode()
        self._ends.append(len(self._text))
        self._sizes.append(size)
        self._modified.append(modified)
        self._places.append(place)
        self._files.append(-1 if path is None else self._file(path))
        self._flipped.append(flipped)

    def _file(self, path: Path) -> int:
        number = self._paths.setdefault(path, len(self._path_list))
        if number == len(self._path_list):
            self._path_list.append(path)
        return number

    def key(self, index: int) -> str:
        """Return the key of one image."""
        return self._text[self._ends[index] : self._ends[index + 1]].decode()

    def all_keys(self) -> Iterator[str]:
        """Yield every key."""
        return (self.key(index) for index in range(len(self)))

    def facts(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield (key, size, modified, place) of every image: all that a change of the source would change."""
        return zip(self.all_keys(), self._sizes, self._modified, self._places, strict=True)

    def __len__(self) -> int:
        return len(self._sizes)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        """Return an image, or a list of them."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        key, flipped = self.key(index), bool(self._flipped[index])
        own = key.removesuffix(FLIP_SUFFIX) if flipped else key
        file = self._files[index]
        return Item(
            key=key, path=self.root / own.removeprefix(self.prefix) if file < 0 else self._path_list[file],
            size=self._sizes[index], modified=self._modified[index], flipped=flipped, inside=self.inside,
            place=self._places[index], column=self.column,
        )  # fmt: skip

    def _copy(self, other: Items, index: int, *, flip: bool = False) -> None:
        file = other._files[index]
        self.append(
            other.key(index) + (FLIP_SUFFIX if flip else ""), other._sizes[index], other._modified[index],
            path=None if file < 0 else other._path_list[file], place=other._places[index],
            flipped=flip or bool(other._flipped[index]),
        )  # fmt: skip

    def _empty(self) -> Items:
        return Items(self.root, self.prefix, inside=self.inside, column=self.column)

    def take(self, indices: Iterable[int]) -> Items:
        """Return these images, in this order."""
        taken = self._empty()
        for index in indices:
            taken._copy(self, index)
        return taken

    def with_flips(self) -> Items:
        """Return the images with a mirrored twin after each, its key ending in "#flip"."""
        doubled = self._empty()
        for index in range(len(self)):
            doubled._copy(self, index)
            doubled._copy(self, index, flip=True)
        return doubled

    def sorted_by_key(self) -> Items:
        """Return the images ordered by the bytes of their keys."""
        if self._is_sorted():
            return self
        text, ends = self._text, self._ends
        return self.take(sorted(range(len(self)), key=lambda index: bytes(text[ends[index] : ends[index + 1]])))

    def _is_sorted(self) -> bool:
        text, spans = memoryview(self._text), pairwise(self._ends)
        return all(bytes(text[a:b]) <= bytes(text[c:d]) for (a, b), (c, d) in pairwise(spans))


class RowGroups:
    """Which images of tables are read together, as the row groups of Parquet files are."""

    def __init__(self) -> None:
        self.starts = array("q")
        """Of every group the place of its first image in the listing."""
        self.sizes = array("q")
        """Bytes that are read for any image of the group; 0 where each is read alone."""

    def append(self, start: int, size: int) -> None:
        """Add the group that begins at a place."""
        self.starts.append(start)
        self.sizes.append(size)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a source in their one order, and what else lay there."""

    root: Path
    items: Items
    ignored: tuple[Skipped, ...]
    kind: str = "folder"
    """Of the provenance record: "folder", "list", "tar", "pixels" or "table"."""
    columns: Mapping[str, Json] = field(default_factory=dict)
    """Which columns of a table or arrays of a file were taken: recorded, to find an image again."""
    classes: bool = True
    """Whether the first folder of a key names a concept."""
    groups: RowGroups | None = None
    """Of tables; None where every image is read by itself."""

    @property
    def prefix(self) -> str:
        """What every key begins with."""
        return self.items.prefix

    def to_source(self, bank_folder: Path, digest: str) -> Source:
        """Return the provenance record of the source, with its content digest, for a bank in that folder."""
        return Source(
            kind=self.kind, path=relative_to_bank(self.root, bank_folder), prefix=self.prefix, digest=digest,
            num_images=len(self.items), columns=dict(self.columns),
        )  # fmt: skip


class Digest:
    """sha256 of a JSON list that is never held whole."""

    def __init__(self) -> None:
        self._state = hashlib.sha256(b"[")
        self._comma = b""

    def add(self, entry: Json) -> None:
        """Append an entry to the list."""
        self._state.update(self._comma + canonical_json(entry).encode())
        self._comma = b","

    def hexdigest(self) -> str:
        """Return 64 hex digits: those of the canonical JSON of the whole list."""
        whole = self._state.copy()
        whole.update(b"]")
        return whole.hexdigest()


def digest_of(entries: Iterable[Iterable[Json]]) -> str:
    """Return the digest of a source from (key, sha256 of the file) in order, or of other such entries."""
    digest = Digest()
    for entry in entries:
        digest.add(list(entry))
    return digest.hexdigest()
