"""Evaluation: samples and real images embedded by one encoder, and all that can be said of them there.

A generator that is conditioned on an encoder has to be judged with another one: the same is circular, and labelled so.

Shapes: n samples, m real images, D dimensions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gmem_bank
from gmem_bank.errors import ConfigError
from gmem_gen import judgement, memorisation
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.checkpoint_state import STATE
from gmem_gen.conditioning import ImagesFrom
from gmem_gen.config import Config, SampleConfig
from gmem_gen.embedding_cache import EmbeddingCache
from gmem_gen.evaluation_parts import Drawing, concept_fidelity, snippet_fidelity
from gmem_gen.evaluation_real import LEFT_OUT, EmbeddedReal, RealImages, embed_real, find_real, require_fits
from gmem_gen.evaluation_remarks import (
    NO_MEMORY,
    NO_ROWS,
    UNKNOWN_HELD_OUT,
    loses_rank,
    masked_remarks,
    overlap_remarks,
    rank_remarks,
)
from gmem_gen.evaluation_report import EvaluationOptions, EvaluationReport, remarks_on
from gmem_gen.evaluation_samples import SampleSet, draw_samples, given_samples, require_enough, require_own_folder
from gmem_gen.evaluation_sources import (
    PathLike,
    choose_judge,
    circularity,
    default_judge,
    opened,
    reference_bank,
    space_of_features,
)
from gmem_gen.exporting import load_checkpoint
from gmem_gen.held_out import held_out_keys
from gmem_gen.image_sets import Embedded, ImageSet, embed
from gmem_gen.memorisation import Memorisation
from gmem_gen.outputs import Progress, Say, no_progress, no_remarks
from gmem_gen.runtime import pick_device, versions

CACHE, OF_SAMPLES = ".cache", "samples"
"""In `out`: embeddings of real images, and below them those of samples."""


def _unwatched(stage: str) -> Progress:  # noqa: ARG001 - the signature of `watch`
    return no_progress


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
    sampling: SampleConfig | Callable[[Config], SampleConfig] | None = None,
    weights: str = "ema",
    load_own: Callable[[gmem_bank.MemoryBank], gmem_bank.Encoder] | None = None,
    device: str = "auto",
    out: PathLike | None = None,
    cache: PathLike | None = None,
    watch: Callable[[str], Progress] = _unwatched,
    say: Say = no_remarks,
) -> EvaluationReport:
    """Judge a generator, or samples of any origin.

    Args:
        bank: of the generator: gives snippets to sample, training images and concepts. None: only samples against a reference.
        encoder: the judge, from `load_encoder`; None: the one that made the reference, where that is a bank, else DINOv2, where
            its weights are on this machine.
        checkpoint: a run or one of its checkpoints to sample from.
        samples: or samples: a folder, a .npz with `arr_0`, or another source of images; class folders name the concept asked for.
        reference: real images (any source), or a bank of the judge's: its rows are the reference as they are. None: the images
            of `bank` that were trained on.
        images: where the images of `bank` are, instead of where its provenance says.
        concepts: what to draw; none: rows of the whole bank.
        options: how to judge.
        sampling: how to draw, or what makes that of the checkpoint's configuration; None: the checkpoint's own settings.
        weights: "ema", "model" or "ema-<decay>", of the checkpoint.
        load_own: gives the encoder that made a bank, where the recorded weights are elsewhere.
        device: of generator and reloaded encoders.
        out: folder for what an interrupted call has done, and the samples; None keeps nothing.
        cache: folder for embeddings of real images, to share among evaluations; None: in `out`.
        watch: stage in words → what is told the images done and in all.
        say: told in full why a part cannot be judged, which the report says in words that name no place.

    Raises:
        ConfigError: neither or both of checkpoint and samples, too few images, samples of different sizes, or no judge.
        EncoderMismatchError: the reference is a bank of another encoder than the judge.
        BankNotFoundError, SourceError: no bank, or no images, where they should be.
        OutputExistsError: `out` holds something else than an evaluation.
        MissingDependencyError: FAISS is not installed.
    """
    _require_one(checkpoint, samples, bank)
    wanted, folder = options or EvaluationOptions(), None if out is None else require_own_folder(out)
    own = None if bank is None else opened(bank)
    load = load_own or (lambda made: gmem_bank.reload_encoder(made.encoder, made.folder, device=device))
    judged = reference_bank(reference)
    space = space_of_features(wanted.space, judged)
    gmem_bank.require_faiss()
    loaded = None
    if checkpoint is not None:
        loaded = load_checkpoint(checkpoint, weights=weights, device=str(pick_device(device)))
    # all that can be wrong with the real images is found before minutes go into sampling
    real = find_real(own, judged, reference, images, held_out=_held_out(loaded), say=say)
    given = None if samples is None else given_samples(samples, wanted)
    require_fits(wanted, wanted.num if given is None else len(given.images), real)
    judge = choose_judge(encoder, judged, load, lambda: default_judge(own, space, device))
    if given is None:
        assert own is not None
        assert loaded is not None
        given = draw_samples(
            own,
            loaded,
            wanted,
            concepts=concepts,
            config=sampling(loaded.config) if callable(sampling) else sampling,
            weights=weights,
            keep=folder,
            progress=watch("sample"),
        )
    shared, kept = _caches(folder, cache)
    desk = _Desk(
        judge=judge, options=wanted, space=space, drawn=given, bank=own, checkpoint=loaded, real=real, load=load, kept=kept,
        shared=shared, watch=watch, say=say,
    )  # fmt: skip
    report = desk.report()
    if kept is not None:
        kept.prune()
    return report


def _require_one(checkpoint: PathLike | None, samples: PathLike | None, bank: PathLike | None) -> None:
    if (checkpoint is None) == (samples is None):
        raise ConfigError("give either a checkpoint to sample from or samples", key="samples")
    if checkpoint is not None and bank is None:
        raise ConfigError("sampling needs the generator's bank", key="bank")


def _caches(folder: Path | None, cache: PathLike | None) -> tuple[EmbeddingCache | None, EmbeddingCache | None]:
    """Return where embeddings of real images are kept, and those of samples."""
    if folder is None:
        return (None if cache is None else EmbeddingCache(Path(cache))), None
    return EmbeddingCache(Path(cache or folder / CACHE)), EmbeddingCache(folder / CACHE / OF_SAMPLES)


def _held_out(checkpoint: LoadedCheckpoint | None) -> tuple[str, ...]:
    return held_out_keys(checkpoint.path) if checkpoint is not None and _knows_held_out(checkpoint) else ()


def _knows_held_out(checkpoint: LoadedCheckpoint) -> bool:
    """Say whether a checkpoint says what was held out; an exported folder does not."""
    return (checkpoint.path / STATE).is_file()


@dataclass(frozen=True, kw_only=True)
class _Desk:
    """What every part of an evaluation needs."""

    judge: gmem_bank.Encoder
    options: EvaluationOptions
    space: str
    drawn: SampleSet
    bank: gmem_bank.MemoryBank | None
    checkpoint: LoadedCheckpoint | None
    real: RealImages
    load: Callable[[gmem_bank.MemoryBank], gmem_bank.Encoder]
    kept: EmbeddingCache | None
    """Embeddings of samples."""
    shared: EmbeddingCache | None
    """Those of real images."""
    watch: Callable[[str], Progress]
    say: Say

    def report(self) -> EvaluationReport:
        options, space = self.options, self.space
        samples = embed(self.drawn.images, self.judge, self.kept, progress=self.watch("embed samples"), one_size=True)
        require_enough(len(samples.values), "readable samples")
        real = embed_real(self.real, options, min(samples.size), grey=self._grey, embedded=self._embedded)
        distribution = judgement.compare(
            samples.in_space(space), real.reference.in_space(space), k=options.neighbours, num_resamples=options.num_resamples,
            seed=options.seed, manifold_k=options.manifold_neighbours, subset_size=options.kid_subset_size,
            num_subsets=options.kid_subsets, progress=self.watch("compare"),
        )  # fmt: skip
        copies, unjudged = self._copies(samples, real)
        circular, said = circularity(self.judge.spec, self.bank, self.checkpoint)
        remarks = remarks_on(
            real.kind, space, distribution.rank_deficient, circular=said, samples=samples, grey=self._grey, sets=real.sets,
            matched=options.match_size, unjudged=unjudged,
        )  # fmt: skip
        remarks += self._remarks(samples, real, copies)
        remarks += [] if copies is None else copies.remarks()
        concepts, more = concept_fidelity(samples, real.of_bank or real.reference, options)
        faithful, missing = self._faithfulness(samples)
        if loses_rank(self.real.bank):
            distribution = dataclasses.replace(distribution, rank_deficient=True)
        return EvaluationReport(
            samples=self._samples(samples), judge=self._judge(circular), reference=self._reference(real),
            distribution=distribution, memorisation=copies, concepts=concepts, faithfulness=faithful,
            remarks=(*remarks, *more, *missing), options=options, drawn=samples, training=real.training,
            held_out=real.held_out if real.kind != "images" else None, versions=versions(),
        )  # fmt: skip

    @property
    def _grey(self) -> bool:
        """Whether real images are made grey: those at their own size only where that is asked for."""
        automatic = self.drawn.grey and self.options.match_size
        return automatic if self.options.grey is None else self.options.grey

    def _embedded(self, images: ImageSet, stage: str) -> Embedded:
        return embed(images, self.judge, self.shared, progress=self.watch(stage))

    def _copies(self, samples: Embedded, real: EmbeddedReal) -> tuple[Memorisation | None, str]:
        """Return what is said of copies, or why nothing is."""
        if real.training is None or not self.options.memorisation:
            return None, self.real.why_none or LEFT_OUT
        keys = real.training.images.keys
        if why := memorisation.why_no_search(keys, self.options.near_copy):
            return None, why
        beside = real.reference if real.kind == "images" else real.held_out
        found = judgement.find_copies(
            samples.in_space("unit"), real.training.in_space("unit"), None if beside is None else beside.in_space("unit"),
            threshold=self.options.near_copy, num_resamples=self.options.num_resamples, seed=self.options.seed,
            keys=keys,
        )  # fmt: skip
        return found, ""

    def _remarks(self, samples: Embedded, real: EmbeddedReal, copies: Memorisation | None) -> list[str]:
        """Return what is to be said of banks and images."""
        found = overlap_remarks(samples, real, copies, self.bank, self.real.bank) + rank_remarks(self.real.bank)
        if copies is not None:
            found += masked_remarks(self.bank)
        data = None if self.checkpoint is None else self.checkpoint.config.data
        asked = data is not None and (data.validation_fraction or data.validation_keys or data.validation_concept)
        unknown = self.checkpoint is not None and not _knows_held_out(self.checkpoint)
        return [*found, UNKNOWN_HELD_OUT] if asked and unknown else found

    def _faithfulness(self, samples: Embedded) -> tuple[judgement.Faithfulness | None, list[str]]:
        if self.drawn.rows is None or self.bank is None:
            return None, [NO_ROWS if self.checkpoint is None else NO_MEMORY]
        drawing = Drawing(
            bank=self.bank, rows=self.drawn.rows, of_bank=self.real.of_bank, load=self.load, say=self.say,
            made=lambda images, encoder: embed(images, encoder, self.kept, progress=self.watch("re-encode samples")),
            own=lambda images, encoder: embed(images, encoder, self.shared, progress=self.watch("re-encode their images")),
        )  # fmt: skip
        grey = self.drawn.grey if self.options.grey is None else self.options.grey
        return snippet_fidelity(self.drawn.images, drawing, self.options, min(samples.size), grey=grey)

    def _samples(self, samples: Embedded) -> dict[str, Any]:
        height, width = samples.size
        return {"what": self.drawn.images.what, "count": len(samples.values), "height": height, "width": width,
                "grey": self.drawn.grey, "looks_grey": samples.looks_grey,
                "pixels": samples.digest(), "sampling": dict(self.drawn.sampling) or None}  # fmt: skip

    def _judge(self, circular: bool | None) -> dict[str, Any]:
        spec = self.judge.spec
        return {"encoder": spec.name, "fingerprint": spec.fingerprint, "dim": spec.dim, "space": self.space,
                "software": spec.software, "circular": circular}  # fmt: skip

    def _reference(self, real: EmbeddedReal) -> dict[str, Any]:
        found, bank = real.reference, self.real.bank
        known = {"pixels": found.digest()} if bank is None else {"fingerprint": bank.fingerprint}
        return {"what": found.images.what, "count": len(found.values), "kind": real.kind, **known}
