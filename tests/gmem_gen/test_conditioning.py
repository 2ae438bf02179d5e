"""Where generator and bank meet."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import gmem_bank
from gmem_bank import derive
from gmem_bank.errors import ConfigError, EncoderMismatchError, GMemError, SourceError, UnknownKeyError
from gmem_gen import conditioning
from gmem_gen.conditions import Conditions, choose_conditions
from tests.conftest import BankMaker

SNIPPETS = torch.randn(4000, 16, generator=torch.Generator().manual_seed(0))


def regularised(**options: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    draws = {
        "null": torch.rand(len(SNIPPETS), 1, generator=generator),
        "kept": torch.rand(SNIPPETS.shape, generator=generator),
        "normals": torch.randn(SNIPPETS.shape, generator=generator),
    }
    return conditioning.regularise(
        SNIPPETS, **{"null_probability": 0.0, "dropout": 0.0, "noise": 0.0, **options}, **draws
    )


def test_without_regularisation_snippets_are_unchanged() -> None:
    """All switched off is the identity."""
    assert torch.equal(regularised(), SNIPPETS)


def test_null_takes_whole_snippets_at_its_rate() -> None:
    """A null snippet is all zeros: what guidance uses is what training saw."""
    result = regularised(null_probability=0.1)
    null = (result == 0).all(dim=1)
    assert null.float().mean() == pytest.approx(0.1, abs=0.02)
    assert torch.equal(result[~null], SNIPPETS[~null])


def test_dropout_is_elementwise_rescaled_and_right_on_average() -> None:
    """Kept elements are divided by 1 − p, so the mean is the snippet."""
    result = regularised(dropout=0.4)
    kept = result != 0
    assert kept.float().mean() == pytest.approx(0.6, abs=0.01)
    torch.testing.assert_close(result[kept], SNIPPETS[kept] / 0.6)


def test_noise_is_relative_to_the_snippets_own_size() -> None:
    """Its standard deviation is the asked share of the root mean square."""
    result = regularised(noise=0.5)
    relative = (result - SNIPPETS) / SNIPPETS.square().mean(1, keepdim=True).sqrt()
    assert relative.std() == pytest.approx(0.5, rel=0.02)
    assert relative.mean() == pytest.approx(0, abs=0.01)


@pytest.fixture
def bank_path(photos: Path, new_photos: Path) -> Path:
    """A bank of photos with an inserted concept and an interpolation."""
    encoder = gmem_bank.load_encoder("hog")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder)
    gmem_bank.interpolate("bank.safetensors", "hat", "images", name="between")
    return Path("bank.safetensors")


def test_join_takes_every_row_with_an_image(bank_path: Path) -> None:
    """Built and inserted rows, not derived ones; images are found through the provenance."""
    bank = conditioning.open_bank(bank_path)
    join = conditioning.join_images(bank, None, allow_missing=False)
    assert join.rows.tolist() == list(range(32))
    assert join.num_derived == 6
    assert join.keys[-1].startswith("images/")
    for row in (0, 31):
        assert conditioning.read_image(bank, row, None).ndim == 3


def test_missing_images_are_counted_and_named(bank_path: Path, photos: Path) -> None:
    """How many, which, what to do; left out only when asked; another folder may hold them."""
    moved = Path(shutil.move(photos, "moved"))
    bank = conditioning.open_bank(bank_path)
    with pytest.raises(SourceError, match=r"24 of 32 images.*'dress/.*and 21 more.*--images.*--allow-missing"):
        conditioning.join_images(bank, None, allow_missing=False)
    assert len(conditioning.join_images(bank, moved, allow_missing=False).rows) == 32
    join = conditioning.join_images(bank, None, allow_missing=True)
    assert join.rows.tolist() == list(range(24, 32))
    assert len(join.missing) == 24
    shutil.move("images", "elsewhere")
    assert len(conditioning.join_images(bank, [moved, "elsewhere"], allow_missing=False).rows) == 32
    assert conditioning.read_image(bank, 31, ["elsewhere", moved]).ndim == 3
    with pytest.raises(SourceError, match="8 of 32"):
        conditioning.join_images(bank, [moved], allow_missing=False)
    with pytest.raises(SourceError, match="32 of 32"):
        conditioning.join_images(bank, None, allow_missing=True)


def test_a_foreign_bank_is_refused_and_both_are_named(make_bank: BankMaker) -> None:
    """Encoder, dimension and space must agree; the bank's own fingerprint need not."""
    bank = make_bank()
    record = conditioning.record_of(bank)
    derive.interpolate(bank.path, "class0", "class1")
    conditioning.require_same_memory(gmem_bank.open(bank.path), record, "it")
    for other in (make_bank("dim.safetensors", dim=9), make_bank("space.safetensors", space="raw")):
        with pytest.raises(
            EncoderMismatchError, match=r"it was trained on snippets of made-up \(dim 8, unit.*made-up \(dim"
        ):
            conditioning.require_same_memory(other, record, "it")


def test_what_is_no_bank_is_refused() -> None:
    """Something without the interface, or of another major version."""
    with pytest.raises(GMemError, match="does not offer"):
        conditioning.require_interface(object())


def test_conditions_are_what_was_asked_for(make_bank: BankMaker) -> None:
    """Concepts in a seeded order and over again, keys as given, several samples of each snippet together."""
    bank = make_bank(rows=9)

    def choose(**options: object) -> Conditions:
        return choose_conditions(
            bank, **{"concept": None, "keys": (), "num": None, "per_snippet": 1, "seed": 0, **options}
        )

    assert choose(concept="class1").rows.tolist() == [1, 4, 7]
    assert choose(concept="class1", num=7).rows.tolist() == [1, 4, 7, 1, 4, 7, 1]
    assert choose(concept="class1", per_snippet=2).rows.tolist() == [1, 1, 4, 4, 7, 7]
    some = {tuple(choose(concept="class1", num=2, seed=seed).rows.tolist()) for seed in range(40)}
    assert some == {(1, 4), (4, 1), (1, 7), (7, 1), (4, 7), (7, 4)}
    assert choose(num=5, seed=3).rows[:2].tolist() == choose(num=2, seed=3).rows.tolist()
    assert choose(num=4, seed=3).rows.tolist() == choose(num=4, seed=3).rows.tolist()
    keys = bank.keys(np.array([5, 2]))
    assert choose(keys=keys).rows.tolist() == [5, 2]
    assert choose(keys=keys, per_snippet=3).rows.tolist() == [5, 5, 5, 2, 2, 2]
    assert choose().rows.tolist() == list(range(9))
    with pytest.raises(ConfigError, match="seed"):
        choose(seed=-1)
    with pytest.raises(UnknownKeyError, match="'class1'"):
        choose(concept="clas1")
    with pytest.raises(ConfigError, match="either"):
        choose(concept="class1", keys=keys)
    masked = make_bank("masked.safetensors", rows=3, active=np.array([True, False, True]))
    with pytest.raises(UnknownKeyError, match="masked"):
        choose_conditions(masked, concept="class1", keys=(), num=1, per_snippet=1, seed=0)
