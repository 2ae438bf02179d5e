"""The real images of an evaluation: found before minutes go into sampling, and embedded as the samples' like.

Shapes: m images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank import FLIP_SUFFIX
from gmem_bank.errors import ConfigError, SourceError
from gmem_gen.conditioning import ImagesFrom
from gmem_gen.estimates import random_numbers
from gmem_gen.evaluation_report import EvaluationOptions
from gmem_gen.evaluation_samples import require_enough
from gmem_gen.evaluation_sources import PathLike, reference_images, rows_of_bank
from gmem_gen.image_sets import Embedded, ImageSet, from_bank, matched
from gmem_gen.outputs import Say

CHOICE = 10
"""Stream of random numbers that draws the reference."""
NO_BANK, GONE = "no bank was given", "the images of the bank are not to be found"
LEFT_OUT = "it was left out"


@dataclass(frozen=True, kw_only=True)
class RealImages:
    """Which real images there are."""

    of_bank: ImageSet | None
    """Those of the generator's bank."""
    why_none: str
    """Why there are none of the bank's, in words that repeat; "" where there are."""
    held_out: frozenset[str]
    """Keys, without the suffix of twins, that the training held out."""
    given: ImageSet | None
    """The reference, where it is images."""
    bank: gmem_bank.MemoryBank | None
    """The reference, where it is a bank."""

    @property
    def kind(self) -> str:
        """Of the reference: "bank", "images" or "training images"."""
        return "bank" if self.bank is not None else "images" if self.given is not None else "training images"


def find_real(
    own: gmem_bank.MemoryBank | None, judged: gmem_bank.MemoryBank | None, reference: PathLike | None, images: ImagesFrom, *,
    held_out: Collection[str], say: Say,
) -> RealImages:  # fmt: skip
    """Return the real images there are; none of them is read yet.

    Args:
        own: the generator's bank.
        judged: the reference, where it is a bank.
        reference: the reference, as it was given.
        images: where the images of `own` are, instead of where its provenance says.
        held_out: keys that the training held out.
        say: told in full why images of `own` are not there.

    Raises:
        ConfigError: there is nothing to compare with, or too little.
        SourceError: the reference holds no image.
    """
    of_bank, why, in_full = None, NO_BANK, NO_BANK
    if own is not None:
        try:
            of_bank, why = from_bank(own, images, "the images of the bank"), ""
        except SourceError as error:
            why, in_full = GONE, str(error)
            say(in_full)
    given = reference_images(reference) if judged is None and reference is not None else None
    if judged is None and given is None and of_bank is None:
        raise ConfigError(
            f"there is nothing to compare the samples with ({in_full}): give real images, or a bank of the judge's, with "
            "--reference", key="reference",
        )  # fmt: skip
    bases = frozenset(key.removesuffix(FLIP_SUFFIX) for key in held_out)
    found = RealImages(of_bank=of_bank, why_none=why, held_out=bases, given=given, bank=judged)
    require_enough(_count(found), "real images")
    return found


def require_fits(options: EvaluationOptions, num_samples: int, real: RealImages) -> None:
    """Raise ConfigError where there are too few samples, or rows of the reference, for what the options ask of them."""
    num_real = _count(real) if options.num_real is None else min(options.num_real, _count(real))
    fewest = min(num_samples, num_real)
    most = max(options.neighbours, options.manifold_neighbours or 0)
    if most >= fewest:
        raise ConfigError(
            f"the {most}. nearest neighbour needs more than {most} images on each side, there are {num_samples} samples and "
            f"{num_real} real ones: ask for fewer neighbours (--neighbours, --manifold-neighbours)", key="neighbours",
        )  # fmt: skip
    if (options.kid_subset_size or 0) > fewest // 2:
        raise ConfigError(
            f"a subset of KID has at most half of the smaller set, which has {fewest}, not {options.kid_subset_size}",
            key="kid_subset_size",
        )


def _count(real: RealImages) -> int:
    if real.bank is not None:
        return len(real.bank.rows())
    if real.given is not None:
        return len(real.given)
    assert real.of_bank is not None
    return sum(key.removesuffix(FLIP_SUFFIX) not in real.held_out for key in real.of_bank.keys)


@dataclass(frozen=True, kw_only=True)
class EmbeddedReal:
    """Real images, embedded."""

    of_bank: Embedded | None
    """All of the generator's bank: they vote on concepts."""
    training: Embedded | None
    """Those of them that the training did not hold out: samples may be copies of these. What was inserted later is among
    them, as a copy of it would come from its snippet alone."""
    held_out: Embedded | None
    """Those of them that it did."""
    reference: Embedded
    kind: str
    """Of the reference: "bank", "images" or "training images"."""

    @property
    def sets(self) -> list[Embedded]:
        """All that were read from images."""
        given = [self.reference] if self.kind == "images" else []
        return given if self.of_bank is None else [*given, self.of_bank]


def embed_real(
    real: RealImages,
    options: EvaluationOptions,
    side: int,
    *,
    grey: bool,
    embedded: Callable[[ImageSet, str], Embedded],
) -> EmbeddedReal:
    """Embed real images, at the size of the samples unless the options say otherwise.

    Args:
        real: from `find_real`.
        options: `num_real` bounds the reference alone: a copy is found only where all training images are looked at.
        side: of the samples, in pixels.
        grey: whether real images are made grey.
        embedded: embeds a set; the stage is said.

    Raises:
        ConfigError: too few of them can be read.
    """

    def prepared(images: ImageSet) -> ImageSet:
        return matched(images, side if options.match_size else None, grey=grey)

    of_bank = training = held_out = None
    if real.of_bank is not None and (options.memorisation or real.kind == "training images"):
        of_bank = embedded(prepared(real.of_bank), "embed the bank's images")
        out = np.array([key.removesuffix(FLIP_SUFFIX) in real.held_out for key in of_bank.images.keys], np.bool_)
        training, held_out = _named(of_bank, ~out, "the training images"), _named(of_bank, out, "held-out images")
    if real.bank is not None:
        reference = rows_of_bank(real.bank, _drawn(len(real.bank.rows()), options))
    elif real.given is not None:
        chosen = _drawn(len(real.given), options)
        given = real.given if chosen is None else real.given.take(chosen)
        reference = embedded(prepared(given), "embed reference")
    else:
        assert training is not None
        chosen = _drawn(len(training.values), options)
        reference = training if chosen is None else training.take(chosen)
    require_enough(len(reference.values), "real images")
    return EmbeddedReal(of_bank=of_bank, training=training, held_out=held_out, reference=reference, kind=real.kind)


def _drawn(count: int, options: EvaluationOptions) -> NDArray[np.int64] | None:
    """Return which of so many real images are the reference, ascending, drawn by the seed; None: all."""
    if options.num_real is None or options.num_real >= count:
        return None
    return np.sort(random_numbers(options.seed, CHOICE).choice(count, options.num_real, replace=False))


def _named(embedded: Embedded, chosen: NDArray[np.bool_], what: str) -> Embedded | None:
    """Return those chosen under a name of their own; None where there is none."""
    if not chosen.any():
        return None
    part = embedded if chosen.all() else embedded.take(np.flatnonzero(chosen))
    return dataclasses.replace(part, images=dataclasses.replace(part.images, what=what))
