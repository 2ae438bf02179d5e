"""Insert a concept: images that are encoded, snippets from an array, or rows that are there already.

Shapes: N rows of the old bank, n new rows, D dimensions.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gmem_bank import keys as key_tables
from gmem_bank.bank import MemoryBank
from gmem_bank.batch_size import AUTO, BatchSize, resumed
from gmem_bank.builder import staging_folder
from gmem_bank.columns import Columns
from gmem_bank.contents import content_digest, list_source
from gmem_bank.derive import require_new_keys, taken_message
from gmem_bank.draft import NewRows
from gmem_bank.editing import Edit, EditReport, editing
from gmem_bank.encoders import Encoder, require_same_encoder
from gmem_bank.encoding import Encoded, encode_in_memory, encode_listings
from gmem_bank.errors import (
    ConceptExistsError,
    ConfigError,
    GMemError,
    first_three,
)
from gmem_bank.listing import Listing, to_report
from gmem_bank.novelty import compare_with_bank, wants_report
from gmem_bank.ops import PathLike, check_concept_name
from gmem_bank.progress import Progress, no_progress
from gmem_bank.rewrite import join_if_many
from gmem_bank.space import to_space
from gmem_bank.staging import discard_own, make_plan
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
    columns: Columns | None = None,
    report: bool | None = None,
    grow_below: float | None = None,
    batch_size: BatchSize = AUTO,
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
        images: folders of images, image files, or other sources as `build` takes them.
        encoder: the one that made the bank (`reload_encoder`).
        name: the concept's name; default: the name of the only folder.
        flip: add a mirrored twin of each image, under its key with "#flip".
        columns: of arrays of pixels and tables: which columns to take.
        report: compare the new rows with the bank (`details["novelty"]`); None: where the bank has at most 50,000 active rows
            and FAISS is installed; True on a larger one compares with a sample of that many.
        grow_below: factored banks only: cosine that each new snippet's reconstruction must reach, else the basis grows; None
            takes the bank's own, -1 never grows it.
        batch_size: images per call of the encoder; "auto" is the encoder's own choice.
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
        listings = [list_source(os.fspath(path), prefix=f"{concept}/", columns=columns) for path in images]
        if flip:
            listings = [replace(listing, items=listing.items.with_flips()) for listing in listings]
        _require_unique(listings)
        staging = staging_folder(edit.target, "insert")
        size = resumed(batch_size, encoder, staging, lambda _: listings)
        there = edit.made if edit.made is not None else edit.bank
        if concept in there.names:
            result = _already_inserted(edit, there, concept, listings, encoder, size)
            if not dry_run:
                discard_own(
                    staging, make_plan(listings, encoder, size)
                )  # of this very insert, killed after its last write
            return result
        planned = [key for listing in listings for key in listing.items.all_keys()]
        require_new_keys(edit.bank, planned)
        if dry_run:
            return edit.unchanged(concept=concept, num_added=len(planned), unchanged=False, keys=planned)
        encoded = encode_listings(
            listings, encoder, staging_folder=staging, batch_size=size, num_workers=num_workers, progress=progress
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
    keys = encoded.keys
    draft = edit.draft()
    first_source = len(draft.sources)
    draft.sources += [
        listing.to_source(edit.target.parent, digest) for listing, digest in zip(listings, encoded.digests, strict=True)
    ]
    vectors, details = new_vectors(draft, encoded.blocks, len(keys), grow_below=grow_below)
    if wants_report(edit.bank, report):
        details["novelty"] = compare_with_bank(edit.bank, np.concatenate(list(encoded.blocks())), keys)
    draft.append(NewRows.of(keys, encoded.listing_ids + first_source, vectors), concept)
    join_if_many(draft)
    skipped = [*encoded.skipped, *(ignored for listing in listings for ignored in listing.ignored)]
    return edit.finish(
        draft, num_rows=len(keys), concept=concept, num_added=len(keys), keys=keys, details=details,
        skipped=to_report(skipped),
    )  # fmt: skip


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
    keys = [key for listing in listings for key in listing.items.all_keys()]
    twice = key_tables.duplicates(keys)
    if twice:
        raise GMemError(
            f"the images give {len(twice)} keys twice, such as {first_three(twice)}: insert them under different names"
        )


def _already_inserted(
    edit: Edit, bank: MemoryBank, concept: str, listings: Sequence[Listing], encoder: Encoder, batch_size: int
) -> EditReport:
    """Report a concept that holds these very images already, or refuse the name."""
    keys = [key for listing in listings for key in listing.items.all_keys()]
    recorded = [source.digest for source in bank.sources if source.prefix == f"{concept}/"]
    present = {key for key, row in zip(keys, bank.find_rows(keys).tolist(), strict=True) if row >= 0}
    if recorded:
        same = recorded == [content_digest(listing) for listing in listings]
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
