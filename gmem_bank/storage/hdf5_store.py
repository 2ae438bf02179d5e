"""The HDF5 store: the same entries as contiguous datasets, written and read through their offsets, not through HDF5.

HDF5's own parser is not safe on damaged or hostile files, so a file carries a guard in its user block: a digest over every
byte that is not data. Only a file whose structure is the one that was written reaches the parser. Links to other files,
virtual datasets and filters are refused even then.

The user block holds the magic "GMEM-H5" and a line feed, its own size in 8 digits, a JSON record, and zeros to its end.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gmem_bank.errors import CorruptError, FormatError, GMemError
from gmem_bank.provenance import canonical_json
from gmem_bank.storage import atomic, rules, schema
from gmem_bank.storage.payload import NUMPY_DTYPE, Payload, known_hashes, pour
from gmem_bank.storage.stored import BLOCK_BYTES, OpenFile, Place, StoredBank, naming

if TYPE_CHECKING:
    import h5py

HEADER = "gmem"
"""Dataset that holds the bank's header: canonical JSON as bytes."""
MAGIC = b"GMEM-H5\n"
DIGITS = 8
MIN_BLOCK = 512
MAX_BLOCK = 1 << 24
ALIGNMENT = 64
_TYPES = {"<f4": "F32", "<f2": "F16", "<i8": "I64", "<u8": "U64", "<u4": "U32", "<u2": "U16", "|u1": "U8", "|i1": "I8"}
_TYPES |= {"<f8": "F64", "<i4": "I32", "<i2": "I16"}
_ODD_TYPES = {"BF16": "<u2", "BOOL": "|u1"}
"""Types that HDF5 lacks, and what holds their bytes; the attribute `gmem_dtype` of the dataset says so."""


def open_bank(path: Path) -> StoredBank:
    """Open a bank file: its structure and header only.

    Raises:
        BankNotFoundError, FormatError, CorruptError: with the path in the message.
        MissingDependencyError: h5py is not installed.
    """
    try:
        file = OpenFile(path)
        _check_guard(file)
        places, header = _read_structure(file)
        return StoredBank(path, header, places, file.size)
    except GMemError as error:
        naming(error, path)
        raise


# -- the guard


def _structure_digest(file: OpenFile, block: int, data: Sequence[Sequence[int]]) -> str:
    """Return the sha256 of all bytes after the user block that are not data."""
    digest = hashlib.sha256()
    position = block
    for begin, end in [*data, (file.size, file.size)]:
        while position < begin:
            piece = file.pread(min(BLOCK_BYTES, begin - position), position)
            if not piece:
                raise CorruptError("the file was cut short while it was read")
            digest.update(piece)
            position += len(piece)
        position = end
    return digest.hexdigest()


def _check_guard(file: OpenFile) -> None:
    start = file.pread(len(MAGIC) + DIGITS, 0)
    if not start.startswith(MAGIC) or not start[len(MAGIC) :].isdigit():
        raise FormatError(
            "not a gmem bank: an HDF5 bank begins with a user block of ours. Make one with 'gmem-bank convert'"
        )
    block = int(start[len(MAGIC) :])
    text = file.pread(block, 0) if MIN_BLOCK <= block <= MAX_BLOCK else b""
    if len(text) < MIN_BLOCK or len(text) < block:
        raise CorruptError("the user block is damaged, or the file was cut short")
    record = _guard_record(text[len(start) :].rstrip(b"\0"))
    if record["size"] != file.size:
        raise CorruptError(
            f"the file has {file.size} bytes, {record['size']} were written: it was cut short or added to"
        )
    if _structure_digest(file, block, record["data"]) != record["sha256"]:
        raise CorruptError(
            "its HDF5 structure is not the one that gmem wrote: another program changed it (links to other files, virtual "
            "and filtered datasets are not allowed in a bank), or it is damaged"
        )


def _guard_record(body: bytes) -> dict[str, Any]:
    try:
        record = json.loads(body)
        canonical = canonical_json(record).encode()  # ValueError where it has NaN or half a character
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"the user block is damaged: {error}") from error
    if not isinstance(record, dict) or body != canonical or not _is_guard(record):
        raise CorruptError("the user block is damaged: it does not say where the data lies")
    return record


def _is_guard(record: dict[str, Any]) -> bool:
    """Say whether a record has the size of a file and spans of data in it, one after the other."""
    size, spans = record.get("size"), record.get("data")
    if type(size) is not int or not isinstance(spans, list) or not isinstance(record.get("sha256"), str):
        return False
    if not all(isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span) for span in spans):
        return False
    bounds = [0, *(place for span in spans for place in span), size]
    return bounds == sorted(bounds) and size < 2**63


def _block_size(length: int) -> int:
    """Return the smallest user block (a power of two from 512 bytes) that has room for a record."""
    size = MIN_BLOCK
    while size < len(MAGIC) + DIGITS + length:
        size *= 2
    if size > MAX_BLOCK:
        raise FormatError(
            f"a bank of that many entries needs a user block of {size:,} bytes: 'gmem-bank compact' it first"
        )
    return size


# -- reading


def _read_structure(file: OpenFile) -> tuple[dict[str, Place], schema.Header]:
    import h5py

    try:
        # through the descriptor: the path may lead to another file by now
        with h5py.File(f"/dev/fd/{file.descriptor}", "r", locking=False) as root:
            places = {name: _place(file, name, dataset) for name, dataset in _datasets(root, "", set())}
    except GMemError:  # some are ValueErrors too
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CorruptError(f"HDF5 cannot read it: {error}") from error
    if HEADER not in places or places[HEADER].dtype != "U8":
        raise FormatError("an HDF5 file, but not a gmem bank: it has no dataset 'gmem'")
    header = places.pop(HEADER)
    text = file.pread(header.end - header.begin, header.begin)
    try:
        parsed = schema.parse_header_text(text.decode())
    except UnicodeDecodeError as error:
        raise CorruptError("the bank's header is not UTF-8") from error
    in_order = sorted(places, key=lambda name: (places[name].begin, places[name].end))
    return {name: places[name] for name in in_order}, parsed


def _datasets(group: h5py.Group, prefix: str, seen: set[int]) -> Iterator[tuple[str, h5py.Dataset]]:
    import h5py

    address = h5py.h5o.get_info(group.id).addr
    if address in seen:
        raise FormatError(f"{prefix or '/'} is a group that is linked twice: a bank has none")
    seen.add(address)
    for name in group:
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise FormatError(f"{prefix}{name} is a link to somewhere else: a bank has none", tensor=f"{prefix}{name}")
        member = group[name]
        if isinstance(member, h5py.Group):
            yield from _datasets(member, f"{prefix}{name}/", seen)
        elif isinstance(member, h5py.Dataset):
            yield f"{prefix}{name}", member
        else:
            raise FormatError(f"{prefix}{name} is neither a group nor a dataset", tensor=f"{prefix}{name}")


def _place(file: OpenFile, name: str, dataset: h5py.Dataset) -> Place:
    import h5py

    plist = dataset.id.get_create_plist()
    if plist.get_layout() != h5py.h5d.CONTIGUOUS:
        raise FormatError(f"dataset {name!r} is chunked, compact or virtual: a bank's are contiguous", tensor=name)
    if plist.get_nfilters() or plist.get_external_count():
        raise FormatError(f"dataset {name!r} is filtered or lies in another file: a bank's are not", tensor=name)
    label = dataset.attrs.get("gmem_dtype")
    dtype = _TYPES.get(dataset.dtype.str) if label is None else label
    if (
        not isinstance(dtype, str)
        or dtype not in NUMPY_DTYPE
        or _ODD_TYPES.get(dtype, dataset.dtype.str) != dataset.dtype.str
    ):
        raise FormatError(f"dataset {name!r} has the type {dataset.dtype} ({label}), which no bank has", tensor=name)
    if dataset.shape is None:
        raise FormatError(f"dataset {name!r} has no shape, as no bank's has", tensor=name)
    offset, size = dataset.id.get_offset(), int(dataset.nbytes)
    # of data that was never written, the library gives an offset (-1 and the user block), but no storage
    unwritten = offset is None or dataset.id.get_storage_size() != size
    if size and (unwritten or not 0 <= offset <= file.size - size):
        raise CorruptError(f"dataset {name!r} has no place in the file, or beyond its end", tensor=name)
    begin = int(offset) if size else 0
    return Place(file=file, dtype=dtype, shape=tuple(dataset.shape), begin=begin, end=begin + size)


# -- writing


def write(path: Path, header: schema.Header, payloads: Mapping[str, Payload]) -> schema.Header:
    """Write a bank atomically; equal banks give equal bytes as long as the HDF5 library is the same.

    HDF5 lays the file out; the data is then written through the offsets, hashed on its way, the header after it, and the
    guard last.

    Args, Returns, Raises: as `safetensors_store.write`.
    """
    draft = replace(header, hashes=known_hashes(payloads))
    room = len(draft.to_json().encode())
    in_order = sorted(payloads, key=lambda name: (-_item_size(payloads[name]), name))
    needed = room + sum(_num_bytes(payload) for payload in payloads.values())
    with atomic.replacing(path, needed=needed) as stream:
        block, offsets = _lay_out(atomic.temporary_path(path), {name: payloads[name] for name in in_order}, room)
        hashes = {}
        for name in in_order:
            stream.seek(offsets[name])
            hashes[name] = pour(stream, name, payloads[name], _num_bytes(payloads[name]))
        final = replace(header, hashes=hashes)
        rules.check_entries(final, payloads)
        text = final.to_json().encode()
        assert len(text) == room, "the header changed its length"
        stream.seek(offsets[HEADER])
        stream.write(text)
        stream.flush()
        spans = [
            [offsets[name], offsets[name] + _num_bytes(payloads[name])]
            for name in in_order
            if _num_bytes(payloads[name])
        ]
        _write_guard(stream, path, block, sorted(spans))
    return final


def num_bytes(header: schema.Header, payloads: Mapping[str, Payload]) -> int:
    """Return the size of the file that `write` would make, by laying one out without its data."""
    room = len(replace(header, hashes=known_hashes(payloads)).to_json().encode())
    in_order = sorted(payloads, key=lambda name: (-_item_size(payloads[name]), name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "empty.h5"
        _lay_out(path, {name: payloads[name] for name in in_order}, room)
        return path.stat().st_size


def _item_size(payload: Payload) -> int:
    import numpy as np

    return np.dtype(NUMPY_DTYPE[payload.dtype]).itemsize


def _num_bytes(payload: Payload) -> int:
    count = _item_size(payload)
    for size in payload.shape:
        count *= size
    return count


def _lay_out(path: Path, payloads: Mapping[str, Payload], room: int) -> tuple[int, dict[str, int]]:
    """Create the file's structure; return the size of its user block and the offset of each dataset."""
    block = _block_size(len(_record(2**62, [[2**62, 2**62]] * (len(payloads) + 1), "0" * 64)))
    shapes = {name: (payload.dtype, payload.shape) for name, payload in payloads.items()} | {HEADER: ("U8", (room,))}
    try:
        return block, _created(path, shapes, block)
    except (RuntimeError, OSError) as error:  # HDF5 tells of a full disk by whatever fails first
        free, needed = shutil.disk_usage(path.parent).free, sum(_num_bytes(payload) for payload in payloads.values())
        raise OSError(
            errno.ENOSPC if free < needed + (1 << 20) else errno.EIO, "HDF5 could not lay the file out"
        ) from error


def _created(path: Path, shapes: Mapping[str, tuple[str, tuple[int, ...]]], block: int) -> dict[str, int]:
    """Create empty datasets; return name → offset."""
    import h5py

    with h5py.File(
        path, "w", userblock_size=block, libver=("v110", "v110"), alignment_threshold=1, alignment_interval=ALIGNMENT
    ) as root:
        for name, (dtype, shape) in shapes.items():
            _create(root, name, dtype, shape)
        return {name: root[name].id.get_offset() if root[name].size else 0 for name in shapes}


def _create(root: h5py.File, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    import h5py
    import numpy as np

    group, _, leaf = name.rpartition("/")
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    kind = h5py.h5t.py_create(np.dtype(_ODD_TYPES.get(dtype, NUMPY_DTYPE[dtype])))
    parent = root.require_group(group) if group else root
    h5py.h5d.create(parent.id, leaf.encode(), kind, h5py.h5s.create_simple(shape), properties)
    if dtype in _ODD_TYPES:
        root[name].attrs["gmem_dtype"] = dtype


def _record(size: int, spans: list[list[int]], digest: str) -> bytes:
    return canonical_json({"data": spans, "sha256": digest, "size": size}).encode()


def _write_guard(stream: BinaryIO, path: Path, block: int, spans: list[list[int]]) -> None:
    file = OpenFile(atomic.temporary_path(path))
    body = _record(file.size, spans, _structure_digest(file, block, spans))
    stream.seek(0)
    stream.write((MAGIC + b"%08d" % block + body).ljust(block, b"\0"))
