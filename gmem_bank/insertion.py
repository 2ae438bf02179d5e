"""Insert a concept: encode its images and append them to the bank as one segment.

Shapes: N rows of the old bank, n new rows, D dimensions.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gmem_bank import bank as bank_module
from gmem_bank import keys as key_tables
from gmem_bank import segments
from gmem_bank.bank import MemoryBank
from gmem_bank.builder import DEFAULT_BATCH_SIZE, staging_folder
from gmem_bank.encoders import Encoder, require_same_encoder
from gmem_bank.errors import ConceptExistsError, ConfigError, GMemError, first_three
from gmem_bank.ops import (
    EditReport,
    check_concept_name,
    edit_target,
    require_new_keys,
    result_of,
    stored_dtype,
    taken_message,
)
from gmem_bank.progress import Progress, no_progress
from gmem_bank.rewrite import append_segment
from gmem_bank.sources import Listing, list_images
from gmem_bank.space import to_space
from gmem_bank.staging import Encoded, encode_listings
from gmem_bank.storage import atomic

SAME_COSINE = 0.9999
"""Two encodings of one image agree at least this well, whatever the batch it was in."""


def insert_concept(
    bank_path: str | os.PathLike[str],
    images: Sequence[str | os.PathLike[str]],
    encoder: Encoder,
    *,
    name: str | None = None,
    output: str | os.PathLike[str] | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    progress: Progress = no_progress,
) -> EditReport:
    """Add images to a bank as a new concept: one new segment, old ones byte for byte as they were.

    The same call again continues after a kill, and does nothing where the concept is there already with the same images.

    Args:
        bank_path: the bank.
        images: folders of images, or image files.
        encoder: the one that made the bank (`reload_encoder`).
        name: the concept's name; default: the name of the only folder.
        output: bank file to write; default: replace the bank.
        batch_size: images per call of the encoder.
        progress: told images done and images in all.

    Raises:
        ConceptExistsError: the name is taken by other images.
        EncoderMismatchError: the encoder did not make the bank; both are named.
        SourceError: no usable image.
    """
    target = edit_target(bank_path, output)
    concept = _concept_name(images, name)
    with atomic.locked(target):
        bank = bank_module.open(bank_path)
        require_same_encoder(encoder.spec, bank.encoder)
        listings = [list_images(path, prefix=f"{concept}/") for path in images]
        _require_unique(listings)
        staging = staging_folder(target, "insert")
        made = result_of(bank, target, "insert-concept", {"name": concept})
        there = made if made is not None else bank
        if concept in there.names:
            return _already_inserted(there, concept, listings, encoder, staging, batch_size)
        require_new_keys(bank, [item.key for listing in listings for item in listing.items])
        encoded = encode_listings(listings, encoder, staging_folder=staging, batch_size=batch_size, progress=progress)
        keys = [item.key for item in encoded.items]
        sources = [
            listing.to_source(target.parent, digest) for listing, digest in zip(listings, encoded.digests, strict=True)
        ]
        entry = {"operation": "insert-concept", "arguments": {"name": concept}, "num_rows": len(keys)}
        snippets = segments.snippet_payload(encoded.blocks, len(keys), bank.dim, stored_dtype(bank))
        header = append_segment(bank, target, concept, keys, sources, encoded.listing_ids, snippets, entry)
        encoded.staging.discard()
    skipped = [*encoded.skipped, *(ignored for listing in listings for ignored in listing.ignored)]
    return EditReport(
        operation="insert-concept",
        bank=str(bank_path),
        output=str(target),
        concept=concept,
        num_added=len(keys),
        num_rows=header.num_rows,
        skipped=[entry.to_json() for entry in skipped],
        keys=keys,
        fingerprint=header.fingerprint,
    )


def _concept_name(images: Sequence[str | os.PathLike[str]], name: str | None) -> str:
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
    bank: MemoryBank, concept: str, listings: Sequence[Listing], encoder: Encoder, staging: Path, batch_size: int
) -> EditReport:
    """Report a concept that holds these very images already, or refuse the name."""
    keys = [item.key for listing in listings for item in listing.items]
    recorded = [source.digest for source in bank.sources if source.prefix == f"{concept}/"]
    if recorded:
        same = recorded == [listing.content_digest() for listing in listings]
    else:  # a class folder of the build: the images have no source of their own, so their snippets are compared
        same = set(bank.keys(bank.all_rows_of(concept))) <= set(keys)
        same = same and _same_rows(bank, concept, listings, encoder, staging, batch_size)
    if not same:
        raise ConceptExistsError(taken_message(bank, concept), path=bank.path, key=concept)
    shutil.rmtree(staging, ignore_errors=True)  # of the run that was killed after its last write
    present = {key for key, row in zip(keys, bank.find_rows(keys).tolist(), strict=True) if row >= 0}
    skipped = [{"path": key, "reason": "it gave no row when it was inserted"} for key in keys if key not in present]
    return EditReport(
        operation="insert-concept",
        bank=str(bank.path),
        output=str(bank.path),
        concept=concept,
        num_rows=len(bank),
        skipped=skipped,
        keys=bank.keys(bank.all_rows_of(concept)),
        fingerprint=bank.fingerprint,
        unchanged=True,
    )


def _same_rows(
    bank: MemoryBank, concept: str, listings: Sequence[Listing], encoder: Encoder, staging: Path, batch_size: int
) -> bool:
    encoded: Encoded = encode_listings(
        listings, encoder, staging_folder=staging, batch_size=batch_size, progress=no_progress
    )
    try:
        rows, stored = bank.find_rows([item.key for item in encoded.items]), bank.all_rows_of(concept)
        if not np.array_equal(np.sort(rows), stored) or not np.isin(rows, bank.rows()).all():
            return False
        there = to_space(bank.snippets(rows), "unit")
        here = to_space(np.concatenate(list(encoded.blocks())), "unit")
        return bool(((there * here).sum(axis=1) >= SAME_COSINE).all())
    finally:
        encoded.staging.discard()
