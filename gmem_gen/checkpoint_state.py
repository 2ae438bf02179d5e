"""state.json of a checkpoint: all of it that is no tensor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gmem_bank.errors import CheckpointError, WriteError
from gmem_gen.images import replace_file

STATE = "state.json"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json; raises CheckpointError."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or not {"step", "config", "bank", "latent", "tokenizer", "hashes"} <= set(state):
            raise ValueError("it is incomplete")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint} is not a checkpoint that can be read ({error}): delete that folder, or train with --resume-from "
            "previous, to go on from the one before it",
            path=checkpoint,
        ) from error
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state into a file, and wait until it is on the disk; raises OSError."""
    path.write_text(json.dumps(state, indent=1), encoding="utf-8")
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
