"""What a network may predict, and how to turn one prediction into another.

x_t = α x_1 + σ x_0; velocity v = α̇ x_1 + σ̇ x_0; noise x_0; score s = −x_0/σ, the gradient of log p(x_t) (arXiv 2401.08740,
eq. 7); data x_1; u, w the weights of a prediction and of x_t in another prediction. Shapes: B batch, C·H·W latent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gmem_bank.errors import ConfigError, suggest
from gmem_gen.paths import Coefficients, coefficients

Field = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), t (B,) on the CPU) → prediction (B, C, H, W)."""
Dynamics = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x_t, t) → velocity and score, from one evaluation of the network."""

PREDICTIONS = ("velocity", "noise", "score", "data")
LAST_STRETCH = 0.05
"""1 − t is taken to be at least this where a predicted clean image is turned into a velocity: the quotient blows up at
t = 1 (arXiv 2511.13720 trains so)."""


def require_prediction(name: str) -> str:
    """Return a prediction's name; raises ConfigError with a suggestion."""
    if name not in PREDICTIONS:
        raise ConfigError(
            f"unknown prediction {name!r} (there are: {', '.join(PREDICTIONS)}).{suggest(name, PREDICTIONS)}",
            key="flow.prediction",
        )
    return name


def _row(prediction: str, at: Coefficients) -> tuple[Tensor, Tensor]:
    """Return the weights (a, b) with which x_1 and x_0 make up a prediction."""
    one, zero = torch.ones_like(at.alpha), torch.zeros_like(at.alpha)
    return {"velocity": (at.d_alpha, at.d_sigma), "noise": (zero, one), "data": (one, zero)}[prediction]


def convert(value: Tensor, x_t: Tensor, at: Coefficients, source: str, target: str) -> Tensor:
    """Return what a prediction says about another one: each of the four into each.

    Two of (prediction, x_t) are two linear equations for (x_1, x_0): with source a x_1 + b x_0 and target c x_1 + d x_0 the
    target is u·value + w·x_t, where u = (cσ − dα)/(aσ − bα) and w = (ad − bc)/(aσ − bα).

    Args:
        value: (B, …) the prediction.
        x_t: (B, …) the point.
        at: the path's coefficients at the times of the batch, from `coefficients`.
        source: what `value` is: velocity, noise, score or data.
        target: what is wanted.

    Returns:
        (B, …). Not finite where x_t holds nothing of what is asked for: data or velocity from noise or score where α = 0,
        noise or velocity from data where σ = 0, scores where σ = 0.

    Raises:
        ConfigError: unknown names.
    """
    if require_prediction(source) == require_prediction(target):
        return value
    if target == "velocity" and source in ("noise", "score"):
        # near t = 0 both terms are large and cancel; an adaptive solver notices how they are rounded
        score = value if source == "score" else value / -at.sigma
        return at.growth * x_t + at.strength * score
    if source == "score":
        return convert(-at.sigma * value, x_t, at, "noise", target)
    if target == "score":
        return -convert(value, x_t, at, source, "noise") / at.sigma
    (a, b), (c, d) = _row(source, at), _row(target, at)
    determinant = a * at.sigma - b * at.alpha
    u = (c * at.sigma - d * at.alpha) / determinant
    w = (a * d - b * c) / determinant
    return u * value + w * x_t


def to_velocity(output: Tensor, x_t: Tensor, t: Tensor, prediction: str, path: str = "linear") -> Tensor:
    """Return the velocity that a network's output stands for.

    Args:
        output: (B, C, H, W) from the network.
        x_t: (B, C, H, W) what it saw.
        t: (B,).
        prediction: one of PREDICTIONS; for "data" the coefficients are those at t ≤ 0.95, so that on the linear path
            v = (output − x_t) / max(1 − t, 0.05).
        path: one of PATHS.
    """
    if prediction == "velocity":
        return output
    if prediction == "data" and path == "linear":  # in one difference: u·output + w·x_t rounds twice
        return (output - x_t) / coefficients(path, t, x_t).sigma.clamp(min=LAST_STRETCH)
    when = t.clamp(max=1 - LAST_STRETCH) if prediction == "data" else t
    return convert(output, x_t, coefficients(path, when, x_t), prediction, "velocity")


def velocity_field(network: Field, prediction: str, path: str) -> Field:
    """Return the velocity of a network as a field, which is all that an ODE needs."""
    require_prediction(prediction)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return to_velocity(network(x, t), x, t, prediction, path)

    return velocity


def dynamics(network: Field, prediction: str, path: str) -> Dynamics:
    """Return velocity and score of a network, which an SDE needs: both from one output, not from two evaluations.

    Of predicted data only the velocity is bounded near t = 1: the score of a bounded velocity would pull too weakly, and
    samples end away from the data however many steps are taken. (Solvers never ask at t = 1, where σ is 0.)
    """
    require_prediction(prediction)

    def both(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        output, at = network(x, t), coefficients(path, t, x)
        return to_velocity(output, x, t, prediction, path), convert(output, x, at, prediction, "score")

    return both
