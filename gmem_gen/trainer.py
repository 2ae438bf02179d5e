"""Training: the same call again resumes, bit for bit on a CPU in float32.

Everything random is drawn from (seed, step), so a resumed run needs no generator state: model, averaged weights, optimizer
and the step number are all there is.

Shapes: M training images, B batch, C·H·W latent, D snippet dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gmem_bank.errors import ConfigError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning, optim
from gmem_gen.conditioning import Bank, ImagesFrom
from gmem_gen.config import Config
from gmem_gen.image_plan import ImagePlan, plan_images
from gmem_gen.model import auto_patch_size
from gmem_gen.run import Log, default_run, find_resumption, occupied, stored_config, stored_tokenizer, writing
from gmem_gen.runtime import StopRequest, cpu_threads, pick_device
from gmem_gen.sizes import num_parameters
from gmem_gen.stepping import Trainer

CPU_MINUTES = 10.0
Progress = Callable[[int, int], None]
Say = Callable[[str], None]


def _silent_progress(done: int, total: int) -> None:
    pass


def _silent(text: str) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """How a training ended."""

    run: str
    checkpoint: str
    step: int
    total_steps: int
    epochs: float
    num_images: int
    num_parameters: int
    image_size: int
    loss: float | None
    """Mean over the last logged steps; None when no step was made."""
    seconds: float
    """Training time, earlier parts of the same training included."""
    steps_per_second: float | None
    """Of this part."""
    stopped: str
    """"budget", "time", "signal" or "nothing to do"."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def train(
    bank: str | os.PathLike[str] | Bank,
    config: Config | None = None,
    *,
    images: ImagesFrom = None,
    out: str | os.PathLike[str] | None = None,
    accept_bank_change: bool = False,
    handle_signals: bool = False,
    say: Say = _silent,
    read_progress: Progress = _silent_progress,
    progress: Progress = _silent_progress,
) -> TrainReport:
    """Train a generator on the images of a bank; the same call again goes on where the last one stopped.

    Args:
        bank: a bank file, or any object with the Bank interface and SupportsImages.
        config: from `preset` or `load_config`; None: the smallest preset.
        images: folder (or folders) with the images under their keys, instead of where the provenance says they are.
        out: the run's folder; None: `runs/<bank stem>`, which needs `bank` to be a path.
        accept_bank_change: go on although the bank was edited since.
        handle_signals: on SIGINT or SIGTERM save a checkpoint and return.
        say: told remarks, one line each.
        read_progress: told images read and images in all, before training.
        progress: told steps made and steps in all.

    Returns:
        A TrainReport.

    Raises:
        SourceError: images are missing.
        ConfigError, CheckpointError, EncoderMismatchError: the run's folder holds another training.
        GMemError: the loss is no longer finite.
        WriteError: no room for a checkpoint.
    """
    if isinstance(bank, (str, os.PathLike)):
        opened, run = conditioning.open_bank(bank), Path(out) if out is not None else default_run(bank)
    else:
        opened = conditioning.require_interface(bank)
        if out is None:
            raise ConfigError("training on a bank that is not a file needs a folder for the run: out", key="out")
        run = Path(out)
    wanted, stored = config or Config(), stored_config(run)
    device = pick_device(wanted.train.device)
    planned = plan_images(opened, images, wanted, stored=stored, record=stored_tokenizer(run), device=str(device))
    digest = hashlib.sha256(json.dumps(planned.join.keys).encode()).hexdigest()
    with occupied(run):
        resolved = resolve(wanted, opened, planned, stored)
        resumption = find_resumption(run, resolved, opened, keys_digest=digest, accept_bank_change=accept_bank_change)
        with cpu_threads(resolved.train.num_threads), writing(run):
            ready = planned.open(run / "cache", read_progress)
            trainer = Trainer(opened, resolved, ready, planned.join, device)
            trainer.restore(resumption)
            _introduce(trainer, run, say)
            (run / "config.toml").write_text(resolved.to_toml(), encoding="utf-8")
            return _loop(trainer, run, digest, StopRequest(), handle_signals, progress)


def plan(bank: str | os.PathLike[str], config: Config, *, images: ImagesFrom = None) -> Config:
    """Return the configuration that `train` would use, having checked bank, images and device; trains nothing."""
    opened = conditioning.open_bank(bank)
    planned = plan_images(opened, images, config, device=str(pick_device(config.train.device)))
    resolved = resolve(config, opened, planned, None)
    with torch.device("meta"):
        checkpoints.make_model(resolved, planned.latent, int(conditioning.record_of(opened)["dim"]))
    return resolved


def resolve(
    config: Config,
    bank: Bank,
    planned: ImagePlan,
    stored: Config | None,
) -> Config:
    """Return the configuration with everything that was left to us filled in.

    Args:
        config: as asked for.
        bank: what is trained on.
        planned: its rows with images, and what is made of these.
        stored: of the training that goes on: it keeps what was chosen when it began; None for a new one.
    """
    facts = conditioning.record_of(bank)
    patch = config.model.patch_size or (stored.model.patch_size if stored else auto_patch_size(planned.latent.size))
    scale = config.model.snippet_scale or (stored.model.snippet_scale if stored else 0.0)
    scale = scale or (math.sqrt(facts["dim"]) if facts["space"] == "unit" else 1.0)
    prediction = config.flow.prediction
    if prediction == "auto":
        fits = 2 * patch**2 * planned.latent.channels <= config.model.width
        prediction = stored.flow.prediction if stored else ("velocity" if fits else "data")
    if config.model.projection_dim:
        raise ConfigError(
            "a projection head (model.projection_dim) learns from the encoder's patch tokens, and this training has no source of "
            "them: set model.projection_dim=0",
            key="model.projection_dim",
        )
    classes = config.model.num_classes
    if config.model.condition == "class":
        present = len(conditioning.class_names(bank))
        if classes not in (0, present):
            raise ConfigError(
                f"model.num_classes is {classes}, the bank has {present} concepts", key="model.num_classes"
            )
        classes = present
    return dataclasses.replace(
        config,
        data=planned.data,
        model=dataclasses.replace(config.model, patch_size=patch, snippet_scale=scale, num_classes=classes),
        flow=dataclasses.replace(config.flow, prediction=prediction),
    )


def minutes_allowed(config: Config, device: torch.device) -> float:
    """Return the limit of training time in minutes, infinite for none."""
    minutes = config.train.max_minutes
    if minutes < 0:
        return CPU_MINUTES if device.type == "cpu" else math.inf
    return minutes or math.inf


def _introduce(trainer: Trainer, run: Path, say: Say) -> None:
    config, join = trainer.config, trainer.join
    left_out = f", {join.num_derived} derived rows left out" if join.num_derived else ""
    left_out += f", {len(join.missing)} rows without image left out" if join.missing else ""
    say(
        f"{len(join.rows)} images at {config.data.image_size} px{left_out}; "
        f"{num_parameters(trainer.model) / 1e6:.2f} M parameters, "
        f"{trainer.model.grid**2} tokens, {trainer.device}"
    )
    minutes = minutes_allowed(config, trainer.device)
    limit = f", or {minutes:g} minutes" if math.isfinite(minutes) else ""
    epochs = trainer.total_steps / trainer.order.steps_per_epoch
    steps = f"{trainer.total_steps} steps of {trainer.order.batch_size} = {epochs:.4g} epochs"
    say(f"budget: {steps}{limit} (train.epochs, train.max_minutes)")
    if trainer.step:
        say(f"resuming {run} at step {trainer.step}")


def _loop(
    trainer: Trainer, run: Path, digest: str, stop: StopRequest, handle_signals: bool, progress: Progress
) -> TrainReport:
    config, log = trainer.config.train, Log(run, trainer.step)
    seconds = minutes_allowed(trainer.config, trainer.device) * 60
    began, first, before = time.perf_counter(), trainer.step, trainer.elapsed
    reason = "nothing to do" if trainer.step >= trainer.total_steps else "budget"
    saved = trainer.step
    with stop.listening(handle_signals), contextlib.closing(log):
        progress(trainer.step, trainer.total_steps)
        while trainer.step < trainer.total_steps:
            if trainer.elapsed >= seconds:
                reason = "time"
                break
            norm = trainer.make_step()
            trainer.elapsed = before + time.perf_counter() - began
            progress(trainer.step, trainer.total_steps)
            if trainer.step % config.log_every == 0 or trainer.step == trainer.total_steps:
                log.write(_log_line(trainer, norm))
            if stop.signal is not None:
                reason = "signal"
                break
            if trainer.step % config.checkpoint_every == 0:
                trainer.save(run, digest)
                saved = trainer.step
        if trainer.step != saved:
            trainer.save(run, digest)
    made, spent = trainer.step - first, time.perf_counter() - began
    return TrainReport(
        run=str(run),
        checkpoint=str(checkpoints.list_checkpoints(run)[-1]),
        step=trainer.step,
        total_steps=trainer.total_steps,
        epochs=round(trainer.step / trainer.order.steps_per_epoch, 3),
        num_images=len(trainer.join.rows),
        num_parameters=num_parameters(trainer.model),
        image_size=trainer.config.data.image_size,
        loss=float(np.mean(trainer.losses)) if made else None,
        seconds=round(trainer.elapsed, 2),
        steps_per_second=round(made / spent, 3) if made else None,
        stopped=reason,
    )


def _log_line(trainer: Trainer, norm: float) -> dict[str, Any]:
    return {
        "step": trainer.step,
        "loss": trainer.losses[-1],
        "mean_loss": float(np.mean(trainer.losses)),
        "gradient_norm": norm,
        "learning_rate": optim.learning_rate(trainer.step - 1, trainer.total_steps, trainer.config.train),
        "epoch": trainer.step / trainer.order.steps_per_epoch,
        "elapsed": round(trainer.elapsed, 3),
    }
