"""Operations on rows and concepts that are there: remove, select, mask, rename. Each gives a new bank, with one history entry.

Shapes: N rows of the old bank, n rows concerned.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from gmem_bank import refitting
from gmem_bank.draft import Draft
from gmem_bank.editing import Edit, EditReport, editing
from gmem_bank.errors import ConceptExistsError, ConfigError, UnknownKeyError, suggest
from gmem_bank.naming import concept_name_problem
from gmem_bank.provenance import Json
from gmem_bank.selection import Selection, rows_selected
from gmem_bank.threads import one_thread_a_product

PathLike = str | os.PathLike[str]
MAX_NAME_BYTES = 255
"""Of a new concept: a name is a folder's."""


def check_concept_name(name: str) -> str:
    """Return the name; raises ConfigError where it cannot be one (empty, a path, control characters)."""
    problem = concept_name_problem(name)
    if len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES:
        problem = f"has more than {MAX_NAME_BYTES} bytes"
    if problem:
        raise ConfigError(f"{name[:60]!r} cannot name a concept, it {problem}: give a plain word with --name", key=name)
    return name


def remove_concept(
    bank_path: PathLike,
    name: str,
    *,
    refit: bool = False,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Delete a concept and its rows; the rows after them move up, keys stay.

    On a factored bank the basis stays as it is, and the history says so, unless `refit` is asked for.

    Args:
        bank_path: the bank.
        name: the concept.
        refit: factored banks: fit basis, mean and all coefficients anew to the rows that are left, so that directions
            that only the removed rows used are gone from the file (with `undo` False, from what was kept too).
        output: bank file to write; default: replace the bank.
        dry_run: write nothing, and report what would be done.
        undo: keep the bank as it was for `undo`; False also deletes what was kept for earlier edits.

    Raises:
        UnknownKeyError: no such concept; the nearest names are offered.
        GMemError: no row would be left.
    """
    arguments = {"name": name, **({"refit": True} if refit else {})}
    with editing(bank_path, "remove-concept", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None and name not in edit.made.names:
            refitting.clear(edit.target)  # of this very command, killed after its last write
            return edit.unchanged(concept=name)
        doomed = edit.bank.all_rows_of(name)
        return _without(edit, doomed, refit, concept=name)


def remove(
    bank_path: PathLike,
    selection: Selection,
    *,
    refit: bool = False,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Delete rows by key, pattern, concept or at random; keys of the others stay.

    Args:
        bank_path: the bank.
        selection: which rows.
        refit, output, dry_run, undo: as `remove_concept`.

    Raises:
        ConfigError, UnknownKeyError: as `rows_selected`; or a dense bank is to be refitted.
        GMemError: no row would be left.
    """
    arguments = {**selection.to_json(), **({"refit": True} if refit else {})}
    with editing(bank_path, "remove", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None:
            refitting.clear(edit.target)
            return edit.unchanged()
        return _without(edit, rows_selected(edit.bank, selection), refit)


def _without(edit: Edit, doomed: NDArray[np.int64], refit: bool, *, concept: str | None = None) -> EditReport:
    if refit:
        refitting.require_factored(edit.bank)
    keep = np.ones(len(edit.bank), np.bool_)
    keep[doomed] = False
    draft = edit.draft()
    dropped = [name for name in draft.keep(keep) if name != concept]
    try:
        basis = _refitted(draft, write=not edit.dry_run) if refit else _basis_stays(draft)
        noted = {"basis": basis["basis"]} if basis else {}
        basis |= {"num_active": int(draft.active().sum())}
        return edit.finish(
            draft, num_rows=len(doomed), concept=concept, num_removed=len(doomed), dropped_concepts=dropped,
            details=basis, noted=noted,
        )  # fmt: skip
    finally:
        if refit and not edit.dry_run:
            refitting.clear(edit.target)


def _refitted(draft: Draft, *, write: bool) -> dict[str, Json]:
    with one_thread_a_product():
        return refitting.refit(draft, write=write)


def _basis_stays(draft: Draft) -> dict[str, Json]:
    return {"basis": "kept"} if draft.bank.header.kind == "factored" else {}


def select(
    bank_path: PathLike,
    selection: Selection,
    *,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Keep only some rows: by key, pattern, concept or at random.

    Args:
        bank_path: the bank.
        selection: which rows stay.
        output, dry_run, undo: as `remove_concept`.

    Raises:
        ConfigError, UnknownKeyError: as `rows_selected`.
    """
    with editing(bank_path, "select", selection.to_json(), output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None:
            return edit.unchanged()
        return keep_only(edit, rows_selected(edit.bank, selection))


def keep_only(edit: Edit, rows: NDArray[np.int64], **details: object) -> EditReport:
    """Finish an edit that keeps only some rows."""
    keep = np.zeros(len(edit.bank), np.bool_)
    keep[rows] = True
    draft = edit.draft()
    dropped = draft.keep(keep)
    return edit.finish(
        draft, num_rows=len(rows), num_removed=len(edit.bank) - len(rows), dropped_concepts=dropped,
        details=_basis_stays(draft) | details, noted=_basis_stays(draft),
    )  # fmt: skip


def mask(
    bank_path: PathLike,
    selection: Selection,
    *,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Hide rows: they stay in the bank, and everything that reads it passes them over until `unmask`.

    Args:
        bank_path: the bank.
        selection: which rows.
        output, dry_run, undo: as `remove_concept`.

    Raises:
        ConfigError: no row would be left active, or as `rows_selected`.
        UnknownKeyError: as `rows_selected`.
    """
    return _switch("mask", bank_path, selection, False, output, dry_run, undo)


def unmask(
    bank_path: PathLike,
    selection: Selection | None = None,
    *,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Show hidden rows again; without a selection all of them.

    Args, Raises: as `mask`.
    """
    return _switch("unmask", bank_path, selection, True, output, dry_run, undo)


def _switch(
    operation: str, bank_path: PathLike, selection: Selection | None, on: bool, output: PathLike | None, dry_run: bool,
    keep_undo: bool,
) -> EditReport:  # fmt: skip
    arguments = {"all": True} if selection is None else selection.to_json()
    with editing(bank_path, operation, arguments, output=output, dry_run=dry_run, undo=keep_undo) as edit:
        rows = np.arange(len(edit.bank)) if selection is None else rows_selected(edit.bank, selection)
        draft = edit.draft()
        active = draft.active()
        changed = rows[active[rows] != on]
        if edit.made is not None or (not len(changed) and edit.in_place):
            return edit.unchanged()
        active[changed] = on
        if not active.any():
            raise ConfigError(f"{edit.bank.path}: no row would be left active")
        draft.set_active(active)
        details = {"num_changed": len(changed), "num_active": int(active.sum())}
        return edit.finish(draft, num_rows=len(changed), details=details)


def rename(
    bank_path: PathLike, name: str, to: str, *, output: PathLike | None = None, dry_run: bool = False, undo: bool = True
) -> EditReport:
    """Give a concept another name; its rows keep their keys.

    Args:
        bank_path: the bank.
        name: the concept.
        to: its new name.
        output, dry_run, undo: as `remove_concept`.

    Raises:
        UnknownKeyError: no such concept.
        ConceptExistsError: the new name is taken.
        ConfigError: the new name cannot be one.
    """
    check_concept_name(to)
    with editing(bank_path, "rename", {"name": name, "to": to}, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None and to in edit.made.names:
            return edit.unchanged(concept=to)
        draft = edit.draft()
        concepts = draft.concepts()
        if name not in concepts:
            raise UnknownKeyError(
                f"{edit.bank.path} has no concept {name!r}.{suggest(name, concepts)}", path=edit.bank.path, key=name
            )
        if to in concepts:
            raise ConceptExistsError(f"{edit.bank.path} already has a concept {to!r}", path=edit.bank.path, key=to)
        draft.set_concepts({to if old == name else old: rows for old, rows in concepts.items()})
        return edit.finish(draft, num_rows=len(concepts[name]), concept=to)
