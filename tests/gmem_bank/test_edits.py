"""Edits of whole banks: merge, select, mask, dedup, coreset, diff, undo, arrays; values against slow oracles."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

import gmem_bank
from gmem_bank import editing, factors, kinds
from gmem_bank.bank import MemoryBank
from gmem_bank.cli import main
from gmem_bank.draft import Draft
from gmem_bank.errors import (
    ConceptExistsError,
    ConfigError,
    EncoderMismatchError,
    FormatError,
    GMemError,
    MaskedRowError,
    OutputExistsError,
    SourceError,
    UnknownKeyError,
    WriteError,
)
from gmem_bank.kinds import FactoredBank
from gmem_bank.novelty import compare_with_bank
from gmem_bank.resolving import snippet_or_image
from gmem_bank.selection import Selection, rows_selected
from gmem_bank.storage import Payload, folder_store, hdf5_store, write
from gmem_bank.vectors import new_vectors
from tests.conftest import BankMaker, stored_oracle

FORMS = ["bank.safetensors", "bank.h5", "bank.gmem"]


def files(path: Path) -> dict[str, bytes]:
    """All bytes of a bank file or folder."""
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if not file.name.startswith(".")}


def all_keys(bank: MemoryBank) -> list[str]:
    return bank.keys(np.arange(len(bank)))


# -- selection


def test_a_selection_is_the_union_of_what_it_names(make_bank: BankMaker) -> None:
    """Concepts, keys and patterns add up; --invert takes the rest; --random draws among them, by the seed."""
    bank = make_bank(rows=20)
    keys = all_keys(bank)
    wanted = {row for row, key in enumerate(keys) if key.startswith("class0/") or key.endswith("4.png") or row == 2}
    selection = Selection(concepts=("class0",), keys=(keys[2],), patterns=("*4.png",))
    assert set(rows_selected(bank, selection).tolist()) == wanted
    inverse = rows_selected(bank, Selection(concepts=("class0",), keys=(keys[2],), patterns=("*4.png",), invert=True))
    assert set(inverse.tolist()) == set(range(20)) - wanted
    drawn = rows_selected(bank, Selection(concepts=("class1",), random=3, seed=5))
    assert len(drawn) == 3
    assert all(keys[row].startswith("class1/") for row in drawn)
    assert drawn.tolist() == rows_selected(bank, Selection(concepts=("class1",), random=3, seed=5)).tolist()
    draws = {tuple(rows_selected(bank, Selection(random=3, seed=seed)).tolist()) for seed in range(20)}
    assert len(draws) > 10


@pytest.mark.parametrize(
    ("selection", "error"),
    [
        ({}, ConfigError),
        ({"concepts": ("clas0",)}, UnknownKeyError),
        ({"keys": ("none",)}, UnknownKeyError),
        ({"patterns": ("class0/*", "dog/*")}, UnknownKeyError),
        ({"patterns": ("*",), "invert": True}, UnknownKeyError),
        ({"random": 21}, ConfigError),
        ({"random": 0}, ConfigError),
        ({"random": 1, "seed": -1}, ConfigError),
    ],
)
def test_a_selection_that_cannot_be_is_refused(make_bank: BankMaker, selection: dict, error: type) -> None:
    """Nothing asked for, nothing found, or too much asked for."""
    with pytest.raises(error):
        rows_selected(make_bank(), Selection(**selection))


def test_select_keeps_and_remove_deletes_just_those_rows(make_bank: BankMaker) -> None:
    """One is the other's complement, in keys, values and concepts; provenance of kept rows stays."""
    bank = make_bank(rows=20, parts=(7, 13))
    keys, values = all_keys(bank), bank.snippets(bank.rows())
    gmem_bank.select(bank.path, Selection(patterns=("class0/*",)), output="kept.safetensors")
    report = gmem_bank.remove(bank.path, Selection(patterns=("class0/*",)), output="rest.safetensors")
    kept, rest = kinds.open("kept.safetensors"), kinds.open("rest.safetensors")
    inside = [row for row, key in enumerate(keys) if key.startswith("class0/")]
    outside = [row for row in range(20) if row not in inside]
    assert all_keys(kept) == [keys[row] for row in inside]
    assert all_keys(rest) == [keys[row] for row in outside]
    np.testing.assert_array_equal(kept.snippets(kept.rows()), values[inside])
    np.testing.assert_array_equal(rest.snippets(rest.rows()), values[outside])
    assert kept.names == ("class0",)
    assert report.dropped_concepts == ["class0"]
    assert gmem_bank.verify("kept.safetensors").ok
    assert [entry["operation"] for entry in kept.history] == ["build", "select"]
    assert kept.history[-1]["parent"] == bank.fingerprint


# -- masks


@pytest.mark.parametrize("form", FORMS)
def test_a_hidden_row_is_nowhere_until_it_is_shown_again(make_bank: BankMaker, form: str) -> None:
    """rows, concepts and search pass it over, asking for it raises; unmask brings the very bank back."""
    bank = make_bank(form)
    before = bank.fingerprint
    report = gmem_bank.mask(bank.path, Selection(concepts=("class1",)))
    masked = kinds.open(bank.path)
    hidden = bank.rows_of("class1").tolist()
    assert report.details["num_changed"] == len(hidden)
    assert set(masked.rows().tolist()) == set(range(20)) - set(hidden)
    assert masked.rows_of("class1").tolist() == []
    assert set(masked.nearest(bank.snippets(np.array(hidden[:1])), 13)[1].ravel().tolist()).isdisjoint(hidden)
    with pytest.raises(MaskedRowError):
        masked.snippets(np.array(hidden[:1]))
    assert gmem_bank.mask(bank.path, Selection(concepts=("class1",))).unchanged
    assert gmem_bank.unmask(bank.path).details["num_active"] == 20
    assert kinds.open(bank.path).fingerprint == before
    with pytest.raises(ConfigError, match="no row would be left active"):
        gmem_bank.mask(bank.path, Selection(patterns=("*",)))


# -- rename, and concepts of rows that are there


def test_rename_moves_the_name_and_nothing_else(make_bank: BankMaker) -> None:
    """Rows and keys stay; a taken, absent or impossible name is refused."""
    bank = make_bank()
    rows = bank.rows_of("class1").tolist()
    gmem_bank.rename(bank.path, "class1", "birds")
    renamed = kinds.open(bank.path)
    assert renamed.names == ("class0", "birds", "class2")
    assert renamed.rows_of("birds").tolist() == rows
    assert all_keys(renamed) == all_keys(bank)
    for name, error in (("class2", ConceptExistsError), ("a/b", ConfigError), ("../x", ConfigError), ("", ConfigError)):
        with pytest.raises(error):
            gmem_bank.rename(bank.path, "birds", name)
    with pytest.raises(UnknownKeyError, match="'birds'"):
        gmem_bank.rename(bank.path, "bird", "x")


def test_a_concept_of_rows_adds_a_name_and_no_row(make_bank: BankMaker) -> None:
    """Rows may belong to several concepts; removing one of them takes its rows, wherever else they belong."""
    bank = make_bank()
    gmem_bank.concept_of_rows(bank.path, "evens", Selection(patterns=("*[02468].png",)))
    tagged = kinds.open(bank.path)
    assert tagged.rows_of("evens").tolist() == list(range(0, 20, 2))
    assert len(tagged) == 20
    gmem_bank.remove_concept(bank.path, "evens")
    assert all(key[-5] in "13579" for key in all_keys(kinds.open(bank.path)))


# -- merge


@pytest.mark.parametrize(
    ("kind", "dtype"), [("dense", "f32"), ("dense", "f16"), ("factored", "f32"), ("sparse", "f32")]
)
def test_a_merged_bank_holds_the_rows_of_all_in_order(make_bank: BankMaker, kind: str, dtype: str) -> None:
    """Keys, values, masks, concepts and sources are those of the parts; each bank's history is kept."""
    first = make_bank("a.safetensors", kind=kind, dtype=dtype, seed=1, active=np.arange(20) != 3)
    second = make_bank("b.h5", kind=kind, dtype=dtype, seed=2, prefix="other/", parts=(12, 8))
    third = make_bank("c.gmem", kind=kind, dtype=dtype, seed=3, prefix="third", rank=3)
    report = gmem_bank.merge(first.path, [second.path, third.path], output="all.safetensors")
    merged = kinds.open("all.safetensors")
    assert report.num_added == 40
    assert all_keys(merged) == all_keys(first) + all_keys(second) + all_keys(third)
    assert merged.rows().tolist() == [row for row in range(60) if row != 3]
    expected = np.vstack([stored_oracle(bank) for bank in (first, second, third)])
    np.testing.assert_allclose(merged.snippets(merged.rows()), expected[merged.rows()], atol=2e-6)
    assert merged.names == ("class0", "class1", "class2", "other", "thirdclass0", "thirdclass1", "thirdclass2")
    assert merged.rows_of("other").tolist() == list(range(20, 40))
    assert len(merged.sources) == 3
    entry = merged.history[-1]
    assert [bank["fingerprint"] for bank in entry["arguments"]["banks"]] == [second.fingerprint, third.fingerprint]
    assert gmem_bank.verify("all.safetensors").problems == []


def test_concepts_of_one_name_become_one(make_bank: BankMaker) -> None:
    """Rows of both banks, ascending."""
    make_bank("a.safetensors", rows=6)
    make_bank("b.safetensors", rows=6, keys=[f"class0/x{row}" for row in range(6)])
    gmem_bank.merge("a.safetensors", ["b.safetensors"])
    assert kinds.open("a.safetensors").rows_of("class0").tolist() == [0, 3, 6, 7, 8, 9, 10, 11]


def test_keys_that_occur_twice_stop_a_merge_or_the_first_stays(make_bank: BankMaker) -> None:
    """Two rows never share a key, also when the third bank repeats the second's."""
    first = make_bank("a.safetensors", seed=1, rows=6)
    make_bank("b.safetensors", seed=2, rows=9)
    make_bank("c.safetensors", seed=3, rows=12)
    with pytest.raises(ConceptExistsError, match=r"6 keys that an earlier bank has, such as 'class0/000\.png'"):
        gmem_bank.merge("a.safetensors", ["b.safetensors"], output="x.safetensors")
    report = gmem_bank.merge("a.safetensors", ["b.safetensors", "c.safetensors"], on_duplicate="first", output="x.h5")
    merged = kinds.open("x.h5")
    assert len(merged) == 12
    assert report.details["num_duplicates"] == 6 + 9
    np.testing.assert_array_equal(merged.snippets(np.arange(6)), first.snippets(np.arange(6)))
    assert gmem_bank.verify("x.h5").ok


def test_only_banks_of_one_encoder_space_and_kind_are_merged(make_bank: BankMaker) -> None:
    """The message names both."""
    make_bank("a.safetensors")
    for name, options in {
        "b": {"encoder": "another", "prefix": "b"}, "c": {"space": "raw", "prefix": "c"}, "d": {"dim": 9, "prefix": "d"},
        "e": {"kind": "factored", "prefix": "e"},
    }.items():  # fmt: skip
        make_bank(f"{name}.safetensors", **options)
        with pytest.raises(EncoderMismatchError, match=r"a\.safetensors|made-up"):
            gmem_bank.merge("a.safetensors", [f"{name}.safetensors"])


def test_a_merge_of_quantised_banks_says_what_it_cost(make_bank: BankMaker) -> None:
    """i8 coefficients are quantised anew on the common basis; the reported error is that of the values."""
    first = make_bank("a.safetensors", kind="factored", dtype="i8", space="raw", seed=1)
    second = make_bank("b.safetensors", kind="factored", dtype="i8", space="raw", seed=2, prefix="b")
    report = gmem_bank.merge(first.path, [second.path], output="m.safetensors")
    merged = kinds.open("m.safetensors")
    exact = np.vstack([stored_oracle(first), stored_oracle(second)])
    got = merged.snippets(merged.rows())
    centred = np.linalg.norm(exact - merged.mean)
    assert np.linalg.norm(got - exact) / centred <= report.details["relative_error"] * 1.5
    assert 0 < report.details["relative_error"] < 0.02
    assert merged.stored.dtype("0/coefficients") == "I8"


def test_merged_factors_are_those_of_an_svd_and_what_ends_is_said(make_bank: BankMaker) -> None:
    """One basis ordered by energy, the lowest threshold of growth, masks that end, and nothing left beside the bank."""
    first = make_bank("a.safetensors", kind="factored", space="raw", seed=1, dim=20, rank=4, rows=50)
    second = make_bank("b.safetensors", kind="sparse", space="raw", seed=2, dim=20, rank=3, rows=30, prefix="b")
    for bank, value in ((first, 0.9), (second, 0.4)):
        write(
            bank.path, replace(bank.header, extras={**bank.header.extras, "grow_below": value}), bank.stored.payloads()
        )
    exact = np.vstack([stored_oracle(first), stored_oracle(second)])
    told = gmem_bank.merge(first.path, [second.path], output="m.safetensors", dry_run=True).details
    report = gmem_bank.merge(first.path, [second.path], output="m.safetensors").details
    merged = kinds.open("m.safetensors")
    assert isinstance(merged, FactoredBank)
    sigma = np.linalg.svd(exact - exact.mean(axis=0), compute_uv=False)[:8]
    np.testing.assert_allclose(merged.singular_values, sigma, rtol=1e-5)
    np.testing.assert_allclose(merged.snippets(merged.rows()), exact, atol=1e-5)
    assert told["rank"] == report["rank"] == merged.rank == 8  # 4 + 3, and the difference of the means
    assert report["coefficient_mask"] == "ended"
    assert merged.header.extras["grow_below"] == report["grow_below"] == 0.4
    assert not list(Path.cwd().rglob(".*"))


# -- dedup and coreset


def test_dedup_keeps_the_first_of_each_group(make_bank: BankMaker) -> None:
    """Against a slow greedy pass over all pairs; planted twins go, and so does a chain's middle only once."""
    rng = np.random.default_rng(4)
    values = rng.standard_normal((60, 12)).astype(np.float32)
    values[40:] = values[:20] + 0.05 * rng.standard_normal((20, 12)).astype(np.float32)
    bank = make_bank(snippets=values, active=np.arange(60) != 41)
    unit = stored_oracle(bank)
    kept: list[int] = []
    for row in bank.rows().tolist():
        if not any(unit[row] @ unit[other] >= 0.97 for other in kept):
            kept.append(row)
    report = gmem_bank.dedup(bank.path, threshold=0.97, dry_run=True)
    assert report.dry_run
    assert len(kinds.open(bank.path)) == 60
    report = gmem_bank.dedup(bank.path, threshold=0.97)
    smaller = kinds.open(bank.path)
    keys = all_keys(bank)
    assert all_keys(smaller) == [keys[row] for row in sorted([*kept, 41])]
    assert report.num_removed == report.details["num_duplicates"] == 59 - len(kept) >= 15
    for group in report.details["groups"]:
        for removed in group["removed"]:
            pair = unit[[keys.index(group["kept"]), keys.index(removed["key"])]]
            assert removed["cosine"] == pytest.approx(pair[0] @ pair[1], abs=1e-5)
    assert gmem_bank.dedup(bank.path, threshold=0.97).unchanged


def test_dedup_across_blocks_is_that_of_one_block(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the bank is cut for comparison does not matter."""
    from gmem_bank import reduce

    values = np.random.default_rng(0).standard_normal((200, 3)).astype(np.float32)
    bank = make_bank(snippets=values)
    whole = reduce.find_duplicates(bank, 0.95)
    monkeypatch.setattr(reduce, "QUERY_ROWS", 7)
    assert reduce.find_duplicates(bank, 0.95).keys() == whole.keys()
    assert whole


def test_a_coreset_has_a_medoid_of_every_planted_cluster(make_bank: BankMaker) -> None:
    """Twelve tight clusters, twelve rows: one of each; the same seed draws the same."""
    rng = np.random.default_rng(8)
    centres = rng.standard_normal((12, 24)).astype(np.float32)
    labels = np.repeat(np.arange(12), 25)
    values = centres[labels] + 0.05 * rng.standard_normal((300, 24)).astype(np.float32)
    bank = make_bank(snippets=values, keys=[f"k{row:03d}" for row in range(300)])
    report = gmem_bank.coreset(bank.path, 12, output="core.safetensors", iterations=50)
    rows = bank.rows_for(all_keys(kinds.open("core.safetensors")))
    assert len(rows) == 12
    assert len(set(labels[rows].tolist())) >= 11  # k-means may put two centroids into one cluster
    assert report.details["mean_cosine_to_centroid"] > 0.95
    gmem_bank.coreset(bank.path, 12, output="again.safetensors", iterations=50)
    assert files(Path("again.safetensors"))["again.safetensors"] == files(Path("core.safetensors"))["core.safetensors"]
    for number in (0, 300):
        with pytest.raises(ConfigError):
            gmem_bank.coreset(bank.path, number, output="no.safetensors")


def test_a_coreset_of_equal_rows_still_has_its_number(make_bank: BankMaker) -> None:
    """Empty clusters are filled, so the asked number of different rows comes out."""
    bank = make_bank(snippets=np.ones((30, 4), np.float32))
    gmem_bank.coreset(bank.path, 7)
    assert len(set(all_keys(kinds.open(bank.path)))) == 7


# -- diff


def test_diff_finds_what_was_planted_and_nothing_else(make_bank: BankMaker) -> None:
    """One row gone, one new, one changed, one masked, one concept renamed; order and form do not matter."""
    values = np.random.default_rng(0).standard_normal((20, 8)).astype(np.float32)
    keys = [f"class{row % 3}/{row:03d}.png" for row in range(20)]
    first = make_bank("a.safetensors", snippets=values, keys=keys)
    changed = values.copy()
    changed[4] = -changed[4]
    order = np.random.default_rng(1).permutation(np.arange(1, 20))
    make_bank(
        "b.h5", snippets=np.vstack([changed[order], values[:1] + 1]), keys=[*(keys[row] for row in order), "new/1"],
        active=np.append(order != 7, True),
    )  # fmt: skip
    report = gmem_bank.diff(first.path, "b.h5")
    assert not report.same
    assert (report.only_first, report.only_second) == (["class0/000.png"], ["new/1"])
    assert [item["key"] for item in report.changed] == [keys[4]]
    assert report.changed[0]["cosine"] == pytest.approx(-1)
    assert (report.num_common, report.num_changed, report.num_mask_changed) == (19, 1, 1)
    assert report.concepts_only_second == ["new"]
    assert report.concepts_changed == {"class0": {"removed": 1, "added": 0}}
    assert report.different_fields == {}
    gmem_bank.save(first, "same.gmem")
    assert gmem_bank.diff(first.path, "same.gmem").same


# -- arrays


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".h5"])
def test_snippets_of_an_array_file_become_a_concept(make_bank: BankMaker, suffix: str) -> None:
    """Values in the bank's space, keys under the concept, the source with its digest."""
    from safetensors.numpy import save_file

    bank = make_bank(dtype="f32")
    values = np.random.default_rng(9).standard_normal((11, 8)).astype(np.float32)
    path = Path(f"new{suffix}")
    if suffix == ".npy":
        np.save(path, values)
    elif suffix == ".npz":
        np.savez(path, embeddings=values, paths=np.array([f"p{i}" for i in range(11)]))
    elif suffix == ".safetensors":
        save_file({"snippets": values}, path)
    else:
        with h5py.File(path, "w") as stored:
            stored["features"] = values
            stored["keys"] = [f"p{i}" for i in range(11)]
    report = gmem_bank.insert_snippets(bank.path, gmem_bank.read_array(path), name="new")
    edited = kinds.open(bank.path)
    rows = edited.rows_of("new")
    np.testing.assert_allclose(edited.snippets(rows), values / np.linalg.norm(values, axis=1, keepdims=True), atol=1e-6)
    keys = [f"new/p{i}" if suffix in (".npz", ".h5") else f"new/{i:02d}" for i in range(11)]
    assert report.keys == edited.keys(rows) == keys
    source = edited.sources[-1]
    assert (source.kind, source.path, source.num_images) == ("array", path.name, 11)
    assert edited.image_rows().tolist() == list(range(20))
    assert gmem_bank.insert_snippets(bank.path, gmem_bank.read_array(path), name="new").unchanged


@pytest.mark.parametrize(
    ("value", "message"),
    [(np.nan, "row 5 of the array .*not finite"), (np.inf, "row 5"), (0.0, "row 5 of the array .*all zeros")],
)
def test_a_snippet_that_cannot_be_is_named_by_its_row(make_bank: BankMaker, value: float, message: str) -> None:
    """NaN, infinity and zero are refused, and the bank stands."""
    bank = make_bank()
    before = files(bank.path)
    values = np.ones((9, 8), np.float32)
    values[5] = value
    with pytest.raises(GMemError, match=message) as caught:
        gmem_bank.insert_snippets(bank.path, values, name="new")
    assert caught.value.row == 5
    assert files(bank.path) == before


def test_arrays_that_cannot_be_rows_are_refused(make_bank: BankMaker) -> None:
    """Wrong dimension, shape, type, ambiguity, duplicate keys, a pickle, a bank: each has its message."""
    bank = make_bank()
    with pytest.raises(EncoderMismatchError, match="dimension 7"):
        gmem_bank.insert_snippets(bank.path, np.ones((2, 7), np.float32), name="x")
    for values in (np.ones(8), np.ones((0, 8)), np.ones((2, 2, 8)), np.array([["a"]]), np.array([[None]])):
        np.save("x.npy", values, allow_pickle=True)
        with pytest.raises(SourceError):
            gmem_bank.read_array(Path("x.npy"))
    np.savez("two.npz", a=np.ones((2, 8)), b=np.ones((2, 8)))
    with pytest.raises(SourceError, match="name the one to take 'snippets'"):
        gmem_bank.read_array(Path("two.npz"))
    np.savez("twice.npz", snippets=np.ones((2, 8)), keys=np.array(["k", "k"]))
    with pytest.raises(GMemError, match="'k'"):
        gmem_bank.insert_snippets(bank.path, gmem_bank.read_array(Path("twice.npz")), name="x")
    np.savez("short.npz", snippets=np.ones((2, 8)), keys=np.array(["k"]))
    with pytest.raises(SourceError, match="expected 2 texts"):
        gmem_bank.read_array(Path("short.npz"))
    with pytest.raises(SourceError, match="merge"):
        gmem_bank.read_array(bank.path)
    Path("junk.safetensors").write_bytes(b"junk")
    Path("junk.h5").write_bytes(b"junk")
    for name in ("junk.safetensors", "junk.h5", "absent.npy"):
        with pytest.raises(SourceError, match="could not read"):
            gmem_bank.read_array(Path(name))


# -- the report of an insert


def test_the_report_compares_new_rows_with_the_banks_own_neighbours(make_bank: BankMaker) -> None:
    """Against all pairs; a planted near-duplicate is named with its twin."""
    bank = make_bank(rows=50, dim=6)
    rng = np.random.default_rng(2)
    unit = stored_oracle(bank)
    fresh = rng.standard_normal((8, 6))
    fresh[3] = unit[17] + 1e-3
    fresh = (fresh / np.linalg.norm(fresh, axis=1, keepdims=True)).astype(np.float32)
    report = compare_with_bank(bank, fresh, [f"new/{i}" for i in range(8)])
    nearest = (fresh @ unit.T).max(axis=1)
    assert report["new"]["median"] == pytest.approx(np.quantile(nearest, 0.5), abs=1e-5)
    own = unit @ unit.T - 3 * np.eye(50)
    assert report["bank"]["median"] == pytest.approx(np.quantile(own.max(axis=1), 0.5), abs=1e-5)
    assert report["num_near_duplicates"] == int((nearest >= 0.98).sum()) >= 1
    assert report["near_duplicates"][0]["key"] == "new/3"
    assert report["near_duplicates"][0]["nearest"] == all_keys(bank)[17]
    assert (report["rows_compared"], report["sampled"]) == (50, False)


def test_a_large_bank_is_sampled_only_when_asked(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the limit nothing is compared by itself; asked for, the sample is stated."""
    from gmem_bank import novelty

    monkeypatch.setattr(novelty, "SAMPLE_ROWS", 15)
    bank = make_bank(rows=20)
    values = np.random.default_rng(1).standard_normal((3, 8)).astype(np.float32)
    assert "novelty" not in gmem_bank.insert_snippets(bank.path, values, name="a", dry_run=True).details
    asked = gmem_bank.insert_snippets(bank.path, values, name="a", dry_run=True, report=True).details["novelty"]
    assert (asked["rows_compared"], asked["sampled"]) == (15, True)


# -- new rows in factored banks


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_inserting_into_a_factored_bank_grows_its_basis_where_projection_would_lose(
    make_bank: BankMaker, dtype: str
) -> None:
    """Old rows read as before, new ones come back; the report says what projection would have kept; undo is exact."""
    bank = make_bank(kind="factored", dtype=dtype, dim=12, rank=3)
    before, old = files(bank.path), bank.snippets(bank.rows())
    values = np.random.default_rng(3).standard_normal((4, 12)).astype(np.float32)
    report = gmem_bank.insert_snippets(bank.path, values, name="new")
    edited = kinds.open(bank.path)
    np.testing.assert_array_equal(edited.snippets(np.arange(20)), old)
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosines = (edited.snippets(edited.rows_of("new")) * unit).sum(axis=1)
    assert cosines.min() > (0.985 if dtype == "i8" else 0.9899)
    assert report.details["grown_directions"] >= 1
    assert report.details["cosine_by_projection"]["min"] < report.details["cosine"]["min"]
    np.testing.assert_allclose(report.details["cosines"], cosines, atol=2e-6)
    wide = unit.astype(np.float64)
    centred = wide - bank.mean
    projected = centred @ bank.basis.T.astype(np.float64) @ bank.basis + bank.mean
    lost = np.vecdot(projected, wide) / np.linalg.norm(projected, axis=1)
    np.testing.assert_allclose(report.details["cosines_by_projection"], lost, atol=2e-6)
    assert edited.stored.dtype("1/coefficients") == bank.stored.dtype("0/coefficients")
    assert gmem_bank.verify(bank.path).problems == []
    gmem_bank.undo(bank.path)
    assert files(bank.path) == before


@pytest.mark.parametrize("dtype", ["f32", "i8"])
def test_it_is_said_where_i8_does_not_keep_the_cosine_asked_for(make_bank: BankMaker, dtype: str) -> None:
    """One row 50 times as long as the others sets the steps of their coefficients; in f32, or where none is asked for, all is well."""
    bank = make_bank(kind="factored", dtype=dtype, dim=12, rank=3, space="raw")
    values = np.random.default_rng(3).standard_normal((100, 12)).astype(np.float32)
    values[7] *= 50
    np.save("new.npy", values)
    asked = ["insert-concept", "new.npy", "--bank", str(bank.path), "--same-encoder", "--grow-below", "0.999"]
    done = CliRunner().invoke(main, asked, catch_exceptions=False)
    assert done.exit_code == 0
    edited = kinds.open(bank.path)
    found = factors.cosines(edited.snippets(edited.rows_of("new")), values)
    below = int((found < 0.999 - 1e-6).sum())
    assert (below > 0) == (dtype == "i8")
    said = (
        f"{below} of 100 new rows have a cosine below the 0.999 asked for, the lowest {found.min():.5f}" in done.stderr
    )
    assert said == (below > 0)
    gmem_bank.undo(bank.path)
    assert not gmem_bank.insert_snippets(bank.path, values, name="b", grow_below=-1, report=False).details["warnings"]


@pytest.mark.parametrize("dtype", ["f32", "i8"])
@pytest.mark.parametrize("grow_below", [0.9, -1])
def test_inserting_many_rows_into_a_factored_bank_takes_little_memory(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, dtype: str, grow_below: float
) -> None:
    """Snippets pass by in blocks, however many there are, and a report does not list the cosine of each."""
    monkeypatch.setattr(factors, "CHUNK_VALUES", 1 << 15)
    bank = make_bank(kind="factored", dtype=dtype, dim=32, rank=3)
    draft = Draft(bank, bank.path)

    def blocks() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(3)
        return (rng.standard_normal((5000, 32)).astype(np.float32) for _ in range(12))

    tracemalloc.start()
    try:
        payloads, details = new_vectors(draft, blocks, 60_000, grow_below=grow_below)
        num_bytes = sum(len(block) for block in payloads["coefficients"].blocks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert num_bytes == 60_000 * details["rank"] * (1 if dtype == "i8" else 4)
    assert details["rank"] > 3 if grow_below > 0 else details["rank"] == 3
    assert peak < 60_000 * 32 * 4, f"{peak / 1e6:.0f} MB for 8 MB of snippets"
    assert "cosines" not in details
    assert details["cosine"]["min"] > grow_below - 0.05


# -- undo, dry runs, and what is left on disk


@pytest.mark.parametrize("form", FORMS)
def test_edits_are_undone_byte_by_byte_and_leave_nothing_behind(make_bank: BankMaker, form: str) -> None:
    """An append and, before it, something else: undone in turn; nothing hidden remains."""
    bank = make_bank(form)
    before = files(bank.path)
    gmem_bank.remove_concept(bank.path, "class1")
    between = files(bank.path)
    gmem_bank.interpolate(bank.path, "class0", "class2", name="way")
    gmem_bank.insert_snippets(bank.path, np.ones((2, 8), np.float32), name="ones")
    gmem_bank.undo(bank.path)
    gmem_bank.undo(bank.path)
    assert files(bank.path) == between
    assert gmem_bank.undo(bank.path, dry_run=True).details["undone"] == "remove-concept"
    assert files(bank.path) == between
    gmem_bank.undo(bank.path)
    assert files(bank.path) == before
    assert [path.name for path in Path.cwd().rglob(".*")] == []
    with pytest.raises(GMemError, match="nothing to undo"):
        gmem_bank.undo(bank.path)


@pytest.mark.parametrize("form", FORMS)
def test_no_undo_keeps_nothing_of_what_was_deleted(make_bank: BankMaker, form: str) -> None:
    """For deletion on request: neither a hidden file nor an older state has the rows; undo says why it cannot."""
    bank = make_bank(form)
    gmem_bank.remove_concept(bank.path, "class0")
    gmem_bank.remove_concept(bank.path, "class1", undo=False)
    names = {name for path in Path.cwd().rglob("*") if path.is_file() for name in [path.name] if name.startswith(".")}
    assert names == set()
    kept = b"".join(files(bank.path).values())
    assert b"class0/" not in kept
    assert b"class1/" not in kept
    with pytest.raises(GMemError, match="--no-undo"):
        gmem_bank.undo(bank.path)


def test_undo_of_a_copy_or_a_changed_state_is_refused_not_guessed(make_bank: BankMaker) -> None:
    """A bank moved away from its hidden state says so; an append written with -o elsewhere is not torn apart wrongly."""
    bank = make_bank()
    gmem_bank.remove_concept(bank.path, "class1")
    Path("moved.safetensors").write_bytes(bank.path.read_bytes())
    with pytest.raises(GMemError, match="not kept"):
        gmem_bank.undo("moved.safetensors")
    Path("elsewhere").mkdir()
    gmem_bank.interpolate(bank.path, "class0", "class2", name="way", output="elsewhere/bank.safetensors")
    with pytest.raises(GMemError, match="with -o from another place"):
        gmem_bank.undo("elsewhere/bank.safetensors")


def test_a_dry_run_writes_nothing_and_needs_no_right_to_write(make_bank: BankMaker) -> None:
    """The report is what the edit's would be; not even a lock appears."""
    bank = make_bank()
    before = {path.name: path.stat().st_mtime_ns for path in Path.cwd().iterdir()}
    for report in (
        gmem_bank.remove_concept(bank.path, "class0", dry_run=True),
        gmem_bank.interpolate(bank.path, "class0", "class1", dry_run=True),
        gmem_bank.compose(bank.path, "class0 - class1", dry_run=True),
        gmem_bank.compact(bank.path, dry_run=True),
    ):
        assert report.dry_run
        assert report.fingerprint == bank.fingerprint
    assert {path.name: path.stat().st_mtime_ns for path in Path.cwd().iterdir()} == before


def test_an_output_that_is_something_else_is_never_replaced(make_bank: BankMaker) -> None:
    """-o onto another bank, a folder that is no bank, a foreign file: refused."""
    bank = make_bank()
    other = make_bank("other.h5", seed=5)
    with pytest.raises(OutputExistsError):
        gmem_bank.select(bank.path, Selection(concepts=("class0",)), output=other.path)
    Path("full.gmem").mkdir()
    Path("full.gmem/notes.txt").write_text("mine")
    with pytest.raises((OutputExistsError, FormatError)):
        gmem_bank.shard(bank.path, "full.gmem")
    assert Path("full.gmem/notes.txt").read_text() == "mine"
    with pytest.raises(OutputExistsError):
        gmem_bank.save(bank, other.path, overwrite=False)


# -- folders


def test_an_insert_into_a_folder_leaves_the_old_files_alone(make_bank: BankMaker) -> None:
    """Only the new segment, the tables and the manifest are written; removing a file of it is noticed."""
    bank = make_bank("bank.gmem", rows=40, parts=(30, 10))
    old = {file.name: file.stat() for file in bank.path.iterdir() if file.name.startswith("segment-")}
    gmem_bank.insert_snippets(bank.path, np.ones((2, 8), np.float32), name="ones")
    for name, stat in old.items():
        assert (bank.path / name).stat().st_ino == stat.st_ino
    assert sum(file.name.startswith("segment-") for file in bank.path.iterdir()) == 3
    assert gmem_bank.verify(bank.path).ok
    next(bank.path.glob("segment-0-*")).unlink()
    with pytest.raises(FormatError, match=r"segment-0-.* is gone"):
        kinds.open(bank.path)


def test_whoever_has_a_folder_open_keeps_the_bank_they_opened(make_bank: BankMaker) -> None:
    """An edit, and the removal of files that it brings, does not change an open bank."""
    bank = make_bank("bank.gmem")
    before = bank.snippets(bank.rows())
    gmem_bank.remove_concept(bank.path, "class1", undo=False)
    np.testing.assert_array_equal(bank.snippets(bank.rows()), before)
    assert len(kinds.open(bank.path)) == 13


def test_shard_cuts_and_compact_joins_without_a_change_of_value(make_bank: BankMaker) -> None:
    """Rows stay in order; kinds with scales too; one file comes back."""
    for number, (kind, dtype) in enumerate((("dense", "bf16"), ("factored", "i8"), ("sparse", "f16"))):
        bank = make_bank(f"{number}.safetensors", kind=kind, dtype=dtype, active=np.arange(20) != 4)
        gmem_bank.shard(bank.path, f"{number}.gmem", rows_per_segment=6)
        cut = kinds.open(f"{number}.gmem")
        assert [segment.num_rows for segment in cut.header.segments] == [6, 6, 6, 2]
        gmem_bank.compact(f"{number}.gmem", output=f"{number}-back.safetensors")
        back = kinds.open(f"{number}-back.safetensors")
        assert len(back.header.segments) == 1
        for other in (cut, back):
            assert all_keys(other) == all_keys(bank)
            np.testing.assert_array_equal(other.snippets(other.rows()), bank.snippets(bank.rows()))
        for name in bank.stored.names():
            np.testing.assert_array_equal(np.array(back.stored.array(name)), np.array(bank.stored.array(name)))
    with pytest.raises(ConfigError, match="more than 64"):
        gmem_bank.shard(make_bank("many.safetensors", rows=70).path, "many.gmem", rows_per_segment=1)


def test_past_64_segments_an_edit_joins_them(make_bank: BankMaker) -> None:
    """The 65th segment is not written; values stay, and undo goes back to 64."""
    bank = make_bank(rows=64, parts=(1,) * 64)
    before = files(bank.path)
    gmem_bank.interpolate(bank.path, "class0", "class1", steps=2, name="x")
    joined = kinds.open(bank.path)
    assert len(joined.header.segments) == 1
    np.testing.assert_array_equal(joined.snippets(np.arange(64)), bank.snippets(bank.rows()))
    gmem_bank.undo(bank.path)
    assert files(bank.path) == before


# -- what users and attackers found


@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_kept_state_never_takes_the_place_of_a_sound_bank(make_bank: BankMaker, form: str) -> None:
    """undo checks every hash of the state before it goes back to it."""
    bank = make_bank(form)
    gmem_bank.remove_concept(bank.path, "class1")
    if bank.path.is_dir():
        current = set(folder_store.files_of(bank.path))
        kept = next(f for f in bank.path.glob("segment-*") if f.name not in current)
    else:
        kept = next(Path.cwd().glob(".undo-*"))
    data = bytearray(kept.read_bytes())
    place = bank.stored.place("0/snippets").begin + 5
    data[place] ^= 1
    kept.write_bytes(data)
    before = files(bank.path)
    with pytest.raises(GMemError, match="does not match its hash"):
        gmem_bank.undo(bank.path)
    assert files(bank.path) == before
    assert gmem_bank.verify(bank.path).ok


def test_conversion_of_a_damaged_bank_is_refused(make_bank: BankMaker) -> None:
    """convert and shard check what they copy, and leave nothing."""
    bank = make_bank()
    data = bytearray(bank.path.read_bytes())
    data[bank.stored.place("0/snippets").begin + 9] ^= 4
    bank.path.write_bytes(data)
    damaged = kinds.open(bank.path)
    for name in ("x.h5", "x.safetensors", "x.gmem"):
        with pytest.raises(GMemError, match="does not match its hash"):
            gmem_bank.save(damaged, name)
    with pytest.raises(GMemError, match="does not match its hash"):
        gmem_bank.shard(bank.path, "y.gmem")
    assert [path.name for path in Path.cwd().iterdir()] == [bank.path.name]


def test_another_picture_under_the_same_name_is_another_edit(photos: Path) -> None:
    """A repeated command is only 'done already' where its images are the same."""
    encoder = gmem_bank.load_encoder("hog")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    first, second = sorted((photos / "hat").iterdir())[:2]
    resolve = lambda bank, item: snippet_or_image(bank, item, lambda: encoder)  # noqa: E731
    Path("q.jpg").write_bytes(first.read_bytes())
    gmem_bank.compose("bank.safetensors", "q.jpg", name="c", resolve=resolve)
    assert gmem_bank.compose("bank.safetensors", "q.jpg", name="c", resolve=resolve).unchanged
    Path("q.jpg").write_bytes(second.read_bytes())
    with pytest.raises(ConceptExistsError):
        gmem_bank.compose("bank.safetensors", "q.jpg", name="c", resolve=resolve)


def test_nothing_to_do_still_writes_the_output_that_was_asked_for(make_bank: BankMaker) -> None:
    """With -o the next step of a script finds its file; in place nothing is written, and no history grows."""
    bank = make_bank()
    gmem_bank.dedup(bank.path, threshold=1.0, output="a.safetensors")
    gmem_bank.unmask(bank.path, output="b.h5")
    for name in ("a.safetensors", "b.h5"):
        assert gmem_bank.diff(bank.path, name).same
    gmem_bank.save(bank, "twin.safetensors")
    before = files(bank.path)
    report = gmem_bank.merge(bank.path, ["twin.safetensors"], on_duplicate="first")
    assert report.unchanged
    assert files(bank.path) == before


def test_hdf5_arrays_that_lie_elsewhere_are_not_read(make_bank: BankMaker) -> None:
    """External storage, links, virtual and compressed datasets, and sizes that the file does not have: refused."""
    bank = make_bank()
    Path("secret").write_bytes(bytes(range(256)) * 4)
    ones = np.ones((4, 8), np.float32)
    with h5py.File("plain.h5", "w") as stored:
        stored["snippets"] = ones
    with h5py.File("external.h5", "w") as stored:
        stored.create_dataset("snippets", (4, 8), "u1", external=[("secret", 0, 32)])
    with h5py.File("link.h5", "w") as stored:
        stored["snippets"] = h5py.ExternalLink("plain.h5", "snippets")
    with h5py.File("virtual.h5", "w") as stored:
        layout = h5py.VirtualLayout((4, 8), "f4")
        layout[:] = h5py.VirtualSource("plain.h5", "snippets", (4, 8))
        stored.create_virtual_dataset("snippets", layout)
    with h5py.File("gzip.h5", "w") as stored:
        stored.create_dataset("snippets", data=ones, compression="gzip")
    with h5py.File("huge.h5", "w") as stored:
        stored.create_dataset("snippets", (600_000_000, 8), "f4")
    Path("empty.npy").touch()
    np.savez_compressed("bomb.npz", snippets=np.zeros((1_000_000, 8)))
    for name in ("external.h5", "link.h5", "virtual.h5", "gzip.h5", "huge.h5", "empty.npy", "bomb.npz"):
        with pytest.raises(SourceError):
            gmem_bank.read_array(Path(name))
    assert gmem_bank.insert_snippets(bank.path, gmem_bank.read_array(Path("plain.h5")), name="x").num_added == 4


def test_overwriting_a_bank_forgets_the_states_of_the_old_one(make_bank: BankMaker) -> None:
    """convert --overwrite leaves no hidden file that nobody can use."""
    bank = make_bank()
    other = make_bank("other.h5", seed=3)
    gmem_bank.remove_concept(bank.path, "class1")
    assert list(Path.cwd().glob(".undo-*"))
    gmem_bank.save(other, bank.path)
    assert not list(Path.cwd().glob(".*"))


def test_an_edit_that_fails_leaves_no_kept_state_of_its_own(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the bank, and the folder, are as before."""
    bank = make_bank()
    before = files(bank.path)

    def full(*_: object) -> None:
        raise WriteError("no space")

    monkeypatch.setattr(editing, "write", full)
    with pytest.raises(WriteError):
        gmem_bank.remove_concept(bank.path, "class1")
    assert files(bank.path) == before
    assert [path.name for path in Path.cwd().iterdir()] == [bank.path.name]


# -- found later


def test_one_banks_states_are_never_anothers(make_bank: BankMaker) -> None:
    """A bank whose name ends in another's, or holds pattern characters, keeps its own undo."""
    banks = [make_bank(name, seed=i) for i, name in enumerate(("b.safetensors", "cats.b.safetensors", "x[1]*.h5"))]
    before = [files(bank.path) for bank in banks]
    for bank in reversed(banks):
        gmem_bank.remove_concept(bank.path, "class1")
    for bank, old in zip(banks, before, strict=True):
        gmem_bank.undo(bank.path)
        assert files(bank.path) == old
    gmem_bank.remove_concept(banks[2].path, "class1")
    gmem_bank.remove_concept(banks[2].path, "class2", undo=False)
    assert not list(Path.cwd().glob(".undo-*"))


def test_hidden_files_of_others_in_a_folder_stay(make_bank: BankMaker) -> None:
    """A folder under version control keeps its .gitattributes."""
    bank = make_bank("bank.gmem")
    (bank.path / ".gitattributes").write_text("*.safetensors filter=lfs")
    (bank.path / ".segment-9.new").write_text("of a killed writer")
    gmem_bank.remove_concept(bank.path, "class1")
    assert (bank.path / ".gitattributes").exists()
    assert not (bank.path / ".segment-9.new").exists()


def test_the_right_to_read_a_bank_stays_as_it_was(make_bank: BankMaker) -> None:
    """A private bank is private after an edit."""
    bank = make_bank()
    bank.path.chmod(0o600)
    gmem_bank.interpolate(bank.path, "class0", "class1")
    assert bank.path.stat().st_mode & 0o777 == 0o600


def test_a_merge_keeps_what_duplicate_rows_belong_to(make_bank: BankMaker) -> None:
    """The row that stays belongs to the concepts of the one that does not, also where that was all of a concept."""
    first = make_bank("a.safetensors", rows=9)
    second = make_bank("b.safetensors", rows=12)
    gmem_bank.concept_of_rows(second.path, "sunsets", Selection(keys=(all_keys(second)[2], all_keys(second)[10])))
    gmem_bank.concept_of_rows(second.path, "old", Selection(keys=(all_keys(second)[4],)))
    report = gmem_bank.merge(first.path, [second.path], on_duplicate="first", output="m.safetensors")
    merged = kinds.open("m.safetensors")
    assert merged.rows_of("sunsets").tolist() == [2, 10]
    assert merged.rows_of("old").tolist() == [4]
    assert merged.rows_of("class0").tolist() == [0, 3, 6, 9]
    assert report.details["num_memberships_of_earlier_rows"] == 2
    assert gmem_bank.verify("m.safetensors").ok
    before = files(first.path)
    gmem_bank.merge(first.path, [second.path], on_duplicate="first")
    gmem_bank.undo(first.path)
    assert files(first.path) == before


def test_deleted_keys_do_not_stay_in_the_history(make_bank: BankMaker) -> None:
    """Neither as keys nor as arguments; many keys make no large header."""
    bank = make_bank(rows=20)
    keys = tuple(all_keys(bank)[3:9])
    gmem_bank.remove(bank.path, Selection(keys=keys), undo=False)
    data = bank.path.read_bytes()
    assert not any(key.encode() in data for key in keys)
    assert kinds.open(bank.path).history[-1]["arguments"]["keys"]["number"] == 6


def test_saving_an_old_view_onto_an_edited_bank_is_refused(make_bank: BankMaker) -> None:
    """An edit that came in between is not lost."""
    bank = make_bank()
    gmem_bank.remove_concept(bank.path, "class1")
    edited = files(bank.path)
    with pytest.raises(GMemError, match="open it again"):
        gmem_bank.save(bank, bank.path)
    assert files(bank.path) == edited


def test_an_insert_whose_rows_were_removed_since_is_not_done_already(photos: Path, new_photos: Path) -> None:
    """Two of eight rows removed: the same insert is refused, not called done."""
    encoder = gmem_bank.load_encoder("hog")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    report = gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder)
    assert gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder).unchanged
    gmem_bank.remove("bank.safetensors", Selection(keys=tuple(report.keys[:2])))
    with pytest.raises(ConceptExistsError):
        gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder)


def test_a_finished_insert_leaves_the_batches_of_another_alone(photos: Path, new_photos: Path) -> None:
    """An interrupted insert goes on after a repeated one of another concept, dry or not."""
    encoder = gmem_bank.load_encoder("hog")
    gmem_bank.build(photos, encoder, "bank.safetensors")
    gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder)

    def stop(done: int, total: int) -> None:
        if done > 4:
            raise KeyboardInterrupt

    hats = photos / "hat"
    with pytest.raises(KeyboardInterrupt):
        gmem_bank.insert_concept("bank.safetensors", [hats], encoder, name="x", batch_size=2, progress=stop)
    kept = sorted(path.name for path in Path(".bank.safetensors.insert").iterdir())
    for dry_run in (True, False):
        assert gmem_bank.insert_concept("bank.safetensors", [new_photos], encoder, dry_run=dry_run).unchanged
        assert sorted(path.name for path in Path(".bank.safetensors.insert").iterdir()) == kept


def test_a_bank_without_an_active_row_takes_inserts(make_bank: BankMaker) -> None:
    """There is nothing to compare with, and that is no error."""
    bank = make_bank(active=np.arange(20) < 2)
    gmem_bank.remove(bank.path, Selection(keys=tuple(all_keys(bank)[:2])))
    assert gmem_bank.insert_snippets(bank.path, np.ones((2, 8), np.float32), name="new").num_added == 2


def test_a_bank_never_differs_from_itself(make_bank: BankMaker) -> None:
    """Rows of zeros in raw space included; what was not compared is counted."""
    values = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    values[2] = 0
    bank = make_bank(snippets=values, space="raw", active=np.arange(6) != 4)
    report = gmem_bank.diff(bank.path, bank.path)
    assert report.same
    assert report.num_not_compared == 1


def test_an_old_bank_that_gains_new_things_says_its_new_version(make_bank: BankMaker) -> None:
    """1.0 becomes 1.1 by an edit, and 1.0 again by undoing it, byte for byte."""
    bank = make_bank()
    write("old.safetensors", replace(bank.header, version=(1, 0)), bank.stored.payloads())
    before = Path("old.safetensors").read_bytes()
    gmem_bank.interpolate("old.safetensors", "class0", "class1")
    assert kinds.open("old.safetensors").header.version == (1, 1)
    gmem_bank.undo("old.safetensors")
    assert Path("old.safetensors").read_bytes() == before


def test_verify_finds_factored_rows_that_cannot_be_rebuilt(make_bank: BankMaker) -> None:
    """A reconstruction without a direction, and one beyond float32: found before anything reads them."""
    bank = make_bank("good.safetensors", kind="factored")
    coefficients = np.array(bank.stored.array("0/coefficients"))
    basis, mean = np.array(bank.stored.array("basis")), np.zeros(8, np.float32)
    coefficients[7] = 0
    payloads = bank.stored.payloads() | {"0/coefficients": Payload.of(coefficients), "mean": Payload.of(mean)}
    write("zero.safetensors", bank.header, payloads)
    coefficients[7] = 3e38
    write("huge.safetensors", bank.header, payloads | {"0/coefficients": Payload.of(coefficients)})
    for name in ("zero.safetensors", "huge.safetensors"):
        assert any("row 7 cannot be rebuilt" in problem for problem in gmem_bank.verify(name).problems)
    assert len(basis) == 4


def test_nothing_is_made_for_a_bank_that_is_not_there() -> None:
    """A mistyped path leaves no folder behind, and a dry undo needs no lock."""
    for call in (lambda p: gmem_bank.remove_concept(p, "x"), gmem_bank.undo):
        with pytest.raises(FileNotFoundError):
            call("typo/bank.safetensors")
    assert not Path("typo").exists()


def test_hdf5_that_cannot_lay_out_its_file_is_a_write_error(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a full disk its library raises whatever fails first: one clear error, the bank as before, nothing left."""
    bank = make_bank("bank.h5")
    before = files(bank.path)

    def fail(*_: object) -> None:
        raise RuntimeError("Disable slist on flush dest failure failed")

    monkeypatch.setattr(hdf5_store, "_create", fail)
    with pytest.raises(WriteError, match="could not lay the file out"):
        gmem_bank.interpolate(bank.path, "class0", "class1")
    assert files(bank.path) == before
    assert [path.name for path in Path.cwd().iterdir()] == [bank.path.name]
