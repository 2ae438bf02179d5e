"""Wall time of sampling as gmem_gen does it, against a plain implementation that evaluates as published, as JSON.

python -m tools.bench_sample [--preset S --patch 1 --size 16 --channels 32] [--steps 50] [--images 4] [--pairs 3] [--device cpu]

SDE Heun with guidance 7.75 from t = 0.89, linear diffusion, last step Mean of 0.004. The plain peer evaluates the network for
the drift and once more for the score, each time with both halves of guidance. Both get the same network, weights, start and
noise, and are timed in turn; the images must agree.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gmem_gen.config import FlowConfig, SampleConfig
from gmem_gen.guidance import Guided
from gmem_gen.model import Generator, LatentShape
from gmem_gen.presets import MODEL_PRESETS
from gmem_gen.sampling import solve

SCALE, START, LAST = 7.75, 0.89, 0.004
DIM = 768


class Counted:
    """A network that counts the points it is asked at."""

    def __init__(self, model: Generator) -> None:
        self.model, self.points = model, 0

    def __call__(self, x: Tensor, t: Tensor, snippets: Tensor) -> Tensor:
        """Return the model's output."""
        self.points += len(x)
        return self.model(x, t.to(x), snippets)


def plain(network: Counted, snippets: Tensor, noise: Callable[[], Tensor], points: int) -> Tensor:
    """Return samples on the linear path by the textbook: velocity and score asked for apart, both halves always."""

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((2 * len(x),), t, device=x.device)
        both = network(torch.cat([x, x]), times, torch.cat([snippets, torch.zeros_like(snippets)]))
        conditional, null = both.chunk(2)
        return conditional if t < START else null + SCALE * (conditional - null)

    def score(x: Tensor, t: float) -> Tensor:
        return (t * velocity(x, t) - x) / (1 - t)

    def drift(x: Tensor, t: float) -> Tensor:
        return velocity(x, t) + (1 - t) * score(x, t)

    x, times = noise(), torch.linspace(0, 1 - LAST, points).tolist()
    for t, after in pairwise(times):
        h = after - t
        x = x + math.sqrt(2 * (1 - t) * h) * noise()
        slope = drift(x, t)
        x = x + 0.5 * h * (slope + drift(x + h * slope, after))
    return x + LAST * drift(x, times[-1])


def ours(network: Counted, snippets: Tensor, noise: Callable[[], Tensor], points: int) -> Tensor:
    """Return samples as gmem_gen draws them."""
    config = SampleConfig(
        method="sde-heun", num_steps=points, guidance=SCALE, guidance_start=START, last_step_size=LAST
    )
    field = Guided(network, snippets, torch.zeros_like(snippets), SCALE, START)
    return solve(field, FlowConfig(prediction="velocity"), config, noise).x_1


def make_model(options: argparse.Namespace) -> Generator:
    """Return a network whose output is of the size of a velocity: its last layer starts at random, not at zero."""
    torch.manual_seed(0)
    config = dataclasses.replace(MODEL_PRESETS[options.preset](), patch_size=options.patch)
    model = Generator(config, LatentShape(channels=options.channels, size=options.size), DIM)
    for name, parameter in model.named_parameters():
        if "adaLN" in name or name.startswith("final_layer"):
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(options.device).eval()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Time both in turn; return medians, ratios and the largest difference."""
    model, device = make_model(options), torch.device(options.device)
    snippets = torch.nn.functional.normalize(torch.randn(options.images, DIM), dim=1).to(device)
    shape = (options.images, options.channels, options.size, options.size)
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    busy: dict[str, list[float]] = {"plain": [], "ours": []}
    results, points = {}, {}
    with torch.inference_mode():
        model(torch.randn(shape, device=device), torch.rand(len(snippets), device=device), snippets)
        for _ in range(options.pairs):
            for name, draw in (("plain", plain), ("ours", ours)):
                generator, network = torch.Generator().manual_seed(1), Counted(model)
                began, began_busy = time.perf_counter(), time.process_time()
                drawn = draw(
                    network, snippets, lambda g=generator: torch.randn(shape, generator=g).to(device), options.steps
                )
                results[name] = drawn.cpu()  # waits for the device
                seconds[name].append(time.perf_counter() - began)
                busy[name].append(time.process_time() - began_busy)
                points[name] = network.points / options.images
    ratios, busy_ratios = (
        sorted(a / b for a, b in zip(times["plain"], times["ours"], strict=True)) for times in (seconds, busy)
    )
    return {
        "settings": vars(options),
        "threads": torch.get_num_threads(),
        "seconds_plain": [round(value, 3) for value in seconds["plain"]],
        "seconds_ours": [round(value, 3) for value in seconds["ours"]],
        "evaluations_per_image_plain": points["plain"],
        "evaluations_per_image_ours": points["ours"],
        "speed_up": round(ratios[len(ratios) // 2], 3),
        "speed_up_cpu_time": round(busy_ratios[len(ratios) // 2], 3),
        "largest_difference": float((results["plain"] - results["ours"]).abs().max()),
        "largest_value": float(results["ours"].abs().max()),
    }


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="S", choices=list(MODEL_PRESETS))
    parser.add_argument("--patch", type=int, default=1)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--channels", type=int, default=32)
    for name, default in (("--steps", 50), ("--images", 4), ("--pairs", 3)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    if min(options.steps - 1, options.images, options.pairs) < 1:
        parser.error("--steps must be at least 2, --images and --pairs at least 1")
    print(json.dumps(measure(options), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
