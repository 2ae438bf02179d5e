"""What an index proposes under a mask, in how much memory, and how it is compared."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import gmem_bank
from gmem_bank import index_candidates, index_tuning, indexed, ops
from gmem_bank.coordinates import Coordinates
from gmem_bank.index_choice import GPU_CODE_BYTES, default_lists, plan_index
from gmem_bank.index_file import index_path, read_index
from gmem_bank.index_tuning import Truth, tune
from gmem_bank.indexed import BankIndex
from gmem_bank.progress import no_progress
from gmem_bank.selection import Selection
from tests.conftest import BankMaker
from tests.gmem_bank.test_index import clustered

NUM_CLUSTERS, DIM = 200, 24


def in_clusters(num_rows: int, seed: int, among: range = range(NUM_CLUSTERS)) -> tuple[np.ndarray, np.ndarray]:
    """Rows, and the cluster of each."""
    centres = np.random.default_rng(0).standard_normal((NUM_CLUSTERS, DIM))
    rng = np.random.default_rng(seed)
    own = rng.choice(np.array(among), num_rows)
    return (centres[own] + 0.15 * rng.standard_normal((num_rows, DIM))).astype(np.float32), own


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-rabitq", "hnsw"])
def test_queries_out_of_masked_clusters_are_answered_as_well_as_others(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Tuned to all there is, then 20 of 200 clusters are masked: recall of queries in them, and of others, stays."""
    rows, own = in_clusters(8000, 1)
    bank = make_bank(snippets=rows)
    gmem_bank.build_index(bank.path, kind=kind, recall=0.99)
    ops.mask(bank.path, Selection(keys=tuple(bank.keys(np.flatnonzero(own < 20)))))
    opened = gmem_bank.open(bank.path)
    index = gmem_bank.open_index(opened)
    monkeypatch.setattr(index, "_is_cheaper_exactly", lambda *_: False)
    in_hidden = 0.85 if kind == "ivf-rabitq" else 0.95  # one bit a dimension: what is far away is ordered least well
    for among, least in ((range(20), in_hidden), (range(20, NUM_CLUSTERS), 0.97)):
        queries = in_clusters(150, 2, among)[0]
        found, true = index.nearest(queries, 10)[1], opened.nearest(queries, 10)[1]
        recall = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), true.tolist(), strict=True)])
        assert recall >= least, (kind, among, recall)


def test_few_active_rows_are_compared_exactly(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that costs less than candidates do, FAISS's index is not asked."""
    bank = make_bank(snippets=clustered(3000, 16))
    gmem_bank.build_index(bank.path, kind="ivf-rabitq", nprobe=4, rerank=4)
    ops.mask(bank.path, Selection(keys=tuple(bank.keys(np.arange(40, 3000)))))
    opened = gmem_bank.open(bank.path)
    index = gmem_bank.open_index(opened)
    monkeypatch.setattr(index_candidates.Candidates, "find", lambda *_: pytest.fail("the index was asked"))
    queries = clustered(20, seed=4)
    np.testing.assert_array_equal(index.nearest(queries, 5)[1], opened.nearest(queries, 5)[1])


def test_a_mask_far_away_costs_a_query_nothing(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only queries around which most is hidden are looked at again."""
    rows, own = in_clusters(8000, 1)
    bank = make_bank(snippets=rows)
    gmem_bank.build_index(bank.path, kind="ivf-flat", recall=0.99)
    ops.mask(bank.path, Selection(keys=tuple(bank.keys(np.flatnonzero(own < 2)))))
    index = gmem_bank.open_index(gmem_bank.open(bank.path))
    monkeypatch.setattr(index, "_is_cheaper_exactly", lambda *_: False)
    asked: list[int] = []
    whole = index_candidates.Candidates.find

    def counted(self: index_candidates.Candidates, projected: np.ndarray, num: int, effort: int) -> np.ndarray:
        asked.append(len(projected))
        return whole(self, projected, num, effort)

    monkeypatch.setattr(index_candidates.Candidates, "find", counted)
    index.nearest(in_clusters(200, 2, range(20, NUM_CLUSTERS))[0], 10)
    assert asked[0] == 200
    assert sum(asked[1:]) <= 20


def test_queries_times_candidates_are_bounded(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many candidates a query has, so many labels are held in one call of FAISS; answers are the same."""
    bank = make_bank(snippets=clustered(2000, 16))
    gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=4, rerank=1)
    index = gmem_bank.open_index(bank)
    queries = clustered(300, seed=5)
    wanted = index.nearest(queries, 50, rerank=8)[1]
    monkeypatch.setattr(index_candidates, "MOST_CANDIDATES", 8000)
    sizes: list[int] = []
    whole = index_candidates.Candidates.find

    def counted(self: index_candidates.Candidates, projected: np.ndarray, num: int, effort: int) -> np.ndarray:
        found = whole(self, projected, num, effort)
        sizes.append(found.size)
        return found

    monkeypatch.setattr(index_candidates.Candidates, "find", counted)
    np.testing.assert_array_equal(index.nearest(queries, 50, rerank=8)[1], wanted)
    assert max(sizes) <= 8000
    assert sum(sizes) == 300 * 400
    assert index_candidates.queries_at_once(1) == index_candidates.MOST_QUERIES
    assert index_candidates.queries_at_once(1 << 30) == 1


def test_vectors_of_one_query_are_bounded(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows as candidates of one query: compared some at a time."""
    bank = make_bank(snippets=clustered(2000, 16))
    gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=4, rerank=1)
    index, queries = gmem_bank.open_index(bank), clustered(3, seed=5)
    lists = default_lists(2000)
    wanted = index.nearest(queries, 1000, nprobe=lists, rerank=2)[1]
    monkeypatch.setattr(indexed, "BLOCK_BYTES", 4 * 16 * 300)
    sizes: list[int] = []
    whole = Coordinates.cosines

    def counted(self: Coordinates, rows: np.ndarray, turned: np.ndarray) -> np.ndarray:
        sizes.append(rows.size)
        return whole(self, rows, turned)

    monkeypatch.setattr(Coordinates, "cosines", counted)
    np.testing.assert_array_equal(index.nearest(queries, 1000, nprobe=lists, rerank=2)[1], wanted)
    assert max(sizes) <= 300
    assert sum(sizes) == 3 * 2000


@pytest.mark.parametrize("space", ["raw", "unit"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_cosines_without_normalised_rows_are_the_exact_ones(make_bank: BankMaker, dtype: str, space: str) -> None:
    """Within 1e-6 of float64, of any length; and a row that f32 cannot square."""
    rng = np.random.default_rng(0)
    values = clustered(400, 96) * rng.uniform(0.01, 90, (400, 1)).astype(np.float32)
    if dtype != "f16" and space == "raw":
        values[3], values[4] = values[3] * np.float32(1e25), values[4] * np.float32(1e-9)
    bank = make_bank(snippets=values, dtype=dtype, space=space)
    own, queries = Coordinates(bank), rng.standard_normal((30, 96)).astype(np.float32)
    rows = rng.integers(5, 400, (30, 7))
    rows[0, :2] = 3, 4
    wide = bank.snippets(np.arange(400)).astype(np.float64)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    asked = queries.astype(np.float64) / np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    wanted = np.einsum("bcd,bd->bc", wide[rows], asked)
    np.testing.assert_allclose(own.cosines(rows, own.queries(queries)), wanted, atol=1e-6)


def test_no_normalised_copy_is_made_of_dense_rows(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One pass less."""
    bank = make_bank(snippets=clustered(60, 8), dtype="f16", space="unit")
    own = Coordinates(bank)
    for module in ("coordinates", "kinds"):
        monkeypatch.setattr(f"gmem_bank.{module}.scale_to_unit", lambda _: pytest.fail("rows were normalised"))
    assert own.cosines(np.zeros((2, 3), np.int64), np.ones((2, 8), np.float32)).shape == (2, 3)


class Options:
    """FAISS's options for a copy on a GPU."""

    useFloat16 = False


@pytest.mark.parametrize(("dim", "code_bytes", "narrow"), [(192, 24, False), (768, 96, True), (40, 5, None)])
def test_product_codes_go_to_a_gpu_as_far_as_its_kernels_know_them(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, dim: int, code_bytes: int, narrow: bool | None
) -> None:
    """Long ones with tables in f16, which FAISS demands there; those of no known length stay on the processor."""
    faiss = pytest.importorskip("faiss")
    bank = make_bank(snippets=np.random.default_rng(0).standard_normal((300, dim)).astype(np.float32))
    gmem_bank.build_index(bank.path, kind="ivf-pq", nlist=2, nprobe=2, rerank=1)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    monkeypatch.setattr(faiss, "GpuClonerOptions", Options, raising=False)
    given: list[bool] = []

    def copied(_resources: object, _number: int, index: object, options: Options) -> object:
        given.append(options.useFloat16)
        return index

    monkeypatch.setattr(faiss, "index_cpu_to_gpu", copied, raising=False)
    index = gmem_bank.open_index(bank)
    assert index.nearest(bank.snippets(np.array([7])), 1)[1] == 7
    assert given == ([] if narrow is None else [narrow])
    assert ("GPU" in index.describe()) is (narrow is not None)
    chosen = plan_index(10_000_000, dim, max_bytes=10_000_000 * (dim // 8 + 100), num_gpus=1).kind
    assert chosen == ("ivf-pq" if code_bytes in GPU_CODE_BYTES else "ivf-rabitq")


def test_on_a_gpu_the_limits_of_its_kernels_hold_and_the_device_is_named(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked of FAISS there, without a GPU: lists and candidates up to 2,048, and a mask on the processor."""
    faiss = pytest.importorskip("faiss")
    bank = make_bank(snippets=clustered(3000, 8))
    gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=4, rerank=1)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "StandardGpuResources", object, raising=False)
    asked: list[tuple[int, int]] = []

    class OnGpu:
        def __init__(self, index: object) -> None:
            self.index = index

        def search(self, part: np.ndarray, num: int, params: object) -> tuple[np.ndarray, np.ndarray]:
            asked.append((num, params.nprobe))
            return self.index.search(part, num, params=params)

    monkeypatch.setattr(faiss, "GpuClonerOptions", Options, raising=False)
    monkeypatch.setattr(
        faiss, "index_cpu_to_gpu", lambda _resources, _number, index, _options: OnGpu(index), raising=False
    )
    index = gmem_bank.open_index(bank)
    assert "GPU 0" in index.describe()
    index.candidates(clustered(3, 8, seed=1), 2900, 4000)
    assert asked == [(2048, 2048)]
    ops.mask(bank.path, Selection(keys=tuple(bank.keys(np.arange(9)))))
    masked = gmem_bank.open_index(gmem_bank.open(bank.path))
    assert "GPU" not in masked.describe()


class Slow(BankIndex):
    """An index whose searches take what a list says, after one that takes long."""

    seconds: list[float]
    clock = 0.0

    def nearest(self, *arguments: object, **options: object) -> tuple[np.ndarray, np.ndarray]:
        Slow.clock += self.seconds.pop(0) if self.seconds else 1.0
        return super().nearest(*arguments, **options)


def test_speeds_are_medians_after_a_warm_up_and_one_slow_reading_ends_nothing(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first search of 100 s and a hiccup do not count; a slower effort is followed by a faster one."""
    bank = make_bank(snippets=clustered(3000, 16))
    gmem_bank.build_index(bank.path, kind="ivf-flat", nlist=16, nprobe=16, rerank=1)
    truth: Truth = index_tuning.truth_of(Coordinates(bank), 0, no_progress)
    index = Slow(bank, read_index(index_path(bank.path)), index_path(bank.path))
    index.seconds = [100, 2, 50, 2, *(second for second in (3, 1, 8, 9, 7, 5) for _ in range(4))]
    monkeypatch.setattr(index_tuning.time, "perf_counter", lambda: Slow.clock)
    monkeypatch.setattr(index_tuning, "recall_of", lambda *_: (1.0, 0.0))
    settings, table = tune(index, truth, recall=0.5, nprobe=None, rerank=None, num_lists=16, num_bytes=1)
    seconds = [round(256 / line["queries_per_second"]) for line in table]
    assert seconds == [2, 3, 1, 8, 9, 7], "three slower ones in a row are enough"
    assert settings == {"nprobe": 3, "rerank": 1}


def test_the_exact_line_says_how_it_was_measured(make_bank: BankMaker) -> None:
    """It is a first pass from the disk, not a search in memory."""
    report = gmem_bank.build_index(make_bank(snippets=clustered()).path)
    assert report.measured[0]["how"] == "streamed from disk, first pass"
    assert dataclasses.asdict(report)["measured"][0]["kind"] == "exact"
    assert indexed.GATHERED > indexed.WIDENED
