"""The samples of an evaluation: drawn from a checkpoint and kept, or read from files.

Shapes: n samples, H×W pixels, C channels.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.errors import ConfigError, OutputExistsError
from gmem_gen import conditioning
from gmem_gen.array_store import mapped_samples
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.conditioning import Bank
from gmem_gen.conditions import Conditions, choose_conditions
from gmem_gen.config import SampleConfig
from gmem_gen.estimates import random_numbers
from gmem_gen.evaluation_report import FEWEST, EvaluationOptions
from gmem_gen.evaluation_sources import refuse_statistics
from gmem_gen.image_sets import ImageSet, from_pixels, from_source
from gmem_gen.outputs import Progress, writing
from gmem_gen.sample_files import SampleFiles, plan_of, sample_to
from gmem_gen.sampling import sample

MARKER = ".gmem-evaluation"
ARRAY = "samples.npz"
CHOICE = 11
"""Stream of random numbers that draws given samples, where there are more than are asked for."""


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Samples, and what they were asked to be."""

    images: ImageSet
    """Its concepts are those that were asked for."""
    grey: bool
    """Whether the generator draws grey alone, as far as can be known: one channel, in all files of given ones."""
    rows: NDArray[np.int64] | None = None
    """(n,) rows of the bank that they were drawn from; None: unknown, or a model without memory."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """How they were drawn."""


def require_own_folder(out: str | os.PathLike[str]) -> Path:
    """Make the folder of an evaluation; raises OutputExistsError where it holds something else, WriteError."""
    folder = Path(out)
    with writing(folder, f"to {folder}", "Choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not (folder / MARKER).is_file():
            raise OutputExistsError(f"{folder} holds other files: give an empty or new folder with --out", path=folder)
        (folder / MARKER).touch()
    return folder


def given_samples(path: str | os.PathLike[str], options: EvaluationOptions) -> SampleSet:
    """Return the samples in a folder, an array (`arr_0` of a .npz) or another source; class folders are the concepts asked for.

    Raises:
        SourceError: no image there.
        ConfigError: too few of them.
    """
    if gmem_bank.is_bank_path(path):
        raise ConfigError(f"{path} is a bank, which has no samples in it: give images; a bank can be --reference",
                          key="samples")  # fmt: skip
    refuse_statistics(path, "samples")
    images = from_source(path, "given samples")
    require_enough(len(images), "samples")
    if options.num_given is not None and options.num_given < len(images):
        rng = random_numbers(options.seed, CHOICE)
        images = images.take(np.sort(rng.choice(len(images), options.num_given, replace=False)))
    return SampleSet(images=images, grey=images.have_one_channel())


def require_enough(count: int, what: str) -> None:
    """Raise ConfigError where there are too few images for any figure to mean something."""
    if count < FEWEST:
        raise ConfigError(
            f"there are {count} {what}, fewer than {FEWEST}: a share would have an interval of ± 14 points or more, and a "
            "distance between distributions would be that between the few. Draw or give more",
            key="num",
        )


def draw_samples(
    bank: Bank, checkpoint: LoadedCheckpoint, options: EvaluationOptions, *, concepts: Sequence[str] = (),
    config: SampleConfig | None = None, weights: str = "ema", keep: Path | None = None, progress: Progress,
) -> SampleSet:  # fmt: skip
    """Draw samples; what an earlier, interrupted or finished, call has drawn in the same way is taken.

    Args:
        bank: where the snippets are.
        checkpoint: from `load_checkpoint`.
        options: how many, and the seed that chooses rows.
        concepts: draw as many of each of these; none: of rows drawn from all.
        config: method, steps, guidance; its own seed draws the noise.
        weights: which weights the checkpoint was loaded with, for the record.
        keep: folder that the samples are kept in as `samples.npz` (`arr_0`, as evaluation suites read it).
        progress: told samples done and in all.
    """
    wanted = config or checkpoint.config.sample
    conditions = _chosen(bank, options, concepts)
    if keep is None:
        drawn = sample(bank, checkpoint, conditions, wanted, progress=progress)
        images, record = drawn.images, drawn.record
    else:
        files = SampleFiles(npz=keep / ARRAY)
        record = sample_to(files, bank, checkpoint, conditions, wanted, overwrite=True, progress=progress).record
        images = mapped_samples(keep / ARRAY)
    memory = checkpoint.config.model.condition
    found = from_pixels(images, conditions.keys, "samples")
    asked = {} if memory == "none" else _asked(bank, conditions.rows, concepts)
    plan = plan_of(bank, checkpoint, conditions, wanted)
    cost = {name: record[name] for name in ("nfe", "evaluations_per_image")}
    return SampleSet(
        images=dataclasses.replace(found, concepts=asked), grey=images.shape[3] == 1,
        rows=conditions.rows if memory == "memory" else None,
        sampling={"step": checkpoint.step, "kind_of_weights": weights, "condition": memory, **plan, **cost},
    )  # fmt: skip


def _chosen(bank: Bank, options: EvaluationOptions, concepts: Sequence[str]) -> Conditions:
    """Return the conditions: of all rows, or as many of each concept, the first ones getting what does not divide."""

    def choose(concept: str | None, num: int) -> Conditions:
        return choose_conditions(bank, concept=concept, keys=(), num=num, per_snippet=1, seed=options.seed)

    if len(concepts) < 2:
        return choose(concepts[0] if concepts else None, options.num)
    each, more = divmod(options.num, len(concepts))
    keys = [key for place, name in enumerate(concepts) for key in choose(name, each + (place < more)).keys]
    return choose_conditions(bank, concept=None, keys=keys, num=None, per_snippet=1, seed=options.seed)


def _asked(bank: Bank, rows: NDArray[np.int64], concepts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Return concept → the samples drawn for it: of a row of several concepts the first that was asked for."""
    members = {
        name: found for name, found in conditioning.concepts_of(bank).items() if not concepts or name in concepts
    }
    free = np.ones(len(rows), np.bool_)
    asked = {}
    for name, found in members.items():
        own = free & np.isin(rows, found)
        free &= ~own
        asked[name] = np.flatnonzero(own)
    return asked
