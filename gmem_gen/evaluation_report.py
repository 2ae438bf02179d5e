"""What an evaluation found, as JSON that is the same for the same seeds: no times, no paths.

Shapes: none here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gmem_bank.errors import ConfigError
from gmem_gen.image_sets import Embedded
from gmem_gen.judgement import Distribution, Faithfulness
from gmem_gen.kernel_distance import NUM_SUBSETS
from gmem_gen.memorisation import ConceptFidelity, Memorisation
from gmem_gen.neighbours import DEFAULT_NEIGHBOURS

FEWEST = 50
"""Samples, and real images: below this a share has an interval of ± 14 points and more, and no order of models can be told."""
DEFAULT_NUM = 500
LEAST = {"num": FEWEST, "num_given": FEWEST, "num_real": FEWEST, "neighbours": 1, "manifold_neighbours": 1, "votes": 1,
         "kid_subset_size": 2, "kid_subsets": 2, "num_resamples": 0, "seed": 0}  # fmt: skip
"""Option → the least it may be."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How to judge."""

    num: int = DEFAULT_NUM
    """Samples to draw."""
    num_given: int | None = None
    """Given samples at most, drawn by the seed; None: all."""
    space: str | None = None
    """Of distances: "raw" (the network's own numbers, as in published figures) or "unit"; None: a reference bank's, else raw."""
    neighbours: int = DEFAULT_NEIGHBOURS
    """k of precision, recall, density and coverage."""
    manifold_neighbours: int | None = None
    """k of precision and recall, where it is another (3, as published); None: the same."""
    kid_subset_size: int | None = None
    """Rows of a subset of KID; None: half of the smaller set, but 1,000 at most, as published."""
    kid_subsets: int = NUM_SUBSETS
    """Of KID."""
    votes: int = 10
    """Neighbours that vote on a concept."""
    num_resamples: int = 100
    """Of intervals: parts of the jackknife of the Fréchet distance, a tenth of the resamples of a mean; 0: none."""
    near_copy: float | None = None
    """Cosine distance of a near-copy; None: below which 1 % of training images lie to their nearest other."""
    num_real: int | None = None
    """Rows of the reference at most, drawn by the seed; None: all. Copies are looked for among all training images."""
    memorisation: bool = True
    """Look for training images that samples are copies of, for which all images of the bank are embedded."""
    match_size: bool = True
    """Bring real images to the size of the samples, as the generator was shown them, before they are embedded."""
    grey: bool | None = None
    """Make real images grey before they are embedded; None: where the samples have one channel."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name, fewest in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < fewest:
                raise ConfigError(f"{name} must be {fewest} or more, got {value}", key=name)
        if self.space not in (None, "raw", "unit"):
            raise ConfigError(f"space must be 'raw' or 'unit', not {self.space!r}", key="space")
        if self.near_copy is not None and not 0 <= self.near_copy <= 2:
            raise ConfigError(f"a cosine distance lies between 0 and 2, near_copy={self.near_copy}", key="near_copy")


def remarks_on(
    kind: str, space: str, deficient: bool, *, circular: str, samples: Embedded, grey: bool, sets: Sequence[Embedded],
    matched: bool, unjudged: str,
) -> list[str]:  # fmt: skip
    """Return what a reader of the figures has to know.

    Args:
        kind: of the reference: "bank", "images" or "training images".
        space: of the features.
        deficient: whether a covariance is rank-deficient.
        circular: what is to be said of the judge and the generator's own encoder, or "".
        samples: that are judged.
        grey: whether real images were made grey.
        sets: of real images.
        matched: whether real images were brought to the size of the samples.
        unjudged: why memorisation was not judged, or "".
    """
    found = [circular] if circular else []
    if deficient:
        found.append(
            "There are no more rows than dimensions, so a covariance is rank-deficient: the Fréchet distance is too large, and "
            "comparable only with others of the same numbers of rows. It has an interval only with more samples than dimensions."
        )
    if space == "unit":
        found.append("Features were brought to length 1: distances are not those of raw features.")
    if kind == "training images":
        found.append(
            "The reference is the training images, which were trained on: copies would score best. Give held-out images."
        )
    if kind == "bank":
        found.append("The reference is a bank of images at their own size, not at that of the samples.")
    found += _of_sizes(samples.size, matched, images=bool(sets), bank=kind == "bank")
    if grey and sets:
        found.append("Real images were made grey before they were embedded, as samples of one channel are compared.")
    elif samples.looks_grey and not all(one.looks_grey for one in sets):
        found.append("All samples look grey, and real images do not: they were left in colour.")
    for one in (samples, *sets):
        if one.skipped or one.images.num_left_out:
            found.append(
                f"Of {one.images.what} {len(one.skipped)} could not be read, {one.images.num_left_out} were not there."
            )
    if unjudged:
        found.append(f"Memorisation was not judged: {unjudged}.")
    return found


def _of_sizes(size: tuple[int, int], matched: bool, *, images: bool, bank: bool) -> list[str]:
    """Return how the sizes of samples and real images differ."""
    if not images:
        return []
    if not matched:
        return [] if bank else ["Real images were embedded at their own size, not at that of the samples."]
    height, width = size
    if height == width:
        return []
    return [
        f"Samples are {width}×{height}, while real images were cropped to squares of {min(height, width)}: the encoder sees "
        "that difference too. Give square samples, or leave real images at their own size."
    ]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What was judged, by what, and what was found; a part that could not be judged is None, and `remarks` says why."""

    samples: Mapping[str, Any]
    """"what", "count", "height", "width", "grey", "pixels" (sha256 of all of them), and where they were drawn here "sampling"."""
    judge: Mapping[str, Any]
    """"encoder", "fingerprint", "dim", "space", and "circular": whether the generator learned to satisfy it; None: unknown."""
    reference: Mapping[str, Any]
    """"what", "count", "kind", and what it is known by: "fingerprint" of a bank, "pixels" of images."""
    distribution: Distribution
    memorisation: Memorisation | None
    concepts: ConceptFidelity | None
    faithfulness: Faithfulness | None
    remarks: tuple[str, ...]
    """What a reader of the figures has to know."""
    options: EvaluationOptions
    drawn: Embedded = field(repr=False)
    """The samples, for pictures."""
    training: Embedded | None = field(repr=False, default=None)
    held_out: Embedded | None = field(repr=False, default=None)
    """Where there are no reference images: those of the bank that the training held out, whose distances stand beside."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of the software."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        parts = {"concepts": self.concepts, "snippets": self.faithfulness}
        unused = "num" if self.samples["sampling"] is None else "num_given"
        return {
            "samples": dict(self.samples), "judge": dict(self.judge), "reference": dict(self.reference),
            "distribution": self.distribution.to_json(), "memorisation": self._memorisation(),
            **{name: None if part is None else part.to_json() for name, part in parts.items()},
            "remarks": list(self.remarks), "options": dataclasses.asdict(self.options) | {unused: None},
            "versions": dict(self.versions),
        }  # fmt: skip

    def _memorisation(self) -> dict[str, Any] | None:
        """Return memorisation as a JSON object, with which images were searched, and held-out rows under their own name."""
        if self.memorisation is None or self.training is None:
            return None
        record = self.memorisation.to_json() | {"pixels": self.training.digest()}
        if self.held_out is not None:
            record["near_copies_of_held_out"] = record.pop("near_copies_of_reference")
            record["quantiles"]["held_out_images"] = record["quantiles"].pop("reference_images")
        return record

    def lines(self) -> list[str]:
        """Return the figures in words, one a line."""
        found = self.distribution
        deficient = " (rank-deficient)" if found.rank_deficient else ""
        space = f"{self.judge['space']} features of {self.judge['encoder']}"
        lines = [
            f"{self.samples['count']} samples against {self.reference['what']}, in {space}",
            f"Fréchet distance{deficient}: {found.frechet.describe()}",
            f"KID × 1000: {1000 * found.kid.estimate.value:.4g} ± {1000 * found.kid.deviation:.3g} over subsets of "
            f"{found.kid.subset_size}",
            ", ".join(f"{name} {estimate.describe()}" for name, estimate in found.measures.items()),
        ]
        if (copies := self.memorisation) is not None:
            lines.append(
                f"near-copies of training images (at most {copies.threshold:.3g} away): {copies.near_copies.describe()}"
            )
        if (concepts := self.concepts) is not None:
            real = concepts.of_real_as_asked
            lines.append(f"concept fidelity: {concepts.fidelity.describe()}; real images {real:.3g}")
        if (faithful := self.faithfulness) is not None:
            others = "" if faithful.shuffled is None else f"; to other snippets {faithful.shuffled:.3g}"
            lines.append(f"snippet cosine: {faithful.cosine.describe()}{others}")
        return lines
