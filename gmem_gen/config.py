"""Configuration: frozen dataclasses, presets as functions, TOML files, and `--set section.field=value`.

Every field says what it means; an unknown name is an error with a suggestion; the resolved configuration is stored with
the run and in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gmem_bank.errors import ConfigError, suggest


def _require(condition: bool, section: str, name: str, value: object, what: str) -> None:
    if not condition:
        raise ConfigError(f"{section}.{name} must be {what}, got {value!r}", key=f"{section}.{name}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pixels are learned."""

    image_size: int = 0
    """Side in pixels; 0: 64, or the short side of the smallest image where that is smaller."""
    channels: int = 3
    """3: RGB; 1: grey."""
    allow_missing: bool = False
    """Train without the rows whose image is gone, instead of stopping."""

    def __post_init__(self) -> None:
        _require(
            0 <= self.image_size <= 4096, "data", "image_size", self.image_size, "0 or a number of pixels up to 4096"
        )
        _require(self.channels in (1, 3), "data", "channels", self.channels, "1 or 3")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A LightningDiT-style transformer: RMSNorm, SwiGLU, rotary positions, adaLN; all of it can be switched."""

    width: int = 128
    """Width of a token."""
    depth: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads; width / num_heads must be a multiple of 4."""
    patch_size: int = 0
    """Side of a patch in pixels; 0: an eighth of the image (64 tokens), at least 1."""
    snippet_scale: float = 0.0
    """Factor on a snippet before its linear map; 0: √D in unit space, so that its elements have a mean square of 1, and 1
    in raw space. 1 is the published value; the condition is then learned much later (docs/EXPERIMENTS.md)."""
    mlp_ratio: float = 4.0
    """Hidden width of the MLP over the width (times 2/3 with SwiGLU)."""
    use_rope: bool = True
    """Rotary position embedding in attention (Su et al. 2021)."""
    use_swiglu: bool = True
    """SwiGLU MLP (Shazeer 2020); False: GELU."""
    use_rmsnorm: bool = True
    """RMSNorm; False: LayerNorm without parameters."""
    use_qk_norm: bool = False
    """Normalise queries and keys."""
    use_shift: bool = True
    """adaLN with shift; False: scale and gate only."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "num_heads"):
            value = getattr(self, name)
            _require(1 <= value <= 65_536, "model", name, value, "1 to 65536")
        head = self.width / self.num_heads
        _require(head == int(head) and int(head) % 4 == 0, "model", "num_heads", self.num_heads,
                 f"such that width {self.width} / num_heads is a multiple of 4")  # fmt: skip
        _require(self.patch_size >= 0, "model", "patch_size", self.patch_size, "0 or a number of pixels")
        _require(self.snippet_scale >= 0, "model", "snippet_scale", self.snippet_scale, "0 or positive")
        _require(self.mlp_ratio > 0, "model", "mlp_ratio", self.mlp_ratio, "positive")


@dataclass(frozen=True, kw_only=True)
class FlowConfig:
    """The path from noise to data: linear, with the loss on the velocity (arXiv 2209.03003, 2210.02747)."""

    prediction: Literal["auto", "velocity", "data"] = "auto"
    """What the network gives: the velocity, or the clean image, from which the velocity follows. auto: data where a patch
    has more values than half the model's width, since the noise of such a patch does not fit through the model (arXiv
    2511.13720); else velocity."""
    time_sampling: Literal["uniform", "logit-normal"] = "logit-normal"
    """How t is drawn in training."""
    time_mean: float = 0.0
    """Mean of logit(t), for logit-normal."""
    time_std: float = 1.0
    """Standard deviation of logit(t), for logit-normal."""

    def __post_init__(self) -> None:
        _require(self.time_std > 0, "flow", "time_std", self.time_std, "positive")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation."""

    epochs: int = 400
    """Passes over the images; the budget unless max_steps is given."""
    max_steps: int = 0
    """Optimizer steps; 0: as many as `epochs` takes."""
    max_minutes: float = -1.0
    """Stop after this much training time, earlier runs of the same training included; 0: no limit; -1: 10 on a CPU, none
    on a GPU."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    beta1: float = 0.9
    """AdamW."""
    beta2: float = 0.95
    """AdamW."""
    weight_decay: float = 0.0
    """AdamW."""
    warmup_steps: int = 50
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """After warm-up: constant, or cosine to 0 at the last step of the budget."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    ema_decay: float = 0.9999
    """Decay of the averaged weights that sampling uses, approached as (1 + step) / (10 + step)."""
    null_probability: float = 0.1
    """Share of samples trained with the null snippet (zeros), which guidance needs."""
    snippet_dropout: float = 0.4
    """Share of a snippet's elements set to zero in training, the rest rescaled (the paper's random masking)."""
    snippet_noise: float = 0.0
    """Standard deviation of Gaussian noise added to a snippet in training, relative to its root mean square."""
    seed: int = 0
    """Decides initial weights, order, noise, times, dropout."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; 0: all."""
    log_every: int = 20
    """Steps between lines of log.jsonl."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; pays from a width of about 384 on a CPU with AMX, and on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda, …; auto takes a GPU where there is one."""
    num_threads: int = 0
    """CPU threads; 0: as many as PyTorch takes, which is one a core. 1 is safer beside other busy programs."""

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("checkpoint_every", 1), ("log_every", 1), ("epochs", 1), ("max_steps", 0),
                            ("warmup_steps", 0), ("keep_checkpoints", 0), ("num_threads", 0)):  # fmt: skip
            value = getattr(self, name)
            _require(value >= least, "train", name, value, f"at least {least}")
        for name in ("ema_decay", "null_probability", "snippet_dropout", "beta1", "beta2"):
            value = getattr(self, name)
            _require(0 <= value < 1, "train", name, value, "in [0, 1)")
        for name in ("weight_decay", "clip_norm", "snippet_noise"):
            value = getattr(self, name)
            _require(value >= 0, "train", name, value, "0 or more")
        _require(0 <= self.seed < 2**32, "train", "seed", self.seed, "0 to 4294967295")
        _require(self.num_threads <= 1024, "train", "num_threads", self.num_threads, "at most 1024")
        _require(self.learning_rate > 0, "train", "learning_rate", self.learning_rate, "positive")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object that `from_mapping` reads back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_mapping(cls, record: Mapping[str, Any]) -> Config:
        """Read a configuration; raises ConfigError for unknown names and wrong types."""
        return override(cls(), record)

    def to_toml(self) -> str:
        """Return a TOML text with every field."""
        lines = []
        for section, values in self.to_json().items():
            # JSON's spelling of numbers, booleans and strings is TOML's too
            lines += [f"[{section}]", *(f"{name} = {json.dumps(value)}" for name, value in values.items()), ""]
        return "\n".join(lines)


def load_config(path: str | Path, base: Config | None = None) -> Config:
    """Read a TOML file over a base configuration.

    Raises:
        ConfigError: unreadable, not TOML, unknown names, wrong types.
    """
    where = Path(path)
    try:
        record = tomllib.loads(where.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"could not read the configuration {where}: {error}", path=where) from error
    return override(base or Config(), record)


def apply_settings(config: Config, settings: Sequence[str]) -> Config:
    """Return a configuration with `section.field=value` settings applied in order.

    Raises:
        ConfigError: not of that form, unknown names (a near one is suggested), or values of the wrong type.
    """
    for setting in settings:
        name, equals, text = setting.partition("=")
        section, dot, field_name = name.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(
                f"--set {setting!r} is not SECTION.FIELD=VALUE, such as train.max_steps=1000", key=setting
            )
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        config = override(config, {section: {field_name: value}})
    return config


def override(config: Config, record: Mapping[str, Any]) -> Config:
    """Return a configuration with some fields replaced; raises ConfigError."""
    sections = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    all_names = [f"{s}.{f.name}" for s, value in sections.items() for f in dataclasses.fields(value)]
    for section, values in record.items():
        if section not in sections:
            raise ConfigError(
                f"unknown section {section!r} (there are: {', '.join(sections)}).{suggest(section, sections)}",
                key=section,
            )
        if not isinstance(values, Mapping):
            raise ConfigError(f"section {section!r} must be a table of fields", key=section)
        hints = typing.get_type_hints(type(sections[section]))
        checked = {}
        for name, value in values.items():
            if name not in hints:
                full = f"{section}.{name}"
                raise ConfigError(
                    f"unknown setting {full!r}.{suggest(full, all_names)} 'gmem-gen config' lists them all", key=full
                )
            checked[name] = _typed(f"{section}.{name}", value, hints[name])
        sections[section] = dataclasses.replace(sections[section], **checked)
    return dataclasses.replace(config, **sections)


def _typed(name: str, value: Any, hint: Any) -> Any:
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(
                f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.{suggest(str(value), choices)}",
                key=name,
            )
        return value
    assert not isinstance(hint, types.UnionType), name
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}", key=name)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be {hint.__name__}, got {value!r}", key=name)
    return value
