"""Speed of a training step as JSON: against a bare loop, against matrix products alone, in fp32 and bf16, and what data costs.

python -m tools.bench_train [--preset LightningDiT-S/1 --size 16 --channels 32 --batch 8] [--threads 2] [--pairs 3] [--compile]
[--projection] [--device cpu]

- `ours`: the trainer's whole step: random numbers, batch, transfers, forward, backward, clipping, AdamW, averages, checks.
  `bare`: the same module, loss, optimizer and averaged weights in a loop over a batch that lies ready, and nothing else. They are
  timed in turn; `ratio` is the median of bare/ours over the pairs (asked: 0.95).
- `products`: each product of a matrix with a matrix that the step has, forward and both of its derivatives, one after the other;
  `rate_of_products` is the step's FLOP rate over theirs (asked: 0.75).
- `snippets`: gather, regularisation and transfer, as a share of the step (asked: 0.02 at most).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import gmem_bank
from gmem_gen import conditioning, losses, paths
from gmem_gen.config import Config, FlowConfig, TrainConfig
from gmem_gen.distributed import Processes
from gmem_gen.model import LatentShape
from gmem_gen.presets import MODEL_PRESETS
from gmem_gen.runtime import kept_memory
from gmem_gen.sizes import flops_per_image
from gmem_gen.stepping import AUTOCAST, Trainer

DIM, ROWS = 768, 4096


class Latents:
    """Latents in memory, as a training reads them."""

    def __init__(self, shape: LatentShape) -> None:
        self.latent = shape
        self._values = torch.randn(256, shape.channels, shape.size, shape.size)

    def __len__(self) -> int:
        return ROWS

    def read(self, places: np.ndarray) -> Tensor:
        """Return (B, c, h, w)."""
        return self._values[torch.from_numpy(places % 256)]


def make_bank(folder: Path) -> gmem_bank.MemoryBank:
    """Return a bank of random unit snippets."""
    np.save(folder / "rows.npy", np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32))
    gmem_bank.build_precomputed(gmem_bank.read_array(folder / "rows.npy"), folder / "bank.safetensors")
    return gmem_bank.open(folder / "bank.safetensors")


def make_trainer(bank: Any, options: argparse.Namespace, precision: str, processes: Processes) -> Trainer:
    """Return a trainer of the preset on latents of that shape, with the published loss."""
    model = dataclasses.replace(
        MODEL_PRESETS[options.preset](), projection_dim=DIM if options.projection else 0, snippet_scale=math.sqrt(DIM)
    )
    shape = LatentShape(channels=options.channels, size=options.size)
    if not model.patch_size:
        model = dataclasses.replace(model, patch_size=1)
    config = Config(
        model=model, flow=FlowConfig(prediction="velocity", cosine_weight=1.0),
        train=TrainConfig(
            batch_size=options.batch, max_steps=10**6, precision=precision, compile=options.compile, learning_rate=2e-4,
            adamw=options.adamw, num_workers=options.workers, device=options.device,
        ),
    )  # fmt: skip
    rows = np.arange(ROWS)
    join = conditioning.Join(rows=rows, keys=[str(row) for row in rows], num_derived=0, missing=[])
    grid = options.size // model.patch_size
    known = torch.randn(256, grid * grid, DIM) if options.projection else None
    tokens = (lambda places: known[torch.from_numpy(places % 256)]) if known is not None else None
    return Trainer(bank, config, Latents(shape), join, processes, tokens=tokens)  # type: ignore[arg-type]


def bare_step(trainer: Trainer) -> Callable[[], None]:
    """Return a step over the trainer's module, optimizer and averages with a batch that lies ready on the device."""
    batch = trainer.maker.training(0, trainer.share).to(trainer.device)
    flow, dtype = trainer.config.flow, AUTOCAST.get(trainer.config.train.precision)

    def step() -> None:
        x_t = paths.interpolant(batch.x_0, batch.x_1, batch.t, flow.path)
        with torch.autocast(trainer.device.type, dtype, enabled=dtype is not None):
            if batch.tokens is not None:
                output, projected = trainer.network(x_t, batch.t, batch.conditions, project=True)
            else:
                output, projected = trainer.network(x_t, batch.t, batch.conditions), None
        found = losses.flow_losses(
            output, batch.x_0, batch.x_1, x_t, batch.t, flow, projected=projected, tokens=batch.tokens
        )
        trainer.optimizer.zero_grad(set_to_none=True)
        found.total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.averages["ema"].update_parameters(trainer.model)

    return step


def products(trainer: Trainer) -> tuple[Callable[[], None], float]:
    """Return a chain of the step's matrix products alone, and its operations: those of every linear layer and of attention."""
    model, config, batch = trainer.model, trainer.config, trainer.order.batch_size
    dtype = AUTOCAST.get(config.train.precision, torch.float32)
    tokens, width, heads = model.grid**2, config.model.width, config.model.num_heads
    per_image = [model.t_embedder, model.condition_projection, *(block.adaLN_modulation for block in model.blocks)]
    single = {id(layer) for module in [*per_image, model.final_layer.adaLN_modulation] for layer in module.modules()}
    operands: list[tuple[Tensor, Tensor, Tensor]] = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            rows = batch if id(layer) in single else batch * tokens
            operands.append(_linear(rows, layer.in_features, layer.out_features, dtype, trainer.device))
    pixels = model.patch_size**2 * model.latent.channels
    operands.append(_linear(batch * tokens, pixels, width, dtype, trainer.device))
    shape = (batch * heads, tokens, width // heads)
    query, key = (torch.randn(shape, dtype=dtype, device=trainer.device) for _ in range(2))
    weights = torch.randn(batch * heads, tokens, tokens, dtype=dtype, device=trainer.device)

    def chain() -> None:
        for x, weight, gradient in operands:
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)
        for _ in model.blocks:  # scores and mixing, each with the two derivatives
            for _ in range(2):
                torch.bmm(query, key.transpose(1, 2))
                torch.bmm(weights, key)
                torch.bmm(weights.transpose(1, 2), query)

    operations = sum(6.0 * x.numel() * weight.shape[0] for x, weight, _ in operands)
    attention = 2.0 * batch * heads * tokens * tokens * (width // heads)
    return chain, operations + len(model.blocks) * 6 * attention


def _linear(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((rows, inputs), (outputs, inputs), (rows, outputs))
    x, weight, gradient = (torch.randn(shape, dtype=dtype, device=device) for shape in shapes)
    return x, weight, gradient


def timed(work: Callable[[], object], steps: int, device: torch.device) -> np.ndarray:
    """Return seconds a call: by the clock, and of CPU time, which other programs disturb less."""
    _synchronise(device)
    began = np.array([time.perf_counter(), time.process_time()])
    for _ in range(steps):
        work()
    _synchronise(device)
    return (np.array([time.perf_counter(), time.process_time()]) - began) / steps


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def snippet_seconds(trainer: Trainer, steps: int) -> np.ndarray:
    """Return seconds a step, as `timed`, for gathering, regularising and sending the snippets."""
    drawn = trainer.maker.training(0, trainer.share)
    null = SimpleNamespace(
        null=torch.rand(len(drawn), 1), dropout=torch.rand(len(drawn), DIM), snippet_noise=torch.empty(0)
    )
    return timed(lambda: trainer.maker._conditions(drawn.places, null).to(trainer.device), 20 * steps, trainer.device)


def measure(bank: Any, options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Return the figures of one precision."""
    with contextlib.closing(Processes(options.device)) as processes, kept_memory(processes.device):
        torch.manual_seed(0)
        trainer = make_trainer(bank, options, precision, processes)
        bare = bare_step(trainer)
        chain, operations = products(trainer)
        seconds: dict[str, list[np.ndarray]] = {"ours": [], "bare": [], "products": []}
        timed(trainer.make_step, 2, trainer.device)
        timed(bare, 1, trainer.device)
        for _ in range(options.pairs):
            seconds["ours"].append(timed(trainer.make_step, options.steps, trainer.device))
            seconds["bare"].append(timed(bare, options.steps, trainer.device))
            seconds["products"].append(timed(chain, 1, trainer.device))
        snippets = snippet_seconds(trainer, options.steps)
        flops = 3.0 * flops_per_image(trainer.model, training=options.projection) * options.batch
        trainer.close()
    by_clock, by_cpu = (_figures(seconds, snippets, place, flops, operations, options.batch) for place in (0, 1))
    return {**by_clock, "by_cpu_time": by_cpu}


def _figures(
    seconds: dict[str, list[np.ndarray]], snippets: np.ndarray, place: int, flops: float, operations: float, batch: int
) -> dict[str, Any]:
    """Return figures by the clock (place 0) or by CPU time (1)."""
    ours, bare, alone = ([float(pair[place]) for pair in seconds[name]] for name in ("ours", "bare", "products"))
    rates = [(flops / own) / (operations / chain) for own, chain in zip(ours, alone, strict=True)]
    step = statistics.median(ours)
    return {
        "steps_per_second": round(1 / step, 3),
        "images_per_second": round(batch / step, 2),
        "ratio": round(statistics.median(b / o for b, o in zip(bare, ours, strict=True)), 4),
        "gflops": round(flops / step / 1e9, 1),
        "gflops_of_products": round(operations / statistics.median(alone) / 1e9, 1),
        "rate_of_products": round(statistics.median(rates), 3),
        "snippet_share": round(float(snippets[place]) / step, 5),
        "seconds": {"ours": _rounded(ours), "bare": _rounded(bare), "products": _rounded(alone)},
    }


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 4) for value in values]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run with a number of threads; 0 leaves PyTorch's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="LightningDiT-S/1", choices=list(MODEL_PRESETS))
    for name, default in (
        ("--size", 16), ("--channels", 32), ("--batch", 8), ("--pairs", 3), ("--steps", 2), ("--threads", 0), ("--workers", 1)
    ):  # fmt: skip
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--adamw", default="fused", choices=["fused", "foreach", "loop"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--projection", action="store_true", help="with the projection head and its loss, as published")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    with threads(options.threads), tempfile.TemporaryDirectory() as folder:
        bank = make_bank(Path(folder))
        found = {precision: measure(bank, options, precision) for precision in options.precision}
        record = {"settings": vars(options), "threads": torch.get_num_threads(), "torch": torch.__version__, **found}
    if {"fp32", "bf16"} <= found.keys():
        record["bf16_over_fp32"] = round(found["bf16"]["steps_per_second"] / found["fp32"]["steps_per_second"], 3)
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
