"""Mean and standard deviation of each channel of latents, over all of them, in parts that add up.

Shapes: n latents, c channels, h·w latent pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

CONSTANT = 1e-6
"""A channel whose standard deviation is below this, relative to its largest value, is constant but for rounding."""


class ChannelMoments:
    """Count, mean and centred sum of squares of each channel, in float64; parts are merged as Chan, Golub and LeVeque (1983) do.

    Args:
        channels: c.
    """

    def __init__(self, channels: int) -> None:
        self.count = 0.0
        self.mean = np.zeros(channels)
        self.squares = np.zeros(channels)

    def add(self, latents: NDArray[Any]) -> None:
        """Add (n, c, h, w) latents, by a sum of their own around their own mean."""
        values = np.ascontiguousarray(latents.transpose(1, 0, 2, 3), np.float64).reshape(latents.shape[1], -1)
        if not values.shape[1]:
            return
        mean = values.mean(axis=1)
        centred = values - mean[:, None]
        self._merge(float(values.shape[1]), mean, np.einsum("cn,cn->c", centred, centred))

    def merge(self, part: NDArray[np.float64]) -> None:
        """Add what `to_array` gave of other latents."""
        self._merge(float(part[0, 0]), part[1], part[2])

    def _merge(self, count: float, mean: NDArray[np.float64], squares: NDArray[np.float64]) -> None:
        total = self.count + count
        if not total:
            return
        shift = mean - self.mean
        self.mean = self.mean + shift * (count / total)
        self.squares = self.squares + squares + shift**2 * (self.count * count / total)
        self.count = total

    def to_array(self) -> NDArray[np.float64]:
        """Return (3, c): count, mean, centred sum of squares."""
        return np.stack([np.full_like(self.mean, self.count), self.mean, self.squares])

    def statistics(self) -> dict[str, tuple[float, ...]]:
        """Return "mean" and "std" (of the population), each c numbers; a constant channel has 1, so that it becomes zeros."""
        std = np.sqrt(self.squares / max(self.count, 1.0))
        constant = std <= CONSTANT * np.maximum(np.abs(self.mean), np.finfo(np.float32).tiny)
        return {"mean": tuple(self.mean.tolist()), "std": tuple(np.where(constant, 1.0, std).tolist())}
