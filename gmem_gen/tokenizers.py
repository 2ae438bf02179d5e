"""From pixels to what the model draws, and back. Here: pixels themselves.

Shapes: B batch, C channels, H×W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmem_bank.errors import ConfigError, suggest
from gmem_gen.model import LatentShape


class PixelTokenizer:
    """Pixels in [−1, 1]: no download, nothing lost but what 8 bits lose."""

    name = "pixels"

    def __init__(self, size: int, channels: int) -> None:
        self.latent = LatentShape(channels=channels, size=size)

    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Return (B, C, H, W) float32 in [−1, 1] for (B, H, W, C) uint8."""
        return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return (B, H, W, C) uint8 for (B, C, H, W), clipped and rounded to nearest."""
        values = (latents.float().cpu() + 1.0) * 127.5
        return values.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


TOKENIZERS = {PixelTokenizer.name: PixelTokenizer}


def make_tokenizer(name: str, size: int, channels: int) -> PixelTokenizer:
    """Return a tokenizer by the name that a checkpoint records.

    Args:
        name: one of TOKENIZERS.
        size: side of the images in pixels.
        channels: of the images, 1 or 3.

    Raises:
        ConfigError: unknown name.
    """
    if name not in TOKENIZERS:
        raise ConfigError(
            f"unknown tokenizer {name!r} (there are: {', '.join(TOKENIZERS)}).{suggest(name, TOKENIZERS)}", key=name
        )
    return TOKENIZERS[name](size, channels)
