"""Optimizer, learning rate, scaling of gradients and averaged weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gmem_gen.config import TrainConfig


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return AdamW over all parameters (Loshchilov & Hutter 2019, arXiv 1711.05101)."""
    return torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        weight_decay=config.weight_decay,
        fused=config.adamw == "fused",
        foreach=config.adamw == "foreach",
    )


def make_scaler(device: torch.device, config: TrainConfig) -> torch.amp.GradScaler:
    """Return what keeps the gradients of fp16 within its range; without fp16 it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of a step (0-based): linear warm-up, then constant or cosine to 0 at `total_steps`."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.schedule == "constant":
        return config.learning_rate * warm
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, max(0, step - config.warmup_steps) / span)
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))


def make_average(model: nn.Module, decay: float, *, warmup: bool = True) -> AveragedModel:
    """Return the exponential moving average of a model's weights.

    Args:
        model: followed.
        decay: of the average.
        warmup: approach the decay from below as (1 + n) / (10 + n) after n updates, so that short trainings average what
            they can; False: start at the model's weights as they are now and decay at once, as published.
    """

    def update(averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        n = int(count)
        weight = 1.0 - (min(decay, (1 + n) / (10 + n)) if warmup else decay)
        torch._foreach_lerp_(list(averaged), list(current), weight)

    average = AveragedModel(model, multi_avg_fn=update)
    if not warmup:
        average.update_parameters(model)  # the first update copies
    return average


def make_averages(model: nn.Module, config: TrainConfig) -> dict[str, AveragedModel]:
    """Return an average for each decay of `train.ema_decay`, by name: "ema" the first, "ema-<decay>" the others."""
    names = ["ema", *(f"ema-{decay!r}" for decay in config.ema_decay[1:])]
    return {
        name: make_average(model, decay, warmup=config.ema_warmup)
        for name, decay in zip(names, config.ema_decay, strict=True)
    }
