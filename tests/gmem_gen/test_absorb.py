"""Sampling from a factored bank: the basis goes into the first linear layer, and the results stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gmem_bank
import gmem_gen
from gmem_bank.errors import ConfigError
from gmem_gen import conditioning
from gmem_gen.config import ModelConfig
from gmem_gen.model import Generator, LatentShape

DIM, RANK = 40, 6


KINDS = [("factored", "f32"), ("factored", "i8"), ("sparse", "f16")]


@pytest.fixture(params=[(*kind, space) for kind in KINDS for space in ("unit", "raw")], ids="-".join)
def factored(request: pytest.FixtureRequest, make_bank) -> gmem_bank.MemoryBank:
    """A bank of rank 6 of every factored kind, in both spaces."""
    kind, dtype, space = request.param
    return make_bank(rows=60, dim=DIM, kind=kind, dtype=dtype, rank=RANK, space=space)


def model() -> Generator:
    """A model whose output depends on its condition."""
    torch.manual_seed(3)
    made = Generator(
        ModelConfig(width=16, depth=2, num_heads=2, snippet_scale=1.7), LatentShape(channels=2, size=4), DIM
    )
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made


def test_the_absorbed_model_gives_the_same_from_fewer_numbers(factored) -> None:
    """To 1e-5, with the null condition too; the original is left as it was."""
    network = model()
    reader = conditioning.reader(factored, network)
    assert reader.network is not network
    assert reader.numbers_per_row == RANK + 1
    rows = np.array([5, 0, 59, 5])
    x, t = torch.randn(4, 2, 4, 4), torch.rand(4)
    with torch.no_grad():
        codes = reader.read(rows, torch.device("cpu"))
        snippets = conditioning.gather(factored, rows, torch.device("cpu"))
        assert codes.shape == (4, RANK + 1)
        torch.testing.assert_close(reader.network(x, t, codes), network(x, t, snippets), atol=1e-5, rtol=1e-5)
        null = network(x, t, network.null_conditions(snippets))
        torch.testing.assert_close(reader.network(x, t, network.null_conditions(codes)), null, atol=1e-6, rtol=1e-6)
    assert network.condition_projection.linear.weight.shape == (16, DIM)


def test_a_bank_without_factors_is_read_as_it_is(make_bank) -> None:
    """The same network, whole snippets."""
    dense = make_bank(dim=DIM)
    network = model()
    reader = conditioning.reader(dense, network)
    assert (reader.network, reader.numbers_per_row) == (network, DIM)
    np.testing.assert_array_equal(reader.read(np.array([1, 2]), torch.device("cpu")), dense.snippets(np.array([1, 2])))


def test_absorbing_leaves_the_callers_random_numbers_alone(factored) -> None:
    """No number is drawn."""
    network = model()
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    conditioning.reader(factored, network)
    assert torch.equal(torch.rand(2), expected)


def test_labels_are_the_concepts_that_hold_the_rows(photos: Path) -> None:
    """In the order of the classes; rows of no class and classes that overlap are named."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    classes = conditioning.class_names(bank)
    labels = conditioning.labels(bank, bank.rows(), classes)
    for label, name in enumerate(classes):
        np.testing.assert_array_equal(np.flatnonzero(labels.numpy() == label), bank.rows_of(name))
    with pytest.raises(ConfigError, match="none of this model's 1 classes"):
        conditioning.labels(bank, bank.rows(), classes[:1])
    with pytest.raises(ConfigError, match="must not overlap"):
        conditioning.labels(bank, bank.rows(), (classes[0], classes[0]))


def test_a_class_model_walks_the_concepts_of_a_bank_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches are read; each has the labels of its rows."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    classes, asked = conditioning.class_names(bank), []
    honest = type(bank).rows_of
    monkeypatch.setattr(type(bank), "rows_of", lambda self, name: asked.append(name) or honest(self, name))
    config = ModelConfig(width=16, depth=1, num_heads=2, condition="class", num_classes=len(classes))
    network = Generator(config, LatentShape(channels=3, size=8), bank.dim)
    reader = conditioning.reader(bank, network, classes)
    expected = conditioning.labels(bank, bank.rows(), classes)
    asked.clear()
    for place, row in enumerate(bank.rows()):
        assert reader.read(np.array([row]), torch.device("cpu")).tolist() == [int(expected[place])]
    assert asked == []


@pytest.mark.parametrize("condition", ["class", "none"])
def test_the_baselines_without_memory_train_and_sample(photos: Path, condition: str) -> None:
    """The same commands; guidance of a model without condition is refused; classes are remembered."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    config = gmem_gen.apply_settings(
        gmem_gen.preset(f"nano:{condition}"),
        ["model.width=16", "model.depth=1", "model.num_heads=2", "data.image_size=8", "train.max_steps=3",
         "train.batch_size=8", "train.num_threads=1", "sample.method=sde-heun", "sample.num_steps=4"],
    )  # fmt: skip
    assert gmem_gen.train("bank.safetensors", config).step == 3
    bank, loaded = gmem_bank.open("bank.safetensors"), gmem_gen.load_checkpoint("runs/bank")
    conditions = gmem_gen.choose_conditions(bank, concept="hat", keys=(), num=2, per_snippet=1, seed=0)
    samples = gmem_gen.sample(bank, loaded, conditions)
    assert samples.nfe == 7
    assert samples.record["method"] == "sde-heun"
    guided = gmem_gen.SampleConfig(guidance=2.0, num_steps=2)
    if condition == "none":
        with pytest.raises(ConfigError, match="no condition"):
            gmem_gen.sample(bank, loaded, conditions, guided)
        return
    assert loaded.classes == conditioning.class_names(bank)
    assert loaded.model.config.num_classes == len(loaded.classes)
    assert gmem_gen.sample(bank, loaded, conditions, guided).record["evaluations_per_image"] == 8
