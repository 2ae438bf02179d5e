"""What a folder of shards says of itself: `index.json`, there once all shards are, under a hash of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gmem_bank.errors import CorruptError, FormatError, SourceError
from gmem_bank.provenance import Json, canonical_json, sha256_of
from gmem_bank.shard_file import REMEDY
from gmem_bank.storage import atomic

INDEX = "index.json"
PLAN = "plan.json"
"""What decides the shards, there from the beginning."""
FORMAT = "gmem-shards"
VERSION = 1


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"{number:05d}.safetensors"


def write_index(
    folder: Path, counts: Sequence[int], shape: Sequence[int], dtype: str, facts: Mapping[str, Json]
) -> None:
    """Write the index of finished shards: the rows of each, the shape and type of a row's array, and what is said of them."""
    record: dict[str, Json] = {
        "format": FORMAT, "version": VERSION, "num_rows": [*counts], "shape": [*shape], "dtype": dtype, "facts": dict(facts),
    }  # fmt: skip
    record["sha256"] = sha256_of(record)
    atomic.write_bytes(folder / INDEX, (canonical_json(record) + "\n").encode())


def read_index(folder: Path) -> dict[str, Any]:
    """Return what the index says; raises SourceError, or FormatError, or CorruptError for what can be made anew."""
    path = folder / INDEX
    if not path.is_file():
        state = (
            "unfinished: run the command that makes it again" if (folder / PLAN).is_file() else "no folder of shards"
        )
        raise SourceError(f"{folder} is {state}", path=folder)
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        known = record["format"] == FORMAT and isinstance(record["version"], int)
        fields = [record[name] for name in ("num_rows", "shape", "dtype", "facts")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise CorruptError(f"{path} is not an index of shards: {reason}: {REMEDY}", path=path) from error
    if not known or record["version"] > VERSION or not isinstance(fields[3], dict):
        raise FormatError(f"{path} is of a version that this gmem does not know: install a newer one", path=path)
    digest = record.pop("sha256", None)  # indexes of earlier versions have none
    if digest is not None and digest != sha256_of(record):
        raise CorruptError(f"{path} is damaged: its text has changed: {REMEDY}", path=path)
    return dict(record)
