"""Where samples are kept as they come, so that the same command goes on after a kill; `folder_store` and `array_store` do it.

A store knows the plan, all that decides the samples; samples of two plans never mix in one. Several processes may fill one
store at the same time, each with samples of its own.

Shapes: B samples in all, b samples of a batch, H×W pixels, C channels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import OutputExistsError
from gmem_gen import outputs
from gmem_gen.images import replace_file

Plan = Mapping[str, Any]


class Store(Protocol):
    """What keeps samples."""

    path: Path
    record: Path
    """The JSON beside the samples, there when all of them are."""

    def done(self) -> NDArray[np.bool_]:
        """Return (B,) which samples are kept already."""

    def write(self, places: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Keep (b, H, W, C) samples."""

    def read(self, place: int) -> NDArray[np.uint8]:
        """Return the (H, W, C) pixels of a kept sample."""

    def tally(self, name: str, counts: Mapping[str, int]) -> dict[str, int]:
        """Add counts of samples drawn to those of a process, kept under its name; return the counts of all processes."""

    def finish(self, record: Mapping[str, Any]) -> list[Path]:
        """Put the finished samples and their record in place; return the files to show."""


def writing(path: Path) -> AbstractContextManager[None]:
    """Turn an operating-system error in the block into a WriteError that names the output."""
    advice = "What was drawn stands; free some space and run the same command again, or choose another place"
    return outputs.writing(path, f"samples to {path}", advice)


def require_same_plan(path: Path, stored: object, plan: Plan) -> None:
    """Raise OutputExistsError, naming what differs, unless the samples at `path` are of this plan."""
    if not isinstance(stored, dict):
        raise OutputExistsError(
            f"{path} holds samples that do not say how they were made: choose another place, or replace them with --overwrite",
            path=path,
        )
    changed = [name for name in sorted({*plan, *stored}) if stored.get(name) != plan.get(name)]
    if changed:
        told = [
            f"{name} was {stored.get(name)!r}, is {plan.get(name)!r}"
            if len(f"{stored.get(name)}{plan.get(name)}") < 80 else f"another {name}"
            for name in changed[:4]
        ]  # fmt: skip
        raise OutputExistsError(
            f"{path} holds other samples ({'; '.join(told)}): choose another place, or replace them with --overwrite",
            path=path,
        )


def add_up(folder: Path, prefix: str, name: str, counts: Mapping[str, int]) -> dict[str, int]:
    """Add counts to those in a process's own file, and return those of all processes: nfe by the largest, others by sums."""
    own = folder / f"{prefix}{name}.json"
    if counts:
        write_json(own, _sum([counts, *([json_in(own)] if own.exists() else [])]))
    return _sum([json_in(path) for path in folder.glob(f"{prefix}*.json")])


def _sum(parts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total = {name: sum(part[name] for part in parts) for name in ("images", "evaluations")}
    return total | {"nfe": max((part["nfe"] for part in parts), default=0)}


def json_in(path: Path) -> Any:
    """Return what a JSON file holds, None where there is none or it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, atomically."""
    text = json.dumps(record, indent=1, ensure_ascii=False)
    replace_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
