"""A generator in a folder to share: its weights and all that sampling needs, as diffusers lays it out, with a model card.

FOLDER/README.md  model_index.json  gmem.json  transformer/{config.json, diffusion_pytorch_model.safetensors}
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import gmem_bank
from gmem_bank.errors import CheckpointError, GMemError, OutputExistsError, WriteError
from gmem_gen import checkpoint as checkpoints
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.config import Config
from gmem_gen.model import Generator
from gmem_gen.pretrained import SUBFOLDER
from gmem_gen.runtime import versions
from gmem_gen.sizes import num_parameters

INDEX, FACTS, CARD = "model_index.json", "gmem.json", "README.md"
UNFINISHED = ".gmem-export"
"""There while a folder is being written: what a kill or a full disk has left is ours to write again."""


def export_folder(
    checkpoint: LoadedCheckpoint, folder: str | Path, *, weights: str = "ema", licence: str = "", name: str = ""
) -> dict[str, Any]:
    """Write a folder that `load_checkpoint`, 'gmem-gen sample --checkpoint' and `Generator.from_pretrained` load.

    Args:
        checkpoint: from `load_checkpoint`, with the weights to share.
        folder: new, empty, or left unfinished by an earlier call.
        weights: which they are, for the card.
        licence: an identifier such as "mit" or "cc-by-nc-4.0"; "": the card says that none was given.
        name: of the model, for the card; "": the run's.

    Returns:
        What was written.

    Raises:
        OutputExistsError: something is in the folder.
        WriteError: no room.
    """
    target, title = Path(folder), name or checkpoint.run.name or checkpoint.path.name
    _require_room(target)
    facts = {
        "config": checkpoint.config.to_json(),
        "bank": checkpoint.bank,
        "tokenizer": _portable(checkpoint.tokenizer),
        "classes": list(checkpoint.classes),
        "step": checkpoint.step,
        "weights": weights,
        "versions": versions(),
    }
    index = {
        "_class_name": "GMemGenerator",
        "_gmem_version": gmem_bank.__version__,
        SUBFOLDER: ["gmem_gen", "Generator"],
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / UNFINISHED).touch()
        (target / INDEX).unlink(missing_ok=True)
        checkpoint.model.save_pretrained(target / SUBFOLDER)
        (target / FACTS).write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (target / CARD).write_text(model_card(checkpoint, title, weights, licence), encoding="utf-8")
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")  # with it the folder is whole
        (target / UNFINISHED).unlink()
    except OSError as error:
        if isinstance(error, GMemError):
            raise
        raise WriteError(
            f"could not write {target}: {error.strerror or error}. Free some space", path=target
        ) from error
    return {
        "output": str(target), "weights": weights, "step": checkpoint.step, "bank": checkpoint.bank,
        "num_parameters": num_parameters(checkpoint.model),
    }  # fmt: skip


def _require_room(target: Path) -> None:
    occupied = any(target.iterdir()) if target.is_dir() else target.exists()
    if occupied and not (target / UNFINISHED).is_file():
        raise OutputExistsError(f"{target} is not empty: choose a new folder, or delete it first", path=target)


def _portable(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenizer's record without a place on this machine: its weights are known by their hash."""
    place = str(tokenizer.get("weights", ""))
    here = os.path.isabs(place) or Path(place).exists()  # noqa: PTH117 - a place on the hub is no path
    return {**tokenizer, "weights": ""} if place and here else tokenizer


def model_card(checkpoint: LoadedCheckpoint, title: str, weights: str, licence: str) -> str:
    """Return the text of a README.md: what it is, which memory it needs, how to sample."""
    bank, model, flow = checkpoint.bank, checkpoint.model, checkpoint.config.flow
    rows = f"{bank['num_rows']} rows, fingerprint `{bank['fingerprint']}`" if bank["fingerprint"] else "not recorded"
    memory = {
        "memory": f"one snippet of {bank['encoder']} an image",
        "class": f"one of {len(checkpoint.classes)} classes: {', '.join(checkpoint.classes)}",
        "none": "nothing",
    }[model.config.condition]
    tokenizer, sampling = checkpoint.tokenizer, checkpoint.config.sample
    hashed = f", weights sha256 `{tokenizer['weights_sha256']}`" if tokenizer.get("weights_sha256") else ""
    averaged = f"averaged, decay {checkpoint.config.train.ema_decay[0]}" if weights == "ema" else weights
    unlicensed = "" if licence else " Whoever made it has given no licence."
    config = model.config
    table = {
        "weights": f"{averaged}; step {checkpoint.step}; {num_parameters(model) / 1e6:.2f} M parameters",
        "architecture": f"width {config.width}, depth {config.depth}, {config.num_heads} heads, patch {model.patch_size}; "
        f"{flow.path} path, predicts {flow.prediction}",
        "encoder of its memory": f"{bank['encoder']}, dimension {bank['dim']}, {bank['space']} space, fingerprint "
        f"`{bank['encoder_fingerprint']}`",
        "bank that it was trained on": rows,
        "tokenizer": f"{tokenizer['name']}{hashed}",
        "sampled as": f"{sampling.method}, {sampling.num_steps} steps, guidance {sampling.guidance:g}",
    }
    lines = "\n".join(f"| {name} | {text} |" for name, text in table.items())
    return _CARD.format(
        licence=licence or "other",
        title=title,
        size=tokenizer["image_size"],
        memory=memory,
        unlicensed=unlicensed,
        lines=lines,
    )


_CARD = """---
library_name: gmem
license: {licence}
pipeline_tag: unconditional-image-generation
tags:
- gmem
- flow-matching
---

# {title}

A generator of gmem (GMem, arXiv 2412.08781): a flow-matching transformer that draws {size}-pixel images, conditioned on
{memory}.{unlicensed}

| | |
|---|---|
{lines}

It draws from any bank of that encoder, edited ones too:

```sh
gmem-gen sample --checkpoint . --bank bank.safetensors --concept NAME
```

The network alone:

```python
import gmem_gen

model = gmem_gen.Generator.from_pretrained(".")
```
"""


def is_exported(folder: Path) -> bool:
    """Say whether a folder is a generator that `export_folder` wrote."""
    return (folder / INDEX).is_file() and (folder / FACTS).is_file()


def held_weights(checkpoint: LoadedCheckpoint, asked: str) -> str:
    """Return the name of a loaded checkpoint's weights: as asked for, or what an exported folder says that it holds."""
    if not is_exported(checkpoint.path):
        return asked
    return str(json.loads((checkpoint.path / FACTS).read_text(encoding="utf-8"))["weights"])


def load_exported(folder: Path, *, weights: str, device: str) -> LoadedCheckpoint:
    """Return what a folder of `export_folder` holds; raises CheckpointError."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        config = Config.from_mapping(facts["config"])
        held = str(facts["weights"])
        loaded = LoadedCheckpoint(
            path=folder, model=Generator.from_pretrained(folder).to(device), config=config, bank=facts["bank"],
            step=int(facts["step"]), run=Path(), tokenizer=facts["tokenizer"], classes=tuple(facts["classes"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder} is no generator that can be loaded: {error!r}", path=folder) from error
    if checkpoints.own_name(weights, config) not in ("ema", held):  # "ema" is what is taken where nothing is asked for
        raise CheckpointError(f"{folder} holds the weights {held!r} only, not {weights!r}", path=folder)
    return loaded


def load_checkpoint(path: str | os.PathLike[str], *, weights: str = "ema", device: str = "cpu") -> LoadedCheckpoint:
    """Load a model for sampling.

    Args:
        path: a run's folder (its newest checkpoint is taken), a checkpoint's, or an exported one.
        weights: "ema" (averaged), "ema-<decay>" (another average of `train.ema_decay`) or "model" (as trained last); an
            exported folder has one kind.
        device: where to put the model.

    Raises:
        CheckpointError: none there, damaged, or the weights do not fit the stored configuration.
        ConfigError: weights that the checkpoint does not have.
    """
    if is_exported(Path(path)):
        return load_exported(Path(path), weights=weights, device=device)
    return checkpoints.load_checkpoint(path, weights=weights, device=device)
