"""Sampling into files: a grid to look at, a folder of PNGs, an .npz for evaluation; the same call goes on where it stopped.

Memory holds a batch, whatever the number of samples.

Shapes: B samples, H×W pixels, C channels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
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
from gmem_gen.outputs import Progress, Say, no_progress, no_remarks
from gmem_gen.sampling import Drawn, check_request, cost, describe, draw
from gmem_gen.stores import Store, json_in

PLACES = ("weights", "revision", "software")
"""Of a tokenizer's record: where its weights are and what reads them, which decide no pixel; their hash does."""
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
    facts: Mapping[str, Any] | None = None,
    progress: Progress = no_progress,
    say: Say = no_remarks,
) -> SampleReport:
    """Draw one image for each condition into files, in bounded memory; the same call again draws only what is missing.

    Args:
        files: where to.
        bank, checkpoint, conditions, config: as in `sample`.
        num_shards: processes that share the work, each with the same folder or .npz; sample i is drawn by process i mod it.
        shard: which of them this is, from 0.
        overwrite: replace samples of another plan in the folder or .npz, instead of refusing.
        facts: what the record says besides.
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
    tally = _Tally(f"{shard}-of-{num_shards}")
    progress(len(mine) - len(pending), len(mine))
    for batch in draw(bank, checkpoint, conditions, wanted, pending):
        tally.keep(batch, stores)
        progress(len(mine) - len(pending) + tally.images, len(mine))
    seconds = round(time.perf_counter() - began, 2)
    complete = not stores or bool(_done(stores, len(conditions)).all())
    record = json_in(stores[0].record) if stores and not tally.images else None
    if not isinstance(record, dict) or not complete:
        record = describe(bank, checkpoint, conditions, wanted) | tally.cost(stores)
        record |= {"remarks": remarks, "classes": classes, "plan": plan, "seconds": seconds, "num_shards": num_shards}
        record |= facts or {}
    outputs = _finish(files, stores, tally, record, len(conditions)) if complete else []
    return SampleReport(
        outputs=[str(path) for path in outputs], num_images=len(conditions), num_drawn=tally.images, complete=complete,
        seconds=seconds, record=record,
    )  # fmt: skip


class _Tally:
    """What a call has drawn, and at which cost; the pixels only where no store has them."""

    def __init__(self, name: str) -> None:
        self.name, self.images, self.evaluations, self.nfe = name, 0, 0, 0
        self.pixels: list[NDArray[np.uint8]] = []

    def keep(self, batch: Drawn, stores: Sequence[Store]) -> None:
        """Put a batch into all stores, and what it cost beside it."""
        for store in stores:
            store.write(batch.places, batch.images)
            store.tally(self.name, {"images": len(batch.places), "evaluations": batch.evaluations, "nfe": batch.nfe})
        if not stores:
            self.pixels.extend(batch.images)
        self.images += len(batch.places)
        self.evaluations += batch.evaluations
        self.nfe = max(self.nfe, batch.nfe)

    def cost(self, stores: Sequence[Store]) -> dict[str, Any]:
        """Return what all samples cost, those of other processes and of earlier calls included."""
        own = {"images": self.images, "evaluations": self.evaluations, "nfe": self.nfe}
        total = stores[0].tally("", {}) if stores else own
        return cost(total["nfe"], total["evaluations"], max(1, total["images"]))


def _finish(
    files: SampleFiles, stores: Sequence[Store], tally: _Tally, record: dict[str, Any], num_images: int
) -> list[Path]:
    outputs = [path for store in stores for path in store.finish(record)]
    if files.grid is None:
        return outputs
    images = tally.pixels or [stores[0].read(place) for place in range(min(num_images, GRID_SHOWN))]
    return [*write_grid(np.stack(images), record, files.grid, columns=files.columns), *outputs]


def plan_of(bank: Bank, checkpoint: LoadedCheckpoint, conditions: Conditions, config: SampleConfig) -> dict[str, Any]:
    """Return all that decides the pixels, as a flat JSON object: samples with another one never lie among these."""
    settings = {f"sample.{name}": value for name, value in dataclasses.asdict(config).items() if name != "batch_size"}
    return {
        "num_images": len(conditions),
        "label": conditions.label,
        "conditions": conditions.digest(),
        "bank": bank.fingerprint,
        "weights": weights_digest(checkpoint.model),
        "tokenizer": {name: fact for name, fact in checkpoint.tokenizer.items() if name not in PLACES},
        **settings,
    }


def weights_digest(model: nn.Module) -> str:
    """Return the sha256 of a model's tensors and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        plain = tensor.detach().to("cpu").contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(memoryview(plain.view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def _check_files(files: SampleFiles, num_images: int, num_shards: int, shard: int) -> None:
    kept = files.folder is not None or files.npz is not None
    if files.grid is not None:
        require_own(files.grid)
    elif not kept:
        raise ConfigError("there is nowhere to put samples: give a grid, a folder or an .npz", key="output")
    if not 0 <= shard < num_shards:
        raise ConfigError(f"shard must be 0 to num_shards - 1, got {shard} of {num_shards}", key="shard")
    if num_shards > 1 and not kept:
        raise ConfigError("several processes need a folder or an .npz that they fill together", key="num_shards")
    if num_images > GRID_MOST and not kept:
        raise ConfigError(
            f"a grid holds at most {GRID_MOST} samples, {num_images} are wanted: keep them with --save-images or --npz",
            key="num",
        )


def _stores(
    files: SampleFiles, plan: dict[str, Any], checkpoint: LoadedCheckpoint, num_images: int,
    labels: NDArray[np.int64] | None, overwrite: bool,
) -> list[Store]:  # fmt: skip
    stores: list[Store] = []
    if files.folder is not None:
        stores.append(FolderStore(files.folder, plan, num_images, overwrite=overwrite))
    if files.npz is not None:
        size, channels = image_shape(checkpoint)
        shape = (num_images, size, size, channels)
        stores.append(ArrayStore(files.npz, plan, shape, labels, overwrite=overwrite))
    return stores


def image_shape(checkpoint: LoadedCheckpoint) -> tuple[int, int]:
    """Return side and channels of the images that a checkpoint's tokenizer decodes to."""
    facts = checkpoint.tokenizer
    return int(facts["image_size"]), int(facts["channels"])


def _labels(
    bank: Bank, checkpoint: LoadedCheckpoint, conditions: Conditions
) -> tuple[NDArray[np.int64] | None, list[str]]:
    """Return (B,) labels and the names they stand for: a model's classes, or the concepts of the rows where each has one."""
    if checkpoint.model.config.condition == "class":
        labels = conditioning.labels(bank, conditions.rows, checkpoint.classes)
        return labels.numpy(), list(checkpoint.classes)
    found = None if conditions.snippets is not None else conditioning.concept_labels(bank, conditions.rows)
    return (None, []) if found is None else (found[0], list(found[1]))


def _done(stores: Sequence[Store], num_images: int) -> NDArray[np.bool_]:
    """Return (B,) which samples every store has; none where there is no store."""
    return np.logical_and.reduce([store.done() for store in stores]) if stores else np.zeros(num_images, np.bool_)
