"""Import a bank of the published GMem code (.pth); `official` reads the file.

Shapes: N rows, b rows of a block, D dimensions, R rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gmem_bank import errors, factors, kinds, segments
from gmem_bank import keys as key_tables
from gmem_bank.builder import DEFAULT_BANK, localised
from gmem_bank.editing import EditReport
from gmem_bank.official import Official, check_torch_archive, read_official
from gmem_bank.ops import PathLike
from gmem_bank.provenance import EncoderSpec, Json, Source, relative_to_bank, sha256_of_file
from gmem_bank.space import Space
from gmem_bank.storage import Payload, atomic, real_target, write
from gmem_bank.storage.rules import COEFFICIENT_DTYPES, SNIPPET_DTYPES
from gmem_bank.storage.schema import Header, Segment
from gmem_bank.storage.stored import naming


def import_official(
    path: PathLike,
    output: PathLike = DEFAULT_BANK,
    *,
    space: Space | None = None,
    dtype: str = "f32",
    prefix: str | None = None,
    encoder_spec: EncoderSpec | None = None,
    overwrite: bool = False,
) -> EditReport:
    """Make a bank of an official .pth file, through a memory map and without executing anything; done once, it is not redone.

    Components that contribute nothing (M all zeros, singular value 0) are left out with whatever C has there; a basis that is
    not orthonormal is made so without changing any snippet.

    Args:
        path: a plain (N, D) tensor of floats, or a dictionary of C (N, K), M (D, K), S (K,), mean (D,), latent_dim, feature_dim.
        output: bank file to write.
        space: "raw", or "unit", where a row of zeros is an error; None takes that of `encoder_spec`, else "raw".
        dtype: "f32", "f16", "bf16" (a dense bank) or "i8" (a factored one): how rows are stored.
        prefix: rows get the keys "<prefix>/<index>"; None takes the file's name without its ending.
        encoder_spec: what made the snippets, which the file does not say; None: an unknown encoder of this file's own, so that
            two files never pass as made by one.
        overwrite: replace what is at `output`.

    Raises:
        BankNotFoundError: no such file.
        FormatError: not an official bank, or shapes and types that cannot be.
        CorruptError: cut, damaged, or a value that cannot be; its row is named.
        EncoderMismatchError: `encoder_spec` has another dimension.
        ConfigError: a space or dtype that cannot be.
        OutputExistsError: something else is at `output`, and overwriting was not asked for.
        LockedError, WriteError: another writer, or no room; what was there stands.
    """
    source, target = Path(path), real_target(output)
    chosen: Any = space or (encoder_spec.space if encoder_spec is not None else "raw")
    if chosen not in ("raw", "unit"):
        raise errors.ConfigError(f"space must be 'raw' or 'unit', not {chosen!r}", key="space")
    given = None if encoder_spec is None else localised(replace(encoder_spec, space=chosen), target)
    # the published configurations call their banks .pth.pth
    arguments: dict[str, Any] = {
        "space": chosen,
        "dtype": dtype,
        "prefix": source.stem.removesuffix(".pth") if prefix is None else prefix,
    }
    facts: dict[str, Any]
    try:
        check_torch_archive(source)
        with atomic.locked(target):
            arguments |= {"digest": sha256_of_file(source), "encoder": None if given is None else given.fingerprint}
            if target.exists() and not overwrite:
                header, facts = _made_before(target, arguments), {"unchanged": True}
            else:
                official = read_official(source, chosen)
                header = _write(source, target, official, given, arguments)
                facts = {"num_added": official.num_rows, "details": dict(official.details)}
    except errors.GMemError as error:
        naming(error, source)
        raise
    return EditReport(
        operation="import", bank=str(source), output=str(target), num_rows=header.num_rows,
        fingerprint=header.fingerprint, **facts,
    )  # fmt: skip


def _made_before(target: Path, arguments: Mapping[str, Json]) -> Header:
    """Return the header of the bank at `target`; raises OutputExistsError unless this very import made it."""
    with contextlib.suppress(errors.GMemError):
        header = kinds.open(target).header
        if [(entry["operation"], entry.get("arguments")) for entry in header.history] == [("import", arguments)]:
            return header
    raise errors.OutputExistsError(
        f"{target} exists and is not what this import makes: choose another name, or replace it with --overwrite",
        path=target,
    )


def _write(
    source: Path, target: Path, official: Official, given: EncoderSpec | None, arguments: Mapping[str, Any]
) -> Header:
    num_rows, dim, space, digest = official.num_rows, official.dim, arguments["space"], arguments["digest"]
    spec = given or EncoderSpec(name="unknown", family=f"imported:{digest[:16]}", dim=dim, space=space)
    if spec.dim != dim:
        raise errors.EncoderMismatchError(
            f"its snippets have dimension {dim}, {spec.describe()} makes others: name theirs"
        )
    origin = Source(
        kind="array", path=relative_to_bank(source, target.parent), prefix=f"{arguments['prefix']}/", digest=digest,
        num_images=num_rows,
    )  # fmt: skip
    keys = [f"{origin.prefix}{row:0{len(str(num_rows - 1))}d}" for row in range(num_rows)]
    text, offsets = key_tables.encode(keys)
    header = Header(
        kind="factored" if official.factors else "dense", space=space, dim=dim,
        segments=(Segment(name="0", num_rows=num_rows),), encoder=spec, sources=(origin,),
        history=({"operation": "import", "arguments": dict(arguments), "num_rows": num_rows},),
    )  # fmt: skip
    payloads = {
        **{name: Payload.of(values) for name, values in official.factors.items()},
        **_vectors(official, arguments["dtype"]),
        "0/keys.bytes": Payload.of(text),
        "0/keys.offsets": Payload.of(offsets),
        "0/source": Payload.of(np.zeros(num_rows, np.uint32)),
        **segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys))),
    }
    return write(target, header, payloads)


def _vectors(official: Official, dtype: str) -> dict[str, Payload]:
    """Return what rows are stored as, made in one pass over the file; the scales of i8 take one more."""
    known = COEFFICIENT_DTYPES if official.factors else SNIPPET_DTYPES
    if dtype not in known:
        raise errors.ConfigError(f"dtype must be one of {', '.join(known)} for this bank, not {dtype!r}", key="dtype")
    shape = official.num_rows, len(official.factors["basis"]) if official.factors else official.dim
    if dtype != "i8":
        name = "0/coefficients" if official.factors else "0/snippets"
        return {name: segments.snippet_payload(official.blocks, *shape, dtype)}
    largest = np.max([np.abs(block).max(axis=0) for block in official.blocks()], axis=0)
    scale = factors.quantise(largest[None])[1]
    blocks = lambda: (factors.quantise_by(block, scale).data.cast("B") for block in official.blocks())  # noqa: E731
    return {"0/coefficients": Payload(dtype="I8", shape=shape, blocks=blocks), "0/scale": Payload.of(scale)}
