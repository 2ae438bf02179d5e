"""The largest differences from the published reference vectors, by kind, as JSON.

GMEM_GOLDEN=FOLDER python -m tools.compare_golden

Without GMEM_GOLDEN the fixtures of tests/data are compared. The tests hold the same comparisons to their tolerances.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from gmem_gen import losses, paths
from gmem_gen.config import FlowConfig, SampleConfig
from gmem_gen.guidance import guided
from gmem_gen.sampling import solve
from tests.conftest import DATA
from tests.gmem_gen.golden import gaussian, model_of, projector_state, runs

MEAN, SCALE = torch.tensor([0.5, -1.0, 2.0, 0.25]).view(1, 4, 1, 1), 0.7


def gap(mine: torch.Tensor, golden: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    return float((mine - golden).abs().max())


def compare_model(folder: Path, case: str) -> dict[str, float]:
    """Compare forward, guidance and training outputs of a small model."""
    vectors = load_file(folder / f"lightningdit_{case}.safetensors")
    extra = folder / f"lightningdit_{case}_training.safetensors"
    vectors |= load_file(extra) if extra.exists() else {}
    facts = json.loads((folder / f"lightningdit_{case}.json").read_text())
    model = model_of(facts["class_kwargs"], encoder_depth=facts["encoder_depth"], projection_dim=768)
    state = {name.removeprefix("state."): value for name, value in vectors.items() if name.startswith("state.")}
    model.load_state_dict(state | projector_state())
    x, t, c = vectors["in.x"], vectors["in.t"], vectors["in.c"]
    zeros = torch.zeros_like(c)
    found = {f"{case} forward": gap(model(x, t, c), vectors["eval.out"])}
    found[f"{case} null"] = gap(model(x, t, zeros), vectors["eval.out_c_zero"])
    steps = []
    for one in facts["cfg"]:
        start = one["cfg_interval_start"] if one.get("cfg_interval") else 0.0
        field = guided(model, c, zeros, one["cfg_scale"], start, one.get("cfg_interval_end") or 1.0)
        steps.append(gap(field(x, torch.full((3,), one["t"])), vectors[f"cfg.{one['name']}.out"][:3]))
    found[f"{case} guidance"] = max(steps)
    for name, condition in (("train_nodrop", c), ("train_drop_seed4242", vectors["train_drop_seed4242.c_dropped"])):
        got = model(x, t, condition, project=True)
        found[f"{case} {name}"] = gap(got.output, vectors[f"{name}.out"])
        found[f"{case} {name} projection"] = gap(got.tokens, vectors[f"{name}.z"])
    return found


def compare_samples(folder: Path, kind: str) -> dict[str, float]:
    """Compare the samples of the ODE or of the SDE; several runs of one method give its largest difference."""
    vectors, records = runs(folder, f"transport_{kind}")
    found: dict[str, float] = {}
    for run in records:
        if run.get("error") or not run["finite"]:
            continue
        if kind == "ode":
            config = SampleConfig(
                method=run["method"], num_steps=run["num_steps"] - 1, timestep_shift=run["timestep_shift"] or 1.0
            )
        else:
            config = SampleConfig(
                method=f"sde-{run['method']}", num_steps=run["num_steps"] - (run["last_step"] is None),
                last_step=str(run["last_step"]), last_step_size=run["last_step_size"],
                diffusion=run["diffusion_form"], diffusion_norm=float(run["diffusion_norm"]),
            )  # fmt: skip
        flow = FlowConfig(path=run["path"], prediction=run["prediction"])
        stream = iter([vectors["in.init"], *vectors.get("noise.seed99", ())])
        field = gaussian(flow.path, flow.prediction, MEAN, SCALE)
        solution = solve(field, flow, config, lambda stream=stream: next(stream))
        name = f"{kind} {flow.path} {config.method}"
        found[name] = max(found.get(name, 0.0), gap(solution.x_1, vectors[run["key"]]))
    return found


def compare_losses(folder: Path) -> dict[str, float]:
    """Compare the losses of every path, prediction and weighting, relative to the loss."""
    golden = load_file(folder / "transport_plan.safetensors")
    x_0, x_1, t, value = (golden[f"in.{name}"] for name in ("x0", "x1", "t", "pred"))
    worst = 0.0
    for name in [name for name in golden if name.endswith(".loss")]:
        path, prediction, weighting, _ = name.lower().split(".")
        x_t = paths.interpolant(x_0, x_1, t, path)
        got = losses.squared_errors(
            value, x_0, x_1, x_t, t, path=path, prediction=prediction, weighting=weighting.removeprefix("w_")
        )
        worst = max(worst, float(((got - golden[name]) / golden[name]).abs().max()))
    return {"losses, relative": worst}


def main() -> int:
    """Compare, and print one JSON object."""
    folder = Path(os.environ.get("GMEM_GOLDEN", DATA))
    found: dict[str, float] = {}
    with torch.no_grad():
        for case in ("patch2", "xlflags"):
            if (folder / f"lightningdit_{case}.json").exists():
                found |= compare_model(folder, case)
        found |= compare_losses(folder) | compare_samples(folder, "ode") | compare_samples(folder, "sde")
    print(json.dumps({name: float(f"{value:.2g}") for name, value in found.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
