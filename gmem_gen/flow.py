"""Flow matching on the linear path: x_t = t·x_1 + (1 − t)·x_0, velocity v = x_1 − x_0 (arXiv 2210.02747, 2209.03003).

t = 0 is noise, t = 1 is data. Shapes: B batch, C·H·W latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gmem_bank.errors import ConfigError
from gmem_gen.config import FlowConfig

Field = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), t (B,)) → velocity (B, C, H, W)."""


def expand(t: Tensor, like: Tensor) -> Tensor:
    """Return (B,) times shaped to multiply `like` (B, …)."""
    return t.view(-1, *([1] * (like.ndim - 1)))


def interpolant(x_0: Tensor, x_1: Tensor, t: Tensor) -> Tensor:
    """Return x_t = t·x_1 + (1 − t)·x_0."""
    weight = expand(t, x_1)
    return weight * x_1 + (1 - weight) * x_0


def target_velocity(x_0: Tensor, x_1: Tensor) -> Tensor:
    """Return x_1 − x_0."""
    return x_1 - x_0


def velocity_to_data(velocity: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return x_1 = x_t + (1 − t)·v."""
    return x_t + (1 - expand(t, x_t)) * velocity


def data_to_velocity(x_1: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Return v = (x_1 − x_t) / (1 − t), for t < 1."""
    return (x_1 - x_t) / (1 - expand(t, x_t))


LAST_STRETCH = 0.05
"""1 − t is taken to be at least this where a clean image is turned into a velocity: the quotient blows up at t = 1
(arXiv 2511.13720 trains so)."""


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: str) -> Tensor:
    """Return the velocity that a network's output stands for.

    Args:
        output: (B, C, H, W) from the network.
        x_t: (B, C, H, W) what it saw.
        t: (B,).
        prediction: "velocity": the output itself; "data": (output − x_t) / max(1 − t, 0.05).
    """
    assert prediction in ("velocity", "data"), prediction  # "auto" is resolved before training
    if prediction == "velocity":
        return output
    return (output - x_t) / (1 - expand(t, x_t)).clamp(min=LAST_STRETCH)


def draw_times(config: FlowConfig, count: int, generator: torch.Generator) -> Tensor:
    """Return (B,) training times in (0, 1): uniform, or with logit(t) ~ N(mean, std²) (arXiv 2403.03206)."""
    if config.time_sampling == "uniform":
        return torch.rand(count, generator=generator)
    return torch.sigmoid(config.time_mean + config.time_std * torch.randn(count, generator=generator))


def velocity_loss(predicted: Tensor, x_0: Tensor, x_1: Tensor) -> Tensor:
    """Return the mean squared error of the velocity, a scalar in float32."""
    return (predicted.float() - target_velocity(x_0, x_1)).square().mean()


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Where an ODE ended, and what it cost."""

    x_1: Tensor
    nfe: int
    """Evaluations of the field."""


def euler(field: Field, x_0: Tensor, times: Tensor) -> Solution:
    """Integrate dx/dt = field(x, t) with Euler's method (order 1).

    Args:
        field: the velocity.
        x_0: (B, C, H, W) start.
        times: (S+1,) increasing times for S steps.
    """
    x = x_0
    for start, end in pairwise(times):
        x = x + (end - start) * field(x, start.expand(len(x)))
    return Solution(x_1=x, nfe=len(times) - 1)


def heun(field: Field, x_0: Tensor, times: Tensor) -> Solution:
    """Integrate dx/dt = field(x, t) with Heun's method (explicit trapezoid, order 2); arguments as in `euler`."""
    x = x_0
    for start, end in pairwise(times):
        slope = field(x, start.expand(len(x)))
        guess = x + (end - start) * slope
        x = x + (end - start) * 0.5 * (slope + field(guess, end.expand(len(x))))
    return Solution(x_1=x, nfe=2 * (len(times) - 1))


SOLVERS: dict[str, Callable[[Field, Tensor, Tensor], Solution]] = {"euler": euler, "heun": heun}


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """Return (num_steps + 1,) times from 0 to 1.

    Args:
        num_steps: steps between them.
        shift: s of t ← s·t / (1 + (s − 1)·t) (arXiv 2403.03206); 1 is equally spaced, below 1 is denser near the noise.

    Raises:
        ConfigError: no step, or a shift that is not positive.
    """
    if not shift > 0:
        raise ConfigError(f"timestep shift must be positive, got {shift}", key="timestep_shift")
    if num_steps < 1:
        raise ConfigError(f"steps must be at least 1, got {num_steps}", key="steps")
    t = torch.linspace(0.0, 1.0, num_steps + 1)
    return shift * t / (1 + (shift - 1) * t)


def guided(
    model: Callable[[Tensor, Tensor, Tensor], Tensor], snippets: Tensor, scale: float, start: float, end: float
) -> Field:
    """Return the field null + scale·(conditional − null) where start ≤ t ≤ end (arXiv 2207.12598, 2404.07724).

    Before the interval the conditional velocity is used and after it the null one, as the published model does; only the
    half that is used is computed.

    Args:
        model: (x_t, t, snippets) → velocity.
        snippets: (B, D) conditions.
        scale: 1 is no guidance; 0 is the null snippet only.
        start: first t of the interval.
        end: last t of the interval.
    """

    def field(x: Tensor, t: Tensor) -> Tensor:
        now = float(t[0])  # a solver moves the whole batch together
        if scale == 1.0 or now < start:
            return model(x, t, snippets)
        if now > end:
            return model(x, t, torch.zeros_like(snippets))
        doubled = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([snippets, torch.zeros_like(snippets)]))
        conditional, null = doubled.chunk(2)
        return null + scale * (conditional - null)

    return field
