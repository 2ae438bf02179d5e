"""Training: the same call again resumes, bit for bit on a CPU in float32.

Everything random is drawn from (seed, step, sample), so a resumed run needs no generator state: model, averaged weights,
optimizer and the step number are all there is.

Shapes: M rows with images, B batch, C·H·W latent, D snippet dimension.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmem_bank.errors import CheckpointError, ConfigError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning
from gmem_gen.conditioning import Bank, ImagesFrom
from gmem_gen.config import Config
from gmem_gen.distributed import Processes
from gmem_gen.held_out import HeldOut, hold_out
from gmem_gen.image_plan import plan_images
from gmem_gen.journal import Journal, require_tensorboard
from gmem_gen.loop import Loop
from gmem_gen.outputs import Progress, Say, no_progress, no_remarks
from gmem_gen.patch_tokens import PatchTokens
from gmem_gen.previews import preview_conditions
from gmem_gen.resolving import minutes_allowed, require_trainable, resolve
from gmem_gen.run import (
    choose_checkpoint,
    default_run,
    find_resumption,
    occupied,
    stored_config,
    stored_tokenizer,
    writing,
)
from gmem_gen.runtime import StopRequest, cpu_threads, kept_memory, pick_device
from gmem_gen.sizes import num_parameters
from gmem_gen.splits import Split, split_rows
from gmem_gen.stepping import Trainer


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
    best: tuple[int, float] | None
    """Step and loss of the best validation, where something is held out."""
    num_processes: int
    stopped: str
    """"budget", "time", "signal" or "nothing to do"."""
    signal: int | None
    """Its number, where this process got one: 2 for Ctrl-C, 15 for SIGTERM."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def train(
    bank: str | os.PathLike[str] | Bank,
    config: Config | None = None,
    *,
    images: ImagesFrom = None,
    out: str | os.PathLike[str] | None = None,
    resume_from: str = "latest",
    accept_bank_change: bool = False,
    tensorboard: bool = False,
    handle_signals: bool = False,
    say: Say = no_remarks,
    status: Say = no_remarks,
    read_progress: Progress = no_progress,
    progress: Progress = no_progress,
) -> TrainReport:
    """Train a generator on the images of a bank; the same call again goes on where the last one stopped.

    Started by torchrun or accelerate, its processes share every step; the first one writes and speaks.

    Args:
        bank: a bank file, or any object with the Bank interface and SupportsImages.
        config: from `preset` or `load_config`; None: the smallest preset.
        images: folder (or folders) with the images under their keys, instead of where the provenance says they are.
        out: the run's folder; None: `runs/<bank stem>`, which needs `bank` to be a path.
        resume_from: "latest", "previous" (the checkpoint before it), or the folder of a checkpoint. Later checkpoints are
            set aside under another name.
        accept_bank_change: go on although the bank was edited since.
        tensorboard: also write RUN/tensorboard.
        handle_signals: on SIGINT or SIGTERM save a checkpoint and return.
        say: told remarks, one line each.
        status: told a few figures at every line of the log.
        read_progress: told images read and images in all, before training.
        progress: told steps made and steps in all.

    Returns:
        A TrainReport.

    Raises:
        SourceError: images or patch tokens are missing.
        ConfigError, CheckpointError, EncoderMismatchError: the run's folder holds another training.
        MissingDependencyError: TensorBoard is asked for and not installed.
        GMemError: the loss is no longer finite.
        WriteError: no room for a checkpoint.
    """
    opened, run = _bank_and_run(bank, out)
    wanted = config or Config()
    if tensorboard:
        require_tensorboard()
    with contextlib.closing(Processes(wanted.train.device)) as processes, _entered(run, processes):
        checkpoint = choose_checkpoint(run, resume_from)
        stored = stored_config(checkpoint)
        planned = plan_images(
            opened, images, wanted, stored=stored, record=stored_tokenizer(checkpoint), device=str(processes.device)
        )
        join = planned.join
        tokens = _patch_tokens(wanted, join.keys)
        if tokens is not None and processes.is_first and (remark := tokens.remark(conditioning.record_of(opened))):
            say(remark)
        resolved = resolve(wanted, opened, planned, stored, tokens)
        digest = hashlib.sha256(json.dumps(join.keys).encode()).hexdigest()
        resumption = find_resumption(
            run, checkpoint, resolved, opened, keys_digest=digest, accept_bank_change=accept_bank_change
        )
        split, facts = _split(opened, join, resolved), _token_facts(tokens, checkpoint)
        held = hold_out(checkpoint, join.keys, split)
        facts |= held.facts()
        require_trainable(resolved, opened, planned, split, tokens=tokens, num_processes=processes.count)
        with cpu_threads(resolved.train.num_threads), kept_memory(processes.device), writing(run):
            if tokens is not None:
                tokens.require_sound()
            with processes.first_goes_first():
                ready = planned.open(run / "cache", read_progress)
            trainer = Trainer(opened, resolved, ready, join, processes, split=split, tokens=tokens, facts=facts)
            with contextlib.closing(trainer):
                trainer.restore(resumption, compare_best=held.comparable)
                processes.wait()  # all have read before the first one writes
                journal = _begin(trainer, run, checkpoint, held, say, tensorboard) if processes.is_first else None
                loop = Loop(
                    trainer=trainer, run=run, keys_digest=digest, journal=journal, stop=StopRequest(), progress=progress,
                    seconds=minutes_allowed(resolved, processes.device) * 60, say=say, status=status,
                )  # fmt: skip
                with (
                    contextlib.closing(journal) if journal else contextlib.nullcontext(),
                    loop.stop.listening(handle_signals),
                ):
                    return _ended(loop, loop.go())


def _bank_and_run(bank: str | os.PathLike[str] | Bank, out: str | os.PathLike[str] | None) -> tuple[Bank, Path]:
    if isinstance(bank, (str, os.PathLike)):
        return conditioning.open_bank(bank), Path(out) if out is not None else default_run(bank)
    if out is None:
        raise ConfigError("training on a bank that is not a file needs a folder for the run: out", key="out")
    return conditioning.require_interface(bank), Path(out)


@contextlib.contextmanager
def _entered(run: Path, processes: Processes) -> Iterator[None]:
    """Keep other trainings out of the run's folder; the other processes of this one wait until it is there."""
    with occupied(run) if processes.is_first else contextlib.nullcontext():
        processes.wait()
        yield


def _patch_tokens(config: Config, keys: list[str]) -> PatchTokens | None:
    return PatchTokens(config.data.tokens, keys, config.data.token_resampling) if config.data.tokens else None


def _token_facts(tokens: PatchTokens | None, checkpoint: Path | None) -> dict[str, Any]:
    """Return what checkpoints remember of the patch tokens; raises CheckpointError where the training began with others.

    An imported checkpoint does not say what its head learned from: any of its dimension are taken, or none.
    """
    facts = {"tokens": tokens.record() if tokens else None}
    state = checkpoints.read_state(checkpoint) if checkpoint is not None else {}
    if state.get("tokens", facts["tokens"]) != facts["tokens"]:
        raise CheckpointError(
            f"{checkpoint} was trained with other patch tokens (data.tokens): give them, or choose another --out",
            path=checkpoint,
        )
    return facts


def _split(bank: Bank, join: conditioning.Join, config: Config) -> Split:
    name = config.data.validation_concept
    concept = conditioning.concept_keys(bank, name) if name else frozenset()
    return split_rows(join.keys, config.data, config.train.seed, concept)


def _begin(trainer: Trainer, run: Path, checkpoint: Path | None, held: HeldOut, say: Say, tensorboard: bool) -> Journal:
    """Write what a run's folder has from the beginning, and say what comes; only in the first process."""
    if checkpoint is not None and checkpoint.resolve().parent == checkpoints.checkpoints_folder(run).resolve():
        for moved in checkpoints.set_aside_after(checkpoint):
            say(f"a later checkpoint is now {moved}")
    (run / "config.toml").write_text(trainer.config.to_toml(), encoding="utf-8")
    held.write(run)
    _introduce(trainer, run, say)
    return Journal(run, trainer.step, tensorboard=tensorboard)


def _ended(loop: Loop, reason: str) -> TrainReport:
    trainer, made = loop.trainer, loop.trainer.step - loop.first
    return TrainReport(
        run=str(loop.run),
        checkpoint=str(checkpoints.list_checkpoints(loop.run)[-1]),
        step=trainer.step,
        total_steps=trainer.total_steps,
        epochs=round(trainer.step / trainer.order.steps_per_epoch, 3),
        num_images=len(trainer.join.rows) - len(trainer.split.held_out),
        num_parameters=num_parameters(trainer.model),
        image_size=trainer.config.data.image_size,
        loss=float(np.mean(trainer.losses)) if made else None,
        seconds=round(trainer.elapsed, 2),
        steps_per_second=round(made / loop.spent, 3) if made else None,
        best=trainer.best,
        num_processes=trainer.processes.count,
        stopped=reason,
        signal=loop.stop.signal,
    )


def plan(bank: str | os.PathLike[str], config: Config, *, images: ImagesFrom = None) -> Config:
    """Return the configuration that `train` would use, having checked bank, images and device; trains nothing."""
    opened = conditioning.open_bank(bank)
    planned = plan_images(opened, images, config, device=str(pick_device(config.train.device)))
    tokens = _patch_tokens(config, planned.join.keys)
    resolved = resolve(config, opened, planned, None, tokens)
    require_trainable(resolved, opened, planned, _split(opened, planned.join, resolved), tokens=tokens)
    return resolved


def _introduce(trainer: Trainer, run: Path, say: Say) -> None:
    config, join = trainer.config, trainer.join
    left_out = f", {join.num_derived} derived rows left out" if join.num_derived else ""
    left_out += f", {len(join.missing)} rows without image left out" if join.missing else ""
    held = f", {len(trainer.split.held_out)} more held out" if len(trainer.split.held_out) else ""
    say(
        f"{len(trainer.split.samples)} images{held}, at {config.data.image_size} px{left_out}; "
        f"{num_parameters(trainer.model) / 1e6:.2f} M parameters, "
        f"{trainer.model.grid**2} tokens, {trainer.device}{_together(trainer)}"
    )
    minutes = minutes_allowed(config, trainer.device)
    limit = f", or {minutes:g} minutes" if math.isfinite(minutes) else ""
    epochs = trainer.total_steps / trainer.order.steps_per_epoch
    steps = f"{trainer.total_steps} steps of {trainer.order.batch_size} = {epochs:.4g} epochs"
    say(f"budget: {steps}{limit} (train.epochs, train.max_minutes)")
    if trainer.order.batch_size < trainer.config.train.batch_size:
        say(f"a step sees all {trainer.order.batch_size} images: there are fewer than train.batch_size")
    if trainer.config.train.sample_every:
        say(f"samples on the way are of {', '.join(preview_conditions(trainer).keys)}")
    if trainer.step:
        say(f"resuming {run} at step {trainer.step}")


def _together(trainer: Trainer) -> str:
    count, parts = trainer.processes.count, trainer.config.train.accumulation
    return (f", {count} processes" if count > 1 else "") + (f", steps in {parts} parts" if parts > 1 else "")
