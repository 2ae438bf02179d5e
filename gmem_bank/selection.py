"""Which rows of a bank an operation is about: by concept, by key, by pattern, or some at random.

Shapes: N rows of the bank, n rows selected.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError, UnknownKeyError
from gmem_bank.provenance import Json, sha256_of

BLOCK_KEYS = 65_536


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Rows that belong to any of the concepts, have any of the keys or match any of the patterns; of those, some at random."""

    concepts: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    """Shell patterns over whole keys, case-sensitive: "*" crosses slashes, "cat/*.jpg"."""
    invert: bool = False
    """Take all other rows instead."""
    random: int | None = None
    """Of the rows so far (all of the bank's where nothing else is given), draw this many."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.random is not None and self.random < 1:
            raise ConfigError(f"random must be at least 1, got {self.random}", key="random")
        if self.seed < 0:
            raise ConfigError(f"seed must be 0 or more, got {self.seed}", key="seed")

    @property
    def empty(self) -> bool:
        """Whether nothing was asked for."""
        return not (self.concepts or self.keys or self.patterns) and self.random is None

    def to_json(self) -> dict[str, Json]:
        """Return what was asked for, without what was not, for the history."""
        given: dict[str, Json] = {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items() if value
        }
        if self.keys:  # not the keys themselves: there may be a million, and a removed one should be gone
            given["keys"] = {"number": len(self.keys), "sha256": sha256_of(sorted(self.keys))}
        return given if self.random is not None else {name: value for name, value in given.items() if name != "seed"}


def rows_selected(bank: MemoryBank, selection: Selection) -> NDArray[np.int64]:
    """Return the (n,) rows of a selection, ascending; at least one.

    Args:
        bank: where.
        selection: which.

    Raises:
        ConfigError: nothing was asked for, or more at random than there are.
        UnknownKeyError: a concept or key that the bank does not have, a pattern that no key matches, or no row at all.
    """
    if selection.empty:
        raise ConfigError("say which rows: by --concept, --key, --keys, --pattern or --random")
    chosen = np.zeros(len(bank), np.bool_)
    if not (selection.concepts or selection.keys or selection.patterns):
        chosen[:] = True
    for name in selection.concepts:
        chosen[bank.all_rows_of(name)] = True
    if selection.keys:
        chosen[bank.rows_for(list(selection.keys))] = True
    if selection.patterns:
        chosen |= _matching(bank, selection.patterns)
    if selection.invert:
        chosen = ~chosen
    rows = np.flatnonzero(chosen).astype(np.int64)
    if selection.random is not None:
        if selection.random > len(rows):
            raise ConfigError(f"{selection.random} rows at random of {len(rows)}: ask for fewer", key="random")
        draw = np.random.Generator(np.random.PCG64(selection.seed)).choice(len(rows), selection.random, replace=False)
        rows = np.sort(rows[draw])
    if not len(rows):
        raise UnknownKeyError(f"{bank.path} has no row of that selection", path=bank.path)
    return rows


def _matching(bank: MemoryBank, patterns: tuple[str, ...]) -> NDArray[np.bool_]:
    tests = [re.compile(fnmatch.translate(pattern)) for pattern in patterns]
    matched = np.zeros(len(bank), np.bool_)
    counts = [0] * len(tests)
    for start in range(0, len(bank), BLOCK_KEYS):
        block = np.arange(start, min(start + BLOCK_KEYS, len(bank)))
        for row, key in zip(block.tolist(), bank.keys(block), strict=True):
            for place, test in enumerate(tests):
                if test.match(key):
                    matched[row] = True
                    counts[place] += 1
    unmatched = [pattern for pattern, count in zip(patterns, counts, strict=True) if not count]
    if unmatched:
        raise UnknownKeyError(f"no key of {bank.path} matches {unmatched[0]!r}", path=bank.path, key=unmatched[0])
    return matched
