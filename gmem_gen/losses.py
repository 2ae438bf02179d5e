"""Losses of a flow: squared error of what is predicted, cosine of the velocity, projection onto an encoder's tokens.

x_0 noise, x_1 data, x_t = α x_1 + σ x_0; g = (α̇/α)σ² − σσ̇; B batch, C·H·W latent, T tokens, P dimension of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from gmem_bank.errors import ConfigError, suggest
from gmem_gen.paths import Coefficients, coefficients, target_velocity
from gmem_gen.predictions import require_prediction, to_velocity
from gmem_gen.settings import FlowConfig

WEIGHTINGS = ("none", "velocity", "likelihood")


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The terms of a loss, each a scalar in float32, and their weighted sum."""

    total: Tensor
    mse: Tensor
    cosine: Tensor | None
    projection: Tensor | None


def weight_of(weighting: str, at: Coefficients) -> Tensor:
    """Return the weight of the squared error of noise: 1, (g/σ)² as for a velocity, or g/σ² as for the likelihood.

    Args:
        weighting: one of WEIGHTINGS.
        at: the path's coefficients.

    Raises:
        ConfigError: unknown weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ConfigError(
            f"unknown weighting {weighting!r} (there are: {', '.join(WEIGHTINGS)}).{suggest(weighting, WEIGHTINGS)}",
            key="flow.weighting",
        )
    if weighting == "velocity":
        return (at.strength / at.sigma).square()
    return at.strength / at.sigma.square() if weighting == "likelihood" else torch.ones_like(at.sigma)


def _at_least_float32(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def squared_errors(
    output: Tensor, x_0: Tensor, x_1: Tensor, x_t: Tensor, t: Tensor, *, path: str, prediction: str, weighting: str
) -> Tensor:
    """Return (B,) mean squared errors in float32.

    Velocity: of the velocity. Data: of the velocity that follows from it. Noise: weight·(output − x_0)². Score:
    weight·(σ·output + x_0)², which is the error of the noise that it stands for.

    Args:
        output: (B, …) what the network gave.
        x_0: (B, …) noise.
        x_1: (B, …) data.
        x_t: (B, …) what the network saw.
        t: (B,).
        path: one of PATHS.
        prediction: one of PREDICTIONS.
        weighting: one of WEIGHTINGS; "none" for velocity and data.

    Raises:
        ConfigError: unknown names, or a weighting where the error is already the velocity's.
    """
    at = coefficients(path, t, x_1)
    weight = weight_of(weighting, at)
    output = _at_least_float32(output)
    if require_prediction(prediction) in ("velocity", "data"):
        if weighting != "none":
            raise ConfigError(
                f"flow.weighting {weighting!r} is for predictions of noise or score; {prediction!r} is learned as a velocity",
                key="flow.weighting",
            )
        velocity = to_velocity(output, x_t, t, prediction, path)
        return (velocity - _target(x_0, x_1, x_t, t, path, prediction)).square().flatten(1).mean(1)
    error = output - x_0 if prediction == "noise" else at.sigma * output + x_0
    return (weight * error.square()).flatten(1).mean(1)


def _target(x_0: Tensor, x_1: Tensor, x_t: Tensor, t: Tensor, path: str, prediction: str) -> Tensor:
    """Return the velocity to learn; for predicted data the one that the true data gives, bounded near t = 1 as theirs is."""
    if prediction == "data":
        return to_velocity(x_1, x_t, t, prediction, path)
    return target_velocity(x_0, x_1, t, path)


def cosine_errors(velocity: Tensor, target: Tensor) -> Tensor:
    """Return (B,) means of 1 − cosine over the channels of each place of (B, C, …) velocities."""
    return (1 - functional.cosine_similarity(velocity, target, dim=1)).flatten(1).mean(1)


def projection_loss(projected: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean of −cosine between projected (B, T, P) and the encoder's (B, T, P) patch tokens (arXiv 2410.06940).

    Raises:
        ConfigError: shapes differ.
    """
    if projected.shape != tokens.shape:
        raise ConfigError(
            f"the projection has shape {tuple(projected.shape)}, the encoder's patch tokens {tuple(tokens.shape)}: "
            "model.projection_dim and the number of tokens must be the encoder's",
            key="model.projection_dim",
        )
    return -functional.cosine_similarity(projected.float(), tokens.float(), dim=-1).mean()


def flow_losses(
    output: Tensor, x_0: Tensor, x_1: Tensor, x_t: Tensor, t: Tensor, config: FlowConfig, *,
    projected: Tensor | None = None, tokens: Tensor | None = None,
) -> Losses:  # fmt: skip
    """Return the loss of a batch: squared error + cosine_weight·cosine + projection_weight·projection.

    Args:
        output: (B, …) what the network gave for x_t and t.
        x_0: (B, …) noise.
        x_1: (B, …) data.
        x_t: (B, …) point of the path.
        t: (B,).
        config: path, prediction (resolved), weighting and weights.
        projected: (B, T, P) of the projection head, or None.
        tokens: (B, T, P) of the encoder, given exactly where `projected` is.

    Raises:
        ConfigError: unknown names; projection without tokens or tokens without projection.
    """
    if (projected is None) != (tokens is None):
        raise ConfigError(
            "the projection loss needs the model's projection (model.projection_dim) and the encoder's patch tokens, both",
            key="model.projection_dim",
        )
    path, prediction = config.path, config.prediction
    total = mse = squared_errors(
        output, x_0, x_1, x_t, t, path=path, prediction=prediction, weighting=config.weighting
    ).mean()
    cosine = projection = None
    if config.cosine_weight:
        velocity = to_velocity(_at_least_float32(output), x_t, t, prediction, path)
        cosine = cosine_errors(velocity, _target(x_0, x_1, x_t, t, path, prediction)).mean()
        total = total + config.cosine_weight * cosine
    if projected is not None and tokens is not None:
        projection = projection_loss(projected, tokens)
        total = total + config.projection_weight * projection
    return Losses(total=total, mse=mse, cosine=cosine, projection=projection)
