"""FAISS's part of an index file: written by FAISS, and read by it only where the bytes are what we write.

FAISS reads any kind of index there is, among them lists that lie in another file whose name the bytes give. So the bytes are
walked first, as far as they say what they are: kinds, sizes, and what lists follow. What may vary is skipped by sizes that are
known; all else must be as in an empty index of the same kind that FAISS makes here.

Shapes: N rows, E coordinates.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError
from gmem_bank.held_settings import HeldSetting
from gmem_bank.index import require_faiss
from gmem_bank.index_choice import Plan, make_faiss
from gmem_bank.storage.stored import Place

READ_BYTES = 4 << 20
MAGIC = {"ivf-flat": b"IwFl", "ivf-pq": b"IwPQ", "ivf-rabitq": b"Iwrn", "hnsw": b"IHNf"}
LISTS = {"ivf-flat": b"ilar", "ivf-pq": b"ilar", "ivf-rabitq": b"ilbl"}
FLAT = b"IxFI"
CLASSES = {
    "ivf-flat": "IndexIVFFlat",
    "ivf-pq": "IndexIVFPQ",
    "ivf-rabitq": "IndexIVFRaBitQFastScan",
    "hnsw": "IndexHNSWFlat",
}
LIST_CLASSES = {"ilar": "ArrayInvertedLists", "ilbl": "BlockInvertedLists"}
HEADER = struct.Struct("<iqqq?i")
"""Dimensions, rows, two numbers that mean nothing, whether it is trained, metric (0: inner product)."""
NO_DIRECT_MAP = bytes(9)
HNSW_TABLES = (8, 4, 4, 8, 4)
"""Bytes an item of probabilities, neighbours a level, levels, offsets and neighbours."""
HNSW_NUMBERS = 20


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """What FAISS's part must be."""

    kind: str
    dim: int
    """E."""
    num_lists: int
    num_rows: int
    """N."""


def pour(index: Any, write: Any) -> None:
    """Give the bytes of a FAISS index to a function, some at a time."""
    faiss = require_faiss()
    writer = faiss.PyCallbackIOWriter(write, READ_BYTES)
    faiss.write_index(index, writer)


def size_of_engine(index: Any) -> int:
    """Return how many bytes a FAISS index takes in the file."""
    sizes: list[int] = []
    pour(index, lambda block: sizes.append(len(block)))
    return sum(sizes)


def read_engine(place: Place, wanted: EngineFacts) -> Any:
    """Return the FAISS index that lies at a place.

    Args:
        place: its bytes, whose hash has been checked.
        wanted: what it must be.

    Raises:
        CorruptError: it is another kind of index, of other sizes, has lists in another file, or FAISS cannot read it.
    """
    _Walk(place).require(wanted)
    faiss = require_faiss()
    position = place.begin

    def read(count: int) -> bytes:
        nonlocal position
        block = place.file.pread(min(count, place.end - position), position)
        position += len(block)
        return block

    try:
        with _LIMITS.holding((place.end - place.begin, place.end - place.begin)):
            index = faiss.read_index(faiss.PyCallbackIOReader(read, READ_BYTES), faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    except RuntimeError as error:
        raise CorruptError(f"FAISS cannot read its part of it: {str(error).splitlines()[0]}", tensor="faiss") from error
    _require_read(faiss, index, wanted)
    return index


def _limits() -> tuple[int, int]:
    faiss = require_faiss()
    return faiss.get_deserialization_vector_byte_limit(), faiss.get_deserialization_loop_limit()


def _set_limits(limits: tuple[int, int]) -> None:
    faiss = require_faiss()
    faiss.set_deserialization_vector_byte_limit(limits[0])
    faiss.set_deserialization_loop_limit(limits[1])


_LIMITS: HeldSetting[tuple[int, int]] = HeldSetting(_limits, _set_limits, exclusive=True)
"""No vector, and no loop, longer than a file of that size can hold; each file has its own, so one is read at a time."""


class _Walk:
    """Goes through the bytes of a FAISS index as far as they say what it is."""

    def __init__(self, place: Place) -> None:
        self._place, self._position = place, place.begin

    def require(self, wanted: EngineFacts) -> None:
        """Raise CorruptError unless the bytes are of such an index."""
        self._expect(MAGIC[wanted.kind], f"an index of kind {wanted.kind}")
        self._header(wanted.dim, wanted.num_rows)
        if wanted.kind == "hnsw":
            for item_bytes in HNSW_TABLES:
                self._skip(item_bytes * self._number())
            self._skip(HNSW_NUMBERS)
            self._flat(wanted.dim, wanted.num_rows)
            return
        if self._number() != wanted.num_lists:
            raise self._other("another number of lists")
        self._skip(8)  # how many lists are looked into, unless a search says
        self._flat(wanted.dim, wanted.num_lists)
        self._expect(NO_DIRECT_MAP, "no map from labels to lists")
        fixed, vector_bytes = _middle(wanted.kind, wanted.dim)
        self._expect(fixed, "codes as this version of FAISS makes them")
        self._skip(vector_bytes)
        self._expect(LISTS[wanted.kind], "lists that lie in the file itself")

    def _header(self, dim: int, num_rows: int) -> None:
        own_dim, own_rows, _, _, trained, metric = HEADER.unpack(self._take(HEADER.size))
        if (own_dim, own_rows, trained, metric) != (dim, num_rows, True, 0):
            raise self._other(f"{own_rows} rows of {own_dim} numbers where {num_rows} of {dim} were expected")

    def _flat(self, dim: int, num_rows: int) -> None:
        self._expect(FLAT, "plain vectors inside")
        self._header(dim, num_rows)
        if self._number() != dim * num_rows:
            raise self._other("another number of plain vectors")
        self._skip(4 * dim * num_rows)

    def _number(self) -> int:
        return int.from_bytes(self._take(8), "little")

    def _take(self, count: int) -> bytes:
        if count > self._place.end - self._position:
            raise self._other("it ends too early")
        self._position += count
        return self._place.file.pread(count, self._position - count)

    def _skip(self, count: int) -> None:
        if count > self._place.end - self._position:
            raise self._other("it ends too early")
        self._position += count

    def _expect(self, wanted: bytes, what: str) -> None:
        found = self._take(len(wanted))
        if found != wanted:
            raise self._other(f"expected {what}")

    def _other(self, why: str) -> CorruptError:
        where = self._position - self._place.begin
        return CorruptError(f"its part for FAISS is not what gmem writes ({why}, at byte {where})", tensor="faiss")


@cache
def _middle(kind: str, dim: int) -> tuple[bytes, int]:
    """Return the bytes between the map from labels to lists and the lists, less what was trained, and the bytes of that."""
    faiss = require_faiss()
    plan = Plan(kind=kind, num_lists=1, num_bytes=0, why="")
    whole = faiss.serialize_index(make_faiss(faiss, plan, dim, 0)).tobytes()
    empty_flat = 4 + HEADER.size + 8
    start = 4 + HEADER.size + 16 + empty_flat + len(NO_DIRECT_MAP)
    middle = whole[start : whole.rindex(LISTS[kind])]
    words = 4 * 256 * dim if kind == "ivf-pq" else 0
    return middle[: len(middle) - words], words


def _require_read(faiss: Any, index: Any, wanted: EngineFacts) -> None:
    """Raise CorruptError unless what FAISS read is what was expected."""
    facts = (type(index).__name__, index.d, index.ntotal, index.metric_type)
    if facts != (CLASSES[wanted.kind], wanted.dim, wanted.num_rows, faiss.METRIC_INNER_PRODUCT):
        raise CorruptError(f"FAISS read something else from it: {facts}", tensor="faiss")
    if wanted.kind == "hnsw":
        _require_graph(faiss, index)
        return
    lists = faiss.downcast_InvertedLists(index.invlists)
    sizes = (index.nlist, lists.nlist, lists.compute_ntotal(), type(lists).__name__)
    if sizes != (wanted.num_lists, wanted.num_lists, wanted.num_rows, LIST_CLASSES[LISTS[wanted.kind].decode()]):
        raise CorruptError(f"FAISS read other lists from it: {sizes}", tensor="faiss")
    if wanted.kind != "ivf-rabitq" and lists.code_size != index.code_size:
        raise CorruptError(f"its lists hold {lists.code_size} bytes a row, not {index.code_size}", tensor="faiss")


def _require_graph(faiss: Any, index: Any) -> None:
    """Raise CorruptError where a link of an HNSW index leads out of it or its layer: FAISS follows them unseen."""
    graph, storage = index.hnsw, faiss.downcast_index(index.storage)
    offsets, links = faiss.vector_to_array(graph.offsets), faiss.vector_to_array(graph.neighbors)
    levels = faiss.vector_to_array(graph.levels)
    sound = (
        type(storage).__name__ in ("IndexFlat", "IndexFlatIP")
        and (storage.d, storage.ntotal, len(levels), len(offsets))
        == (index.d, index.ntotal, index.ntotal, index.ntotal + 1)
        and int(offsets[-1]) == len(links)
        and bool((offsets[1:] >= offsets[:-1]).all())
        and -1 <= int(links.min(initial=-1)) <= int(links.max(initial=-1)) < index.ntotal
        and -1 <= graph.entry_point < index.ntotal
        and _has_sound_layers(faiss, graph, levels, offsets, links)
    )
    if not sound:
        raise CorruptError("the graph of its HNSW index leads out of it", tensor="faiss")


def _has_sound_layers(
    faiss: Any, graph: Any, levels: NDArray[np.int32], offsets: NDArray[np.uint64], links: NDArray[np.int32]
) -> bool:
    """Say whether each layer of an HNSW graph links nodes of that layer alone, and the search begins in the topmost.

    Args:
        faiss: the module.
        graph: `faiss.HNSW`.
        levels: (N,) in how many layers each node is.
        offsets: (N + 1,) where its links begin, ascending.
        links: of all nodes, layer by layer; -1: none, or -1 to N - 1.
    """
    ends = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    if len(ends) != graph.assign_probas.size() + 1 or ends[0] != 0 or (np.diff(ends) < 0).any():
        return False
    if not len(levels):
        return bool((graph.entry_point, graph.max_level) == (-1, -1))
    if not 1 <= levels.min() <= levels.max() < len(ends) or (np.diff(offsets) != ends[levels]).any():
        return False
    if graph.entry_point < 0 or not graph.max_level + 1 == levels.max() == levels[graph.entry_point]:
        return False
    for layer in range(1, graph.max_level + 1):
        begins = offsets[:-1][levels > layer].astype(np.int64)
        targets = links[begins[:, None] + np.arange(ends[layer], ends[layer + 1])]
        if (levels[targets[targets >= 0]] <= layer).any():
            return False
    return True
