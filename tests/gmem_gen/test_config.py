"""Configuration: every field checked, every typo answered."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import pytest

import gmem_gen
from gmem_bank.errors import ConfigError
from gmem_gen.config import Config, ModelConfig, SampleConfig, TrainConfig, apply_settings, load_config
from gmem_gen.presets import MODEL_PRESETS, preset


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_toml_and_json_round_trip(name: str) -> None:
    """What is printed is what is read."""
    config = preset(name)
    Path("c.toml").write_text(config.to_toml())
    assert load_config("c.toml") == config
    assert Config.from_mapping(config.to_json()) == config


def test_settings_override_in_order_and_convert_types() -> None:
    """Later settings win; integers are accepted where a float is meant; words need no quotes."""
    config = apply_settings(
        Config(),
        [
            "train.max_steps=5",
            "train.max_steps=7",
            "train.learning_rate=1",
            "train.schedule=cosine",
            "model.use_rope=false",
        ],
    )
    assert config.train.max_steps == 7
    assert config.train.learning_rate == 1.0
    assert type(config.train.learning_rate) is float
    assert config.train.schedule == "cosine"
    assert config.model.use_rope is False


@pytest.mark.parametrize(
    ("setting", "answer"),
    [
        ("train.max_step=1", "'train.max_steps'"),
        ("trian.max_steps=1", "'train'"),
        ("train.max_steps=many", "must be int"),
        ("train.max_steps=1.5", "must be int"),
        ("train.max_steps=true", "must be int"),
        ("train.schedule=cosin", "'cosine'"),
        ("train.snippet_dropout=1.0", r"in \[0, 1\)"),
        ("train.batch_size=0", "at least 1"),
        ("data.channels=2", "1 or 3"),
        ("model.num_heads=3", "multiple of 4"),
        ("max_steps=3", "SECTION.FIELD=VALUE"),
        ("train.max_steps", "SECTION.FIELD=VALUE"),
        ("flow.prediction=nosie", "'noise'"),
        ("flow.path=linaer", "'linear'"),
        ("flow.weighting=velcity", "'velocity'"),
        ("flow.weighting=likelihood", "'noise' or 'score'"),
        ("flow.cosine_weight=-1.0", "0 or more"),
        ("sample.method=huen", "'heun'"),
        ("sample.diffusion=increasing", "'increasing-decreasing'"),
        ("sample.last_step=twedie", "'tweedie'"),
        ("model.condition=clas", "'class'"),
        ("model.projection_dim=-1", "0 to 65536"),
    ],
)
def test_wrong_settings_say_what_would_be_right(setting: str, answer: str) -> None:
    """A typo is never silently accepted."""
    with pytest.raises(ConfigError, match=answer):
        apply_settings(Config(), [setting])


def test_published_names_are_understood() -> None:
    """Another case, and the names of the published code; what is stored is ours."""
    config = apply_settings(
        Config(),
        ["flow.path=GVP", "flow.time_sampling=lognorm", "sample.method=heun2", "sample.diffusion=inccreasing-decreasing",
         "sample.last_step=Mean", "flow.prediction=score", "flow.weighting=likelihood"],
    )  # fmt: skip
    assert (config.flow.path, config.flow.time_sampling, config.flow.weighting) == ("gvp", "logit-normal", "likelihood")
    sample = config.sample
    assert (sample.method, sample.diffusion, sample.last_step) == ("heun", "increasing-decreasing", "mean")
    assert SampleConfig(diffusion="sbdm").diffusion == "SBDM"


def test_bad_files_and_presets_are_clear() -> None:
    """Absent file, not TOML, unknown preset."""
    with pytest.raises(ConfigError, match="could not read"):
        load_config("none.toml")
    Path("bad.toml").write_text("a = = b")
    with pytest.raises(ConfigError, match=r"bad\.toml"):
        load_config("bad.toml")
    with pytest.raises(ConfigError, match="there are: nano"):
        preset("nanoo")
    with pytest.raises(ConfigError, match="'SiT-B/2'"):
        preset("SiT-B/3")
    with pytest.raises(ConfigError, match="there are: S, B, L, XL"):
        gmem_gen.sit("M", 2)
    with pytest.raises(ConfigError, match="there are: class, none"):
        preset("B:clas")


def test_every_field_has_a_docstring_and_does_something() -> None:
    """Each setting is explained where it stands, and read somewhere outside config.py."""
    package = Path(__file__).parents[2] / "gmem_gen"
    files = [package / "settings.py", package / "sample_settings.py"]
    elsewhere = "".join(path.read_text() for path in package.glob("*.py") if path not in files)
    for cls in Config.__dataclass_fields__.values():
        source = Path(inspect.getfile(cls.default_factory)).read_text()
        assert Path(inspect.getfile(cls.default_factory)) in files
        for field in dataclasses.fields(cls.default_factory):
            place = source.index(f"    {field.name}: ")
            assert '"""' in source[place : place + 400].split("\n    ")[1], field.name
            assert f".{field.name}" in elsewhere, field.name


def test_configurations_are_frozen_and_keyword_only() -> None:
    """No setting changes behind one's back."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().max_steps = 3
    with pytest.raises(TypeError):
        ModelConfig(128)
