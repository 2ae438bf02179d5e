"""Published checkpoints as runs of ours: the architecture read off the tensors, the training's settings as published.

Shapes: E width, D snippet dimension, C channels of a latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import gmem_bank
from gmem_bank.errors import CheckpointError, ConfigError, OutputExistsError
from gmem_gen import checkpoint as checkpoints
from gmem_gen import conditioning, optim
from gmem_gen.autoencoders import AUTOENCODERS, Weights
from gmem_gen.config import Config, DataConfig, FlowConfig, SampleConfig, TrainConfig, apply_settings
from gmem_gen.model import LatentShape
from gmem_gen.official_files import OfficialFile, read_latent_stats, read_official
from gmem_gen.official_layout import Layout, deduce, require_fit
from gmem_gen.run import occupied, writing
from gmem_gen.runtime import versions
from gmem_gen.tokenizers import PIXELS, check_name, make_tokenizer, new_tokenizer

FACTORS = {"sd-vae": 8, "taesd": 8, "taef2": 8, "dc-ae": 32, "va-vae": 16}
"""Pixels on a side of one latent pixel, for tokenizers whose weights are not at hand."""
PUBLISHED_MEMORY = {
    "fingerprint": "", "dim": 768, "space": "unit", "encoder": "dinov2", "encoder_fingerprint": "", "num_rows": 0,
    "num_active": 0,
}  # fmt: skip
"""The record of the memory of the published models."""
USUAL = {1: PIXELS, 3: PIXELS, 4: "sd-vae", 32: "va-vae"}
"""Channels → tokenizer, where none is named."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What kind of snippets a checkpoint was trained on; the file does not say. One of the two, or neither.

    Neither stands for those of the published models, where the dimension is theirs: DINOv2-B with GMem's preprocessing, in unit
    space; banks are then compared by the encoder's name, since the hash of its weights is not known.
    """

    bank: str | None = None
    """A bank of such snippets."""
    encoder: gmem_bank.EncoderSpec | None = None
    """What made them."""


@dataclass(frozen=True, kw_only=True)
class LatentSource:
    """What turns the model's latents into pixels; the file does not say."""

    tokenizer: str = ""
    """A tokenizer's name; "": pixels for models of 1 or 3 channels, sd-vae for 4, va-vae for 32."""
    weights: str = ""
    """Where its weights are; "": they are given when sampling."""
    stats: Path | None = None
    """File with the mean and standard deviation of each channel (the published latents_stats.pt); None: 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class ImportReport:
    """What was imported."""

    run: str
    checkpoint: str
    parts: tuple[str, ...]
    """Which weights the file had: "model", "ema" or both; where one is missing the other stands for it."""
    num_tensors: int
    num_parameters: int
    step: int
    model: dict[str, Any]
    latent: dict[str, int]
    memory: dict[str, Any]
    tokenizer: dict[str, Any]
    remarks: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def published_config(layout: Layout, tokenizer: Mapping[str, Any]) -> Config:
    """Return the settings that published models were trained and are sampled with."""
    return Config(
        data=DataConfig(
            image_size=tokenizer["image_size"], channels=tokenizer["channels"], tokenizer=tokenizer["name"],
            tokenizer_weights=str(tokenizer.get("weights", "")),
        ),
        model=layout.model,
        flow=FlowConfig(prediction="velocity", cosine_weight=1.0, projection_weight=0.5, time_sampling="logit-normal"),
        train=TrainConfig(
            learning_rate=2e-4, warmup_steps=0, clip_norm=1.0, ema_decay=(0.9999,), ema_warmup=False, null_probability=0.0,
            snippet_dropout=0.4, precision="bf16", batch_size=256,
        ),
        sample=SampleConfig(
            method="sde-heun", num_steps=50, diffusion="linear", last_step="mean", last_step_size=0.004,
            guidance_start=0.89,
        ),
    )  # fmt: skip


def import_checkpoint(
    path: str | Path, out: str | Path, *, memory: Memory, latents: LatentSource | None = None, num_heads: int = 0,
    settings: Sequence[str] = (),
) -> ImportReport:  # fmt: skip
    """Make a run of a published checkpoint, which `sample` and `train` take as one of ours; nothing in it is executed.

    Args:
        path: .pt of torch.save or .safetensors, with "model" and "ema" or a bare state dict.
        out: the run's folder, new or empty.
        memory: which snippets it was trained on.
        latents: what turns its latents into pixels; None: as its channels say.
        num_heads: of attention, where nothing in the file says it.
        settings: SECTION.FIELD=VALUE over the published ones, such as "flow.path=gvp".

    Raises:
        CheckpointError: unreadable, or its tensors do not make up a published model; they are named.
        EncoderMismatchError: the memory has another dimension.
        ConfigError: the memory or the tokenizer is not told, or does not fit.
        OutputExistsError: something is in `out`.
        WriteError: no room.
    """
    source, run = Path(path), Path(out)
    official = read_official(source)
    try:
        layout = _layout_of(official, num_heads)
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}", path=source, tensor=error.tensor) from error
    bank, classes, layout = _memory_of(memory, layout)
    layout_latents = latents or LatentSource()
    tokenizer = _tokenizer_of(layout_latents, layout.latent)
    config = apply_settings(published_config(layout, tokenizer), [*official.settings, *settings])
    if config.model != layout.model:
        raise ConfigError("model.* settings are read off the file, and cannot be set beside it", key="model")
    state = {
        "elapsed": 0.0, "losses": [], "config": config.to_json(), "latent": dataclasses.asdict(layout.latent),
        "tokenizer": tokenizer, "bank": bank, "keys_digest": "", "classes": list(classes), "versions": versions(),
        "best": None, "scaler": {},
        "imported": {"file": source.name, "sha256": gmem_bank.sha256_of_file(source), "parts": list(official.parts),
                     "dtypes": _dtypes(official)},
    }  # fmt: skip
    with occupied(run), writing(run):
        if checkpoints.list_checkpoints(run):
            raise OutputExistsError(f"{run} has checkpoints already: choose another folder with --out", path=run)
        written = _save(run, official, state, config, layout)
        (run / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    shown = official.parts.get("ema") or official.parts["model"]
    return ImportReport(
        run=str(run), checkpoint=str(written), parts=tuple(official.parts), num_tensors=len(shown),
        num_parameters=sum(tensor.numel() for tensor in shown.values()), step=official.step,
        model=dataclasses.asdict(layout.model), latent=dataclasses.asdict(layout.latent), memory=bank, tokenizer=tokenizer,
        remarks=_remarks(bank, tokenizer),
    )  # fmt: skip


def _remarks(memory: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> tuple[str, ...]:
    """Return what was taken for granted."""
    remarks = []
    if not memory["encoder_fingerprint"]:
        remarks.append(
            "taken to remember what the published models do, snippets of dinov2 in unit space, whatever its weights: --bank or "
            "--encoder says it exactly"
        )
    if tokenizer["name"] != PIXELS and not tokenizer["weights_sha256"]:
        remarks.append(
            f"the weights of tokenizer {tokenizer['name']!r} are not known: give them here or to 'sample' by --tokenizer-weights"
        )
    if tokenizer["name"] != PIXELS and set(tokenizer["mean"]) == {0.0}:
        remarks.append(
            "its latents are taken to have mean 0 and standard deviation 1: --latent-stats says what they have"
        )
    return tuple(remarks)


def _layout_of(official: OfficialFile, num_heads: int) -> Layout:
    """Return the architecture of a file, whose parts must be of one."""
    shapes = {
        part: {name: tuple(value.shape) for name, value in table.items()} for part, table in official.parts.items()
    }
    first, *others = shapes.values()
    for other in others:
        require_fit(other, first)
    return deduce(first, num_heads=num_heads)


def _memory_of(memory: Memory, layout: Layout) -> tuple[dict[str, Any], tuple[str, ...], Layout]:
    """Return the record of the memory, the classes of a class-conditional model, and the layout with the dimension known."""
    if memory.bank is not None and memory.encoder is not None:
        raise ConfigError("give a bank or an encoder for the memory, not both", key="memory")
    classes: tuple[str, ...] = ()
    if memory.bank is not None:
        bank = conditioning.open_bank(memory.bank)
        record = conditioning.record_of(bank)
        classes = conditioning.class_names(bank) if layout.model.condition == "class" else ()
    elif memory.encoder is not None:
        record = conditioning.record_of_encoder(memory.encoder)
    elif layout.model.condition == "memory" and layout.snippet_dim == PUBLISHED_MEMORY["dim"]:
        record = dict(PUBLISHED_MEMORY)
    else:
        raise ConfigError(
            "the file does not say which snippets it was trained on, and they are not those of the published models: give a bank "
            "of such snippets with --bank, or their encoder with --encoder", key="memory",
        )  # fmt: skip
    if len(classes) != layout.model.num_classes:
        raise ConfigError(
            f"it has {layout.model.num_classes} classes, the memory names {len(classes)}: give a bank with as many concepts, in "
            "the order of its labels", key="memory",
        )  # fmt: skip
    if layout.model.condition != "memory":
        return record, classes, dataclasses.replace(layout, snippet_dim=record["dim"])
    if record["dim"] != layout.snippet_dim:
        raise gmem_bank.EncoderMismatchError(
            f"it takes snippets of dimension {layout.snippet_dim}, those of {record['encoder']} have {record['dim']}: name the "
            "encoder that it was trained with"
        )
    return record, classes, layout


def _tokenizer_of(latents: LatentSource, shape: LatentShape) -> dict[str, Any]:
    """Return the record of a tokenizer; without its weights at hand it names no hash of them."""
    name = latents.tokenizer or USUAL.get(shape.channels, "")
    if not name:
        raise ConfigError(f"nothing says what its {shape.channels} channels are: give --tokenizer", key="tokenizer")
    if check_name(name) == PIXELS:
        return {"name": name, "image_size": shape.size, "channels": shape.channels}
    mean, std = [0.0] * shape.channels, [1.0] * shape.channels
    if latents.stats is not None:
        mean, std = read_latent_stats(latents.stats)
    record: dict[str, Any] = {
        "name": name, "weights": latents.weights or AUTOENCODERS[name][1], "weights_sha256": "", "posterior": "mean",
        "image_size": shape.size * FACTORS[name], "channels": 3, "latent": dataclasses.asdict(shape),
    }  # fmt: skip
    if latents.weights:
        places = Weights(place=latents.weights)
        record |= new_tokenizer(name, int(record["image_size"]), 3, weights=places).record()
    if record["latent"] != dataclasses.asdict(shape) or len(mean) != shape.channels:
        raise ConfigError(
            f"tokenizer {name!r} has latents {record['latent']} and statistics of {len(mean)} channels, the model draws "
            f"{dataclasses.asdict(shape)}: name the one that it was trained with", key="tokenizer",
        )  # fmt: skip
    record |= {"mean": mean, "std": std}
    make_tokenizer(record)  # reads what it can of it
    return record


def _dtypes(official: OfficialFile) -> dict[str, dict[str, str]]:
    """Return part → name → type of the tensors that are not float32, so that an export has them again."""
    return {
        part: {n: str(t.dtype).removeprefix("torch.") for n, t in table.items() if t.dtype != torch.float32}
        for part, table in official.parts.items()
    }


def _save(run: Path, official: OfficialFile, state: dict[str, Any], config: Config, layout: Layout) -> Path:
    """Write the checkpoint: both weights, and an optimizer that has not begun."""
    last, averaged = (
        official.parts.get(part) or official.parts[other] for part, other in (("model", "ema"), ("ema", "model"))
    )
    with torch.random.fork_rng(devices=[]):
        model = checkpoints.make_model(config, layout.latent, layout.snippet_dim)
    _load(model, last)
    averages = optim.make_averages(model, config.train)
    for average in averages.values():
        _load(average.module, averaged)
    optimizer = optim.make_optimizer(model, config.train)
    return checkpoints.save(run, official.step, state, {"model": model, **averages}, optimizer)


def _load(module: torch.nn.Module, tensors: Mapping[str, Tensor]) -> None:
    module.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
