"""What an index proposes for a query, and whether a mask hides so much around it that more must be looked at.

Shapes: B queries, N rows, L labels, E coordinates, c candidates of a query.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError
from gmem_bank.index import matrix_products, require_faiss
from gmem_bank.index_choice import GPU_CODE_BYTES, HNSW_LINKS, MOST_EFFORT
from gmem_bank.index_file import IndexState

GPU_KINDS = ("ivf-flat", "ivf-pq")
"""Kinds that FAISS searches on a GPU."""
GPU_WIDE_CODE_BYTES = 48
"""Length of product codes up to which FAISS's tables for them may be f32 on a GPU; candidates are compared again anyway."""
GPU_MOST = 2048
"""Lists looked into, and candidates, that FAISS's kernels for GPUs take at most."""
MOST_QUERIES = 4096
MOST_CANDIDATES = 1 << 20
"""Of all queries in one call of FAISS: a label and an estimate each, 12 MB."""
OPEN_SHARE = 0.9
"""Of the rows that a search looks at without a mask, so many must be active in what it looks at with one."""


class Candidates:
    """The FAISS index of an open index file, under a mask.

    Args:
        state: the index.
        active: (L,) labels that may be found.
        path: its file, for messages.
    """

    def __init__(self, state: IndexState, active: NDArray[np.bool_], path: Path) -> None:
        self._state, self._active, self._path = state, active, path
        self.num_rows = int((state.rows >= 0).sum())
        """N."""
        self.num_active = int(active.sum())
        self.is_masked = self.num_active < self.num_rows

    @property
    def most_effort(self) -> int:
        """The most lists that can be looked into, or candidates that HNSW can keep in view."""
        return MOST_EFFORT if self._state.kind == "hnsw" else int(self._state.facts["num_lists"])

    @property
    def is_on_gpu(self) -> bool:
        """Whether a GPU searches: it knows no mask, not every kind, and not product codes of every length."""
        if self._state.kind not in GPU_KINDS or self.is_masked or not require_faiss().get_num_gpus():
            return False
        return self._state.kind != "ivf-pq" or self._state.faiss.pq.M in GPU_CODE_BYTES

    def find(self, projected: NDArray[np.float32], num: int, effort: int) -> NDArray[np.int64]:
        """Return the (B, c) rows that the index finds for (B, E) queries, best estimate first; -1 where it finds fewer."""
        labels = self._labels(projected, min(num, self.num_rows), effort, self._selector)
        self._require_known(labels, least=-1)  # FAISS gives -1 where it finds no more
        return np.where(labels >= 0, self._state.rows[labels], -1)

    def num_compared(self, projected: NDArray[np.float32], effort: int) -> float:
        """Return how many codes or vectors an effort has a query compared with, in the mean over (B, E) queries: counted.

        Of an HNSW index, whose graph decides, as many as its candidates in view have links.
        """
        if self._state.kind == "hnsw":
            return float(effort * HNSW_LINKS)
        lists = self._state.faiss.quantizer.search(projected, min(effort, self.most_effort))[1]
        return float(np.where(lists >= 0, self._sizes[lists], 0).sum(axis=1).mean())

    def hidden_from(self, projected: NDArray[np.float32], num: int, effort: int) -> NDArray[np.bool_]:
        """Return (B,) whether the mask hides more of what is looked at than it hides of all rows.

        Args:
            projected: (B, E) queries.
            num: candidates looked at.
            effort: for which `num` and `effort` are what N / n makes of the settings.
        """
        usual = self.num_active / self.num_rows
        if self._state.kind == "hnsw":
            labels = self._labels(projected, min(num, self.num_rows), effort, None)
            shares = np.where(labels >= 0, self._active[labels], True)
        else:
            shares = self._shares[self._state.faiss.quantizer.search(projected, min(effort, self.most_effort))[1]]
        hidden: NDArray[np.bool_] = shares.mean(axis=1) < OPEN_SHARE * usual
        return hidden

    def _require_known(self, labels: NDArray[np.int64], least: int = 0) -> None:
        if labels.max(initial=-1) >= len(self._state.rows) or labels.min(initial=least) < least:
            raise CorruptError(f"{self._path} knows a row that is not in its table: build it again", path=self._path)

    def _labels(self, projected: NDArray[np.float32], num: int, effort: int, selector: Any) -> NDArray[np.int64]:
        faiss = require_faiss()
        most = GPU_MOST if self.is_on_gpu else max(num, effort)
        num, effort = min(num, most), min(effort, most)
        if self._state.kind == "hnsw":
            how = faiss.SearchParametersHNSW(efSearch=max(effort, num), sel=selector)
        else:
            how = faiss.SearchParametersIVF(nprobe=effort, sel=selector)
        labels = np.empty((len(projected), num), np.int64)
        step = queries_at_once(num)
        with matrix_products(len(projected)):
            for start in range(0, len(projected), step):
                part = np.ascontiguousarray(projected[start : start + step])
                labels[start : start + step] = self._engine.search(part, num, params=how)[1]
        return labels

    @cached_property
    def _selector(self) -> Any:
        """What tells FAISS which labels may be found; None where it holds no other."""
        if not self.is_masked:
            return None
        return require_faiss().IDSelectorBitmap(np.packbits(self._active, bitorder="little"))

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        """(lists,): the rows of each list."""
        lists = self._state.faiss.invlists
        return np.array([lists.list_size(number) for number in range(lists.nlist)], np.int64)

    @cached_property
    def _shares(self) -> NDArray[np.float32]:
        """(lists,): the share of each list's rows that is active; 1 of an empty one, which hides nothing."""
        faiss, lists = require_faiss(), self._state.faiss.invlists
        shares = np.ones(lists.nlist, np.float32)
        for number in range(lists.nlist):
            size = lists.list_size(number)
            if size:
                labels = faiss.rev_swig_ptr(lists.get_ids(number), size)
                self._require_known(labels)
                shares[number] = self._active[labels].mean()
        return shares

    @cached_property
    def _engine(self) -> Any:
        """The FAISS index, on the first GPU where it can be searched there."""
        if not self.is_on_gpu:
            return self._state.faiss
        faiss = require_faiss()
        self._resources = faiss.StandardGpuResources()  # must live as long as the index
        options = faiss.GpuClonerOptions()
        if (
            self._state.kind == "ivf-pq"
        ):  # tables of codes as long as those of 768 dimensions fit no GPU's fast memory in f32
            options.useFloat16 = self._state.faiss.pq.M > GPU_WIDE_CODE_BYTES
        return faiss.index_cpu_to_gpu(self._resources, 0, self._state.faiss, options)


def queries_at_once(num: int) -> int:
    """Return for how many queries candidates are held at a time, where each has `num`."""
    return max(1, min(MOST_QUERIES, MOST_CANDIDATES // num))
