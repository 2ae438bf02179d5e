"""The loop around the steps: log, validation, previews, checkpoints, and when it ends."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gmem_gen import checkpoint as checkpoints
from gmem_gen import optim
from gmem_gen.checkpoint_state import amend_state
from gmem_gen.journal import Journal
from gmem_gen.outputs import Progress, Say
from gmem_gen.previews import preview_conditions, write_preview
from gmem_gen.runtime import StopRequest
from gmem_gen.stepping import Step, Trainer
from gmem_gen.validation import Interrupted, validate


@dataclass(kw_only=True)
class Loop:
    """A training from where it is to where it ends. Every process runs it; the first one writes and speaks."""

    trainer: Trainer
    run: Path
    keys_digest: str
    journal: Journal | None
    """None in the other processes."""
    stop: StopRequest
    seconds: float
    """Limit of training time, earlier parts included."""
    progress: Progress
    say: Say
    status: Say
    """Told a few figures at every line of the log."""
    first: int = 0
    """Step at which this part began."""
    spent: float = 0.0
    """Seconds of this part."""
    saved: int = -1
    """Step of the newest checkpoint in the run's folder."""
    began: float = field(default=0.0, init=False)
    before: float = field(default=0.0, init=False)
    marked: int = field(default=0, init=False)
    """Step of the last line of the log."""
    stepping: float = field(default=0.0, init=False)
    """Seconds in steps since then, for images a second: validation, samples and checkpoints have no part in it."""
    noted: tuple[object, ...] = field(default=(), init=False)
    """What the newest checkpoint says of validation."""

    def __post_init__(self) -> None:
        self.first, self.noted = self.trainer.step, self._notes()
        if checkpoints.step_folder(self.run, self.first).is_dir():
            self.saved = self.first
        self.began, self.before = time.perf_counter(), self.trainer.elapsed
        self.marked = self.trainer.step

    def go(self) -> str:
        """Make the steps that are left; return why it ended: "budget", "time", "signal" or "nothing to do"."""
        trainer = self.trainer
        reason = "nothing to do" if trainer.step >= trainer.total_steps else "budget"
        self.progress(trainer.step, trainer.total_steps)
        signalled = trainer.looked != trainer.step and not self._look()  # a signal came before its validation was done
        if signalled:
            reason = "signal"
        while trainer.step < trainer.total_steps and not signalled:
            if trainer.processes.count == 1 and trainer.elapsed >= self.seconds:
                reason = "time"
                break
            started = time.perf_counter()
            step = trainer.make_step(self._asked)
            self.stepping += time.perf_counter() - started
            self._clock()
            self._report(step)
            self.progress(trainer.step, trainer.total_steps)
            signalled, late = step.requests
            if signalled or (late and trainer.processes.count > 1):
                reason = "signal" if signalled else "time"
                break
            if not self._look():
                reason = "signal"
                break
            if trainer.step % trainer.config.train.checkpoint_every == 0:
                self._save()
        self._save()
        self.spent = time.perf_counter() - self.began
        return reason

    def _asked(self) -> tuple[bool, bool]:
        """Say whether a signal came, and whether the first process's time is up: all of them stop at the same step."""
        late = self.trainer.processes.is_first and self._elapsed() >= self.seconds
        return self.stop.signal is not None, late

    def _elapsed(self) -> float:
        return self.before + time.perf_counter() - self.began

    def _clock(self) -> None:
        self.trainer.elapsed = self._elapsed()

    def _report(self, step: Step) -> None:
        trainer = self.trainer
        if self.journal is None or (
            trainer.step % trainer.config.train.log_every and trainer.step < trainer.total_steps
        ):
            return
        speed = (trainer.step - self.marked) * trainer.order.batch_size / max(self.stepping, 1e-9)
        self.marked, self.stepping = trainer.step, 0.0
        record: dict[str, Any] = {
            "step": trainer.step,
            **step.terms,
            "mean_loss": float(np.mean(trainer.losses)),
            "gradient_norm": step.norm,
            "learning_rate": optim.learning_rate(trainer.step - 1, trainer.total_steps, trainer.config.train),
            "epoch": trainer.step / trainer.order.steps_per_epoch,
            "images_per_second": round(speed, 2),
            "elapsed": round(trainer.elapsed, 3),
        }
        self.journal.write(record)
        self.status(f"loss {record['mean_loss']:.4f}, {speed:.4g} images/s")

    def _look(self) -> bool:
        """Draw and validate where it is time; False where a signal came, and it is left to when the training goes on."""
        trainer, config = self.trainer, self.trainer.config.train
        last = trainer.step == trainer.total_steps
        if config.sample_every and (trainer.step % config.sample_every == 0 or last):
            if self.journal is not None:
                grid = write_preview(trainer, self.run, preview_conditions(trainer))
                self.journal.picture(grid, trainer.step)
            if any(trainer.processes.sum([self._signalled()])):
                return False
        if len(trainer.split.held_out) and (trainer.step % config.validate_every == 0 or last):
            try:
                found = validate(trainer, self._signalled)
            except Interrupted:
                return False
            self._validated(found)
        trainer.looked = trainer.step
        return True

    def _signalled(self) -> bool:
        return self.stop.signal is not None

    def _validated(self, found: dict[str, float]) -> None:
        """Write the losses down; a best one saves what has been done by then."""
        trainer, loss = self.trainer, found["validation_loss"]
        better = math.isfinite(loss) and (trainer.best is None or loss < trainer.best[1])
        if better:
            trainer.best = (trainer.step, loss)
        trainer.looked = trainer.step
        self._clock()
        if self.journal is not None:
            self.journal.write({"step": trainer.step, **found, "elapsed": round(trainer.elapsed, 3)})
            self.say(f"step {trainer.step}: validation loss {loss:.5f}{' (best)' if better else ''}")
        if better and trainer.config.train.keep_best:
            self._save()

    def _notes(self) -> tuple[object, ...]:
        return self.trainer.looked, self.trainer.best

    def _save(self) -> None:
        trainer, notes = self.trainer, self._notes()
        if trainer.step != self.saved:
            if self.journal is not None:
                trainer.save(self.run, self.keys_digest)
        elif notes != self.noted and self.journal is not None:
            where = checkpoints.step_folder(self.run, trainer.step)
            amend_state(where, {"looked": trainer.looked, "best": trainer.best})
        self.saved, self.noted = trainer.step, notes
        trainer.processes.wait()
