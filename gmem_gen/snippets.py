"""Snippets as tensors: what training does to them, and how the factors of many go into one linear layer.

B batch, D snippet dimension, R rank, E width of the model; B basis, μ mean, c coefficients, s snippet, W weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmem_bank.errors import ConfigError
from gmem_gen.layers import ConditionProjection
from gmem_gen.model import Generator


def regularise(
    snippets: Tensor,
    *,
    null_probability: float,
    dropout: float,
    noise: float,
    null: Tensor,
    kept: Tensor,
    normals: Tensor,
) -> Tensor:
    """Return snippets as training sees them.

    First each sample is replaced by the null snippet (zeros) with `null_probability`, so that guidance has a null that
    the model knows; the others get Gaussian noise and then elementwise dropout with rescale (the random masking of arXiv
    2412.08781).

    Args:
        snippets: (B, D).
        null_probability: 0 to 1.
        dropout: share of elements set to zero; the rest is divided by 1 − dropout.
        noise: standard deviation relative to each snippet's root mean square.
        null: (B, 1) uniform in [0, 1), each sample's own.
        kept: (B, D) uniform in [0, 1), not looked at without dropout.
        normals: (B, D) standard normal, not looked at without noise.
    """
    result = snippets
    if noise:
        result = result + noise * snippets.square().mean(1, keepdim=True).sqrt() * normals
    if dropout:
        result = result * (kept >= dropout) / (1 - dropout)
    return result * (null >= null_probability)


def absorbed_projection(projection: ConditionProjection, basis: Tensor, mean: Tensor) -> ConditionProjection:
    """Return the projection that takes [c, 1]/‖s‖ and gives what `projection` gives for s/‖s‖ with s = c·B + μ.

    W·(Bᵀc + μ)/‖s‖ = [W·Bᵀ, W·μ]·[c, 1]/‖s‖, multiplied out in float64.

    Args:
        projection: from snippets (D,) to the width (E,); not changed.
        basis: (R, D).
        mean: (D,).

    Returns:
        A projection from (B, R + 1) to (B, E), with gradients off, on the device and in the dtype of the given one.
    """
    weight = projection.linear.weight.detach()
    wide = weight.cpu().double() * projection.scale
    merged = torch.cat([wide @ basis.double().T, (wide @ mean.double())[:, None]], dim=1)
    with torch.random.fork_rng(
        devices=[]
    ):  # a layer's own initial weights are drawn, and the caller's numbers are not ours
        absorbed = ConditionProjection(merged.shape[1], merged.shape[0], 1.0)
    with torch.no_grad():
        absorbed.linear.weight.copy_(merged)
        absorbed.linear.bias.copy_(projection.linear.bias)
    return absorbed.to(weight.device, weight.dtype).requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A network, and how the conditions it takes are read from a bank."""

    network: Generator
    read: Callable[[NDArray[np.int64], torch.device], Tensor]
    """Rows → (B, …) conditions."""
    numbers_per_row: int
    """How many numbers a row costs on its way to the device."""


def snippet_reader(model: Generator, snippets: NDArray[np.float32]) -> Reader:
    """Return how a model reads snippets that are in no bank: as they are, whatever kind of bank it was trained on.

    Args:
        model: with a memory.
        snippets: (K, D) in the space of that bank; rows are numbers of these.

    Raises:
        ConfigError: a model without memory, or snippets of another dimension.
    """
    if model.config.condition != "memory":
        raise ConfigError(
            f"this model has no memory (model.condition={model.config.condition!r}): it is drawn from by --concept or --key, not "
            "by an image, a text or arithmetic",
            key="model.condition",
        )
    if snippets.shape[1] != model.snippet_dim:
        raise ConfigError(f"the snippets have dimension {snippets.shape[1]}, the model takes {model.snippet_dim}")
    return Reader(
        network=model, read=lambda rows, device: torch.from_numpy(snippets[rows]).to(device),
        numbers_per_row=snippets.shape[1],
    )  # fmt: skip
