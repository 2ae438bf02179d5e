"""Sets of images to compare: drawn samples, files, or the images of a bank, all read alike; and their embeddings.

Shapes: n images, H×W pixels, C channels, D dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import gmem_bank
from gmem_bank.errors import ConfigError, SourceError, first_three
from gmem_gen import conditioning
from gmem_gen.conditioning import Bank, ImagesFrom
from gmem_gen.outputs import Progress, writing

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
        read = self.read
        return dataclasses.replace(
            self, keys=keys, concepts=concepts, read=lambda place: read(int(positions[place]))
        )  # fmt: skip


def from_source(path: str | os.PathLike[str], what: str) -> ImageSet:
    """Return the images of a folder, tar files, an array or whatever `gmem-bank build` takes; raises SourceError."""
    source = gmem_bank.open_images(path)
    return ImageSet(what=what, keys=source.keys, read=source.read, concepts=source.concepts)


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


def matched(images: ImageSet, side: int, *, grey: bool) -> ImageSet:
    """Return images as a generator of that size was shown them: the central square, at that side, grey where it draws grey."""

    def read(place: int) -> NDArray[np.uint8]:
        square = gmem_bank.center_crop(images.read(place), side)
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

    def in_space(self, space: str) -> NDArray[np.float32]:
        """Return the embeddings in "raw" or "unit" space; one of zeros stays zeros."""
        if space == "raw":
            return self.values
        norms = np.linalg.norm(self.values.astype(np.float64), axis=1, keepdims=True)
        unit: NDArray[np.float32] = (self.values / np.maximum(norms, 1e-30)).astype(np.float32)
        return unit


def embed(
    images: ImageSet, encoder: gmem_bank.Encoder, cache: Path | None, *, progress: Progress, one_size: bool = False
) -> Embedded:
    """Embed a set, chunk by chunk; what an interrupted call had done is taken from the cache.

    Args:
        images: the set.
        encoder: from `load_encoder`.
        cache: folder for finished chunks, named by a hash of encoder and pixels, so that an image that changed is never taken
            for what it was; None keeps nothing.
        progress: told images done and images in all.
        one_size: refuse images of different sizes.

    Raises:
        SourceError: no image can be read.
        ConfigError: sizes differ and must not.
        EncoderError: the encoder failed.
    """
    kept, skipped, values = [], [], []
    sizes: dict[tuple[int, ...], str] = {}
    for start in range(0, len(images), CHUNK):
        pixels = []
        for place in range(start, min(start + CHUNK, len(images))):
            try:
                pixels.append(images.read(place))
            except SourceError:
                skipped.append(images.keys[place])
                continue
            kept.append(place)
            sizes.setdefault(pixels[-1].shape[:2], images.keys[place])
        if one_size and len(sizes) > 1:
            raise ConfigError(_mixed(images.what, sizes), key="samples")
        if pixels:
            values.append(_chunk(pixels, encoder, cache))
        progress(min(start + CHUNK, len(images)), len(images))
    if not kept:
        raise SourceError(
            f"none of the {len(images)} images of {images.what} can be read, such as {first_three(skipped)}"
        )
    taken = images if not skipped else images.take(np.array(kept, np.int64))
    return Embedded(images=taken, values=np.concatenate(values), skipped=skipped)


def _mixed(what: str, sizes: Mapping[tuple[int, ...], str]) -> str:
    (one, first), (two, second) = list(sizes.items())[:2]
    return (
        f"{what} have different sizes, such as {one[1]}×{one[0]} ({first}) and {two[1]}×{two[0]} ({second}): an encoder sees "
        "the difference, so a distance would mix the two. Give the samples of one model, or bring them to one size"
    )


def _chunk(pixels: Sequence[NDArray[np.uint8]], encoder: gmem_bank.Encoder, cache: Path | None) -> NDArray[np.float32]:
    if cache is None:
        return gmem_bank.encode_images(encoder, pixels)
    spec = dataclasses.replace(encoder.spec, space="raw")  # the network's own numbers, whatever space is asked for
    digest = hashlib.sha256(spec.fingerprint.encode())
    for image in pixels:
        digest.update(f"{image.shape}".encode())
        digest.update(np.ascontiguousarray(image).data)
    path = cache / f"{digest.hexdigest()}.npy"
    found = _cached(path, (len(pixels), encoder.spec.dim))
    if found is not None:
        return found
    values = gmem_bank.encode_images(encoder, pixels)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with writing(cache, f"embeddings to {cache}", "Free some space, and run the same command again"):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                np.save(stream, values, allow_pickle=False)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return values


def _cached(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """Return an array of the cache; None where there is none, or it was cut."""
    try:
        found: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None
