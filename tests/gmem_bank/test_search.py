"""Search: what brute force finds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from gmem_bank import builder, coordinates, query, segments
from gmem_bank.encoders import load_encoder
from gmem_bank.errors import ConfigError, EncoderMismatchError, MissingDependencyError, UnknownKeyError
from gmem_bank.interface import SupportsSearch
from gmem_bank.kinds import open as open_bank
from tests.conftest import BankMaker


@pytest.mark.parametrize("space", ["unit", "raw"])
@pytest.mark.parametrize("block_bytes", [4 * 8 * 7, 64 << 20])
def test_nearest_equals_brute_force_over_active_rows(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, space: str, block_bytes: int
) -> None:
    """Same scores; same rows up to ties; masked rows never appear; blocks do not show."""
    monkeypatch.setattr(coordinates, "BLOCK_BYTES", block_bytes)
    active = np.random.default_rng(5).random(60) > 0.3
    snippets = np.random.default_rng(4).standard_normal((60, 8)).astype(np.float32)
    snippets[7] = snippets[11]
    bank = make_bank(snippets=snippets, space=space, parts=(31, 29), active=active)
    assert isinstance(bank, SupportsSearch)
    queries = np.random.default_rng(6).standard_normal((5, 8)).astype(np.float32) * 3
    scores, rows = bank.nearest(queries, 9)
    unit = snippets / np.linalg.norm(snippets, axis=1, keepdims=True)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T
    cosines[:, ~active] = -np.inf
    for i in range(5):
        np.testing.assert_allclose(scores[i], np.sort(cosines[i])[::-1][:9], atol=1e-6)
        np.testing.assert_allclose(cosines[i][rows[i]], scores[i], atol=1e-6)
        assert len(set(rows[i].tolist())) == 9


def test_every_kind_of_query_finds_its_own(photos: Path, new_photos: Path) -> None:
    """A key finds itself, a concept its rows, an image and a folder of images their twins."""
    encoder = load_encoder("hog")
    builder.build(photos, encoder, "bank.safetensors")
    bank = open_bank("bank.safetensors")
    key = bank.keys(np.array([3]))[0]
    [by_key] = query.search(bank, key, k=2, load=lambda: encoder)
    assert (by_key.hits[0].key, by_key.hits[0].row, by_key.hits[0].concepts) == (key, 3, ("dress",))
    assert by_key.hits[0].score == pytest.approx(1, abs=1e-6)
    [by_image] = query.search(bank, str(photos / key), k=1, load=lambda: encoder)
    assert by_image.hits[0].key == key
    by_folder = query.search(bank, str(photos / "hat"), k=1, load=lambda: encoder)
    assert [result.hits[0].row for result in by_folder] == list(range(8, 16))
    [by_concept] = query.search(bank, "hat", k=500, load=lambda: encoder)
    assert len(by_concept.hits) == 24
    mean = bank.snippets(bank.rows_of("hat")).mean(axis=0)
    assert by_concept.hits[0].row == int((bank.snippets(bank.rows()) @ mean).argmax())


def test_bad_queries_are_clear(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dimension, k, unknown names, missing FAISS."""
    bank = make_bank(rows=6)
    with pytest.raises(EncoderMismatchError, match="dimension 8"):
        bank.nearest(np.zeros((1, 9), np.float32), 1)
    for k in (0, 7):
        with pytest.raises(ConfigError, match="k must be 1 to 6"):
            bank.nearest(np.ones((1, 8), np.float32), k)
    with pytest.raises(UnknownKeyError, match=r"Did you mean .*'class0'"):
        query.search(bank, "class9", k=1, load=lambda: load_encoder("hog"))
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match=r"pip install faiss-cpu \(the extra gmem\[cpu\]\)"):
        bank.nearest(np.ones((1, 8), np.float32), 1)


def test_every_f16_is_widened_to_the_bit() -> None:
    """All 65,536 of them, NaN and infinities included, in any shape, also where a block has both finite and other values."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.tile(every[np.isfinite(every)], 3)
    for values in (every, every[:0], finite, finite[:63488].reshape(64, 992), finite[::3]):
        with np.errstate(invalid="ignore"):
            wanted = values.astype(np.float32)
        widened = segments.widen(values)
        assert widened.dtype == np.float32
        np.testing.assert_array_equal(widened.view(np.uint32), wanted.view(np.uint32))
        if np.isfinite(values).all():
            np.testing.assert_array_equal(segments.widen(values, finite=True), wanted)
