"""The published reference vectors: the fixtures of this folder and, where GMEM_GOLDEN names one, a folder of all of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from gmem_gen.config import ModelConfig
from gmem_gen.model import Generator, LatentShape
from gmem_gen.paths import coefficients
from tests.conftest import DATA, SHARED

_EXTRA = Path(os.environ["GMEM_GOLDEN"]) if os.environ.get("GMEM_GOLDEN") else SHARED / "golden"
FOLDERS = [DATA] + ([_EXTRA] if _EXTRA.exists() else [])
"""Where the transport's vectors lie."""
WHOLE = _EXTRA if _EXTRA.exists() else None
"""The folder of all of them, or None."""


def model_of(kwargs: dict[str, Any], *, encoder_depth: int = 4, projection_dim: int = 0) -> Generator:
    """A generator with the published arguments."""
    config = ModelConfig(
        width=kwargs["hidden_size"],
        depth=kwargs["depth"],
        num_heads=kwargs["num_heads"],
        patch_size=kwargs["patch_size"],
        mlp_ratio=kwargs["mlp_ratio"],
        use_rope=kwargs["use_rope"],
        use_swiglu=kwargs["use_swiglu"],
        use_rmsnorm=kwargs["use_rmsnorm"],
        use_qk_norm=kwargs["use_qknorm"],
        use_shift=not kwargs["wo_shift"],
        snippet_scale=1.0,
        projection_dim=projection_dim,
        encoder_depth=encoder_depth,
    )
    return Generator(config, LatentShape(channels=kwargs["in_channels"], size=kwargs["input_size"]), 768)


def projector_state() -> dict[str, torch.Tensor]:
    """The projection head's weights of a width of 64, by the closed form that the reference gives."""
    state = {}
    for layer, (outputs, inputs) in {0: (2048, 64), 2: (2048, 2048), 4: (768, 2048)}.items():
        i = torch.arange(outputs, dtype=torch.int64)[:, None] * 73856093
        j = torch.arange(inputs, dtype=torch.int64)[None] * 19349663
        values = ((i ^ j ^ (layer * 83492791)) % 10007).double() / 10007 - 0.5
        state[f"projector.0.{layer}.weight"] = (values * 2 * (3 / inputs) ** 0.5).float()
        bias = ((i[:, 0] ^ (layer * 83492791)) % 10007).double() / 10007 - 0.5
        state[f"projector.0.{layer}.bias"] = (0.1 * bias).float()
    return state


def runs(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Vectors and run records of a sampler file."""
    return load_file(folder / f"{name}.safetensors"), json.loads((folder / f"{name}.json").read_text())["runs"]


def gaussian(path: str, prediction: str, mean: torch.Tensor | float, scale: float):
    """The exact prediction for data N(mean, scale²) on a path, where x_t ~ N(α·mean, α²·scale² + σ²)."""

    def field(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        at = coefficients(path, t, x)
        variance = at.alpha**2 * scale**2 + at.sigma**2
        centred = x - at.alpha * mean
        if prediction == "velocity":
            rate = (at.alpha * at.d_alpha * scale**2 + at.sigma * at.d_sigma) / variance
            return at.d_alpha * mean + rate * centred
        if prediction == "score":
            return -centred / variance
        if prediction == "noise":
            return at.sigma * centred / variance
        return mean + at.alpha * scale**2 / variance * centred

    return field
