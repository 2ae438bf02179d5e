"""Build a bank from snippets that were computed elsewhere: `--encoder precomputed`, arrays as the source.

Shapes: N rows, b rows of a block, D dimensions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank import keys as key_tables
from gmem_bank import kinds, segments
from gmem_bank.arrays import ArrayRows
from gmem_bank.builder import BuildReport, finished_report, report_path
from gmem_bank.errors import GMemError, OutputExistsError, first_three
from gmem_bank.ops import PathLike
from gmem_bank.provenance import EncoderSpec, Source, canonical_json, relative_to_bank
from gmem_bank.space import Space, to_space, unusable_rows
from gmem_bank.storage import Payload, atomic, real_target, write
from gmem_bank.storage.schema import Header, Segment

NAME = "precomputed"
BLOCK_ROWS = 8192


def precomputed_spec(dim: int, space: Space, model: str) -> EncoderSpec:
    """Return the spec of snippets from elsewhere.

    Args:
        dim: D.
        space: "raw" or "unit".
        model: what made them, in the user's word: banks of one word, dimension and space can be merged.
    """
    return EncoderSpec(
        name=NAME,
        family=NAME,
        dim=dim,
        space=space,
        parameters={"model": model},
        software=f"gmem {gmem_bank.__version__}",
    )


def build_precomputed(
    rows: ArrayRows,
    output: PathLike,
    *,
    space: Space = "unit",
    dtype: str = "f32",
    model: str = "",
    overwrite: bool = False,
) -> BuildReport:
    """Write snippets that were computed elsewhere as a new bank; top folders in their keys become concepts.

    Args:
        rows: from `read_array`; keys that the file does not have are "<file's name>/<number>".
        output: bank to write.
        space: "unit" normalises.
        dtype: "f32", "f16" or "bf16".
        model: what made them, in the user's word.
        overwrite: replace an existing bank.

    Raises:
        GMemError: a snippet that is not finite or has no direction (its row is named), or a key that occurs twice.
        OutputExistsError: the output is there and was made otherwise.
    """
    started = time.perf_counter()
    target = real_target(output)
    keys = rows.keys if rows.has_keys else [f"{rows.path.stem}/{key}" for key in rows.keys]
    twice = key_tables.duplicates(keys)
    if twice:
        raise GMemError(f"{rows.path} has the keys {first_three(twice)} twice", key=twice[0])
    arguments = {"dtype": dtype, "model": model, "digest": rows.digest}
    with atomic.locked(target):
        if target.exists() and not overwrite:
            _require_made(target, arguments, space)
            return dataclasses.replace(finished_report(target, started), unchanged=True)
        spec = precomputed_spec(rows.snippets.shape[1], space, model)
        header, own = _content(rows, keys, spec, target, arguments)
        snippets = segments.snippet_payload(lambda: _blocks(rows, space), len(keys), spec.dim, dtype)
        write(target, header, own | {"0/snippets": snippets})
        report = finished_report(target, started)
        atomic.write_bytes(report_path(target), (canonical_json(report.to_json()) + "\n").encode())
        return report


def _content(
    rows: ArrayRows, keys: list[str], spec: EncoderSpec, target: PathLike, arguments: dict[str, str]
) -> tuple[Header, dict[str, Payload]]:
    concepts = segments.concepts_of_folders(keys) if rows.has_keys else {}
    source = Source(
        kind="array",
        path=relative_to_bank(rows.path, real_target(target).parent),
        digest=rows.digest,
        num_images=len(keys),
    )
    header = Header(
        kind="dense", space=spec.space, dim=spec.dim, segments=(Segment(name="0", num_rows=len(keys)),), encoder=spec,
        sources=(source,), concepts=tuple(concepts),
        history=({"operation": "build", "arguments": arguments, "num_rows": len(keys)},),
    )  # fmt: skip
    text, offsets = key_tables.encode(keys)
    own = {
        "0/keys.bytes": Payload.of(text),
        "0/keys.offsets": Payload.of(offsets),
        "0/source": Payload.of(np.zeros(len(keys), np.uint32)),
    }
    table = segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys)))
    return header, own | table | segments.concept_payloads(concepts)


def _blocks(rows: ArrayRows, space: Space) -> Iterator[NDArray[np.float32]]:
    for start in range(0, len(rows.keys), BLOCK_ROWS):
        with np.errstate(over="ignore"):  # what float32 cannot hold is named below
            block = np.asarray(rows.snippets[start : start + BLOCK_ROWS], np.float32)
        reasons = unusable_rows(block, space)
        if reasons:
            row = start + min(reasons)
            raise GMemError(
                f"row {row} of {rows.path} (key {rows.keys[row]!r}): {reasons[row - start]}",
                key=rows.keys[row],
                row=row,
            )
        yield to_space(block, space)


def _require_made(target: PathLike, arguments: dict[str, str], space: Space) -> None:
    try:
        bank = kinds.open(target)
    except GMemError as error:
        raise OutputExistsError(
            f"{target} exists and is not a bank that can be read: --overwrite replaces it"
        ) from error
    if len(bank.history) != 1 or bank.history[0].get("arguments") != arguments or bank.space != space:
        raise OutputExistsError(
            f"{target} exists and was not built from these snippets in this way: choose another name with -o, or replace it "
            "with --overwrite"
        )
