"""Making an index: train, add, tune, write.

Shapes: N rows, L labels, D dimensions, E coordinates, m rows trained on.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import kinds, row_identity
from gmem_bank.bank import MemoryBank
from gmem_bank.coordinates import Coordinates
from gmem_bank.errors import ConfigError, OutputExistsError
from gmem_bank.index import matrix_products, require_faiss
from gmem_bank.index_choice import PQ_WORDS, ROWS_PER_LIST, TURNED_KINDS, Plan, check_settings, make_faiss, plan_index
from gmem_bank.index_facts import is_ours
from gmem_bank.index_file import IndexState, Streamed, file_bytes, index_path, size_of, write_index
from gmem_bank.index_tuning import truth_of, tune
from gmem_bank.indexed import BankIndex
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json, canonical_json
from gmem_bank.scalars import require_whole, whole
from gmem_bank.storage import atomic

OUTGROWN = 2
"""Times the rows trained on from which a new index is advised."""


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What `build_index` or `update_index` made."""

    path: str
    bank: str
    kind: str
    why: str = ""
    """Why this kind."""
    num_rows: int
    num_added: int = 0
    num_removed: int = 0
    dim: int
    """Numbers a row that are searched: D, or R + 1 of a factored bank."""
    num_bytes: int
    settings: dict[str, Json] = field(default_factory=dict)
    measured: list[dict[str, Json]] = field(default_factory=list)
    """Lines of kind, nprobe, rerank, recall (@10), queries_per_second, bytes, and work, by which settings are chosen (comparisons
    of a streamed row with a query); the first is exact search without an index, streamed from the disk in a first pass."""
    unchanged: bool = False
    recall_of_added: float | None = None
    """Recall@10 of the rows that an update added, measured where the basis has grown since the index was made."""
    outgrown: bool = False
    """Whether the bank has so many more rows now that building anew would pay."""

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def build_index(
    bank_path: str | os.PathLike[str],
    *,
    kind: str = "auto",
    recall: float = 0.95,
    max_bytes: int | None = None,
    nlist: int | None = None,
    nprobe: int | None = None,
    rerank: int | None = None,
    output: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress = no_progress,
) -> IndexReport:
    """Build the index of a bank, measure it, and write it beside the bank; one that is there is replaced.

    Masked rows are indexed too, so that a mask may change without a rebuild.

    Args:
        bank_path: the bank.
        kind: "auto" (see `index_choice.plan_index`), "flat", "ivf-rabitq", "ivf-flat", "ivf-pq" or "hnsw".
        recall: recall@10 that the settings are tuned for, above 0 up to 1; 1 takes a flat index.
        max_bytes: most that the index may take.
        nlist: clusters of an IVF index; None: about 4·√N.
        nprobe: lists looked into a query; None: tuned.
        rerank: candidates a neighbour wanted that are compared by exact cosines; None: tuned.
        output: the index file; None: beside the bank.
        seed: of the training rows, the clustering and the probes.
        progress: told rows done and rows to do, over all passes.

    Raises:
        BankNotFoundError, FormatError, CorruptError: the bank cannot be opened.
        ConfigError: an unknown kind, a value out of range, a recall or a size that cannot be had.
        OutputExistsError: `output` is something else than an index.
        LockedError, WriteError, MissingDependencyError.
    """
    faiss = require_faiss()
    seed = require_whole("seed", seed, 0)
    bank = kinds.open(bank_path).unmasked()
    path = _target(bank, output)
    coordinates = Coordinates(bank)
    plan = plan_index(
        len(bank), coordinates.dim, kind=kind, recall=recall, max_bytes=max_bytes, num_lists=nlist, num_gpus=faiss.get_num_gpus(),
        frame=bank.dim if coordinates.axes is not None else 0, content_bytes=len(canonical_json(row_identity.content_of(bank))),
    )  # fmt: skip
    check_settings(plan, nlist, nprobe, rerank)
    nprobe, rerank = whole(nprobe), whole(rerank)
    with atomic.locked(path):
        maker = _Maker(coordinates, plan, seed, progress)
        state = maker.make()
        _require_room(state, max_bytes)  # before the minutes of tuning
        truth = truth_of(coordinates, seed, maker.counted())
        settings: dict[str, Json] = {}
        table: list[dict[str, Json]] = []
        if plan.kind != "flat":
            probe = BankIndex(bank, state, path)
            settings, table = tune(
                probe, truth, recall=recall, nprobe=nprobe, rerank=rerank, num_lists=plan.num_lists, num_bytes=size_of(state)
            )  # fmt: skip
        exact = {
            "kind": "exact",
            "how": "streamed from disk, first pass",
            "recall": 1.0,
            "queries_per_second": round(truth.queries_per_second, 1),
            "bytes": 0,
        }
        state = dataclasses.replace(state, facts={**state.facts, "settings": settings, "measured": [exact, *table]})
        _require_room(state, max_bytes)
        write_index(path, state)
    return report_of(bank, state, path, why=plan.why, num_added=len(bank))


def _require_room(state: IndexState, max_bytes: int | None) -> None:
    """Raise ConfigError where the file of an index would be larger than allowed."""
    if max_bytes is not None and file_bytes(state) > max_bytes:
        raise ConfigError(
            f"the index of kind {state.kind} takes {file_bytes(state):,} bytes, more than the {max_bytes:,} allowed: raise "
            "--max-bytes, or search without an index, which compares every row in bounded memory",
            key="max_bytes",
        )


def _target(bank: MemoryBank, output: str | os.PathLike[str] | None) -> Path:
    """Return where the index goes; only the place beside the bank, which is ours, is written over unseen."""
    if output is None:
        return index_path(bank.path)
    path = Path(output)
    if path.exists() and (path.is_dir() or not is_ours(path)):
        raise OutputExistsError(
            f"{path} exists and is no index: choose another name with -o, or delete it first", path=path
        )
    return path


def report_of(bank: MemoryBank, state: IndexState, path: Path, **facts: Any) -> IndexReport:
    """Return the report on an index that has been written."""
    trained = int(state.facts["trained_rows"])
    return IndexReport(
        path=str(path), bank=str(bank.path), kind=state.kind, num_rows=len(bank), dim=int(state.facts["dim"]),
        num_bytes=path.stat().st_size, settings=dict(state.facts["settings"]), measured=list(state.facts["measured"]),
        outgrown=bool(trained) and len(bank) > OUTGROWN * trained, **facts,
    )  # fmt: skip


class _Maker:
    """Makes the index of a plan, and tells one count of rows over all passes."""

    def __init__(self, coordinates: Coordinates, plan: Plan, seed: int, progress: Progress) -> None:
        self._coordinates, self._plan, self._seed, self._progress = coordinates, plan, seed, progress
        self._bank = coordinates.bank
        self._done = 0

    def counted(self) -> Progress:
        """Return a progress for the next pass over all rows."""
        before, self._done = self._done, self._done + len(self._bank)
        return lambda done, _total: self._progress(before + done, 2 * len(self._bank))

    def make(self) -> IndexState:
        """Return the index, not yet tuned."""
        bank, num = self._bank, len(self._bank)
        axes = self._coordinates.axes
        if self._plan.kind in TURNED_KINDS:
            rotation = random_rotation(self._coordinates.dim, self._seed)
            axes = rotation if axes is None else rotation @ axes
        facts = {
            "kind": self._plan.kind, "dim": self._coordinates.dim, "bank": bank.fingerprint, "settings": {}, "measured": [],
            "content": row_identity.content_of(bank), "trained_rows": num if self._plan.num_lists else 0,
            "num_lists": self._plan.num_lists,
        }  # fmt: skip
        labels, keys = np.arange(num, dtype=np.int64), row_identity.key_hashes(bank)
        told, rows = self.counted(), bank.rows()
        if self._plan.kind == "flat":
            values = value_hashes(self._coordinates, rows, told)
            vectors = Streamed(shape=(num, self._coordinates.dim), blocks=lambda: _vectors(self._coordinates, rows))
            return IndexState(facts=facts, rows=labels, keys=keys, values=values, axes=axes, vectors=vectors)
        engine = make_faiss(require_faiss(), self._plan, self._coordinates.dim, self._seed)
        turn = turning(self._coordinates, axes)
        self._train(engine, turn)
        values = add_rows(engine, self._coordinates, turn, rows, labels, told)
        return IndexState(facts=facts, rows=labels, keys=keys, values=values, axes=axes, faiss=engine)

    def _train(self, engine: Any, turn: NDArray[np.float32] | None) -> None:
        if engine.is_trained:
            return
        num = len(self._bank)
        wanted = min(
            num, max(ROWS_PER_LIST * self._plan.num_lists, 8192)
        )  # codes want some rows, however few the lists
        rng = np.random.Generator(np.random.PCG64(self._seed))
        rows = np.sort(rng.choice(num, wanted, replace=False)).astype(np.int64)
        sample = np.empty((wanted, self._coordinates.dim), np.float32)
        start = 0
        for vectors in _vectors(self._coordinates, rows):
            sample[start : start + len(vectors)] = turned(vectors, turn)
            start += len(vectors)
        if self._plan.kind == "ivf-pq" and wanted < PQ_WORDS:
            raise ConfigError(_too_few(self._bank, self._plan.kind), key="kind")
        try:
            engine.train(sample)
        except RuntimeError as error:
            raise ConfigError(_too_few(self._bank, self._plan.kind), key="kind") from error


def _too_few(bank: MemoryBank, kind: str) -> str:
    return f"{bank.path} has too few rows ({len(bank)}) for an index of kind {kind}: --kind flat is exact and fast at this size"


def random_rotation(dim: int, seed: int) -> NDArray[np.float32]:
    """Return a random (E, E) rotation."""
    draw = np.random.Generator(np.random.PCG64(seed)).standard_normal((dim, dim))
    return np.ascontiguousarray(np.linalg.qr(draw)[0], np.float32)


def turning(coordinates: Coordinates, axes: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    """Return the matrix that takes coordinates of the bank to those of an index with its own (E, D) axes; None: the identity."""
    own = coordinates.axes
    if axes is None or (own is not None and np.array_equal(own, axes)):
        return None
    return np.ascontiguousarray(axes.T if own is None else own @ axes.T)


def turned(vectors: NDArray[np.float32], turn: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return coordinates of the index from coordinates of the bank."""
    return np.ascontiguousarray(vectors if turn is None else vectors @ turn)


def _vectors(coordinates: Coordinates, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    return (vectors for _, _, vectors in coordinates.blocks(rows))


def value_hashes(coordinates: Coordinates, rows: NDArray[np.int64], told: Progress) -> NDArray[np.uint64]:
    """Return the hashes of the values of rows."""
    hashes = np.empty(len(rows), np.uint64)
    done = 0
    for chunk in coordinates.row_chunks(rows):
        hashes[done : done + len(chunk)] = row_identity.hashes_of_values(coordinates.values(chunk))
        done += len(chunk)
        told(done, len(rows))
    return hashes


def add_rows(
    engine: Any,
    coordinates: Coordinates,
    turn: NDArray[np.float32] | None,
    rows: NDArray[np.int64],
    labels: NDArray[np.int64],
    told: Progress,
) -> NDArray[np.uint64]:
    """Add rows under their labels and return the hashes of their values; kinds without labels number them as they come."""
    hashes, done = np.empty(len(rows), np.uint64), 0
    with matrix_products(len(rows)):
        for chunk, values, vectors in coordinates.blocks(rows):
            end = done + len(chunk)
            hashes[done:end] = row_identity.hashes_of_values(values)
            if hasattr(engine, "nlist"):
                engine.add_with_ids(turned(vectors, turn), labels[done:end])
            else:
                engine.add(turned(vectors, turn))
            done = end
            told(done, len(rows))
    return hashes
