"""Insert a concept: images that are encoded, snippets from an array, or rows that are there already.

Shapes: N rows of the old bank, n new rows, D dimensions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.arrays import ArrayRows
from gmem_bank.bank import MemoryBank
from gmem_bank.builder import DEFAULT_BATCH_SIZE, staging_folder
from gmem_bank.derive import append_rows, require_new_concept, require_new_keys, taken_message
from gmem_bank.draft import NewRows
from gmem_bank.editing import Edit, EditReport, editing
from gmem_bank.encoders import Encoder, require_same_encoder
from gmem_bank.errors import (
    ConceptExistsError,
    ConfigError,
    EncoderMismatchError,
    GMemError,
    MissingDependencyError,
    first_three,
)
from gmem_bank.novelty import SAMPLE_ROWS, compare_with_bank
from gmem_bank.ops import PathLike, check_concept_name
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Source, relative_to_bank
from gmem_bank.rewrite import join_if_many
from gmem_bank.selection import Selection, rows_selected
from gmem_bank.sources import Listing, with_flips
from gmem_bank.space import to_space, unusable_rows
from gmem_bank.staging import Encoded, discard_own, encode_in_memory, encode_listings
from gmem_bank.tars import list_source
from gmem_bank.vectors import new_vectors

SAME_COSINE = 0.9999
"""Two encodings of one image agree at least this well, whatever the batch it was in."""


def insert_concept(
    bank_path: PathLike,
    images: Sequence[PathLike],
    encoder: Encoder,
    *,
    name: str | None = None,
    flip: bool = False,
    report: bool | None = None,
    grow_below: float | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    num_workers: int | None = None,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
    progress: Progress = no_progress,
) -> EditReport:
    """Add images to a bank as a new concept: one new segment, old ones byte for byte as they were.

    The same call again continues after a kill, and does nothing where the concept is there already with the same images.

    Args:
        bank_path: the bank.
        images: folders of images, or image files.
        encoder: the one that made the bank (`reload_encoder`).
        name: the concept's name; default: the name of the only folder.
        flip: add a mirrored twin of each image, under its key with "#flip".
        report: compare the new rows with the bank (`details["novelty"]`); None: where the bank has at most 50,000 active rows
            and FAISS is installed; True on a larger one compares with a sample of that many.
        grow_below: factored banks only: cosine that each new snippet's reconstruction must reach, else the basis grows; None
            takes the bank's own, -1 never grows it.
        batch_size: images per call of the encoder.
        num_workers: as in `build`.
        output: bank file to write; default: replace the bank.
        dry_run: list the images and check names, but encode and write nothing.
        undo: keep what `undo` needs; False also deletes what was kept for earlier edits.
        progress: told images done and images in all.

    Raises:
        ConceptExistsError: the name is taken by other images.
        EncoderMismatchError: the encoder did not make the bank; both are named.
        SourceError: no usable image.
    """
    concept = _concept_name(images, name)
    with editing(bank_path, "insert-concept", {"name": concept}, output=output, dry_run=dry_run, undo=undo) as edit:
        require_same_encoder(encoder.spec, edit.bank.encoder)
        listings = [list_source(os.fspath(path), prefix=f"{concept}/") for path in images]
        listings = [with_flips(listing) for listing in listings] if flip else listings
        _require_unique(listings)
        staging = staging_folder(edit.target, "insert")
        there = edit.made if edit.made is not None else edit.bank
        if concept in there.names:
            result = _already_inserted(edit, there, concept, listings, encoder, batch_size)
            if not dry_run:
                discard_own(staging, listings, encoder, batch_size)  # of this very insert, killed after its last write
            return result
        planned = [item.key for listing in listings for item in listing.items]
        require_new_keys(edit.bank, planned)
        if dry_run:
            return edit.unchanged(concept=concept, num_added=len(planned), unchanged=False, keys=planned)
        encoded = encode_listings(
            listings, encoder, staging_folder=staging, batch_size=batch_size, num_workers=num_workers, progress=progress
        )
        result = _append_encoded(edit, concept, listings, encoded, report, grow_below)
        encoded.staging.discard()
    return result


def _append_encoded(
    edit: Edit,
    concept: str,
    listings: Sequence[Listing],
    encoded: Encoded,
    report: bool | None,
    grow_below: float | None,
) -> EditReport:
    keys = [item.key for item in encoded.items]
    draft = edit.draft()
    first_source = len(draft.sources)
    draft.sources += [
        listing.to_source(edit.target.parent, digest) for listing, digest in zip(listings, encoded.digests, strict=True)
    ]
    vectors, details = new_vectors(draft, encoded.blocks, len(keys), grow_below=grow_below)
    if _wants_report(edit.bank, report):
        details["novelty"] = compare_with_bank(edit.bank, np.concatenate(list(encoded.blocks())), keys)
    draft.append(NewRows.of(keys, encoded.listing_ids + first_source, vectors), concept)
    join_if_many(draft)
    skipped = [*encoded.skipped, *(ignored for listing in listings for ignored in listing.ignored)]
    return edit.finish(
        draft, num_rows=len(keys), concept=concept, num_added=len(keys), keys=keys, details=details,
        skipped=[entry.to_json() for entry in skipped],
    )  # fmt: skip


def _wants_report(bank: MemoryBank, report: bool | None) -> bool:
    if report is not None:
        return report and len(bank.rows()) > 0
    if not 0 < len(bank.rows()) <= SAMPLE_ROWS:
        return False
    try:
        from gmem_bank.index import require_faiss

        require_faiss()
    except MissingDependencyError:
        return False
    return True


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
        novelty = {"novelty": compare_with_bank(edit.bank, snippets, keys)} if _wants_report(edit.bank, report) else {}
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


def _concept_name(images: Sequence[PathLike], name: str | None) -> str:
    if not images:
        raise ConfigError("give at least one folder or image to insert")
    if name is None and len(images) > 1:
        raise ConfigError("several folders or images need a name for the concept: --name NAME")
    if name is not None:
        return check_concept_name(name)
    only = Path(images[0]).resolve()
    return check_concept_name(only.name if only.is_dir() or not only.suffix else only.stem)


def _require_unique(listings: Sequence[Listing]) -> None:
    keys = [item.key for listing in listings for item in listing.items]
    twice = key_tables.duplicates(keys)
    if twice:
        raise GMemError(
            f"the images give {len(twice)} keys twice, such as {first_three(twice)}: insert them under different names"
        )


def _already_inserted(
    edit: Edit, bank: MemoryBank, concept: str, listings: Sequence[Listing], encoder: Encoder, batch_size: int
) -> EditReport:
    """Report a concept that holds these very images already, or refuse the name."""
    keys = [item.key for listing in listings for item in listing.items]
    recorded = [source.digest for source in bank.sources if source.prefix == f"{concept}/"]
    present = {key for key, row in zip(keys, bank.find_rows(keys).tolist(), strict=True) if row >= 0}
    if recorded:
        same = recorded == [listing.content_digest() for listing in listings]
        same = same and len(present) == _num_inserted(bank, concept)
    else:  # a class folder of the build: the images have no source of their own, so their snippets are compared
        same = set(bank.keys(bank.all_rows_of(concept))) <= set(keys)
        same = same and (edit.dry_run or _same_rows(bank, concept, listings, encoder, batch_size))
    if not same:
        raise ConceptExistsError(taken_message(bank, concept), path=bank.path, key=concept)
    skipped = [{"path": key, "reason": "it gave no row when it was inserted"} for key in keys if key not in present]
    facts: dict[str, Any] = {"skipped": skipped, "keys": bank.keys(bank.all_rows_of(concept))}
    return edit.unchanged(concept=concept, output=str(bank.path), **facts)


def _num_inserted(bank: MemoryBank, concept: str) -> int:
    """Return how many rows the last insert of a concept added, by the history."""
    made = [
        entry for entry in bank.history
        if entry["operation"] == "insert-concept" and entry.get("arguments", {}).get("name") == concept
    ]  # fmt: skip
    return int(made[-1].get("num_rows", -1)) if made else -1


def _same_rows(bank: MemoryBank, concept: str, listings: Sequence[Listing], encoder: Encoder, batch_size: int) -> bool:
    """Say whether the images give the very snippets that the concept has; nothing is written for it."""
    parts = [encode_in_memory(own, encoder, batch_size=batch_size, progress=no_progress) for own in listings]
    keys = [item.key for items, _, _ in parts for item in items]
    rows, stored = bank.find_rows(keys), bank.all_rows_of(concept)
    if not np.array_equal(np.sort(rows), stored) or not np.isin(rows, bank.rows()).all():
        return False
    there = to_space(bank.snippets(rows), "unit")
    here = to_space(np.concatenate([snippets for _, snippets, _ in parts]), "unit")
    return bool(((there * here).sum(axis=1) >= SAME_COSINE).all())
