"""Experiment "speed": what a memory buys in training, against the same backbone with classes and with nothing.

Same images, optimizer, batch and budget; every checkpoint is sampled and judged against held-out images.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gmem_gen
from tools.experiment_data import EncoderChoice, Images
from tools.experiment_kit import Bench, Row, judged, log_scale, plot, table

MODELS = {"memory": "nano", "classes": "nano:class", "nothing": "nano:none"}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Sizes of the experiment."""

    steps: tuple[int, ...] = (100, 200, 400, 800, 1600)
    """Checkpoints that are judged; the last is the budget. Multiples of the first."""
    num: int = 500
    seed: int = 0


def run(config: Speed, bench: Bench) -> dict[str, Any]:
    """Train the three, judge every checkpoint, and return rows and the ratio of steps."""
    images, judge, cells = bench.images, bench.judge, bench.cells
    if any(step % config.steps[0] for step in config.steps) or sorted(config.steps) != list(config.steps):
        raise SystemExit(f"steps={list(config.steps)}: give rising multiples of the first")
    bank = cells.folder / "bank.safetensors"
    images.build(images.train, bank)
    rows = []
    for name, preset in MODELS.items():
        settings = {"preset": preset, "config": config, **images.identity()}
        if name != "memory":
            del settings["encoder"]  # no snippet reaches a baseline
        made = cells.get(f"train-{name}", settings, lambda work, p=preset: _train(config, images, bank, p, work))
        for step in config.steps:
            cell = {**settings, "step": step, "judge": judge}
            run_folder = cells.folder / made["run"]
            found = cells.get(
                f"judge-{name}-{step}", cell, lambda _, r=run_folder, s=step: _judge(config, images, bank, judge, r, s)
            )
            rows.append({"model": name, "step": step, **found})
    return {"rows": rows, "ratios": ratios(rows)}


def _train(config: Speed, images: Images, bank: Path, preset: str, work: Path) -> Row:
    every, budget = config.steps[0], config.steps[-1]
    settings = (f"train.max_steps={budget}", f"train.checkpoint_every={every}", f"train.seed={config.seed}")
    report = gmem_gen.train(bank, images.config(preset, *settings), out=work / "run")
    return {"run": f"{work.name}/run", "train_seconds": report.seconds, "parameters": report.num_parameters}


def _judge(config: Speed, images: Images, bank: Path, judge: EncoderChoice, run_folder: Path, step: int) -> Row:
    options = gmem_gen.EvaluationOptions(num=config.num, num_resamples=30, seed=config.seed)
    return judged(
        gmem_gen.evaluate(
            bank, judge.load("raw"), checkpoint=run_folder / "checkpoints" / f"step-{step:08d}", reference=images.held_out,
            options=options, out=run_folder.parent.parent / "evaluation",
        )
    )  # fmt: skip


def ratios(rows: list[Row]) -> dict[str, float | None]:
    """Return, for each baseline, its steps to its best distance over the memory's steps to reach that; None: it does not."""
    found: dict[str, float | None] = {}
    for baseline in ("classes", "nothing"):
        own = [row for row in rows if row["model"] == baseline]
        best = min(own, key=lambda row: row["frechet"])
        reached = [row["step"] for row in rows if row["model"] == "memory" and row["frechet"] <= best["frechet"]]
        found[baseline] = best["step"] / min(reached) if reached else None
    return found


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    columns = {"model": "conditioned on", "step": "steps", "frechet": "Fréchet distance", "kid": "KID", "precision": "precision",
               "recall": "recall", "near_copies": "near-copies", "fidelity": "fidelity"}  # fmt: skip
    reached = {
        name: "never within the budget"
        if ratio is None
        else "in as many steps"
        if ratio == 1
        else f"in 1/{ratio:.3g} of the steps"
        for name, ratio in found["ratios"].items()
    }
    said = "; ".join(f"the best distance of the model on {name}: {text}" for name, text in reached.items())
    falling = [
        name for name in found["ratios"] if _still_falling([row for row in found["rows"] if row["model"] == name])
    ]
    still = f" Still falling at the last checkpoint: {', '.join(falling)}." if falling else ""
    return f"{table(found['rows'], columns)}\n\nThe memory reaches {said}.{still}"


def _still_falling(rows: list[Row]) -> bool:
    return min(rows, key=lambda row: row["frechet"])["step"] == max(row["step"] for row in rows)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw distance and recall against steps."""
    steps = sorted({row["step"] for row in found["rows"]})
    with plot(path, 1, 2, (9, 3.4)) as [axes]:
        for axis, (field, label) in zip(axes, {"frechet": "Fréchet distance", "recall": "recall"}.items(), strict=True):
            for name in MODELS:
                own = [row for row in found["rows"] if row["model"] == name]
                axis.plot([row["step"] for row in own], [row[field] for row in own], "o-", label=name)
            axis.set(xlabel="steps", ylabel=label)
            axis.legend(title="conditioned on", frameon=False)
            log_scale(axis, "x", steps)
        log_scale(axes[0], "y")
