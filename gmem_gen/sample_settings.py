"""What can be set about sampling: solvers of the ODE and the SDE, guidance, seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from gmem_gen.choices import choose_all, require

ODE_METHODS = ("euler", "heun", "midpoint", "heun3", "rk4", "dopri5")
SDE_METHODS = ("sde-euler", "sde-heun")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """How samples are drawn."""

    method: Literal["euler", "heun", "midpoint", "heun3", "rk4", "dopri5", "sde-euler", "sde-heun"] = "heun"
    """Of the ODE: Euler, Heun, midpoint, third-order Heun, fourth-order Runge–Kutta (3/8 rule), or adaptive Dormand–Prince
    (needs torchdiffeq; each image is solved alone, so that it does not depend on its batch). Of the SDE: Euler–Maruyama, Heun."""
    num_steps: int = 25
    """Steps, the last step of the SDE counted; dopri5 finds its own. The published "50 steps" of an ODE, which counts
    points of time, is 49 here; that of the SDE, 49 and a last one, is 50."""
    guidance: float = 1.0
    """null + guidance·(conditional − null); 1: none, whatever the interval."""
    guidance_start: float = 0.0
    """Guidance from this t on; before it the conditional velocity. Published: 0.89."""
    guidance_end: float = 1.0
    """Guidance up to this t; after it the null velocity, as published. 1: no end."""
    timestep_shift: float = 1.0
    """1: equal steps; below 1: shorter steps near the noise (the published 0.3). ODE only."""
    diffusion: Literal["constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing"] = "linear"
    """Of the SDE: how strong its noise is over t."""
    diffusion_norm: float = 1.0
    """Of the SDE: factor on the diffusion."""
    last_step: Literal["mean", "tweedie", "euler", "none"] = "mean"
    """Of the SDE: its last step, without noise: mean (the drift), tweedie (the expected image), euler (the ODE's), none."""
    last_step_size: float = 0.004
    """Of the SDE: length of the last step."""
    rtol: float = 1e-3
    """Of dopri5: relative tolerance."""
    atol: float = 1e-6
    """Of dopri5: absolute tolerance."""
    overshoot: bool = True
    """Of dopri5: step past t = 1 and interpolate back, as published; the network is then asked at times that it never
    learned. False: end on t = 1."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """What the network computes in: bf16 and fp16 by autocast. Solver and noise stay in fp32."""
    seed: int = 0
    """Of the first sample; sample i is decided by (seed, i)."""
    batch_size: int = 64
    """Samples computed together."""

    def __post_init__(self) -> None:
        choose_all(self, "sample")
        require(1 <= self.num_steps <= 100_000, "sample", "num_steps", self.num_steps, "1 to 100000")
        require(self.batch_size >= 1, "sample", "batch_size", self.batch_size, "at least 1")
        require(0 <= self.seed < 2**32, "sample", "seed", self.seed, "0 to 4294967295")
        for name in ("guidance", "diffusion_norm"):
            value = getattr(self, name)
            require(math.isfinite(value) and value >= 0, "sample", name, value, "0 or more")
        for name in ("timestep_shift", "rtol", "atol"):
            value = getattr(self, name)
            require(0 < value < math.inf, "sample", name, value, "positive")
        require(0 < self.last_step_size < 1, "sample", "last_step_size", self.last_step_size, "between 0 and 1")
        require(0 <= self.guidance_start <= self.guidance_end <= 1, "sample", "guidance interval",
                 (self.guidance_start, self.guidance_end), "a start and an end in 0 to 1, in order")  # fmt: skip
        if self.is_sde:
            require(self.timestep_shift == 1.0, "sample", "timestep_shift", self.timestep_shift,
                     f"1 for {self.method!r}: the SDE has equal steps, only the ODE's methods shift them")  # fmt: skip
            require(self.num_steps >= 2 or self.last_step == "none", "sample", "num_steps", self.num_steps,
                     "at least 2 with a last step, which is one of them")  # fmt: skip

    @property
    def is_sde(self) -> bool:
        """Whether the method is one of the SDE's."""
        return self.method in SDE_METHODS
