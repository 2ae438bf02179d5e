"""Grids of samples on the way: the same rows from the same noise every time, so that one sees what changed.

Shapes: B images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gmem_bank.errors import ConfigError
from gmem_gen import conditioning
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.conditions import Conditions
from gmem_gen.config import Config
from gmem_gen.images import write_grid
from gmem_gen.sampling import sample
from gmem_gen.stepping import Trainer


def require_drawable(config: Config) -> None:
    """Raise ConfigError, before the training, where its samples could not be drawn as `sample.guidance` wants them."""
    if config.train.sample_every and config.sample.guidance != 1.0 and config.model.condition == "none":
        raise ConfigError(
            "train.sample_every with sample.guidance other than 1 needs a model with a condition to guide by: set "
            "sample.guidance=1", key="sample.guidance",
        )  # fmt: skip


def preview_conditions(trainer: Trainer) -> Conditions:
    """Return the rows that are drawn: held-out ones where there are any, chosen by the seed."""
    held = trainer.split.held_out
    pool = held if len(held) else trainer.split.samples[:, 0]
    rng = np.random.Generator(np.random.PCG64(trainer.config.train.seed))
    places = rng.permutation(pool)[: trainer.config.train.sample_images]
    return Conditions(
        rows=trainer.join.rows[places], keys=[trainer.join.keys[place] for place in places], label="preview"
    )


def write_preview(trainer: Trainer, run: Path, conditions: Conditions) -> Path:
    """Draw with the averaged weights, write RUN/samples/step-<step>.png with a JSON beside it, and return its path."""
    average = trainer.average
    before = average.training
    drawn = LoadedCheckpoint(
        path=run, model=average.eval(), config=trainer.config, bank=conditioning.record_of(trainer.bank), step=trainer.step,
        run=run, tokenizer=trainer.images.tokenizer.record(), classes=trainer.classes,
    )  # fmt: skip
    try:
        samples = sample(trainer.bank, drawn, conditions, trainer.config.sample, tokenizer=trainer.images.tokenizer)
    finally:
        average.train(before)
    grid = run / "samples" / f"step-{trainer.step:08d}.png"
    write_grid(samples.images, {**samples.record, "weights": "ema"}, grid)
    return grid
