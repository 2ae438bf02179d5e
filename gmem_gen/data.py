"""Training images: decoded and cropped once into a mapped file, then read by row number; and the order they come in.

Shapes: M training images, B batch, H×W pixels, C channels, c·h·w latent.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import gmem_bank
from gmem_bank.errors import SourceError, unusable_images
from gmem_gen.conditioning import Bank, ImagesFrom, Join, read_image, record_of
from gmem_gen.model import LatentShape
from gmem_gen.outputs import Progress, writing
from gmem_gen.tokenizers import Tokenizer

DEFAULT_SIZE = 64
PROBE = 256
FLUSH_EVERY = 1024
Mapped = np.memmap[tuple[int, ...], np.dtype[np.uint8]]


class TrainingImages(Protocol):
    """What a training learns to draw, by place among the training rows."""

    @property
    def tokenizer(self) -> Tokenizer:
        """What turns latents into pixels again."""

    @property
    def latent(self) -> LatentShape:
        """(c, h = w)."""

    def __len__(self) -> int:
        """M."""

    def read(self, places: NDArray[np.int64]) -> Tensor:
        """Return (B, c, h, w) float32 normalised latents of (B,) places: the same every time, from any thread."""


def default_image_size(bank: Bank, join: Join, images: ImagesFrom, *, most: int, multiple: int) -> int:
    """Return the side to train at where none is configured: `most`, or less where the images are smaller.

    Args:
        bank: read through the interface.
        join: its rows with images. "Smaller" is the short side of the smallest of up to 256 of them, spread over the rows.
        images: override of the recorded folders.
        most: a side in pixels.
        multiple: the side is brought down to a multiple of it, at least once.
    """
    chosen = join.rows[np.linspace(0, len(join.rows) - 1, min(PROBE, len(join.rows))).astype(np.int64)]
    size = min([most, *(side for row in chosen if (side := _short_side(bank, int(row), images)))])
    return max(multiple, size - size % multiple)


def _short_side(bank: Bank, row: int, images: ImagesFrom) -> int:
    """Return the short side of an image, 0 for one that cannot be read: that is told when all images are read."""
    try:
        return int(min(read_image(bank, row, images).shape[:2]))
    except SourceError:
        return 0


def to_pixels(image: NDArray[np.uint8], size: int, channels: int) -> NDArray[np.uint8]:
    """Return the central (size, size, C) square of an (H, W, 3) image, by the crop that encoders use; grey for C = 1."""
    square = gmem_bank.center_crop(image, size)
    if channels == 3:
        return square
    return np.asarray(Image.fromarray(square).convert("L"))[..., None]


class PixelCache:
    """The training images as one mapped uint8 array; derived data that can be deleted at any time.

    Args:
        folder: where the file lies.
        bank: read through the interface.
        join: which rows.
        images: override of the recorded folders.
        size: H = W.
        channels: C.
        progress: told images read and images in all.
    """

    def __init__(
        self,
        folder: Path,
        bank: Bank,
        join: Join,
        images: ImagesFrom,
        *,
        size: int,
        channels: int,
        progress: Progress,
    ) -> None:
        given = [images] if isinstance(images, (str, os.PathLike)) else images or []
        where = [str(Path(folder).resolve()) for folder in given]
        digest = hashlib.sha256(json.dumps([record_of(bank)["fingerprint"], join.keys, where]).encode()).hexdigest()[
            :16
        ]
        path = folder / f"pixels-{size}x{channels}-{digest}.npy"
        shape = (len(join.rows), size, size, channels)
        if not _is_whole(path, shape):
            folder.mkdir(parents=True, exist_ok=True)
            self._fill(path, shape, bank, join, images, progress)
            for stale in set(folder.glob("pixels-*")) - {path}:
                stale.unlink()  # of a bank that was edited since
        self._images: Mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        self._advise("MADV_RANDOM")  # images are asked for in any order: what follows them is not wanted

    def _fill(
        self,
        path: Path,
        shape: tuple[int, ...],
        bank: Bank,
        join: Join,
        images: ImagesFrom,
        progress: Progress,
    ) -> None:
        partial, counter = path.with_suffix(".partial"), path.with_suffix(".count")
        done = _count_in(counter) if partial.exists() else 0
        advice = "Free some space, or choose another --out, and run the same command again"
        with writing(path, f"the training images to {path.parent}", advice):
            array, kept = _room_for(partial, shape, keep=done > 0)
            done = done if kept else 0
            unusable: dict[str, str] = {}
            for place in range(done, shape[0]):
                try:
                    array[place] = to_pixels(read_image(bank, int(join.rows[place]), images), shape[1], shape[3])
                except SourceError as error:
                    unusable[join.keys[place]] = str(error)
                if (place + 1) % FLUSH_EVERY == 0 and not unusable:
                    array.flush()
                    counter.write_text(str(place + 1))
                progress(place + 1, shape[0])
            array.flush()
            del array
            if unusable:  # all are found before any is told
                raise unusable_images(unusable, shape[0])
            partial.replace(path)
            counter.unlink(missing_ok=True)

    def __len__(self) -> int:
        return len(self._images)

    def read(self, places: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return (B, H, W, C) uint8 images by position in the join."""
        size = self._images[0].nbytes
        for place in places.tolist():  # all are on their way while the first is copied, and each is one read
            self._advise("MADV_WILLNEED", self._images.offset + place * size, size)
        return np.ascontiguousarray(self._images[places])

    def _advise(self, what: str, start: int = 0, length: int = 0) -> None:
        """Tell the system what will be read of the file, where it can be told; `length` 0: all of it."""
        mapped: Any = self._images.base
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, what):
            first = start - start % mmap.PAGESIZE
            mapped.madvise(getattr(mmap, what), first, start + length - first if length else len(mapped))


class PixelImages:
    """Training images kept as pixels, and made latents each time they are read.

    Args:
        cache: the pixels.
        tokenizer: what makes latents of them; of pixels, that is only a change of range.
    """

    def __init__(self, cache: PixelCache, tokenizer: Tokenizer) -> None:
        self._cache, self.tokenizer, self.latent = cache, tokenizer, tokenizer.latent

    def __len__(self) -> int:
        return len(self._cache)

    def read(self, places: NDArray[np.int64]) -> Tensor:
        """Return (B, c, h, w) float32 normalised latents."""
        return self.tokenizer.encode(self._cache.read(places))


def _count_in(counter: Path) -> int:
    try:
        return int(counter.read_text())
    except (OSError, ValueError):
        return 0


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Whether the file is a uint8 array of that shape; one that was cut is made again, it is derived data."""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return bool(stored.shape == shape and stored.dtype == np.uint8)


def _room_for(path: Path, shape: tuple[int, ...], *, keep: bool) -> tuple[Mapped, bool]:
    """Map a file of that shape whose blocks are allocated: on a full disk this fails, where a sparse map would crash later.

    Returns:
        The map, and whether it is the file that was there: only where that was to be kept, and is whole.
    """
    if keep and _is_whole(path, shape):
        return np.lib.format.open_memmap(path, mode="r+"), True
    fresh: Mapped = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, 0, path.stat().st_size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(descriptor)
    return fresh, False


class Order:
    """Which images each step sees: a fresh permutation an epoch, decided by seed and epoch alone, so any step can be asked for.

    Args:
        num_images: M.
        batch_size: B; where M is smaller, M.
        seed: any integer.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = min(batch_size, num_images)
        self.steps_per_epoch = num_images // self.batch_size
        self._seed = seed
        self._epoch = -1
        self._permutation = np.zeros(0, np.int64)

    def batch(self, step: int) -> NDArray[np.int64]:
        """Return the (B,) positions of a step; the last M mod B images of each epoch's permutation wait for another epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed & 0xFFFFFFFF, epoch])))
            self._epoch, self._permutation = epoch, rng.permutation(self.num_images)
        return self._permutation[place * self.batch_size : (place + 1) * self.batch_size]
