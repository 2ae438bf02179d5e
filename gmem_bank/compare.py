"""What differs between two banks, by key: rows, snippets, masks, concepts, encoder.

Shapes: B rows of a block.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import kinds
from gmem_bank.bank import MemoryBank
from gmem_bank.ops import PathLike
from gmem_bank.provenance import Json
from gmem_bank.space import to_space

BLOCK_ROWS = 16_384
SHOWN = 20
DESCRIPTIVE = ("first", "second", "num_common", "num_not_compared")
"""Fields that are no difference."""
TOLERANCE = 1e-6
"""Cosine distance up to which two snippets are the same, beside float32 rounding."""


@dataclass(kw_only=True)
class DiffReport:
    """What differs; keys are cut to the first 20, counts are whole."""

    first: str
    second: str
    different_fields: dict[str, list[Json]] = field(default_factory=dict)
    """Kind, space, dimension, encoder: [first's, second's]."""
    num_only_first: int = 0
    num_only_second: int = 0
    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    num_common: int = 0
    num_changed: int = 0
    """Common rows whose snippets differ; where the dimensions differ they are not compared."""
    changed: list[dict[str, Json]] = field(default_factory=list)
    """{"key", "cosine", "largest": largest difference of an element}."""
    num_not_compared: int = 0
    """Common rows that both banks hide, or whose dimensions differ: their snippets were not looked at."""
    num_mask_changed: int = 0
    """Common rows that only one of the banks hides."""
    concepts_only_first: list[str] = field(default_factory=list)
    concepts_only_second: list[str] = field(default_factory=list)
    concepts_changed: dict[str, dict[str, int]] = field(default_factory=dict)
    """Concept → {"removed", "added"}: members that only the first, or only the second, has."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        facts = asdict(self)
        return not any(value for name, value in facts.items() if name not in DESCRIPTIVE)

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return {"same": self.same, **asdict(self)}


def diff(first_path: PathLike, second_path: PathLike) -> DiffReport:
    """Compare two banks by key; the order of rows, their segments and the form of the file do not matter.

    Snippets are the same up to float32 rounding: a cosine within 1e-6 of 1, and elements within 1e-5 of the largest.

    Args:
        first_path: a bank.
        second_path: another.

    Raises:
        BankNotFoundError, FormatError, CorruptError: one of them cannot be opened.
    """
    first, second = kinds.open(first_path), kinds.open(second_path)
    report = DiffReport(first=str(first_path), second=str(second_path))
    for name in ("kind", "space", "dim"):
        _note(report, name, getattr(first.header, name), getattr(second.header, name))
    _note(report, "encoder", first.encoder.describe(), second.encoder.describe())
    _compare_rows(report, first, second)
    common = np.zeros(len(second), np.bool_)
    common[_rows_in(second, first)] = True
    only = np.flatnonzero(~common)
    report.num_only_second, report.only_second = len(only), second.keys(only[:SHOWN])
    _compare_concepts(report, first, second)
    return report


def _note(report: DiffReport, name: str, first: Json, second: Json) -> None:
    if first != second:
        report.different_fields[name] = [first, second]


def _rows_in(bank: MemoryBank, other: MemoryBank) -> NDArray[np.int64]:
    """Return the rows of a bank whose keys another has."""
    blocks = []
    for start in range(0, len(bank), BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, len(bank)))
        blocks.append(rows[other.find_rows(bank.keys(rows)) >= 0])
    return np.concatenate(blocks)


def _active(bank: MemoryBank) -> NDArray[np.bool_]:
    active = np.zeros(len(bank), np.bool_)
    active[bank.rows()] = True
    return active


def _compare_rows(report: DiffReport, first: MemoryBank, second: MemoryBank) -> None:
    shown_first, shown_second = _active(first), _active(second)
    for start in range(0, len(first), BLOCK_ROWS):
        rows = np.arange(start, min(start + BLOCK_ROWS, len(first)))
        keys = first.keys(rows)
        there = second.find_rows(keys)
        absent = np.flatnonzero(there < 0)
        report.num_only_first += len(absent)
        report.only_first += [keys[place] for place in absent[: SHOWN - len(report.only_first)].tolist()]
        rows, there = rows[there >= 0], there[there >= 0]
        report.num_common += len(rows)
        report.num_mask_changed += int((shown_first[rows] != shown_second[there]).sum())
        both = shown_first[rows] & shown_second[there] & (first.dim == second.dim)
        report.num_not_compared += int((~both).sum())
        if both.any():
            _compare_snippets(report, first, second, rows[both], there[both])
        first.stored.release()
        second.stored.release()


def _compare_snippets(
    report: DiffReport, first: MemoryBank, second: MemoryBank, rows: NDArray[np.int64], there: NDArray[np.int64]
) -> None:
    a, b = first.snippets(rows), second.snippets(there)
    cosines = np.vecdot(to_space(a, "unit").astype(np.float64), to_space(b, "unit").astype(np.float64))
    largest = np.abs(a - b).max(axis=1)
    sizes = np.maximum(np.abs(a).max(axis=1), 1e-30)
    turned = (1 - cosines > TOLERANCE) & (largest > 0)  # two rows of zeros have no angle between them
    changed = np.flatnonzero(turned | (largest > 1e-5 * sizes))
    report.num_changed += len(changed)
    shown = changed[: SHOWN - len(report.changed)]
    for place, key in zip(shown.tolist(), first.keys(rows[shown]), strict=True):
        report.changed.append({"key": key, "cosine": float(cosines[place]), "largest": float(largest[place])})


def _compare_concepts(report: DiffReport, first: MemoryBank, second: MemoryBank) -> None:
    ours, theirs = set(first.names), set(second.names)
    report.concepts_only_first = [name for name in first.names if name not in theirs]
    report.concepts_only_second = [name for name in second.names if name not in ours]
    for name in first.names:
        if name in theirs:
            a, b = (set(bank.keys(bank.all_rows_of(name))) for bank in (first, second))
            counts: dict[str, Any] = {"removed": len(a - b), "added": len(b - a)}
            if any(counts.values()):
                report.concepts_changed[name] = counts
