"""Operations on a bank: each makes a new file from an old one, atomically, with one entry in its history.

Shapes: N rows of the old bank, n new rows, D dimensions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import bank as bank_module
from gmem_bank import keys as key_tables
from gmem_bank import manipulate, segments
from gmem_bank.bank import MemoryBank
from gmem_bank.builder import DEFAULT_BATCH_SIZE, staging_folder
from gmem_bank.encoders import Encoder, require_same_encoder
from gmem_bank.errors import ConceptExistsError, ConfigError, GMemError, OutputExistsError, first_three, suggest
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json, Source
from gmem_bank.query import snippet_of
from gmem_bank.rewrite import append_segment, concepts_after, keep_rows
from gmem_bank.sources import Listing, list_images
from gmem_bank.space import to_space, unusable_rows
from gmem_bank.staging import Encoded, encode_listings
from gmem_bank.storage import atomic, require_known_suffix

SAME_COSINE = 0.9999
"""Two encodings of one image agree at least this well, whatever the batch it was in."""


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """What an operation did."""

    operation: str
    bank: str
    output: str
    concept: str | None
    num_added: int = 0
    num_removed: int = 0
    num_rows: int
    """Rows of the bank afterwards."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Files that gave no row: path and reason."""
    keys: list[str] = field(default_factory=list)
    """Keys of the new rows."""
    dropped_concepts: list[str] = field(default_factory=list)
    """Other concepts that lost their last row."""
    fingerprint: str
    unchanged: bool = False
    """True: the bank already was what the operation makes."""

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def check_concept_name(name: str) -> str:
    """Return the name; raises ConfigError where it cannot be one (empty, a path, control characters)."""
    if not name.strip() or name in (".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ConfigError(
            f"{name!r} cannot name a concept: use a plain word without slashes or control characters (--name)", key=name
        )
    return name


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
    target = _target(bank_path, output)
    concept = _concept_name(images, name)
    with atomic.locked(target):
        bank = bank_module.open(bank_path)
        require_same_encoder(encoder.spec, bank.encoder)
        listings = [list_images(path, prefix=f"{concept}/") for path in images]
        _require_unique(listings)
        if concept in bank.concepts:
            return _already_inserted(bank, concept, listings, encoder, target, batch_size)
        _require_new_keys(bank, [item.key for listing in listings for item in listing.items])
        staging = staging_folder(target, "insert")
        encoded = encode_listings(listings, encoder, staging_folder=staging, batch_size=batch_size, progress=progress)
        keys = [item.key for item in encoded.items]
        sources = [listing.to_source(target.parent) for listing in listings]
        entry = {"operation": "insert-concept", "arguments": {"name": concept}, "num_rows": len(keys)}
        dtype = _stored_dtype(bank)
        snippets = segments.snippet_payload(encoded.blocks, len(keys), bank.dim, dtype)
        header = append_segment(bank, target, concept, keys, sources, encoded.listing_ids, snippets, entry)
        encoded.staging.discard()
    skipped = [*encoded.skipped, *(ignored for listing in listings for ignored in listing.ignored)]
    return EditReport(
        operation="insert-concept", bank=str(bank_path), output=str(target), concept=concept, num_added=len(keys),
        num_rows=header.num_rows, skipped=[entry.to_json() for entry in skipped], keys=keys,
        fingerprint=header.fingerprint,
    )  # fmt: skip


def remove_concept(
    bank_path: str | os.PathLike[str], name: str, *, output: str | os.PathLike[str] | None = None
) -> EditReport:
    """Delete a concept and its rows; the rows after them move up, keys stay.

    Args:
        bank_path: the bank.
        name: the concept.
        output: bank file to write; default: replace the bank.

    Raises:
        UnknownKeyError: no such concept; the nearest names are offered.
        GMemError: no row would be left.
    """
    target = _target(bank_path, output)
    with atomic.locked(target):
        bank = bank_module.open(bank_path)
        doomed = bank.all_rows_of(name)
        keep = np.ones(len(bank), np.bool_)
        keep[doomed] = False
        if not keep.any():
            raise GMemError(
                f"{bank.path}: {name!r} holds every row, and a bank must keep at least one: delete the file instead"
            )
        concepts = concepts_after(bank, keep, without=name)
        dropped = [other for other in bank.concepts if other != name and other not in concepts]
        entry = {"operation": "remove-concept", "arguments": {"name": name}, "num_rows": len(doomed)}
        header = keep_rows(bank, target, keep, concepts, entry)
    return EditReport(
        operation="remove-concept", bank=str(bank_path), output=str(target), concept=name, num_removed=len(doomed),
        num_rows=header.num_rows, dropped_concepts=dropped, fingerprint=header.fingerprint,
    )  # fmt: skip


def interpolate(
    bank_path: str | os.PathLike[str],
    first: str,
    second: str,
    *,
    method: str = "slerp",
    steps: int = 6,
    name: str | None = None,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
) -> EditReport:
    """Write the way from one snippet to another as rows of a new concept.

    Args:
        bank_path: the bank.
        first: key of a row, or a concept (its mean snippet); t = 0.
        second: the same; t = 1.
        method: "linear", "slerp", "concat" or "mask".
        steps: rows to write, both ends included; at least 2.
        name: the new concept; default "<first>-to-<second>".
        seed: for "mask".
        output: bank file to write; default: replace the bank.

    Raises:
        UnknownKeyError: neither a concept nor a key.
        ConceptExistsError: the name is taken.
        ConfigError: unknown method, or fewer than two steps.
    """
    if method not in manipulate.METHODS:
        raise ConfigError(f"unknown method {method!r}.{suggest(method, manipulate.METHODS)}", key="method")
    if steps < 2:
        raise ConfigError(f"steps must be at least 2 (both ends are written), got {steps}", key="steps")
    target = _target(bank_path, output)
    with atomic.locked(target):
        bank = bank_module.open(bank_path)
        label = f"{_label(first)}-to-{_label(second)}"
        concept = check_concept_name(name if name is not None else label)
        if concept in bank.concepts:
            raise ConceptExistsError(_taken(bank, concept), path=bank.path, key=concept)
        points = manipulate.interpolate(snippet_of(bank, first), snippet_of(bank, second), steps, method, seed=seed)
        reasons = unusable_rows(points, bank.space)
        if reasons:
            raise GMemError(
                f"step {min(reasons)} of {method} between {first!r} and {second!r} has no direction: try slerp"
            )
        keys = [f"{concept}/{step:0{len(str(steps - 1))}d}" for step in range(steps)]
        _require_new_keys(bank, keys)
        arguments = {"first": first, "second": second, "method": method, "steps": steps, "name": concept, "seed": seed}
        entry = {"operation": "interpolate", "arguments": arguments, "num_rows": steps}
        rows = to_space(points, bank.space)
        snippets = segments.snippet_payload(lambda: [rows], steps, bank.dim, _stored_dtype(bank))
        derived = [Source(kind="derived", prefix=f"{concept}/")]
        header = append_segment(bank, target, concept, keys, derived, np.zeros(steps, np.int64), snippets, entry)
    return EditReport(
        operation="interpolate", bank=str(bank_path), output=str(target), concept=concept, num_added=steps,
        num_rows=header.num_rows, keys=keys, fingerprint=header.fingerprint,
    )  # fmt: skip


# -- what was asked for


def _target(bank_path: str | os.PathLike[str], output: str | os.PathLike[str] | None) -> Path:
    target = require_known_suffix(bank_path if output is None else output)
    if output is not None and target.exists() and target.resolve() != Path(bank_path).resolve():
        raise OutputExistsError(f"{target} exists: choose another name with -o, or delete it first", path=target)
    return target


def _concept_name(images: Sequence[str | os.PathLike[str]], name: str | None) -> str:
    if not images:
        raise ConfigError("give at least one folder or image to insert")
    if name is None and len(images) > 1:
        raise ConfigError("several folders or images need a name for the concept: --name NAME")
    if name is not None:
        return check_concept_name(name)
    only = Path(images[0]).resolve()
    return check_concept_name(only.name if only.is_dir() or not only.suffix else only.stem)


def _label(item: str) -> str:
    return item.replace("/", "_").replace("\\", "_")


def _stored_dtype(bank: MemoryBank) -> str:
    stored = bank.stored.dtype(bank.header.segments[-1].entry("snippets"))
    return {"F32": "f32", "F16": "f16", "BF16": "bf16"}[stored]


def _require_unique(listings: Sequence[Listing]) -> None:
    keys = [item.key for listing in listings for item in listing.items]
    twice = key_tables.duplicates(keys)
    if twice:
        raise GMemError(
            f"the images give {len(twice)} keys twice, such as {first_three(twice)}: insert them under different names"
        )


def _require_new_keys(bank: MemoryBank, keys: Sequence[str]) -> None:
    taken = [key for key, row in zip(keys, bank.find_rows(keys), strict=True) if row >= 0]
    if taken:
        raise ConceptExistsError(
            f"{bank.path} already has rows with key {first_three(taken)}: choose another --name", key=taken[0]
        )


def _taken(bank: MemoryBank, concept: str) -> str:
    return (
        f"{bank.path} already has a concept {concept!r} ({len(bank.all_rows_of(concept))} rows): choose another --name, or "
        f"remove it first with 'gmem-bank remove-concept {concept} --bank {bank.path}'"
    )


def _already_inserted(
    bank: MemoryBank, concept: str, listings: Sequence[Listing], encoder: Encoder, target: Path, batch_size: int
) -> EditReport:
    """Report a concept that holds these very images already, or refuse the name."""
    error = ConceptExistsError(_taken(bank, concept), path=bank.path, key=concept)
    items = [item for listing in listings for item in listing.items]
    stored = bank.all_rows_of(concept)
    if target.resolve() != bank.path.resolve() or not set(bank.keys(stored)) <= {item.key for item in items}:
        raise error
    encoded = encode_listings(
        listings, encoder, staging_folder=staging_folder(target, "insert"), batch_size=batch_size, progress=no_progress
    )
    try:
        if not _same_rows(bank, stored, encoded):
            raise error
    finally:
        encoded.staging.discard()
    skipped = [entry.to_json() for entry in encoded.skipped]
    return EditReport(
        operation="insert-concept", bank=str(bank.path), output=str(target), concept=concept, num_rows=len(bank),
        skipped=skipped, fingerprint=bank.fingerprint, unchanged=True,
    )  # fmt: skip


def _same_rows(bank: MemoryBank, stored: NDArray[np.int64], encoded: Encoded) -> bool:
    rows = bank.find_rows([item.key for item in encoded.items])
    if not np.array_equal(np.sort(rows), np.sort(stored)) or not np.isin(rows, bank.rows()).all():
        return False
    there = to_space(bank.snippets(rows), "unit")
    here = to_space(np.concatenate(list(encoded.blocks())), "unit")
    return bool(((there * here).sum(axis=1) >= SAME_COSINE).all())
