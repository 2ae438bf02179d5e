"""Finished batches of a job in a hidden folder beside the bank, where they survive a kill until they are used.

Shapes: B images of a batch, D dimensions.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.encoders import Encoder
from gmem_bank.listing import Listing, Skipped, digest_of
from gmem_bank.provenance import Json, canonical_json, sha256_of
from gmem_bank.storage import atomic

PLAN = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one batch gave."""

    places: list[int]
    """Positions in the listing of the images that gave a snippet."""
    hashes: list[str]
    """sha256 of every file of the batch, "" where it could not be read."""
    snippets: NDArray[np.float32]
    """(B, D)."""
    skipped: list[Skipped]


class Staging:
    """Finished batches of one encoding job.

    Each plan has a folder of its own below, so that a build with another batch size or encoder takes nothing from an
    interrupted one.

    Args:
        folder: where the work on a bank lies; made if absent.
        plan: everything that decides the batches.
    """

    def __init__(self, folder: Path, plan: Json) -> None:
        self._base, self.folder = folder, _own_folder(folder, plan)
        text = canonical_json(plan)
        if _read_text(self.folder / PLAN) != text:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise atomic.explain(error, self.folder) from error
            atomic.write_bytes(self.folder / PLAN, text.encode())

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    def save(self, index: int, batch: Batch) -> None:
        """Keep a finished batch, atomically."""
        from safetensors.numpy import save

        snippets = np.ascontiguousarray(batch.snippets)
        record = {
            "places": batch.places,
            "hashes": batch.hashes,
            "skipped": [skipped.to_json() for skipped in batch.skipped],
        }
        metadata = {"batch": canonical_json(record), "sha256": _digest(record, snippets)}
        data = save({"snippets": snippets}, metadata=metadata)
        atomic.write_bytes(self._path(index), data)

    def has(self, index: int) -> bool:
        """Say whether a finished batch is there; it may still turn out damaged."""
        return self._path(index).is_file()

    def load(self, index: int) -> Batch | None:
        """Return a finished batch, or None where it is absent or damaged (it is then encoded again)."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(index), framework="numpy") as stored:
                snippets, facts = stored.get_tensor("snippets"), stored.metadata()
            record = json.loads(facts["batch"])
            if _digest(record, snippets) != facts["sha256"]:
                return None
            skipped = [Skipped(**entry) for entry in record["skipped"]]
            return Batch(places=record["places"], hashes=record["hashes"], snippets=snippets, skipped=skipped)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None

    def discard(self) -> None:
        """Remove this job's batches; another job's stay."""
        _discard(self.folder)

    def discard_all(self) -> None:
        """Remove this job's batches, and whatever others that were to write the same bank have left."""
        shutil.rmtree(self._base, ignore_errors=True)


def _digest(record: Json, snippets: NDArray[np.float32]) -> str:
    """Return the sha256 over everything that a batch gave: numbers, and what is said of them."""
    state = hashlib.sha256(canonical_json([record, str(snippets.dtype), list(snippets.shape)]).encode())
    state.update(np.ascontiguousarray(snippets).data)
    return state.hexdigest()


def _own_folder(folder: Path, plan: Json) -> Path:
    return folder / sha256_of(plan)[:16]


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def make_plan(listings: Sequence[Listing], encoder: Encoder, batch_size: int) -> dict[str, Json]:
    """Return everything that decides the batches: a file that was replaced in the meantime changes it."""
    return {
        "encoder": encoder.spec.fingerprint,
        "software": encoder.spec.software,
        "batch_size": batch_size,
        "listings": [
            [listing.root.resolve().as_posix(), listing.prefix, dict(listing.columns), digest_of(listing.items.facts())]
            for listing in listings
        ],
    }


def planned_batch_size(folder: Path, listed: Callable[[int], list[Listing]], encoder: Encoder) -> int | None:
    """Return the batch size of unfinished work of the same images by the same encoder, None where there is none."""
    for place in sorted(folder.glob(f"*/{PLAN}")):
        text = _read_text(place)
        try:
            found = int(json.loads(text or "{}")["batch_size"])
            if found > 0 and text == canonical_json(make_plan(listed(found), encoder, found)):
                return found
        except (ValueError, KeyError, TypeError):
            continue
    return None


def num_outdated(folder: Path, plan: dict[str, Json]) -> int:
    """Return how many finished batches unfinished work on the same source has left that was listed otherwise.

    Args:
        folder: of the work on a bank.
        plan: of the job that is to be done now.
    """
    own = {**plan, "listings": [listing[:-1] for listing in plan["listings"]]}
    count = 0
    for place in folder.glob(f"*/{PLAN}"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(_read_text(place) or "{}")
            other = {**found, "listings": [listing[:-1] for listing in found["listings"]]}
            if canonical_json(other) == canonical_json(own) and canonical_json(found) != canonical_json(plan):
                count += sum(1 for _ in place.parent.glob("*.safetensors"))
    return count


def has_batches(folder: Path, plan: Json) -> bool:
    """Say whether an unfinished job with this very plan has left anything."""
    return _read_text(_own_folder(folder, plan) / PLAN) == canonical_json(plan)


def sweep(folder: Path) -> None:
    """Remove what a kill in the middle of a removal has left: folders of batches without their plan."""
    if not folder.is_dir():
        return
    for own in folder.iterdir():
        if not (own / PLAN).is_file():
            shutil.rmtree(own, ignore_errors=True)
    with contextlib.suppress(OSError):  # unfinished work is there
        folder.rmdir()


def discard_own(folder: Path, plan: Json) -> None:
    """Remove finished batches that a job with this very plan has left; another job's stay."""
    sweep(folder)
    if has_batches(folder, plan):
        _discard(_own_folder(folder, plan))


def _discard(own: Path) -> None:
    shutil.rmtree(own, ignore_errors=True)
    with contextlib.suppress(OSError):  # another job's are there
        own.parent.rmdir()
