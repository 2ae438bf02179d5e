"""Sampling: one seed an image, so that an image does not depend on the batch it was drawn in.

Shapes: B samples, C·H·W latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmem_bank.errors import ConfigError
from gmem_gen import conditioning, ode, predictions, sde, times
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.conditioning import Bank
from gmem_gen.config import FlowConfig, SampleConfig
from gmem_gen.guidance import Guided
from gmem_gen.ode import Solution
from gmem_gen.predictions import Field
from gmem_gen.runtime import versions
from gmem_gen.tokenizers import make_tokenizer

Progress = Callable[[int, int], None]


def _silent_progress(done: int, total: int) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What was drawn, and everything needed to draw it again."""

    images: NDArray[np.uint8]
    """(B, H, W, C)."""
    conditions: conditioning.Conditions
    nfe: int
    """Times the network was asked for a prediction, per sample; with dopri5 the most that a sample took."""
    record: dict[str, Any]


class Noise:
    """The random numbers of a batch: each sample has a stream of its own, decided by the seed and its index alone.

    Args:
        shape: (C, H, W).
        seed: of the first sample.
        indices: of the samples of the batch.
        device: where the numbers go; they are drawn on the CPU, so that they are the same on every machine.
    """

    def __init__(
        self, shape: tuple[int, int, int], seed: int, indices: range, device: torch.device | str = "cpu"
    ) -> None:
        self.shape, self.device = shape, device
        self.generators = []
        for index in indices:
            state = np.random.SeedSequence([seed & 0xFFFFFFFF, index]).generate_state(1, np.uint64)[0]
            self.generators.append(torch.Generator().manual_seed(int(state >> 1)))

    def draw(self) -> Tensor:
        """Return the next (B, C, H, W) standard normal numbers: first the start, then those of each step of an SDE."""
        return torch.stack([torch.randn(self.shape, generator=each) for each in self.generators]).to(self.device)


def initial_noise(shape: tuple[int, int, int], seed: int, index: int) -> Tensor:
    """Return the (C, H, W) noise that sample `index` starts from: decided by seed and index alone."""
    return Noise(shape, seed, range(index, index + 1)).draw()[0]


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
        config: method, steps, guidance, seed; None: the checkpoint's own sample settings.
        progress: told samples done and samples in all.

    Raises:
        EncoderMismatchError: the bank is of another encoder than the one trained on.
        ConfigError: guidance was asked of a model that never saw the null condition; rows of no class that the model knows.
        MissingDependencyError: method "dopri5" without torchdiffeq.
    """
    wanted = config or checkpoint.config.sample
    conditioning.require_same_memory(bank, checkpoint.bank, f"the generator in {checkpoint.path}")
    if wanted.guidance != 1.0 and checkpoint.config.train.null_probability == 0:
        raise ConfigError(
            "this model was trained without the null snippet (train.null_probability=0): sample with --guidance 1"
        )
    if wanted.guidance != 1.0 and checkpoint.config.model.condition == "none":
        raise ConfigError("this model has no condition (model.condition='none') to guide by: sample with --guidance 1")
    images, nfe, evaluations = _draw(bank, checkpoint, conditions.rows, wanted, progress)
    record = {
        **dataclasses.asdict(wanted),
        "nfe": nfe,
        "evaluations_per_image": round(evaluations / len(images), 3),
        "path": checkpoint.config.flow.path,
        "prediction": checkpoint.config.flow.prediction,
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


def solve(field: Field, flow: FlowConfig, config: SampleConfig, noise: Callable[[], Tensor]) -> Solution:
    """Carry noise to data with a network's predictions.

    Args:
        field: what the network predicts at (x_t, t), guidance included.
        flow: path and prediction.
        config: method, steps and what belongs to them.
        noise: gives (B, C, H, W) standard normal numbers on the field's device: the start, then those of each SDE step.
    """
    path, prediction = flow.path, flow.prediction
    if config.is_sde:
        start, end = times.sde_interval(path, prediction, config)
        steps = config.num_steps - (config.last_step != "none")
        return sde.solve_sde(
            predictions.dynamics(field, prediction, path), noise(), times.time_grid(steps, 1.0, start, end),
            draw=lambda _: noise(), method=config.method, path=path, diffusion=config.diffusion,
            diffusion_norm=config.diffusion_norm, last_step=config.last_step, last_step_size=config.last_step_size,
        )  # fmt: skip
    start, end = times.usable_interval(path, prediction)
    grid = times.time_grid(config.num_steps, config.timestep_shift, start, end)
    velocity = predictions.velocity_field(field, prediction, path)
    return ode.solve_ode(
        velocity, noise(), grid, config.method, rtol=config.rtol, atol=config.atol, overshoot=config.overshoot
    )


def _draw(
    bank: Bank, checkpoint: LoadedCheckpoint, rows: NDArray[np.int64], config: SampleConfig, progress: Progress
) -> tuple[NDArray[np.uint8], int, int]:
    """Return the (B, H, W, C) images of rows, batch by batch, the NFE of each, and all evaluations of the network together."""
    latent, device = checkpoint.model.latent, next(checkpoint.model.parameters()).device
    tokenizer = make_tokenizer(checkpoint.tokenizer, device=str(device))
    reader = conditioning.reader(bank, checkpoint.model, checkpoint.classes)
    shape = (latent.channels, latent.size, latent.size)
    # an adaptive solver chooses its steps by the whole batch, so with it each image is a batch
    batch_size = 1 if config.method == "dopri5" else config.batch_size
    images, nfe, evaluations = [], 0, 0

    def network(x_t: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        output: Tensor = reader.network(x_t, t.to(x_t), conditions)
        return output

    with torch.inference_mode():
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            noise = Noise(shape, config.seed, range(start, start + len(batch)), device)
            conditions = reader.read(batch, device)
            null = checkpoint.model.null_conditions(conditions)
            interval = (config.guidance_start, config.guidance_end) if config.guidance != 1.0 else (0.0, 1.0)
            field = Guided(network, conditions, null, config.guidance, *interval)
            solution = solve(field, checkpoint.config.flow, config, noise.draw)
            images.append(tokenizer.decode(solution.x_1))
            nfe, evaluations = max(nfe, solution.nfe), evaluations + field.num_points
            progress(start + len(batch), len(rows))
    return np.concatenate(images), nfe, evaluations
