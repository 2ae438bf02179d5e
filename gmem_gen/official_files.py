"""Files of published checkpoints, read and distrusted: by torch's safe reader or as safetensors, every tensor checked.

Shapes: c channels of a latent.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

import gmem_bank
from gmem_bank.errors import CheckpointError, GMemError, why_not_loaded

MAX_ENTRIES, MAX_PICKLE_BYTES = 100_000, 64 << 20
"""A checkpoint of model, average and optimizer has some thousand entries; its structure takes a megabyte."""
PREFIXES = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before the names."""
PARTS = ("model", "ema")
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
STEP_NAMES = ("step", "steps", "train_steps", "global_step")


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """The weights of a published checkpoint under their own names."""

    parts: Mapping[str, Mapping[str, Tensor]]
    """"model", "ema" or both → name → tensor, in the file's order where it has one."""
    step: int
    """0 where the file does not say."""
    settings: tuple[str, ...] = ()
    """SECTION.FIELD=VALUE of our own exports, whose path and prediction need not be the published ones."""


def read_official(path: Path) -> OfficialFile:
    """Return the weights in a published checkpoint: under "model" and "ema", or a bare table of tensors, which is "ema".

    Args:
        path: .pt, .pth, .ckpt or .bin as torch.save writes it, or .safetensors; names may begin with "module.".

    Raises:
        CheckpointError: absent, cut, with code in it, without a table of tensors, or with values that cannot be.
    """
    try:
        tables, step = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
        parts = {name: _plain(table, path.stat().st_size) for name, table in tables.items()}
    except GMemError as error:
        raise CheckpointError(f"{path} cannot be imported: {error}", path=path, tensor=error.tensor) from error
    own = _own_settings(path) if path.suffix == ".safetensors" else ()
    return OfficialFile(parts=parts, step=step, settings=own)


def _own_settings(path: Path) -> tuple[str, ...]:
    with safe_open(path, "pt") as stored:
        text = (stored.metadata() or {}).get("gmem", "{}")
    try:
        return tuple(str(setting) for setting in json.loads(text).get("settings", ()))
    except (ValueError, AttributeError, TypeError):
        return ()  # somebody else's entry of that name


def _safetensors(path: Path) -> tuple[dict[str, Mapping[str, Any]], int]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"it is no file of safetensors that can be read ({error})") from error
    parts = {
        part: {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
        for part in PARTS
    }
    named = {part: table for part, table in parts.items() if table}
    if named and sum(map(len, named.values())) != len(tensors):
        stray = next(name for name in tensors if not name.startswith(tuple(f"{part}." for part in PARTS)))
        raise CheckpointError(f"some of its names begin with 'model.' or 'ema.', but {stray!r} does not", tensor=stray)
    found: dict[str, Mapping[str, Any]] = {**(named or {"ema": tensors})}
    return found, 0


def _pickled(path: Path) -> tuple[dict[str, Mapping[str, Any]], int]:
    # published training scripts keep their command line beside the weights: a container of words and numbers
    stored = gmem_bank.read_torch_archive(
        path, what="checkpoint", holding="the state dict alone", max_entries=MAX_ENTRIES, max_pickle_bytes=MAX_PICKLE_BYTES,
        also=[argparse.Namespace],
    )  # fmt: skip
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"it holds a {type(stored).__name__}, not a table of tensors")
    found = {part: stored[part] for part in PARTS if isinstance(stored.get(part), Mapping)}
    step = next((stored[name] for name in STEP_NAMES if type(stored.get(name)) is int and stored[name] >= 0), 0)
    if not found:
        found = {"ema": stored.get("state_dict", stored)}
    return found, step


def _plain(table: Any, most: int) -> dict[str, Tensor]:
    """Return a table under names without prefixes, having made sure that it holds ordinary finite tensors of floats."""
    if not isinstance(table, Mapping) or not table:
        raise CheckpointError("there is no table of tensors in it, under 'model', 'ema' or at the top")
    result: dict[str, Tensor] = {}
    for name, value in table.items():
        own = str(name)
        while own.startswith(PREFIXES):
            own = own.partition(".")[2]
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_nested:
            raise CheckpointError(f"{own[:80]!r} is a {type(value).__name__}, not a tensor", tensor=own)
        if value.dtype not in FLOATS or value.nbytes > most:
            raise CheckpointError(f"{own!r} is {value.dtype} of shape {list(value.shape)}, which cannot be", tensor=own)
        if own in result:
            raise CheckpointError(f"there are two tensors {own!r}, with and without a prefix", tensor=own)
        if not bool(torch.isfinite(value).all()):
            raise CheckpointError(f"{own!r} has values that are not finite", tensor=own)
        result[own] = value
    return result


def read_latent_stats(path: Path) -> tuple[list[float], list[float]]:
    """Return the mean and the standard deviation of each of c channels, from a published latents_stats.pt or a .safetensors.

    Raises:
        CheckpointError: unreadable, without "mean" and "std", of different lengths, or not positive.
    """
    try:
        stored: Any
        if path.suffix == ".safetensors":
            stored = load_file(path)
        else:
            stored = gmem_bank.read_torch_archive(path, what="file of statistics", holding="'mean' and 'std' alone")
        mean, std = (stored[name].double().flatten() for name in ("mean", "std"))
        if len(mean) != len(std) or not bool(torch.isfinite(mean).all()) or not bool((std > 0).all()):
            raise ValueError("mean and std must be of one length, finite, std positive")
    except Exception as error:  # as above
        raise CheckpointError(
            f"{path} holds no statistics of latents (two tensors, 'mean' and 'std'): {why_not_loaded(error)}",
            path=path,
        ) from error
    return mean.tolist(), std.tolist()
