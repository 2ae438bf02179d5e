"""Search by an index: candidates from FAISS, ordered again by their exact cosines, the bank's row mask applied as it is now.

Shapes: B queries, N rows, n active rows, L labels, D dimensions, E coordinates, k neighbours, c candidates of a query.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.coordinates import BLOCK_BYTES, Coordinates, require_queries
from gmem_bank.errors import ConfigError, CorruptError, StaleIndexError
from gmem_bank.index import best_of, matrix_products, require_faiss, search_flat
from gmem_bank.index_choice import ladder
from gmem_bank.index_file import IndexState, index_path, read_index
from gmem_bank.provenance import Json
from gmem_bank.row_identity import content_of
from gmem_bank.space import to_space

GPU_KINDS = ("ivf-flat", "ivf-pq")
"""Kinds that FAISS searches on a GPU."""
MOST_QUERIES = 4096
"""In one call of FAISS."""
PART_BYTES = 4 << 20
"""Of f32 vectors that are compared at a time: they are read, widened, normalised and multiplied while they are in the cache."""


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
    def settings(self) -> dict[str, Json]:
        """What was tuned: nprobe and rerank; empty for a flat index."""
        return dict(self._state.facts["settings"])

    @property
    def measured(self) -> list[dict[str, Json]]:
        """What was measured when it was built: kind, nprobe, rerank, recall, queries_per_second, bytes."""
        return list(self._state.facts["measured"])

    def describe(self) -> str:
        """Return "bank.safetensors.index (ivf-rabitq, nprobe 8, rerank 4)"."""
        settings = [f"{name} {value}" for name, value in self.settings.items()]
        return f"{self.path} ({', '.join([self.kind, *settings])})"

    def nearest(
        self, queries: NDArray[np.float32], k: int, *, nprobe: int | None = None, rerank: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the k active rows of highest cosine to each query among the candidates of the index.

        Args:
            queries: (B, D) float32, finite, not all zeros.
            k: neighbours wanted; at most n.
            nprobe: lists looked into (for HNSW: candidates kept in view) instead of what was tuned.
            rerank: candidates a neighbour wanted that are compared by exact cosines, instead of what was tuned.

        Returns:
            (B, k) float32 cosines, exact whatever the index, descending; (B, k) int64 rows.

        Raises:
            EncoderMismatchError: the queries have another dimension.
            ConfigError: k, nprobe or rerank is out of range, or a query has no direction.
        """
        require_queries(self.bank, queries, k, self._num_active)
        unit = to_space(np.ascontiguousarray(queries, np.float32), "unit")
        empty = np.flatnonzero(~unit.any(axis=1))
        if len(empty):
            raise ConfigError(
                f"query number {empty[0]} of {len(queries)} is all zeros: it has no direction", key="queries"
            )
        if self.kind == "flat":
            return best_of(self._projected(unit), self._vector_blocks(k), k)
        effort, factor = self._effort(nprobe), self._factor(rerank)
        turned = self._coordinates.of_unit(unit)
        scores, rows = np.empty((len(unit), k), np.float32), np.empty((len(unit), k), np.int64)
        for start in range(0, len(unit), MOST_QUERIES):
            asked = slice(start, start + MOST_QUERIES)
            candidates = self._candidates(unit[asked], k * factor, effort)

            def order(part: slice, asked: slice = asked, candidates: NDArray[np.int64] = candidates) -> None:
                scores[asked][part], rows[asked][part] = self._ordered(turned[asked][part], candidates[part], k)

            self._in_parts(order, len(candidates), k * factor)
        short = np.flatnonzero((rows < 0).any(axis=1))
        if len(short):  # the lists looked into held too few active rows: those queries are compared with every row
            scores[short], rows[short] = search_flat(self.bank, unit[short], k)
        return scores, rows

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
    def _selector(self) -> Any:
        """What tells FAISS which labels may be found; None where it holds no other."""
        if self._num_active == len(self.bank):
            return None
        return require_faiss().IDSelectorBitmap(np.packbits(self._active, bitorder="little"))

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

    @cached_property
    def _engine(self) -> Any:
        """The FAISS index, on a GPU where it can be searched there."""
        faiss, index = require_faiss(), self._state.faiss
        if faiss.get_num_gpus() and self.kind in GPU_KINDS and self._selector is None:
            return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)
        return index

    def _effort(self, nprobe: int | None) -> int:
        num_lists = 0 if self.kind == "hnsw" else int(self._state.faiss.nlist)
        return int(self.settings["nprobe"]) if nprobe is None else ladder(self.kind, num_lists, nprobe)[0]

    def _factor(self, rerank: int | None) -> int:
        factor = int(self.settings["rerank"]) if rerank is None else rerank
        if factor < 1:
            raise ConfigError(f"rerank must be at least 1, got {factor}", key="rerank")
        return factor

    def _candidates(self, unit: NDArray[np.float32], num: int, effort: int) -> NDArray[np.int64]:
        """Return the (B, c) rows that the index finds, best estimate first; -1 where it finds fewer."""
        faiss = require_faiss()
        num = min(num, len(self.bank))
        if self.kind == "hnsw":
            how = faiss.SearchParametersHNSW(efSearch=max(effort, num), sel=self._selector)
        else:
            how = faiss.SearchParametersIVF(nprobe=effort, sel=self._selector)
        with matrix_products(len(unit)):
            labels = self._engine.search(np.ascontiguousarray(self._projected(unit)), num, params=how)[1]
        if labels.max(initial=-1) >= len(self._state.rows):
            raise CorruptError(f"{self.path} knows a row that is not in its table: build it again", path=self.path)
        return np.where(labels >= 0, self._state.rows[labels], -1)

    def candidates(
        self, queries: NDArray[np.float32], num: int, nprobe: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the (B, c) rows that the index itself finds, best estimate first, and their exact cosines."""
        unit = to_space(np.ascontiguousarray(queries, np.float32), "unit")
        turned, rows = self._coordinates.of_unit(unit), self._candidates(unit, num, nprobe)
        scores = np.empty(rows.shape, np.float32)

        def compare(part: slice) -> None:
            scores[part] = self._exact(turned[part], rows[part])

        self._in_parts(compare, len(rows), num)
        return rows, scores

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
        known = rows >= 0
        if not known.any():
            return np.full(rows.shape, -np.inf, np.float32)
        filled = np.where(known, rows, rows[known][0])
        vectors = self._coordinates.of(filled.reshape(-1)).reshape(*rows.shape, -1)
        scores = np.matmul(vectors, turned[:, :, None])[:, :, 0]
        return np.where(known, scores, np.float32(-np.inf))

    def _ordered(
        self, turned: NDArray[np.float32], rows: NDArray[np.int64], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the (B, k) best of (B, c) candidates; -1 where there are fewer."""
        scores = self._exact(turned, rows)
        order = np.lexsort((rows, -scores))[:, :k]  # of equal scores the lower row comes first
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


def descends(bank: MemoryBank, state: IndexState) -> bool:
    """Say whether a bank is, by its history, what has become of the one that an index was made for."""
    known = {bank.fingerprint, *(entry.get("parent") for entry in bank.history)}
    return state.facts["bank"] in known and bank.encoder.fingerprint == state.facts["content"].get("encoder")


def require_fit(bank: MemoryBank, state: IndexState, path: Path) -> None:
    """Raise StaleIndexError unless the rows of a bank are those of an index, in that order."""
    if content_of(bank) == state.facts["content"]:
        return
    if descends(bank, state):
        raise StaleIndexError(
            f"{path} is of an earlier state of {bank.path}: 'gmem-bank index {bank.path} --update' brings it up to date, "
            "'search --exact' does without",
            path=path,
        )
    raise StaleIndexError(
        f"{path} was made for another bank than {bank.path}, or for a state of it that was undone: "
        f"'gmem-bank index {bank.path}' builds a new one, 'search --exact' does without",
        path=path,
    )
