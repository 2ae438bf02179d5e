"""Coefficient masks, and removal with a refit: values against slow loops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import gmem_bank
from gmem_bank import kinds, thinning
from gmem_bank.bank import MemoryBank
from gmem_bank.cli import main
from gmem_bank.errors import ConfigError, CorruptError
from gmem_bank.interface import SupportsFactors
from gmem_bank.kinds import FactoredBank
from gmem_bank.selection import Selection
from gmem_bank.storage import Payload, write
from tests.conftest import BankMaker, stored_oracle
from tests.contracts import BankContract

FORMS = ["bank.safetensors", "bank.h5", "bank.gmem"]


def opened(path: object) -> FactoredBank:
    bank = kinds.open(str(path))
    assert isinstance(bank, FactoredBank)
    assert gmem_bank.verify(str(path)).problems == []
    return bank


def coefficients(bank: FactoredBank) -> np.ndarray:
    return bank.coefficients(np.arange(len(bank)))


def raw(bank: FactoredBank) -> np.ndarray:
    return coefficients(bank).astype(np.float64) @ bank.basis.astype(np.float64) + bank.mean


def files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if not file.name.startswith(".")}


# -- coefficient masks


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["factored", "sparse"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_the_largest_coefficients_stay_bit_for_bit(make_bank: BankMaker, form: str, kind: str, dtype: str) -> None:
    """All others read as zero; the size is that of the kept ones; undo is exact; the same command has nothing left to do."""
    bank = make_bank(form, kind=kind, dtype=dtype, dim=12, rank=8, parts=(13, 7))
    before, old = files(bank.path), coefficients(opened(bank.path))
    report = gmem_bank.mask_coefficients(bank.path, keep=3, allow_larger=True)
    masked = opened(bank.path)
    wanted = np.zeros_like(old)
    for row, values in enumerate(old):
        for column in sorted(range(8), key=lambda c, v=values: (-abs(v[c]), c))[:3]:
            wanted[row, column] = values[column]
    np.testing.assert_array_equal(coefficients(masked), wanted)
    for segment in ("0", "1"):
        values, index = (masked.stored.array(f"{segment}/{what}") for what in ("values", "index"))
        assert values.shape == index.shape == (13 if segment == "0" else 7, 3)
        assert (index[values == 0] == 0).all()
        assert masked.stored.dtype(f"{segment}/index") == "U16"
    assert report.details["num_kept"] == np.count_nonzero(wanted)
    assert report.details["num_coefficients"] == np.count_nonzero(old)
    np.testing.assert_allclose(masked.snippets(masked.rows()), stored_oracle(masked), atol=1e-5)
    again = files(bank.path)
    assert gmem_bank.mask_coefficients(bank.path, keep=3).unchanged
    assert gmem_bank.mask_coefficients(bank.path, keep=5).unchanged
    assert files(bank.path) == again
    gmem_bank.undo(bank.path)
    assert files(bank.path) == before


def test_energy_masks_keep_the_fewest_that_hold_it(make_bank: BankMaker) -> None:
    """Of each snippet; unused slots hold value 0 and index 0; all of the energy keeps every coefficient that is not 0."""
    bank = make_bank(kind="factored", dim=12, rank=8)
    old = coefficients(opened(bank.path))
    gmem_bank.mask_coefficients(bank.path, keep_energy=0.8, output="out.safetensors")
    masked = opened("out.safetensors")
    counts = []
    for before, after in zip(old.astype(np.float64), coefficients(masked).astype(np.float64), strict=True):
        kept = np.flatnonzero(after)
        np.testing.assert_array_equal(after[kept], before[kept])
        assert (after**2).sum() >= 0.8 * (before**2).sum() * (1 - 1e-9)
        smallest = np.abs(after[kept]).min()
        assert (after**2).sum() - smallest**2 < 0.8 * (before**2).sum()
        assert smallest >= np.delete(np.abs(before), kept).max(initial=0)
        counts.append(len(kept))
    assert masked.stored.shape("0/values") == (20, max(counts))
    assert min(counts) < max(counts)
    assert gmem_bank.mask_coefficients(bank.path, keep_energy=1.0).unchanged


def test_random_masks_follow_the_seed_and_the_share(make_bank: BankMaker) -> None:
    """The same seed gives the same bytes, another one others; about the share asked for stays, untouched."""
    bank = make_bank(kind="factored", rows=400, dim=12, rank=8, parts=(150, 250))
    old = coefficients(opened(bank.path))
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        gmem_bank.mask_coefficients(
            bank.path, keep_random=0.3, seed=seed, allow_larger=True, output=f"{name}.safetensors"
        )
    first = coefficients(opened("a.safetensors"))
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()
    assert (first != coefficients(opened("c.safetensors"))).any()
    np.testing.assert_array_equal(first[first != 0], old[first != 0])
    assert abs((first != 0).mean() - 0.3) < 0.03


@given(
    arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-8, 8, width=16)), st.data()
)
def test_masks_are_nested_and_idempotent(values: np.ndarray, data: st.DataObject) -> None:
    """Fewer are among more; masking what is masked changes nothing."""
    less = data.draw(st.integers(1, values.shape[1]))
    more = data.draw(st.integers(less, values.shape[1]))
    small, large = thinning.largest(values, less), thinning.largest(values, more)
    assert (large | ~small).all()
    kept = np.where(small, values, 0)
    np.testing.assert_array_equal(np.where(thinning.largest(kept, less), kept, 0), kept)
    share = data.draw(st.floats(0.01, 1.0))
    part = np.where(thinning.by_energy(values, share), values, 0).astype(np.float64)
    assert (np.square(part).sum(axis=1) >= share * np.square(values, dtype=np.float64).sum(axis=1) * (1 - 1e-8)).all()


def test_masks_that_cannot_be_are_refused(make_bank: BankMaker) -> None:
    """A dense bank has nothing to mask; numbers in range; one kind of mask at a time."""
    dense = make_bank("dense.safetensors")
    bank = make_bank(kind="factored")
    with pytest.raises(ConfigError, match="gmem-bank compress"):
        gmem_bank.mask_coefficients(dense.path, keep=2)
    for options in ({}, {"keep": 0}, {"keep": 1, "keep_energy": 0.5}, {"keep_energy": 0.0}, {"keep_random": 1.5},
                    {"keep_random": 0.5, "seed": -1}):  # fmt: skip
        with pytest.raises(ConfigError):
            gmem_bank.mask_coefficients(bank.path, **options)
    before = files(bank.path)
    told = gmem_bank.mask_coefficients(bank.path, keep=1, dry_run=True)
    assert told.details["num_kept"] == 20
    assert files(bank.path) == before


@pytest.mark.parametrize(("dtype", "even"), [("f32", 8), ("f16", 6), ("i8", 4)])
def test_a_mask_that_enlarges_the_bank_is_refused_unless_allowed(make_bank: BankMaker, dtype: str, even: int) -> None:
    """A kept coefficient takes two bytes more for its place; up to the break-even the bank shrinks, beyond it grows."""
    bank = make_bank(kind="factored", dtype=dtype, rows=400, dim=16, rank=12)
    before = files(bank.path)
    report = gmem_bank.mask_coefficients(bank.path, keep=even, output="even.safetensors").details
    assert report["break_even"] == even
    assert report["coefficient_bytes_after"] <= report["coefficient_bytes_before"]
    with pytest.raises(ConfigError, match=f"more than {even} of 12.*--allow-larger"):
        gmem_bank.mask_coefficients(bank.path, keep=even + 1)
    assert files(bank.path) == before
    made = gmem_bank.mask_coefficients(bank.path, keep=even + 1, allow_larger=True).details
    item = {"f32": 4, "f16": 2, "i8": 1}[dtype]
    assert made["coefficient_bytes_after"] == 400 * (even + 1) * (item + 2) > made["coefficient_bytes_before"]
    assert made["bytes_after"] > made["bytes_before"]


def test_the_command_says_what_a_larger_mask_takes(make_bank: BankMaker) -> None:
    """On stderr, with the break-even; the sweep marks such ways."""
    make_bank(kind="factored", dtype="i8", rows=400, dim=16, rank=12)
    refused = CliRunner().invoke(main, ["mask", "bank.safetensors", "--keep", "6"])
    assert refused.exit_code == 1 and "--allow-larger" in refused.output
    made = CliRunner().invoke(main, ["mask", "bank.safetensors", "--keep", "6", "--allow-larger"])
    assert made.exit_code == 0 and "no row keeps more than 4" in made.stderr
    ways = gmem_bank.sweep("bank.safetensors", ranks=[12])
    assert {(way.dtype, way.keep) for way in ways.ways if way.larger_by_mask} == {("i8", 6)}
    assert "6 *" in ways.table() and "--allow-larger" in ways.table()


def test_whole_numbers_of_any_type_are_taken_and_truths_are_not(make_bank: BankMaker) -> None:
    """NumPy's integers count, and are recorded as numbers; True and 2.0 are refused."""
    bank = make_bank(kind="factored", dim=12, rank=8)
    for bad in (True, 2.0, np.float64(2)):
        with pytest.raises(ConfigError, match="whole number"):
            gmem_bank.mask_coefficients(bank.path, keep=bad)
        with pytest.raises(ConfigError, match="rank must be 1 to 12"):
            gmem_bank.compress(bank.path, rank=bad)
    gmem_bank.mask_coefficients(bank.path, keep=np.int64(2), output="masked.safetensors")
    gmem_bank.compress(bank.path, rank=np.int64(2), output="small.safetensors")
    assert opened("masked.safetensors").history[-1]["arguments"] == {"keep": 2}
    assert opened("small.safetensors").rank == 2


def test_a_row_that_names_a_coefficient_twice_is_not_masked(make_bank: BankMaker) -> None:
    """Such a row reads as their sum; which of them to keep cannot be said."""
    bank = make_bank(kind="sparse", rank=4)
    index = np.array(bank.stored.array("0/index"))
    index[3] = index[3, 0]
    write(bank.path, bank.header, {**bank.stored.payloads(), "0/index": Payload.of(index)})
    with pytest.raises(CorruptError, match="twice in a row"):
        gmem_bank.mask_coefficients(bank.path, keep=1)


def test_the_command_masks_rows_or_coefficients_not_both(make_bank: BankMaker) -> None:
    """Options of both kinds are a usage error."""
    make_bank(kind="factored")

    def run(*arguments: str) -> object:
        return CliRunner().invoke(main, ["mask", "bank.safetensors", *arguments])

    assert run("--keep", "2", "--concept", "class0").exit_code == 2
    assert run("--keep", "2", "--keep-random", "0.5").exit_code == 2
    assert run("--keep-energy", "0").exit_code == 2
    text = run("--energy", "0.5", "--dry-run").output  # short for --keep-energy
    assert "cosine    mean" in text and "overlap" in text
    report = json.loads(run("--keep", "2", "--json").output)
    assert (report["operation"], report["details"]["num_kept"]) == ("mask", 40)
    assert "nothing to do" in run("--keep", "2").output
    assert "  bytes     " in run("--keep", "1", "-o", "one.safetensors").output
    assert "40 of 40" not in run("--concept", "class0").output
    assert len(kinds.open("bank.safetensors").rows()) == 13


# -- removal with a refit


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_a_refit_forgets_the_directions_of_removed_rows(make_bank: BankMaker, form: str, dtype: str) -> None:
    """Rows that stay read as before; what only the removed concept used is in no entry; the history tells both ways apart."""
    bank = make_bank(form, kind="factored", dtype=dtype, dim=12, rank=3, rows=60)
    new = 3 * np.eye(12, dtype=np.float32)[:4] + 0.01
    assert gmem_bank.insert_snippets(bank.path, new, name="new", grow_below=0.999).details["grown_directions"] >= 3
    grown = opened(bank.path)
    old, secret = grown.snippets(np.arange(60)), grown.snippets(grown.rows_of("new")).astype(np.float64)
    state = files(bank.path)
    gmem_bank.remove_concept(bank.path, "new")
    assert opened(bank.path).rank > 3
    assert opened(bank.path).history[-1]["basis"] == "kept"
    gmem_bank.undo(bank.path)
    report = gmem_bank.remove_concept(bank.path, "new", refit=True)
    left = opened(bank.path)
    assert left.history[-1]["basis"] == "refitted"
    assert left.history[-1]["arguments"] == {"name": "new", "refit": True}
    assert (report.details["rank_before"], report.details["rank"], left.rank) == (grown.rank, 3, 3)
    np.testing.assert_allclose(left.snippets(np.arange(60)), old, atol=0.02 if dtype == "i8" else 2e-3)
    residuals = secret - left.mean
    residuals -= residuals @ left.basis.T.astype(np.float64) @ left.basis
    assert (np.linalg.norm(residuals, axis=1) > 0.1).all(), "the removed rows can still be told from the basis"
    np.testing.assert_allclose(left.mean, raw(left).mean(axis=0), atol=0.02 if dtype == "i8" else 1e-3)
    assert not list(Path.cwd().rglob(".*refit*"))
    gmem_bank.undo(bank.path)
    assert files(bank.path) == state


def test_a_refit_of_some_rows_keeps_masks_keys_and_other_values(make_bank: BankMaker) -> None:
    """Removal by key; hidden rows stay hidden and exact; sparse coefficients are all in use again, and the report says so."""
    bank = make_bank(kind="sparse", rows=50, dim=12, rank=6, space="raw", active=np.arange(50) != 7, parts=(20, 30))
    keys = bank.keys(np.arange(50))
    before = stored_oracle(bank)
    report = gmem_bank.remove(bank.path, Selection(keys=(keys[3], keys[33])), refit=True, undo=False)
    left = opened(bank.path)
    stay = [row for row in range(50) if row not in (3, 33)]
    assert left.keys(np.arange(48)) == [keys[row] for row in stay]
    np.testing.assert_allclose(stored_oracle(left), before[stay], atol=1e-5)
    assert set(range(48)) - set(left.rows().tolist()) == {6}
    assert report.details["coefficient_mask"] == "ended"
    assert left.history[-1]["operation"] == "remove"
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".")]


def test_what_a_killed_refit_left_is_cleared(make_bank: BankMaker) -> None:
    """By the same command again, whether the kill came before or after the bank was replaced."""
    bank = make_bank(kind="factored")
    left = Path(".bank.safetensors.refit")
    for _ in range(2):
        left.mkdir()
        (left / "coefficients").write_bytes(b"some")
        gmem_bank.remove_concept(bank.path, "class0", refit=True)
        assert not left.exists()
        assert opened(bank.path).names == ("class1", "class2")


def test_only_a_factored_bank_can_be_refitted_and_a_dry_run_only_tells(make_bank: BankMaker) -> None:
    """A dense bank has no basis; the rank that would be left is said without writing."""
    dense = make_bank("dense.safetensors")
    with pytest.raises(ConfigError, match="no basis to refit"):
        gmem_bank.remove_concept(dense.path, "class0", refit=True)
    bank = make_bank(kind="factored")
    before = files(bank.path)
    told = gmem_bank.remove_concept(bank.path, "class0", refit=True, dry_run=True)
    assert told.details["basis"] == "refitted"
    assert files(bank.path) == before
    result = CliRunner().invoke(main, ["remove", "bank.safetensors", "-c", "class0", "--refit", "--no-undo", "--json"])
    assert json.loads(result.output)["details"]["rank"] == 4


@pytest.mark.parametrize(
    ("form", "dtype", "keep"), [("bank.safetensors", "f32", None), ("bank.h5", "i8", 3), ("bank.gmem", "f16", 2)]
)
class TestCompressedBanksAreBanks(BankContract):
    """What `compress` and `mask` write keeps the contract of every bank: segments, hidden rows and all."""

    @pytest.fixture
    def bank(self, make_bank: BankMaker, form: str, dtype: str, keep: int | None) -> MemoryBank:
        made = make_bank(form, rows=30, dim=10, parts=(20, 10), active=np.arange(30) != 5)
        gmem_bank.compress(made.path, rank=6, dtype=dtype)
        if keep is not None:
            gmem_bank.mask_coefficients(made.path, keep=keep, allow_larger=True)
        return opened(made.path)

    @pytest.fixture
    def expected(self, bank: MemoryBank) -> np.ndarray:
        return stored_oracle(bank)

    @pytest.fixture
    def tolerance(self) -> float:
        return 1e-6

    def test_factors_rebuild_the_snippets(self, bank: MemoryBank, expected: np.ndarray) -> None:
        """(c·B + μ)·inv_norm is the snippet."""
        assert isinstance(bank, SupportsFactors)
        rows = bank.rows()
        rebuilt = bank.coefficients(rows).astype(np.float64) @ bank.basis + bank.mean
        np.testing.assert_allclose(rebuilt * bank.inv_norms(rows)[:, None], expected[rows], atol=1e-6)
