"""One entry on its way into a file. Whatever form the file has, its bytes pass through here and are hashed once.

Shapes: whatever the schema says; this module moves bytes, it does not know what they mean.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gmem_bank.storage import schema

NUMPY_DTYPE = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
    "I8": "i1", "BOOL": "?", "F64": "<f8", "I32": "<i4", "I16": "<i2",
}  # fmt: skip
"""bfloat16 has no NumPy type: its bits are held as uint16."""
_NAME_OF = {np.dtype(spelling): name for name, spelling in NUMPY_DTYPE.items() if name != "BF16"}


@dataclass(frozen=True, kw_only=True)
class Payload:
    """One entry on its way into a file."""

    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[bytes | memoryview]]
    """Yields the bytes, little-endian and C-ordered, in order."""
    sha256: str | None = None
    """Hash of the bytes where it is known already (a copied entry)."""
    part: Callable[[int, int], Iterable[bytes | memoryview]] | None = None
    """Yields only the bytes from one place to another, where the source can: not checked against the hash."""
    label: str = ""
    """Where it came from, for messages: "bank.safetensors: entry '0/snippets'"."""
    file: Path | None = None
    """The file that it is copied from."""
    name: str = ""
    """Its name in that file, as long as all of it is copied."""

    @classmethod
    def of(cls, array: NDArray[Any], dtype: str | None = None) -> Payload:
        """Wrap an array in memory; `dtype` names the stored type where NumPy's does not tell (BF16 bits)."""
        contiguous = np.ascontiguousarray(array)  # 0-d becomes 1-d: of one item, as it should be in the file
        return cls(
            dtype=dtype or _NAME_OF[contiguous.dtype],
            shape=array.shape,
            blocks=lambda: [contiguous.view(np.uint8).data.cast("B")] if contiguous.size else [],
        )


def known_hashes(payloads: Mapping[str, Payload]) -> dict[str, str]:
    """Return name → sha256, zeros where it is not known yet: of the same length, so that a header keeps its size."""
    return {name: payload.sha256 or schema.EMPTY_HASH for name, payload in payloads.items()}


def pour(stream: BinaryIO, name: str, payload: Payload, num_bytes: int) -> str:
    """Write a payload at the stream's position and return its sha256."""
    digest = None if payload.sha256 else hashlib.sha256()
    written = 0
    for block in payload.blocks():
        stream.write(block)
        written += len(block)
        if digest is not None:
            digest.update(block)
    assert written == num_bytes, f"{name}: {written} bytes for {num_bytes}"
    return payload.sha256 or digest.hexdigest()  # type: ignore[union-attr]
