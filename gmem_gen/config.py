"""Configuration: all sections together, TOML files, and `--set section.field=value`.

An unknown name is an error with a suggestion; the resolved configuration is stored with the run and in every checkpoint.
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
from gmem_gen.choices import choose
from gmem_gen.sample_settings import SampleConfig
from gmem_gen.settings import DataConfig, FlowConfig, ModelConfig, TrainConfig

__all__ = [
    "Config", "DataConfig", "FlowConfig", "ModelConfig", "SampleConfig", "TrainConfig", "apply_settings", "load_config",
    "override",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)

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
    record: dict[str, dict[str, Any]] = {}
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
        record.setdefault(section, {})[field_name] = value
    return override(config, record)  # all at once: some settings only make sense together


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
        return choose(name, value, typing.get_args(hint))
    assert not isinstance(hint, types.UnionType), name
    if typing.get_origin(hint) is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_typed(name, item, typing.get_args(hint)[0]) for item in items)
    if hint is float and type(value) is int:
        return float(value)
    if hint is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{name} must be a finite number, got {value!r}", key=name)
    if type(value) is not hint:
        raise ConfigError(f"{name} must be {hint.__name__}, got {value!r}", key=name)
    return value
