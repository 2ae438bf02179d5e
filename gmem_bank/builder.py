"""Build a bank from the images of a source, streamed to disk and resumable.

Shapes: N rows, D dimensions.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmem_bank import keys as key_tables
from gmem_bank import kinds, segments
from gmem_bank.batch_size import AUTO, BatchSize, resumed
from gmem_bank.columns import Columns
from gmem_bank.contents import content_digest, list_source
from gmem_bank.decode_pool import decode_batch
from gmem_bank.encoders import Encoder, SupportsPrecision
from gmem_bank.encoding import Encoded, encode_listings
from gmem_bank.errors import ConfigError, GMemError, OutputExistsError
from gmem_bank.listing import Listing, Skipped
from gmem_bank.narrowing import Narrowing, narrowed
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import EncoderSpec, Json, canonical_json, relative_to_bank
from gmem_bank.staging import has_batches, make_plan, num_outdated, sweep
from gmem_bank.storage import atomic, previous, real_target, write
from gmem_bank.storage.rules import SNIPPET_DTYPES
from gmem_bank.storage.schema import Header, Segment

DEFAULT_BANK = "bank.safetensors"
PROBE_IMAGES = 8
"""Images on which the cosine of a lower precision to float32 is taken."""


@dataclass(frozen=True, kw_only=True)
class BuildReport:
    """What a build did."""

    bank: str
    num_rows: int
    dim: int
    space: str
    encoder: str
    concepts: dict[str, int]
    skipped: list[dict[str, str]]
    """Every file that gave no row: path and reason."""
    num_unreadable: int
    """Of those, images that could not be used."""
    num_resumed: int
    """Images that an earlier, interrupted run had encoded."""
    num_outdated: int
    """Batches that an earlier, interrupted run had encoded, of no use since other images are listed now."""
    seconds: float
    images_per_second: float
    bytes: int
    fingerprint: str
    unchanged: bool = False
    """True: the bank was there already, built from the same images in the same way."""

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def report_path(bank: Path) -> Path:
    """Return where a build writes its report: `<bank>.report.json`."""
    return bank.with_name(bank.name + ".report.json")


def build(
    source: str | os.PathLike[str],
    encoder: Encoder,
    output: str | os.PathLike[str] = DEFAULT_BANK,
    *,
    dtype: str = "f32",
    batch_size: BatchSize = AUTO,
    num_workers: int | None = None,
    narrowing: Narrowing | None = None,
    columns: Columns | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> BuildReport:
    """Encode the images of a source into a new bank; the same call again continues after a kill.

    Class folders become concepts. Images that cannot be used are listed in `<output>.report.json` and passed over.

    Args:
        source: a folder of images, searched recursively in sorted order, or what else `gmem-bank build` takes: a list file, tar
            files, arrays of pixels, tables.
        encoder: from `load_encoder`.
        output: bank file to write.
        dtype: "f32", "f16" or "bf16": how snippets are stored.
        batch_size: images per call of the encoder, part of what a resumed build must share with the interrupted one;
            "auto" is the encoder's own choice.
        num_workers: processes that decode images; 0 decodes in this one, None takes one a core where it pays.
        narrowing: which images to take, and in which order; default: all, sorted.
        columns: of arrays of pixels and tables: which columns to take.
        overwrite: replace an existing bank that was built differently.
        progress: told images done and images in all.

    Returns:
        A BuildReport.

    Raises:
        SourceError: no such folder, or no usable image in it.
        OutputExistsError: the output exists, was built otherwise, and `overwrite` is False.
        LockedError, WriteError: another writer, or no room; finished batches are kept for the next try.
    """
    if dtype not in SNIPPET_DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(SNIPPET_DTYPES)}, not {dtype!r}", key="dtype")
    if narrowing is not None and narrowing.num_shards > 1 and batch_size == AUTO:
        raise ConfigError(
            "parts are cut between batches: give every part the same --batch-size, not 'auto', which another machine may take "
            "for another number",
            key="batch_size",
        )
    target = real_target(output)
    started = time.perf_counter()
    with atomic.locked(target):
        wanted = narrowing or Narrowing()
        staging = staging_folder(target, "build")
        sweep(staging)
        whole = list_source(os.fspath(source), exclude=(target, report_path(target)), columns=columns)
        built = target.exists() and not overwrite
        asked = _recorded_batch_size(target, batch_size) if built else batch_size
        size = resumed(asked, encoder, staging, lambda size: [narrowed(whole, wanted, size)])
        listing = narrowed(whole, wanted, size)
        spec = localised(encoder.spec, target)
        arguments = {"dtype": dtype, "batch_size": size, **wanted.to_json()}
        if wanted.num_shards > 1:
            arguments["num_listed"] = len(whole.items)
        if built:
            _require_already_built(target, listing, spec, arguments)
        plan = make_plan([listing], encoder, size)
        if built and not has_batches(staging, plan):
            return _unchanged(target, listing, started)
        outdated = num_outdated(staging, plan)
        # A kill may have come between the bank and its report: then the batches are still there, and give the report.
        encoded = encode_listings(
            [listing], encoder, staging_folder=staging, batch_size=size, num_workers=num_workers, progress=progress
        )
        if not built:
            _write_new(target, encoded, listing, with_accuracy(spec, encoder, listing), arguments)
        skipped = [*encoded.skipped, *listing.ignored]
        report = _report(target, skipped, started, len(encoded.skipped), encoded.num_resumed, outdated)
        previous.tidy(target, ())  # states of a bank that was overwritten are of no use
        atomic.write_bytes(report_path(target), (canonical_json(report.to_json()) + "\n").encode())
        encoded.staging.discard_all()
    return report


def _recorded_batch_size(target: Path, asked: BatchSize) -> BatchSize:
    """Return for "auto" the batch size by which the bank that is there was built: another machine's choice is as good."""
    if asked != AUTO:
        return asked
    try:
        recorded = kinds.open(target).history[0]["arguments"]["batch_size"]
    except (GMemError, LookupError, TypeError):
        return AUTO
    return recorded if type(recorded) is int and recorded > 0 else AUTO


def staging_folder(bank: Path, purpose: str) -> Path:
    """Return the hidden folder that keeps the finished batches of a job on a bank."""
    return bank.with_name(f".{bank.name}.{purpose}")


def localised(spec: EncoderSpec, bank: Path) -> EncoderSpec:
    """Return a spec whose weights path is relative to the bank's folder."""
    if spec.weights_path is None:
        return spec
    return dataclasses.replace(spec, weights_path=relative_to_bank(Path(spec.weights_path), bank.parent))


def with_accuracy(spec: EncoderSpec, encoder: Encoder, listing: Listing) -> EncoderSpec:
    """Return the spec with the cosine to float32 that a lower precision reaches on the first images, among its labels.

    It is measured on the same images however often a build was interrupted, so that the bank's bytes do not depend on that.
    """
    if not isinstance(encoder, SupportsPrecision) or encoder.spec.parameters.get("dtype", "fp32") == "fp32":
        return spec
    crops = decode_batch(listing.items[:PROBE_IMAGES], spec.preprocessing).crops
    if not len(crops):
        return spec
    cosine = encoder.cosine_to_fp32(crops)
    if cosine is None or not np.isfinite(cosine):  # none of them has a direction: no reason to lose a finished build
        return spec
    return dataclasses.replace(spec, labels={**spec.labels, "cosine_to_fp32": round(float(cosine), 6)})


def _write_new(target: Path, encoded: Encoded, listing: Listing, spec: EncoderSpec, arguments: dict[str, Any]) -> None:
    keys = encoded.keys
    concepts = segments.concepts_of_folders(keys) if listing.classes else {}
    header = Header(
        kind="dense",
        space=spec.space,
        dim=spec.dim,
        segments=(Segment(name="0", num_rows=len(keys)),),
        encoder=spec,
        sources=(listing.to_source(target.parent, encoded.digests[0]),),
        concepts=tuple(concepts),
        history=({"operation": "build", "arguments": arguments, "num_rows": len(keys)},),
    )
    snippets = segments.snippet_payload(encoded.blocks, len(keys), spec.dim, arguments["dtype"])
    write(
        target,
        header,
        {
            **segments.segment_payloads("0", key_tables.encode(keys), np.zeros(len(keys), np.int64), snippets),
            **segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys))),
            **segments.concept_payloads(concepts),
        },
    )


def finished_report(target: Path, started: float) -> BuildReport:
    """Return the report of a build that skipped nothing."""
    return _report(target, [], started)


def _report(
    target: Path, skipped: Sequence[Skipped], started: float, num_unreadable: int = 0, num_resumed: int = 0,
    num_outdated: int = 0,
) -> BuildReport:  # fmt: skip
    bank = kinds.open(target)
    seconds = time.perf_counter() - started
    return BuildReport(
        bank=str(target),
        num_rows=len(bank),
        dim=bank.dim,
        space=bank.space,
        encoder=bank.encoder.name,
        concepts=bank.concept_sizes(),
        skipped=[entry.to_json() for entry in skipped],
        num_unreadable=num_unreadable,
        num_resumed=num_resumed,
        num_outdated=num_outdated,
        seconds=round(seconds, 3),
        images_per_second=round(max(0, len(bank) + num_unreadable - num_resumed) / seconds, 2),
        bytes=bank.stored.num_bytes,
        fingerprint=bank.fingerprint,
    )


def _require_already_built(target: Path, listing: Listing, spec: EncoderSpec, arguments: dict[str, Any]) -> None:
    """Raise OutputExistsError unless the bank there is the one that this build gives (a kill may come after its rename)."""
    try:
        bank = kinds.open(target)
    except GMemError as error:
        raise OutputExistsError(
            f"{target} exists and is not a bank that can be read ({error}): --overwrite replaces it"
        ) from error
    history = [{**entry} for entry in bank.history]
    same = (
        len(history) == 1 and history[0].get("arguments") == arguments and bank.encoder.fingerprint == spec.fingerprint
    )
    # contents are compared last: that reads every image
    if not same or bank.sources != (listing.to_source(target.parent, content_digest(listing)),):
        operations = Counter(str(entry["operation"]) for entry in history)
        made = ", ".join(f"{count}× {name}" if count > 1 else name for name, count in operations.items())
        raise OutputExistsError(
            f"{target} exists ({len(bank)} rows of {bank.encoder.name}; history: {made}) and was not built from these "
            "images in this way: choose another name with -o, or replace it with --overwrite",
            path=target,
        )


def _unchanged(target: Path, listing: Listing, started: float) -> BuildReport:
    """Report a bank that is there already; images without a row are named again, with the stored reasons."""
    bank = kinds.open(target)
    keys = list(listing.items.all_keys())
    absent = [key for key, row in zip(keys, bank.find_rows(keys).tolist(), strict=True) if row < 0]
    reasons = _stored_reasons(target)
    unknown = "it gave no row; the report that said why is gone"
    skipped = [Skipped(path=key, reason=reasons.get(key, unknown)) for key in absent]
    report = _report(target, [*skipped, *listing.ignored], started, len(absent))
    return dataclasses.replace(report, images_per_second=0.0, unchanged=True)


def _stored_reasons(target: Path) -> dict[str, str]:
    try:
        record = json.loads(report_path(target).read_text(encoding="utf-8"))
        return {str(entry["path"]): str(entry["reason"]) for entry in record["skipped"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
