"""What a source is, whatever it is: which images it has, and their bytes.

Shapes: none here.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from gmem_bank import pixel_arrays, tables, tars
from gmem_bank.columns import Columns
from gmem_bank.decoding import read_bytes, read_span
from gmem_bank.errors import SourceError
from gmem_bank.hub_data import HUB, hub_pattern
from gmem_bank.key_places import KeyPlaces
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
    if not source:
        raise SourceError("the source is empty: give a folder, or . for this one")
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
        columns: of arrays, tables and tar files: which to take.

    Raises:
        SourceError: nothing there, or no image in it.
    """
    text = os.fspath(source)
    kind = kind_of(text)
    if kind == "table":
        return tables.list_tables(hub_pattern(text) if text.startswith(HUB) else text, prefix=prefix, columns=columns)
    if kind == "pixels":
        return pixel_arrays.list_pixels(require_path(text), prefix=prefix, columns=columns)
    if kind == "tar":
        return tars.list_tars(text, prefix=prefix, columns=columns)
    if columns is not None:
        columns.refuse_all(text)
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
    """Return the image of a key in a source that holds images in other files, or None.

    The source is listed once, and again after any of its files changed. For every key the file of its image is looked at;
    all files are once a second, and whenever there is no such key.
    """
    asked = (os.fspath(source), prefix, columns)
    known = _KNOWN.get(asked)
    if known is not None and time.monotonic() - known.looked < LOOK_AGAIN:
        item = known.get(key)
        if item is not None and known.is_as_listed(item.path):
            return item
    with _LISTING:
        known = _looked_at(asked)
    return known.get(key)


LOOK_AGAIN = 1.0
"""Seconds for which the files of a source are taken to be those that they were."""
MOST_KNOWN = 4_000_000
"""Images of sources kept listed, at some 100 bytes each; the two sources used last are kept however many they have."""
_Asked = tuple[str, str, Columns]
_Stamp = tuple[int, int, int]
_KNOWN: OrderedDict[_Asked, _Known] = OrderedDict()
_LISTING = threading.Lock()


def _looked_at(asked: _Asked) -> _Known:
    """Return a source's images, listed anew where a file of it is not as it was."""
    now, stamps, known = time.monotonic(), _stamps(asked[0]), _KNOWN.pop(asked, None)
    if known is None or known.stamps != stamps:
        known = None  # the old one goes before there are two
        known = _Known(list_source(asked[0], prefix=asked[1], columns=asked[2]), stamps)
    known.looked = now
    _KNOWN[asked] = known
    while len(_KNOWN) > 2 and sum(map(len, _KNOWN.values())) > MOST_KNOWN:
        _KNOWN.popitem(last=False)
    return known


def _stamps(source: str) -> dict[Path, _Stamp]:
    paths = tables.table_paths(source) if kind_of(source) == "table" else matching_files(source)
    try:
        return {path: _stamp(path) for path in paths}
    except OSError as error:  # a link to nothing
        raise SourceError(f"could not read {error.filename}: {error.strerror}", path=source) from error


def _stamp(path: Path) -> _Stamp:
    facts = os.stat(path)  # noqa: PTH116 - half as long as by the method, for every row
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


class _Known(KeyPlaces):
    """The images of a source, and how its files were when it was listed."""

    def __init__(self, listing: Listing, stamps: dict[Path, _Stamp]) -> None:
        super().__init__(listing.items)
        self.stamps, self.looked = stamps, 0.0

    def get(self, key: str) -> Item | None:
        """Return the image of a key, or None."""
        place = self.find(key)
        return None if place is None else self.items[place]

    def is_as_listed(self, path: Path) -> bool:
        """Say whether a file is still the one that was listed."""
        try:
            return self.stamps.get(path) == _stamp(path)
        except OSError:
            return False
