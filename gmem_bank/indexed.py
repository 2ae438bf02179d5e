"""Search by an index: candidates from FAISS, ordered again by their exact cosines, the bank's row mask applied as it is now.

Shapes: B queries, N rows, n active rows, L labels, D dimensions, E coordinates, k neighbours, c candidates of a query.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.coordinates import BLOCK_BYTES, Coordinates, require_nonzero, require_queries
from gmem_bank.errors import CorruptError
from gmem_bank.index import best_of, require_faiss, search_flat, within_one
from gmem_bank.index_candidates import Candidates, queries_at_once
from gmem_bank.index_choice import MOST_RERANK, ladder
from gmem_bank.index_file import IndexState, index_path, read_index
from gmem_bank.provenance import Json
from gmem_bank.row_identity import require_fit
from gmem_bank.scalars import require_whole
from gmem_bank.space import to_space

GATHERED, WIDENED = 70, 28
"""What a gathered row costs, and what a streamed one costs to read and widen, in comparisons of a streamed row with a query."""
PART_BYTES = 2 << 20
"""Of f32 vectors that are compared at a time: they are read, widened and multiplied while they are in the cache."""


class BankIndex:
    """An index and the bank it fits; from `open_index`.

    Args:
        bank: the bank.
        state: the index.
        path: its file.
    """

    def __init__(self, bank: MemoryBank, state: IndexState, path: Path) -> None:
        self.bank, self.path = bank, path
        self._state = state
        self._coordinates = Coordinates(bank)

    @property
    def kind(self) -> str:
        """One of flat, ivf-rabitq, ivf-flat, ivf-pq, hnsw."""
        return self._state.kind

    @property
    def num_lists(self) -> int:
        """Clusters of an IVF index; 0 of others."""
        return int(self._state.facts["num_lists"])

    @property
    def settings(self) -> dict[str, Json]:
        """What was tuned: nprobe and rerank; empty for a flat index."""
        return dict(self._state.facts["settings"])

    @property
    def measured(self) -> list[dict[str, Json]]:
        """What was measured when it was built: kind, nprobe, rerank, recall, queries_per_second, bytes; and work, counted."""
        return list(self._state.facts["measured"])

    def describe(self) -> str:
        """Return "bank.safetensors.index (ivf-rabitq, nprobe 8, rerank 4)"."""
        settings = [f"{name} {value}" for name, value in self.settings.items()]
        device = ["GPU 0"] if self.kind != "flat" and self._candidates.is_on_gpu else []
        return f"{self.path} ({', '.join([self.kind, *settings, *device])})"

    def nearest(
        self, queries: NDArray[np.float32], k: int, *, nprobe: int | None = None, rerank: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the k active rows of highest cosine to each query among the candidates of the index.

        Args:
            queries: (B, D) float32, finite, not all zeros.
            k: neighbours wanted; at most n.
            nprobe: lists looked into (for HNSW: candidates kept in view) instead of what was tuned; more of both under a mask.
            rerank: candidates a neighbour wanted that are compared by exact cosines, instead of what was tuned.

        Returns:
            (B, k) float32 cosines, exact whatever the index, descending; (B, k) int64 rows.

        Raises:
            EncoderMismatchError: the queries have another dimension.
            ConfigError: k, nprobe or rerank is out of range, or a query has no direction.
            CorruptError: lists of the index name a row that it does not have, or one row twice.
        """
        require_queries(self.bank, queries, k, self._num_active)
        k = int(k)  # NumPy's are none of FAISS's
        require_nonzero(queries)
        unit = to_space(np.ascontiguousarray(queries, np.float32), "unit")
        if self.kind == "flat":
            return best_of(self._projected(unit), self._vector_blocks(k), k)
        return self._best(unit, k, k * self._factor(rerank), self._effort(nprobe))

    def _best(
        self, unit: NDArray[np.float32], k: int, num: int, effort: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return cosines and rows from `num` candidates of each unit query; more where a mask hides what they would be."""
        own = self._candidates
        if own.is_masked:
            wider = own.num_rows / own.num_active
            num, effort = min(math.ceil(num * wider), own.num_active), min(math.ceil(effort * wider), own.most_effort)
            if self._is_cheaper_exactly(len(unit), num, effort):
                return search_flat(self.bank, unit, k)
        scores, rows = self._of_candidates(unit, k, num, effort)
        if own.is_masked:
            self._look_further(unit, k, num, effort, scores, rows)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):  # the lists looked into held too few active rows: those queries are compared with every row
            scores[short], rows[short] = search_flat(self.bank, unit[short], k)
        return scores, rows

    def _of_candidates(
        self, unit: NDArray[np.float32], k: int, num: int, effort: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        turned = self._coordinates.of_unit(unit)
        scores, rows = np.empty((len(unit), k), np.float32), np.empty((len(unit), k), np.int64)
        step = queries_at_once(num)
        for start in range(0, len(unit), step):
            asked = slice(start, start + step)
            candidates = self._candidates.find(self._projected(unit[asked]), num, effort)
            exact = self._exact(turned[asked], candidates)
            scores[asked], rows[asked] = _first(exact, candidates, k)
        ordered = np.sort(rows, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
            raise CorruptError(f"{self.path} has a row in its lists twice: build it again", path=self.path)
        return scores, rows

    def _look_further(
        self,
        unit: NDArray[np.float32],
        k: int,
        num: int,
        effort: int,
        scores: NDArray[np.float32],
        rows: NDArray[np.int64],
    ) -> None:
        """Look at twice as much again for queries around which the mask hides most, until what is found stays the same."""
        own = self._candidates
        left = np.flatnonzero(own.hidden_from(self._projected(unit), num, effort))
        while len(left):
            num, effort = min(2 * num, own.num_active), min(2 * effort, own.most_effort)
            if self._is_cheaper_exactly(len(left), num, effort):
                scores[left], rows[left] = search_flat(self.bank, unit[left], k)
                return
            before = rows[left]
            scores[left], rows[left] = self._of_candidates(unit[left], k, num, effort)
            left = left[(rows[left] != before).any(axis=1)]

    def _is_cheaper_exactly(self, num_queries: int, num: int, effort: int) -> bool:
        """Say whether comparing queries with all active rows costs less than comparing `num` candidates of each."""
        lists = 0 if self.kind == "hnsw" else self._candidates.most_effort
        exact = self._num_active * (WIDENED + num_queries)
        return exact <= num_queries * (GATHERED * num + effort + lists)

    # -- the mask

    @cached_property
    def _active(self) -> NDArray[np.bool_]:
        """(L,): labels whose row is there and active."""
        active = np.zeros(len(self.bank) + 1, np.bool_)  # the last one answers for -1
        active[self.bank.rows()] = True
        found: NDArray[np.bool_] = active[self._state.rows]
        return found

    @cached_property
    def _num_active(self) -> int:
        return int(self._active.sum())

    @cached_property
    def _candidates(self) -> Candidates:
        return Candidates(self._state, self._active, self.path)

    # -- candidates

    def _projected(self, unit: NDArray[np.float32]) -> NDArray[np.float32]:
        return unit if self._state.axes is None else unit @ self._state.axes.T

    def _vector_blocks(self, least: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        vectors, rows = self._state.vectors, self._state.rows
        assert isinstance(vectors, np.ndarray), "an open flat index has its vectors"
        step = max(least, BLOCK_BYTES // (4 * vectors.shape[1]))
        for start in range(0, len(vectors), step):
            part = slice(start, start + step)
            own = self._active[part]
            if own.any():
                yield (rows[part], vectors[part]) if own.all() else (rows[part][own], vectors[part][own])

    def _effort(self, nprobe: int | None) -> int:
        return int(self.settings["nprobe"]) if nprobe is None else ladder(self.kind, self.num_lists, nprobe)[0]

    def _factor(self, rerank: int | None) -> int:
        return int(self.settings["rerank"]) if rerank is None else require_whole("rerank", rerank, 1, MOST_RERANK)

    def candidates(
        self, queries: NDArray[np.float32], num: int, nprobe: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the (B, c) rows that the index itself finds, best estimate first, and their exact cosines."""
        unit = to_space(np.ascontiguousarray(queries, np.float32), "unit")
        turned, rows = self._coordinates.of_unit(unit), self._candidates.find(self._projected(unit), num, nprobe)
        return rows, self._exact(turned, rows)

    def num_compared(self, queries: NDArray[np.float32], nprobe: int) -> float:
        """Return how many codes or vectors of the index each of (B, D) queries is compared with, in the mean."""
        unit = to_space(np.ascontiguousarray(queries, np.float32), "unit")
        return self._candidates.num_compared(self._projected(unit), nprobe)

    # -- exact values

    def _in_parts(self, work: Callable[[slice], None], num_queries: int, num: int) -> None:
        """Do the work for some queries at a time, as many as the caches hold, by as many threads as FAISS has."""
        step = max(1, PART_BYTES // (4 * self._coordinates.dim * num))
        parts = [slice(start, start + step) for start in range(0, num_queries, step)]
        threads = min(len(parts), require_faiss().omp_get_max_threads())
        if threads < 2:
            for part in parts:
                work(part)
            return
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, parts))

    def _exact(self, turned: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the (B, c) cosines to (B, c) rows of the bank, for (B, E) coordinates of queries; -inf for row -1."""
        scores, known = np.full(rows.shape, -np.inf, np.float32), rows >= 0
        if not known.any():
            return scores
        filled = np.where(known, rows, rows[known][0])

        def compare(part: slice) -> None:
            # one query may have any number of candidates
            step = max(1, BLOCK_BYTES // (4 * self._coordinates.dim * len(filled[part])))
            for start in range(0, rows.shape[1], step):
                own = part, slice(start, start + step)
                scores[own] = within_one(self._coordinates.cosines(filled[own], turned[part]))

        self._in_parts(compare, *rows.shape)
        scores[~known] = -np.inf
        return scores


def _first(
    scores: NDArray[np.float32], rows: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the (B, k) best of (B, c) candidates, of equal scores the lower row first; -1 where there are fewer."""
    order = np.lexsort((rows, -scores))[:, :k]
    scores, rows = np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)
    if rows.shape[1] == k:
        return scores, rows
    missing = ((0, 0), (0, k - rows.shape[1]))
    return np.pad(scores, missing, constant_values=-np.inf), np.pad(rows, missing, constant_values=-1)


def open_index(bank: MemoryBank, path: str | os.PathLike[str] | None = None) -> BankIndex:
    """Open the index of a bank.

    Args:
        bank: an open bank; its row mask may have changed since the index was made, its rows may not.
        path: the index; None: the one beside the bank.

    Raises:
        BankNotFoundError: there is no index.
        StaleIndexError: it was made for another bank, or for another state of this one.
        FormatError, CorruptError: it is not an index, or damaged.
        MissingDependencyError: FAISS is not installed.
    """
    place = index_path(bank.path) if path is None else Path(path)
    state = read_index(place)
    require_fit(bank, state, place)
    return BankIndex(bank, state, place)


def find_index(bank: MemoryBank, path: str | os.PathLike[str] | None = None) -> BankIndex | None:
    """Return the index of a bank as `open_index` does, or None where no path is given and there is none beside the bank."""
    return open_index(bank, path) if path is not None or index_path(bank.path).exists() else None
