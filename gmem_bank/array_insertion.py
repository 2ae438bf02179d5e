"""Insert a concept without images: snippets from an array, or rows that are there already.

Shapes: n new rows, D dimensions.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.arrays import ArrayRows
from gmem_bank.bank import MemoryBank
from gmem_bank.derive import append_rows, require_new_concept
from gmem_bank.editing import EditReport, editing
from gmem_bank.errors import EncoderMismatchError, GMemError, first_three
from gmem_bank.novelty import compare_with_bank, wants_report
from gmem_bank.ops import PathLike, check_concept_name
from gmem_bank.provenance import Source, relative_to_bank
from gmem_bank.selection import Selection, rows_selected
from gmem_bank.space import to_space, unusable_rows


def insert_snippets(
    bank_path: PathLike,
    rows: ArrayRows | NDArray[np.float32],
    *,
    name: str,
    report: bool | None = None,
    grow_below: float | None = None,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Add snippets that were computed elsewhere as a new concept; whoever calls vouches that the bank's encoder made them.

    Args:
        bank_path: the bank.
        rows: an (n, D) array, or what `read_array` gives.
        name: the concept's name.
        report, grow_below, output, dry_run, undo: as `insert_concept`.

    Raises:
        EncoderMismatchError: another dimension than the bank's.
        GMemError: a snippet that is not finite or has no direction; its row is named.
        ConceptExistsError: the name is taken.
    """
    concept = check_concept_name(name)
    given = rows if isinstance(rows, ArrayRows) else _in_memory(rows)
    arguments = {"name": concept, "digest": given.digest}
    with editing(bank_path, "insert-concept", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None and concept in edit.made.names:
            return edit.unchanged(concept=concept)
        require_new_concept(edit.bank, concept)
        snippets = _usable(edit.bank, given)
        path = relative_to_bank(given.path, edit.target.parent) if given.path.name else None
        source = Source(kind="array", path=path, prefix=f"{concept}/", digest=given.digest, num_images=len(given.keys))
        keys = [f"{concept}/{key}" for key in given.keys]
        novelty = {"novelty": compare_with_bank(edit.bank, snippets, keys)} if wants_report(edit.bank, report) else {}
        return append_rows(edit, concept, keys, snippets, [source], novelty, grow_below)


def _in_memory(snippets: NDArray[np.float32]) -> ArrayRows:
    if snippets.ndim != 2 or not snippets.size:
        raise GMemError(f"snippets must be an (n, D) array with at least one row, not of shape {list(snippets.shape)}")
    keys = [f"{row:0{len(str(len(snippets) - 1))}d}" for row in range(len(snippets))]
    return ArrayRows(path=Path(), snippets=np.asarray(snippets, np.float32), keys=keys)


def _usable(bank: MemoryBank, given: ArrayRows) -> NDArray[np.float32]:
    """Return the snippets in the bank's space; raises where one cannot be a snippet of it."""
    where = str(given.path) if given.path.name else "the array"
    if given.snippets.shape[1] != bank.dim:
        raise EncoderMismatchError(
            f"{where} has snippets of dimension {given.snippets.shape[1]}, {bank.path} of {bank.dim}", path=bank.path
        )
    twice = key_tables.duplicates(given.keys)
    if twice:
        raise GMemError(f"{where} has the keys {first_three(twice)} twice", key=twice[0])
    with np.errstate(over="ignore"):  # what float32 cannot hold is named below
        snippets = np.asarray(given.snippets, np.float32)
    reasons = unusable_rows(snippets, bank.space)
    if reasons:
        row = min(reasons)
        raise GMemError(f"row {row} of {where} (key {given.keys[row]!r}): {reasons[row]}", key=given.keys[row], row=row)
    return to_space(snippets, bank.space)


def concept_of_rows(
    bank_path: PathLike,
    name: str,
    selection: Selection,
    *,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Make a concept of rows that are in the bank already: no row is added.

    Args:
        bank_path: the bank.
        name: the concept's name.
        selection: which rows.
        output, dry_run, undo: as `insert_concept`.

    Raises:
        ConceptExistsError: the name is taken.
        ConfigError, UnknownKeyError: as `rows_selected`.
    """
    concept = check_concept_name(name)
    arguments = {"name": concept, "rows": selection.to_json()}
    with editing(bank_path, "insert-concept", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None and concept in edit.made.names:
            return edit.unchanged(concept=concept)
        require_new_concept(edit.bank, concept)
        rows = rows_selected(edit.bank, selection)
        draft = edit.draft()
        draft.set_concepts(draft.concepts() | {concept: rows})
        return edit.finish(draft, num_rows=len(rows), concept=concept, details={"num_tagged": len(rows)})
