"""New rows by arithmetic on rows that are there: interpolate, compose.

Shapes: n new rows, D dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.draft import NewRows
from gmem_bank.editing import Edit, EditReport, editing
from gmem_bank.errors import ConceptExistsError, first_three
from gmem_bank.mixing import Resolve, check_way, compose_snippet, interpolate_snippets, read_terms
from gmem_bank.ops import PathLike, check_concept_name
from gmem_bank.provenance import Json, Source, sha256_of_file
from gmem_bank.resolving import snippet_of
from gmem_bank.rewrite import join_if_many
from gmem_bank.vectors import new_vectors


def interpolate(
    bank_path: PathLike,
    first: str,
    second: str,
    *,
    method: str = "slerp",
    steps: int = 6,
    name: str | None = None,
    seed: int = 0,
    resolve: Resolve = snippet_of,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Write the way from one snippet to another as rows of a new concept.

    Args:
        bank_path: the bank.
        first: key of a row, or a concept (its mean snippet), or what else `resolve` takes; t = 0.
        second: the same; t = 1.
        method: "linear", "slerp", "concat" or "mask".
        steps: rows to write, both ends included; at least 2.
        name: the new concept; default "<first>-to-<second>".
        seed: for "mask".
        resolve: what turns `first` and `second` into snippets; default: keys and concepts.
        output: bank file to write; default: replace the bank.
        dry_run: write nothing, and report what would be done.
        undo: keep what `undo` needs.

    Raises:
        UnknownKeyError: neither a concept nor a key.
        ConceptExistsError: the name is taken.
        ConfigError: unknown method, or fewer than two steps.
    """
    check_way(method, steps, seed)
    concept = check_concept_name(name if name is not None else f"{_label(first)}-to-{_label(second)}")
    arguments = {"first": first, "second": second, "method": method, "steps": steps, "name": concept, "seed": seed}
    arguments |= _images_of((first, second), resolve)

    def way(bank: MemoryBank) -> NDArray[np.float32]:
        return interpolate_snippets(bank, first, second, method=method, steps=steps, seed=seed, resolve=resolve)

    return _derived("interpolate", arguments, bank_path, concept, way, output=output, dry_run=dry_run, undo=undo)


def compose(
    bank_path: PathLike,
    terms: str | Mapping[str, float],
    *,
    name: str | None = None,
    resolve: Resolve = snippet_of,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Write a weighted sum of snippets, Σ wᵢ·sᵢ, as the one row of a new concept.

    Args:
        bank_path: the bank.
        terms: "cat + 0.5*neon - dog", or {"cat": 1.0, "neon": 0.5, "dog": -1.0}; items as in `interpolate`.
        name: the new concept; default: the expression without what a name cannot hold.
        resolve, output, dry_run, undo: as `interpolate`.

    Raises:
        ConfigError: the expression cannot be read.
        UnknownKeyError: an item is neither a concept nor a key.
        ConceptExistsError: the name is taken.
        GMemError: the sum has no direction.
    """
    weights, text = read_terms(terms)
    concept = check_concept_name(name if name is not None else _label(re.sub(r"\s+", "", text)))

    def total(bank: MemoryBank) -> NDArray[np.float32]:
        return compose_snippet(bank, terms, resolve=resolve)[None]

    arguments = {"terms": weights, "name": concept, **_images_of(weights, resolve)}
    return _derived("compose", arguments, bank_path, concept, total, output=output, dry_run=dry_run, undo=undo)


def _images_of(items: Iterable[str], resolve: Resolve) -> dict[str, Json]:
    """Return, for the history, the hashes of image files among the items: another picture of that name is another edit."""
    if resolve is snippet_of:
        return {}
    found = {item: sha256_of_file(item) for item in items if Path(item).is_file()}
    return {"images": found} if found else {}


def _derived(
    operation: str, arguments: Mapping[str, Json], bank_path: PathLike, concept: str,
    compute: Callable[[MemoryBank], NDArray[np.float32]], **options: object,
) -> EditReport:  # fmt: skip
    with editing(bank_path, operation, arguments, **options) as edit:  # type: ignore[arg-type]
        if edit.made is not None and concept in edit.made.names:
            return edit.unchanged(concept=concept)
        require_new_concept(edit.bank, concept)
        points = compute(edit.bank)
        keys = [f"{concept}/{step:0{len(str(len(points) - 1))}d}" for step in range(len(points))]
        source = Source(kind="derived", prefix=f"{concept}/")
        return append_rows(edit, concept, keys, points, [source])


def append_rows(
    edit: Edit, concept: str, keys: Sequence[str], snippets: NDArray[np.float32], sources: Sequence[Source],
    details: Mapping[str, Json] | None = None,
    grow_below: float | None = None,
) -> EditReport:  # fmt: skip
    """Finish an edit that appends (n, D) snippets in the bank's space as a new concept, all from the first of the sources."""
    require_new_keys(edit.bank, keys)
    draft = edit.draft()
    place = np.full(len(keys), len(draft.sources), np.int64)
    draft.sources += sources
    vectors, kept = new_vectors(draft, lambda: [snippets], len(keys), grow_below=grow_below)
    draft.append(NewRows.of(keys, place, vectors), concept)
    join_if_many(draft)
    return edit.finish(
        draft,
        num_rows=len(keys),
        concept=concept,
        num_added=len(keys),
        keys=list(keys),
        details=kept | dict(details or {}),
    )


def _label(item: str) -> str:
    """Return what an item is called in the name of a concept: of a file its name, else no slashes."""
    path = Path(item)
    return path.name if len(path.parts) > 1 and path.exists() else item.replace("/", "_").replace("\\", "_")


def require_new_keys(bank: MemoryBank, keys: Sequence[str]) -> None:
    """Raise ConceptExistsError where the bank has one of the keys."""
    taken = [key for key, row in zip(keys, bank.find_rows(keys), strict=True) if row >= 0]
    if taken:
        raise ConceptExistsError(
            f"{bank.path} already has rows with key {first_three(taken)}: choose another --name", key=taken[0]
        )


def require_new_concept(bank: MemoryBank, concept: str) -> None:
    """Raise ConceptExistsError where the concept's name is taken."""
    if concept in bank.names:
        raise ConceptExistsError(taken_message(bank, concept), path=bank.path, key=concept)


def taken_message(bank: MemoryBank, concept: str) -> str:
    """Return what to say where a concept's name is taken."""
    return (
        f"{bank.path} already has a concept {concept!r} ({len(bank.all_rows_of(concept))} rows): choose another --name, or "
        f"remove it first with 'gmem-bank remove-concept {concept} --bank {bank.path}'"
    )
