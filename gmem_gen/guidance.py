"""Classifier-free guidance in an interval of times, computing only what is used.

x points, t times, c conditions, ∅ the null condition; B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from gmem_gen.predictions import Field

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t (B, …), t (B,), conditions (B, …)) → prediction (B, …)."""


class Guided:
    """The field ∅ + scale·(conditional − ∅) where start ≤ t ≤ end (arXiv 2207.12598, 2404.07724).

    Before the interval it is the conditional prediction and after it that of the null condition, as the published model has
    it. Each sample is judged by its own time, and only the half that is used is computed.

    Args:
        network: evaluated once a call, on as many points as are needed.
        conditions: (B, …).
        null: (B, …) null conditions.
        scale: 1 is the conditional prediction inside the interval, 0 that of the null condition.
        start: first t of the interval.
        end: last t of the interval; 1 is no end, also for a solver that steps past 1.
    """

    def __init__(
        self, network: Network, conditions: Tensor, null: Tensor, scale: float, start: float = 0.0, end: float = 1.0
    ) -> None:
        self.network, self.conditions, self.null = network, conditions, null
        self.scale, self.start, self.end = scale, start, math.inf if end >= 1 else end
        self.num_points = 0
        """Points the network has been evaluated at, a guided one counted twice."""

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return (B, …) for points (B, …) and times (B,), which are best on the CPU: they decide what is computed."""
        # compared in the precision of t, so that a time that was rounded to it still equals the interval's end
        start, end = (torch.tensor(value, dtype=t.dtype, device=t.device) for value in (self.start, self.end))
        needs_conditional = (t < start) | ((t <= end) & (self.scale != 0.0))
        needs_null = (t > end) | ((t >= start) & (self.scale != 1.0))
        if bool(needs_conditional.all()) and not bool(needs_null.any()):
            return self._evaluate(x, t, self.conditions)
        if bool(needs_null.all()) and not bool(needs_conditional.any()):
            return self._evaluate(x, t, self.null)
        if bool((needs_conditional & needs_null).all()):
            output = self._evaluate(torch.cat([x, x]), torch.cat([t, t]), torch.cat([self.conditions, self.null]))
            return self._mix(output[: len(x)], output[len(x) :])
        return self._mixed(x, t, needs_conditional, needs_null)

    def _mix(self, conditional: Tensor, null: Tensor) -> Tensor:
        return null + self.scale * (conditional - null)

    def _evaluate(self, x: Tensor, t: Tensor, conditions: Tensor) -> Tensor:
        self.num_points += len(x)
        return self.network(x, t, conditions)

    def _mixed(self, x: Tensor, t: Tensor, needs_conditional: Tensor, needs_null: Tensor) -> Tensor:
        """Evaluate both halves, each at the samples that need it, and put them together sample by sample."""
        first, second = needs_conditional.nonzero()[:, 0], needs_null.nonzero()[:, 0]
        here, there = first.to(x.device), second.to(x.device)
        conditions = torch.cat([self.conditions[here], self.null[there]])
        output = self._evaluate(x[torch.cat([here, there])], t[torch.cat([first, second])], conditions)
        conditional, null = torch.zeros_like(output[:1]).expand(2, len(x), *output.shape[1:]).clone()
        conditional[here], null[there] = output[: len(first)], output[len(first) :]
        shape = (-1, *([1] * (x.ndim - 1)))
        only_conditional, only_null = (needs.to(x.device).view(shape) for needs in (~needs_null, ~needs_conditional))
        return torch.where(only_conditional, conditional, torch.where(only_null, null, self._mix(conditional, null)))


def guided(
    network: Network, conditions: Tensor, null: Tensor, scale: float, start: float = 0.0, end: float = 1.0
) -> Field:
    """Return `Guided` as a plain field; arguments as there."""
    return Guided(network, conditions, null, scale, start, end)
