"""Solvers of the reverse SDE dx = (v + w·s) dt + √(2w) dW.

It has the same marginals as dx = v dt for any diffusion w(t) (arXiv 2401.08740, section 3).
x point, t time, h step; v velocity, s score; w diffusion; S steps, B batch, C·H·W latent; α, σ, g as in paths.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from gmem_bank.errors import ConfigError, suggest
from gmem_gen.choices import PUBLISHED_NAMES
from gmem_gen.ode import Solution
from gmem_gen.paths import Coefficients, coefficients
from gmem_gen.predictions import Dynamics

Diffusion = Callable[[Tensor, Coefficients, float], Tensor]
"""(t (B, 1, …), coefficients, norm) → w (B, 1, …), norm·w but for "decreasing"."""

DIFFUSIONS: dict[str, Diffusion] = {
    "constant": lambda t, _, norm: torch.full_like(t, norm),
    "SBDM": lambda _, at, norm: norm * at.strength,
    "sigma": lambda _, at, norm: norm * at.sigma,
    "linear": lambda t, _, norm: norm * (1 - t),
    "decreasing": lambda t, _, norm: 0.25 * (norm * torch.cos(math.pi * t) + 1).square(),
    "increasing-decreasing": lambda t, _, norm: norm * torch.sin(math.pi * t).square(),
}
"""The published forms of w."""
METHODS = ("sde-euler", "sde-heun")
LAST_STEPS = ("mean", "tweedie", "euler", "none")


def _require(word: str, known: tuple[str, ...], what: str, key: str) -> str:
    spelt = {name.casefold(): name for name in known}
    plain = PUBLISHED_NAMES.get(word.casefold(), word.casefold())
    if plain not in spelt:
        raise ConfigError(f"unknown {what} {word!r} (there are: {', '.join(known)}).{suggest(plain, known)}", key=key)
    return spelt[plain]


def diffusion_at(form: str, t: Tensor, like: Tensor, path: str, norm: float = 1.0) -> Tensor:
    """Return w at (B,) times, shaped (B, 1, …) as `like` (B, …); raises ConfigError for an unknown form."""
    name = _require(form, tuple(DIFFUSIONS), "diffusion", "sample.diffusion")
    expanded = t.to(like).view(-1, *([1] * (like.ndim - 1)))
    return DIFFUSIONS[name](expanded, coefficients(path, t, like), norm)


def solve_sde(
    dynamics: Dynamics,
    x_0: Tensor,
    times: Tensor,
    *,
    draw: Callable[[int], Tensor],
    method: str = "sde-heun",
    path: str = "linear",
    diffusion: str = "linear",
    diffusion_norm: float = 1.0,
    last_step: str = "mean",
    last_step_size: float = 0.004,
) -> Solution:
    """Integrate the reverse SDE, and end with a step without noise.

    Every distinct (x, t) is evaluated once: Euler–Maruyama takes one evaluation a step, Heun two, a last step one.

    Args:
        dynamics: velocity and score of one evaluation.
        x_0: (B, …) start.
        times: (S + 1,) increasing times on the CPU, one a step.
        draw: step number → (B, …) standard normal numbers, asked once a step, in order.
        method: one of METHODS.
        path: one of PATHS.
        diffusion: one of DIFFUSIONS.
        diffusion_norm: factor on it.
        last_step: after the steps, at the last time: "mean" goes on along v + w·s without noise, "euler" along v, both for
            `last_step_size`; "tweedie" gives the expected data E[x_1 | x] = (x + σ²·s)/α (Efron 2011); "none" ends there.
        last_step_size: h of the last step.

    Raises:
        ConfigError: unknown names.
    """
    heun = _require(method, METHODS, "SDE method", "sample.method") == "sde-heun"
    last = _require(last_step, LAST_STEPS, "last step", "sample.last_step")

    def strength(x: Tensor, t: Tensor) -> Tensor:
        return diffusion_at(diffusion, t, x, path, diffusion_norm)

    def drift(x: Tensor, t: Tensor) -> Tensor:
        velocity, score = dynamics(x, t)
        return velocity + strength(x, t) * score

    x = x_0
    for step, (start, end) in enumerate(pairwise(times)):
        h, t, t_next = (end - start).item(), start.expand(len(x)), end.expand(len(x))
        kick = (2 * strength(x, t)).sqrt() * math.sqrt(h) * draw(step)
        if not heun:
            x = x + h * drift(x, t) + kick
            continue
        shaken = x + kick  # the noise first, then Heun's step of the drift from where it led
        slope = drift(shaken, t)
        x = shaken + 0.5 * h * (slope + drift(shaken + h * slope, t_next))
    nfe = (len(times) - 1) * (2 if heun else 1)
    if last == "none":
        return Solution(x_1=x, nfe=nfe)
    t = times[-1].expand(len(x))
    velocity, score = dynamics(x, t)
    if last == "mean":
        x = x + last_step_size * (velocity + strength(x, t) * score)
    elif last == "euler":
        x = x + last_step_size * velocity
    else:
        at = coefficients(path, t, x)
        x = (x + at.sigma.square() * score) / at.alpha
    return Solution(x_1=x, nfe=nfe + 1)
