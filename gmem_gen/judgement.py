"""What is said of samples: distances to a reference, neighbours, concepts and snippets, each as figures with their words.

Shapes: n samples, m rows they are compared with, D dimensions, K concepts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_gen import memorisation
from gmem_gen.estimates import Estimate, around, bootstrap_mean, jackknife_deviation, random_numbers
from gmem_gen.frechet import frechet_estimate, moments_of
from gmem_gen.kernel_distance import NUM_SUBSETS, KernelDistance, kernel_distance
from gmem_gen.memorisation import (
    ConceptFidelity,
    Memorisation,
    candidates,
    confusion,
    digits,
    images_of,
    memberships,
    most_rows,
    near_copy_threshold,
    nearest,
    nearest_others,
    to_distances,
    vote,
)
from gmem_gen.neighbours import neighbourhoods
from gmem_gen.outputs import Progress, no_progress

PURPOSES = {"frechet": 1, "kid": 2, "precision": 3, "density": 5, "near_copies": 7, "concepts": 8, "snippets": 9}
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

    Every interval says how far the figure would move with other samples of the same model; the reference is held fixed.

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
    frechet = frechet_estimate(samples, moments_of(reference), num_parts=num_resamples, rng=rng("frechet"))
    progress(1, 3)
    found = neighbourhoods(samples, reference, k=k)
    manifold = found if manifold_k in (None, k) else neighbourhoods(samples, reference, k=manifold_k)
    measures = {
        "precision": bootstrap_mean(manifold.precise, num_resamples=10 * num_resamples, rng=rng("precision")),
        "recall": _share(manifold.recalled, manifold.recall_without if num_resamples else None),
        "density": bootstrap_mean(found.density, num_resamples=10 * num_resamples, rng=rng("density")),
        "coverage": _share(found.covered, found.coverage_without if num_resamples else None),
    }
    progress(2, 3)
    kid = kernel_distance(samples, reference, rng=rng("kid"), subset_size=subset_size, num_subsets=num_subsets)
    progress(3, 3)
    return Distribution(
        frechet=frechet, rank_deficient=min(len(samples), len(reference)) <= samples.shape[1], kid=kid, measures=measures,
        neighbours=k, manifold_neighbours=manifold_k or k,
    )  # fmt: skip


def _share(of_reference: NDArray[np.float64], without: NDArray[np.float64] | None) -> Estimate:
    """Return the mean of (m,) values of reference rows, with a jackknife interval from its (n,) values without each sample."""
    value = float(of_reference.mean())
    if without is None:
        return Estimate(value=value)
    return around(value, jackknife_deviation(without), least=0.0, most=1.0)


def find_copies(
    samples: NDArray[np.float32], training: NDArray[np.float32], held_out: NDArray[np.float32] | None, *,
    threshold: float | None, num_resamples: int, seed: int, keys: Sequence[str] | None = None,
) -> Memorisation:  # fmt: skip
    """Return how near unit samples lie to unit training images.

    Args:
        samples: (n, D) of length 1.
        training: (m, D) of length 1; enough of them for `memorisation.why_no_search`.
        held_out: real images that were not trained on, of length 1: how near strangers lie.
        threshold: distance of a near-copy; None: below which 1 % of training images lie to their nearest other, those left out
            that have an equal. Distances within rounding are 0, so it is `EQUAL` at least.
        num_resamples, seed: of the interval.
        keys: m of the training images: a mirrored twin is not "other"; None: there are no twins.
    """
    cosines, found = nearest(samples, training, 1)
    distances = to_distances(cosines[:, 0])
    between = to_distances(nearest_others(training, 1, None if keys is None else images_of(keys))[0][:, 0])
    limit = near_copy_threshold(between) if threshold is None else max(memorisation.EQUAL, threshold)
    rng = random_numbers(seed, PURPOSES["near_copies"])
    return Memorisation(
        distances=distances, neighbours=found[:, 0], between_real=between, threshold=limit, given=threshold is not None,
        near_copies=bootstrap_mean(distances <= limit, num_resamples=10 * num_resamples, rng=rng),
        held_out=None if held_out is None else to_distances(nearest(held_out, training, 1)[0][:, 0]),
    )  # fmt: skip


def judge_concepts(
    samples: NDArray[np.float32], asked: NDArray[np.int64], rows: NDArray[np.float32],
    concepts: Mapping[str, NDArray[np.int64]], *, votes: int, num_resamples: int, seed: int,
    keys: Sequence[str] | None = None,
) -> ConceptFidelity | None:  # fmt: skip
    """Let the real images nearest to each sample vote on its concept: which of those that share no image with the asked one.

    Args:
        samples: (n, D) of length 1.
        asked: (n,) positions in `concepts`.
        rows: (m, D) of length 1.
        concepts: K names → positions in `rows`, one at least each; rows of none of them do not vote.
        votes: neighbours that vote; fewer where there are fewer rows.
        num_resamples, seed: of the interval.
        keys: m of the rows: a mirrored twin does not vote on its image; None: there are no twins.

    Returns:
        what was found; None where a real image has no other that could vote on it.
    """
    table = memberships(concepts, len(rows))
    voters = np.flatnonzero(table.any(axis=1))
    images = voters if keys is None else images_of([keys[int(place)] for place in voters])
    k = min(votes, len(voters) - most_rows(images))
    if k < 1:
        return None
    electorate, members, names = rows[voters], table[voters], tuple(concepts)
    rivals = candidates(members)
    predicted = vote(*nearest(samples, electorate, k), members, rivals[asked])
    rng = random_numbers(seed, PURPOSES["concepts"])
    return ConceptFidelity(
        concepts=names, table=confusion(asked, predicted, len(names)), votes=k,
        fidelity=bootstrap_mean(predicted == asked, num_resamples=10 * num_resamples, rng=rng),
        of_real=_of_real(nearest_others(electorate, k, images), members, names, rivals),
        sizes={name: int(count) for name, count in zip(names, members.sum(axis=0), strict=True)},
        overlapping=tuple((names[one], names[two]) for one, two in np.argwhere(~rivals) if one < two),
    )  # fmt: skip


def _of_real(
    others: tuple[NDArray[np.float32], NDArray[np.int64]], members: NDArray[np.bool_], names: tuple[str, ...],
    rivals: NDArray[np.bool_],
) -> dict[str, float]:  # fmt: skip
    """Return concept → the share of its rows that the (m, k) others near them vote for, asked about this concept."""
    row, place = np.nonzero(members)  # a row of several concepts is asked about once for each
    cosines, found = others
    right = vote(cosines[row], found[row], members, rivals[place]) == place
    shares = np.bincount(place, right, minlength=len(names)) / np.bincount(place, minlength=len(names))
    return {name: digits(share) for name, share in zip(names, shares.tolist(), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """Cosine between the snippet that a sample was drawn from and the sample's own."""

    cosine: Estimate
    """Mean over samples."""
    shuffled: float | None
    """Mean cosine to other snippets that were drawn from: what a generator that ignores its snippet would reach; None: there was
    but one."""
    of_real: float | None
    """Mean cosine of the snippets' own images, at the size of the samples: what a perfect copy would reach."""
    values: NDArray[np.float64]
    """(n,)."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object."""
        found = {"shuffled": self.shuffled, "of_real_images": self.of_real}
        figures = {name: None if value is None else digits(value) for name, value in found.items()}
        return {"cosine": self.cosine.to_json(), **figures, "quantiles": memorisation.quantiles(self.values)}


def judge_snippets(
    conditions: NDArray[np.float32], samples: NDArray[np.float32], real: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    *, num_resamples: int, seed: int,
) -> Faithfulness:  # fmt: skip
    """Compare snippets with those of what was drawn from them; samples of one snippet are resampled together.

    Args:
        conditions: (n, D) snippets that samples were drawn from.
        samples: (n, D) of the samples, by the encoder of the bank.
        real: snippets, and those of their own images at the samples' size; None: there are none.
        num_resamples, seed: of the interval.
    """
    values, groups = cosines_of(conditions, samples), _numbered(conditions)
    rng = random_numbers(seed, PURPOSES["snippets"])
    first = np.unique(groups, return_index=True)[1]
    cycle, other = rng.permutation(len(first)), np.empty(len(first), np.int64)
    other[np.roll(cycle, 1)] = cycle  # through all snippets, so that none stays with its own
    shuffled = None if len(first) < 2 else float(cosines_of(conditions[first[other[groups]]], samples).mean())
    return Faithfulness(
        cosine=bootstrap_mean(values, num_resamples=10 * num_resamples, rng=rng, groups=groups), shuffled=shuffled,
        of_real=None if real is None else float(cosines_of(*real).mean()), values=values,
    )  # fmt: skip


def _numbered(rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return (n,) numbers from 0 in order of appearance, the same for equal rows."""
    number: dict[bytes, int] = {}
    return np.array([number.setdefault(row.tobytes(), len(number)) for row in rows], np.int64)


def cosines_of(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the (n,) cosines of rows; 0 where one has no direction."""
    one, two = first.astype(np.float64), second.astype(np.float64)
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(two, axis=1)
    cosines: NDArray[np.float64] = np.einsum("nd,nd->n", one, two) / np.maximum(norms, 1e-30)
    return cosines
