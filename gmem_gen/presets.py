"""Model sizes and the settings that go with them, as functions."""

from __future__ import annotations

from collections.abc import Callable

from gmem_bank.errors import ConfigError, suggest
from gmem_gen.config import Config, ModelConfig, TrainConfig


def _nano() -> ModelConfig:
    return ModelConfig(
        width=128, depth=4, num_heads=4, mlp_ratio=3.0
    )  # SwiGLU hidden 256; 4.0 gives an odd 341, 1.3 times slower


def _mini() -> ModelConfig:
    return ModelConfig(width=256, depth=8, num_heads=8, mlp_ratio=3.0)


def _s() -> ModelConfig:
    return ModelConfig(width=384, depth=12, num_heads=6)


def _b() -> ModelConfig:
    return ModelConfig(width=768, depth=12, num_heads=12)


def _l() -> ModelConfig:
    return ModelConfig(width=1024, depth=24, num_heads=16)


def _xl() -> ModelConfig:
    return ModelConfig(width=1152, depth=28, num_heads=16)


MODEL_PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "nano": _nano, "mini": _mini, "S": _s, "B": _b, "L": _l, "XL": _xl,
}  # fmt: skip
"""Sizes: nano and mini for a CPU; S, B, L, XL as in DiT (arXiv 2212.09748)."""


def preset(name: str) -> Config:
    """Return a full configuration for a model size.

    Args:
        name: one of MODEL_PRESETS. From S on, training uses bf16, batches of 256, the published learning rate 2e-4 and
            1000 steps of warm-up.

    Raises:
        ConfigError: unknown name.
    """
    if name not in MODEL_PRESETS:
        raise ConfigError(
            f"unknown preset {name!r} (there are: {', '.join(MODEL_PRESETS)}).{suggest(name, MODEL_PRESETS)}", key=name
        )
    model = MODEL_PRESETS[name]()
    if name in ("nano", "mini"):
        return Config(model=model)
    return Config(
        model=model, train=TrainConfig(learning_rate=2e-4, warmup_steps=1000, precision="bf16", batch_size=256)
    )
