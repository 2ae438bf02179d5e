"""Where the image of a row is, a file or a place inside one, and what it shows.

Shapes: H×W pixels.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.columns import Columns
from gmem_bank.contents import find_item, kind_of, read_item
from gmem_bank.decoding import decode_named
from gmem_bank.errors import SourceError
from gmem_bank.interface import ImagesFrom
from gmem_bank.listing import Item
from gmem_bank.naming import FLIP_SUFFIX
from gmem_bank.provenance import IN_ONE_FILE, Source
from gmem_bank.sources import image_path


def locate(key: str, source: Source, bank_folder: Path, images: ImagesFrom) -> Item:
    """Return the image of a row, whether or not it is there.

    Args:
        key: the row's key.
        source: the row's source.
        bank_folder: what the source's path is relative to.
        images: as in `sources.image_path`; None looks where the provenance says.

    Raises:
        SourceError: the row has no image, or the file that it lies in is gone or does not have it.
    """
    folder = source.folder(bank_folder)
    if source.kind not in IN_ONE_FILE or folder is None:
        return Item(key=key, path=image_path(key, source, bank_folder, images), size=0, modified=0)
    if images is not None:
        return _moved(key, source, folder, images) or Item(
            key=key, path=image_path(key, source, bank_folder, images), size=0, modified=0
        )
    found = find_item(folder, source.prefix, _columns(source), key.removesuffix(FLIP_SUFFIX))
    if found is None:
        raise SourceError(f"{folder} has no image {key!r} any more", path=folder, key=key)
    return found


def _moved(key: str, source: Source, recorded: Path, images: ImagesFrom) -> Item | None:
    """Return the image of a row in a given file of the source's kind, or one of its old name in a given folder."""
    given = [images] if isinstance(images, (str, os.PathLike)) else images or []
    for place in given:
        for candidate in (Path(place), Path(place) / recorded.name):
            if kind_of(os.fspath(candidate)) != source.kind:
                continue
            with contextlib.suppress(SourceError):
                found = find_item(candidate, source.prefix, _columns(source), key.removesuffix(FLIP_SUFFIX))
                if found is not None:
                    return found
    return None


def _columns(source: Source) -> Columns:
    """Return the columns that the source recorded, "none" for classes that were not taken."""
    recorded = {name: str(value) for name, value in source.columns.items() if name in ("image", "label", "key")}
    return Columns(**{"label": "none", **recorded})


def is_there(key: str, source: Source, bank_folder: Path, images: ImagesFrom) -> bool:
    """Say whether the image of a row is where `locate` looks; raises SourceError where the row has none."""
    try:
        return locate(key, source, bank_folder, images).path.is_file()
    except SourceError:
        if source.kind in IN_ONE_FILE:
            return False
        raise
    except OSError:  # a key may be longer than a file's name can be
        return False


def read_pixels(key: str, source: Source, bank_folder: Path, images: ImagesFrom) -> NDArray[np.uint8]:
    """Return the (H, W, 3) uint8 image of a row, mirrored where its key says so; raises SourceError."""
    item = locate(key, source, bank_folder, images)
    pixels = decode_named(read_item(item), item.path)
    return np.ascontiguousarray(pixels[:, ::-1]) if key.endswith(FLIP_SUFFIX) else pixels
