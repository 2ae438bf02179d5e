"""Export a bank as the tensors of the published GMem code, in a safetensors file.

Shapes: n active rows, b rows of a block, D dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import errors, kinds, segments, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.editing import EditReport
from gmem_bank.errors import FormatError
from gmem_bank.ops import PathLike
from gmem_bank.storage import Payload, atomic, container, safetensors_store

BLOCK_BYTES = 16 << 20


DENSE_NAME = "memory_bank"
"""What the one tensor of a dense bank is called in an export."""


def to_official(bank: MemoryBank) -> dict[str, NDArray[Any]]:
    """Return a bank's active rows as the published code holds them; masked rows are left out.

    C·Mᵀ + mean is the raw reconstruction, of a bank in unit space too (the published code normalises on use). S holds the norms
    of the columns of the coefficients, which any edit keeps true.

    Args:
        bank: an open bank.

    Returns:
        Of a factored bank C (n, R), M (D, R), S (R,), mean (D,) float32, latent_dim and feature_dim () int64; of a dense one
        memory_bank (n, D) float32.

    Raises:
        GMemError: every row is masked.
        CorruptError: a value is not finite.
    """
    return {name: streams.read(payload) for name, payload in _official_payloads(bank).items()}


def export_official(bank: MemoryBank, output: PathLike) -> EditReport:
    """Write what `to_official` gives as a safetensors file f, in bounded memory; a pickle is never written.

    Whoever needs a .pth makes it of a factored bank by `torch.save({k: v if v.ndim else v.item() for k, v in
    safetensors.torch.load_file(f).items()}, "bank.pth")`, of a dense one by `torch.save(load_file(f)["memory_bank"], …)`.

    Args:
        bank: an open bank.
        output: .safetensors file to write.

    Raises:
        FormatError: another ending.
        OutputExistsError: something is there.
        GMemError, CorruptError: as `to_official`.
        LockedError, WriteError: another writer, or no room.
    """
    target = Path(output)
    if target.suffix.lower() != ".safetensors":
        raise FormatError(f"{target}: an export ends in .safetensors, since no pickle is ever written", path=target)
    with atomic.locked(target):
        if target.exists() or target.is_symlink():
            raise errors.OutputExistsError(f"{target} exists: choose another name, or delete it first", path=target)
        payloads = _official_payloads(bank)
        entries = container.lay_out({name: (payload.dtype, payload.shape) for name, payload in payloads.items()})
        start = container.render(entries, {})
        size = len(start) + max(entry.end for entry in entries.values())
        with atomic.replacing(target, needed=size) as stream:
            stream.write(start)
            safetensors_store.write_entries(stream, entries, payloads)
    shapes = {name: list(payload.shape) for name, payload in payloads.items()}
    return EditReport(
        operation="export", bank=str(bank.path), output=str(target), num_rows=len(bank.rows()),
        details={"tensors": shapes, "bytes": size}, fingerprint=bank.fingerprint,
    )  # fmt: skip


def _official_payloads(bank: MemoryBank) -> dict[str, Payload]:
    rows = bank.rows()
    if not len(rows):
        raise errors.GMemError(f"every row of {bank.path} is masked: unmask those to export", path=bank.path)
    if not isinstance(bank, kinds.FactoredBank):
        blocks = lambda: (block for _, block in bank.snippet_blocks(rows))  # noqa: E731
        return {DENSE_NAME: segments.snippet_payload(blocks, len(rows), bank.dim, "f32")}
    S = np.sqrt(sum(np.square(block, dtype=np.float64).sum(axis=0) for block in _coefficients(bank, rows)))
    S = np.where(S > 0, S, 1.0).astype(np.float32)  # any S above zero fits its own C and M
    root = np.sqrt(S.astype(np.float64))
    scaled = lambda: ((block / root).astype(np.float32) for block in _coefficients(bank, rows))  # noqa: E731
    return {
        "C": segments.snippet_payload(scaled, len(rows), bank.rank, "f32"),
        "M": Payload.of((bank.basis.T * root).astype(np.float32)),
        "S": Payload.of(S),
        "mean": Payload.of(bank.mean),
        "latent_dim": replace(Payload.of(np.array([bank.rank])), shape=()),
        "feature_dim": replace(Payload.of(np.array([bank.dim])), shape=()),
    }


def _coefficients(bank: kinds.FactoredBank, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    step = max(1, BLOCK_BYTES // (4 * bank.rank))
    for start in range(0, len(rows), step):
        yield bank.coefficients(rows[start : start + step])
        bank.stored.release()
