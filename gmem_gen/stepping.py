"""One training: model, averaged weights, optimizer, data and the steps made so far.

Everything random is drawn from (seed, step, sample), so a resumed training needs no generator state, and neither the number of
processes nor that of parts changes a step.

Shapes: M rows with images, B batch of all processes together, b of one part of one process, C·H·W latent.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gmem_bank.errors import CheckpointError, ConfigError, GMemError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning, losses, optim, paths
from gmem_gen.conditioning import Bank
from gmem_gen.config import Config
from gmem_gen.data import TrainingImages
from gmem_gen.distributed import Processes
from gmem_gen.loader import Batch, BatchMaker, Prefetch, Tokens
from gmem_gen.model import Generator
from gmem_gen.run import Resumption
from gmem_gen.runtime import versions
from gmem_gen.splits import Split

TERMS = ("loss", "mse", "cosine", "projection")
LEAST_SCALE = 2.0**-10
"""Of fp16's gradients: below it there is no scale at which they are finite."""
ADVICE = (
    "Go on from one of them with --resume-from previous or a step's folder, or begin anew in another --out with a lower "
    "train.learning_rate or train.clip_norm"
)
"""What to do about a training that diverged."""
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step was like."""

    terms: dict[str, float]
    """Those of TERMS that the training has, over the whole batch; the first is their weighted sum."""
    norm: float
    """Of the gradient, before clipping."""
    requests: tuple[bool, ...] = ()
    """Whether any process asked for each of what was asked."""


class Trainer:
    """One training: model, data and optimizer, and the steps made so far.

    Args:
        bank: read through the interface.
        config: resolved.
        images: what is learned, by place among the rows of `join`.
        join: rows with images.
        processes: that train together, and their device.
        split: which rows are trained on; None: all.
        tokens: places among the rows → (B, T, P) patch tokens of the encoder, for a model with a projection head.
        facts: further entries of the checkpoints' state.

    Raises:
        ConfigError: rows that belong to none of the classes, or to two; fewer samples a step than processes and parts.
    """

    def __init__(
        self, bank: Bank, config: Config, images: TrainingImages, join: conditioning.Join, processes: Processes,
        *, split: Split | None = None, tokens: Tokens | None = None, facts: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.classes = conditioning.class_names(bank) if config.model.condition == "class" else ()
        labels = conditioning.labels(bank, join.rows, self.classes) if self.classes else None
        self.bank, self.config, self.images, self.join, self.processes = bank, config, images, join, processes
        self.device, self.facts = processes.device, facts or {}
        places = np.arange(len(join.rows))
        self.split = split or Split(samples=np.stack([places, places], axis=1), held_out=places[:0])
        dim = int(conditioning.record_of(bank)["dim"])
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers are not ours to change
            torch.manual_seed(config.train.seed)
            self.model: Generator = checkpoints.make_model(config, images.latent, dim).to(self.device)
        self.model.recompute = config.train.gradient_checkpointing
        self.averages = optim.make_averages(self.model, config.train)
        self.optimizer = optim.make_optimizer(self.model, config.train)
        self.scaler = optim.make_scaler(self.device, config.train)
        self.maker = BatchMaker(bank, config, images, join, self.split, labels=labels, tokens=tokens)
        self.order = self.maker.order
        self.share = processes.share(self.order.batch_size)
        require_share(len(self.split.samples), config, processes.count)
        self.total_steps = config.train.max_steps or config.train.epochs * self.order.steps_per_epoch
        self.step = 0
        self.elapsed = 0.0
        self.losses: deque[float] = deque(maxlen=config.train.log_every)
        self.best: tuple[int, float] | None = None
        """Step and loss of the best validation so far."""
        self.looked = 0
        """Step at which validation and samples were last thought of."""
        self._prepare()

    def _prepare(self) -> None:
        self.wrapped = self.processes.wrap(self.model)
        self.network: Any = torch.compile(self.wrapped) if self.config.train.compile else self.wrapped
        self.loader = Prefetch(self._read, self.total_steps, self.config.train.num_workers)

    def _read(self, step: int) -> Batch:
        batch = self.maker.training(step, self.share)
        return batch.pinned() if self.device.type == "cuda" else batch

    def close(self) -> None:
        """Let the loader's threads end."""
        self.loader.close()

    @property
    def average(self) -> Generator:
        """The averaged weights that are validated and drawn with: those of the first decay."""
        module: Any = self.averages["ema"].module
        assert isinstance(module, Generator)
        return module

    def restore(self, resumption: Resumption, *, compare_best: bool = True) -> None:
        """Take up a checkpoint; raises CheckpointError.

        Args:
            resumption: which one.
            compare_best: False: other rows are held out now, and the best validation so far says nothing about them.
        """
        if resumption.checkpoint is None:
            return
        where, state = resumption.checkpoint, checkpoints.read_state(resumption.checkpoint)
        if state.get("classes", []) != list(self.classes):
            raise CheckpointError(
                f"the bank has other concepts than the classes that {where} was trained on: a class-conditional model cannot go "
                "on with them; choose another --out",
                path=where,
            )
        names = [name for name, _ in self.model.named_parameters()]
        try:
            self.model.load_state_dict(checkpoints.read_tensors(where, checkpoints.MODEL))
            for name, average in self.averages.items():
                average.load_state_dict(checkpoints.read_tensors(where, checkpoints.weights_file(name)))
            checkpoints.restore_optimizer(self.optimizer, names, checkpoints.read_tensors(where, checkpoints.OPTIMIZER))
            if self.scaler.is_enabled() and state.get("scaler"):
                self.scaler.load_state_dict(state["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{where} does not fit this training: {error}", path=where) from error
        self.step, self.elapsed = resumption.step, resumption.elapsed
        self.losses.extend(resumption.losses)
        self.best = tuple(state["best"]) if state.get("best") and compare_best else None
        self.looked = int(state.get("looked", self.step))

    def make_step(self, asked: Callable[[], tuple[bool, ...]] = tuple) -> Step:
        """Make one optimizer step.

        Args:
            asked: called once, after the gradients are there: what this process asks of all of them.

        Raises:
            GMemError: loss or gradient are not finite; the weights are those of before.
        """
        batch = self.loader.take(self.step).to(self.device)
        self.optimizer.zero_grad(set_to_none=True)
        own = self._backward(batch)
        self.scaler.unscale_(self.optimizer)
        clip = self.config.train.clip_norm or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        requests = asked()
        numbers = self.processes.sum([*own, *map(float, requests)])
        terms = {name: numbers[place] for place, name in enumerate(TERMS) if not math.isnan(own[place]) or place < 2}
        self._require_finite(terms["loss"], norm)
        for group in self.optimizer.param_groups:
            group["lr"] = optim.learning_rate(self.step, self.total_steps, self.config.train)
        if self._update():
            for average in self.averages.values():
                average.update_parameters(self.model)
        self.step += 1
        self.losses.append(terms["loss"])
        return Step(terms=terms, norm=norm, requests=tuple(number > 0 for number in numbers[len(TERMS) :]))

    def _backward(self, batch: Batch) -> list[float]:
        """Add up the gradient over the parts, and return this process's share of each term, NaN for those that there are not."""
        parts, total = self.config.train.accumulation, self.order.batch_size
        sums: Tensor | None = None
        for number in range(parts):
            part = batch.part(number, parts)
            with self.processes.without_exchange(self.wrapped, number + 1 < parts):
                found = self.evaluate(self.network, part)
                weight = len(part) / total
                # wrapping takes the mean over the processes, and a step is the mean over its samples
                scaled = found.total if weight == 1 else found.total * (weight * self.processes.count)
                self.scaler.scale(scaled).backward()  # type: ignore[no-untyped-call]
            own = stack_terms(found) * weight
            sums = own if sums is None else sums + own
        assert sums is not None
        return [float(value) for value in sums.tolist()]

    def evaluate(self, network: nn.Module, batch: Batch) -> losses.Losses:
        """Return the losses of a network on a batch."""
        flow = self.config.flow
        x_t = paths.interpolant(batch.x_0, batch.x_1, batch.t, flow.path)
        with self.autocast():
            if batch.tokens is not None:
                output, projected = network(x_t, batch.t, batch.conditions, project=True)
            else:
                output, projected = network(x_t, batch.t, batch.conditions), None
        return losses.flow_losses(
            output, batch.x_0, batch.x_1, x_t, batch.t, flow, projected=projected, tokens=batch.tokens
        )

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context of the network's precision."""
        dtype = AUTOCAST.get(self.config.train.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None)

    def _update(self) -> bool:
        """Change the weights; False where fp16's gradients overflowed, and the next step is made with a smaller scale."""
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return not self.scaler.is_enabled() or self.scaler.get_scale() >= before

    def _require_finite(self, loss: float, norm: float) -> None:
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() > LEAST_SCALE
        if math.isfinite(loss) and (math.isfinite(norm) or overflow):
            return
        raise GMemError(
            f"the loss became {loss} (gradient norm {norm}) at step {self.step}: earlier checkpoints stand. {ADVICE}"
        )

    def _require_finite_weights(self) -> None:
        """Raise GMemError where an update went too far, which the loss shows one step later: nothing may be saved then."""
        found = [
            torch.isfinite(tensor).all()
            for module in (self.model, *self.averages.values())
            for tensor in module.parameters()
        ]
        if not bool(torch.stack(found).all()):
            raise GMemError(
                f"the weights are not finite after step {self.step}, and were not saved: earlier checkpoints stand. {ADVICE}"
            )

    def save(self, run: Path, keys_digest: str) -> Path:
        """Write a checkpoint and remove superseded ones; raises WriteError, and GMemError for weights that are not finite."""
        self._require_finite_weights()
        train = self.config.train
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
            "best": self.best,
            "looked": self.looked,
            "scaler": self.scaler.state_dict(),
            **self.facts,
        }
        weights = {"model": self.model, **self.averages}
        path = checkpoints.save(run, self.step, state, weights, self.optimizer)
        checkpoints.clean(run, train.keep_checkpoints, every=train.keep_every, best=self.best[0] if self.best else None)
        return path


def require_share(num_samples: int, config: Config, num_processes: int) -> None:
    """Raise ConfigError where a step has fewer images than processes and parts."""
    images, parts = min(num_samples, config.train.batch_size), config.train.accumulation
    if images < num_processes * parts:
        raise ConfigError(
            f"a step has {images} images for {num_processes} processes and train.accumulation {parts}: one each at least",
            key="train.accumulation",
        )


def stack_terms(found: losses.Losses) -> Tensor:
    """Return (4,) float32 terms in the order of TERMS, detached, NaN for those that there are not."""
    values = [found.total, found.mse, found.cosine, found.projection]
    return torch.stack(
        [found.total.new_tensor(math.nan) if value is None else value.detach().float() for value in values]
    )
