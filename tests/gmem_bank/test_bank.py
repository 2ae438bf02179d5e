"""The contract, over every kind of bank there is, and what only a stored bank can get wrong."""

from __future__ import annotations

import numpy as np
import pytest

from gmem_bank import derive, ops
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import CorruptError, SourceError
from gmem_bank.kinds import open as open_bank
from gmem_bank.segments import narrow, widen
from gmem_bank.space import to_space
from tests.conftest import BankMaker
from tests.contracts import BankContract

N, D = 20, 8
VALUES = np.random.default_rng(3).standard_normal((N, D)).astype(np.float32)
UNIT = to_space(VALUES, "unit")


class TestDenseF32(BankContract):
    """f32, unit space: bit for bit what was stored."""

    @pytest.fixture
    def expected(self) -> np.ndarray:
        return UNIT

    @pytest.fixture
    def tolerance(self) -> float:
        return 0.0

    @pytest.fixture
    def bank(self, make_bank: BankMaker) -> MemoryBank:
        return make_bank(snippets=VALUES)


class TestDenseF16(TestDenseF32):
    """f16, renormalised on read."""

    @pytest.fixture
    def tolerance(self) -> float:
        return 1e-3

    @pytest.fixture
    def bank(self, make_bank: BankMaker) -> MemoryBank:
        return make_bank(snippets=VALUES, dtype="f16")


class TestDenseBf16(TestDenseF16):
    """bf16, renormalised on read."""

    @pytest.fixture
    def tolerance(self) -> float:
        return 8e-3

    @pytest.fixture
    def bank(self, make_bank: BankMaker) -> MemoryBank:
        return make_bank(snippets=VALUES, dtype="bf16")


class TestRawSpace(TestDenseF32):
    """raw space: lengths kept."""

    @pytest.fixture
    def expected(self) -> np.ndarray:
        return VALUES

    @pytest.fixture
    def bank(self, make_bank: BankMaker) -> MemoryBank:
        return make_bank(snippets=VALUES, space="raw")


class TestSegments(TestDenseF32):
    """Several segments read as one bank."""

    @pytest.fixture
    def bank(self, make_bank: BankMaker) -> MemoryBank:
        return make_bank(snippets=VALUES, parts=(1, 12, 7))


class TestMasked(TestDenseF32):
    """Some rows masked."""

    @pytest.fixture
    def bank(self, make_bank: BankMaker) -> MemoryBank:
        active = np.ones(N, np.bool_)
        active[[0, 5, 19]] = False
        return make_bank(snippets=VALUES, parts=(10, 10), active=active)


class TestEdited(TestDenseF32):
    """After a removal and an interpolation."""

    @pytest.fixture
    def expected(self) -> np.ndarray:
        kept = UNIT[np.arange(N) % 3 != 1]
        return np.concatenate([kept, kept[[0, 1]]])

    @pytest.fixture
    def bank(self, make_bank: BankMaker) -> MemoryBank:
        bank = make_bank(snippets=VALUES, parts=(10, 10))
        ops.remove_concept(bank.path, "class1")
        first, second = open_bank(bank.path).keys(np.array([0, 1]))
        derive.interpolate(bank.path, first, second, steps=2, name="between")
        return open_bank(bank.path)

    @pytest.fixture
    def tolerance(self) -> float:
        return 1e-6


def test_rows_for_many_keys_agrees_with_a_dictionary(make_bank: BankMaker) -> None:
    """The hash table finds what a dictionary finds, for odd keys too."""
    keys = [f"{i % 7}/{'é' * (i % 3)}\n{i}😀" for i in range(500)]
    bank = make_bank(rows=500, keys=keys, parts=(123, 377))
    asked = [keys[i] for i in np.random.default_rng(0).permutation(500)]
    table = {key: row for row, key in enumerate(keys)}
    assert bank.rows_for(asked).tolist() == [table[key] for key in asked]


def test_colliding_hashes_are_told_apart_by_their_keys(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hash that makes every key collide, the keys' own text decides."""
    from gmem_bank import keys as key_tables

    monkeypatch.setattr(key_tables, "hashes_of", lambda keys: np.zeros(len(list(keys)), np.uint64))
    bank = make_bank(rows=9)
    keys = bank.keys(np.arange(9))
    assert bank.rows_for(keys[::-1]).tolist() == list(range(9))[::-1]
    assert bank.find_rows(["absent"]).tolist() == [-1]


def test_bf16_narrowing_rounds_to_nearest_even_like_torch() -> None:
    """Our bfloat16 bits are torch's."""
    import torch

    values = np.concatenate([VALUES.ravel(), np.float32([0.0, 1.00390625, 1.01171875, -3.0e38, 1e-40])])
    ours = narrow(values[None], "BF16").ravel()
    theirs = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(widen(ours), torch.from_numpy(values).to(torch.bfloat16).float().numpy())


def test_a_value_that_is_not_finite_is_reported_with_its_row(make_bank: BankMaker) -> None:
    """NaN in the file is damage, not data."""
    bank = make_bank(rows=6)
    entry = bank.stored.place("0/snippets")
    data = bytearray(bank.path.read_bytes())
    begin = entry.begin + 3 * 8 * 4
    data[begin : begin + 4] = np.float32(np.nan).tobytes()
    bank.path.write_bytes(data)
    damaged = open_bank(bank.path)
    assert np.isfinite(damaged.snippets(np.array([0, 1]))).all()
    with pytest.raises(CorruptError) as caught:
        damaged.snippets(np.array([1, 3]))
    assert caught.value.row == 3


def test_derived_rows_have_no_image(make_bank: BankMaker) -> None:
    """Interpolated rows are not among the image rows and say so when asked for pixels."""
    bank = make_bank(rows=6)
    derive.interpolate(bank.path, "class0", "class1", steps=3, name="x")
    edited = open_bank(bank.path)
    assert edited.image_rows().tolist() == list(range(6))
    with pytest.raises(SourceError, match="computed from other rows"):
        edited.read_image(7)
