"""A generator by somebody else, in thirty lines, that knows nothing but the interface."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import gmem_bank
from gmem_bank.interface import Bank, SupportsConcepts, SupportsImages


class RidgeGenerator:
    """Draws an image as a linear function of its snippet."""

    def __init__(self, bank: Bank, size: int = 8, penalty: float = 1e-2) -> None:
        if not isinstance(bank, SupportsImages):
            raise TypeError("the bank must know its images")
        self.encoder, self.size = bank.encoder.fingerprint, size
        rows = bank.image_rows()
        pixels = np.stack([self._small(bank.read_image(int(row))) for row in rows])
        snippets = bank.snippets(rows).astype(np.float64)
        self.mean = pixels.mean(axis=0)
        gram = snippets.T @ snippets + penalty * np.eye(bank.dim)
        self.weights = np.linalg.solve(gram, snippets.T @ (pixels - self.mean))

    def _small(self, image: np.ndarray) -> np.ndarray:
        h, w = (side // self.size * self.size for side in image.shape[:2])
        blocks = image[:h, :w].reshape(self.size, h // self.size, self.size, w // self.size, 3)
        return blocks.mean(axis=(1, 3)).ravel()

    def draw(self, bank: Bank, concept: str) -> np.ndarray:
        """Return (n, size, size, 3) images of a concept, of any bank of the same encoder."""
        assert bank.encoder.fingerprint == self.encoder
        assert isinstance(bank, SupportsConcepts)
        images = bank.snippets(bank.rows_of(concept)) @ self.weights + self.mean
        return images.reshape(-1, self.size, self.size, 3)


def test_it_trains_on_a_bank_and_draws_an_inserted_concept(photos: Path, new_photos: Path) -> None:
    """It reproduces what it saw nearly exactly, and draws a concept that was inserted afterwards."""
    encoder = gmem_bank.load_encoder("hog")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    generator = RidgeGenerator(gmem_bank.open("bank.safetensors"))
    gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder)
    edited = gmem_bank.open("bank.safetensors")
    for concept, worst in (("hat", 12.0), ("images", 90.0)):
        real = np.stack([generator._small(edited.read_image(int(row))) for row in edited.rows_of(concept)])
        drawn = generator.draw(edited, concept).reshape(len(real), -1)
        assert np.abs(drawn - real).mean() < worst
