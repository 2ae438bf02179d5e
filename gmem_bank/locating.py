"""Where the image of a row is, a file or a member of a tar file, and what it shows.

Shapes: H×W pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.decoding import decode_named
from gmem_bank.errors import SourceError
from gmem_bank.interface import ImagesFrom
from gmem_bank.naming import FLIP_SUFFIX
from gmem_bank.provenance import Source
from gmem_bank.sources import Item, image_path
from gmem_bank.tars import member_of


def locate(key: str, source: Source, bank_folder: Path, images: ImagesFrom) -> Item:
    """Return the image of a row, whether or not it is there.

    Args:
        key: the row's key.
        source: the row's source.
        bank_folder: what the source's path is relative to.
        images: as in `sources.image_path`; None looks where the provenance says.

    Raises:
        SourceError: the row has no image, or its tar file is gone or does not have it.
    """
    folder = source.folder(bank_folder)
    if source.kind != "tar" or images is not None or folder is None:
        return Item(key=key, path=image_path(key, source, bank_folder, images), size=0, modified=0)
    found = member_of(folder, source.prefix, key.removesuffix(FLIP_SUFFIX))
    if found is None:
        raise SourceError(f"{folder} has no image {key!r} any more", path=folder, key=key)
    return found


def is_there(key: str, source: Source, bank_folder: Path, images: ImagesFrom) -> bool:
    """Say whether the image of a row is where `locate` looks; raises SourceError where the row has none."""
    try:
        return locate(key, source, bank_folder, images).path.is_file()
    except SourceError:
        if source.kind == "tar":
            return False
        raise
    except OSError:  # a key may be longer than a file's name can be
        return False


def read_pixels(key: str, source: Source, bank_folder: Path, images: ImagesFrom) -> NDArray[np.uint8]:
    """Return the (H, W, 3) uint8 image of a row, mirrored where its key says so; raises SourceError."""
    item = locate(key, source, bank_folder, images)
    pixels = decode_named(item.read(), item.path)
    return np.ascontiguousarray(pixels[:, ::-1]) if key.endswith(FLIP_SUFFIX) else pixels
