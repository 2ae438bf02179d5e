"""Finished batches of a job in a hidden folder beside the bank, where they survive a kill until they are used.

Shapes: B images of a batch, D dimensions.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.encoders import Encoder
from gmem_bank.listing import Listing, Skipped, digest_of
from gmem_bank.provenance import Json, canonical_json
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

    Args:
        folder: where they lie; made if absent.
        plan: everything that decides the batches. A folder with another plan is emptied first.
    """

    def __init__(self, folder: Path, plan: Json) -> None:
        self.folder = folder
        text = canonical_json(plan)
        if not folder.is_dir() or _read_text(folder / PLAN) != text:
            shutil.rmtree(folder, ignore_errors=True)
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                raise atomic.explain(error, folder) from error
            atomic.write_bytes(folder / PLAN, text.encode())

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:08d}.safetensors"

    def save(self, index: int, batch: Batch) -> None:
        """Keep a finished batch, atomically."""
        from safetensors.numpy import save

        record = {
            "places": batch.places,
            "hashes": batch.hashes,
            "skipped": [skipped.to_json() for skipped in batch.skipped],
        }
        data = save({"snippets": np.ascontiguousarray(batch.snippets)}, metadata={"batch": canonical_json(record)})
        atomic.write_bytes(self._path(index), data)

    def has(self, index: int) -> bool:
        """Say whether a finished batch is there; it may still turn out damaged."""
        return self._path(index).is_file()

    def load(self, index: int) -> Batch | None:
        """Return a finished batch, or None where it is absent or damaged (it is then encoded again)."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(index), framework="numpy") as stored:
                snippets, record = stored.get_tensor("snippets"), json.loads(stored.metadata()["batch"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return Batch(
            places=record["places"],
            hashes=record["hashes"],
            snippets=snippets,
            skipped=[Skipped(**skipped) for skipped in record["skipped"]],
        )

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


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
    text = _read_text(folder / PLAN)
    try:
        found = int(json.loads(text or "{}")["batch_size"])
        same = found > 0 and text == canonical_json(make_plan(listed(found), encoder, found))
    except (ValueError, KeyError, TypeError):
        return None
    return found if same else None


def discard_own(folder: Path, listings: Sequence[Listing], encoder: Encoder, batch_size: int) -> None:
    """Remove finished batches that a job with this very plan has left; another job's stay."""
    if _read_text(folder / PLAN) == canonical_json(make_plan(listings, encoder, batch_size)):
        shutil.rmtree(folder, ignore_errors=True)
