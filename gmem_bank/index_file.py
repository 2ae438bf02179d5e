"""The file of an index: a safetensors container with FAISS's own bytes (or plain vectors), a table of rows, and canonical JSON.

It is distrusted as a bank is: sizes must tile the file, the JSON and each entry stand under a sha256 that is checked before
FAISS sees a byte, and FAISS gets only bytes that begin as what we write does; see `index_facts` and `index_engine`.

Shapes: L labels (numbers that FAISS knows rows by), N rows, E coordinates, D dimensions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import BankNotFoundError, CorruptError, GMemError
from gmem_bank.index import require_faiss
from gmem_bank.index_engine import READ_BYTES, EngineFacts, pour, read_engine, size_of_engine
from gmem_bank.index_facts import METADATA_KEY, VERSION, facts_of, facts_rows
from gmem_bank.provenance import Json, canonical_json
from gmem_bank.storage import atomic, container
from gmem_bank.storage.payload import NUMPY_DTYPE
from gmem_bank.storage.safetensors_store import places_of, read_container
from gmem_bank.storage.stored import OpenFile, Place

NO_HASH = "0" * 64
TABLES = {
    "rows": ("I64", 1),
    "keys": ("U64", 1),
    "values": ("U64", 1),
    "axes": ("F32", 2),
    "vectors": ("F32", 2),
    "faiss": ("U8", 1),
}
"""Entry → type and number of dimensions."""


@dataclass(frozen=True, kw_only=True)
class Streamed:
    """Vectors on their way into the file, never in memory as a whole."""

    shape: tuple[int, int]
    blocks: Callable[[], Iterable[NDArray[np.float32]]]
    """Yields (b, E) float32, L in all."""


@dataclass(frozen=True, kw_only=True)
class IndexState:
    """What an index is, in memory or mapped."""

    facts: Mapping[str, Any]
    """JSON: kind, dim (E), bank (fingerprint), content (see `row_identity`), settings, measured, trained_rows."""
    rows: NDArray[np.int64]
    """(L,) row of each label; -1: gone."""
    keys: NDArray[np.uint64]
    """(L,) hash of each row's key."""
    values: NDArray[np.uint64]
    """(L,) hash of each row's values."""
    axes: NDArray[np.float32] | None = None
    """(E, D) that queries are projected on; None: the identity."""
    vectors: NDArray[np.float32] | Streamed | None = None
    """(L, E) of a flat index: unit vectors."""
    faiss: Any = None
    """Of any other."""

    @property
    def kind(self) -> str:
        """One of `index_choice.KINDS`."""
        return str(self.facts["kind"])


def index_path(bank_path: Path) -> Path:
    """Return where the index of a bank lies: beside it, bank.safetensors.index; of a link beside what it leads to."""
    bank_path = bank_path.resolve() if bank_path.is_symlink() else bank_path
    return bank_path.with_name(f"{bank_path.name}.index")


def size_of(state: IndexState) -> int:
    """Return the bytes that the entries of an index take."""
    return max(entry.end for entry in _layout(state)[0].values())


def file_bytes(state: IndexState) -> int:
    """Return the bytes of the file that `write_index` makes of an index."""
    entries = _layout(state)[0]
    return len(_render(entries, {**state.facts, "hashes": dict.fromkeys(entries, NO_HASH)})) + size_of(state)


def _layout(state: IndexState) -> tuple[dict[str, container.Entry], dict[str, NDArray[Any] | Streamed]]:
    optional = {"axes": state.axes, "vectors": state.vectors}
    present: dict[str, NDArray[Any] | Streamed] = {"rows": state.rows, "keys": state.keys, "values": state.values}
    present |= {name: array for name, array in optional.items() if array is not None}
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {name: (TABLES[name][0], a.shape) for name, a in present.items()}
    if state.faiss is not None:
        shapes["faiss"] = ("U8", (size_of_engine(state.faiss),))
    return container.lay_out(shapes), present


def write_index(path: Path, state: IndexState) -> None:
    """Write an index atomically; raises WriteError."""
    entries, present = _layout(state)
    reserved = _render(entries, {**state.facts, "hashes": dict.fromkeys(entries, NO_HASH)})
    with atomic.replacing(path, needed=len(reserved) + max(entry.end for entry in entries.values())) as stream:
        stream.write(reserved)
        hashes = {}
        for name in sorted(entries, key=lambda n: entries[n].begin):
            writer = _Hashing(stream)
            if name == "faiss":
                pour(state.faiss, writer)
            else:
                for block in _blocks(present[name]):
                    writer(block)
            hashes[name] = writer.digest.hexdigest()
        final = _render(entries, {**state.facts, "hashes": hashes})
        assert len(final) == len(reserved), "the header changed its length"
        stream.seek(0)
        stream.write(final)


def _render(entries: Mapping[str, container.Entry], facts: Mapping[str, Json]) -> bytes:
    text = canonical_json({**facts, "version": VERSION})
    return container.render(
        entries, {METADATA_KEY: text, f"{METADATA_KEY}_sha256": hashlib.sha256(text.encode()).hexdigest()}
    )


def _blocks(array: NDArray[Any] | Streamed) -> Iterator[memoryview]:
    if isinstance(array, Streamed):
        for part in array.blocks():
            yield from _blocks(part)
        return
    step = max(1, READ_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield np.ascontiguousarray(array[start : start + step]).view(np.uint8).data.cast("B")


class _Hashing:
    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def __call__(self, block: bytes | memoryview) -> None:
        self._stream.write(block)
        self.digest.update(block)


def read_index(path: Path) -> IndexState:
    """Open an index file; all of it is checked, vectors stay on disk.

    Raises:
        BankNotFoundError: there is none.
        FormatError, FormatVersionError: another file, or one by a newer version.
        CorruptError: damaged.
        MissingDependencyError: FAISS is not installed.
    """
    require_faiss()
    if not path.exists():
        raise BankNotFoundError(f"no index at {path}: 'gmem-bank index BANK' builds one", path=path)
    try:
        file = OpenFile(path)
        parsed = read_container(file)
        facts = facts_of(parsed.metadata)
        places = places_of(file, parsed)
        _check_entries(facts, places)
        state = _state(facts, places)
        if state.kind == "flat":
            return state
        return replace(state, faiss=read_engine(places["faiss"], _engine_facts(state)))
    except GMemError as error:
        if error.path is None:
            error.path = path
            advice = " 'gmem-bank index BANK' builds it again." if type(error) is CorruptError else ""
            error.message = f"{path}: {error.message}.{advice}"
        raise


def _check_entries(facts: Mapping[str, Any], places: Mapping[str, Place]) -> None:
    for name, place in places.items():
        if name in TABLES and (place.dtype, len(place.shape)) != TABLES[name]:
            raise CorruptError(f"entry {name!r} is {place.dtype} of shape {list(place.shape)}", tensor=name)
    if facts["kind"] == "flat" and "faiss" in places:
        raise CorruptError("a flat index with an entry 'faiss'", tensor="faiss")
    missing = {"rows", "keys", "values", "vectors" if facts["kind"] == "flat" else "faiss"} - set(places)
    if missing:
        raise CorruptError(f"it lacks {sorted(missing)}")
    num_labels = places["rows"].shape[0]
    if "axes" not in places and facts["dim"] != facts["content"]["dim"]:
        raise CorruptError(f"it has {facts['dim']} coordinates for {facts['content']['dim']} dimensions, and no axes")
    wrong = [name for name in ("keys", "values") if places[name].shape != (num_labels,)]
    for name, shape in (("vectors", (num_labels, facts["dim"])), ("axes", (facts["dim"], facts["content"]["dim"]))):
        if name in places and places[name].shape != shape:
            wrong.append(name)
    if wrong:
        raise CorruptError(f"entry {wrong[0]!r} has shape {list(places[wrong[0]].shape)}", tensor=wrong[0])
    for name, place in places.items():
        if _sha256(place) != facts["hashes"].get(name):
            raise CorruptError(f"entry {name!r} does not match its hash", tensor=name)


def _read(place: Place) -> Iterator[bytes]:
    for position in range(place.begin, place.end, READ_BYTES):
        yield place.file.pread(min(READ_BYTES, place.end - position), position)


def _sha256(place: Place) -> str:
    digest = hashlib.sha256()
    for block in _read(place):
        digest.update(block)
    return digest.hexdigest()


def _state(facts: Mapping[str, Any], places: Mapping[str, Place]) -> IndexState:
    def array(name: str) -> NDArray[Any]:
        place = places[name]
        count = int(np.prod(place.shape, dtype=np.int64))
        if not count:
            return np.zeros(place.shape, NUMPY_DTYPE[place.dtype])
        return np.frombuffer(place.file.mapped(), NUMPY_DTYPE[place.dtype], count, place.begin).reshape(place.shape)

    optional = {name: array(name) for name in ("axes", "vectors") if name in places}
    state = IndexState(facts=facts, rows=array("rows"), keys=array("keys"), values=array("values"), **optional)
    num_rows = facts_rows(facts)
    live = np.sort(state.rows[state.rows >= 0])
    if len(live) != num_rows or state.rows.min(initial=-1) < -1 or not np.array_equal(live, np.arange(num_rows)):
        raise CorruptError("its table of rows does not name each row once", tensor="rows")
    return state


def _engine_facts(state: IndexState) -> EngineFacts:
    facts = state.facts
    num_rows = int((state.rows >= 0).sum())
    if facts["kind"] == "hnsw" and num_rows != len(state.rows):
        raise CorruptError("its table of rows has gaps, which an HNSW index cannot have", tensor="rows")
    return EngineFacts(kind=state.kind, dim=facts["dim"], num_lists=facts["num_lists"], num_rows=num_rows)
