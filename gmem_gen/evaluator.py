"""Evaluation: samples and real images embedded by one encoder, and all that can be said of them there.

A generator that is conditioned on an encoder has to be judged with another one: the same is circular, and labelled so.

Shapes: n samples, m real images, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.errors import ConfigError, EncoderError, MissingDependencyError, SourceError
from gmem_gen import conditioning, judgement, memorisation
from gmem_gen.conditioning import Bank, ImagesFrom
from gmem_gen.config import SampleConfig
from gmem_gen.estimates import random_numbers
from gmem_gen.evaluation_report import EvaluationOptions, EvaluationReport, remarks_on
from gmem_gen.evaluation_samples import SampleSet, draw_samples, given_samples, require_enough, require_own_folder
from gmem_gen.evaluation_sources import (
    PathLike,
    choose_judge,
    opened,
    reference_bank,
    reference_images,
    rows_of_bank,
    same_network,
    snippets_of,
    space_of_features,
)
from gmem_gen.exporting import load_checkpoint
from gmem_gen.image_sets import Embedded, ImageSet, embed, from_bank, matched
from gmem_gen.outputs import Progress
from gmem_gen.runtime import pick_device

CACHE = ".cache"
CHOICE = 10
"""Stream of random numbers that draws real images."""


def _unwatched(stage: str) -> Progress:  # noqa: ARG001 - the signature of `watch`
    return _unseen


def _unseen(done: int, total: int) -> None:
    pass


def evaluate(
    bank: PathLike | None,
    encoder: gmem_bank.Encoder | None = None,
    *,
    checkpoint: PathLike | None = None,
    samples: PathLike | None = None,
    reference: PathLike | None = None,
    images: ImagesFrom = None,
    concepts: Sequence[str] = (),
    options: EvaluationOptions | None = None,
    sampling: SampleConfig | None = None,
    weights: str = "ema",
    load_own: Callable[[gmem_bank.MemoryBank], gmem_bank.Encoder] | None = None,
    device: str = "auto",
    out: PathLike | None = None,
    watch: Callable[[str], Progress] = _unwatched,
) -> EvaluationReport:
    """Judge a generator, or samples of any origin.

    Args:
        bank: of the generator: gives snippets to sample, training images and concepts. None: only samples against a reference.
        encoder: the judge, from `load_encoder`; None: the one that made the reference, which then must be a bank.
        checkpoint: a run or one of its checkpoints to sample from.
        samples: or samples: a folder, a .npz with `arr_0`, or another source of images; class folders name the concept asked for.
        reference: real images (any source), or a bank of the judge's: its rows are the reference as they are. None: the images
            of `bank`.
        images: where the images of `bank` are, instead of where its provenance says.
        concepts: what to draw; none: rows of the whole bank.
        options: how to judge.
        sampling: how to draw; None: the checkpoint's own settings.
        weights: "ema", "model" or "ema-<decay>", of the checkpoint.
        load_own: gives the encoder that made a bank, where the recorded weights are elsewhere.
        device: of generator and reloaded encoders.
        out: folder for what an interrupted call has done, and the samples; None keeps nothing.
        watch: stage in words → what is told the images done and in all.

    Raises:
        ConfigError: neither or both of checkpoint and samples, too few images, or samples of different sizes.
        EncoderMismatchError: the reference is a bank of another encoder than the judge.
        SourceError: no images where they should be.
        OutputExistsError: `out` holds something else than an evaluation.
        MissingDependencyError: FAISS is not installed.
    """
    if (checkpoint is None) == (samples is None):
        raise ConfigError("give either a checkpoint to sample from or samples", key="samples")
    wanted, folder = options or EvaluationOptions(), None if out is None else require_own_folder(out)
    own = None if bank is None else opened(bank)
    load = load_own or (lambda made: gmem_bank.reload_encoder(made.encoder, made.folder, device=device))
    judged = reference_bank(reference)
    space_of_features(wanted.space, judged)  # before minutes go into sampling
    gmem_bank.require_faiss()
    judge = choose_judge(encoder, judged, load)
    if checkpoint is not None:
        if own is None:
            raise ConfigError("sampling needs the generator's bank", key="bank")
        loaded = load_checkpoint(checkpoint, weights=weights, device=str(pick_device(device)))
        drawn = draw_samples(
            own,
            loaded,
            wanted,
            concepts=concepts,
            config=sampling,
            weights=weights,
            keep=folder,
            progress=watch("sample"),
        )
    else:
        assert samples is not None
        drawn = given_samples(samples)
    desk = _Desk(
        judge=judge, options=wanted, drawn=drawn, cache=None if folder is None else folder / CACHE, watch=watch,
        bank=own, load=load,
    )  # fmt: skip
    return desk.report(judged, reference, images)


@dataclass(frozen=True, kw_only=True)
class _Desk:
    """What every part of an evaluation needs."""

    judge: gmem_bank.Encoder
    options: EvaluationOptions
    drawn: SampleSet
    cache: Path | None
    watch: Callable[[str], Progress]
    bank: gmem_bank.MemoryBank | None
    load: Callable[[gmem_bank.MemoryBank], gmem_bank.Encoder]

    def report(
        self, judged: gmem_bank.MemoryBank | None, reference: PathLike | None, images: ImagesFrom
    ) -> EvaluationReport:
        options = self.options
        samples = self.embedded(self.drawn.images, "embed samples", one_size=True)
        require_enough(len(samples.values), "readable samples")
        training, why = self.training(images)
        why = why or memorisation.why_no_search([] if training is None else training.images.keys, options.near_copy)
        real, kind = self.reference(judged, reference, training, why)
        space = space_of_features(options.space, judged)
        distribution = judgement.compare(
            samples.in_space(space), real.in_space(space), k=options.neighbours, num_resamples=options.num_resamples,
            seed=options.seed,
        )  # fmt: skip
        sets = [one for one in (samples, real if kind == "images" else None, training) if one is not None]
        remarks = remarks_on(
            kind, space, distribution.rank_deficient, circular=self.circular(), sets=sets,
            matched=options.match_size, unjudged=why,
        )  # fmt: skip
        copies = None
        if training is not None and not why:
            held_out = real.in_space("unit") if kind == "images" else None
            copies = judgement.find_copies(
                samples.in_space("unit"), training.in_space("unit"), held_out, threshold=options.near_copy,
                num_resamples=options.num_resamples, seed=options.seed, keys=training.images.keys,
            )  # fmt: skip
            remarks += copies.remarks()
        concepts = self.concepts(samples, training if training is not None else real, remarks)
        faithful = self.faithfulness(images, remarks)
        height, width = self.drawn.size
        return EvaluationReport(
            samples={"what": self.drawn.images.what, "count": len(samples.values), "height": height, "width": width,
                     "sampling": dict(self.drawn.sampling) or None},
            judge={"encoder": self.judge.spec.name, "fingerprint": self.judge.spec.fingerprint, "dim": self.judge.spec.dim,
                   "space": space, "circular": self.circular()},
            reference={"what": real.images.what, "count": len(real.values), "kind": kind},
            distribution=distribution, memorisation=copies, concepts=concepts, faithfulness=faithful,
            remarks=tuple(remarks), options=options, drawn=samples, training=training,
        )  # fmt: skip

    def circular(self) -> bool:
        return self.bank is not None and same_network(self.judge.spec, self.bank.encoder)

    def embedded(self, images: ImageSet, stage: str, *, one_size: bool = False) -> Embedded:
        return embed(images, self.judge, self.cache, progress=self.watch(stage), one_size=one_size)

    def prepared(self, images: ImageSet) -> ImageSet:
        """Return real images as they are compared: no more than asked for, and at the size of the samples."""
        most = self.options.num_real
        if most is not None and most < len(images):
            rng = random_numbers(self.options.seed, CHOICE)
            images = images.take(np.sort(rng.choice(len(images), most, replace=False)))
        if not self.options.match_size:
            return images
        return matched(images, min(self.drawn.size), grey=self.drawn.grey)

    def training(self, images: ImagesFrom) -> tuple[Embedded | None, str]:
        """Return the images of the bank, embedded, or why there are none.

        Those that were inserted after the training are among them: a copy of one would come from its snippet alone.
        """
        if self.bank is None:
            return None, "no bank was given"
        try:
            found = from_bank(self.bank, images, "the images of the bank")
        except SourceError as error:
            return None, str(error)
        return self.embedded(self.prepared(found), "embed training images"), ""

    def reference(
        self, judged: gmem_bank.MemoryBank | None, reference: PathLike | None, training: Embedded | None, why: str
    ) -> tuple[Embedded, str]:
        """Return what samples are compared with, and its kind: "bank", "images" or "training images"."""
        if judged is not None:
            found, kind = rows_of_bank(judged), "bank"
        elif reference is not None:
            given = reference_images(reference)
            found, kind = self.embedded(self.prepared(given), "embed reference"), "images"
        elif training is not None:
            found, kind = training, "training images"
        else:
            raise ConfigError(
                f"there is nothing to compare the samples with ({why}): give a reference", key="reference"
            )
        require_enough(len(found.values), "real images")
        return found, kind

    def concepts(self, samples: Embedded, real: Embedded, remarks: list[str]) -> memorisation.ConceptFidelity | None:
        """Judge the samples of concepts that real images have; what cannot be judged is remarked."""
        asked, there = samples.images.concepts, {n: m for n, m in real.images.concepts.items() if len(m)}
        lost = [name for name, members in asked.items() if len(members) and name not in there]
        if lost and there:
            remarks.append(
                f"No real image has the concept {', '.join(map(repr, lost))}: samples of it are not judged by concept."
            )
        label = np.full(len(samples.values), -1, np.int64)
        for place, name in enumerate(there):
            label[asked.get(name, np.zeros(0, np.int64))] = place
        chosen = np.flatnonzero(label >= 0)
        if len(there) < 2 or not len(chosen):
            return None
        found = judgement.judge_concepts(
            samples.in_space("unit")[chosen], label[chosen], real.in_space("unit"), there, votes=self.options.votes,
            num_resamples=self.options.num_resamples, seed=self.options.seed, keys=real.images.keys,
        )  # fmt: skip
        remarks += (
            ["Samples were not judged by concept: no other real image can vote."] if found is None else found.remarks()
        )
        return found

    def faithfulness(self, images: ImagesFrom, remarks: list[str]) -> judgement.Faithfulness | None:
        """Compare what was drawn with what it was drawn from, by the bank's own encoder, where that is to be had."""
        rows, bank = self.drawn.rows, self.bank
        if rows is None or bank is None:
            return None
        try:
            encoder = self.load(bank)
        except (EncoderError, MissingDependencyError) as error:
            remarks.append(f"Samples were not compared with their snippets: {error}.")
            return None
        made = embed(self.drawn.images, encoder, self.cache, progress=self.watch("re-encode samples"))
        real = self._own_images(bank, encoder, rows, images)
        return judgement.judge_snippets(
            snippets_of(bank, rows), made.in_space(bank.space), real, num_resamples=self.options.num_resamples,
            seed=self.options.seed,
        )  # fmt: skip

    def _own_images(
        self, bank: Bank, encoder: gmem_bank.Encoder, rows: NDArray[np.int64], images: ImagesFrom
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Return the snippets that samples were drawn from, and those of their own images at the size of the samples."""
        try:
            found = from_bank(bank, images, "own images")
        except SourceError:
            return None
        wanted = set(conditioning.names_of(bank, np.unique(rows)))
        places = np.array([place for place, key in enumerate(found.keys) if key in wanted], np.int64)
        if not len(places):
            return None
        shown = matched(found.take(places), min(self.drawn.size), grey=self.drawn.grey)
        own = embed(shown, encoder, self.cache, progress=self.watch("re-encode their images"))
        return snippets_of(bank, bank.rows_for(list(own.images.keys))), own.in_space(bank.space)
