"""state.json of a checkpoint: all of it that is no tensor."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmem_bank.errors import CheckpointError, WriteError
from gmem_gen.images import replace_file

STATE = "state.json"
HASH = "sha256"
"""Entry with the hash of all others."""
ENTRIES: dict[str, type | tuple[type, ...]] = {
    "step": int, "elapsed": (int, float), "config": dict, "latent": dict, "tokenizer": (dict, str), "bank": dict,
    "keys_digest": str, "hashes": dict,
}  # fmt: skip
"""What every state has, and the types of it."""
BANK_ENTRIES: dict[str, type | tuple[type, ...]] = {
    "fingerprint": str, "dim": int, "space": str, "encoder": str, "encoder_fingerprint": str, "num_rows": int,
}  # fmt: skip


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json, without its hash; raises CheckpointError.

    One of an older version has no hash; of such a one only names and types are checked.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it is no JSON object")
        stored = state.pop(HASH, None)
        if stored not in (None, _digest(state)):
            raise ValueError("its entries do not match the hash that was saved")
        _require_types(state, ENTRIES, "")
        _require_types(state["bank"], BANK_ENTRIES, "bank.")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint that can be read ({error}): delete that folder, or train with --resume-from "
            "previous, to go on from the one before it",
            path=checkpoint,
        ) from error
    return state


def _require_types(record: Mapping[str, Any], entries: Mapping[str, type | tuple[type, ...]], where: str) -> None:
    """Raise ValueError that names an entry which is missing or of another type."""
    for name, kind in entries.items():
        if name not in record:
            raise ValueError(f"it is incomplete: {where}{name} is missing")
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise ValueError(f"{where}{name} is {record[name]!r:.40}")


def _digest(state: Mapping[str, Any]) -> str:
    """Return the sha256 of a state as canonical JSON: sorted names, no spaces."""
    text = json.dumps(state, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state with its hash into a file, and wait until it is on the disk; raises OSError."""
    plain = json.loads(json.dumps(state))  # as it will be read: tuples are lists then, and all names texts
    path.write_text(json.dumps({**plain, HASH: _digest(plain)}, indent=1), encoding="utf-8")
    sync(path)


def amend_state(checkpoint: Path, changes: dict[str, Any]) -> None:
    """Replace entries of a checkpoint's state, atomically; raises WriteError, CheckpointError."""
    path, state = checkpoint / STATE, {**read_state(checkpoint), **changes}
    try:
        replace_file(path, lambda temporary: write_state(temporary, state))
        sync(checkpoint)
    except OSError as error:
        raise WriteError(f"could not write {path}: {error}. It stands as it was; free some space", path=path) from error


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on the disk; raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
