"""The parts of an evaluation that ask what single samples show: their concepts, and the snippets that they were drawn from.

Shapes: n samples, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.errors import EncoderError, MissingDependencyError
from gmem_gen import conditioning, judgement
from gmem_gen.evaluation_report import EvaluationOptions
from gmem_gen.evaluation_sources import snippets_of
from gmem_gen.image_sets import Embedded, ImageSet, matched
from gmem_gen.memorisation import ConceptFidelity
from gmem_gen.outputs import Say

NO_ENCODER = "Samples were not compared with their snippets: the encoder of the bank is not to be had here."


def concept_fidelity(
    samples: Embedded, real: Embedded, options: EvaluationOptions
) -> tuple[ConceptFidelity | None, list[str]]:
    """Judge the samples of concepts that real images have; return what was found, and remarks on what cannot be judged."""
    asked, there = samples.images.concepts, {n: m for n, m in real.images.concepts.items() if len(m)}
    lost = [name for name, members in asked.items() if len(members) and name not in there]
    remarks = [
        f"No real image has the concept {', '.join(map(repr, lost))}: samples of it are not judged by concept."
    ] * bool(lost and there)
    label = np.full(len(samples.values), -1, np.int64)
    for place, name in enumerate(there):
        label[asked.get(name, np.zeros(0, np.int64))] = place
    chosen = np.flatnonzero(label >= 0)
    if len(there) < 2 or not len(chosen):
        why = "none was asked for one" if len(there) > 1 else "real images have fewer than two"
        return None, [*remarks, f"Samples were not judged by concept: {why}."]
    found = judgement.judge_concepts(
        samples.in_space("unit")[chosen], label[chosen], real.in_space("unit"), there, votes=options.votes,
        num_resamples=options.num_resamples, seed=options.seed, keys=real.images.keys,
    )  # fmt: skip
    if found is None:
        return None, [*remarks, "Samples were not judged by concept: no other real image can vote."]
    return found, remarks + found.remarks()


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What samples were drawn from, and what comparing them with it needs."""

    bank: gmem_bank.MemoryBank
    rows: NDArray[np.int64]
    """(n,) of the bank."""
    of_bank: ImageSet | None
    """The bank's images."""
    load: Callable[[gmem_bank.MemoryBank], gmem_bank.Encoder]
    made: Callable[[ImageSet, gmem_bank.Encoder], Embedded]
    """Embeds samples."""
    own: Callable[[ImageSet, gmem_bank.Encoder], Embedded]
    """Embeds real images."""
    say: Say


def snippet_fidelity(
    samples: ImageSet, drawing: Drawing, options: EvaluationOptions, side: int, *, grey: bool
) -> tuple[judgement.Faithfulness | None, list[str]]:
    """Compare samples with what they were drawn from, by the bank's own encoder, where that is to be had; else a remark."""
    bank, rows = drawing.bank, drawing.rows
    try:
        encoder = drawing.load(bank)
    except (EncoderError, MissingDependencyError) as error:
        drawing.say(f"Samples were not compared with their snippets: {error}")
        return None, [NO_ENCODER]
    made = drawing.made(samples, encoder)
    real = _own_images(drawing, encoder, side, grey=grey)
    found = judgement.judge_snippets(
        snippets_of(bank, rows), made.in_space(bank.space), real, num_resamples=options.num_resamples, seed=options.seed
    )
    return found, []


def _own_images(
    drawing: Drawing, encoder: gmem_bank.Encoder, side: int, *, grey: bool
) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return the snippets that samples were drawn from, and those of their own images at the size of the samples."""
    bank, found = drawing.bank, drawing.of_bank
    if found is None:
        return None
    wanted = set(conditioning.names_of(bank, np.unique(drawing.rows)))
    places = np.array([place for place, key in enumerate(found.keys) if key in wanted], np.int64)
    if not len(places):
        return None
    own = drawing.own(matched(found.take(places), side, grey=grey), encoder)
    return snippets_of(bank, bank.rows_for(list(own.images.keys))), own.in_space(bank.space)
