"""How well and how fast an index answers, measured on rows of the bank, and the settings that reach the recall asked for.

Recall@10 counts by exact cosines: a row as near as the tenth neighbour is a hit, whichever of equal rows it is. The probe itself
is left out on both sides, or it would be found for nothing.

Shapes: B probes, E coordinates, c candidates of a probe.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank.coordinates import Coordinates
from gmem_bank.errors import ConfigError
from gmem_bank.index import best_of
from gmem_bank.index_choice import ladder
from gmem_bank.indexed import BankIndex
from gmem_bank.progress import Progress
from gmem_bank.provenance import Json

NUM_PROBES = 256
K = 10
FINE = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
FACTORS = {"ivf-rabitq": FINE, "ivf-pq": FINE}
"""Kind → candidates a neighbour wanted; other kinds hold whole vectors, so that their order is right already."""
MARGIN = 2
"""Standard errors by which the measured recall must lie above the one asked for: other queries will be asked."""
TIMINGS = 3
SLOWER = 3
"""Efforts in a row that are slower than the fastest, after which no more are tried."""
TIE = 1e-6
"""Cosines nearer than this are equal: rounding of f32 sums."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Probes, and what exact search finds for them."""

    probes: NDArray[np.int64]
    """(B,) rows."""
    snippets: NDArray[np.float32]
    """(B, D)."""
    tenth: NDArray[np.float32]
    """(B,) cosine of the last neighbour that counts."""
    num: int
    """Neighbours that count: 10, or all others in a smaller bank."""
    queries_per_second: float
    """Of exact search over the whole bank."""


def truth_of(coordinates: Coordinates, seed: int, progress: Progress, among: NDArray[np.int64] | None = None) -> Truth:
    """Return exact answers for rows drawn at random; one pass over the bank.

    Args:
        coordinates: of the bank, mask lifted.
        seed: which rows.
        progress: told rows compared and rows in all.
        among: (m,) rows to draw from; None: all.
    """
    bank = coordinates.bank
    rows = bank.rows()
    rng = np.random.Generator(np.random.PCG64(seed))
    drawn = rows if among is None else among
    probes = np.sort(rng.choice(drawn, min(NUM_PROBES, len(drawn)), replace=False))
    snippets = bank.snippets(probes)
    num = min(K, len(rows) - 1)
    seen = 0

    def blocks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        nonlocal seen
        for chunk, _, vectors in coordinates.blocks(rows, least=num + 1):
            yield chunk, vectors
            seen += len(chunk)
            progress(seen, len(rows))

    started = time.perf_counter()
    scores, found = best_of(coordinates.queries(snippets), blocks(), num + 1)
    speed = len(probes) / (time.perf_counter() - started)
    scores = np.where(found == probes[:, None], -np.inf, scores)
    tenth = np.sort(scores, axis=1)[:, ::-1][:, max(num - 1, 0)]
    return Truth(probes=probes, snippets=snippets, tenth=tenth, num=num, queries_per_second=speed)


def recall_of(truth: Truth, rows: NDArray[np.int64], scores: NDArray[np.float32]) -> tuple[float, float]:
    """Return recall@10 and its standard error for (B, c) rows found, with their exact cosines."""
    if not truth.num:
        return 1.0, 0.0
    hits = (scores >= truth.tenth[:, None] - TIE) & (rows >= 0) & (rows != truth.probes[:, None])
    shares = np.minimum(hits.sum(axis=1), truth.num) / truth.num
    return float(shares.mean()), float(shares.std() / np.sqrt(len(shares)))


def tune(
    index: BankIndex,
    truth: Truth,
    *,
    recall: float,
    nprobe: int | None,
    rerank: int | None,
    num_lists: int,
    num_bytes: int,
) -> tuple[dict[str, Json], list[dict[str, Json]]]:
    """Return the fastest settings that reach a recall, and the table of those that were measured.

    Args:
        index: over all rows.
        truth: from `truth_of`.
        recall: wanted; see MARGIN.
        nprobe: lists looked into where given, else tried from few to all.
        rerank: factor where given, else the smallest that does.
        num_lists: of an IVF index.
        num_bytes: of the index, for the table.

    Raises:
        ConfigError: no settings reach it (none is raised where both were given).
    """
    table: list[dict[str, Json]] = []
    best = 0.0
    recall = recall if nprobe is None or rerank is None else 0.0
    for effort in ladder(index.kind, num_lists, nprobe):
        factor, reached = _smallest_factor(index, truth, effort, recall, rerank)
        best = max(best, reached)
        if factor is None:
            continue
        found, speed = _timed(index, truth, effort, factor)
        table.append({
            "kind": index.kind, "nprobe": effort, "rerank": factor, "recall": round(found, 4),
            "queries_per_second": round(speed, 1), "bytes": num_bytes,
        })  # fmt: skip
        best_speed = max(float(line["queries_per_second"]) for line in table)
        if all(line["queries_per_second"] < best_speed for line in table[-SLOWER:]):
            break  # more effort only costs from here on; one reading alone may be chance
    if not table:
        raise ConfigError(
            f"recall@10 of {recall} is out of reach for an index of kind {index.kind}: {best:.3f} was the best measured. "
            "Ask for less with --recall, or for exact search with --kind flat",
            key="recall",
        )
    fastest = max(table, key=lambda line: float(line["queries_per_second"]))
    return {"nprobe": fastest["nprobe"], "rerank": fastest["rerank"]}, table


def _smallest_factor(
    index: BankIndex, truth: Truth, effort: int, wanted: float, rerank: int | None
) -> tuple[int | None, float]:
    """Return the smallest factor that reaches a recall at an effort, or None, and the best recall seen."""
    factors = FACTORS.get(index.kind, (1,)) if rerank is None else (rerank,)
    rows, scores = index.candidates(truth.snippets, (truth.num + 1) * factors[-1], effort)
    best = 0.0
    for factor in factors:
        own = slice(0, (truth.num + 1) * factor)
        found, error = recall_of(truth, rows[:, own], scores[:, own])
        best = max(best, found)
        if found >= min(1.0, wanted + MARGIN * error) or not wanted:
            return factor, best
    return None, best


def _timed(index: BankIndex, truth: Truth, effort: int, factor: int) -> tuple[float, float]:
    """Return the recall of a search as it will be done, and its queries a second: the median of some, after one to warm up."""
    num, seconds = truth.num + 1, []
    for _ in range(1 + TIMINGS):
        started = time.perf_counter()
        scores, rows = index.nearest(truth.snippets, num, nprobe=effort, rerank=factor)
        seconds.append(time.perf_counter() - started)
    return recall_of(truth, rows, scores)[0], len(rows) / statistics.median(seconds[1:])
