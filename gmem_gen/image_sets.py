"""Sets of images to compare: drawn samples, files, or the images of a bank, all read alike; and their embeddings.

Shapes: n images, H×W pixels, C channels, D dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import gmem_bank
from gmem_bank.errors import ConfigError, SourceError, first_three
from gmem_gen import conditioning
from gmem_gen.conditioning import Bank, ImagesFrom
from gmem_gen.embedding_cache import EmbeddingCache, hash_of
from gmem_gen.outputs import Progress

CHUNK = 256
"""Images that are embedded, and kept, together."""


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images that are read one at a time."""

    what: str
    """In words, for labels; the same wherever the files lie."""
    keys: Sequence[str]
    read: Callable[[int], NDArray[np.uint8]]
    """Position → (H, W, 3) uint8; raises SourceError."""
    concepts: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    """Concept → positions."""
    num_left_out: int = 0
    """Images that should be here and are gone."""
    has_one_channel: Callable[[int], bool | None] | None = None
    """Position → whether its file has grey alone, None where it cannot be read; None: there are no files."""

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, positions: NDArray[np.int64]) -> ImageSet:
        """Return these images, in this order."""
        place_of = {int(position): place for place, position in enumerate(positions.tolist())}
        concepts = {
            name: np.array(sorted(place_of[int(p)] for p in members if int(p) in place_of), np.int64)
            for name, members in self.concepts.items()
        }
        keys = [self.keys[int(position)] for position in positions]
        read, asked = self.read, self.has_one_channel
        return dataclasses.replace(
            self, keys=keys, concepts=concepts, read=lambda place: read(int(positions[place])),
            has_one_channel=None if asked is None else lambda place: asked(int(positions[place])),
        )  # fmt: skip

    def have_one_channel(self) -> bool:
        """Say whether the files of all images, as far as they can be read, have grey alone; False where there are none."""
        asked = self.has_one_channel
        return asked is not None and all(asked(place) is not False for place in range(len(self)))


def from_source(path: str | os.PathLike[str], what: str) -> ImageSet:
    """Return the images of a folder, tar files, an array or whatever `gmem-bank build` takes; raises SourceError."""
    source = gmem_bank.open_images(path)
    return ImageSet(
        what=what, keys=source.keys, read=source.read, concepts=source.concepts, has_one_channel=source.has_one_channel
    )


def from_bank(bank: Bank, images: ImagesFrom, what: str) -> ImageSet:
    """Return the images that a bank's active rows came from; raises SourceError where there is none."""
    join = conditioning.join_images(bank, images, allow_missing=True)
    place_of = np.full(len(bank), -1, np.int64)
    place_of[join.rows] = np.arange(len(join.rows))
    members = {name: place_of[rows] for name, rows in conditioning.concepts_of(bank).items()}
    return ImageSet(
        what=what, keys=join.keys, read=lambda place: conditioning.read_image(bank, int(join.rows[place]), images),
        concepts={name: places[places >= 0] for name, places in members.items()}, num_left_out=len(join.missing),
    )  # fmt: skip


def from_pixels(images: NDArray[np.uint8], keys: Sequence[str], what: str) -> ImageSet:
    """Return (n, H, W, C) images in memory as a set, grey ones as three equal channels."""
    wide = images if images.shape[3] == 3 else np.broadcast_to(images, (*images.shape[:3], 3))
    return ImageSet(what=what, keys=keys, read=lambda place: np.ascontiguousarray(wide[place]))


def matched(images: ImageSet, side: int | None, *, grey: bool) -> ImageSet:
    """Return images as a generator of that size was shown them: the central square, at that side, grey where it draws grey.

    Args:
        images: of any sizes.
        side: in pixels; None leaves them at their own size.
        grey: whether they are made grey.
    """
    if side is None and not grey:
        return images

    def read(place: int) -> NDArray[np.uint8]:
        pixels = images.read(place)
        square = pixels if side is None else gmem_bank.center_crop(pixels, side)
        if not grey:
            return square
        return np.repeat(np.asarray(Image.fromarray(square).convert("L"))[..., None], 3, axis=2)

    return dataclasses.replace(images, read=read)


@dataclass(frozen=True, kw_only=True)
class Embedded:
    """A set and its embeddings; images that cannot be read are left out of both."""

    images: ImageSet
    values: NDArray[np.float32]
    """(n, D) as the encoder gives them, or as a bank has them."""
    skipped: Sequence[str] = ()
    """Keys of images that could not be read."""
    hashes: Sequence[bytes] = ()
    """sha256 of each image's shape and pixels, as they were embedded; empty for rows of a bank."""
    size: tuple[int, int] = (0, 0)
    """(H, W) of the first image."""
    looks_grey: bool = False
    """Whether the channels of every image are equal."""

    def in_space(self, space: str) -> NDArray[np.float32]:
        """Return the embeddings in "raw" or "unit" space; one of zeros stays zeros."""
        if space == "raw":
            return self.values
        norms = np.linalg.norm(self.values.astype(np.float64), axis=1, keepdims=True)
        unit: NDArray[np.float32] = (self.values / np.maximum(norms, 1e-30)).astype(np.float32)
        return unit

    def take(self, positions: NDArray[np.int64]) -> Embedded:
        """Return these images and their embeddings, in this order; what could not be read stays with the whole."""
        return dataclasses.replace(
            self, images=dataclasses.replace(self.images.take(positions), num_left_out=0), values=self.values[positions],
            skipped=(), hashes=[self.hashes[place] for place in positions.tolist()] if self.hashes else (),
        )  # fmt: skip

    def digest(self) -> str | None:
        """Return the sha256 over all images in their order, so that a report says which they were; None for rows of a bank."""
        return hashlib.sha256(b"".join(self.hashes)).hexdigest() if self.hashes else None


def embed(
    images: ImageSet, encoder: gmem_bank.Encoder, cache: EmbeddingCache | None, *, progress: Progress,
    one_size: bool = False,
) -> Embedded:  # fmt: skip
    """Embed a set, chunk by chunk; what an interrupted call had done is taken from the cache.

    Args:
        images: the set.
        encoder: from `load_encoder`.
        cache: of finished chunks; None keeps nothing.
        progress: told images done and images in all.
        one_size: refuse images of different sizes.

    Raises:
        SourceError: no image can be read.
        ConfigError: sizes differ and must not.
        EncoderError: the encoder failed.
    """
    kept, skipped, values, hashes, grey = [], [], [], [], True
    sizes: dict[tuple[int, ...], str] = {}
    for start in range(0, len(images), CHUNK):
        places, pixels, unreadable = _read(images, start)
        kept += places
        skipped += unreadable
        for place, image in zip(places, pixels, strict=True):
            sizes.setdefault(image.shape[:2], images.keys[place])
        if one_size and len(sizes) > 1:
            raise ConfigError(_mixed(images.what, sizes), key="samples")
        if pixels:
            grey = grey and all(is_grey(image) for image in pixels)
            own = [hash_of(image) for image in pixels]
            hashes += own
            values.append(cache.embeddings(encoder, pixels, own) if cache else gmem_bank.encode_images(encoder, pixels))
        progress(min(start + CHUNK, len(images)), len(images))
    if not kept:
        raise SourceError(
            f"none of the {len(images)} images of {images.what} can be read, such as {first_three(skipped)}"
        )
    taken = images if not skipped else images.take(np.array(kept, np.int64))
    height, width = next(iter(sizes))
    return Embedded(
        images=taken,
        values=np.concatenate(values),
        skipped=skipped,
        hashes=hashes,
        size=(height, width),
        looks_grey=grey,
    )


def _read(images: ImageSet, start: int) -> tuple[list[int], list[NDArray[np.uint8]], list[str]]:
    """Return places and pixels of the images of a chunk that can be read, and the keys of those that cannot."""
    places, pixels, unreadable = [], [], []
    for place in range(start, min(start + CHUNK, len(images))):
        try:
            pixels.append(images.read(place))
        except SourceError:
            unreadable.append(images.keys[place])
        else:
            places.append(place)
    return places, pixels, unreadable


def is_grey(image: NDArray[np.uint8]) -> bool:
    """Say whether the channels of an (H, W, C) image are equal."""
    return bool((image == image[..., :1]).all())


def _mixed(what: str, sizes: Mapping[tuple[int, ...], str]) -> str:
    (one, first), (two, second) = list(sizes.items())[:2]
    return (
        f"{what} have different sizes, such as {one[1]}×{one[0]} ({first}) and {two[1]}×{two[0]} ({second}): an encoder sees "
        "the difference, so a distance would mix the two. Give the samples of one model, or bring them to one size"
    )
