"""Model sizes and the settings that go with them, as functions."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial

from gmem_bank.errors import ConfigError, suggest
from gmem_gen.config import Config, ModelConfig, TrainConfig

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
"""Width, depth and heads, as in DiT (arXiv 2212.09748)."""
PATCHES = (1, 2, 4)
IMAGENET_CLASSES = 1000


def nano() -> ModelConfig:
    """Return the smallest model, for a CPU."""
    return ModelConfig(
        width=128, depth=4, num_heads=4, mlp_ratio=3.0
    )  # SwiGLU hidden 256; 4.0 gives an odd 341, 1.3 times slower


def mini() -> ModelConfig:
    """Return a small model, for a patient CPU or a small GPU."""
    return ModelConfig(width=256, depth=8, num_heads=8, mlp_ratio=3.0)


def lightningdit(size: str, patch_size: int = 0) -> ModelConfig:
    """Return LightningDiT (arXiv 2501.01423): RMSNorm, SwiGLU, rotary positions.

    Args:
        size: one of SIZES: S, B, L, XL.
        patch_size: side of a patch; 0: chosen by the image.

    Raises:
        ConfigError: unknown size.
    """
    if size not in SIZES:
        raise ConfigError(f"unknown size {size!r} (there are: {', '.join(SIZES)}).{suggest(size, SIZES)}", key=size)
    width, depth, num_heads = SIZES[size]
    return ModelConfig(width=width, depth=depth, num_heads=num_heads, patch_size=patch_size)


def sit(size: str, patch_size: int = 0) -> ModelConfig:
    """Return SiT (arXiv 2401.08740): LayerNorm, GELU, no rotary positions; arguments as `lightningdit`."""
    return dataclasses.replace(lightningdit(size, patch_size), use_rmsnorm=False, use_swiglu=False, use_rope=False)


def class_conditional(model: ModelConfig, num_classes: int = 0) -> ModelConfig:
    """Return the baseline without memory: a label embedding in place of snippets; 0 classes: the bank's concepts."""
    return dataclasses.replace(model, condition="class", num_classes=num_classes)


def unconditional(model: ModelConfig) -> ModelConfig:
    """Return the model without any condition."""
    return dataclasses.replace(model, condition="none")


def _named() -> dict[str, Callable[[], ModelConfig]]:
    table: dict[str, Callable[[], ModelConfig]] = {"nano": nano, "mini": mini}
    table |= {size: partial(lightningdit, size) for size in SIZES}
    for (family, make), size, patch in itertools.product(
        (("LightningDiT", lightningdit), ("SiT", sit)), SIZES, PATCHES
    ):
        table[f"{family}-{size}/{patch}"] = partial(make, size, patch)
    return table


MODEL_PRESETS: dict[str, Callable[[], ModelConfig]] = _named()
"""nano and mini for a CPU; S, B, L, XL: LightningDiT with a patch chosen by the image; "LightningDiT-XL/1", "SiT-B/2", …."""
VARIANTS: dict[str, Callable[[ModelConfig], ModelConfig]] = {"class": class_conditional, "none": unconditional}
"""What may follow a name after a colon: "SiT-B/2:class"."""


def preset(name: str) -> Config:
    """Return a full configuration for a model size.

    Args:
        name: one of MODEL_PRESETS, with ":class" or ":none" after it for the baselines without memory. From S on, training
            uses bf16, batches of 256, the published learning rate 2e-4 and 1000 steps of warm-up.

    Raises:
        ConfigError: unknown name.
    """
    size, colon, variant = name.partition(":")
    if size not in MODEL_PRESETS:
        short = [known for known in MODEL_PRESETS if "/" not in known]
        raise ConfigError(
            f"unknown preset {name!r} (there are: {', '.join(short)}, and such as 'LightningDiT-B/2' and 'SiT-XL/1:class', see "
            f"'gmem-gen models').{suggest(size, MODEL_PRESETS)}",
            key=name,
        )
    if colon and variant not in VARIANTS:
        raise ConfigError(
            f"unknown variant {variant!r} of preset {size!r} (there are: {', '.join(VARIANTS)}).{suggest(variant, VARIANTS)}",
            key=name,
        )
    model = MODEL_PRESETS[size]()
    model = VARIANTS[variant](model) if colon else model
    if size in ("nano", "mini"):
        return Config(model=model)
    return Config(
        model=model, train=TrainConfig(learning_rate=2e-4, warmup_steps=1000, precision="bf16", batch_size=256)
    )
