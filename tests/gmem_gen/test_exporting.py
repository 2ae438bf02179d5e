"""Generators in folders to share: what is loaded gives the very bits, and the card says what it needs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result

import gmem_bank
import gmem_gen
from gmem_bank.errors import CheckpointError, OutputExistsError, WriteError
from gmem_gen import exporting, pretrained
from gmem_gen.cli import main as gen_main
from gmem_gen.config import Config, DataConfig, ModelConfig, TrainConfig


def gen(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(gen_main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture
def trained(photos: Path) -> gmem_gen.LoadedCheckpoint:
    """A tiny generator in runs/bank, trained on a bank of photos."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    config = Config(
        data=DataConfig(image_size=8), model=ModelConfig(width=16, depth=1, num_heads=2),
        train=TrainConfig(max_steps=10, batch_size=8, num_threads=1),
    )  # fmt: skip
    gmem_gen.train("bank.safetensors", config)
    return gmem_gen.load_checkpoint("runs/bank")


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_an_exported_folder_draws_the_very_pixels(trained: gmem_gen.LoadedCheckpoint, weights: str) -> None:
    """By load_checkpoint and by the command; the network alone gives the same bits."""
    gen("export", "-c", "runs/bank", "-o", "shared", "--weights", weights, "--license", "mit", "--name", "Hats")
    source = gmem_gen.load_checkpoint("runs/bank", weights=weights)
    loaded, network = gmem_gen.load_checkpoint("shared"), gmem_gen.Generator.from_pretrained("shared")
    bank = gmem_bank.open("bank.safetensors")
    conditions = gmem_gen.choose_conditions(bank, concept="hat", keys=(), num=3, per_snippet=1, seed=0)
    settings = gmem_gen.SampleConfig(num_steps=3, guidance=2.0)
    drawn = [gmem_gen.sample(bank, each, conditions, settings).images for each in (source, loaded)]
    np.testing.assert_array_equal(*drawn)
    x, t, c = torch.randn(2, 3, 8, 8), torch.rand(2), torch.randn(2, bank.dim)
    with torch.no_grad():
        assert torch.equal(network(x, t, c), source.model(x, t, c))
    assert not network.training
    record = json.loads(
        gen("sample", "-c", "shared", "--concept", "hat", "-n", "2", "--steps", "2", "--json", "-q").stdout
    )
    assert (record["weights_step"], record["weights"]) == (10, weights)
    assert Path("samples/hat.png").is_file()  # not among what is shared


def test_the_card_names_memory_weights_and_licence(trained: gmem_gen.LoadedCheckpoint) -> None:
    """Encoder and bank by their fingerprints, rows, which weights, how to sample; no place on this machine."""
    gmem_gen.export_folder(trained, "shared", licence="cc-by-nc-4.0", name="Hats")
    card = Path("shared/README.md").read_text()
    bank = gmem_bank.open("bank.safetensors")
    for word in (bank.fingerprint, bank.encoder.fingerprint, "hog", "24 rows", "license: cc-by-nc-4.0", "# Hats", "decay 0.9999",
                 "gmem-gen sample", "Generator.from_pretrained", "8-pixel"):  # fmt: skip
        assert word in card, word
    assert str(Path.cwd()) not in card + Path("shared/gmem.json").read_text()
    modes = {path.stat().st_mode for path in Path("shared").rglob("*") if path.is_file()}
    assert len(modes) == 1  # whoever may read the card may read the weights
    gmem_gen.export_folder(trained, "plain")
    assert "no licence" in Path("plain/README.md").read_text()
    assert sorted(str(p.relative_to("shared")) for p in Path("shared").rglob("*") if p.is_file()) == [
        "README.md", "gmem.json", "model_index.json", "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    ]  # fmt: skip


def test_a_model_saves_and_loads_itself() -> None:
    """save_pretrained and from_pretrained are one another's inverse, for every kind of condition."""
    for condition in ({}, {"condition": "class", "num_classes": 3}, {"condition": "none"}):
        model = gmem_gen.Generator(
            ModelConfig(width=16, depth=1, num_heads=2, **condition), gmem_gen.LatentShape(channels=1, size=8), 12
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained("model")
        again = gmem_gen.Generator.from_pretrained("model")
        assert (again.config, again.latent, again.snippet_dim) == (model.config, model.latent, 12)
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_configuration_that_lies_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is laid out without memory, and compared with its weights, before anything is filled; its formulas are whole."""
    model = gmem_gen.Generator(
        ModelConfig(width=16, depth=2, num_heads=2), gmem_gen.LatentShape(channels=1, size=8), 12
    )
    model.save_pretrained("model")
    laid_out, initialise = [], gmem_gen.Generator._initialise

    def watched(self: gmem_gen.Generator) -> None:
        laid_out.append({parameter.device.type for parameter in self.parameters()})
        initialise(self)

    monkeypatch.setattr(gmem_gen.Generator, "_initialise", watched)
    again = gmem_gen.Generator.from_pretrained("model")
    assert {name: value.device.type for name, value in again.named_buffers()} == dict.fromkeys(
        dict(model.named_buffers()), "cpu"
    )
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in again.parameters())
    x, t, c = torch.randn(2, 1, 8, 8), torch.rand(2), torch.randn(2, 12)
    torch.testing.assert_close(again(x, t, c), model.eval()(x, t, c))
    told = json.loads(Path("model/config.json").read_text())
    for wrong, answer in (({"width": 4096}, "do not fit.*size mismatch"), ({"depth": 60_000}, "60000.* 2 blocks")):
        Path("model/config.json").write_text(json.dumps({**told, "model": {**told["model"], **wrong}}))
        with pytest.raises(CheckpointError, match=f"(?s){answer}"):
            gmem_gen.Generator.from_pretrained("model")
    assert laid_out == [{"meta"}] * 2


def test_folders_that_are_none_are_refused(trained: gmem_gen.LoadedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absent, cut, of another model, of another tool; nothing is overwritten; a full disk says so."""
    gmem_gen.export_folder(trained, "shared")
    with pytest.raises(OutputExistsError):
        gmem_gen.export_folder(trained, "shared")
    with pytest.raises(CheckpointError, match="holds the weights 'ema' only"):
        gmem_gen.load_checkpoint("shared", weights="model")
    weights, config = (Path("shared/transformer") / name for name in (pretrained.WEIGHTS, pretrained.CONFIG))
    whole, told = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="no model that can be loaded"):
        gmem_gen.load_checkpoint("shared")
    weights.write_bytes(whole)
    config.write_text(json.dumps({**told, "snippet_dim": 5}))
    with pytest.raises(CheckpointError, match="do not fit"):
        gmem_gen.Generator.from_pretrained("shared")
    config.write_text(json.dumps({**told, "_class_name": "UNet2DModel"}))
    with pytest.raises(CheckpointError, match="not that of a generator"):
        gmem_gen.Generator.from_pretrained("shared")
    for place in ("none", "./none/here", "some-owner/not-here"):
        with pytest.raises(CheckpointError, match=r"none|not-here"):
            gmem_gen.Generator.from_pretrained(place)
    Path("shared/gmem.json").write_text("{")
    with pytest.raises(CheckpointError, match="no generator that can be loaded"):
        gmem_gen.load_checkpoint("shared")

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "save_file", full)
        with pytest.raises(WriteError, match="No space left"):
            gmem_gen.export_folder(trained, "other")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "model_card", full)
        with pytest.raises(WriteError, match="No space left"):
            gmem_gen.export_folder(trained, "other")
    assert not exporting.is_exported(Path("other"))
    gmem_gen.export_folder(trained, "other")  # what was left is written again
    assert sorted(path.name for path in Path("other").iterdir()) == [
        "README.md", "gmem.json", "model_index.json", "transformer",
    ]  # fmt: skip
    with pytest.raises(OutputExistsError):
        gmem_gen.export_folder(trained, "other")
