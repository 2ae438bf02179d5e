"""Read every byte of a bank and say whether it is what its header promises.

Shapes: N rows, D dimensions.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass

import numpy as np

from gmem_bank import bank as bank_module
from gmem_bank import keys as key_tables
from gmem_bank import segments
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import CorruptError, GMemError
from gmem_bank.naming import key_problem
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json

BLOCK_BYTES = 16 << 20
BLOCK_KEYS = 65_536
UNIT_TOLERANCE = {"F32": 1e-4, "F16": 2e-3, "BF16": 2e-2}
"""How far from 1 the norm of a stored unit snippet may be, by type."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was found."""

    bank: str
    num_rows: int
    num_entries: int
    bytes: int
    problems: list[str]
    """Empty for a sound bank."""

    @property
    def ok(self) -> bool:
        """Whether the bank is sound."""
        return not self.problems

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return {"ok": self.ok, **asdict(self)}


def verify(path: str | os.PathLike[str], *, progress: Progress = no_progress) -> VerifyReport:
    """Check header, offsets, hashes, finite values, unit norms, keys and concepts.

    Args:
        path: a bank file.
        progress: told bytes hashed and bytes in all.

    Returns:
        A VerifyReport with every problem found; a file that cannot be opened at all raises instead.

    Raises:
        BankNotFoundError, FormatError, CorruptError: the header cannot be trusted, so nothing else can be checked.
    """
    bank = bank_module.open(path)
    problems = _check_hashes(bank, progress)
    for check in (_check_snippets, _check_keys, _check_concepts):
        try:
            problems += check(bank)
        except GMemError as error:
            problems.append(str(error))
    return VerifyReport(
        bank=str(path), num_rows=len(bank), num_entries=len(bank.stored.names()),
        bytes=bank.stored.num_bytes, problems=problems,
    )  # fmt: skip


def _check_hashes(bank: MemoryBank, progress: Progress) -> list[str]:
    total = bank.stored.num_bytes
    problems, done = [], 0
    for name in bank.stored.names():
        digest = hashlib.sha256()
        for block in bank.stored.blocks(name):
            digest.update(block)
            done += len(block)
            progress(done, total)
        if digest.hexdigest() != bank.header.hashes[name]:
            problems.append(f"entry {name!r} does not match its hash: its bytes were changed or damaged")
    progress(total, total)
    return problems


def _check_snippets(bank: MemoryBank) -> list[str]:
    problems = []
    for segment in bank.header.segments:
        name = segment.entry("snippets")
        stored, dtype = bank.stored.array(name), bank.stored.dtype(name)
        step = max(1, BLOCK_BYTES // (8 * bank.dim))
        for start in range(0, segment.num_rows, step):
            values = segments.widen(stored[start : start + step])
            if not np.isfinite(values).all():
                row = start + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                problems.append(f"segment {segment.name}: the snippet of its row {row} is not finite")
                continue
            norms = np.linalg.norm(values.astype(np.float64), axis=1)
            off = np.abs(norms - 1) > UNIT_TOLERANCE[dtype]
            if bank.space == "unit" and off.any():
                row = int(np.flatnonzero(off)[0])
                problems.append(f"segment {segment.name}: row {start + row} has norm {norms[row]:.4f}, expected 1")
    return problems


def _check_keys(bank: MemoryBank) -> list[str]:
    problems, hashes = [], np.empty(len(bank), np.uint64)
    for start in range(0, len(bank), BLOCK_KEYS):
        rows = np.arange(start, min(start + BLOCK_KEYS, len(bank)))
        keys = bank.keys(rows)
        bank.source_ids(rows)
        problems += [f"the key {key!r} {key_problem(key)}" for key in keys if key_problem(key)]
        hashes[rows] = key_tables.hashes_of(keys)
    hashes, rows = key_tables.sorted_table(hashes)
    alike = np.flatnonzero(hashes[1:] == hashes[:-1])
    for place in alike.tolist():  # equal hashes are rare and allowed, equal keys are not
        first, second = bank.keys(rows[place : place + 2])
        if first == second:
            problems.append(f"the key {first!r} occurs twice")
    if not np.array_equal(hashes, bank.stored.array("keys.hash")):
        problems.append("the table of key hashes does not belong to the keys")
    if not np.array_equal(rows, bank.stored.array("keys.row")):
        problems.append("the rows in the table of key hashes do not belong to the keys")
    return problems


def _check_concepts(bank: MemoryBank) -> list[str]:
    problems = []
    for name in bank.names:
        rows = bank.all_rows_of(name)
        if not len(rows) or (np.diff(rows) <= 0).any():
            problems.append(f"the rows of concept {name!r} are not ascending, or there are none")
    if bank.names:
        offsets = bank.stored.array("concepts.offsets")
        if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(bank.stored.array("concepts.rows")):
            raise CorruptError(f"{bank.path}: the offsets of the concepts are damaged", path=bank.path)
    return problems
