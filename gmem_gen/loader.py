"""Batches: what the network sees of each step, made ahead of it in the background.

A batch is a function of (seed, step) alone, so that a training that goes on needs no state of its loader.

Shapes: M rows with images, S training samples, B samples of this process's share, C·H·W latent, D snippet dimension,
T·P patch tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmem_gen import conditioning, draws, times
from gmem_gen.conditioning import Bank
from gmem_gen.config import Config
from gmem_gen.data import Order, TrainingImages
from gmem_gen.splits import Split

Tokens = Callable[[NDArray[np.int64]], Tensor]
"""Places among the rows with images → (B, T, P) patch tokens."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples of a step."""

    places: NDArray[np.int64]
    """(B,) among the rows with images."""
    x_1: Tensor
    """(B, C, H, W) data."""
    x_0: Tensor
    """(B, C, H, W) noise."""
    t: Tensor
    """(B,)."""
    conditions: Tensor
    """(B, D) snippets, (B,) labels, or (B, 0)."""
    tokens: Tensor | None
    """(B, T, P) of the encoder."""

    def __len__(self) -> int:
        return len(self.t)

    def to(self, device: torch.device) -> Batch:
        """Return the batch on a device; from pinned memory the copy goes on while the device works."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the batch in memory that a GPU copies from by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **changed)

    def part(self, number: int, parts: int) -> Batch:
        """Return one of several parts, as equal as can be."""
        if parts == 1:
            return self
        own = slice(len(self) * number // parts, len(self) * (number + 1) // parts)
        cut = {name: value[own] for name, value in vars(self).items() if value is not None}
        return replace(self, **cut)


class BatchMaker:
    """Makes batches: reads latents, snippets and tokens, and draws what is random.

    Args:
        bank: read through the interface.
        config: resolved.
        images: what is learned, by place among the rows of `join`.
        join: rows with images.
        split: which of them are trained on.
        labels: (M,) of a class-conditional model, else None.
        tokens: of a model with a projection head, else None.
    """

    def __init__(
        self, bank: Bank, config: Config, images: TrainingImages, join: conditioning.Join, split: Split,
        *, labels: Tensor | None = None, tokens: Tokens | None = None,
    ) -> None:  # fmt: skip
        self._bank, self._config, self._images, self._join = bank, config, images, join
        self._split, self._labels, self._tokens = split, labels, tokens
        self.order = Order(len(split.samples), config.train.batch_size, config.train.seed)
        self._lock = threading.Lock()  # of what remembers between batches
        self._bank_lock = threading.Lock()  # the interface of a bank promises nothing about threads

    def training(self, step: int, share: range) -> Batch:
        """Return the samples of a step with these places in the batch of all processes together."""
        with self._lock:
            samples = self.order.batch(step)[share.start : share.stop]
        pairs = self._split.samples[samples]
        settings, dim = self._config.train, self._dim
        drawn = self._draw(
            step, np.arange(share.start, share.stop), draws.TRAINING, dim if settings.snippet_dropout else 0,
            dim if settings.snippet_noise else 0,
        )  # fmt: skip
        places = np.where(drawn.flip, pairs[:, 1], pairs[:, 0])
        return self._batch(places, drawn, self._conditions(places, drawn))

    def validation(self, samples: NDArray[np.int64]) -> Batch:
        """Return held-out samples by number, with noise and times that are always the same, and conditions as they are."""
        places = self._split.held_out[samples]
        drawn = self._draw(0, samples, draws.VALIDATION, 0, 0)
        return self._batch(places, drawn, self._conditions(places, None))

    @property
    def _dim(self) -> int:
        return int(self._bank.dim) if self._config.model.condition == "memory" else 0

    def _draw(
        self, step: int, samples: NDArray[np.int64], purpose: int, dropout: int, snippet_noise: int
    ) -> draws.Draws:
        latent = self._images.latent
        return draws.draw(
            self._config.train.seed, step, samples, (latent.channels, latent.size, latent.size),
            normal_times=times.needs_normals(self._config.flow), dropout=dropout, snippet_noise=snippet_noise, purpose=purpose,
        )  # fmt: skip

    def _batch(self, places: NDArray[np.int64], drawn: draws.Draws, conditions: Tensor) -> Batch:
        tokens = None
        if self._tokens is not None:
            with self._lock:
                tokens = self._tokens(places)
        return Batch(
            places=places, x_1=self._images.read(places), x_0=drawn.noise, t=times.place_times(self._config.flow, drawn.time),
            conditions=conditions, tokens=tokens,
        )  # fmt: skip

    def _conditions(self, places: NDArray[np.int64], drawn: draws.Draws | None) -> Tensor:
        """Return what the model sees of the conditions: snippets, labels, or nothing; regularised where numbers are drawn."""
        config = self._config
        if config.model.condition == "none":
            return torch.zeros(len(places), 0)
        if self._labels is not None:
            labels = self._labels[torch.from_numpy(places)]
            if drawn is None:
                return labels
            return torch.where(drawn.null[:, 0] >= config.train.null_probability, labels, config.model.num_classes)
        with self._bank_lock:
            snippets = conditioning.gather(self._bank, self._join.rows[places], torch.device("cpu"))
        if drawn is None:
            return snippets
        return conditioning.regularise(
            snippets, null_probability=config.train.null_probability, dropout=config.train.snippet_dropout,
            noise=config.train.snippet_noise, null=drawn.null, kept=drawn.dropout, normals=drawn.snippet_noise,
        )  # fmt: skip


class Prefetch:
    """Makes what the next steps need while the present one is computed.

    Args:
        make: step → batch; from any thread.
        end: steps from here on are not asked for.
        num_threads: 0: nothing is made ahead.
    """

    def __init__(self, make: Callable[[int], Batch], end: int, num_threads: int) -> None:
        self._make, self._end, self._depth = make, end, num_threads + 1 if num_threads else 0
        self._pool = ThreadPoolExecutor(num_threads, "gmem-loader") if num_threads else None
        self._pending: dict[int, Future[Batch]] = {}

    def take(self, step: int) -> Batch:
        """Return the batch of a step; raises whatever making it raised."""
        if self._pool is None:
            return self._make(step)
        for ahead in range(step, min(self._end, step + 1 + self._depth)):
            if ahead not in self._pending:
                self._pending[ahead] = self._pool.submit(self._make, ahead)
        for passed in [number for number in self._pending if number < step]:
            self._pending.pop(passed).cancel()
        return self._pending.pop(step).result()

    def close(self) -> None:
        """Let the threads end."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
