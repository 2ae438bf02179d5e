"""What a source is, whatever it is: which images it has, and their bytes.

Shapes: none here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from gmem_bank import pixel_arrays, tables, tars
from gmem_bank.columns import Columns
from gmem_bank.decoding import read_bytes, read_span
from gmem_bank.errors import SourceError
from gmem_bank.hub_data import HUB, hub_pattern
from gmem_bank.listing import Item, Listing, digest_of
from gmem_bank.sources import list_file, list_folder, list_images, matching_files, require_path

LISTS = (".txt", ".lst")


def kind_of(source: str) -> str:
    """Return what a source is by its name: "tar", "pixels", "table", or "" for images that lie in files of their own."""
    path, lower = Path(source), source.lower()
    if source.startswith(HUB) or (path.is_dir() and tables.is_dataset_folder(path)):
        return "table"
    if path.is_dir():
        return ""
    if tars.is_tar_source(source):
        return "tar"
    return "table" if lower.endswith(tables.SUFFIXES) else "pixels" if lower.endswith(pixel_arrays.SUFFIXES) else ""


def require_source(source: str) -> None:
    """Raise SourceError where there is nothing at a source, before minutes go into loading an encoder."""
    kind = kind_of(source)
    if source.startswith(HUB):
        hub_pattern(source)
    elif kind == "tar":
        tars.tar_paths(source)
    elif kind == "table" and not Path(source).is_dir():
        matching_files(source)
    else:
        require_path(source)


def list_source(
    source: str | Path, *, prefix: str = "", exclude: Sequence[Path] = (), columns: Columns | None = None
) -> Listing:
    """List whatever a source is.

    Args:
        source: a folder, an image, a text file that names images (.txt, .lst), tar files, arrays of pixels (.npy, .npz), tables
            (.parquet, .arrow, a folder of `datasets.save_to_disk`), or "hf://datasets/OWNER/NAME/PATTERN". Tar files and
            tables may be a glob pattern.
        prefix: put before each path to make its key.
        exclude: files in a folder to pass over without a word.
        columns: of arrays and tables: which to take.

    Raises:
        SourceError: nothing there, or no image in it.
    """
    text = os.fspath(source)
    kind = kind_of(text)
    if kind == "table":
        return tables.list_tables(hub_pattern(text) if text.startswith(HUB) else text, prefix=prefix, columns=columns)
    if kind == "pixels":
        return pixel_arrays.list_pixels(require_path(text), prefix=prefix, columns=columns)
    if columns is not None:
        columns.refuse_all(text)
    if kind == "tar":
        return tars.list_tars(text, prefix=prefix)
    path = Path(text)
    if path.is_dir() or not path.exists():
        return list_folder(path, prefix=prefix, exclude=exclude)
    return list_file(path, prefix=prefix) if path.suffix.lower() in LISTS else list_images(path, prefix=prefix)


def has_images(path: Path) -> bool:
    """Say whether a file of arrays or a table holds images rather than snippets; raises SourceError where it cannot be read."""
    suffix = path.suffix.lower()
    if not path.is_file():
        return False
    if suffix in pixel_arrays.SUFFIXES:
        return pixel_arrays.holds_pixels(path)
    return suffix in tables.SUFFIXES and tables.has_image_column(path)


def read_item(item: Item) -> bytes:
    """Return the bytes of an image, wherever it lies; raises SourceError."""
    if item.inside == "tar":
        return read_span(item.path, item.place, item.size)
    if item.inside == "pixels":
        return pixel_arrays.read_pixels_at(item.path, item.column, item.place)
    if item.inside == "table":
        return tables.read_cell(item.path, item.column, item.place)
    return read_bytes(item.path)


def content_hash(item: Item) -> str:
    """Return the sha256 of an image's bytes, "" where it is empty or cannot be read."""
    try:
        data = read_item(item)
    except SourceError:
        return ""
    return hashlib.sha256(data).hexdigest() if data else ""


def content_digest(listing: Listing) -> str:
    """Return the digest that encoding these images as they are now would record; reads every image."""
    return digest_of((item.key, content_hash(item)) for item in listing.items)


def find_item(source: str | Path, prefix: str, columns: Columns, key: str) -> Item | None:
    """Return the image of a key in a source that holds images in other files, or None; the source is listed once."""
    return _listed(os.fspath(source), prefix, columns, _stamp(os.fspath(source))).get(key)


def _stamp(source: str) -> tuple[tuple[str, int], ...]:
    paths = tables.table_paths(source) if kind_of(source) == "table" else matching_files(source)
    return tuple((str(path), path.stat().st_mtime_ns) for path in paths)


@lru_cache(maxsize=16)
def _listed(source: str, prefix: str, columns: Columns, _stamps: tuple[tuple[str, int], ...]) -> _ByKey:
    return _ByKey(list_source(source, prefix=prefix, columns=columns))


class _ByKey:
    """Finds images by key."""

    def __init__(self, listing: Listing) -> None:
        self._items = listing.items
        self._places = {key: place for place, key in enumerate(listing.items.all_keys())}

    def get(self, key: str) -> Item | None:
        """Return the image, or None."""
        place = self._places.get(key)
        return None if place is None else self._items[place]
