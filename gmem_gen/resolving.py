"""What was left to us: the configuration of a training, filled in from its bank, its images and where it began."""

from __future__ import annotations

import dataclasses
import math

import torch

from gmem_bank.errors import ConfigError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning
from gmem_gen.conditioning import Bank
from gmem_gen.config import Config
from gmem_gen.image_plan import ImagePlan
from gmem_gen.model import auto_patch_size
from gmem_gen.patch_tokens import PatchTokens
from gmem_gen.previews import require_drawable
from gmem_gen.splits import Split
from gmem_gen.stepping import require_share

CPU_MINUTES = 10.0


def resolve(
    config: Config, bank: Bank, planned: ImagePlan, stored: Config | None, tokens: PatchTokens | None = None
) -> Config:
    """Return the configuration with everything that was left to us filled in.

    Args:
        config: as asked for.
        bank: what is trained on.
        planned: its rows with images, and what is made of these.
        stored: of the training that goes on: it keeps what was chosen when it began; None for a new one.
        tokens: patch tokens to learn from; None: none.
    """
    require_drawable(config)
    facts = conditioning.record_of(bank)
    patch = config.model.patch_size or (stored.model.patch_size if stored else auto_patch_size(planned.latent.size))
    scale = config.model.snippet_scale or (stored.model.snippet_scale if stored else 0.0)
    scale = scale or (math.sqrt(facts["dim"]) if facts["space"] == "unit" else 1.0)
    prediction = config.flow.prediction
    if prediction == "auto":
        fits = 2 * patch**2 * planned.latent.channels <= config.model.width
        prediction = stored.flow.prediction if stored else ("velocity" if fits else "data")
    projection = _projection_dim(config, tokens)
    classes = config.model.num_classes
    if config.model.condition == "class":
        present = len(conditioning.class_names(bank))
        if classes not in (0, present):
            raise ConfigError(
                f"model.num_classes is {classes}, the bank has {present} concepts", key="model.num_classes"
            )
        classes = present
    return dataclasses.replace(
        config,
        data=planned.data,
        model=dataclasses.replace(
            config.model, patch_size=patch, snippet_scale=scale, num_classes=classes, projection_dim=projection
        ),
        flow=dataclasses.replace(config.flow, prediction=prediction),
    )


def _projection_dim(config: Config, tokens: PatchTokens | None) -> int:
    """Return the outputs of the projection head: those of the patch tokens, 0 without any."""
    asked, there = config.model.projection_dim, tokens.dim if tokens else 0
    if asked and not there:
        raise ConfigError(
            "a projection head (model.projection_dim) learns from the encoder's patch tokens: write them with 'gmem-bank tokens' "
            "and give their folder with --tokens, or set model.projection_dim=0", key="model.projection_dim",
        )  # fmt: skip
    if asked not in (0, there):
        raise ConfigError(
            f"model.projection_dim is {asked}, the patch tokens have {there} dimensions", key="model.projection_dim"
        )
    return there


def require_trainable(
    config: Config, bank: Bank, planned: ImagePlan, split: Split, *, tokens: PatchTokens | None, num_processes: int = 1
) -> None:
    """Raise now what the training would raise after minutes of reading or encoding images; tokens are fitted to the model.

    Args:
        config: resolved.
        bank: what is trained on.
        planned: its rows with images, and what is made of these.
        split: which of them are trained on.
        tokens: patch tokens to learn from; None: none.
        num_processes: that train together.

    Raises:
        ConfigError: sizes that do not divide, rows of no class or of two, patch tokens on a grid that does not fit, fewer
            images a step than processes and parts.
    """
    require_share(len(split.samples), config, num_processes)
    if config.model.condition == "class":
        conditioning.labels(bank, planned.join.rows, conditioning.class_names(bank))
    with torch.device("meta"):
        model = checkpoints.make_model(config, planned.latent, int(conditioning.record_of(bank)["dim"]))
    if tokens is not None:
        tokens.fit(model.grid)


def minutes_allowed(config: Config, device: torch.device) -> float:
    """Return the limit of training time in minutes, infinite for none."""
    minutes = config.train.max_minutes
    if minutes < 0:
        return CPU_MINUTES if device.type == "cpu" else math.inf
    return minutes or math.inf
