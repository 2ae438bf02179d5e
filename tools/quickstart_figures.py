"""The quick start's figures: a judge that has seen real digits only, and what a linear map would do.

Shapes: N images of 8×8 pixels, D snippet dimension.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import gmem_bank

RIDGE_PENALTY = 1e-2


def load_images(folder: Path) -> NDArray[np.uint8]:
    """Return (N, 8, 8) grey images of a folder, in order of name."""
    return np.stack([np.asarray(Image.open(path).convert("L")) for path in sorted(folder.glob("*.png"))])


class Judge:
    """A support-vector classifier trained on 70 % of the real digits, all ten classes; it never sees a sample.

    Args:
        images: (N, 8, 8) uint8.
        labels: (N,).
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
        from sklearn.model_selection import train_test_split
        from sklearn.svm import SVC

        train_x, test_x, train_y, test_y = train_test_split(
            self._features(images), labels, test_size=0.3, random_state=0, stratify=labels
        )
        self._classifier = SVC(gamma=0.001).fit(train_x, train_y)
        self.accuracy = float(self._classifier.score(test_x, test_y))

    @staticmethod
    def _features(images: NDArray[np.generic]) -> NDArray[np.float64]:
        return images.reshape(len(images), -1).astype(np.float64) * (16 / 255)

    def share(self, images: NDArray[np.generic], labels: NDArray[np.int64] | int) -> float:
        """Return the share of images that are taken for their labels."""
        return float(np.mean(self._classifier.predict(self._features(images)) == labels))

    def counts(self, images: NDArray[np.generic]) -> list[int]:
        """Return how many images are taken for each digit."""
        return np.bincount(self._classifier.predict(self._features(images)), minlength=10).tolist()


def linear_accuracy(bank_path: Path, judge: Judge, held_out: str) -> float:
    """Return the share of the held-out digit's snippets that a ridge regression draws recognisably.

    The regression goes from snippet to pixels and is fitted on the nine other digits: what could be had without a
    generator.
    """
    from sklearn.linear_model import Ridge

    bank = gmem_bank.open(bank_path)
    rows, new = bank.image_rows(), bank.rows_of(held_out)
    seen = np.setdiff1d(rows, new)
    pixels = np.stack([bank.read_image(int(row))[..., 0].ravel() for row in seen]).astype(np.float64)
    snippets = bank.snippets(seen).astype(np.float64)
    model = Ridge(alpha=RIDGE_PENALTY * len(seen) / bank.dim).fit(snippets, pixels)
    drawn = np.clip(model.predict(bank.snippets(new).astype(np.float64)), 0, 255)
    return judge.share(drawn.reshape(-1, 8, 8), int(held_out))


def snippet_cosine(bank_path: Path, images: NDArray[np.uint8], keys: list[str]) -> float:
    """Return the mean cosine between the snippets that were asked for and those of what was drawn."""
    bank = gmem_bank.open(bank_path)
    encoder = gmem_bank.reload_encoder(bank.encoder, bank.folder)
    size = int(encoder.spec.preprocessing["crop_size"])
    crops = np.stack([gmem_bank.center_crop(image[..., None].repeat(3, axis=2), size) for image in images])
    drawn = encoder.encode(crops)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True) + 1e-12
    return float((drawn * bank.snippets(bank.rows_for(keys))).sum(axis=1).mean())


def pixel_spread(images: NDArray[np.uint8], samples: int) -> float:
    """Return the mean standard deviation of a pixel (in 0 to 1) over samples of one snippet."""
    grouped = images.reshape(-1, samples, *images.shape[1:]) / 255
    return float(grouped.std(axis=1).mean())
