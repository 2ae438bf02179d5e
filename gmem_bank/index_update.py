"""Keeping an index in step with its bank after inserts and removals: rows are added and removed, nothing is trained.

Shapes: N rows, L labels, D dimensions, E coordinates.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import kinds, row_identity
from gmem_bank.coordinates import Coordinates
from gmem_bank.errors import GMemError, StaleIndexError
from gmem_bank.index import require_faiss
from gmem_bank.index_build import IndexReport, add_rows, report_of, turned, turning, value_hashes
from gmem_bank.index_file import IndexState, Streamed, index_path, read_index, write_index
from gmem_bank.index_tuning import recall_of, truth_of
from gmem_bank.indexed import BankIndex
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json
from gmem_bank.row_identity import why_not_update
from gmem_bank.storage import atomic

LEAST_LENGTH = 0.9
"""Of 1. What is left out of a row and of a query like it takes up to 1 - 0.9² = 0.19 from their product in the index, as much as
neighbours differ in; below that other rows come first, however many are compared again."""
WHOLE_LENGTH = 0.999
"""From here on nothing is lost but what codes lose anyway."""
MEASURED_ROWS = 4096


def update_index(
    bank_path: str | os.PathLike[str],
    *,
    path: str | os.PathLike[str] | None = None,
    progress: Progress = no_progress,
) -> IndexReport:
    """Bring the index of a bank up to date after inserts, removals and undos: rows are added and removed, nothing is trained.

    Args:
        bank_path: the bank: by its history a descendant of the one that the index was made for, or with a segment of it.
        path: the index; None: the one beside the bank.
        progress: told rows added and rows to add.

    Raises:
        BankNotFoundError: no bank, or no index.
        StaleIndexError: the index is of another bank, the basis was fitted anew, or rows are gone that an HNSW index cannot
            remove, or the basis has grown so that the index would hold too little of new rows.
        FormatError, CorruptError, LockedError, WriteError, MissingDependencyError.
    """
    require_faiss()
    bank = kinds.open(bank_path).unmasked()
    place = index_path(bank.path) if path is None else Path(path)
    if not place.exists():
        read_index(place)  # says so, before a lock is left in some folder
    with atomic.locked(place):
        state = read_index(place)
        content = row_identity.content_of(bank)
        if content == state.facts["content"]:
            return report_of(bank, state, place, unchanged=True)
        why = why_not_update(bank, state, place)
        if why is not None:
            raise StaleIndexError(why, path=place)
        coordinates = Coordinates(bank)
        change = _change(coordinates, state, content)
        kept = _kept_lengths(coordinates, state, change.added)
        if kept < LEAST_LENGTH:
            raise StaleIndexError(
                f"the basis of {bank.path} has grown since {place} was made, and the index holds only {kept:.2f} of the "
                f"length of new rows, too little to find them by: 'gmem-bank index {bank.path}' builds a new one",
                path=place,
            )
        new = _followed(coordinates, state, change, progress)
        new = dataclasses.replace(new, facts={**new.facts, "content": content, "bank": bank.fingerprint})
        write_index(place, new)
    recall = _recall_of_added(coordinates, new, place, change.added) if kept < WHOLE_LENGTH else None
    return report_of(
        bank, new, place, num_added=len(change.added), num_removed=len(change.gone), recall_of_added=recall
    )


def _kept_lengths(coordinates: Coordinates, state: IndexState, added: NDArray[np.int64]) -> float:
    """Return the length, of 1, that an index keeps of new rows: 95 % of them keep as much; 1 where it has all axes of the bank.

    A flat index is written anew on the axes of the bank.
    """
    turn = turning(coordinates, state.axes)
    if state.kind == "flat" or coordinates.axes is None or turn is None or not len(added):
        return 1.0
    rng = np.random.Generator(np.random.PCG64(0))
    rows = np.sort(rng.choice(added, min(MEASURED_ROWS, len(added)), replace=False))
    return float(np.quantile(np.linalg.norm(turned(coordinates.of(rows), turn), axis=1), 0.05))


def _recall_of_added(coordinates: Coordinates, state: IndexState, path: Path, added: NDArray[np.int64]) -> float:
    """Return the recall@10 of new rows by the settings of the index; one pass over the bank."""
    truth = truth_of(coordinates, 0, no_progress, among=added)
    scores, rows = BankIndex(coordinates.bank, state, path).nearest(truth.snippets, truth.num + 1)
    return recall_of(truth, rows, scores)[0]


@dataclass(frozen=True, kw_only=True)
class _Change:
    """How the rows of a bank stand to the labels of an index."""

    label_of: NDArray[np.int64]
    """(N,) label of each row; -1: not in the index."""
    added: NDArray[np.int64]
    """Rows that are new."""
    gone: NDArray[np.int64]
    """Labels whose row is no more."""


def _change(coordinates: Coordinates, state: IndexState, content: dict[str, Json]) -> _Change:
    bank = coordinates.bank
    live = np.flatnonzero(state.rows >= 0)
    label_of_old = np.empty(len(live), np.int64)
    label_of_old[state.rows[live]] = live
    label_of = np.full(len(bank), -1, np.int64)
    rows, old_rows = row_identity.kept_segments(state.facts["content"], content)
    label_of[rows] = label_of_old[old_rows]
    open_rows = np.flatnonzero(label_of < 0)
    open_labels = np.setdiff1d(live, label_of[rows])
    if len(open_rows) and len(open_labels):
        new = row_identity.key_hashes(bank)[open_rows], value_hashes(coordinates, open_rows, no_progress)
        in_new, in_old = row_identity.pair_up((state.keys[open_labels], state.values[open_labels]), new)
        label_of[open_rows[in_new]] = open_labels[in_old]
    return _Change(
        label_of=label_of, added=np.flatnonzero(label_of < 0), gone=np.setdiff1d(open_labels, label_of[label_of >= 0])
    )


def _followed(coordinates: Coordinates, state: IndexState, change: _Change, progress: Progress) -> IndexState:
    """Return the index with the rows of the bank as they are now; labels of gone rows are never given again."""
    bank, num_labels = coordinates.bank, len(state.rows)
    if state.kind == "flat":
        return _followed_flat(coordinates, state, change, progress)
    if len(change.gone) and state.kind == "hnsw":
        raise StaleIndexError(
            f"{len(change.gone)} rows of {bank.path} are gone, and an HNSW index cannot remove any: build it again with "
            f"'gmem-bank index {bank.path} --kind hnsw', or take a kind that can, such as ivf-rabitq",
            path=bank.path,
        )
    if len(change.gone):
        removed = state.faiss.remove_ids(require_faiss().IDSelectorBatch(change.gone))
        if removed != len(change.gone):
            raise GMemError(f"the index had {removed} of {len(change.gone)} rows to remove: build it again")
    labels = np.arange(num_labels, num_labels + len(change.added))
    turn = turning(coordinates, state.axes)
    hashes = add_rows(state.faiss, coordinates, turn, change.added, labels, progress)
    label_of = change.label_of.copy()
    label_of[change.added] = labels
    rows = np.full(num_labels + len(labels), -1, np.int64)
    rows[label_of] = np.arange(len(bank))
    keys = np.concatenate([state.keys, np.zeros(len(labels), np.uint64)])
    keys[label_of] = row_identity.key_hashes(bank)
    values = np.concatenate([state.values, hashes])
    keys[rows < 0] = values[rows < 0] = 0  # of a row that is gone not even a hash stays
    return dataclasses.replace(state, rows=rows, keys=keys, values=values)


def _followed_flat(coordinates: Coordinates, state: IndexState, change: _Change, progress: Progress) -> IndexState:
    """Return a flat index anew, in the order of the rows: what stays is copied, unless the axes have changed with the basis."""
    bank, old = coordinates.bank, state.vectors
    assert isinstance(old, np.ndarray), "an open flat index has its vectors"
    same = turning(coordinates, state.axes) is None and coordinates.dim == old.shape[1]
    values = np.empty(len(bank), np.uint64)
    kept = change.label_of >= 0
    values[kept] = state.values[change.label_of[kept]]
    values[change.added] = value_hashes(coordinates, change.added, progress)

    def blocks() -> Iterator[NDArray[np.float32]]:
        for chunk in coordinates.row_chunks(bank.rows()):
            labels = change.label_of[chunk]
            if same and (labels >= 0).all():
                yield old[labels]
                continue
            vectors = np.empty((len(chunk), coordinates.dim), np.float32)
            new = labels < 0 if same else np.ones(len(chunk), np.bool_)
            vectors[~new] = old[labels[~new]] if same else 0
            vectors[new] = coordinates.of(chunk[new])
            yield vectors

    return dataclasses.replace(
        state, rows=np.arange(len(bank), dtype=np.int64), keys=row_identity.key_hashes(bank), values=values,
        axes=coordinates.axes,
        vectors=Streamed(shape=(len(bank), coordinates.dim), blocks=blocks),
        facts={**state.facts, "dim": coordinates.dim},
    )  # fmt: skip
