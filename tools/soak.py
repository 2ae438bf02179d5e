"""Train for long while kill -9 comes again and again; the loss curve must be that of a training nobody disturbed. Prints JSON.

python -m tools.soak [--minutes 30] [--every 60] [--images tests/data/photos] [--work FOLDER]

Two trainings of the same settings go on side by side, one left alone. When the time is over both are brought to the same step;
every line of their logs (but for times) and every tensor of their last checkpoints must be the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

import gmem_bank
from gmem_gen import checkpoint as checkpoints

SETTINGS = {
    "data.image_size": 32, "model.width": 64, "model.depth": 2, "model.num_heads": 2, "train.batch_size": 16,
    "train.snippet_noise": 0.1, "train.ema_decay": "[0.9999, 0.99]", "train.log_every": 1, "train.num_threads": 1,
    "train.num_workers": 2, "train.max_minutes": 0, "train.keep_checkpoints": 3, "data.validation_fraction": 0.2,
    "train.validate_every": 500, "train.accumulation": 2,
}  # fmt: skip
TIMES = ("elapsed", "images_per_second")
ENDLESS = 10**9


def command(bank: Path, run: Path, steps: int, checkpoint_every: int) -> list[str]:
    """Return the command of a training."""
    settings = {**SETTINGS, "train.max_steps": steps, "train.checkpoint_every": checkpoint_every}
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    return [sys.executable, "-m", "gmem_gen", "train", "-q", "--bank", str(bank), "--out", str(run), *words]


def step_of(run: Path) -> int:
    """Return the step of a run's newest checkpoint."""
    found = checkpoints.list_checkpoints(run)
    return checkpoints.step_of(found[-1]) if found else 0


def records(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log without what is a matter of time."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's newest checkpoint."""
    newest = checkpoints.list_checkpoints(run)[-1]
    return {
        f"{file.name}:{key}": value for file in newest.glob("*.safetensors") for key, value in load_file(file).items()
    }


def disturb(start: list[str], run: Path, deadline: float, every: float) -> dict[str, int]:
    """Start a training over and over and kill each; return how often, and how many steps a kill cost."""
    rng, kills, lost = np.random.default_rng(0), 0, 0
    while time.monotonic() < deadline:
        with subprocess.Popen(start, stdout=subprocess.DEVNULL) as process:
            time.sleep(min(every * rng.uniform(0.8, 1.2), max(0.0, deadline - time.monotonic())))
            if process.poll() is not None:
                raise RuntimeError(f"the training ended by itself with {process.returncode}")
            process.send_signal(signal.SIGKILL)
        kills += 1
        log = run / "log.jsonl"
        reached = (
            max((line["step"] for line in map(parse, log.read_text().splitlines()) if line), default=0)
            if log.exists()
            else 0
        )
        lost += max(0, reached - step_of(run))
    return {"kills": kills, "steps_made_again": lost}


def parse(line: str) -> dict[str, Any]:
    """Return a line of a log, nothing for one that a kill cut."""
    try:
        record: dict[str, Any] = json.loads(line)
    except ValueError:
        return {}
    return record


def soak(work: Path, images: Path, minutes: float, every: float, checkpoint_every: int) -> dict[str, Any]:
    """Return what happened and whether the two trainings are the same."""
    bank, alone, disturbed = work / "bank.safetensors", work / "alone", work / "disturbed"
    gmem_bank.build(images, gmem_bank.load_encoder("hog"), bank)
    with subprocess.Popen(command(bank, alone, ENDLESS, checkpoint_every), stdout=subprocess.DEVNULL) as quiet:
        try:
            counts = disturb(
                command(bank, disturbed, ENDLESS, checkpoint_every), disturbed, time.monotonic() + 60 * minutes, every
            )
        finally:
            quiet.send_signal(signal.SIGTERM)
    reached = {"alone": step_of(alone), "disturbed": step_of(disturbed)}
    end = max(reached.values()) + checkpoint_every
    for run in (alone, disturbed):
        subprocess.run(command(bank, run, end, checkpoint_every), check=True, stdout=subprocess.DEVNULL)
    first, second = records(alone), records(disturbed)
    mine, theirs = tensors(alone), tensors(disturbed)
    return {
        "minutes": minutes, "every_seconds": every, **counts, "steps_reached": reached, "steps_compared": end,
        "lines_compared": len(first), "lines_equal": first == second,
        "first_loss": first[0]["loss"], "last_mean_loss_of_100": float(np.mean([r["loss"] for r in first if "loss" in r][-100:])),
        "tensors_compared": len(mine),
        "tensors_equal": mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine),
    }  # fmt: skip


def main() -> int:
    """Soak, print, and fail where the two differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between kills, give or take a fifth")
    parser.add_argument("--checkpoint-every", type=int, default=100, help="steps")
    parser.add_argument("--images", type=Path, default=Path("tests/data/photos"))
    parser.add_argument("--work", type=Path, default=None, help="empty folder for both runs; default: a temporary one")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        report = soak(work, options.images.resolve(), options.minutes, options.every, options.checkpoint_every)
    print(json.dumps(report, indent=1))
    return 0 if report["lines_equal"] and report["tensors_equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
