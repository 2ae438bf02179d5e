"""Sampling into files: a grid to look at, a folder of PNGs, an .npz for evaluation; the same call goes on where it stopped.

Memory holds a batch, whatever the number of samples.

Shapes: B samples, H×W pixels, C channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from gmem_bank.errors import ConfigError
from gmem_gen import conditioning
from gmem_gen.array_store import ArrayStore
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.conditioning import Bank
from gmem_gen.conditions import Conditions
from gmem_gen.config import SampleConfig
from gmem_gen.folder_store import FolderStore
from gmem_gen.images import require_own, write_grid
from gmem_gen.sampling import Drawn, Progress, Say, _silent, _silent_progress, check_request, cost, describe, draw
from gmem_gen.stores import Store, json_in

GRID_MOST = 1024
"""Samples that a grid may have when they are kept nowhere else."""
GRID_SHOWN = 100
"""Samples that a grid shows of those that are kept in files."""


@dataclass(frozen=True, kw_only=True)
class SampleFiles:
    """What is wanted; at least one of the three."""

    grid: Path | None = None
    """A .png; with a folder or an .npz of more than 100 samples it shows the first 100."""
    columns: int | None = None
    """Images in a row of the grid; None: about square."""
    folder: Path | None = None
    """For one PNG a sample."""
    npz: Path | None = None
    """`arr_0` (B, H, W, C) uint8; `arr_1` (B,) labels of a class-conditional model, or of the concepts that the rows are of."""


@dataclass(frozen=True, kw_only=True)
class SampleReport:
    """What a call has drawn."""

    outputs: list[str]
    """Files and folders written; empty while samples of other processes are missing."""
    num_images: int
    """B."""
    num_drawn: int
    """By this call."""
    complete: bool
    """Whether all B are there; of several processes the last one finds them so."""
    seconds: float
    record: dict[str, Any]
    """As in the JSON beside the outputs."""


def sample_to(
    files: SampleFiles,
    bank: Bank,
    checkpoint: LoadedCheckpoint,
    conditions: Conditions,
    config: SampleConfig | None = None,
    *,
    num_shards: int = 1,
    shard: int = 0,
    overwrite: bool = False,
    progress: Progress = _silent_progress,
    say: Say = _silent,
) -> SampleReport:
    """Draw one image for each condition into files, in bounded memory; the same call again draws only what is missing.

    Args:
        files: where to.
        bank, checkpoint, conditions, config: as in `sample`.
        num_shards: processes that share the work, each with the same folder or .npz; sample i is drawn by process i mod it.
        shard: which of them this is, from 0.
        overwrite: replace samples of another plan in the folder or .npz, instead of refusing.
        progress: told samples of this process that are there and are to be.
        say: told remarks.

    Raises:
        OutputExistsError: an output holds something else, or samples made otherwise; what differs is named.
        ConfigError: no output, shards without a folder or .npz, more samples than a grid holds; or as `sample`.
        WriteError: the disk refused; what was drawn stands.
        EncoderMismatchError, MissingDependencyError: as `sample`.
    """
    began, wanted = time.perf_counter(), config or checkpoint.config.sample
    remarks = check_request(bank, checkpoint, conditions, wanted)
    _check_files(files, len(conditions), num_shards, shard)
    for remark in remarks:
        say(remark)
    labels, classes = _labels(bank, checkpoint, conditions)
    plan = plan_of(bank, checkpoint, conditions, wanted)
    stores = _stores(files, plan, checkpoint, len(conditions), labels, overwrite)
    mine = np.arange(shard, len(conditions), num_shards)
    pending = mine[~_done(stores, len(conditions))[mine]]
    shown: list[NDArray[np.uint8]] = []
    progress(len(mine) - len(pending), len(mine))
    counts, drawn = {"images": 0, "evaluations": 0, "nfe": 0}, 0
    for batch in draw(bank, checkpoint, conditions, wanted, pending):
        counts = _keep(batch, stores, f"{shard}-of-{num_shards}")
        drawn += len(batch.places)
        if not stores:
            shown.extend(batch.images)
        progress(len(mine) - len(pending) + drawn, len(mine))
    seconds = round(time.perf_counter() - began, 2)
