"""Read every byte of a bank once and say whether it is what its header promises.

One thread hashes a block while another looks at its values, and at a slice of the keys.

Shapes: N rows, b rows of a block, D dimensions, R rank.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, key_checks, kinds, segments
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import CorruptError, GMemError
from gmem_bank.kinds import FactoredBank, read_coefficients
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json
from gmem_bank.space import all_finite
from gmem_bank.storage.payload import NUMPY_DTYPE
from gmem_bank.storage.stored import BLOCK_BYTES

UNIT_TOLERANCE = {"F32": 1e-4, "F16": 2e-3, "BF16": 2e-2}
"""How far from 1 the norm of a stored unit snippet may be, by type."""
NORM_STRIDE = 16
"""f16 and bf16 snippets are brought to length 1 when they are read, so of them every 16th norm is looked at, and each for 0."""
LARGEST = 1e18
"""A coefficient beyond this has a square that float32 cannot hold."""
ORTHONORMAL = 1e-4

ValueCheck = Callable[[NDArray[Any], int], str]
"""Takes (b, …) stored values and the row of the first; returns what is wrong with them, or ""."""


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
        path: a bank file or folder.
        progress: told bytes hashed and bytes in all.

    Returns:
        A VerifyReport with every problem found; a file that cannot be opened at all raises instead.

    Raises:
        BankNotFoundError, FormatError, CorruptError: the header cannot be trusted, so nothing else can be checked.
    """
    bank = kinds.open(path)
    stored = bank.stored
    problems: list[str] = []
    key_work = _reported(key_checks.check_keys(bank), problems)
    total, done = stored.num_bytes, 0
    with ThreadPoolExecutor(1) as hasher:
        for name in stored.names():
            for size in _check_entry(bank, name, hasher, problems):
                done += size
                next(key_work, None)
                progress(done, total)
    for _ in key_work:
        pass
    for _ in _reported(_other_checks(bank), problems):
        pass
    progress(total, total)
    return VerifyReport(
        bank=str(path), num_rows=len(bank), num_entries=len(stored.names()), bytes=total, problems=problems
    )


def _reported(checks: Iterator[str], problems: list[str]) -> Iterator[None]:
    """Run checks step by step; what they yield, and our own errors, are problems."""
    try:
        for problem in checks:
            if problem:
                problems.append(problem)
            yield
    except (GMemError, IndexError, ValueError) as error:
        problems.append(str(error))


def _check_entry(bank: MemoryBank, name: str, hasher: ThreadPoolExecutor, problems: list[str]) -> Iterator[int]:
    """Hash an entry and look at its values; yield the size of each block."""
    digest, row, faulty = hashlib.sha256(), 0, False
    check = _value_check(bank, name)
    shape, dtype = bank.stored.shape(name), np.dtype(NUMPY_DTYPE[bank.stored.dtype(name)])
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, BLOCK_BYTES // max(1, row_bytes)) * row_bytes or BLOCK_BYTES
    for block in bank.stored.blocks(name, step):
        hashed = hasher.submit(digest.update, block)
        if check is not None and not faulty:
            values = np.frombuffer(block, dtype).reshape(-1, *shape[1:])
            reason = check(values, row)
            row += len(values)
            faulty = bool(reason)
            problems += [f"entry {name!r}: {reason}"] if reason else []
        yield len(block)
        hashed.result()
    if digest.hexdigest() != bank.header.hashes[name]:
        problems.append(f"entry {name!r} does not match its hash: its bytes were changed or damaged")


def _value_check(bank: MemoryBank, name: str) -> ValueCheck | None:
    owner, _, what = name.partition("/")
    if not any(segment.name == owner for segment in bank.header.segments):
        return _finite if name in ("basis", "mean", "singular_values") and bank.header.kind == "factored" else None
    if what == "snippets":
        return _unit_check(bank.stored.dtype(name)) if bank.space == "unit" else _finite
    if what == "index" and isinstance(bank, FactoredBank):
        return _index_check(bank, owner)
    if what == "scale":
        return _scale_check
    return _finite if what in ("coefficients", "values") else None


def _index_check(bank: FactoredBank, owner: str) -> ValueCheck:
    scale = f"{owner}/scale"
    rank = bank.stored.shape(scale)[0] if scale in bank.stored else bank.rank

    def check(values: NDArray[Any], row: int) -> str:
        bad = np.flatnonzero((values >= rank).any(axis=1))
        return f"its row {row + int(bad[0])} names a coefficient beyond the {rank} there are" if len(bad) else ""

    return check


def _scale_check(values: NDArray[Any], row: int) -> str:
    bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
    return f"scale {row + int(bad[0])} is not above zero" if len(bad) else ""


def _finite(values: NDArray[Any], row: int) -> str:
    if values.dtype == np.int8:
        return ""
    if values.dtype == np.float32:
        sound = all_finite(values)
    else:
        sound = bool((_row_sizes(values) < _infinity(values)).all())
    if sound:
        return ""
    bad = ~np.isfinite(segments.widen(values)).reshape(len(values), -1).all(axis=1)
    return f"its row {row + int(np.flatnonzero(bad)[0])} is not finite"


def _row_sizes(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Return for (b, …) f16 or bf16 rows the bits of their largest absolute value, shifted up over the sign."""
    sizes: NDArray[np.uint16] = (values.view(np.uint16).reshape(len(values), -1) << np.uint16(1)).max(axis=1)
    return sizes


def _infinity(values: NDArray[Any]) -> np.uint16:
    """Return the bits of infinity, shifted up over the sign: no finite value reaches them."""
    return np.uint16(0xF800 if values.dtype == np.float16 else 0xFF00)


def _unit_check(dtype: str) -> ValueCheck:
    stride, tolerance = 1 if dtype == "F32" else NORM_STRIDE, UNIT_TOLERANCE[dtype]

    def check(values: NDArray[Any], row: int) -> str:
        if stride > 1:
            sizes = _row_sizes(values)
            if int(sizes.max()) >= _infinity(values):
                return _finite(values, row)
            if not sizes.all():
                return f"its row {row + int(np.flatnonzero(sizes == 0)[0])} is all zeros"
        elif _finite(values, row):
            return _finite(values, row)
        first = -row % stride
        wide = segments.widen(values[first::stride])
        with np.errstate(over="ignore"):  # an infinite norm is off too
            norms = np.sqrt(np.vecdot(wide, wide))
        off = np.flatnonzero(np.abs(norms - 1) > tolerance)
        return (
            f"its row {row + first + int(off[0]) * stride} has norm {norms[off[0]]:.4f}, expected 1" if len(off) else ""
        )

    return check


def _other_checks(bank: MemoryBank) -> Iterator[str]:
    yield from _check_concepts(bank)
    if isinstance(bank, FactoredBank):
        wide = bank.basis.astype(np.float64)
        off = float(np.abs(wide @ wide.T - np.eye(len(wide))).max())
        yield "" if off < ORTHONORMAL else f"the rows of 'basis' are not orthonormal: off by {off:.1e}"
        yield from _check_reconstructions(bank)


def _check_reconstructions(bank: FactoredBank) -> Iterator[str]:
    """Yield the first row of each segment that cannot be rebuilt: beyond float32, or in unit space without a direction."""
    step = max(1, BLOCK_BYTES // (8 * bank.rank))
    for segment in bank.header.segments:
        for start in range(0, segment.num_rows, step):
            rows = np.arange(start, min(start + step, segment.num_rows))
            coefficients = read_coefficients(bank.stored, segment.name, rows, bank.rank)
            with np.errstate(all="ignore"):
                norms = factors.inverse_norms(coefficients, bank.basis[: coefficients.shape[1]], bank.mean)
            bad = ~np.isfinite(norms) | (norms <= (0 if bank.space == "unit" else -1))
            bad |= ~np.isfinite(coefficients).all(axis=1) | (np.abs(coefficients).max(axis=1) > LARGEST)
            if bad.any():
                yield f"segment {segment.name}: its row {start + int(np.flatnonzero(bad)[0])} cannot be rebuilt"
                break
            yield ""
        bank.stored.release()


def _check_concepts(bank: MemoryBank) -> Iterator[str]:
    for name in bank.names:
        rows = bank.all_rows_of(name)
        if not len(rows) or (np.diff(rows) <= 0).any():
            yield f"the rows of concept {name!r} are not ascending, or there are none"
    if bank.names:
        offsets = bank.stored.array("concepts.offsets")
        if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] != len(bank.stored.array("concepts.rows")):
            raise CorruptError(f"{bank.path}: the offsets of the concepts are damaged", path=bank.path)
