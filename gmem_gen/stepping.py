"""One training: model, averaged weights, optimizer, data and the steps made so far.

Everything random is drawn from (seed, step), so a resumed training needs no generator state.

Shapes: M training images, B batch, C·H·W latent, D snippet dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmem_bank.errors import CheckpointError, GMemError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning, losses, optim, paths, times
from gmem_gen.conditioning import Bank
from gmem_gen.config import Config
from gmem_gen.data import Order, TrainingImages
from gmem_gen.model import Generator
from gmem_gen.run import Resumption
from gmem_gen.runtime import versions


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of everything random in a step."""
    state = np.random.SeedSequence([seed & 0xFFFFFFFF, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Trainer:
    """One training: model, data and optimizer, and the steps made so far.

    Args:
        bank: read through the interface.
        config: resolved.
        images: what is learned, by place among the rows of `join`.
        join: the rows they belong to.
        device: where the model lives.
        tokens: places among the training images → (B, T, P) patch tokens of the encoder, for a model with a projection head.

    Raises:
        ConfigError: rows that belong to none of the classes, or to two.
    """

    def __init__(
        self, bank: Bank, config: Config, images: TrainingImages, join: conditioning.Join, device: torch.device,
        *, tokens: Callable[[NDArray[np.int64]], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.tokens = tokens
        self.classes = conditioning.class_names(bank) if config.model.condition == "class" else ()
        self.labels = conditioning.labels(bank, join.rows, self.classes) if self.classes else None
        self.bank, self.config, self.images, self.join, self.device = bank, config, images, join, device
        dim = int(conditioning.record_of(bank)["dim"])
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to change
            torch.manual_seed(config.train.seed)
            self.model: Generator = checkpoints.make_model(config, images.latent, dim).to(device)
        self.average = optim.make_average(self.model, config.train.ema_decay, warmup=config.train.ema_warmup)
        self.optimizer = optim.make_optimizer(self.model, config.train)
        self.order = Order(len(join.rows), config.train.batch_size, config.train.seed)
        self.total_steps = config.train.max_steps or config.train.epochs * self.order.steps_per_epoch
        self.step = 0
        self.elapsed = 0.0
        self.losses: deque[float] = deque(maxlen=config.train.log_every)

    def restore(self, resumption: Resumption) -> None:
        """Take up a checkpoint; raises CheckpointError."""
        if resumption.checkpoint is None:
            return
        where = resumption.checkpoint
        if checkpoints.read_state(where).get("classes", []) != list(self.classes):
            raise CheckpointError(
                f"the bank has other concepts than the classes that {where} was trained on: a class-conditional model cannot go "
                "on with them; choose another --out",
                path=where,
            )
        names = [name for name, _ in self.model.named_parameters()]
        try:
            self.model.load_state_dict(checkpoints.read_tensors(where, checkpoints.MODEL))
            self.average.load_state_dict(checkpoints.read_tensors(where, checkpoints.EMA))
            checkpoints.restore_optimizer(self.optimizer, names, checkpoints.read_tensors(where, checkpoints.OPTIMIZER))
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{where} does not fit this training: {error}", path=where) from error
        self.step, self.elapsed = resumption.step, resumption.elapsed
        self.losses.extend(resumption.losses)

    def make_step(self) -> float:
        """Make one optimizer step, keep its loss, return its gradient norm; raises GMemError where they are not finite."""
        config, generator = self.config.train, step_generator(self.config.train.seed, self.step)
        places = self.order.batch(self.step)
        x_1 = self.images.read(places).to(self.device)
        x_0 = torch.randn(x_1.shape, generator=generator).to(self.device)
        t = times.draw_times(self.config.flow, len(places), generator).to(self.device)
        conditions = self._conditions(places, generator)
        x_t = paths.interpolant(x_0, x_1, t, self.config.flow.path)
        output, projected = self._predict(x_t, t, conditions)
        tokens = None if self.tokens is None or projected is None else self.tokens(places).to(self.device)
        loss = losses.flow_losses(output, x_0, x_1, x_t, t, self.config.flow, projected=projected, tokens=tokens).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm or math.inf)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(self.step, self.total_steps, config)
        value, norm_value = float(loss.detach()), float(norm)
        if not (math.isfinite(value) and math.isfinite(norm_value)):
            raise GMemError(
                f"the loss became {value} (gradient norm {norm_value}) at step {self.step}: earlier checkpoints stand. "
                "Lower train.learning_rate, or set train.clip_norm"
            )
        self.optimizer.step()
        self.average.update_parameters(self.model)
        self.step += 1
        self.losses.append(value)
        return norm_value

    def _conditions(self, places: NDArray[np.int64], generator: torch.Generator) -> Tensor:
        """Return what the model sees of the conditions of a batch: regularised snippets, labels, or nothing."""
        config, rows = self.config.train, self.join.rows[places]
        if self.config.model.condition == "none":
            return torch.zeros(len(places), 0, device=self.device)
        if self.labels is not None:
            labels = self.labels[torch.from_numpy(places)]
            known = torch.rand(len(labels), generator=generator) >= config.null_probability
            return torch.where(known, labels, self.config.model.num_classes).to(self.device)
        return conditioning.regularise(
            conditioning.gather(self.bank, rows, self.device), null_probability=config.null_probability,
            dropout=config.snippet_dropout, noise=config.snippet_noise, generator=generator,
        )  # fmt: skip

    def _predict(self, x_t: Tensor, t: Tensor, conditions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the model's output and, with a projection head, its projection."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            if self.config.model.projection_dim:
                projected = self.model(x_t, t, conditions, project=True)
                return projected.output, projected.tokens
            return self.model(x_t, t, conditions), None

    def save(self, run: Path, keys_digest: str) -> Path:
        """Write a checkpoint and remove superseded ones."""
        state = {
            "elapsed": self.elapsed,
            "losses": list(self.losses),
            "config": self.config.to_json(),
            "latent": dataclasses.asdict(self.images.latent),
            "tokenizer": self.images.tokenizer.record(),
            "bank": conditioning.record_of(self.bank),
            "keys_digest": keys_digest,
            "classes": list(self.classes),
            "versions": versions(),
        }
        path = checkpoints.save(run, self.step, state, self.model, self.average, self.optimizer)
        checkpoints.clean(run, self.config.train.keep_checkpoints)
        return path
