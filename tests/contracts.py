"""What every kind of bank must do: the real check behind `isinstance(bank, Bank)`."""

from __future__ import annotations

import numpy as np
import pytest

from gmem_bank.errors import MaskedRowError, UnknownKeyError
from gmem_bank.interface import INTERFACE_VERSION, Bank, SupportsConcepts, SupportsImages


class BankContract:
    """Subclass and give `bank` and `expected`: the (N, D) snippets that the bank should hold, and the tolerance."""

    def test_it_offers_the_interface(self, bank: Bank, expected: np.ndarray) -> None:
        """Names, types and sizes are those of the interface."""
        assert isinstance(bank, Bank)
        assert bank.interface_version == INTERFACE_VERSION
        assert (len(bank), bank.dim) == expected.shape
        assert type(bank.dim) is int
        assert bank.space in ("raw", "unit")
        assert len(bank.fingerprint) == 64
        assert bank.encoder.dim == bank.dim

    def test_snippets_are_the_expected_values_in_any_order(
        self, bank: Bank, expected: np.ndarray, tolerance: float
    ) -> None:
        """Rows come back as asked for, repetitions included."""
        rows = bank.rows()
        asked = np.concatenate([rows[::-1], rows[:1], rows[:1]])
        got = bank.snippets(asked)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected[asked], atol=tolerance)

    def test_unit_space_means_norm_one(self, bank: Bank, expected: np.ndarray) -> None:
        """In unit space every snippet has norm 1, whatever the stored type."""
        if bank.space == "unit":
            np.testing.assert_allclose(np.linalg.norm(bank.snippets(bank.rows()), axis=1), 1, atol=1e-6)

    def test_snippets_are_a_new_array(self, bank: Bank, expected: np.ndarray) -> None:
        """Writing into what was returned does not change the bank."""
        rows = bank.rows()[:2]
        first = bank.snippets(rows)
        before = first.copy()
        first[:] = 0
        np.testing.assert_array_equal(bank.snippets(rows), before)

    def test_rows_are_active_ascending_and_masked_rows_raise(self, bank: Bank, expected: np.ndarray) -> None:
        """A mask is a promise."""
        rows = bank.rows()
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()
        for row in set(range(len(bank))) - set(rows.tolist()):
            with pytest.raises(MaskedRowError):
                bank.snippets(np.array([rows[0], row]))

    @pytest.mark.parametrize("row", [-1, 10**6])
    def test_rows_outside_the_bank_raise(self, bank: Bank, expected: np.ndarray, row: int) -> None:
        """There is no row -1."""
        with pytest.raises(UnknownKeyError) as caught:
            bank.snippets(np.array([row]))
        assert caught.value.row == row

    def test_no_rows_give_no_snippets(self, bank: Bank, expected: np.ndarray) -> None:
        """An empty request is answered with an empty array."""
        assert bank.snippets(np.zeros(0, np.int64)).shape == (0, bank.dim)

    def test_keys_and_rows_are_inverse(self, bank: Bank, expected: np.ndarray) -> None:
        """rows_for undoes keys, in any order."""
        assert isinstance(bank, SupportsImages)
        rows = bank.rows()[::-1]
        keys = bank.keys(rows)
        assert len(set(keys)) == len(keys)
        np.testing.assert_array_equal(bank.rows_for(keys), rows)
        with pytest.raises(UnknownKeyError, match=r"'no-1', 'no-2', 'no-3' and 1 more"):
            bank.rows_for([keys[0], "no-1", "no-2", "no-3", "no-4"])

    def test_concepts_hold_active_rows_only(self, bank: Bank, expected: np.ndarray) -> None:
        """A concept's rows are active, ascending rows of the bank; an unknown name is answered with the nearest."""
        assert isinstance(bank, SupportsConcepts)
        active = set(bank.rows().tolist())
        for name in bank.names:
            rows = bank.rows_of(name)
            assert set(rows.tolist()) <= active
            assert (np.diff(rows) > 0).all()
        with pytest.raises(UnknownKeyError, match="class0"):
            bank.rows_of("clas0")
