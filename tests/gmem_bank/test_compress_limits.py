"""How exact compression is where float32 is not enough, and what its passes do when they are stopped, side by side or misled."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import threadpoolctl

import gmem_bank
from gmem_bank import compression, kinds, moments, quality, segment_rows, summing
from gmem_bank.errors import CorruptError
from gmem_bank.kinds import FactoredBank
from gmem_bank.threads import in_order, one_thread_a_product
from tests.conftest import BankMaker


def factored(path: str) -> FactoredBank:
    bank = kinds.open(path)
    assert isinstance(bank, FactoredBank)
    assert gmem_bank.verify(path).problems == []
    return bank


def error_over_optimum(values: np.ndarray, bank: FactoredBank) -> float:
    """In float64, by NumPy's SVD, for the rank that the bank has."""
    wide = values.astype(np.float64)
    sigma = np.linalg.svd(wide - wide.mean(axis=0), compute_uv=False)
    raw = bank.coefficients(np.arange(len(bank))).astype(np.float64) @ bank.basis.astype(np.float64) + bank.mean
    return float(np.linalg.norm(wide - raw) / np.sqrt((sigma[bank.rank :] ** 2).sum()))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in float32, as those of large banks."""
    monkeypatch.setattr(summing, "WIDE_PRODUCTS", 0)
    monkeypatch.setattr(segment_rows, "CHUNK_ROWS", 256)


# -- float32


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("amp", [10.0, 30.0, 100.0])
@pytest.mark.parametrize("num_first", [256, 200], ids=["a chunk", "part of a chunk"])
def test_a_class_that_stands_apart_costs_no_exactness(make_bank: BankMaker, amp: float, num_first: int) -> None:
    """Banks are sorted by key, so by class: the first rows may be far from all others."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3000, 64)) * np.geomspace(1, 0.1, 64)
    values[:num_first] += amp * rng.standard_normal(64)
    values = values.astype(np.float32)
    bank = make_bank(snippets=values, space="raw")
    report = gmem_bank.compress(bank.path, rank=32)
    # float32 coefficients of the far rows keep a share of amp that is not the basis's
    assert error_over_optimum(values, factored(str(bank.path))) < 1 + 1e-6 + (2e-7 * amp) ** 2
    assert report.details["warnings"] == []


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("per_class", [1000, 150, 40])
def test_sorted_classes_cost_no_exactness(make_bank: BankMaker, per_class: int) -> None:
    """Classes far apart, one after the other, larger and smaller than a chunk."""
    rng = np.random.default_rng(1)
    centres = 100 * rng.standard_normal((3000 // per_class + 1, 96))
    values = rng.standard_normal((3000, 96)) * np.geomspace(1, 0.1, 96) + centres[np.arange(3000) // per_class]
    values = values.astype(np.float32)
    bank = make_bank(snippets=values, space="raw")
    rank = 48 if per_class > 100 else 84
    gmem_bank.compress(bank.path, rank=rank)
    assert error_over_optimum(values, factored(str(bank.path))) < 1 + 2e-4  # float32 coefficients of 1,000 and more


@pytest.mark.usefixtures("narrow")
def test_what_float32_products_cannot_tell_is_left_out(make_bank: BankMaker) -> None:
    """Rows of rank 10 have rank 10, whatever rank or energy is asked for; the report says where energy lies beyond."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((2000, 10)) @ rng.standard_normal((10, 64))).astype(np.float32)
    bank = make_bank(snippets=values, space="raw")
    assert gmem_bank.compress(bank.path, rank=40, output="rank.safetensors").details["rank"] == 10
    report = gmem_bank.compress(bank.path, energy=1.0, output="energy.safetensors").details
    assert report["rank"] == 10
    assert "beyond what float32 sums tell" in report["warnings"][0]
    assert gmem_bank.compress(bank.path, energy=0.9, dry_run=True).details["warnings"] == []
    sums = moments.RunningSums(64)
    for start in range(0, 2000, 250):
        sums.add(moments.sum_chunk(values[start : start + 250].copy(), wide=False))
    wide = values.astype(np.float64) - values.mean(axis=0, dtype=np.float64)
    assert np.linalg.norm(sums.scatter - wide.T @ wide, 2) < sums.rounding < 1e-6 * np.linalg.norm(wide, 2) ** 2


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("rank", [4, 20, 32])
def test_energy_is_that_of_what_was_written(make_bank: BankMaker, rank: int) -> None:
    """Of the coefficients, over that of the centred rows, in float64; the error too."""
    rng = np.random.default_rng(3)
    values = (rng.standard_normal((1500, 32)) * np.geomspace(1, 1e-3, 32) + 5).astype(np.float32)
    bank = make_bank(snippets=values, space="raw")
    report = gmem_bank.compress(bank.path, rank=rank).details
    made, wide = factored(str(bank.path)), values.astype(np.float64)
    centred = wide - wide.mean(axis=0)
    kept = made.coefficients(np.arange(1500)).astype(np.float64)
    raw = kept @ made.basis.astype(np.float64) + made.mean
    assert report["energy"] == pytest.approx((kept**2).sum() / (centred**2).sum(), rel=1e-6)
    assert report["relative_error"] == pytest.approx(
        np.linalg.norm(wide - raw) / np.linalg.norm(centred), rel=1e-3, abs=1e-6
    )
    assert report["optimum_known_to"] < 1e-2


def test_an_error_beyond_the_optimum_is_said(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A basis that is not the best, and i8 steps, are told apart."""
    values = (np.random.default_rng(0).standard_normal((500, 16)) * np.geomspace(1, 0.05, 16)).astype(np.float32)
    bank = make_bank(snippets=values, space="raw")
    assert gmem_bank.compress(bank.path, rank=6, output="a.safetensors").details["warnings"] == []
    assert "i8 coefficients raise" in gmem_bank.compress(
        bank.path, rank=15, dtype="i8", output="b.safetensors"
    ).details["warnings"][0]  # fmt: skip
    found = moments.principal

    def worse(*arguments: object) -> moments.Directions:
        good = found(*arguments)  # type: ignore[arg-type]
        return moments.Directions(basis=np.roll(good.basis, 1, axis=1), energies=good.energies)

    monkeypatch.setattr("gmem_bank.compression.principal", worse)
    text = gmem_bank.compress(bank.path, rank=6, output="c.safetensors").details["warnings"][0]
    assert "the basis leaves a relative error of" in text


# -- stopped and taken up


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_bytes_that_changed_between_two_passes_are_not_taken_up(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """A float flipped while sums were taken, and restored before the command goes on: the bank is that of the right bytes."""
    monkeypatch.setattr(segment_rows, "CHUNK_ROWS", 64)
    monkeypatch.setattr(moments, "SAVE_SECONDS", 0.0)
    values = np.random.default_rng(0).standard_normal((500, 16)).astype(np.float32)
    bank = make_bank(snippets=values, space="raw", dtype=dtype)
    gmem_bank.compress(bank.path, rank=4, output="whole.safetensors")
    right = bank.path.read_bytes()
    for stop in (200, 500):
        wrong = bytearray(right)
        wrong[bank.stored.place("0/snippets").begin + 1] ^= 64
        bank.path.write_bytes(wrong)

        def interrupt(done: int, total: int, stop: int = stop) -> None:
            if done >= stop:
                raise KeyboardInterrupt

        with pytest.raises((KeyboardInterrupt, CorruptError)):
            gmem_bank.compress(bank.path, rank=4, output="out.safetensors", progress=interrupt)
        assert Path(".out.safetensors.compress/sums.safetensors").exists() == (stop == 200)
        bank.path.write_bytes(right)
        gmem_bank.compress(bank.path, rank=4, output="out.safetensors")
        assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
        Path("out.safetensors").unlink()


@pytest.mark.parametrize(("dim", "rows"), [(16, 500), (7, 2501)])
@pytest.mark.parametrize("restored", [False, True])
def test_what_changes_between_hashing_and_projecting_is_noticed(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, dim: int, rows: int, restored: bool
) -> None:
    """The second pass compares what it reads with what was hashed, by sums, any byte of it; nothing is written."""
    values = np.random.default_rng(0).standard_normal((rows, dim)).astype(np.float32)
    bank = make_bank(snippets=values, space="raw")
    right, place, find = bank.path.read_bytes(), bank.stored.place("0/snippets"), moments.principal
    check = segment_rows.SegmentRows._require_hash

    def put(data: bytes) -> None:
        with bank.path.open("r+b") as stream:  # in place: what holds the file open sees it
            stream.write(data)

    def change(*arguments: object) -> moments.Directions:
        wrong = bytearray(right)
        wrong[places.pop()] ^= 1
        put(wrong)
        return find(*arguments)

    def late(own: segment_rows.SegmentRows) -> None:
        if restored:
            put(right)
        check(own)

    monkeypatch.setattr(compression, "principal", change)
    monkeypatch.setattr(segment_rows.SegmentRows, "_require_hash", late)
    places = [place.begin, place.end - 1]
    while places:
        with pytest.raises(CorruptError, match="changed while" if restored else "does not match its hash"):
            gmem_bank.compress(bank.path, rank=4, output="out.safetensors")
        put(right)
        assert not Path("out.safetensors").exists()


def test_damaged_sums_are_taken_anew(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any byte of the sums' file that changes, and sums of another shape."""
    monkeypatch.setattr(moments, "SAVE_SECONDS", 0.0)
    folder = Path("sums")
    sums = moments.RunningSums(4)
    sums.add(moments.sum_chunk(np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32), wide=True))
    store = moments.SumStore(folder, {"banks": ["x"]})
    store.save(sums, 1, "digest", final=True)
    loaded = store.load(4)
    assert loaded is not None
    assert (loaded[0].count, loaded[1:]) == (9, (1, "digest"))
    np.testing.assert_array_equal(loaded[0].scatter, sums.scatter)
    assert store.load(5) is None
    file = folder / "sums.safetensors"
    data = file.read_bytes()
    for place in range(len(data) - 20 * 8, len(data), 7):
        wrong = bytearray(data)
        wrong[place] ^= 1
        file.write_bytes(wrong)
        assert store.load(4) is None


def test_a_plot_is_drawn_of_a_bank_that_is_there_already(make_bank: BankMaker) -> None:
    """A kill may have come between the bank and the picture; the report has every field that one of a new bank has."""
    values = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
    bank = make_bank(snippets=values, space="raw")
    first = gmem_bank.compress(bank.path, rank=5, output="out.safetensors")
    again = gmem_bank.compress(bank.path, rank=5, output="out.safetensors", plot="spectrum.html")
    assert again.unchanged
    assert b"singular value" in Path("spectrum.html").read_bytes()
    drawn = Path("spectrum.html").read_bytes()
    assert gmem_bank.compress(bank.path, rank=5, output="out.safetensors", plot="spectrum.html").unchanged
    assert Path("spectrum.html").read_bytes() == drawn
    assert set(again.details) == set(first.details)
    for name in ("rank", "rank_asked", "dtype", "bytes_before", "bytes_after", "grow_below"):
        assert again.details[name] == first.details[name]
    json.dumps(again.to_json())


# -- threads


def blas_threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"}


def test_the_limit_of_threads_holds_for_all_callers_and_ends_with_the_last() -> None:
    """Several at a time, in an order in which the first to come is the first to go."""
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        first, second = one_thread_a_product(), one_thread_a_product()
        first.__enter__()
        second.__enter__()
        assert blas_threads() == {1}
        first.__exit__(None, None, None)
        assert blas_threads() == {1}, "another caller is still within"
        second.__exit__(None, None, None)
        assert blas_threads() == before


def test_the_limit_ends_where_a_consumer_raises(make_bank: BankMaker) -> None:
    """Of the stream of results, though its error keeps the frame alive."""
    bank = make_bank(snippets=np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32), space="raw")
    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        before = blas_threads()

        def interrupt(done: int, total: int) -> None:
            if done:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught:
            gmem_bank.compress(bank.path, rank=2, progress=interrupt)
        assert caught.traceback
        assert blas_threads() == before
        results = in_order(2, lambda item: item, range(100))
        next(results)
        assert blas_threads() == {1}
        results.close()
        assert blas_threads() == before


# -- neighbours


def test_equal_neighbours_count_as_kept() -> None:
    """Which of equal rows come first is chance: rows in groups of equal ones keep all neighbours under any rounding."""
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.standard_normal((12, 24)), 25, axis=0)
    before = rows.astype(np.float32)
    after = (rows * (1 + 1e-8 * rng.standard_normal(rows.shape))).astype(np.float32) * np.float32(1.7)
    assert quality.overlap(before, after) == 1.0
    other = rng.standard_normal(rows.shape).astype(np.float32)
    assert quality.overlap(before, other) < 0.3
