"""Memorisation: how near samples lie to the images that a generator was trained on, and whose concept their neighbours have.

Shapes: n samples, m training images, k neighbours, D dimensions, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.errors import first_three
from gmem_gen.estimates import Estimate

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
NEAR_QUANTILE = 0.01
"""Of the distances of real images to the nearest other: what lies below is a near-copy, where no threshold is given."""
FEWEST = 50
"""Training images that a threshold is taken from, mirrored twins apart."""
FEW_BESIDE = 5
"""A concept has few real images where another has this many times as many: votes are counted, and few neighbours can be its."""
EQUAL = 1e-6
"""Cosine distances up to this are those of equal rows: FAISS's float32 tells no smaller ones from 0."""
BLOCK_ROWS = 4096


def nearest(
    queries: NDArray[np.float32], rows: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the (n, k) cosines, descending, and (n, k) positions of the rows nearest to unit queries, exactly, by FAISS.

    Args:
        queries: (n, D) float32 of length 1.
        rows: (m, D) float32 of length 1.
        k: at most m.

    Raises:
        MissingDependencyError: FAISS is not installed.
    """
    faiss = gmem_bank.require_faiss()
    scores = np.empty((len(queries), k), np.float32)
    found = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        scores[block], found[block] = faiss.knn(queries[block], rows, k, metric=faiss.METRIC_INNER_PRODUCT)
    return scores, found


def nearest_others(
    rows: NDArray[np.float32], k: int, images: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return what `nearest` does for every row among the others.

    Args:
        rows: (m, D) float32 of length 1.
        k: at most m less the rows of the image that has most of them.
        images: (m,) numbers of the images that rows are of: a mirrored twin is no other; None: of one each.
    """
    image = np.arange(len(rows)) if images is None else images
    scores, found = nearest(rows, rows, k + most_rows(image))
    own = image[found] == image[:, None]  # not found where more equal rows came before it: any of them stands for it
    others = np.argsort(own, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, others, axis=1), np.take_along_axis(found, others, axis=1)


def images_of(keys: Sequence[str]) -> NDArray[np.int64]:
    """Return (m,) numbers from 0, the same for an image and its mirrored twin."""
    number: dict[str, int] = {}
    return np.array([number.setdefault(key.removesuffix(gmem_bank.FLIP_SUFFIX), len(number)) for key in keys], np.int64)


def most_rows(images: NDArray[np.int64]) -> int:
    """Return how many rows the image has that has most of them."""
    return int(np.unique(images, return_counts=True)[1].max(initial=0))


def why_no_search(keys: Sequence[str], threshold: float | None) -> str:
    """Return why memorisation cannot be judged against training images of these keys, or ""."""
    count = len(set(images_of(keys).tolist()))
    fewest = FEWEST if threshold is None else 2
    if count >= fewest:
        return ""
    more = "" if threshold is not None else " and no threshold of a near-copy can be taken from them"
    return f"there are {count} training images (mirrored twins apart), fewer than {fewest}{more}"


def near_copy_threshold(between: NDArray[np.float64]) -> float:
    """Return the distance below which 1 % of real images without an equal lie to their nearest other; `EQUAL` if none is."""
    apart = between[between > EQUAL]
    return float(np.quantile(apart, NEAR_QUANTILE)) if len(apart) else EQUAL


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """Cosine distances, 1 - cos, of samples to the nearest training image, beside those of training images to each other."""

    distances: NDArray[np.float64]
    """(n,)."""
    neighbours: NDArray[np.int64]
    """(n,) positions of the nearest training images."""
    between_real: NDArray[np.float64]
    """(m,) of each training image to the nearest other, its mirrored twin left out."""
    threshold: float
    given: bool
    """Whether the threshold was given, and not taken from `between_real`."""
    near_copies: Estimate
    """Share of samples at most that far from a training image."""
    held_out: NDArray[np.float64] | None = None
    """Of real images that were not trained on."""

    def to_json(self) -> dict[str, Any]:
        """Return quantiles, threshold and share as a JSON object."""
        found = {"samples": quantiles(self.distances), "between_training_images": quantiles(self.between_real)}
        if self.held_out is not None:
            found["reference_images"] = quantiles(self.held_out)
        shares = {} if self.held_out is None else {"near_copies_of_reference": digits(self._share(self.held_out))}
        return {
            "distance": "1 - cosine to the nearest training image", "num_training_images": len(self.between_real),
            "threshold": digits(self.threshold), "threshold_given": self.given, "near_copies": self.near_copies.to_json(),
            "near_copies_of_training": digits(self._share(self.between_real)), **shares, "quantiles": found,
            "duplicates_in_training": digits(self.duplicates),
        }  # fmt: skip

    @property
    def duplicates(self) -> float:
        """Share of training images that have an equal among the others."""
        return float((self.between_real <= EQUAL).mean())

    def remarks(self) -> list[str]:
        """Return what a reader of the figures has to know."""
        if not self.duplicates:
            return []
        left_out = "" if self.given else " They were left out where the threshold was found."
        return [f"{self.duplicates:.2%} of the training images have an equal among the others.{left_out}"]

    def _share(self, distances: NDArray[np.float64]) -> float:
        return float((distances <= self.threshold).mean())


def digits(value: float) -> float:
    """Return a number to six significant digits: what FAISS's float32 leaves."""
    return float(f"{value:.6g}")


def quantiles(values: NDArray[np.float64]) -> dict[str, float]:
    """Return "p<per cent>" → quantile."""
    return {f"p{100 * q:g}": digits(float(np.quantile(values, q))) for q in QUANTILES}


def to_distances(cosines: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return 1 - cosine, between 0 and 2."""
    return np.clip(1.0 - cosines.astype(np.float64), 0.0, 2.0)


def vote(
    cosines: NDArray[np.float32], found: NDArray[np.int64], membership: NDArray[np.bool_],
    rivals: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """Return (n,) columns of the concept that most neighbours of an image belong to; of as many the one with more cosine in all.

    A neighbour of several concepts counts for each of them. What is still tied goes to the first in order.

    Args:
        cosines: (n, k).
        found: (n, k) positions of the neighbours.
        membership: (m, K) whether a row belongs to a concept.
        rivals: (n, K) whether a concept may be voted for; None: all.
    """
    members = membership[found]  # (n, k, K)
    counts = members.sum(axis=1).astype(np.float64)
    weights = np.einsum("nk,nkc->nc", cosines.astype(np.float64), members.astype(np.float64))
    if rivals is not None:
        counts[~rivals] = -1.0
    order = np.lexsort((-weights, -counts))[:, 0] if len(counts) else np.zeros(0, np.int64)
    return order.astype(np.int64)


def memberships(concepts: Mapping[str, NDArray[np.int64]], num_rows: int) -> NDArray[np.bool_]:
    """Return the (m, K) table of rows and concepts."""
    table = np.zeros((num_rows, len(concepts)), np.bool_)
    for column, members in enumerate(concepts.values()):
        table[members, column] = True
    return table


def candidates(membership: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the (K, K) table of a concept and what its images may be taken for: itself, and those that share no row with it."""
    members = membership.astype(np.float32)
    apart: NDArray[np.bool_] = (members.T @ members == 0) | np.eye(membership.shape[1], dtype=np.bool_)
    return apart


def confusion(asked: NDArray[np.int64], predicted: NDArray[np.int64], num_concepts: int) -> NDArray[np.int64]:
    """Return the (K, K) counts of asked × predicted concepts."""
    table = np.zeros((num_concepts, num_concepts), np.int64)
    np.add.at(table, (asked, predicted), 1)
    return table


@dataclass(frozen=True, kw_only=True)
class ConceptFidelity:
    """Whether samples look like the concept that was asked for."""

    concepts: tuple[str, ...]
    table: NDArray[np.int64]
    """(K, K) counts: asked × what the neighbours vote for."""
    fidelity: Estimate
    """Share of samples whose neighbours vote for the asked concept."""
    of_real: Mapping[str, float]
    """Concept → the share of its own real images that their neighbours vote for, each left out in turn."""
    sizes: Mapping[str, int]
    """Concept → its real images."""
    overlapping: tuple[tuple[str, str], ...]
    """Pairs of concepts that share real images, of which neither can be mistaken for the other."""
    votes: int

    @property
    def of_real_as_asked(self) -> float:
        """What real images reach, each concept with the weight that it has among the samples: what `fidelity` compares with."""
        return float(self.table.sum(axis=1) @ np.array(list(self.of_real.values())) / self.table.sum())

    def remarks(self) -> list[str]:
        """Return what a reader of the figures has to know."""
        found = []
        if few := self._few():
            words = [
                f"{name} ({self.sizes[name]} beside {most}; {self.of_real[name]:.2g} of them are taken for it)"
                for name, most in few.items()
            ]
            found.append(
                "Votes are counted, and some concepts have few real images beside others: "
                f"{first_three(words)}. Compare the fidelity of their samples with that of these images."
            )
        if self.overlapping:
            pairs = first_three([f"{one} and {two}" for one, two in self.overlapping])
            found.append(f"Concepts that share real images are not told apart: {pairs}.")
        return found

    def _few(self) -> dict[str, int]:
        """Return concepts that were asked for and have few real images → the most that a concept apart from them has."""
        found, shared = {}, {frozenset(pair) for pair in self.overlapping}
        for name, total in zip(self.concepts, self.table.sum(axis=1).tolist(), strict=True):
            rivals = (other for other in self.concepts if other != name and frozenset((name, other)) not in shared)
            most = max((self.sizes[other] for other in rivals), default=0)
            if total and FEW_BESIDE * self.sizes[name] <= most:
                found[name] = most
        return found

    def shares(self) -> dict[str, float | None]:
        """Return concept → share of its samples that are taken for it; None where none was asked for."""
        totals = self.table.sum(axis=1)
        return {
            name: digits(self.table[place, place] / totals[place]) if totals[place] else None
            for place, name in enumerate(self.concepts)
        }

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        return {
            "fidelity": self.fidelity.to_json(), "fidelity_of_real_images": digits(self.of_real_as_asked),
            "by_concept": self.shares(), "of_real_images": dict(self.of_real),
            "overlapping": [list(pair) for pair in self.overlapping],
            "concepts": list(self.concepts), "confusion": self.table.tolist(), "neighbours": self.votes,
        }  # fmt: skip
