"""Paths from noise to data: x_t = α(t)·x_1 + σ(t)·x_0 (arXiv 2303.08797; 2401.08740, section 2).

t 0 noise, 1 data; α, σ the weights of data x_1 and noise x_0; α̇, σ̇ their derivatives by t; B batch, C·H·W latent.
The velocity is v = α̇ x_1 + σ̇ x_0. Forwards in t the path is also that of a diffusion, whose drift is (α̇/α)·x_t and whose
squared strength is 2·g with g = (α̇/α)·σ² − σ·σ̇.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gmem_bank.errors import ConfigError, suggest

BETA_MIN, BETA_MAX = 0.1, 20.0
"""β of the variance-preserving path at t = 1 and t = 0 (arXiv 2011.13456)."""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """α, σ and their derivatives at the times of a batch, all of one shape."""

    alpha: Tensor
    sigma: Tensor
    d_alpha: Tensor
    d_sigma: Tensor

    @property
    def growth(self) -> Tensor:
        """α̇/α, infinite where α is 0."""
        return self.d_alpha / self.alpha

    @property
    def strength(self) -> Tensor:
        """G = (α̇/α)·σ² − σ·σ̇: half the squared strength of the diffusion that has this path."""
        return self.growth * self.sigma.square() - self.sigma * self.d_sigma


def linear(t: Tensor) -> Coefficients:
    """Return α = t, σ = 1 − t (arXiv 2209.03003, 2210.02747)."""
    one = torch.ones_like(t)
    return Coefficients(alpha=t, sigma=1 - t, d_alpha=one, d_sigma=-one)


def gvp(t: Tensor) -> Coefficients:
    """Return α = sin(πt/2), σ = cos(πt/2): general variance preserving."""
    angle = t * (math.pi / 2)
    sine, cosine = angle.sin(), angle.cos()
    return Coefficients(alpha=sine, sigma=cosine, d_alpha=cosine * (math.pi / 2), d_sigma=-sine * (math.pi / 2))


def vp(t: Tensor) -> Coefficients:
    """Return α = exp(m), σ = √(1 − α²) with m = −¼(1−t)²(β_max − β_min) − ½(1−t)β_min (arXiv 2011.13456, eq. 33)."""
    s = 1 - t
    m = -0.25 * s.square() * (BETA_MAX - BETA_MIN) - 0.5 * s * BETA_MIN
    d_m = 0.5 * s * (BETA_MAX - BETA_MIN) + 0.5 * BETA_MIN
    alpha = m.exp()
    sigma = (-torch.expm1(2 * m)).sqrt()
    return Coefficients(alpha=alpha, sigma=sigma, d_alpha=alpha * d_m, d_sigma=-alpha.square() * d_m / sigma)


PATHS: dict[str, Callable[[Tensor], Coefficients]] = {"linear": linear, "gvp": gvp, "vp": vp}


def require_path(name: str) -> Callable[[Tensor], Coefficients]:
    """Return a path by its name, in any case; raises ConfigError with a suggestion."""
    if name.casefold() not in PATHS:
        raise ConfigError(
            f"unknown path {name!r} (there are: {', '.join(PATHS)}).{suggest(name.casefold(), PATHS)}", key="flow.path"
        )
    return PATHS[name.casefold()]


def coefficients(path: str, t: Tensor, like: Tensor) -> Coefficients:
    """Return a path's coefficients at (B,) times, shaped (B, 1, …), on the device and in the dtype of `like` (B, …)."""
    return require_path(path)(t.to(like).view(-1, *([1] * (like.ndim - 1))))


def interpolant(x_0: Tensor, x_1: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """Return x_t = α·x_1 + σ·x_0 for noise x_0 and data x_1 (B, …) and times (B,)."""
    at = coefficients(path, t, x_1)
    return at.alpha * x_1 + at.sigma * x_0


def target_velocity(x_0: Tensor, x_1: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """Return v = α̇·x_1 + σ̇·x_0; arguments as in `interpolant`."""
    at = coefficients(path, t, x_1)
    return at.d_alpha * x_1 + at.d_sigma * x_0
