"""What is deleted on request is in no index beside the bank either."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import gmem_bank
from gmem_bank.cli import main
from gmem_bank.errors import LockedError
from gmem_bank.index_file import index_path, read_index
from gmem_bank.selection import Selection
from gmem_bank.storage import atomic
from tests.conftest import BankMaker
from tests.gmem_bank.test_index import clustered


def first_key(bank: gmem_bank.MemoryBank) -> Selection:
    return Selection(keys=tuple(bank.keys(np.array([0]))))


@pytest.mark.parametrize("form", ["bank.safetensors", "bank.h5", "bank.gmem"])
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_without_undo_an_index_goes_with_the_rows_that_it_holds(make_bank: BankMaker, form: str, kind: str) -> None:
    """The vector is in no file any more; without --no-undo the index stays for 'index --update'."""
    bank = make_bank(form, snippets=clustered(60, 8), kind=kind, rank=4)
    place = index_path(bank.path)
    gmem_bank.build_index(bank.path)
    held = np.asarray(read_index(place).vectors[0]).tobytes()
    assert held in place.read_bytes()
    report = gmem_bank.remove(bank.path, first_key(bank), refit=kind == "factored", undo=False)
    assert report.deleted_index == str(place)
    assert not [file for file in Path().rglob("*") if file.is_file() and held in file.read_bytes()]
    gmem_bank.build_index(bank.path)
    assert gmem_bank.remove(bank.path, first_key(gmem_bank.open(bank.path))).deleted_index is None
    assert place.exists()


def test_what_a_kill_left_goes_by_the_same_command(make_bank: BankMaker) -> None:
    """The bank is written, its index not yet deleted: once more, as if nothing had come between."""
    bank = make_bank(snippets=clustered(60, 8))
    place = index_path(bank.path)
    gmem_bank.build_index(bank.path)
    old = place.read_bytes()
    gmem_bank.remove(bank.path, first_key(bank), undo=False)
    place.write_bytes(old)
    atomic.temporary_path(place).write_bytes(old)
    again = gmem_bank.remove(bank.path, first_key(bank), undo=False)
    assert (again.unchanged, again.deleted_index) == (True, str(place))
    assert sorted(path.name for path in Path().iterdir()) == ["bank.safetensors"]


def test_an_index_whose_rows_are_all_there_stays(make_bank: BankMaker) -> None:
    """Rows that came, a mask or a name take nothing from the bank; a file that is no index is nobody's to delete."""
    bank = make_bank(snippets=clustered(60, 8))
    gmem_bank.build_index(bank.path)
    gmem_bank.insert_snippets(bank.path, clustered(5, 8, seed=4), name="new", report=False, undo=False)
    gmem_bank.mask(bank.path, Selection(concepts=("new",)), undo=False)
    assert gmem_bank.rename(bank.path, "new", "newer", undo=False).deleted_index is None
    assert gmem_bank.update_index(bank.path).num_added == 5
    report = gmem_bank.remove(bank.path, first_key(bank), output="out.safetensors", undo=False)
    assert report.deleted_index is None
    index_path(bank.path).write_bytes(b"mine")
    assert gmem_bank.remove(bank.path, first_key(bank), undo=False).deleted_index is None
    assert index_path(bank.path).read_bytes() == b"mine"


def test_a_damaged_index_goes_and_one_that_is_being_written_is_said(make_bank: BankMaker) -> None:
    """What a damaged one holds is not known; of one in the making the same command asks again."""
    bank = make_bank(snippets=clustered(60, 8))
    place = index_path(bank.path)
    gmem_bank.build_index(bank.path)
    data = bytearray(place.read_bytes())
    data[300] ^= 255
    place.write_bytes(data)
    selection = first_key(bank)
    with atomic.locked(place), pytest.raises(LockedError, match=r"bank\.safetensors\.index"):
        gmem_bank.remove(bank.path, selection, undo=False)
    assert gmem_bank.remove(bank.path, selection, undo=False).deleted_index == str(place)
    assert not place.exists()


def test_the_command_says_so(make_bank: BankMaker) -> None:
    """On stderr, and in JSON."""
    bank = make_bank(snippets=clustered(60, 8))
    for options in ([], ["--json"]):
        gmem_bank.build_index(bank.path)
        key = gmem_bank.open(bank.path).keys(np.array([0]))[0]
        done = CliRunner().invoke(main, ["remove", str(bank.path), "--key", key, "--no-undo", *options])
        assert done.exit_code == 0, done.output
        assert "held rows as they were, and is deleted" in done.stderr
    assert json.loads(done.stdout)["deleted_index"] == str(index_path(bank.path))


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-rabitq", "ivf-pq"])
def test_an_update_keeps_no_hash_of_a_row_that_is_gone(make_bank: BankMaker, kind: str) -> None:
    """Keys and values could be guessed by their hashes, which have no salt."""
    bank = make_bank(snippets=clustered(400, 16))
    gmem_bank.build_index(bank.path, kind=kind, recall=0.5)
    place = index_path(bank.path)
    before = read_index(place)
    gmem_bank.remove(bank.path, first_key(bank))
    gmem_bank.update_index(bank.path)
    after = read_index(place)
    gone = np.flatnonzero(after.rows < 0)
    assert gone.tolist() == [0]
    assert (after.keys[gone], after.values[gone]) == (0, 0)
    for table in (before.keys, before.values):
        assert table[:1].tobytes() not in place.read_bytes()
    np.testing.assert_array_equal(after.keys[1:], before.keys[1:])
