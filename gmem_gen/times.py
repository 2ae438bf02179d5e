"""Times: where a path may be used, how training draws them, the grids that solvers walk.

t 0 noise, 1 data; S steps, B batch; ε how far from an end a path is left where it is singular there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gmem_bank.errors import ConfigError
from gmem_gen.sample_settings import SampleConfig
from gmem_gen.settings import FlowConfig

EPSILON = 1e-3
VP_TRAIN_EPSILON = 1e-5


def usable_interval(path: str, prediction: str, epsilon: float = EPSILON) -> tuple[float, float]:
    """Return the first and the last t at which a prediction on a path gives a velocity.

    Velocity and data on the linear and GVP paths: all of 0 to 1. Noise and score there: x_t holds no data at 0 and no noise
    at 1, so from ε to 1 − ε. VP: σ̇ is infinite at 1, so from 0 to 1 − ε.
    """
    if path == "vp":
        return 0.0, 1 - epsilon
    return (epsilon, 1 - epsilon) if prediction in ("noise", "score") else (0.0, 1.0)


def training_interval(path: str, prediction: str) -> tuple[float, float]:
    """Return the interval that training draws its times from."""
    return usable_interval(path, prediction, VP_TRAIN_EPSILON if path == "vp" else EPSILON)


def sde_interval(path: str, prediction: str, config: SampleConfig, epsilon: float = EPSILON) -> tuple[float, float]:
    """Return where the SDE's steps begin and end; a last step, where there is one, goes on from there to 1.

    The diffusion "SBDM" is infinite at t = 0 on the linear and GVP paths, so it begins at ε. Without a last step Heun's method
    needs the score at the end, which is infinite at 1, and stops at 1 − ε; Euler–Maruyama never looks there.
    """
    start, end = usable_interval(path, prediction, epsilon)
    if config.diffusion == "SBDM" and path != "vp":
        start = epsilon
    if config.last_step != "none":
        return start, 1 - config.last_step_size
    return start, min(end, 1 - epsilon) if config.method == "sde-heun" else end


def draw_times(config: FlowConfig, count: int, generator: torch.Generator) -> Tensor:
    """Return (B,) training times: uniform, or with logit(t) ~ N(mean, std²) (arXiv 2403.03206), inside the usable interval."""
    draw = torch.randn if needs_normals(config) else torch.rand
    return place_times(config, draw(count, generator=generator))


def needs_normals(config: FlowConfig) -> bool:
    """Return whether times are made from standard normal numbers, instead of uniform ones."""
    return config.time_sampling == "logit-normal"


def place_times(config: FlowConfig, draws: Tensor) -> Tensor:
    """Return (B,) training times made from (B,) random numbers, normal or uniform as `needs_normals` says."""
    inside = logistic_normal(draws, config.time_mean, config.time_std) if needs_normals(config) else draws
    start, end = training_interval(config.path, config.prediction)
    return inside * (end - start) + start


def logistic_normal(normals: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Return t = 1/(1 + exp(−(mean + std·n))) for standard normal n."""
    return torch.sigmoid(mean + std * normals)


def time_grid(num_steps: int, shift: float = 1.0, start: float = 0.0, end: float = 1.0) -> Tensor:
    """Return (S + 1,) times of S steps.

    Args:
        num_steps: S.
        shift: s of t ← s·t / (1 + (s − 1)·t) (arXiv 2403.03206); 1 is equally spaced, below 1 is denser near the noise. An
            end inside 0 to 1 is moved like any other time.
        start: the first, before the shift.
        end: the last, before the shift.

    Raises:
        ConfigError: no step, or a shift that is not positive.
    """
    if not shift > 0:
        raise ConfigError(f"timestep shift must be positive, got {shift}", key="timestep_shift")
    if num_steps < 1:
        raise ConfigError(f"steps must be at least 1, got {num_steps}", key="steps")
    t = torch.linspace(start, end, num_steps + 1)
    return shift * t / (1 + (shift - 1) * t)
