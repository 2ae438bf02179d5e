"""What is held out stays so: in all parts of a training, and in another run that goes on with it.

A checkpoint remembers the keys, since weights that never saw them are what validation is about; RUN/validation_keys.txt is for
people to read.

Shapes: M rows with images.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gmem_bank import FLIP_SUFFIX
from gmem_bank.errors import ConfigError
from gmem_gen import checkpoint as checkpoints
from gmem_gen.images import replace_file
from gmem_gen.splits import Split

HELD_OUT = "validation_keys.txt"
"""In the run's folder: the keys that are held out, one a line."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Keys that a training must not see."""

    keys: tuple[str, ...]
    """Those of rows that are there, in the order of rows, then those that an earlier part held out and the bank lacks now."""
    validated: str
    """Digest of the keys that validation looks at."""
    comparable: bool
    """Whether the best validation loss so far is of these very rows."""

    def facts(self) -> dict[str, Any]:
        """Return what checkpoints remember."""
        return {"held_out": list(self.keys), "validated": self.validated}

    def write(self, run: Path) -> None:
        """Write the keys into the run's folder."""
        text = "".join(key + "\n" for key in self.keys)
        replace_file(run / HELD_OUT, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))


def hold_out(checkpoint: Path | None, keys: list[str], split: Split) -> HeldOut:
    """Return what is held out from now on: what the split holds out, and what earlier parts of the training did.

    Args:
        checkpoint: that the training goes on from, of this run or another; None: a new training.
        keys: of the M rows.
        split: which of them are trained on.

    Raises:
        ConfigError: a row that was held out so far, or its mirrored twin, would be trained on.
        CheckpointError: the checkpoint is damaged.
    """
    now = [keys[place] for place in split.held_out]
    before, looked_at = _held_before(checkpoint) if checkpoint is not None else ((), _digest(now))
    pictures = {key.removesuffix(FLIP_SUFFIX) for key in before}
    lost = [keys[place] for place in np.unique(split.samples) if keys[place].removesuffix(FLIP_SUFFIX) in pictures]
    if lost:
        raise ConfigError(
            f"{len(lost)} rows, such as {lost[0]!r}, were held out so far and would now be trained on: hold them out again "
            "(data.validation_*), or begin anew in another --out", key="data.validation_keys",
        )  # fmt: skip
    gone = sorted(set(before) - set(now))
    return HeldOut(keys=(*now, *gone), validated=_digest(now), comparable=looked_at == _digest(now))


def held_out_keys(checkpoint: Path) -> tuple[str, ...]:
    """Return the keys that the training behind a checkpoint has held out; raises CheckpointError where it is damaged."""
    return _held_before(checkpoint)[0]


def _held_before(checkpoint: Path) -> tuple[tuple[str, ...], str]:
    """Return the keys held out so far, and the digest of those that were validated on last."""
    state = checkpoints.read_state(checkpoint)
    if "held_out" in state:
        return tuple(state["held_out"]), str(state["validated"])
    path = checkpoint.parent.parent / HELD_OUT  # checkpoints of before had the keys beside them
    lines = path.read_bytes().decode("utf-8").split("\n") if path.is_file() else []
    keys = [line for line in lines if line]
    return tuple(keys), _digest(keys)


def _digest(keys: list[str]) -> str:
    return hashlib.sha256(json.dumps(keys).encode()).hexdigest()
