"""A source of images to read from, and the embeddings of images that are in memory: for programs that judge pictures.

Shapes: N images of a source, n images in memory, H×W pixels, D dimensions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gmem_bank.batch_size import AUTO, BatchSize, resolve
from gmem_bank.columns import Columns
from gmem_bank.contents import list_source, read_item
from gmem_bank.decoding import decode_named, has_one_channel
from gmem_bank.encoders import Encoder
from gmem_bank.encoders.preprocess import crop
from gmem_bank.encoding import checked, run
from gmem_bank.errors import EncoderError, SourceError
from gmem_bank.listing import Listing
from gmem_bank.segments import concepts_of_folders
from gmem_bank.space import unusable_rows


class ImageSource:
    """The images of a source, in its order, read one at a time.

    Args:
        listing: from `list_source`.
    """

    def __init__(self, listing: Listing) -> None:
        self._items = listing.items
        self.keys = list(listing.items.all_keys())
        """N keys, as a bank of the source would have them."""
        self.concepts: dict[str, NDArray[np.int64]] = concepts_of_folders(self.keys) if listing.classes else {}
        """Class folder or label → positions of its images."""

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> NDArray[np.uint8]:
        """Return the (H, W, 3) image at a position; raises SourceError where it cannot be read."""
        item = self._items[position]
        try:
            pixels = decode_named(read_item(item), item.path)
        except OSError as error:
            raise SourceError(f"{item.path} cannot be read: {error.strerror}", path=item.path, key=item.key) from error
        return np.ascontiguousarray(pixels[:, ::-1]) if item.flipped else pixels

    def has_one_channel(self, position: int) -> bool | None:
        """Say whether the file or array of an image has grey alone; None where it cannot be read."""
        try:
            return has_one_channel(read_item(self._items[position]))
        except (OSError, SourceError):
            return None


def open_images(source: str | os.PathLike[str], *, columns: Columns | None = None) -> ImageSource:
    """Return the images of a folder, list, tar files, arrays of pixels or tables: of all that `build` takes.

    Raises:
        SourceError: nothing there, or no image in it.
    """
    return ImageSource(list_source(os.fspath(source), columns=columns))


def encode_images(
    encoder: Encoder, images: Sequence[NDArray[np.uint8]], *, batch_size: BatchSize = AUTO
) -> NDArray[np.float32]:
    """Encode images that are in memory, preprocessed as the encoder asks for.

    Args:
        encoder: from `load_encoder`.
        images: n of any sizes, each (H, W, 3) uint8.
        batch_size: images per call of the encoder.

    Returns:
        (n, D) float32 as the encoder gives them: raw, whatever space its spec names.

    Raises:
        EncoderError: the encoder failed, or what it gives is not finite.
    """
    size = resolve(batch_size, encoder)
    found = [np.zeros((0, encoder.spec.dim), np.float32)]
    for start in range(0, len(images), size):
        crops = np.stack([crop(image, encoder.spec.preprocessing) for image in images[start : start + size]])
        found.append(checked(run(encoder, encoder.encode, crops), len(crops), encoder))
    snippets = np.concatenate(found)
    if reasons := unusable_rows(snippets, "raw"):
        place, reason = next(iter(reasons.items()))
        raise EncoderError(f"encoder {encoder.spec.name!r} gave for image {place} no embedding: {reason}")
    return snippets
