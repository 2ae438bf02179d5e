"""Embeddings that are kept, so that what an interrupted or an earlier evaluation has embedded is not embedded again.

A file holds the embeddings of a chunk of images under a hash of the encoder and their pixels, so an image that changed is never
taken for what it was, and a chunk repeats to the last bit, as it would not if it were cut otherwise.

Shapes: n images of a chunk, D dimensions.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_gen.images import replace_file
from gmem_gen.outputs import writing


class EmbeddingCache:
    """A folder of embeddings; it may be deleted at any time.

    Args:
        folder: made when something is kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._used: set[str] = set()

    def embeddings(
        self, encoder: gmem_bank.Encoder, pixels: Sequence[NDArray[np.uint8]], hashes: Sequence[bytes]
    ) -> NDArray[np.float32]:
        """Return the (n, D) embeddings of images, kept or made now.

        Args:
            encoder: from `load_encoder`.
            pixels: n images.
            hashes: of each, see `hash_of`.

        Raises:
            WriteError: no room.
            EncoderError: the encoder failed.
        """
        spec = dataclasses.replace(encoder.spec, space="raw")  # the network's own numbers, whatever space is asked for
        name = hashlib.sha256(spec.fingerprint.encode() + b"".join(hashes)).hexdigest() + ".npy"
        self._used.add(name)
        path = self.folder / name
        found = _read(path, (len(pixels), encoder.spec.dim))
        if found is not None:
            return found
        values = gmem_bank.encode_images(encoder, pixels)
        with writing(self.folder, f"embeddings to {self.folder}", "Free some space, and run the same command again"):
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(path, lambda temporary: _write(temporary, values))
        return values

    def prune(self) -> None:
        """Delete what was not asked for since this cache was opened: earlier samples, once a later evaluation is done."""
        for path in self.folder.glob("*.npy"):
            if path.name not in self._used:
                path.unlink(missing_ok=True)


def hash_of(image: NDArray[np.uint8]) -> bytes:
    """Return the sha256 of an image's shape and pixels."""
    digest = hashlib.sha256(f"{image.shape}".encode())
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def _write(path: Path, values: NDArray[np.float32]) -> None:
    with path.open("wb") as stream:  # np.save would put .npy behind the name
        np.save(stream, values, allow_pickle=False)


def _read(path: Path, shape: tuple[int, int]) -> NDArray[np.float32] | None:
    """Return an array of the cache; None where there is none, or it was cut."""
    try:
        found: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return found if found.shape == shape and found.dtype == np.float32 else None
