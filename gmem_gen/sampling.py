"""Sampling: one seed an image, so that an image does not depend on the batch it was drawn in.

Shapes: B samples, b samples of a batch, C·H·W latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
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
from gmem_gen.conditions import Conditions
from gmem_gen.config import FlowConfig, SampleConfig
from gmem_gen.guidance import Guided
from gmem_gen.ode import Solution
from gmem_gen.outputs import Progress, Say, no_progress, no_remarks
from gmem_gen.predictions import Field
from gmem_gen.runtime import versions
from gmem_gen.tokenizers import PIXELS, Tokenizer, make_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What was drawn, and everything needed to draw it again."""

    images: NDArray[np.uint8]
    """(B, H, W, C)."""
    conditions: Conditions
    nfe: int
    """Times the network was asked for a prediction, per sample; with dopri5 the most that a sample took."""
    record: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A batch of samples, and what it cost."""

    places: NDArray[np.int64]
    """(b,) which samples of the conditions."""
    images: NDArray[np.uint8]
    """(b, H, W, C)."""
    nfe: int
    """Times the network was asked for a prediction."""
    evaluations: int
    """Points that it was asked at, a guided one counted twice, over the whole batch."""


class Noise:
    """The random numbers of a batch: each sample has a stream of its own, decided by the seed and its index alone.

    Args:
        shape: (C, H, W).
        seed: of the first sample.
        indices: which streams, one a sample.
        device: where the numbers go; they are drawn on the CPU, so that they are the same on every machine.
    """

    def __init__(
        self, shape: tuple[int, int, int], seed: int, indices: Sequence[int], device: torch.device | str = "cpu"
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
    conditions: Conditions,
    config: SampleConfig | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    progress: Progress = no_progress,
    say: Say = no_remarks,
) -> Samples:
    """Draw one image for each condition, in memory; `sample_to` draws into files.

    Args:
        bank: where the snippets are; may have been edited since the training, must have the same encoder.
        checkpoint: from `load_checkpoint`.
        conditions: from `choose_conditions` or one of its like.
        config: method, steps, guidance, seed; None: the checkpoint's own sample settings.
        tokenizer: the checkpoint's, where it is loaded already; None: as its record says.
        progress: told samples done and samples in all.
        say: told remarks, such as guidance of a model that never saw the null condition.

    Raises:
        EncoderMismatchError: the bank is of another encoder than the one trained on.
        ConfigError: rows of no class that the model knows; snippets for a model without memory; guidance without condition.
        MissingDependencyError: method "dopri5" without torchdiffeq.
    """
    wanted = config or checkpoint.config.sample
    remarks = check_request(bank, checkpoint, conditions, wanted)
    for remark in remarks:
        say(remark)
    batches = []
    for batch in draw(bank, checkpoint, conditions, wanted, np.arange(len(conditions)), tokenizer=tokenizer):
        batches.append(batch)
        progress(int(batch.places[-1]) + 1, len(conditions))
    nfe = max(batch.nfe for batch in batches)
    evaluations = sum(batch.evaluations for batch in batches)
    record = describe(bank, checkpoint, conditions, wanted) | cost(nfe, evaluations, len(conditions))
    images = np.concatenate([batch.images for batch in batches])
    return Samples(images=images, conditions=conditions, nfe=nfe, record=record | {"remarks": remarks})


def check_request(bank: Bank, checkpoint: LoadedCheckpoint, conditions: Conditions, config: SampleConfig) -> list[str]:
    """Return remarks on what was asked for; raises as `sample`, before anything is drawn."""
    conditioning.require_same_memory(bank, checkpoint.bank, f"the generator in {checkpoint.path}")
    _reader(bank, checkpoint, conditions)
    if checkpoint.model.config.condition == "class":
        conditioning.labels(bank, conditions.rows, checkpoint.classes)
    if config.guidance == 1.0:
        return []
    if checkpoint.config.model.condition == "none":
        raise ConfigError("this model has no condition (model.condition='none') to guide by: sample with --guidance 1")
    if checkpoint.config.train.null_probability == 0:
        return [
            "this model was trained without the null condition (train.null_probability=0), so guidance goes away from a "
            "prediction that it never learned, as the published model's does: if the images are poor, sample with --guidance 1"
        ]
    return []


def describe(bank: Bank, checkpoint: LoadedCheckpoint, conditions: Conditions, config: SampleConfig) -> dict[str, Any]:
    """Return what decides the samples and can be said before they are drawn, as a JSON object."""
    streams = conditions.streams
    return {
        **dataclasses.asdict(config),
        "num_images": len(conditions),
        "path": checkpoint.config.flow.path,
        "prediction": checkpoint.config.flow.prediction,
        "weights_step": checkpoint.step,
        "checkpoint": str(checkpoint.path),
        "tokenizer": checkpoint.tokenizer,
        "latent": dataclasses.asdict(checkpoint.model.latent),
        "device": str(next(checkpoint.model.parameters()).device),
        "label": conditions.label,
        "keys": conditions.keys,
        "conditions": dict(conditions.made),
        "noise": "sample i has stream i of the seed" if streams is None else [int(stream) for stream in streams],
        "bank": conditioning.record_of(bank),
        "trained_on": checkpoint.bank,
        "versions": versions(),
    }


def cost(nfe: int, evaluations: int, num_images: int) -> dict[str, Any]:
    """Return what drawing cost, for the record."""
    return {"nfe": nfe, "evaluations_per_image": round(evaluations / num_images, 3)}


def expected_nfe(config: SampleConfig) -> int | None:
    """Return how often a sample asks the network for a prediction; None where the solver decides on its way."""
    if config.method == "dopri5":
        return None
    if not config.is_sde:
        return config.num_steps * len(ode.TABLEAUX[config.method].b)
    last = config.last_step != "none"
    return (config.num_steps - last) * (2 if config.method == "sde-heun" else 1) + last


def _reader(bank: Bank, checkpoint: LoadedCheckpoint, conditions: Conditions) -> conditioning.Reader:
    if conditions.snippets is not None:
        return conditioning.snippet_reader(checkpoint.model, conditions.snippets)
    return conditioning.reader(bank, checkpoint.model, checkpoint.classes)


def draw(
    bank: Bank, checkpoint: LoadedCheckpoint, conditions: Conditions, config: SampleConfig, places: NDArray[np.int64],
    *, tokenizer: Tokenizer | None = None,
) -> Iterator[Drawn]:  # fmt: skip
    """Yield some of the samples that conditions ask for, batch by batch.

    Args:
        bank: as in `sample`.
        checkpoint: as in `sample`.
        conditions: all of them.
        config: how; checked by `check_request`.
        places: which samples; each is the same image whichever others are drawn.
        tokenizer: as in `sample`.
    """
    latent, device = checkpoint.model.latent, next(checkpoint.model.parameters()).device
    tokenizer = tokenizer or make_tokenizer(checkpoint.tokenizer, device=str(device))
    if (
        len(places) and tokenizer.name != PIXELS
    ):  # weights that are not to be had are told before minutes go into sampling
        tokenizer.decode(torch.zeros(1, latent.channels, latent.size, latent.size, device=device))
    reader = _reader(bank, checkpoint, conditions)
    streams = np.arange(len(conditions)) if conditions.streams is None else conditions.streams
    # an adaptive solver chooses its steps by the whole batch, so with it each image is a batch
    batch_size = 1 if config.method == "dopri5" else config.batch_size
    interval = (config.guidance_start, config.guidance_end) if config.guidance != 1.0 else (0.0, 1.0)

    def network(x_t: Tensor, t: Tensor, given: Tensor) -> Tensor:
        output: Tensor = reader.network(x_t, t.to(x_t), given)
        return output.float()

    for start in range(0, len(places), batch_size):
        batch = places[start : start + batch_size]
        noise = Noise((latent.channels, latent.size, latent.size), config.seed, streams[batch].tolist(), device)
        # one autocast around all steps keeps the weights that it has converted
        reduced = torch.autocast(
            device.type, DTYPES.get(config.precision, torch.bfloat16), enabled=config.precision in DTYPES
        )
        with torch.inference_mode(), reduced:
            given = reader.read(conditions.rows[batch], device)
            null = checkpoint.model.null_conditions(given)
            field = Guided(network, given, null, config.guidance, *interval)
            solution = solve(field, checkpoint.config.flow, config, noise.draw)
        with torch.inference_mode():
            images = tokenizer.decode(solution.x_1)
        yield Drawn(places=batch, images=images, nfe=solution.nfe, evaluations=field.num_points)


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
