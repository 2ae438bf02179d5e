"""Sampling: one seed an image, so that an image does not depend on the batch it was drawn in.

Shapes: B samples, C·H·W latent, D snippet dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmem_bank.errors import ConfigError, suggest
from gmem_gen import conditioning, flow
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.conditioning import Bank
from gmem_gen.runtime import versions
from gmem_gen.tokenizers import make_tokenizer

Progress = Callable[[int, int], None]


def _silent_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How samples are drawn."""

    solver: str = "heun"
    """"euler" or "heun"."""
    num_steps: int = 25
    """Solver steps; Heun takes two evaluations a step."""
    guidance: float = 1.0
    """null + guidance·(conditional − null); 1: none."""
    guidance_start: float = 0.0
    """Guidance from this t on; before it the conditional velocity."""
    guidance_end: float = 1.0
    """Guidance up to this t; after it the null velocity, as published."""
    timestep_shift: float = 1.0
    """1: equal steps; below 1: shorter steps near the noise (the published 0.3)."""
    seed: int = 0
    """Of the first sample; sample i is decided by (seed, i)."""
    batch_size: int = 64
    """Samples computed together."""

    def __post_init__(self) -> None:
        if self.solver not in flow.SOLVERS:
            raise ConfigError(
                f"unknown solver {self.solver!r} (there are: {', '.join(flow.SOLVERS)}).{suggest(self.solver, flow.SOLVERS)}"
            )
        if not 1 <= self.num_steps <= 100_000 or self.batch_size < 1:
            raise ConfigError(
                f"steps must be 1 to 100000 and batch size at least 1, got {self.num_steps}, {self.batch_size}"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be 0 to 4294967295, got {self.seed}")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise ConfigError(f"guidance must be 0 or more, got {self.guidance}")
        if not 0 < self.timestep_shift < math.inf:
            raise ConfigError(f"timestep shift must be positive, got {self.timestep_shift}")
        if not 0 <= self.guidance_start <= self.guidance_end <= 1:
            raise ConfigError(f"guidance interval must lie in 0 to 1, got {self.guidance_start} to {self.guidance_end}")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What was drawn, and everything needed to draw it again."""

    images: NDArray[np.uint8]
    """(B, H, W, C)."""
    conditions: conditioning.Conditions
    nfe: int
    """Times the network was asked for a velocity, per sample; guidance doubles the work of those inside its interval."""
    record: dict[str, Any]


def initial_noise(shape: tuple[int, int, int], seed: int, index: int) -> Tensor:
    """Return the (C, H, W) noise of sample `index`: decided by seed and index alone."""
    state = np.random.SeedSequence([seed & 0xFFFFFFFF, index]).generate_state(1, np.uint64)[0]
    return torch.randn(shape, generator=torch.Generator().manual_seed(int(state >> 1)))


def sample(
    bank: Bank,
    checkpoint: LoadedCheckpoint,
    conditions: conditioning.Conditions,
    config: SampleConfig | None = None,
    *,
    progress: Progress = _silent_progress,
) -> Samples:
    """Draw one image for each condition.

    Args:
        bank: where the snippets are; may have been edited since the training, must have the same encoder.
        checkpoint: from `load_checkpoint`.
        conditions: from `choose_conditions`.
        config: solver, steps, guidance, seed.
        progress: told samples done and samples in all.

    Raises:
        EncoderMismatchError: the bank is of another encoder than the one trained on.
        ConfigError: guidance was asked of a model that never saw the null snippet.
    """
    wanted = config or SampleConfig()
    conditioning.require_same_memory(bank, checkpoint.bank, f"the generator in {checkpoint.path}")
    if wanted.guidance != 1.0 and checkpoint.config.train.null_probability == 0:
        raise ConfigError(
            "this model was trained without the null snippet (train.null_probability=0): sample with --guidance 1"
        )
    images, nfe = _draw(bank, checkpoint, conditions.rows, wanted, progress)
    record = {
        **dataclasses.asdict(wanted),
        "nfe": nfe,
        "weights_step": checkpoint.step,
        "checkpoint": str(checkpoint.path),
        "precision": "fp32",
        "device": str(next(checkpoint.model.parameters()).device),
        "label": conditions.label,
        "keys": conditions.keys,
        "bank": conditioning.record_of(bank),
        "trained_on": checkpoint.bank,
        "versions": versions(),
    }
    return Samples(images=images, conditions=conditions, nfe=nfe, record=record)


def _draw(
    bank: Bank, checkpoint: LoadedCheckpoint, rows: NDArray[np.int64], config: SampleConfig, progress: Progress
) -> tuple[NDArray[np.uint8], int]:
    """Return the (B, H, W, C) images of rows, batch by batch, and the evaluations each took."""
    model, prediction = checkpoint.model, checkpoint.config.flow.prediction
    latent, device = model.latent, next(model.parameters()).device
    tokenizer = make_tokenizer(checkpoint.tokenizer, latent.size, latent.channels)
    times = flow.time_grid(config.num_steps, config.timestep_shift).to(device)
    images, nfe = [], 0

    def velocity(x_t: Tensor, t: Tensor, snippets: Tensor) -> Tensor:
        return flow.to_velocity(model(x_t, t, snippets), x_t, t, prediction)

    with torch.inference_mode():
        for start in range(0, len(rows), config.batch_size):
            batch = rows[start : start + config.batch_size]
            shape = (latent.channels, latent.size, latent.size)
            noise = torch.stack([initial_noise(shape, config.seed, start + place) for place in range(len(batch))])
            snippets = conditioning.gather(bank, batch, device)
            field = flow.guided(velocity, snippets, config.guidance, config.guidance_start, config.guidance_end)
            solution = flow.SOLVERS[config.solver](field, noise.to(device), times)
            images.append(tokenizer.decode(solution.x_1))
            nfe = solution.nfe
            progress(start + len(batch), len(rows))
    return np.concatenate(images), nfe
