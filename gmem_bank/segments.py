"""From rows to entries: the arrays that a segment, the key table and the concepts are stored as.

Shapes: N rows of the bank, n rows of the segment, D dimensions, C concepts.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, streams
from gmem_bank.errors import GMemError
from gmem_bank.space import MANY, scale_to_unit
from gmem_bank.storage import Payload
from gmem_bank.storage.rules import SNIPPET_DTYPES

DENSE_ROWS = 4096
WIDEN_VALUES = 1 << 16
F16_REST, F16_INFINITE = np.int16(0x7FFF), 0x7C00
"""All but the sign; from here on infinite or not a number."""
F16_PLACES = np.int32(0x8FFFE000 - (1 << 32))
"""Where sign, exponent and mantissa lie after the shift."""
F16_EXPONENTS = np.float32(2.0**112)


def narrow(snippets: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Return snippets as they are stored.

    Args:
        snippets: (n, D) float32.
        dtype: "F32", "F16" or "BF16" (bits as uint16, rounded to nearest, ties to even).

    Raises:
        GMemError: a value does not fit into f16.
    """
    if dtype == "F32":
        return np.ascontiguousarray(snippets, "<f4")
    if dtype == "BF16":
        bits = np.ascontiguousarray(snippets, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    with np.errstate(over="ignore"):
        half = snippets.astype("<f2", order="C")
    if not np.isfinite(half).all():
        raise GMemError("a snippet has values beyond 65504, the largest f16: store it as f32 or bf16 with --dtype")
    return half


def widen(stored: NDArray[Any], *, finite: bool = False) -> NDArray[np.float32]:
    """Return f32 from stored f32, f16 or bfloat16 bits (uint16: a float32 without its lower half); exact, always a copy.

    Args:
        stored: of any shape.
        finite: all of it is known to be; f16 is then not looked through for what is not.
    """
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return _widen_half(stored, finite=finite) if stored.dtype == np.float16 else stored.astype(np.float32)


def _widen_half(stored: NDArray[Any], *, finite: bool) -> NDArray[np.float32]:
    """Return f32 from f16 by shifting the bits into place, in blocks that stay in the cache: twice as fast as a conversion.

    Sign and exponent land where f32 has them, the exponent 112 too low, which an exact multiplication puts right; what has
    no finite value is left to the conversion.
    """
    bits = np.ascontiguousarray(stored).reshape(-1).view(np.int16)
    wide = np.empty(bits.size, np.float32)
    for start in range(0, bits.size, WIDEN_VALUES):
        own, part = bits[start : start + WIDEN_VALUES], wide[start : start + WIDEN_VALUES]
        if not finite and (own & F16_REST).max() >= F16_INFINITE:
            part[:] = own.view(np.float16)
            continue
        shifted = part.view(np.int32)
        shifted[:] = own  # keeps the sign
        shifted <<= 13
        shifted &= F16_PLACES
        part *= F16_EXPONENTS
    return wide.reshape(stored.shape)


class Gatherer:
    """Picks rows of one stored (n, D) array and widens them to f32: by PyTorch, where that is loaded, else by NumPy.

    Both give the same bits. PyTorch uses all its threads and converts f16 twice as fast, and it is there already where speed
    matters, in training; it is never imported for this.

    Args:
        stored: (n, D) f32, f16, or bfloat16 bits; a read-only map, which is never written to.
    """

    def __init__(self, stored: NDArray[Any]) -> None:
        self._stored = stored
        self._tensor: Any = None

    def __call__(self, rows: NDArray[np.int64], *, finite: bool = False) -> NDArray[np.float32]:
        """Return (B, D) float32, a new array; `finite` as in `widen`."""
        torch = sys.modules.get("torch")
        if torch is None or len(rows) * self._stored.shape[1] < MANY:
            return widen(self._stored.take(rows, axis=0), finite=finite)
        picked: NDArray[np.float32] = self._as_tensor(torch).index_select(0, torch.from_numpy(rows)).float().numpy()
        return picked

    def _as_tensor(self, torch: Any) -> Any:
        if self._tensor is None:
            is_bf16 = self._stored.dtype == np.uint16
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "not writable": nothing here writes
                tensor = torch.from_numpy(self._stored.view(np.int16) if is_bf16 else self._stored)
            self._tensor = tensor.view(torch.bfloat16) if is_bf16 else tensor
        return self._tensor


def snippet_payload(
    blocks: Callable[[], Iterable[NDArray[np.float32]]], num_rows: int, dim: int, dtype: str
) -> Payload:
    """Return a segment's snippets as a payload.

    Args:
        blocks: yields (b, D) float32 arrays, n rows in all.
        num_rows: n.
        dim: D.
        dtype: "f32", "f16" or "bf16".
    """
    stored = SNIPPET_DTYPES[dtype]
    return Payload(
        dtype=stored,
        shape=(num_rows, dim),
        blocks=lambda: (narrow(block, stored).view(np.uint8).data.cast("B") for block in blocks() if len(block)),
    )


def segment_payloads(
    name: str,
    key_text: tuple[NDArray[np.uint8], NDArray[np.int64]],
    source_ids: NDArray[np.int64],
    snippets: Payload,
) -> dict[str, Payload]:
    """Return the entries of one segment.

    Args:
        name: the segment's name.
        key_text: text and offsets of n keys, from `keys.encode`.
        source_ids: (n,) positions in the bank's list of sources.
        snippets: from `snippet_payload`.
    """
    text, offsets = key_text
    return {
        f"{name}/snippets": snippets,
        f"{name}/keys.bytes": Payload.of(text),
        f"{name}/keys.offsets": Payload.of(offsets),
        f"{name}/source": Payload.of(source_ids.astype(np.uint32)),
    }


def key_table_payloads(hashes: NDArray[np.uint64], rows: NDArray[np.int64]) -> dict[str, Payload]:
    """Return the entries of the key table from (N,) sorted hashes and their rows."""
    return {"keys.hash": Payload.of(hashes), "keys.row": Payload.of(rows)}


def concept_payloads(concepts: Mapping[str, NDArray[np.int64]]) -> dict[str, Payload]:
    """Return the entries of the concepts (name → ascending rows), none when there are none."""
    if not concepts:
        return {}
    offsets = np.zeros(len(concepts) + 1, np.int64)
    np.cumsum([len(rows) for rows in concepts.values()], out=offsets[1:])
    rows = np.concatenate(list(concepts.values())).astype(np.int64)
    return {"concepts.rows": Payload.of(rows), "concepts.offsets": Payload.of(offsets)}


def concepts_of_folders(keys: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Return top folder → rows, in order of name: class folders are concepts; images outside any folder have none."""
    members: dict[str, list[int]] = {}
    for row, key in enumerate(keys):
        folder, slash, _ = key.partition("/")
        if slash:
            members.setdefault(folder, []).append(row)
    return {name: np.asarray(members[name], np.int64) for name in sorted(members)}


def snippets_as_f32(payload: Payload, space: str) -> Payload:
    """Return stored snippets as f32, brought to the space as reading them would (f32 stays as it is)."""
    if payload.dtype == "F32":
        return payload

    def change(block: NDArray[Any]) -> NDArray[Any]:
        wide = widen(block)
        return wide if space == "raw" else scale_to_unit(wide)

    return streams.mapped(payload, change, "F32", payload.shape)


def coefficients_as_f32(entries: Mapping[str, Payload], rank: int) -> Payload:
    """Return a segment's coefficients, sparse or i8 ones too, as (n, rank) f32 with the values that are read from them."""
    scale = streams.read(entries["scale"]) if "scale" in entries else None
    if "values" not in entries:
        stored = entries["coefficients"]
        change = lambda block: np.pad(scaled(block, scale), ((0, 0), (0, rank - block.shape[1])))  # noqa: E731
        return streams.mapped(stored, change, "F32", (stored.shape[0], rank))
    values, index = entries["values"], streams.read(entries["index"])  # two bytes a value: the values themselves stream

    def blocks() -> Iterator[memoryview]:
        start = 0
        for block in streams.row_blocks(values):
            own = index[start : start + len(block)]
            start += len(block)
            wide = scaled(block, None if scale is None else scale[own])
            for first in range(0, len(block), DENSE_ROWS):  # made dense they are many times as large
                part = slice(first, first + DENSE_ROWS)
                yield factors.scatter(wide[part], own[part], rank).view(np.uint8).data.cast("B")

    return Payload(dtype="F32", shape=(values.shape[0], rank), blocks=blocks)


def scaled(stored: NDArray[Any], scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """Return f32 coefficients from stored ones: i8 times its scale, others as they are."""
    wide = stored.astype(np.float32) if stored.dtype == np.int8 else widen(stored)
    return wide if scale is None else wide * scale
