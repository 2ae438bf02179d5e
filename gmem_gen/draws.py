"""The random numbers of training: every sample of every step has streams of its own, wherever it is computed.

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") counts instead of remembering: a key (seed, step) and
a counter (·, ·, sample, stream) are all of its state, so that two processes draw what one process draws.

Shapes: B samples, C·H·W latent, D snippet dimension.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

TRAINING, VALIDATION = 0, 2
"""Purposes: the first of the two streams that each has."""
_NOISE, _CHOICES = 0, 1


class Streams:
    """The streams of one step.

    Args:
        seed: 0 or more.
        step: 0 or more.
    """

    def __init__(self, seed: int, step: int) -> None:
        self._bits = np.random.Philox(key=np.array([seed, step], np.uint64))
        self._state: Any = self._bits.state  # of an unused generator: nothing buffered
        self._generator = np.random.Generator(self._bits)

    def of(self, sample: int, stream: int) -> np.random.Generator:
        """Return the generator at the beginning of a stream; good until the next call."""
        self._state["state"]["counter"][:] = (0, 0, sample, stream)
        self._bits.state = self._state
        return self._generator


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What is drawn for B samples."""

    noise: Tensor
    """(B, C, H, W) standard normal: x_0."""
    time: Tensor
    """(B,) uniform in [0, 1), or standard normal, from which a time is made."""
    flip: NDArray[np.bool_]
    """(B,) whether a sample that has a mirrored twin is it this time: one decision for latent, snippet and patch tokens."""
    null: Tensor
    """(B, 1) uniform in [0, 1): below the null probability the sample has the null condition."""
    dropout: Tensor
    """(B, D) uniform in [0, 1), or (B, 0) where it was not asked for."""
    snippet_noise: Tensor
    """(B, D) standard normal, or (B, 0)."""


def draw(
    seed: int, step: int, samples: NDArray[np.int64], shape: tuple[int, int, int], *, normal_times: bool, dropout: int = 0,
    snippet_noise: int = 0, purpose: int = TRAINING,
) -> Draws:  # fmt: skip
    """Return the random numbers of samples of a step.

    Args:
        seed: of the training.
        step: 0-based.
        samples: (B,) places in the batch of all processes together.
        shape: (C, H, W).
        normal_times: standard normal numbers for the times instead of uniform ones.
        dropout: D, or 0 for none.
        snippet_noise: D, or 0 for none.
        purpose: TRAINING or VALIDATION.
    """
    count, streams = len(samples), Streams(seed, step)
    noise = np.empty((count, *shape), np.float32)
    time, uniform = np.empty(count, np.float32), np.empty((count, 2), np.float32)
    dropped, added = np.empty((count, dropout), np.float32), np.empty((count, snippet_noise), np.float32)
    for place, sample in enumerate(samples.tolist()):
        choices = streams.of(sample, purpose + _CHOICES)
        choices.random(out=uniform[place], dtype=np.float32)
        time[place] = choices.standard_normal() if normal_times else choices.random()
        if dropout:
            choices.random(out=dropped[place], dtype=np.float32)
        if snippet_noise:
            choices.standard_normal(out=added[place], dtype=np.float32)
        streams.of(sample, purpose + _NOISE).standard_normal(out=noise[place], dtype=np.float32)
    return Draws(
        noise=torch.from_numpy(noise), time=torch.from_numpy(time), flip=uniform[:, 0] < 0.5,
        null=torch.from_numpy(uniform[:, 1:].copy()), dropout=torch.from_numpy(dropped),
        snippet_noise=torch.from_numpy(added),
    )  # fmt: skip
