"""One training: model, averaged weights, optimizer, data and the steps made so far.

Everything random is drawn from (seed, step), so a resumed training needs no generator state.

Shapes: M training images, B batch, C·H·W latent, D snippet dimension.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from pathlib import Path

import numpy as np
import torch

from gmem_bank.errors import CheckpointError, GMemError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning, flow, optim
from gmem_gen.conditioning import Bank
from gmem_gen.config import Config
from gmem_gen.data import Order, PixelCache
from gmem_gen.model import Generator
from gmem_gen.run import Resumption
from gmem_gen.runtime import versions
from gmem_gen.tokenizers import make_tokenizer


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the CPU generator of everything random in a step."""
    state = np.random.SeedSequence([seed & 0xFFFFFFFF, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> 1))


class Trainer:
    """One training: model, data and optimizer, and the steps made so far.

    Args:
        bank: read through the interface.
        config: with image_size and patch_size resolved.
        cache: the training images.
        join: the rows they belong to.
        device: where the model lives.
    """

    def __init__(
        self, bank: Bank, config: Config, cache: PixelCache, join: conditioning.Join, device: torch.device
    ) -> None:
        self.bank, self.config, self.cache, self.join, self.device = bank, config, cache, join, device
        self.tokenizer = make_tokenizer("pixels", config.data.image_size, config.data.channels)
        dim = int(conditioning.record_of(bank)["dim"])
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to change
            torch.manual_seed(config.train.seed)
            self.model: Generator = checkpoints.make_model(config, self.tokenizer.latent, dim).to(device)
        self.average = optim.make_average(self.model, config.train.ema_decay)
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
        x_1 = self.tokenizer.encode(self.cache.read(places)).to(self.device)
        x_0 = torch.randn(x_1.shape, generator=generator).to(self.device)
        t = flow.draw_times(self.config.flow, len(places), generator).to(self.device)
        snippets = conditioning.regularise(
            conditioning.gather(self.bank, self.join.rows[places], self.device), null_probability=config.null_probability,
            dropout=config.snippet_dropout, noise=config.snippet_noise, generator=generator,
        )  # fmt: skip
        x_t = flow.interpolant(x_0, x_1, t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            output = self.model(x_t, t, snippets)
        velocity = flow.to_velocity(output.float(), x_t, t, self.config.flow.prediction)
        loss = flow.velocity_loss(velocity, x_0, x_1)
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

    def save(self, run: Path, keys_digest: str) -> Path:
        """Write a checkpoint and remove superseded ones."""
        state = {
            "elapsed": self.elapsed,
            "losses": list(self.losses),
            "config": self.config.to_json(),
            "latent": dataclasses.asdict(self.tokenizer.latent),
            "tokenizer": self.tokenizer.name,
            "bank": conditioning.record_of(self.bank),
            "keys_digest": keys_digest,
            "versions": versions(),
        }
        path = checkpoints.save(run, self.step, state, self.model, self.average, self.optimizer)
        checkpoints.clean(run, self.config.train.keep_checkpoints)
        return path
