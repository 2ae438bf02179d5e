"""An index after edits of its bank: brought up to date it answers as a fresh one, and it fits no other bank."""

from __future__ import annotations

import dataclasses
import multiprocessing
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank import ops
from gmem_bank.errors import BankNotFoundError, LockedError, StaleIndexError
from gmem_bank.index_choice import default_lists
from gmem_bank.index_file import index_path, read_index, write_index
from gmem_bank.row_identity import hashes_of_values
from gmem_bank.selection import Selection
from gmem_bank.storage import atomic
from tests.conftest import BankMaker
from tests.gmem_bank.test_index import assert_same_answers, clustered, cosines_of

EVERYWHERE = {"flat": {}, "hnsw": {"nprobe": 500, "rerank": 40}}


def everywhere(kind: str, lists: int) -> dict[str, int]:
    return EVERYWHERE.get(kind, {"nprobe": lists, "rerank": 50})


def assert_answers(bank: gmem_bank.MemoryBank, kind: str) -> None:
    """The index beside the bank gives the answers of brute force, new and old rows asked for."""
    queries = np.concatenate([clustered(20, seed=9), bank.snippets(bank.rows()[[0, -1]])])
    index = gmem_bank.open_index(bank)
    scores, rows = index.nearest(queries, 10, **everywhere(kind, default_lists(400)))
    assert_same_answers(scores, rows, cosines_of(bank, queries))


@pytest.mark.parametrize("stored", [("dense", "f16"), ("factored", "f32"), ("factored", "i8"), ("sparse", "f16")])
@pytest.mark.parametrize("kind", ["flat", "ivf-rabitq", "ivf-flat", "ivf-pq", "hnsw"])
def test_updated_it_answers_as_brute_force(make_bank: BankMaker, kind: str, stored: tuple[str, str]) -> None:
    """Insert, remove, mask, rename, compact, in turn; only what is new is added. HNSW cannot remove, and says what can."""
    bank = make_bank(snippets=clustered(), kind=stored[0], dtype=stored[1], rank=5, parts=(250, 150))
    gmem_bank.build_index(bank.path, kind=kind, recall=0.5)
    new = bank.snippets(np.arange(0, 400, 10)) + np.random.default_rng(7).normal(0, 0.02, (40, 16)).astype(np.float32)
    gmem_bank.insert_snippets(bank.path, new, name="new", report=False)
    opened = gmem_bank.open(bank.path)
    with pytest.raises(StaleIndexError, match=r"another state of .* --update"):
        gmem_bank.open_index(opened)
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed, report.num_rows) == (40, 0, 440)
    assert_answers(opened, kind)
    gmem_bank.remove_concept(bank.path, "class1")
    if kind == "hnsw":
        with pytest.raises(StaleIndexError, match=r"133 rows .* cannot remove .* --kind hnsw'"):
            gmem_bank.update_index(bank.path)
        return
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed, report.num_rows) == (0, 133, 307)
    assert_answers(gmem_bank.open(bank.path), kind)
    ops.mask(bank.path, Selection(concepts=("class2",)))
    gmem_bank.rename(bank.path, "new", "newer")
    assert_answers(gmem_bank.open(bank.path), kind)
    gmem_bank.insert_snippets(bank.path, new[:9] + np.float32(0.01), name="more", report=False)
    gmem_bank.remove(bank.path, Selection(concepts=("newer",)))
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed) == (9, 40)
    assert_answers(gmem_bank.open(bank.path), kind)
    gmem_bank.unmask(bank.path)
    assert_answers(gmem_bank.open(bank.path), kind)
    assert gmem_bank.update_index(bank.path).unchanged


def test_after_compacting_nothing_is_added(make_bank: BankMaker) -> None:
    """Segments are others, values are not: rows are known by their keys and values."""
    bank = make_bank(snippets=clustered(), parts=(250, 150))
    gmem_bank.build_index(bank.path, kind="ivf-rabitq", nprobe=10, rerank=50)
    gmem_bank.compact(bank.path)
    opened = gmem_bank.open(bank.path)
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed) == (0, 0)
    assert_answers(opened, "ivf-rabitq")


def test_a_key_that_comes_back_with_another_snippet_is_another_row(make_bank: BankMaker) -> None:
    """Same key, other values: the old vector goes."""
    bank = make_bank(snippets=clustered())
    gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=10, rerank=2)
    gmem_bank.insert_snippets(bank.path, clustered(5, seed=3), name="twice", report=False)
    gmem_bank.update_index(bank.path)
    gmem_bank.remove_concept(bank.path, "twice")
    gmem_bank.insert_snippets(bank.path, clustered(5, seed=4), name="twice", report=False)
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed) == (5, 5)
    assert_answers(gmem_bank.open(bank.path), "ivf-flat")


def test_it_fits_no_other_bank(make_bank: BankMaker) -> None:
    """A foreign bank, and one of another encoder."""
    bank = make_bank(snippets=clustered(60, 8))
    gmem_bank.build_index(bank.path)
    for other in (
        make_bank("b.safetensors", snippets=clustered(60, 8, seed=1)),
        make_bank("c.safetensors", snippets=clustered(60, 8), encoder="x"),
    ):
        with pytest.raises(StaleIndexError, match="another bank than"):
            gmem_bank.open_index(other, f"{bank.path}.index")
        with pytest.raises(StaleIndexError, match="builds a new one"):
            gmem_bank.update_index(other.path, path=f"{bank.path}.index")


@pytest.mark.parametrize("kind", ["flat", "ivf-flat", "ivf-rabitq", "hnsw"])
def test_it_follows_an_undo(make_bank: BankMaker, kind: str) -> None:
    """Rows that an undo took away go, and those that it brought back come: segments tell which. HNSW cannot, and says what can."""
    bank = make_bank(snippets=clustered(), parts=(250, 150))
    gmem_bank.build_index(bank.path, kind=kind, recall=0.5)
    gmem_bank.insert_snippets(bank.path, clustered(5, seed=3), name="new", report=False)
    gmem_bank.update_index(bank.path)
    gmem_bank.undo(bank.path)
    with pytest.raises(StaleIndexError, match="cannot remove" if kind == "hnsw" else "another state of .* --update"):
        gmem_bank.update_index(bank.path) if kind == "hnsw" else gmem_bank.open_index(gmem_bank.open(bank.path))
    if kind == "hnsw":
        return
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed, report.num_rows) == (0, 5, 400)
    assert_answers(gmem_bank.open(bank.path), kind)
    gmem_bank.remove(bank.path, Selection(keys=tuple(bank.keys(np.arange(250, 260)))))
    gmem_bank.update_index(bank.path)
    gmem_bank.undo(bank.path)
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed) == (10, 0)
    assert_answers(gmem_bank.open(bank.path), kind)


def test_a_copy_in_another_form_has_the_same_rows(make_bank: BankMaker) -> None:
    """The index is of the content: the same bank as HDF5 takes it."""
    bank = make_bank(snippets=clustered(60, 8))
    gmem_bank.build_index(bank.path, output="it.index")
    gmem_bank.save(bank, "copy.h5")
    copy = gmem_bank.open("copy.h5")
    assert_same_answers(
        *gmem_bank.open_index(copy, "it.index").nearest(clustered(3, 8), 4), cosines_of(copy, clustered(3, 8))
    )


def test_a_bank_grown_far_past_its_training_is_told_so(make_bank: BankMaker) -> None:
    """Twice the rows: a new index is advised."""
    bank = make_bank(snippets=clustered(100, 8))
    gmem_bank.build_index(bank.path, kind="ivf-flat")
    gmem_bank.insert_snippets(bank.path, clustered(150, 8, seed=3), name="new", report=False)
    assert gmem_bank.update_index(bank.path).outgrown


def test_no_index_and_two_writers(make_bank: BankMaker) -> None:
    """What is absent is said so; a second writer is refused."""
    bank = make_bank(rows=6)
    with pytest.raises(BankNotFoundError, match=r"no index at .*gmem-bank index"):
        gmem_bank.update_index(bank.path)
    with pytest.raises(BankNotFoundError, match="no index"):
        gmem_bank.open_index(bank)
    assert gmem_bank.find_index(bank) is None
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    holder = context.Process(target=hold, args=(Path(f"{bank.path}.index"), ready, done))
    holder.start()
    try:
        assert ready.wait(20)
        with pytest.raises(LockedError, match="another process"):
            gmem_bank.build_index(bank.path)
    finally:
        done.set()
        holder.join()


def hold(path: Path, ready: object, done: object) -> None:
    with atomic.locked(path):
        ready.set()
        done.wait(20)


def test_hashes_of_values_do_not_see_zeros_at_the_end_and_see_all_else() -> None:
    """So a row is known again after the basis has grown."""
    values = np.random.default_rng(0).standard_normal((500, 7)).astype(np.float32)
    hashes = hashes_of_values(values)
    np.testing.assert_array_equal(hashes, hashes_of_values(np.pad(values, ((0, 0), (0, 5)))))
    assert len(np.unique(hashes)) == 500
    changed = values.copy()
    changed[np.arange(500), np.arange(500) % 7] = np.nextafter(changed[np.arange(500), np.arange(500) % 7], 9)
    assert (hashes_of_values(changed) != hashes).all()
    assert (hashes_of_values(values[:, ::-1]) != hashes).all()


def test_a_bank_whose_factors_were_fitted_anew_needs_a_new_index(make_bank: BankMaker) -> None:
    """Coefficients on another basis are other numbers: no row is known again, and that is said."""
    old = make_bank("old.safetensors", snippets=clustered(60, 8), kind="factored", rank=3)
    gmem_bank.build_index(old.path)
    state = read_index(index_path(old.path))
    for change in ({"mean": "0" * 64}, {"basis": "0" * 64}, {"rank": 4}):
        content = {**state.facts["content"], "factors": {**state.facts["content"]["factors"], **change}}
        write_index(index_path(old.path), dataclasses.replace(state, facts={**state.facts, "content": content}))
        with pytest.raises(StaleIndexError, match="fitted anew"):
            gmem_bank.update_index(old.path)


def test_the_basis_grows_and_a_flat_index_follows(make_bank: BankMaker) -> None:
    """It is written anew on the axes of the bank, so that nothing of the new directions is lost."""
    kind = "flat"
    bank = make_bank(snippets=clustered(), kind="factored", rank=3)
    gmem_bank.build_index(bank.path, kind=kind, recall=0.3)
    gmem_bank.insert_snippets(bank.path, clustered(30, seed=8), name="new", grow_below=0.99, report=False)
    grown = gmem_bank.open(bank.path)
    assert grown.stored.shape("basis")[0] > 3
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed) == (30, 0)
    assert_answers(grown, kind)


def grown_bank(make_bank: BankMaker, added: np.ndarray, num_rows: int = 2000) -> gmem_bank.MemoryBank:
    """A factored bank of rank 12 in 48 dimensions, indexed by RaBitQ, whose basis then grows for new rows."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((num_rows, 12)) @ rng.standard_normal((12, 48)) + 0.01 * rng.standard_normal(
        (num_rows, 48)
    )
    bank = make_bank(snippets=rows.astype(np.float32), kind="factored", rank=12)
    gmem_bank.build_index(bank.path, kind="ivf-rabitq", recall=0.95)
    gmem_bank.insert_snippets(bank.path, added.astype(np.float32), name="new", grow_below=0.9999, report=False)
    return gmem_bank.open(bank.path)


def test_rows_that_the_index_would_hold_too_little_of_need_a_new_one(make_bank: BankMaker) -> None:
    """16 directions that it was not made in: with the tuned settings none of the new rows would be found."""
    rng = np.random.default_rng(1)
    added = 3 * rng.standard_normal((200, 16)) @ np.linalg.qr(rng.standard_normal((48, 16)))[0].T
    grown = grown_bank(make_bank, added)
    assert grown.stored.shape("basis")[0] >= 24
    before = index_path(grown.path).read_bytes()
    with pytest.raises(StaleIndexError, match=r"basis of .* has grown .* 'gmem-bank index .*' builds a new one"):
        gmem_bank.update_index(grown.path)
    assert index_path(grown.path).read_bytes() == before
    gmem_bank.build_index(grown.path, kind="ivf-rabitq", recall=0.95)
    queries = grown.snippets(np.arange(2000, 2200))
    found, true = gmem_bank.open_index(grown).nearest(queries, 10)[1], grown.nearest(queries, 10)[1]
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), true.tolist(), strict=True)]) > 0.6


def test_where_little_is_lost_the_recall_of_new_rows_is_measured(make_bank: BankMaker) -> None:
    """New rows that lie mostly where the index was made: added, and what their search is worth is said."""
    rng = np.random.default_rng(0)
    rng.standard_normal((2000, 12))
    span = rng.standard_normal((12, 48))
    other = np.random.default_rng(2)
    added = other.standard_normal((200, 12)) @ span + 0.5 * other.standard_normal((200, 48))
    grown = grown_bank(make_bank, added)
    assert grown.stored.shape("basis")[0] > 12
    report = gmem_bank.update_index(grown.path)
    assert report.num_added == 200
    assert report.recall_of_added is not None
    assert 0.5 < report.recall_of_added <= 1
    assert report.to_json()["recall_of_added"] == report.recall_of_added


def test_what_is_advised_works_after_compressing(make_bank: BankMaker) -> None:
    """index, compress in place, search: the command that the message names, and not the one that would refuse."""
    bank = make_bank(snippets=clustered())
    gmem_bank.build_index(bank.path, kind="ivf-flat", recall=0.5)
    gmem_bank.compress(bank.path, rank=4)
    assert_a_new_index_is_advised(bank.path)


def test_what_is_advised_works_after_a_refit(make_bank: BankMaker) -> None:
    """index, remove --refit, search."""
    bank = make_bank(snippets=clustered(), kind="factored", rank=4)
    gmem_bank.build_index(bank.path, kind="ivf-flat", recall=0.5)
    gmem_bank.remove_concept(bank.path, "class1", refit=True)
    assert_a_new_index_is_advised(bank.path)


def assert_a_new_index_is_advised(path: Path) -> None:
    opened = gmem_bank.open(path)
    for work in (lambda: gmem_bank.open_index(opened), lambda: gmem_bank.update_index(path)):
        with pytest.raises(StaleIndexError, match="fitted anew") as caught:
            work()
        assert "--update" not in str(caught.value)
        assert f"'gmem-bank index {path}'" in str(caught.value)
    gmem_bank.build_index(path, kind="ivf-flat", recall=0.5, nlist=default_lists(400))
    assert_answers(opened, "ivf-flat")
