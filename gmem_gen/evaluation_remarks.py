"""What a reader of an evaluation has to know of its images: which are the same, which are left out, what a bank leaves out.

Shapes: n samples, m real images, R rank, D dimensions.
"""

from __future__ import annotations

import gmem_bank
from gmem_gen import conditioning
from gmem_gen.evaluation_real import EmbeddedReal
from gmem_gen.image_sets import Embedded
from gmem_gen.memorisation import Memorisation

UNKNOWN_HELD_OUT = (
    "An exported generator does not say which images its training held out: they count as training images."
)
NO_ROWS = "Samples were not compared with their snippets: given ones do not say which they were drawn from."
NO_MEMORY = "Samples were not compared with their snippets: the model draws from none."
SAME_BANK = "The reference is a bank of images that the generator's bank was made of: copies of training images would score best."
MANY = 0.25
"""Share of reference images that are near-copies of training images from which on they can hardly be strangers: 1 % would be."""


def overlap_remarks(
    samples: Embedded, real: EmbeddedReal, copies: Memorisation | None, own: gmem_bank.MemoryBank | None,
    reference: gmem_bank.MemoryBank | None,
) -> list[str]:  # fmt: skip
    """Return what is the same on two sides that should differ: to the pixel, or nearly.

    Args:
        samples: that are judged.
        real: what they are compared with.
        copies: how near both lie to training images.
        own: the generator's bank.
        reference: the reference, where it is a bank.
    """
    found = []
    if own is not None and reference is not None and _of_same_images(own, reference):
        found.append(SAME_BANK)
    if real.kind == "images":
        count = len(real.reference.values)
        if real.training is not None and (same := shared(real.reference, real.training)):
            found.append(f"{same} of {count} reference images are training images: copies of those would score best.")
        elif copies is not None and copies.held_out is not None:
            near = float((copies.held_out <= copies.threshold).mean())
            if near > MANY:
                found.append(
                    f"{near:.0%} of reference images are near-copies of training images: is that the reference?"
                )
        if same := shared(samples, real.reference):
            found.append(f"{same} of {len(samples.values)} samples are reference images themselves.")
    return found


def shared(first: Embedded, second: Embedded) -> int:
    """Return how many images of one set are in another, pixel by pixel."""
    there = set(second.hashes)
    return sum(one in there for one in first.hashes)


def _of_same_images(own: gmem_bank.MemoryBank, reference: gmem_bank.MemoryBank) -> bool:
    digests = [{source.digest for source in one.sources if source.digest} for one in (own, reference)]
    return own.fingerprint == reference.fingerprint or bool(digests[0] & digests[1])


def masked_remarks(own: gmem_bank.MemoryBank | None) -> list[str]:
    """Return what the search for copies does not look at in the generator's bank."""
    masked = 0 if own is None else len(own) - len(own.rows())
    return [f"{masked} rows of the bank are masked: copies of their images are not looked for."] if masked else []


def loses_rank(reference: gmem_bank.MemoryBank | None) -> bool:
    """Say whether a bank's factors have too few components for a covariance of full rank."""
    rank = None if reference is None else conditioning.rank_of(reference)
    return rank is not None and reference is not None and rank + (reference.space == "unit") < reference.dim


def rank_remarks(reference: gmem_bank.MemoryBank | None) -> list[str]:
    """Return what a factored bank as reference lacks."""
    if reference is None or not loses_rank(reference):
        return []
    rank = conditioning.rank_of(reference)
    return [
        f"The reference is a bank of rank {rank} in {reference.dim} dimensions: what its rows lost by that shifts every figure, "
        "and its covariance is rank-deficient."
    ]
