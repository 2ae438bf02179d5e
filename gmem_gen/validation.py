"""The loss on what is held out: the same noise and times every time, so that two values differ by the weights alone.

Shapes: V held-out rows, b of one part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from gmem_gen.stepping import TERMS, Trainer, stack_terms


class Interrupted(Exception):  # noqa: N818 - no error: the loop ends, and validates when the training goes on
    """A signal came to one of the processes."""


def validate(trainer: Trainer, asked: Callable[[], bool] = bool) -> dict[str, float]:
    """Return the mean losses over the held-out rows, computed by all processes together.

    With conditions as they are: no null snippet, no dropout. "validation_loss" and its terms are those of the averaged weights
    (of the first decay), which sampling uses; "validation_loss_model" of the weights as they are, "validation_loss_ema-0.999" of
    another average.

    Args:
        trainer: what is validated.
        asked: called before every part: whether this process was asked to stop.

    Raises:
        Interrupted: any process was, in all of them.
    """
    networks: dict[str, nn.Module] = {name: each.module for name, each in trainer.averages.items()}
    networks["model"] = trainer.model
    found: dict[str, float] = {}
    for name, network in networks.items():
        terms = _mean_terms(trainer, network, asked)
        if name == "ema":
            found |= {f"validation_{term}": value for term, value in terms.items()}
        else:
            found[f"validation_loss_{name}"] = terms["loss"]
    return found


def _mean_terms(trainer: Trainer, network: nn.Module, asked: Callable[[], bool]) -> dict[str, float]:
    held, size = len(trainer.split.held_out), max(1, len(trainer.share) // trainer.config.train.accumulation)
    share = trainer.processes.share(held)
    longest = math.ceil(held / trainer.processes.count)  # all take as many turns, since all are asked at each
    sums = torch.zeros(len(TERMS), dtype=torch.float64)
    with torch.inference_mode(), _evaluating(network):
        for start in range(share.start, share.start + longest, size):
            if any(trainer.processes.sum([asked()])):
                raise Interrupted
            samples = np.arange(start, min(share.stop, start + size))
            if not len(samples):
                continue
            batch = trainer.maker.validation(samples).to(trainer.device)
            sums += stack_terms(trainer.evaluate(network, batch)).cpu().double() * len(samples)
    totals = trainer.processes.sum(sums.tolist())
    return {
        name: value / held
        for name, value in zip(TERMS, totals, strict=True)
        if not math.isnan(value) or name in ("loss", "mse")
    }


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and back."""
    before = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(before)
