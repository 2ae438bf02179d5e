"""What a model costs: parameters, and floating-point operations for an image.

T tokens, E width, H hidden width of the MLP, D snippet dimension, P patch side, C channels; a multiply and an add are two
operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gmem_gen.layers import PROJECTION_WIDTH, TIME_FREQUENCIES
from gmem_gen.model import Generator, LatentShape
from gmem_gen.presets import IMAGENET_CLASSES, MODEL_PRESETS, class_conditional, unconditional


def num_parameters(model: nn.Module, *, sampling: bool = False) -> int:
    """Return the number of trained parameters; with `sampling` without the projection head, which only training uses."""
    return sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if not (sampling and name.startswith("projector."))
    )


def flops_per_image(model: Generator, *, training: bool = False) -> int:
    """Return the operations of one evaluation for one image, by its matrix products (norms and activations left out).

    Args:
        model: may be on the meta device.
        training: with the projection head; forward only.
    """
    config, T, E = model.config, model.grid**2, model.config.width
    pixels = model.patch_size**2 * model.latent.channels
    hidden = int(E * config.mlp_ratio)
    mlp = 3 * E * int(2 / 3 * hidden) if config.use_swiglu else 2 * E * hidden
    block = T * (4 * E * E + 2 * T * E + mlp) + (6 if config.use_shift else 4) * E * E
    condition = 2 * TIME_FREQUENCIES * E + E * E + (model.snippet_dim * E if config.condition == "memory" else 0)
    ends = 2 * T * pixels * E + 2 * E * E
    head = T * PROJECTION_WIDTH * (E + PROJECTION_WIDTH + config.projection_dim) if config.projection_dim else 0
    return 2 * (config.depth * block + condition + ends + (head if training else 0))


def describe(image_size: int, channels: int, dim: int, condition: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Return one record a preset, and the names of those whose patch does not divide the image.

    Args:
        image_size: side of what is drawn.
        channels: of what is drawn.
        dim: of a snippet.
        condition: "memory", "class" (1000 classes) or "none".
    """
    rows, left_out = [], []
    for name, make in MODEL_PRESETS.items():
        config = make()
        if condition != "memory":
            config = class_conditional(config, IMAGENET_CLASSES) if condition == "class" else unconditional(config)
        if config.patch_size and image_size % config.patch_size:
            left_out.append(name)
            continue
        with torch.device("meta"):
            model = Generator(config, LatentShape(channels=channels, size=image_size), dim)
        rows.append({
            "name": name, "condition": condition, "width": config.width, "depth": config.depth,
            "heads": config.num_heads, "patch": model.patch_size, "tokens": model.grid**2,
            "parameters": num_parameters(model), "flops": flops_per_image(model),
        })  # fmt: skip
    return rows, left_out
