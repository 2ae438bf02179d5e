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
from gmem_gen.memorisation import ConceptFidelity, Memorisation
from gmem_gen.neighbours import DEFAULT_NEIGHBOURS

FEWEST = 50
"""Samples, and real images: below this a share has an interval of ± 14 points and more, and no order of models can be told."""
DEFAULT_NUM = 500


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How to judge."""

    num: int = DEFAULT_NUM
    """Samples to draw."""
    space: str | None = None
    """Of distances: "raw" (the network's own numbers, as in published figures) or "unit"; None: a reference bank's, else raw."""
    neighbours: int = DEFAULT_NEIGHBOURS
    """k of precision, recall, density and coverage."""
    votes: int = 10
    """Neighbours that vote on a concept."""
    num_resamples: int = 100
    """Of intervals: parts of the jackknife of the Fréchet distance, a tenth of the resamples of a mean; 0: none."""
    near_copy: float | None = None
    """Cosine distance of a near-copy; None: below which 1 % of training images lie to their nearest other."""
    num_real: int | None = None
    """Real images of each kind at most, drawn by the seed; None: all."""
    match_size: bool = True
    """Bring real images to the size of the samples, as the generator was shown them, before they are embedded."""
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"num": FEWEST, "neighbours": 1, "votes": 1, "num_resamples": 0, "seed": 0}
        for name, fewest in least.items():
            if getattr(self, name) < fewest:
                raise ConfigError(f"{name} must be {fewest} or more, got {getattr(self, name)}", key=name)
        if self.num_real is not None and self.num_real < FEWEST:
            raise ConfigError(f"num_real must be {FEWEST} or more, got {self.num_real}", key="num_real")
        if self.space not in (None, "raw", "unit"):
            raise ConfigError(f"space must be 'raw' or 'unit', not {self.space!r}", key="space")
        if self.near_copy is not None and not 0 <= self.near_copy <= 2:
            raise ConfigError(f"a cosine distance lies between 0 and 2, near_copy={self.near_copy}", key="near_copy")


def remarks_on(
    kind: str, space: str, deficient: bool, *, circular: bool, sets: Sequence[Embedded], matched: bool, unjudged: str
) -> list[str]:  # fmt: skip
    """Return what a reader of the figures has to know.

    Args:
        kind: of the reference: "bank", "images" or "training images".
        space: of the features.
        deficient: whether a covariance is rank-deficient.
        circular: whether the judge is the generator's own encoder.
        sets: whose images may have been missing.
        matched: whether real images were brought to the size of the samples.
        unjudged: why memorisation was not judged, or "".
    """
    found = []
    if circular:
        found.append(
            "CIRCULAR: the judge is the encoder that the generator is conditioned on, which it learned to satisfy."
        )
    if deficient:
        found.append(
            "There are no more rows than dimensions, so a covariance is rank-deficient: the Fréchet distance is too large, and "
            "comparable only with others of the same numbers of rows. It has an interval only with more samples than dimensions."
        )
    if space == "unit":
        found.append("Features were brought to length 1: distances are not those of raw features.")
    if kind == "training images":
        found.append(
            "The reference is the images of the bank, which were trained on: copies would score best. Give held-out images."
        )
    if kind == "bank":
        found.append("The reference is a bank of images at their own size, not at that of the samples.")
    elif not matched:
        found.append("Real images were embedded at their own size, not at that of the samples.")
    for one in sets:
        if one.skipped or one.images.num_left_out:
            found.append(
                f"Of {one.images.what} {len(one.skipped)} could not be read, {one.images.num_left_out} were not there."
            )
    if unjudged:
        found.append(f"Memorisation was not judged: {unjudged}.")
    return found


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What was judged, by what, and what was found; a part that could not be judged is None, and `remarks` says why."""

    samples: Mapping[str, Any]
    """"what", "count", "height", "width", and where they were drawn here "sampling"."""
    judge: Mapping[str, Any]
    """"encoder", "fingerprint", "dim", "space", and "circular": whether it is the generator's own."""
    reference: Mapping[str, Any]
    """"what", "count", "kind"."""
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

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        parts = {"memorisation": self.memorisation, "concepts": self.concepts, "snippets": self.faithfulness}
        return {
            "samples": dict(self.samples), "judge": dict(self.judge), "reference": dict(self.reference),
            "distribution": self.distribution.to_json(),
            **{name: None if part is None else part.to_json() for name, part in parts.items()},
            "remarks": list(self.remarks), "options": dataclasses.asdict(self.options),
        }  # fmt: skip

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
            lines.append(f"near-copies (nearer than {copies.threshold:.3g}): {copies.near_copies.describe()}")
        if (concepts := self.concepts) is not None:
            real = concepts.of_real_as_asked
            lines.append(f"concept fidelity: {concepts.fidelity.describe()}; real images {real:.3g}")
        if (faithful := self.faithfulness) is not None:
            others = "" if faithful.shuffled is None else f"; to other snippets {faithful.shuffled:.3g}"
            lines.append(f"snippet cosine: {faithful.cosine.describe()}{others}")
        return lines
