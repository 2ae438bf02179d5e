"""What real images say of samples: an encoder's embeddings of a folder, their nearest classes, and a trained classifier.

Shapes: n samples, m real images, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from tools.experiment_data import EncoderChoice


def embedded(encoder: gmem_bank.Encoder, folder: Path) -> tuple[NDArray[np.float32], NDArray[np.str_]]:
    """Return the (n, D) embeddings of a folder's images, and (n,) names of their class folders."""
    source = gmem_bank.open_images(folder)
    labels = np.full(len(source), "", dtype=object)
    for name, places in source.concepts.items():
        labels[places] = name
    images = [source.read(place) for place in range(len(source))]
    return gmem_bank.encode_images(encoder, images), labels.astype(np.str_)


class RealImages:
    """Real images of all classes, none of which any model was trained on.

    Args:
        judge: the encoder that judges.
        folder: class folders.
    """

    def __init__(self, judge: EncoderChoice, folder: Path) -> None:
        self._encoder = judge.load("raw")
        self._embeddings, self._labels = embedded(self._encoder, folder)

    def classified(self, folder: Path) -> float:
        """Return the share of a folder's images that a support-vector classifier puts into their class folder."""
        from sklearn.svm import SVC

        found, asked = embedded(self._encoder, folder)
        classifier = SVC(gamma="scale").fit(self._embeddings, self._labels)
        return float(np.mean(classifier.predict(found) == asked))

    def classes_near(self, images: Sequence[NDArray[np.uint8]], k: int) -> NDArray[np.str_]:
        """Return the (n, k) classes of the real images nearest to each of n (H, W, 3) images by cosine, nearest first."""
        found = _directions(gmem_bank.encode_images(self._encoder, images))
        order = np.argsort(-(found @ _directions(self._embeddings).T), axis=1, kind="stable")[:, :k]
        return self._labels[order]


_known: dict[str, RealImages] = {}


def real_images(judge: EncoderChoice, folder: Path) -> RealImages:
    """Return the real images of a folder by a judge, embedded once in a process."""
    name = f"{judge} {folder.resolve()}"
    if name not in _known:
        _known[name] = RealImages(judge, folder)
    return _known[name]


def _directions(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = embeddings.astype(np.float64)
    return wide / (np.linalg.norm(wide, axis=1, keepdims=True) + 1e-12)
