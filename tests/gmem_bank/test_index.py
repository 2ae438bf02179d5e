"""Indexes against brute force in NumPy over the snippets as the format's words give them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank import coordinates, index_build, ops
from gmem_bank.coordinates import Coordinates
from gmem_bank.errors import ConfigError, EncoderMismatchError, MissingDependencyError
from gmem_bank.index_choice import EXACT_NUMBERS, default_lists, estimated_bytes, plan_index
from gmem_bank.selection import Selection
from tests.conftest import BankMaker, stored_oracle

KINDS = ("flat", "ivf-rabitq", "ivf-flat", "ivf-pq", "hnsw")
STORED = [
    ("dense", "f32"),
    ("dense", "f16"),
    ("dense", "bf16"),
    ("factored", "f32"),
    ("factored", "f16"),
    ("factored", "i8"),
]
STORED += [("sparse", "f32"), ("sparse", "f16"), ("sparse", "i8")]


def clustered(rows: int = 400, dim: int = 16, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((12, dim))
    return (centres[rng.integers(12, size=rows)] + 0.4 * rng.standard_normal((rows, dim))).astype(np.float32)


def cosines_of(bank: gmem_bank.MemoryBank, queries: np.ndarray) -> np.ndarray:
    """(B, N) cosines in float64; masked rows -inf."""
    rows = stored_oracle(bank)
    norms = np.linalg.norm(rows, axis=1)
    unit = np.divide(rows, norms[:, None], out=np.zeros_like(rows), where=norms[:, None] > 0)
    wide = queries.astype(np.float64)
    scores = wide / np.linalg.norm(wide, axis=1, keepdims=True) @ unit.T
    scores[:, np.setdiff1d(np.arange(len(bank)), bank.rows())] = -np.inf
    return scores


def assert_same_answers(scores: np.ndarray, rows: np.ndarray, truth: np.ndarray, tie: float = 1e-5) -> None:
    """The k best of brute force; which of rows within a tie comes first does not count."""
    best = -np.sort(-truth, axis=1)[:, : scores.shape[1]]
    np.testing.assert_allclose(scores, best, atol=tie)
    np.testing.assert_allclose(np.take_along_axis(truth, rows, 1), best, atol=tie)
    for found, own, last in zip(rows, truth, best[:, -1], strict=True):
        assert len(set(found.tolist())) == len(found)
        assert set(np.flatnonzero(own > last + tie).tolist()) <= set(found.tolist())


@pytest.mark.parametrize("space", ["raw", "unit"])
@pytest.mark.parametrize(("kind", "dtype"), STORED)
def test_compressed_search_is_dense_search(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, space: str
) -> None:
    """Every kind, type and space, over two segments and a mask, streamed in several blocks."""
    monkeypatch.setattr(coordinates, "BLOCK_BYTES", 4 * 5 * 17)
    active = np.random.default_rng(1).random(60) > 0.2
    values = clustered(60, 12)
    values[7] = values[31]
    bank = make_bank(snippets=values, kind=kind, dtype=dtype, space=space, rank=5, parts=(40, 20), active=active)
    queries = np.random.default_rng(2).standard_normal((25, 12)).astype(np.float32) * 7
    scores, rows = bank.nearest(queries, 9)
    assert_same_answers(scores, rows, cosines_of(bank, queries))
    assert active[rows].all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "i8"])
def test_compressed_search_after_the_basis_has_grown(make_bank: BankMaker, dtype: str) -> None:
    """Segments of different widths."""
    bank = make_bank(snippets=clustered(60, 12), kind="factored", dtype=dtype, rank=3)
    new = np.random.default_rng(3).standard_normal((6, 12)).astype(np.float32)
    gmem_bank.insert_snippets(bank.path, new, name="new", grow_below=0.999)
    grown = gmem_bank.open(bank.path)
    assert grown.stored.shape("basis")[0] > 3
    scores, rows = grown.nearest(new, 5)
    assert_same_answers(scores, rows, cosines_of(grown, new))


def test_coordinates_keep_every_inner_product(make_bank: BankMaker) -> None:
    """Also of a basis whose span holds the mean, of one as wide as the space, and of one that is not quite orthonormal."""
    for rank, dim in ((4, 9), (9, 9), (1, 3)):
        bank = make_bank(snippets=clustered(30, dim), kind="factored", rank=rank, space="raw")
        bank.__dict__["basis"] = (bank.basis * np.float32(1.01)).astype(np.float32)
        own = Coordinates(bank)
        assert own.dim == min(rank + 1, dim)
        queries, snippets = clustered(8, dim, seed=5), bank.snippets(bank.rows())
        wanted = (
            queries / np.linalg.norm(queries, axis=1, keepdims=True) @ snippets.T / np.linalg.norm(snippets, axis=1)
        )
        np.testing.assert_allclose(own.queries(queries) @ own.of(bank.rows()).T, wanted, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", ["dense", "factored"])
def test_an_index_that_looks_everywhere_is_brute_force(make_bank: BankMaker, kind: str, stored: str) -> None:
    """With all lists and all candidates the answers are exact, whatever the codes; the mask counts, changed after the build too."""
    bank = make_bank(snippets=clustered(), kind=stored, rank=7, space="raw")
    report = gmem_bank.build_index(bank.path, kind=kind, recall=0.5)
    assert (report.kind, report.num_rows) == (kind, 400)
    queries = clustered(30, seed=9)
    everything = {} if kind == "flat" else {"nprobe": 400 if kind == "hnsw" else report_lists(bank), "rerank": 40}
    for hidden in ([], ["class1/*"], ["class1/*", "class2/*"]):
        if hidden:
            ops.mask(bank.path, Selection(patterns=tuple(hidden)))
        opened = gmem_bank.open(bank.path)
        index = gmem_bank.open_index(opened)
        scores, rows = index.nearest(queries, 10, **everything)
        assert_same_answers(scores, rows, cosines_of(opened, queries))
    ops.unmask(bank.path)
    opened = gmem_bank.open(bank.path)
    scores, rows = gmem_bank.open_index(opened).nearest(queries, 10, **everything)
    assert_same_answers(scores, rows, cosines_of(opened, queries))


def report_lists(bank: gmem_bank.MemoryBank) -> int:
    return default_lists(len(bank))


@pytest.mark.parametrize("kind", ["ivf-rabitq", "ivf-flat", "hnsw"])
def test_the_tuned_index_reaches_its_recall_on_other_queries(make_bank: BankMaker, kind: str) -> None:
    """Recall counted by ids, on queries it was not tuned on; the table says what was measured."""
    bank = make_bank(snippets=clustered(3000, 32))
    report = gmem_bank.build_index(bank.path, kind=kind, recall=0.9)
    assert report.measured[0]["kind"] == "exact"
    assert max(line["recall"] for line in report.measured[1:]) >= 0.9
    assert all(line["queries_per_second"] > 0 for line in report.measured)
    queries = clustered(200, 32, seed=0)[:200]
    _, found = gmem_bank.open_index(bank).nearest(queries, 10)
    _, true = bank.nearest(queries, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), true.tolist(), strict=True)]) >= 0.85


def test_a_query_whose_lists_are_masked_gets_its_k_rows_all_the_same(make_bank: BankMaker) -> None:
    """Too few active rows in the lists looked into: that query is compared with every row."""
    bank = make_bank(snippets=clustered())
    gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=1, rerank=1)
    ops.mask(bank.path, Selection(keys=tuple(bank.keys(np.arange(3, 400)))))
    opened = gmem_bank.open(bank.path)
    queries = clustered(20, seed=4)
    scores, rows = gmem_bank.open_index(opened).nearest(queries, 3)
    assert_same_answers(scores, rows, cosines_of(opened, queries))


def test_equal_rows_and_k_of_all(make_bank: BankMaker) -> None:
    """All rows the same: any of them will do, once each; k may be the number of rows, not more."""
    bank = make_bank(snippets=np.ones((200, 8), np.float32))
    for kind in ("flat", "ivf-rabitq"):
        gmem_bank.build_index(bank.path, kind=kind)
        index = gmem_bank.open_index(bank)
        scores, rows = index.nearest(np.ones((1, 8), np.float32), 200)
        np.testing.assert_allclose(scores, 1, atol=1e-6)
        assert sorted(rows[0].tolist()) == list(range(200))
        with pytest.raises(ConfigError, match="k must be 1 to 200"):
            index.nearest(np.ones((1, 8), np.float32), 201)


def test_bad_queries_to_an_index(make_bank: BankMaker) -> None:
    """Dimension, zero, NaN, settings, everything masked."""
    bank = make_bank(snippets=clustered(60, 8))
    gmem_bank.build_index(bank.path, kind="ivf-flat")
    index = gmem_bank.open_index(bank)
    with pytest.raises(EncoderMismatchError, match="dimension 8"):
        index.nearest(np.ones((1, 9), np.float32), 1)
    with pytest.raises(ConfigError, match="number 1 of 2 is all zeros"):
        index.nearest(np.stack([np.ones(8), np.zeros(8)]).astype(np.float32), 1)
    for bad in (np.nan, np.inf):
        with pytest.raises(ConfigError, match="not finite"):
            index.nearest(np.full((1, 8), bad, np.float32), 1)
    for settings in ({"nprobe": 0}, {"nprobe": 99}, {"rerank": 0}):
        with pytest.raises(ConfigError, match="must be"):
            index.nearest(np.ones((1, 8), np.float32), 1, **settings)
    masked = make_bank("masked.safetensors", rows=6, active=np.zeros(6, np.bool_))
    gmem_bank.build_index(masked.path)
    for nearest in (masked.nearest, gmem_bank.open_index(masked).nearest):
        with pytest.raises(ConfigError, match=r"every row of .* is masked"):
            nearest(np.ones((1, 8), np.float32), 1)
    index = gmem_bank.open_index(bank)
    assert index.nearest(np.zeros((0, 8), np.float32), 3)[1].shape == (0, 3)


def test_the_choice() -> None:
    """Flat first, RaBitQ past a size, nothing but flat for recall 1, what fits, GPUs have their own kinds."""
    assert plan_index(50_000, 768).kind == "flat"
    assert plan_index(1_000_000, 768).kind == "ivf-rabitq"
    assert plan_index(1_000_000, 768).num_lists == 4096
    assert plan_index(1_000_000, 65).kind == "flat"
    assert plan_index(10_000_000, 65).kind == "ivf-rabitq"
    assert plan_index(10_000_000, 768, recall=1.0).kind == "flat"
    assert plan_index(50_000, 768, max_bytes=20 << 20).kind == "ivf-rabitq"
    assert plan_index(1_000_000, 768, num_gpus=1).kind == "ivf-flat"
    assert plan_index(1_000_000, 768, num_gpus=1, max_bytes=1 << 30).kind == "ivf-pq"
    assert plan_index(EXACT_NUMBERS, 1).kind == "flat"
    assert default_lists(1) == 1
    for options, words in (
        ({"kind": "ivf-rabitk"}, "Did you mean 'ivf-rabitq'"), ({"kind": ""}, "auto, flat"), ({"recall": 0.0}, "above 0"),
        ({"recall": 1.1}, "at most 1"), ({"recall": float("nan")}, "recall"), ({"max_bytes": 1000}, "raise --max-bytes"),
        ({"max_bytes": 0}, "at least 1"), ({"num_lists": 0}, "nlist must be"), ({"num_lists": 101}, "nlist must be 1 to 100"),
        ({"kind": "hnsw", "max_bytes": 1000}, "about"), ({"max_bytes": 2.5}, "max_bytes must be"), ({"num_lists": 2.5}, "nlist must be"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=words):
            plan_index(100, 16, **options)


@pytest.mark.parametrize("stored", ["dense", "factored"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_no_larger_than_allowed(make_bank: BankMaker, kind: str, stored: str) -> None:
    """Its own size is enough, less is refused, and then nothing is written. Estimates come near."""
    bank = make_bank(snippets=clustered(1200, 24), kind=stored, rank=11)
    fixed = {} if kind == "flat" else {"nprobe": 2, "rerank": 2}
    made = gmem_bank.build_index(bank.path, kind=kind, **fixed)
    place = Path(made.path)
    about = estimated_bytes(kind, 1200, made.dim, default_lists(1200), 24 if stored == "factored" else 0)
    assert abs(place.stat().st_size - about) < 0.07 * about + 4096
    place.unlink()
    spare = 256  # what is measured has more or fewer digits from one run to the next, and its text is aligned
    with pytest.raises(ConfigError, match=f"kind {kind} takes .* allowed: raise --max-bytes"):
        gmem_bank.build_index(bank.path, kind=kind, max_bytes=made.num_bytes - spare, **fixed)
    assert not place.exists()
    report = gmem_bank.build_index(bank.path, kind=kind, max_bytes=made.num_bytes + spare, **fixed)
    assert report.num_bytes == place.stat().st_size <= made.num_bytes + spare


def test_the_automatic_choice_keeps_to_its_limit(make_bank: BankMaker) -> None:
    """Down through what fits: the file is as large as allowed at most, or there is none."""
    bank, kinds = make_bank(snippets=clustered(3000, 96), space="unit"), set()
    for limit in (1_300_000, 1_224_000, 260_000, 230_000, 200_000):
        try:
            report = gmem_bank.build_index(bank.path, max_bytes=limit, recall=0.5)
        except ConfigError as error:
            assert "--max-bytes" in str(error)
            continue
        kinds.add(report.kind)
        assert Path(report.path).stat().st_size <= limit
    assert kinds == {"flat", "ivf-rabitq"}


@pytest.mark.parametrize("kind", KINDS)
def test_numbers_of_any_type_and_seeds_of_any_size(make_bank: BankMaker, kind: str) -> None:
    """NumPy's numbers are taken as Python's; what is no whole number is refused in words, and no index is written."""
    bank = make_bank(snippets=clustered(400, 8))
    lists = {"nlist": np.int64(4)} if kind.startswith("ivf") else {}
    fixed = {} if kind == "flat" else {"nprobe": np.int32(2), "rerank": np.uint8(2)}
    report = gmem_bank.build_index(
        bank.path,
        kind=kind,
        recall=np.float32(0.5),
        max_bytes=np.int64(1 << 30),
        seed=np.int64(1 << 31),
        **lists,
        **fixed,
    )
    json.dumps(report.to_json())
    index = gmem_bank.open_index(bank)
    if kind == "flat":
        return
    index.nearest(clustered(2, 8), np.int64(3), nprobe=np.int64(2), rerank=np.int64(2))
    for name, value in (("nprobe", 2.5), ("rerank", True), ("rerank", 4.5), ("rerank", 1 << 40), ("nprobe", "2")):
        with pytest.raises(ConfigError, match=f"{name}.* must be"):
            index.nearest(clustered(2, 8), 3, **{name: value})
        with pytest.raises(ConfigError, match=f"{name}.* must be"):
            gmem_bank.build_index(bank.path, kind=kind, **{name: value})
    for options in ({"seed": -1}, {"seed": 0.5}, {"max_bytes": 2.5}, {"recall": "much"}, {"recall": True}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
            gmem_bank.build_index(bank.path, kind=kind, **options)
    if lists:
        with pytest.raises(ConfigError, match="nlist must be"):
            gmem_bank.build_index(bank.path, kind=kind, nlist=2.5)
    gmem_bank.open_index(bank)


@pytest.mark.parametrize("stored", ["dense", "factored"])
def test_equal_rows_come_by_their_number_and_no_cosine_is_above_one(make_bank: BankMaker, stored: str) -> None:
    """By any index and without one."""
    values = np.tile(clustered(1, 7, seed=3), (6, 1))
    values[4:] = clustered(2, 7, seed=4)
    bank = make_bank(snippets=values, kind=stored, rank=2, space="raw")
    query = bank.snippets(np.array([0]))
    for kind in (None, "flat", "ivf-flat", "ivf-rabitq", "hnsw"):
        if kind is not None:
            gmem_bank.build_index(bank.path, kind=kind, recall=0.5, **({} if kind == "flat" else {"rerank": 6}))
        found = bank if kind is None else gmem_bank.open_index(bank)
        scores, rows = found.nearest(query, 4)
        assert rows.tolist() == [[0, 1, 2, 3]]
        assert scores.max() <= 1


def test_a_query_of_zeros_is_refused_by_a_bank_and_by_its_index(make_bank: BankMaker) -> None:
    """It has no direction."""
    bank = make_bank(snippets=clustered(20, 8))
    gmem_bank.build_index(bank.path)
    queries = np.stack([np.ones(8), np.zeros(8)]).astype(np.float32)
    for found in (bank, gmem_bank.open_index(bank)):
        with pytest.raises(ConfigError, match="number 1 of 2 is all zeros"):
            found.nearest(queries, 3)


def test_a_bank_of_zeros_is_said_so(make_bank: BankMaker) -> None:
    """And rows of zeros among others are none to measure by."""
    bank = make_bank(snippets=np.zeros((20, 8), np.float32), space="raw")
    with pytest.raises(ConfigError, match=r"none of 20 rows drawn from .* has a direction"):
        gmem_bank.build_index(bank.path, kind="ivf-flat")
    values = clustered(20, 8)
    values[::2] = 0
    some = make_bank("some.safetensors", snippets=values, space="raw")
    gmem_bank.build_index(some.path, kind="ivf-flat", recall=0.5)


def test_a_link_to_a_bank_has_the_index_of_the_bank(make_bank: BankMaker) -> None:
    """Beside the bank, once."""
    bank = make_bank("there.safetensors", snippets=clustered(20, 8))
    Path("link.safetensors").symlink_to("there.safetensors")
    gmem_bank.build_index("link.safetensors")
    assert Path("there.safetensors.index").exists()
    assert not Path("link.safetensors.index").exists()
    assert gmem_bank.find_index(gmem_bank.open("link.safetensors")) is not None
    assert gmem_bank.find_index(bank) is not None


def test_a_recall_out_of_reach_is_said_so_and_nothing_is_written(make_bank: BankMaker) -> None:
    """One list of 400 looked into does not give 0.99."""
    rng = np.random.default_rng(0)
    bank = make_bank(snippets=rng.standard_normal((1000, 32)).astype(np.float32))
    with pytest.raises(ConfigError, match=r"recall@10 of 0.99 is out of reach .* --kind flat"):
        gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=1, recall=0.99)
    assert not Path(f"{bank.path}.index").exists()
    report = gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=1, rerank=1, recall=0.99)
    assert report.settings == {"nprobe": 1, "rerank": 1}
    assert report.measured[1]["recall"] < 0.9


def test_no_faiss(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named, before anything is done."""
    bank = make_bank(rows=6)
    gmem_bank.build_index(bank.path)
    monkeypatch.setitem(sys.modules, "faiss", None)
    for work in (
        lambda: gmem_bank.build_index(bank.path),
        lambda: gmem_bank.open_index(bank),
        lambda: gmem_bank.update_index(bank.path),
    ):
        with pytest.raises(MissingDependencyError, match=r"gmem\[cpu\]"):
            work()


@pytest.mark.parametrize("rows", [1, 2, 3, 50])
@pytest.mark.parametrize("kind", ["auto", *KINDS])
def test_small_banks_have_an_index_or_are_told_why_not(make_bank: BankMaker, rows: int, kind: str) -> None:
    """Product codes need 256 rows to train on; all others take any bank."""
    bank = make_bank(snippets=clustered(rows, 8))
    if kind == "ivf-pq":
        with pytest.raises(ConfigError, match="too few rows"):
            gmem_bank.build_index(bank.path, kind=kind)
        return
    gmem_bank.build_index(bank.path, kind=kind)
    scores, found = gmem_bank.open_index(bank).nearest(bank.snippets(np.array([0])), 1)
    assert (found[0, 0], round(float(scores[0, 0]), 5)) == (0, 1)


def test_two_builds_give_the_same_answers_and_progress_ends_at_its_total(make_bank: BankMaker) -> None:
    """Seeded; the bar is full at the end."""
    bank, told = make_bank(snippets=clustered()), []
    answers = []
    for _ in range(2):
        gmem_bank.build_index(
            bank.path, kind="ivf-rabitq", nprobe=2, rerank=2, progress=lambda *step: told.append(step)
        )
        answers.append(gmem_bank.open_index(bank).nearest(clustered(9, seed=3), 5)[1])
    np.testing.assert_array_equal(*answers)
    assert told[-1][0] == told[-1][1]


def test_a_rotation_is_one() -> None:
    """Orthonormal to f32."""
    turned = index_build.random_rotation(24, 0)
    np.testing.assert_allclose(turned @ turned.T, np.eye(24), atol=1e-6)
