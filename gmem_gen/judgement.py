"""What is said of samples: distances to a reference, neighbours, concepts and snippets, each as figures with their words.

Shapes: n samples, m rows they are compared with, D dimensions, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_gen import memorisation
from gmem_gen.estimates import Estimate, bootstrap_mean, random_numbers
from gmem_gen.frechet import frechet_estimate, moments_of
from gmem_gen.kernel_distance import NUM_SUBSETS, KernelDistance, kernel_distance
from gmem_gen.memorisation import Memorisation, confusion, digits, memberships, nearest, nearest_others, to_distances
from gmem_gen.neighbours import neighbourhoods
from gmem_gen.outputs import Progress, no_progress

PURPOSES = {"frechet": 1, "kid": 2, "precision": 3, "recall": 4, "density": 5, "coverage": 6, "near_copies": 7,
            "concepts": 8, "snippets": 9}  # fmt: skip
"""Figure → which of a seed's streams of random numbers is its own."""
MANIFOLD = ("precision", "recall")
"""Measures whose k may be another than that of density and coverage."""


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """How samples as a whole differ from a reference."""

    frechet: Estimate
    rank_deficient: bool
    """Whether one of the covariances has fewer rows than it would need to have full rank."""
    kid: KernelDistance
    measures: Mapping[str, Estimate]
    """Of "precision", "recall", "density" and "coverage"."""
    neighbours: int
    """k of density and coverage."""
    manifold_neighbours: int
    """k of precision and recall."""

    def neighbours_of(self, measure: str) -> int:
        """Return k of one of the measures."""
        return self.manifold_neighbours if measure in MANIFOLD else self.neighbours

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        kid = {**self.kid.estimate.to_json(), "deviation": float(f"{self.kid.deviation:.9g}")}
        subsets = {"subset_size": self.kid.subset_size, "num_subsets": self.kid.num_subsets}
        return {
            "frechet": {**self.frechet.to_json(), "rank_deficient": self.rank_deficient}, "kid": {**kid, **subsets},
            **{name: estimate.to_json() for name, estimate in self.measures.items()}, "neighbours": self.neighbours,
            "manifold_neighbours": self.manifold_neighbours,
        }  # fmt: skip


def compare(
    samples: NDArray[np.float32], reference: NDArray[np.float32], *, k: int, num_resamples: int, seed: int,
    manifold_k: int | None = None, subset_size: int | None = None, num_subsets: int = NUM_SUBSETS,
    progress: Progress = no_progress,
) -> Distribution:  # fmt: skip
    """Compare (n, D) samples with an (m, D) reference in one space; raises ConfigError for too few rows.

    Args:
        samples, reference: in one space.
        k: of density and coverage.
        num_resamples, seed: of intervals.
        manifold_k: of precision and recall; None: as k.
        subset_size, num_subsets: of KID, see `kernel_distance`.
        progress: told figures done and in all.
    """

    def rng(name: str) -> np.random.Generator:
        return random_numbers(seed, PURPOSES[name])

    progress(0, 3)
    frechet = frechet_estimate(samples, moments_of(reference), num_resamples=num_resamples, rng=rng("frechet"))
    progress(1, 3)
    found = neighbourhoods(samples, reference, k=k).measures()
    if manifold_k not in (None, k):
        other = neighbourhoods(samples, reference, k=manifold_k).measures()
        found |= {name: other[name] for name in MANIFOLD}
    measures = {
        name: bootstrap_mean(values, num_resamples=10 * num_resamples, rng=rng(name)) for name, values in found.items()
    }
    progress(2, 3)
    kid = kernel_distance(samples, reference, rng=rng("kid"), subset_size=subset_size, num_subsets=num_subsets)
    progress(3, 3)
    return Distribution(
        frechet=frechet, rank_deficient=min(len(samples), len(reference)) <= samples.shape[1], kid=kid, measures=measures,
        neighbours=k, manifold_neighbours=manifold_k or k,
    )  # fmt: skip


def find_copies(
    samples: NDArray[np.float32], training: NDArray[np.float32], held_out: NDArray[np.float32] | None, *,
    threshold: float | None, num_resamples: int, seed: int,
) -> Memorisation:  # fmt: skip
    """Return how near unit samples lie to unit training images.

    Args:
        samples: (n, D) of length 1.
        training: (m, D) of length 1, two at least.
        held_out: real images that were not trained on, of length 1: how near strangers lie.
        threshold: distance of a near-copy; None: below which 1 % of training images lie to their nearest other.
        num_resamples, seed: of the interval.
    """
    cosines, found = nearest(samples, training, 1)
    distances = to_distances(cosines[:, 0])
    between = to_distances(nearest_others(training, 1)[0][:, 0])
    limit = float(np.quantile(between, memorisation.NEAR_QUANTILE)) if threshold is None else threshold
    rng = random_numbers(seed, PURPOSES["near_copies"])
    return Memorisation(
        distances=distances, neighbours=found[:, 0], between_real=between, threshold=limit, given=threshold is not None,
        near_copies=bootstrap_mean(distances <= limit, num_resamples=10 * num_resamples, rng=rng),
        held_out=None if held_out is None else to_distances(nearest(held_out, training, 1)[0][:, 0]),
    )  # fmt: skip


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
    votes: int

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
            "fidelity": self.fidelity.to_json(), "by_concept": self.shares(), "of_real_images": dict(self.of_real),
            "concepts": list(self.concepts), "confusion": self.table.tolist(), "neighbours": self.votes,
        }  # fmt: skip


def judge_concepts(
    samples: NDArray[np.float32], asked: NDArray[np.int64], rows: NDArray[np.float32],
    concepts: Mapping[str, NDArray[np.int64]], *, votes: int, num_resamples: int, seed: int,
) -> ConceptFidelity:  # fmt: skip
    """Let the real images nearest to each sample vote on its concept.

    Args:
        samples: (n, D) of length 1.
        asked: (n,) positions in `concepts`.
        rows: (m, D) of length 1.
        concepts: K names → positions in `rows`; rows of none of them do not vote.
        votes: neighbours that vote; fewer where there are fewer rows.
        num_resamples, seed: of the interval.
    """
    table = memberships(concepts, len(rows))
    voters = np.flatnonzero(table.any(axis=1))
    electorate, members, names = rows[voters], table[voters], tuple(concepts)
    k = min(votes, len(voters) - 1)
    predicted = memorisation.vote(*nearest(samples, electorate, k), members, names).predicted
    real = memorisation.vote(*nearest_others(electorate, k), members, names).predicted
    rng = random_numbers(seed, PURPOSES["concepts"])
    right = predicted == asked
    return ConceptFidelity(
        concepts=names, table=confusion(asked, predicted, len(names)), votes=k,
        fidelity=bootstrap_mean(right, num_resamples=10 * num_resamples, rng=rng),
        of_real={name: digits((real[members[:, place]] == place).mean()) for place, name in enumerate(names)},
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Cosine between the snippet that a sample was drawn from and the sample's own."""

    cosine: Estimate
    """Mean over samples."""
    shuffled: float
    """Mean cosine to the snippets of other samples: what a generator that ignores its snippet would reach."""
    of_real: float | None
    """Mean cosine of the snippets' own images, at the size of the samples: what a perfect copy would reach."""
    values: NDArray[np.float64]
    """(n,)."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        of_real = None if self.of_real is None else digits(self.of_real)
        figures = {"shuffled": digits(self.shuffled), "of_real_images": of_real}
        return {"cosine": self.cosine.to_json(), **figures, "quantiles": memorisation.quantiles(self.values)}


def judge_snippets(
    conditions: NDArray[np.float32], samples: NDArray[np.float32], real: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    *, num_resamples: int, seed: int,
) -> Faithfulness:  # fmt: skip
    """Compare snippets with those of what was drawn from them.

    Args:
        conditions: (n, D) snippets that samples were drawn from.
        samples: (n, D) of the samples, by the encoder of the bank.
        real: snippets, and those of their own images at the samples' size; None: there are none.
        num_resamples, seed: of the interval.
    """
    values = cosines_of(conditions, samples)
    rng = random_numbers(seed, PURPOSES["snippets"])
    cycle = rng.permutation(len(samples))  # through all samples, so that none stays with its own
    shuffled = cosines_of(conditions[cycle], samples[np.roll(cycle, 1)])
    return Faithfulness(
        cosine=bootstrap_mean(values, num_resamples=10 * num_resamples, rng=rng), shuffled=float(shuffled.mean()),
        of_real=None if real is None else float(cosines_of(*real).mean()), values=values,
    )  # fmt: skip


def cosines_of(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the (n,) cosines of rows; 0 where one has no direction."""
    one, two = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    cosines: NDArray[np.float64] = np.einsum("nd,nd->n", one, two) / np.maximum(norms, 1e-30)
    return cosines
