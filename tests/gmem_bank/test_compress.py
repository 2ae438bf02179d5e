"""Compression against an independent oracle (NumPy's SVD in float64), its goals, its resumption, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import gmem_bank
from gmem_bank import fitting, kinds, moments, segment_rows
from gmem_bank.cli import main
from gmem_bank.errors import (
    ConceptExistsError,
    ConfigError,
    CorruptError,
    EncoderMismatchError,
    LockedError,
    OutputExistsError,
)
from gmem_bank.kinds import FactoredBank
from gmem_bank.storage import Payload, atomic, write
from tests.conftest import BankMaker, stored_oracle

FORMS = ["bank.safetensors", "bank.h5", "bank.gmem"]
OUTPUTS = ["out.safetensors", "out.h5", "out.gmem"]


def spread(rows: int = 300, dim: int = 16, *, mean: float = 0.5, seed: int = 0) -> np.ndarray:
    """Rows of a falling spectrum around a mean."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, dim)) * np.geomspace(1, 0.05, dim) + mean).astype(np.float32)


def planted(values: np.ndarray, rows: int, dim: int, mean: float, seed: int = 0) -> np.ndarray:
    """Rows whose centred singular values are just these, in float64."""
    rng = np.random.default_rng(seed)
    left = rng.standard_normal((rows, len(values)))
    left = np.linalg.qr(left - left.mean(axis=0))[0]
    right = np.linalg.qr(rng.standard_normal((dim, len(values))))[0]
    return left * values @ right.T + mean * rng.standard_normal(dim)


def factored(path: str) -> FactoredBank:
    bank = kinds.open(path)
    assert isinstance(bank, FactoredBank)
    assert gmem_bank.verify(path).problems == []
    return bank


def raw(bank: FactoredBank) -> np.ndarray:
    """Raw reconstructions in float64."""
    rows = np.arange(len(bank))
    return bank.coefficients(rows).astype(np.float64) @ bank.basis.astype(np.float64) + bank.mean


def files(path: Path) -> dict[str, bytes]:
    if path.is_file():
        return {path.name: path.read_bytes()}
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if not file.name.startswith(".")}


def visible_and_hidden() -> set[str]:
    return {path.name for path in Path.cwd().iterdir()}


# -- the factorisation


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_error_of_rank_r_is_the_energy_beyond_it(make_bank: BankMaker, form: str, dtype: str) -> None:
    """Basis, mean, singular values and error are those of an SVD in float64, whatever form and type the bank has."""
    bank = make_bank(form, snippets=spread(), space="raw", dtype=dtype, parts=(120, 1, 179))
    values = stored_oracle(bank)
    keys, concepts = bank.keys(np.arange(300)), bank.names
    report = gmem_bank.compress(bank.path, rank=5)
    made = factored(str(bank.path))
    centred = values - values.mean(axis=0)
    _, sigma, right = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_allclose(made.mean, values.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(made.singular_values, sigma[:5], rtol=1e-6)
    signs = np.sign(np.take_along_axis(right[:5], np.abs(right[:5]).argmax(axis=1)[:, None], axis=1))
    np.testing.assert_allclose(made.basis, right[:5] * signs, atol=1e-5)
    error, optimum = np.linalg.norm(values - raw(made)), np.sqrt((sigma[5:] ** 2).sum())
    assert abs(error / optimum - 1) < 1e-6
    assert report.details["relative_error"] == pytest.approx(optimum / np.linalg.norm(centred), rel=1e-5)
    assert report.details["optimal_relative_error"] == pytest.approx(optimum / np.linalg.norm(centred), rel=1e-6)
    assert report.details["energy"] == pytest.approx((sigma[:5] ** 2).sum() / (sigma**2).sum(), rel=1e-6)
    assert made.keys(np.arange(300)) == keys
    assert made.names == concepts
    assert len(made.header.segments) == 3
    assert (
        report.details["bytes_after"] == made.stored.num_bytes < report.details["bytes_before"] == bank.stored.num_bytes
    )


@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("wide", [True, False])
def test_a_planted_spectrum_is_recovered(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, mean: float, wide: bool
) -> None:
    """To 1e-5 down to a hundredth of the largest, with a large mean too, by float64 and by float32 products."""
    if not wide:
        monkeypatch.setattr(fitting, "WIDE_PRODUCTS", 0)
    monkeypatch.setattr(segment_rows, "CHUNK_ROWS", 256)
    sigma = 30 * np.geomspace(1, 0.01, 12)
    values = planted(sigma, 2000, 32, mean)
    bank = make_bank(snippets=values.astype(np.float32), space="raw")
    gmem_bank.compress(bank.path, rank=12)
    tolerance = 1e-5 if mean == 0 else 3e-4  # of a mean of 100, float32 rows themselves keep 1e-5
    np.testing.assert_allclose(factored(str(bank.path)).singular_values, sigma, rtol=tolerance)
    exact = np.linalg.svd(values.astype(np.float32) - values.astype(np.float32).mean(axis=0, dtype=np.float64))[1][:12]
    np.testing.assert_allclose(factored(str(bank.path)).singular_values, exact, rtol=1e-5)


def test_what_the_rows_do_not_span_is_left_out(make_bank: BankMaker) -> None:
    """Rows of rank 3 get rank 3 whatever was asked for, constant columns cost nothing, and nothing is NaN."""
    values = planted(np.array([5.0, 3.0, 2.0]), 40, 12, 0.0).astype(np.float32)
    values = np.round(values * 64) @ np.eye(12, dtype=np.float32) / 64
    values[:, 6:] = [1, 2, 3, 0, 0, 7]
    bank = make_bank(snippets=values, space="raw")
    report = gmem_bank.compress(bank.path, rank=12)
    assert report.details["rank"] == np.linalg.matrix_rank(values - values.mean(axis=0, dtype=np.float64)) <= 6
    assert report.details["rank_asked"] == 12
    np.testing.assert_allclose(raw(factored(str(bank.path))), values, atol=1e-5)


@pytest.mark.parametrize("space", ["raw", "unit"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_tiny_banks_are_compressed_too(make_bank: BankMaker, rows: int, dtype: str, space: str) -> None:
    """One row is its mean; a few rows span one direction less; rows that are all equal span none."""
    values = spread(rows, 6)
    for name, snippets in (("some", values), ("equal", np.repeat(values[:1], rows, axis=0))):
        bank = make_bank(f"{name}.safetensors", snippets=snippets, space=space)
        report = gmem_bank.compress(bank.path, energy=1.0, dtype=dtype)
        made = factored(str(bank.path))
        assert made.rank == (max(rows - 1, 1) if name == "some" else 1)
        np.testing.assert_allclose(
            made.snippets(made.rows()), bank.snippets(bank.rows()), atol=0.02 if dtype == "i8" else 1e-3
        )
        assert np.isfinite(report.details["relative_error"])


@pytest.mark.parametrize("dtype", ["f16", "i8"])
def test_stored_types_are_off_by_half_a_step_at_most(make_bank: BankMaker, dtype: str) -> None:
    """Of i8 half a scale, where the scale of a column and segment is its largest coefficient over 127."""
    bank = make_bank(snippets=spread(), space="raw", parts=(100, 200))
    gmem_bank.compress(bank.path, rank=6, output="exact.safetensors")
    gmem_bank.compress(bank.path, rank=6, dtype=dtype, output="coarse.safetensors")
    exact, coarse = factored("exact.safetensors"), factored("coarse.safetensors")
    np.testing.assert_array_equal(exact.basis, coarse.basis)
    for segment, rows in (("0", np.arange(100)), ("1", np.arange(100, 300))):
        wanted, got = exact.coefficients(rows), coarse.coefficients(rows)
        if dtype == "i8":
            scale = coarse.stored.array(f"{segment}/scale")
            np.testing.assert_allclose(scale, np.abs(wanted).max(axis=0) / 127, rtol=1e-6)
            assert (np.abs(wanted - got) <= scale / 2 * (1 + 1e-5)).all()
        else:
            np.testing.assert_allclose(got, wanted, rtol=2**-11, atol=1e-7)


def test_the_report_says_what_was_kept(make_bank: BankMaker) -> None:
    """Cosines, overlap and the recorded percentile are those of a slow loop over the two banks."""
    bank = make_bank(snippets=spread(90), space="unit")
    report = gmem_bank.compress(bank.path, rank=3, dtype="i8", output="out.safetensors").details
    before, after = bank.snippets(bank.rows()), kinds.open("out.safetensors").snippets(np.arange(90))
    cosines = np.array([float(a @ b) for a, b in zip(before.astype(np.float64), after.astype(np.float64), strict=True)])
    for name, value in (("mean", cosines.mean()), ("p1", np.quantile(cosines, 0.01)), ("min", cosines.min())):
        assert report["cosine"][name] == pytest.approx(value, abs=1e-6)
    assert kinds.open("out.safetensors").header.extras["grow_below"] == report["grow_below"]
    assert report["grow_below"] == pytest.approx(np.quantile(cosines, 0.05), abs=1e-6)
    same = []
    for row in range(90):
        first, second = (np.argsort(-(v @ v[row]) + 9.0 * (np.arange(90) == row))[:10] for v in (before, after))
        same.append(len(set(first.tolist()) & set(second.tolist())) / 10)
    assert report["neighbour_overlap_at_10"] == pytest.approx(np.mean(same), abs=1e-3)  # near ties count as kept


@settings(max_examples=15)
@given(
    arrays(np.int8, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=st.integers(-20, 20)),
    st.sampled_from(["f32", "f16", "i8"]),
    st.data(),
)
def test_any_bank_has_the_optimal_error_at_any_rank(
    make_bank: BankMaker, whole: np.ndarray, dtype: str, data: st.DataObject
) -> None:
    """Square, wide, tall, constant, repeated and zero rows: the error is the energy beyond, but for the stored type's steps."""
    values = whole.astype(np.float32) / 4
    rank = data.draw(st.integers(1, values.shape[1]))
    bank = make_bank(snippets=values, space="raw")
    report = gmem_bank.compress(bank.path, rank=rank, dtype=dtype)
    made = factored(str(bank.path))
    centred = values - values.mean(axis=0, dtype=np.float64)
    sigma = np.linalg.svd(centred, compute_uv=False)
    coarse = {"f32": 1e-5, "f16": 2e-2, "i8": 0.05 * max(values.size, 4)}[dtype]
    assert np.linalg.norm(values - raw(made)) == pytest.approx(np.sqrt((sigma[rank:] ** 2).sum()), abs=coarse)
    assert made.rank == min(rank, max(int((sigma > 1e-6 * max(sigma.max(), 1e-30)).sum()), 1))
    assert np.isfinite(list(report.details["cosine"].values())).all()


# -- goals


def test_energy_is_met_by_the_smallest_rank(make_bank: BankMaker) -> None:
    """One component fewer holds less; all of the energy takes all directions."""
    bank = make_bank(snippets=spread(), space="raw")
    sigma = np.linalg.svd(stored_oracle(bank) - stored_oracle(bank).mean(axis=0), compute_uv=False)
    shares = np.cumsum(sigma**2) / (sigma**2).sum()
    for energy in (0.3, 0.9, 0.999, float(shares[6]), 1.0):
        report = gmem_bank.compress(bank.path, energy=energy, dry_run=True)
        assert report.details["rank"] == int(np.searchsorted(shares, energy - 1e-9)) + 1
    assert visible_and_hidden() == {"bank.safetensors"}


@pytest.mark.parametrize("dtype", ["f32", "i8"])
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_a_target_cosine_is_met_by_the_smallest_rank(make_bank: BankMaker, kind: str, dtype: str) -> None:
    """Measured on the bank that was written; one component fewer stays below."""
    bank = make_bank(snippets=spread(mean=0.0), space="raw", kind=kind, rank=14, parts=(100, 200))
    before = bank.snippets(bank.rows()).astype(np.float64)

    def reached(name: str) -> float:
        after = kinds.open(name).snippets(np.arange(300)).astype(np.float64)
        return float((np.vecdot(before, after) / np.linalg.norm(before, axis=1) / np.linalg.norm(after, axis=1)).mean())

    report = gmem_bank.compress(bank.path, target_cosine=0.98, dtype=dtype, output="out.safetensors")
    rank = report.details["rank"]
    gmem_bank.compress(bank.path, rank=rank - 1, dtype=dtype, output="less.safetensors")
    assert reached("out.safetensors") >= 0.98 - 1e-6
    assert reached("less.safetensors") < 0.98
    assert report.details["cosine"]["mean"] == pytest.approx(reached("out.safetensors"), abs=1e-6)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", ["f32", "i8"])
def test_max_bytes_is_the_size_of_the_file_and_the_largest_rank_that_fits(
    make_bank: BankMaker, output: str, dtype: str
) -> None:
    """Keys, tables and header count; the next rank would not fit."""
    bank = make_bank(snippets=spread(200, 24), space="raw")
    sizes = {}
    for rank in (7, 8):
        other = output.replace("out", f"rank{rank}")
        sizes[rank] = gmem_bank.compress(bank.path, rank=rank, dtype=dtype, output=other).details["bytes_after"]
    for limit, rank in ((sizes[8] - 200, 7), (sizes[8] + 200, 8)):
        report = gmem_bank.compress(bank.path, max_bytes=limit, dtype=dtype, output=output, dry_run=True)
        assert report.details["rank"] == rank
    report = gmem_bank.compress(bank.path, max_bytes=sizes[8] - 200, dtype=dtype, output=output)
    written = sum(map(len, files(Path(output)).values()))
    assert report.details["bytes_after"] == written <= sizes[8] - 200
    with pytest.raises(ConfigError, match=r"at rank 1 the bank takes [\d,]+"):
        gmem_bank.compress(bank.path, max_bytes=500, dtype=dtype, output=f"x{output}")


@pytest.mark.parametrize("form", FORMS)
def test_a_dry_run_knows_the_size(make_bank: BankMaker, form: str) -> None:
    """To the byte, but for the digits of one number in the header."""
    bank = make_bank(form, snippets=spread(), space="raw")
    told = gmem_bank.compress(bank.path, rank=4, dtype="i8", dry_run=True).details
    made = gmem_bank.compress(bank.path, rank=4, dtype="i8", output=form.replace("bank", "out")).details
    assert 0 <= told["bytes_after"] - made["bytes_after"] <= 128
    assert told["rank"] == made["rank"]


# -- streams, threads, kills


@pytest.mark.parametrize("kind", ["dense", "factored"])
@pytest.mark.parametrize("goal", [{"rank": 4}, {"target_cosine": 0.97, "dtype": "i8"}])
def test_resumed_is_uninterrupted_byte_for_byte(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, kind: str, goal: dict
) -> None:
    """Stopped after any call of the progress, the same command ends with the same bytes, and leaves nothing hidden."""
    monkeypatch.setattr(segment_rows, "CHUNK_ROWS", 64)
    monkeypatch.setattr(moments, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(fitting, "WIDE_PRODUCTS", 0)
    bank = make_bank(snippets=spread(500), space="raw", kind=kind, rank=8, parts=(200, 300))
    calls: list[tuple[int, int]] = []
    gmem_bank.compress(bank.path, output="whole.safetensors", progress=lambda a, b: calls.append((a, b)), **goal)
    whole = Path("whole.safetensors").read_bytes()
    resumed = 0
    for stop in range(0, len(calls), 3):
        seen: list[tuple[int, int]] = []

        def count(done: int, total: int, stop: int = stop, seen: list = seen) -> None:
            seen.append((done, total))
            if len(seen) > stop:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gmem_bank.compress(bank.path, output="out.safetensors", progress=count, **goal)
        again: list[tuple[int, int]] = []
        gmem_bank.compress(bank.path, output="out.safetensors", progress=lambda a, b, s=again: s.append((a, b)), **goal)
        resumed += again[0][0] > 0 and kind == "dense"
        assert Path("out.safetensors").read_bytes() == whole
        assert visible_and_hidden() == {"bank.safetensors", "whole.safetensors", "out.safetensors"}
        Path("out.safetensors").unlink()
    assert resumed or kind == "factored"


def test_sums_of_another_bank_are_not_taken_up(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder left by one bank is worthless for another of the same shape; so is a damaged one."""
    monkeypatch.setattr(moments, "SAVE_SECONDS", 0.0)
    first = make_bank("first.safetensors", snippets=spread(seed=1), space="raw")
    second = make_bank("second.safetensors", snippets=spread(seed=2), space="raw")
    gmem_bank.compress(second.path, rank=3, output="whole.safetensors")

    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gmem_bank.compress(first.path, rank=3, output="out.safetensors", progress=stop)
    left = list(Path.cwd().glob(".out.safetensors.compress/sums.safetensors"))
    assert len(left) == 1
    gmem_bank.compress(second.path, rank=3, output="out.safetensors")
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_bytes_do_not_depend_on_threads(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker or four; and a memory limit that leaves chunks as large changes nothing either."""
    monkeypatch.setattr(fitting, "WIDE_PRODUCTS", 0)
    monkeypatch.setattr(segment_rows, "CHUNK_ROWS", 64)
    bank = make_bank(snippets=spread(700), space="raw")
    made = []
    for number, workers in enumerate((1, 4)):
        monkeypatch.setattr(segment_rows, "MOST_WORKERS", workers)
        gmem_bank.compress(bank.path, rank=6, output=f"{number}.safetensors")
        made.append(Path(f"{number}.safetensors").read_bytes())
    gmem_bank.compress(bank.path, rank=6, output="limited.safetensors", memory_limit=10 << 20)
    assert made[0] == made[1] == Path("limited.safetensors").read_bytes()
    with pytest.raises(ConfigError, match=r"too small for 700 rows of 16 dimensions: give at least"):
        gmem_bank.compress(bank.path, rank=6, output="x.safetensors", memory_limit=1000)


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 6), st.integers(0, 2**31),
    st.sampled_from([0.0, 1e4]),
)  # fmt: skip
def test_moments_of_parts_add_up(counts: list[int], dim: int, seed: int, mean: float) -> None:
    """Partial sums of shards, each with a shift of its own, merge to those of all rows, in any order."""
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((sum(counts), dim)) + mean).astype(np.float32)
    parts, start = [], 0
    for count in counts:
        own = rows[start : start + count]
        sums = moments.RunningSums(dim)
        sums.add(moments.sum_chunk(own.copy(), wide=True))
        parts.append(sums.moments())
        start += count
    wide = rows.astype(np.float64)
    centred = wide - wide.mean(axis=0)
    for order in (parts, parts[::-1]):
        found = moments.no_rows(dim)
        for part in order:
            found = found.merged(part)
        assert found.count == len(rows)
        np.testing.assert_allclose(found.mean, wide.mean(axis=0), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(found.scatter, centred.T @ centred, atol=1e-9 * len(rows) * (1 + mean * 1e-3))


# -- several banks, factored banks, masks


def test_several_banks_become_the_one_that_their_merged_rows_make(make_bank: BankMaker) -> None:
    """Dense and factored ones together; keys in order, histories named; a new name is asked for."""
    first = make_bank("a.safetensors", snippets=spread(seed=1), space="raw")
    second = make_bank("b.h5", snippets=spread(seed=2, mean=2.0), space="raw", prefix="b/", active=np.arange(300) != 4)
    third = make_bank("c.gmem", snippets=spread(seed=3), space="raw", prefix="c/", kind="factored", rank=16)
    gmem_bank.compress([first.path, second.path, third.path], rank=6, output="out.safetensors")
    made = factored("out.safetensors")
    values = np.concatenate([stored_oracle(bank) for bank in (first, second, third)])
    sigma = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    np.testing.assert_allclose(made.singular_values, sigma[:6], rtol=1e-5)
    assert np.linalg.norm(values - raw(_shown(made))) == pytest.approx(np.sqrt((sigma[6:] ** 2).sum()), rel=1e-5)
    assert made.keys(np.arange(900))[300:302] == second.keys(np.arange(2))
    assert set(range(900)) - set(made.rows().tolist()) == {304}
    with pytest.raises(ConfigError, match="-o"):
        gmem_bank.compress([first.path, second.path], rank=6)
    with pytest.raises(ConceptExistsError):
        gmem_bank.compress([first.path, first.path], rank=6, output="x.safetensors")
    other = make_bank("d.safetensors", snippets=spread(), space="raw", prefix="d/", encoder="another")
    with pytest.raises(EncoderMismatchError):
        gmem_bank.compress([first.path, other.path], rank=6, output="x.safetensors")


def _shown(bank: FactoredBank) -> FactoredBank:
    """The bank with no row masked."""
    gmem_bank.unmask(bank.path, output="shown.safetensors")
    return factored("shown.safetensors")


def test_masked_rows_count_and_stay_readable(make_bank: BankMaker) -> None:
    """A mask can be taken back: hidden rows are fitted like others, stay hidden, and read as well once they are shown."""
    bank = make_bank(snippets=spread(), space="raw", active=np.arange(300) >= 150)
    gmem_bank.compress(bank.path, rank=16, output="out.safetensors")
    made = factored("out.safetensors")
    assert made.rows().tolist() == list(range(150, 300))
    np.testing.assert_allclose(raw(_shown(made)), stored_oracle(bank), atol=1e-5)


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_truncating_a_factored_bank_is_optimal_among_what_it_holds(make_bank: BankMaker, dtype: str) -> None:
    """Compressing anew equals an SVD of what the bank reads as: the best of that rank, sparse or grown rows included."""
    bank = make_bank(snippets=spread(), space="raw", kind="sparse", dtype=dtype, rank=10, parts=(200, 100))
    new = np.random.default_rng(5).standard_normal((7, 16)).astype(np.float32)
    gmem_bank.insert_snippets(bank.path, new, name="new", grow_below=0.999, report=False)
    values = raw(factored(str(bank.path)))
    gmem_bank.compress(bank.path, rank=4)
    sigma = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    made = factored(str(bank.path))
    np.testing.assert_allclose(made.singular_values, sigma[:4], rtol=1e-5)
    assert np.linalg.norm(values - raw(made)) == pytest.approx(np.sqrt((sigma[4:] ** 2).sum()), rel=1e-5)


def test_a_grown_concept_survives_truncation_by_its_energy(make_bank: BankMaker) -> None:
    """Rows orthogonal to the basis: projection keeps nothing, growth all of them; old bytes stay; truncation orders by energy."""
    rng = np.random.default_rng(0)
    frame = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    old = rng.standard_normal((400, 6)) * [9, 8, 7, 1, 0.9, 0.8] @ frame[:6]
    bank = make_bank(snippets=old.astype(np.float32), space="raw")
    gmem_bank.compress(bank.path, rank=6)
    before = factored(str(bank.path))
    hashes = {name: value for name, value in before.header.hashes.items() if name.startswith("0/")}
    new = (rng.standard_normal((100, 3)) * [60, 50, 40] @ frame[10:13]).astype(np.float32)
    report = gmem_bank.insert_snippets(bank.path, new, name="new", grow_below=0.999, report=False).details
    assert report["grown_directions"] == 3
    assert max(map(abs, report["cosines_by_projection"])) < 0.05
    assert min(report["cosines"]) >= 0.999
    assert len(report["cosines"]) == 100
    assert report["cosine"]["median"] >= 0.999 > 0.05 > report["cosine_by_projection"]["median"]
    grown = factored(str(bank.path))
    assert {name: value for name, value in grown.header.hashes.items() if name.startswith("0/")} == hashes
    values = np.concatenate([old, new])
    sigma = np.linalg.svd(values - values.mean(axis=0), compute_uv=False)
    gmem_bank.compress(bank.path, rank=6)
    cut = factored(str(bank.path))
    np.testing.assert_allclose(cut.singular_values, sigma[:6], rtol=1e-4)
    kept = cut.snippets(np.arange(400, 500))
    cosines = np.vecdot(kept, new) / np.linalg.norm(kept, axis=1) / np.linalg.norm(new, axis=1)
    assert cosines.min() > 0.99, "the concept has more energy than the last old directions"


def test_insertion_asks_what_the_bank_recorded(make_bank: BankMaker) -> None:
    """Without --grow-below new rows must reach the 5th percentile of the bank's own cosines."""
    bank = make_bank(snippets=spread(mean=0.0), space="raw")
    recorded = gmem_bank.compress(bank.path, rank=8).details["grow_below"]
    new = np.random.default_rng(1).standard_normal((3, 16)).astype(np.float32)
    report = gmem_bank.insert_snippets(bank.path, new, name="new", report=False)
    assert report.details["grow_below"] == recorded < 0.999
    assert min(report.details["cosines"]) >= recorded - 1e-6


# -- as an edit


@pytest.mark.parametrize("form", FORMS)
def test_compressing_in_place_can_be_undone_and_is_done_once(make_bank: BankMaker, form: str) -> None:
    """Undo gives the dense bank back byte for byte; the same command again has nothing to do; the history names the rank."""
    bank = make_bank(form, snippets=spread(), space="unit")
    before = files(bank.path)
    report = gmem_bank.compress(bank.path, rank=5, dtype="f16")
    assert kinds.open(bank.path).history[-1]["rank"] == 5
    assert kinds.open(bank.path).history[-1]["arguments"] == {"rank": 5, "dtype": "f16"}
    after = files(bank.path)
    again = gmem_bank.compress(bank.path, rank=5, dtype="f16")
    assert again.unchanged and files(bank.path) == after
    assert again.fingerprint == report.fingerprint
    gmem_bank.undo(bank.path)
    assert files(bank.path) == before
    assert not list(Path.cwd().rglob(".*"))
    gmem_bank.compress(bank.path, rank=5, output="out.safetensors")
    assert gmem_bank.compress(bank.path, rank=5, output="out.safetensors").unchanged
    with pytest.raises(OutputExistsError):
        gmem_bank.compress(bank.path, rank=6, output="out.safetensors")


def test_a_bank_that_is_being_edited_is_left_alone(make_bank: BankMaker) -> None:
    """The lock of the file to be written is held for the whole command."""
    bank = make_bank(snippets=spread(), space="raw")
    before = files(bank.path)
    with atomic.locked(bank.path), pytest.raises(LockedError):
        gmem_bank.compress(bank.path, rank=3)
    assert files(bank.path) == before


@pytest.mark.parametrize(
    ("goal", "message"),
    [
        ({}, "none was given"),
        ({"rank": 3, "energy": 0.5}, "got rank, energy"),
        ({"rank": 0}, "rank must be 1 to 16"),
        ({"rank": 17}, "rank must be 1 to 16"),
        ({"rank": 3.5}, "rank must be 1 to 16"),
        ({"energy": 0.0}, "energy must be above 0"),
        ({"energy": 1.5}, "energy must be above 0"),
        ({"energy": float("nan")}, "energy must be above 0"),
        ({"target_cosine": 1.0}, "between 0 and 1"),
        (
            {"target_cosine": 0.9999999, "dtype": "i8"},
            r"cannot be reached with i8 coefficients: the best is 0\.\d+, at rank",
        ),
        ({"max_bytes": 0}, "at least 1"),
        ({"rank": 3, "dtype": "bf16"}, "dtype must be f32, f16, i8"),
    ],
)
def test_goals_that_cannot_be_are_refused(make_bank: BankMaker, goal: dict, message: str) -> None:
    """With what can be; the bank stands, and nothing is left beside it."""
    bank = make_bank(snippets=spread(), space="raw")
    before = files(bank.path)
    with pytest.raises(ConfigError, match=message):
        gmem_bank.compress(bank.path, **goal)
    assert files(bank.path) == before
    assert visible_and_hidden() == {"bank.safetensors"}


def test_rows_that_are_not_finite_are_named(make_bank: BankMaker) -> None:
    """NaN and infinity, found in the first pass."""
    for bad in (np.nan, np.inf):
        bank, values = make_bank(snippets=spread(), space="raw"), spread()
        values[217, 3] = bad
        write(bank.path, bank.header, {**bank.stored.payloads(), "0/snippets": Payload.of(values)})
        with pytest.raises(CorruptError, match="row 217 is not finite") as caught:
            gmem_bank.compress(bank.path, rank=3)
        assert caught.value.row == 217
        assert visible_and_hidden() == {"bank.safetensors"}


def test_nothing_is_made_from_a_damaged_bank(make_bank: BankMaker) -> None:
    """A flipped bit in the snippets is found before the bank is replaced, read as float32 or widened."""
    for dtype in ("f32", "f16"):
        bank = make_bank(snippets=spread(), space="raw", dtype=dtype)
        data = bytearray(bank.path.read_bytes())
        place = bank.stored.place("0/snippets")
        data[place.begin + 1001] ^= 1
        bank.path.write_bytes(data)
        with pytest.raises(CorruptError, match="does not match its hash"):
            gmem_bank.compress(bank.path, rank=3)
        assert bank.path.read_bytes() == data
        assert visible_and_hidden() == {"bank.safetensors"}


def test_extreme_values_are_no_trouble(make_bank: BankMaker) -> None:
    """Snippets so small or large that float32 does not hold their squares well are summed in float64."""
    wild = make_bank("wild.safetensors", snippets=spread() * np.float32(1e6), space="raw")
    with pytest.raises(ConfigError, match="65504"):
        gmem_bank.compress(wild.path, rank=4, dtype="f16")
    assert visible_and_hidden() == {"wild.safetensors"}
    for factor in (1e-11, 1e15):
        values = (spread() * np.float32(factor)).astype(np.float32)
        bank = make_bank(snippets=values, space="raw")
        gmem_bank.compress(bank.path, rank=16, output="out.safetensors")
        np.testing.assert_allclose(raw(factored("out.safetensors")) / factor, values / factor, atol=1e-4)
        Path("out.safetensors").unlink()


@pytest.mark.parametrize("seed", [1, 2])
def test_no_energy_is_beyond_all_of_it(make_bank: BankMaker, seed: int) -> None:
    """A share is at most 1, whatever float32 rounding makes of the sums."""
    bank = make_bank(snippets=spread(seed=seed), space="raw")
    for dry_run in (True, False):
        assert 1 - 1e-7 < gmem_bank.compress(bank.path, rank=16, dry_run=dry_run).details["energy"] <= 1


# -- the sweep, and the command


def test_a_sweep_says_what_compressing_would_give(make_bank: BankMaker) -> None:
    """Its figures are those of the banks that are then made; without a bank being written."""
    bank = make_bank(snippets=spread(150), space="unit")
    found = gmem_bank.sweep(bank.path, ranks=[4, 8])
    assert visible_and_hidden() == {"bank.safetensors"}
    assert {(way.rank, way.dtype, way.keep) for way in found.ways} == {
        *((4, dtype, None) for dtype in ("f32", "f16", "i8")),
        *((8, dtype, keep) for dtype in ("f32", "f16", "i8") for keep in (None, 4)),
    }
    for number, way in enumerate(found.ways):
        name = f"{number}.safetensors"
        report = gmem_bank.compress(bank.path, rank=way.rank, dtype=way.dtype, output=name).details
        if way.keep is not None:
            gmem_bank.mask_coefficients(name, keep=way.keep, allow_larger=True)
            assert kinds.open(name).stored.num_bytes == pytest.approx(way.bytes, abs=600)  # a longer history
            continue
        assert way.bytes == pytest.approx(report["bytes_after"], abs=128)
        assert way.energy == pytest.approx(report["energy"], abs=1e-6)
        assert way.cosine["mean"] == pytest.approx(report["cosine"]["mean"], abs=1e-6)
        assert way.neighbour_overlap_at_10 == pytest.approx(report["neighbour_overlap_at_10"], abs=0.01)
    assert len(found.table().splitlines()) == 2 + 1 + len(found.ways) + 1  # the last one says what * means
    assert found.rank == bank.dim
    assert gmem_bank.sweep("3.safetensors", ranks=[2]).rank == 8


def test_a_sweep_of_equal_rows_leaves_nothing_out(make_bank: BankMaker) -> None:
    """All is in the mean: the energy is that which compressing reports, 1, and not 0 of nothing."""
    for rows in (1, 20):
        bank = make_bank(f"{rows}.safetensors", snippets=np.repeat(spread(1, 8), rows, axis=0))
        ways = gmem_bank.sweep(bank.path).ways
        made = gmem_bank.compress(bank.path, rank=4, output="out.safetensors").details
        assert {(way.rank, way.energy) for way in ways} == {(made["rank"], made["energy"])} == {(1, 1.0)}
        Path("out.safetensors").unlink()


def test_neighbours_know_the_concept_where_concepts_are_apart(make_bank: BankMaker) -> None:
    """Leave-one-out 10-NN: 1 for separate clusters, chance for rows that do not know; compression to rank 2 keeps clusters."""
    rng = np.random.default_rng(0)
    centres = np.eye(8)[:3] * 10
    values = (np.tile(centres, (40, 1)) + 0.1 * rng.standard_normal((120, 8))).astype(np.float32)
    bank = make_bank(snippets=values, space="raw")  # row r has concept r % 3
    found = gmem_bank.sweep(bank.path, ranks=[1, 2])
    assert found.knn_accuracy == 1.0
    accuracy = {way.rank: way.knn_accuracy for way in found.ways if way.dtype == "f32"}
    assert accuracy[2] == 1.0
    noise = make_bank("noise.safetensors", snippets=rng.standard_normal((300, 8)).astype(np.float32), space="raw")
    assert 0.2 < gmem_bank.sweep(noise.path, ranks=[8]).knn_accuracy < 0.5


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_compresses_sweeps_and_draws(make_bank: BankMaker) -> None:
    """Text and JSON; sizes with units; the spectrum as a page; options that do not go together are usage errors."""
    make_bank(snippets=spread(), space="unit")
    report = json.loads(run("compress", "--rank", "4", "--dtype", "i8", "-o", "out.safetensors", "--json", "-q"))
    assert report["details"]["rank"] == 4
    text = run("compress", "--max-bytes", "20K", "--plot", "spectrum.html", "-q", "-o", "small.safetensors")
    assert "coefficients" in text and "overlap" in text
    assert Path("small.safetensors").stat().st_size <= 20 * 1024
    assert b"singular value" in Path("spectrum.html").read_bytes()
    assert "exists" in run("compress", "--rank", "3", "--plot", "spectrum.html", "-q", code=1)
    assert "knn" in run("compress", "--sweep", "-q", "--plot", "before.html")
    ways = json.loads(run("compress", "--sweep", "--json", "-q"))["ways"]
    assert {way["rank"] for way in ways} == {8, 16}
    own = json.loads(run("compress", "--sweep", "--dtype", "i8", "--json", "-q"))["ways"]
    assert own == [way for way in ways if way["dtype"] == "i8"] != []
    for more in (["--rank", "4"], ["--dry-run"], ["--no-undo"]):
        run("compress", "--sweep", *more, code=2)
    run("compress", "--max-bytes", "many", code=2)
    assert "exactly one" in run("compress", "-q", code=2)
    assert "factored" in run("info", "out.safetensors")
    assert "rank 4" in run("compress", "--rank", "4", "-q")


def test_a_bank_that_grows_by_compressing_is_said_to(make_bank: BankMaker) -> None:
    """An i8 bank written as f32 is larger than before, and one of lower rank is not."""
    make_bank(snippets=spread(300), space="unit")
    run("compress", "--rank", "16", "--dtype", "i8", "-o", "small.safetensors", "-q")
    assert "more room than before" in run(
        "compress", "small.safetensors", "--rank", "16", "-o", "large.safetensors", "-q"
    )
    assert "more room" not in run(
        "compress", "small.safetensors", "--rank", "4", "--dtype", "i8", "-o", "x.safetensors", "-q"
    )


@pytest.mark.parametrize("sizes", [(200, 200), (300, 50), (50, 300), (40, 60, 80)])
@pytest.mark.parametrize("suffix", ["safetensors", "h5", "gmem"])
def test_dense_banks_together_keep_each_row_under_its_key(sizes: tuple[int, ...], suffix: str) -> None:
    """Each of several f32 banks is read from its own file: at full rank every key has its own vector."""
    values = {}
    for number, size in enumerate(sizes):
        rng = np.random.default_rng(number)
        own = rng.standard_normal((size, 32)).astype(np.float32) * (number + 1)
        np.savez(f"v{number}.npz", snippets=own, keys=np.array([f"{number}/{row}" for row in range(size)]))
        gmem_bank.build_precomputed(gmem_bank.read_array(Path(f"v{number}.npz")), f"{number}.{suffix}", space="raw")
        values |= {f"{number}/{row}": vector for row, vector in enumerate(own)}
    names = [f"{number}.{suffix}" for number in range(len(sizes))]
    gmem_bank.compress(names, rank=32, output=f"all.{suffix}")
    bank = gmem_bank.open(f"all.{suffix}")
    keys = bank.keys(bank.rows())
    assert len(keys) == sum(sizes)
    np.testing.assert_allclose(bank.snippets(bank.rows()), np.stack([values[key] for key in keys]), atol=1e-4)
