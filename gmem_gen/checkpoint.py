"""Checkpoints: safetensors for tensors, JSON for the rest, one folder a step, complete or not there at all.

RUN/checkpoints/step-00000500/{model,ema,optimizer}.safetensors, state.json; ema-<decay>.safetensors for further averages
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import gmem_bank
from gmem_bank.errors import CheckpointError, ConfigError, GMemError, WriteError, reason_of
from gmem_gen import tokenizers
from gmem_gen.checkpoint_state import STATE, read_state, sync, write_state
from gmem_gen.config import Config
from gmem_gen.model import Generator, LatentShape

__all__ = [
    "EMA", "MODEL", "OPTIMIZER", "SET_ASIDE", "STATE", "LoadedCheckpoint", "checkpoints_folder", "clean",
    "list_checkpoints", "load_checkpoint", "make_model", "optimizer_tensors", "read_state", "read_tensors",
    "restore_optimizer", "save", "set_aside_after", "step_folder", "step_of", "weights_file",
]  # fmt: skip

MODEL, EMA, OPTIMIZER = "model.safetensors", "ema.safetensors", "optimizer.safetensors"
SET_ASIDE = "set-aside-"
"""Before the name of a checkpoint that a training went back behind."""
REMOVING = ".removing-"
"""Before the name of a checkpoint that is being deleted."""
_STEP = re.compile(r"step-(\d{8,})")


def checkpoints_folder(run: Path) -> Path:
    """Return where a run's checkpoints lie."""
    return run / "checkpoints"


def weights_file(name: str) -> str:
    """Return the file of weights by name: "model", "ema", "ema-0.999"."""
    return f"{name}.safetensors"


def step_of(checkpoint: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """Return a run's complete checkpoints, oldest step first."""
    folder = checkpoints_folder(run)
    found = (
        [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and path.is_dir()]
        if folder.is_dir()
        else []
    )
    return sorted(found, key=step_of)


def step_folder(run: Path, step: int) -> Path:
    """Return where a step's checkpoint lies, or would."""
    return checkpoints_folder(run) / f"step-{step:08d}"


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """Return the optimizer's state as "<parameter>/<what>" → tensor."""
    state = optimizer.state_dict()["state"]
    return {
        f"{names[index]}/{what}": torch.as_tensor(value)
        for index, values in state.items()
        for what, value in values.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """Load what `optimizer_tensors` gave."""
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, what = name.rpartition("/")
        state.setdefault(index_of[parameter], {})[what] = tensor
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def save(
    run: Path, step: int, state: dict[str, Any], weights: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer
) -> Path:
    """Write a checkpoint atomically: it appears under its name only when it is complete.

    Args:
        run: the run's folder.
        step: optimizer steps done.
        state: JSON object; gets "step".
        weights: "model", the trained weights, and averages by name.
        optimizer: its state, parameter order as in the model.

    Raises:
        WriteError: the disk refused; earlier checkpoints stand.
    """
    folder = checkpoints_folder(run)
    final = step_folder(run, step)
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".saving-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        names = [name for name, _ in weights["model"].named_parameters()]
        for name, module in weights.items():
            save_file(_plain(module.state_dict()), temporary / weights_file(name))
        save_file(_plain(optimizer_tensors(optimizer, names)), temporary / OPTIMIZER)
        hashes = {path.name: gmem_bank.sha256_of_file(path) for path in sorted(temporary.iterdir())}
        write_state(temporary / STATE, {**state, "step": step, "hashes": hashes})
        for path in temporary.iterdir():
            sync(path)
        sync(temporary)
        if final.exists():  # the same step of the same training: nothing new to keep
            shutil.rmtree(temporary)
        else:
            temporary.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        raise WriteError(
            f"could not write the checkpoint {final}: {error}. What was saved before still stands; free some space "
            "and run the same command again",
            path=final,
        ) from error
    return final


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}


def clean(run: Path, keep: int, *, every: int = 0, best: int | None = None) -> None:
    """Remove superseded checkpoints, and what a killed save left.

    Args:
        run: the run's folder.
        keep: newest ones that stay; 0: all.
        every: steps that are a multiple of this stay; 0: none for that.
        best: this step stays.
    """
    folder = checkpoints_folder(run)
    if folder.is_dir():
        for path in (*folder.glob(".saving-*"), *folder.glob(REMOVING + "*")):
            shutil.rmtree(path, ignore_errors=True)
    for path in list_checkpoints(run)[: -keep or None] if keep else []:
        step = step_of(path)
        if step != best and not (every and step % every == 0):
            # under another name first: what a kill leaves of it must not count as a checkpoint
            with contextlib.suppress(OSError):
                shutil.rmtree(path.rename(path.with_name(REMOVING + path.name)), ignore_errors=True)


def set_aside_after(checkpoint: Path) -> list[Path]:
    """Rename a run's checkpoints of later steps, so that a training can go on from this one; return their new names."""
    later = [path for path in list_checkpoints(checkpoint.parent.parent) if step_of(path) > step_of(checkpoint)]
    moved = []
    for path in later:
        moved.append(path.rename(_free_name(path.with_name(SET_ASIDE + path.name))))
    return moved


def _free_name(path: Path) -> Path:
    """Return the path, or with the first number behind it under which there is nothing: what was set aside before stays."""
    names = itertools.chain([path], (path.with_name(f"{path.name}-{number}") for number in itertools.count(2)))
    return next(name for name in names if not name.exists())


def _instead(checkpoint: Path) -> str:
    """Return what to do where a checkpoint is damaged: the one before it is named where there is one."""
    found = list_checkpoints(checkpoint.parent.parent)
    if checkpoint not in found[1:]:
        return f"delete the folder {checkpoint}, and go on from another, or train again"
    return (
        f"sample from the one before it with --checkpoint {found[found.index(checkpoint) - 1]}; to train on from that give "
        f"--resume-from previous, or delete the folder {checkpoint}"
    )


def read_tensors(checkpoint: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of one of a checkpoint's files; raises CheckpointError."""
    try:
        if gmem_bank.sha256_of_file(checkpoint / name) != read_state(checkpoint)["hashes"][name]:
            raise OSError("its bytes do not match the hash that was saved")
        return load_file(checkpoint / name)
    except (OSError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint / name} is damaged ({reason_of(error)}): {_instead(checkpoint)}",
            path=checkpoint / name,
        ) from error


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A model ready to sample from."""

    path: Path
    model: Generator
    config: Config
    bank: dict[str, Any]
    """What it was trained on, from `conditioning.record_of`."""
    step: int
    run: Path
    tokenizer: dict[str, Any]
    """Record of what turns its latents into pixels, the statistics of its latents included; `make_tokenizer` reads it."""
    classes: tuple[str, ...] = ()
    """Of a class-conditional model: the concepts that its labels stand for."""


def make_model(config: Config, latent: LatentShape, snippet_dim: int) -> Generator:
    """Return the model of a configuration, freshly initialised."""
    return Generator(config.model, latent, snippet_dim)


def load_checkpoint(path: str | os.PathLike[str], *, weights: str = "ema", device: str = "cpu") -> LoadedCheckpoint:
    """Load a model for sampling.

    Args:
        path: a run's folder (its newest checkpoint is taken) or a checkpoint's.
        weights: "ema" (averaged by the first of `train.ema_decay`), "ema-<decay>" (by that one) or "model" (as trained last).
        device: where to put the model.

    Raises:
        CheckpointError: none there, damaged, or the weights do not fit the stored configuration.
        ConfigError: weights that the checkpoint does not have.
    """
    where = Path(path)
    found = list_checkpoints(where)
    checkpoint = where if (where / STATE).is_file() else found[-1] if found else None
    if checkpoint is None:
        raise CheckpointError(
            f"no checkpoint in {where}: train one with 'gmem-gen train --bank BANK --out {where}', or give another with "
            "--checkpoint",
            path=where,
        )
    state = read_state(checkpoint)
    try:
        config = Config.from_mapping(state["config"])
        weights = own_name(weights, config)
        tensors = read_tensors(checkpoint, weights_file(_known(weights, state, checkpoint)))
        prefix = "" if weights == "model" else "module."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name != "n_averaged"}
        model = Generator.of_tensors(config.model, LatentShape(**state["latent"]), int(state["bank"]["dim"]), own)
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"the weights in {checkpoint} do not fit its configuration: {error}", path=checkpoint
        ) from error
    except GMemError as error:
        if isinstance(error, CheckpointError) or error.key == "weights":
            raise
        raise CheckpointError(f"the configuration in {checkpoint} cannot be used: {error}", path=checkpoint) from error
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint
    return LoadedCheckpoint(
        path=checkpoint,
        model=model.to(device).eval(),
        config=config,
        bank=state["bank"],
        step=int(state["step"]),
        run=run,
        tokenizer=tokenizers.upgraded(state["tokenizer"], model.latent),
        classes=tuple(state.get("classes", ())),
    )


def own_name(weights: str, config: Config) -> str:
    """Return the name of weights as they are stored: the first average is "ema", also where its decay is named."""
    return "ema" if weights == f"ema-{config.train.ema_decay[0]!r}" else weights


def _known(weights: str, state: dict[str, Any], checkpoint: Path) -> str:
    """Return the name of weights; raises ConfigError that names those that there are."""
    there = sorted(name.removesuffix(".safetensors") for name in state["hashes"] if name != OPTIMIZER)
    if weights not in there:
        raise ConfigError(
            f"weights must be one of {', '.join(map(repr, there))} in {checkpoint}, not {weights!r}", key="weights"
        )
    return weights
