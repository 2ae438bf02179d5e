"""A training run's folder: what is in it, whether a training may go on in it, and its log.

RUN/.gmem-run  config.toml  log.jsonl  checkpoints/  cache/  samples/
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gmem_bank
from gmem_bank.errors import CheckpointError, ConfigError, LockedError, OutputExistsError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning, outputs
from gmem_gen.conditioning import Bank
from gmem_gen.config import Config, SampleConfig

# What may differ between the parts of one training: where it stops, where it runs, how often it reports.
FREE_SETTINGS = frozenset(
    f"train.{name}"
    for name in (
        "epochs",
        "max_steps",
        "max_minutes",
        "checkpoint_every",
        "keep_checkpoints",
        "keep_every",
        "keep_best",
        "log_every",
        "validate_every",
        "sample_every",
        "sample_images",
        "accumulation",
        "gradient_checkpointing",
        "num_workers",
        "device",
        "num_threads",
    )
) | {
    "data.allow_missing",
    "data.tokens",
    "data.validation_keys",
    # where the same weights and latents lie; that they are the same is seen from the checkpoint's record of its tokenizer
    *("data.tokenizer_weights", "data.tokenizer_revision", "data.latents"),
    *(f"sample.{field.name}" for field in dataclasses.fields(SampleConfig)),
}
BUDGET_SETTINGS = frozenset({"train.epochs", "train.max_steps"})


def default_run(bank_path: str | os.PathLike[str]) -> Path:
    """Return `runs/<bank stem>`: where `train` writes and `sample` looks."""
    return Path("runs") / Path(bank_path).stem


@dataclass(frozen=True, kw_only=True)
class Resumption:
    """Where a training goes on."""

    checkpoint: Path | None
    step: int
    elapsed: float
    """Seconds of training so far."""
    losses: tuple[float, ...] = ()
    """The last ones, for the running mean."""


def writing(run: Path) -> AbstractContextManager[None]:
    """Turn an operating-system error in the block into a WriteError that names the run's folder."""
    advice = "Checkpoints stand; free some space, or choose another --out, and run the same command again"
    return outputs.writing(run, f"to the run's folder {run}", advice)


@contextlib.contextmanager
def occupied(run: Path) -> Iterator[None]:
    """Make the folder, mark it (so that `gmem-bank build` does not take samples for images) and keep others out of it.

    Raises:
        LockedError: another training is going on there.
        OutputExistsError: the folder holds other files than a run's.
        WriteError: the folder cannot be written.
    """
    with writing(run):
        run.mkdir(parents=True, exist_ok=True)
        if any(run.iterdir()) and not (run / gmem_bank.RUN_MARKER).is_file():
            raise OutputExistsError(
                f"{run} holds other files: choose an empty or new folder for the run with --out", path=run
            )
        marker = (run / gmem_bank.RUN_MARKER).open("a")
    with marker:
        try:
            fcntl.flock(marker, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LockedError(
                f"another training is going on in {run}: wait for it, or choose another --out", path=run
            ) from error
        yield


def choose_checkpoint(run: Path, resume_from: str = "latest") -> Path | None:
    """Return the checkpoint that a training goes on from, None to begin anew.

    Args:
        run: the run's folder.
        resume_from: "latest", "previous" (the one before it), or a checkpoint's or another run's folder.

    Raises:
        CheckpointError: no such checkpoint, or one of another run although this one has its own.
    """
    found = checkpoints.list_checkpoints(run)
    if resume_from == "latest":
        return found[-1] if found else None
    if resume_from == "previous":
        if len(found) < 2:
            raise CheckpointError(f"{run} has {len(found)} checkpoints: there is none before the latest", path=run)
        return found[-2]
    where = Path(resume_from)
    inside = checkpoints.list_checkpoints(where)
    chosen = where if (where / checkpoints.STATE).exists() else inside[-1] if inside else None
    if chosen is None:
        raise CheckpointError(f"no checkpoint in {where}: --resume-from takes latest, previous or a folder", path=where)
    if found and chosen.resolve().parent != found[0].resolve().parent:
        raise CheckpointError(
            f"{run} has checkpoints of its own: to go on from {chosen} choose another --out", path=run
        )
    return chosen


def find_resumption(
    run: Path, checkpoint: Path | None, config: Config, bank: Bank, *, keys_digest: str, accept_bank_change: bool
) -> Resumption:
    """Return where to go on, after making sure that this is the same training.

    Raises:
        ConfigError: settings differ that a training cannot change on its way.
        EncoderMismatchError: the bank has another encoder.
        CheckpointError: the bank was edited and `accept_bank_change` is False, or the checkpoint is damaged.
    """
    if checkpoint is None:
        return Resumption(checkpoint=None, step=0, elapsed=0.0)
    state = checkpoints.read_state(checkpoint)
    conditioning.require_same_memory(bank, state["bank"], f"the training in {run}")
    _require_same_settings(run, _config_in(state), config)
    before, now = state["bank"], conditioning.record_of(bank)
    same_bank = before["fingerprint"] == now["fingerprint"] and state["keys_digest"] == keys_digest
    if not (same_bank or accept_bank_change):
        raise CheckpointError(
            f"the bank has changed since the training in {run} stopped at step {state['step']} "
            f"({before['num_rows']} rows then, {now['num_rows']} now). A trained generator works with the edited bank: "
            "just sample. To go on training on the edited bank give --accept-bank-change; to start anew choose another --out",
            path=run,
        )
    return Resumption(
        checkpoint=checkpoint,
        step=int(state["step"]),
        elapsed=float(state["elapsed"]),
        losses=tuple(state.get("losses", ())),
    )


def stored_config(checkpoint: Path | None) -> Config | None:
    """Return the configuration of the training that goes on, None of a new one; raises CheckpointError."""
    if checkpoint is None:
        return None
    try:
        return _config_in(checkpoints.read_state(checkpoint))
    except ConfigError as error:
        raise CheckpointError(f"the configuration in {checkpoint} cannot be used: {error}", path=checkpoint) from error


def _config_in(state: dict[str, Any]) -> Config:
    """Return the configuration that a checkpoint's state holds; before there were tokenizers, they were pixels."""
    config = Config.from_mapping(state["config"])
    data = dataclasses.replace(config.data, tokenizer=config.data.tokenizer or "pixels")
    return dataclasses.replace(config, data=data)


def stored_tokenizer(checkpoint: Path | None) -> dict[str, Any] | str | None:
    """Return the record of the tokenizer of the training that goes on, None of a new one; raises CheckpointError."""
    record: dict[str, Any] | str | None = checkpoints.read_state(checkpoint)["tokenizer"] if checkpoint else None
    return record


def _require_same_settings(run: Path, stored: Config, config: Config) -> None:
    """Compare two configurations; a setting that is newer than the stored one has its default there."""
    before, now = stored.to_json(), config.to_json()
    free = FREE_SETTINGS if now["train"]["schedule"] == "constant" else FREE_SETTINGS - BUDGET_SETTINGS
    changed = [
        f"{section}.{name} was {before[section][name]!r}, is {value!r}"
        for section, values in now.items()
        for name, value in values.items()
        if f"{section}.{name}" not in free and before[section][name] != value
    ]
    if changed:
        raise ConfigError(
            f"the training in {run} has other settings: {'; '.join(changed[:4])}. Repeat its command to go on with it, or "
            "choose another --out",
            path=run,
        )


class Log:
    """log.jsonl: one JSON object a line, cut back to the checkpoint when a training goes on.

    Args:
        run: the run's folder.
        step: lines past this step are dropped: they will be written again.
    """

    def __init__(self, run: Path, step: int) -> None:
        path = run / "log.jsonl"
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    if int(json.loads(line)["step"]) <= step:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):
                    continue  # the last line of a killed run may be cut
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        temporary.replace(path)
        self._stream = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line; a number that JSON does not have, such as the norm of a gradient that overflowed, is null."""
        plain = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in record.items()
        }
        self._stream.write(json.dumps(plain, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._stream.close()
