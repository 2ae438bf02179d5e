"""Solvers of dx/dt = v(x, t): explicit Runge–Kutta methods on a grid, and an adaptive one.

S steps, B batch, C·H·W latent; k slopes, h step; NFE evaluations of v.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gmem_bank.errors import ConfigError, MissingDependencyError, suggest
from gmem_gen.predictions import Field


@dataclass(frozen=True, kw_only=True)
class Solution:
    """Where an ODE or SDE ended, and what it cost."""

    x_1: Tensor
    nfe: int
    """Evaluations of the field."""


@dataclass(frozen=True, kw_only=True)
class Tableau:
    """An explicit Runge–Kutta method (Butcher 1964): slope i is taken at x + h·Σ a_ij k_j, the step is h·Σ b_i k_i."""

    a: tuple[tuple[float, ...], ...] = ()
    """Weights of earlier slopes for the second slope on; their sum is the place of the slope in the step."""
    b: tuple[float, ...]


TABLEAUX = {
    "euler": Tableau(b=(1.0,)),
    "heun": Tableau(a=((1.0,),), b=(1 / 2, 1 / 2)),
    "midpoint": Tableau(a=((1 / 2,),), b=(0.0, 1.0)),
    "heun3": Tableau(a=((1 / 3,), (0.0, 2 / 3)), b=(1 / 4, 0.0, 3 / 4)),
    "rk4": Tableau(a=((1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), b=(1 / 8, 3 / 8, 3 / 8, 1 / 8)),
}
"""Orders 1, 2, 2, 3 and 4; rk4 is Kutta's 3/8 rule, heun the explicit trapezoid."""
METHODS = (*TABLEAUX, "dopri5")


def solve_ode(
    field: Field, x_0: Tensor, times: Tensor, method: str, *, rtol: float = 1e-3, atol: float = 1e-6,
    overshoot: bool = True,
) -> Solution:  # fmt: skip
    """Integrate dx/dt = field(x, t).

    Args:
        field: the velocity.
        x_0: (B, …) start.
        times: (S + 1,) increasing times on the CPU, one a step; "dopri5" looks at the first and the last only.
        method: one of METHODS.
        rtol: relative tolerance of "dopri5".
        atol: absolute tolerance of "dopri5".
        overshoot: let "dopri5" step past the last time and interpolate back, which evaluates the field there.

    Raises:
        ConfigError: unknown method.
        MissingDependencyError: "dopri5" without torchdiffeq.
    """
    if method == "dopri5":
        return _dopri5(field, x_0, times, rtol, atol, overshoot)
    if method not in TABLEAUX:
        raise ConfigError(
            f"unknown ODE method {method!r} (there are: {', '.join(METHODS)}).{suggest(method, METHODS)}",
            key="sample.method",
        )
    tableau, x = TABLEAUX[method], x_0
    for start, end in pairwise(times):
        x = x + _step(tableau, field, x, start, end)
    return Solution(x_1=x, nfe=len(tableau.b) * (len(times) - 1))


def _step(tableau: Tableau, field: Field, x: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return how far one step goes."""
    h = (end - start).item()
    slopes = [field(x, start.expand(len(x)))]
    for weights in tableau.a:
        place = sum(weights)
        # the end of a step is the time of the grid itself, not its sum with a rounded length
        when = end if place == 1.0 else start + place * (end - start)
        slopes.append(field(x + h * _combine(weights, slopes), when.expand(len(x))))
    return h * _combine(tableau.b, slopes)


def _combine(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    terms = [weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight]
    return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]


def _dopri5(field: Field, x_0: Tensor, times: Tensor, rtol: float, atol: float, overshoot: bool) -> Solution:
    """Dormand–Prince 5(4) by torchdiffeq; the tolerance is for the root mean square over the whole batch."""
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise MissingDependencyError(
            "method 'dopri5' needs torchdiffeq: pip install 'gmem[train]', or choose another method such as 'heun'"
        ) from error
    nfe = 0

    def slope(t: Tensor, x: Tensor) -> Tensor:
        nonlocal nfe
        nfe += 1
        return field(x, t.cpu().expand(len(x)))

    ends = times[[0, -1]].to(x_0.device)
    # tolerances of one element each are float64 tensors, so that the error is compared in float64, as the published code does
    options = {} if overshoot else {"step_t": ends[1:]}
    x_1: Tensor = odeint(slope, x_0, ends, rtol=[rtol], atol=[atol], method="dopri5", options=options)[-1]
    return Solution(x_1=x_1, nfe=nfe)
