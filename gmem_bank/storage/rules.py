"""Which entries a header calls for, and of which type and shape. Standard library only.

Shapes: N rows, n rows of a segment, D dimensions, R rank of the bank, R_k columns of a segment, m kept coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from gmem_bank.errors import CorruptError
from gmem_bank.storage.schema import Header, Segment

SNIPPET_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""--dtype on the command line → type of a dense bank's snippets in the file."""
COEFFICIENT_DTYPES = {"f32": "F32", "f16": "F16", "i8": "I8"}
"""--dtype on the command line → type of a factored bank's coefficients in the file."""
FACTORS = ("basis", "mean", "singular_values")
"""Entries that all segments of a factored bank share."""
BANK_WIDE = ("keys.hash", "keys.row", "concepts.rows", "concepts.offsets", "active")
"""Entries with a place for each row that belong to no segment: written anew by every edit."""
MAX_RANK = 65_536
"""An index of a kept coefficient is a u16."""


class HasShape(Protocol):
    """An entry as a store sees it."""

    @property
    def dtype(self) -> str:
        """Type name of the container, such as "F32"."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""


Rule = tuple[str, tuple[str, ...], tuple[int | None, ...]]
"""Entry name, allowed dtypes, shape (None: any size)."""


def vector_entries(header: Header, segment: Segment, entries: Mapping[str, object]) -> tuple[str, ...]:
    """Return the names, without the segment's, of the entries that hold a vector for each of its rows."""
    if header.kind == "dense":
        return ("snippets",)
    return ("values", "index") if segment.entry("values") in entries else ("coefficients",)


def _segment_rules(header: Header, segment: Segment, entries: Mapping[str, HasShape]) -> Iterator[Rule]:
    num_rows = segment.num_rows
    coefficients = tuple(COEFFICIENT_DTYPES.values())
    for what in vector_entries(header, segment, entries):
        if what == "snippets":
            yield segment.entry(what), tuple(SNIPPET_DTYPES.values()), (num_rows, header.dim)
        elif what == "index":
            yield segment.entry(what), ("U16",), (num_rows, None)
        else:
            yield segment.entry(what), coefficients, (num_rows, None)
    yield segment.entry("keys.bytes"), ("U8",), (None,)
    yield segment.entry("keys.offsets"), ("I64",), (num_rows + 1,)
    yield segment.entry("source"), ("U32",), (num_rows,)


def required_entries(header: Header, entries: Mapping[str, HasShape]) -> Iterator[Rule]:
    """Yield the entries that a header calls for."""
    for segment in header.segments:
        yield from _segment_rules(header, segment, entries)
    yield "keys.hash", ("U64",), (header.num_rows,)
    yield "keys.row", ("I64",), (header.num_rows,)
    if header.kind == "factored":
        yield "basis", ("F32",), (None, header.dim)
        yield "mean", ("F32",), (header.dim,)
    if header.concepts:
        yield "concepts.rows", ("I64",), (None,)
        yield "concepts.offsets", ("I64",), (len(header.concepts) + 1,)


def optional_entries(header: Header) -> Iterator[Rule]:
    """Yield the entries that a header allows and this version understands."""
    yield "active", ("BOOL",), (header.num_rows,)
    if header.kind == "factored":
        yield "singular_values", ("F32",), (None,)


def check_entries(header: Header, entries: Mapping[str, HasShape]) -> None:
    """Check entries against the header.

    Raises:
        CorruptError: an entry is absent, has another type or shape, or has no hash.
    """
    rules = [
        *required_entries(header, entries),
        *(rule for rule in optional_entries(header) if rule[0] in entries),
    ]
    for name, dtypes, shape in rules:
        _check_entry(name, dtypes, shape, entries)
    if header.kind == "factored":
        _check_ranks(header, entries)
    if set(header.hashes) != set(entries):
        odd = sorted(set(header.hashes) ^ set(entries))
        raise CorruptError(f"entries and hashes differ in {odd[:3]}", tensor=odd[0])


def _check_entry(
    name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...], entries: Mapping[str, HasShape]
) -> None:
    if name not in entries:
        raise CorruptError(f"entry {name!r} is missing", tensor=name)
    entry = entries[name]
    fits = len(entry.shape) == len(shape) and all(
        want is None or size == want for size, want in zip(entry.shape, shape, strict=True)
    )
    if entry.dtype not in dtypes or not fits:
        want_text = "×".join("any" if size is None else str(size) for size in shape)
        raise CorruptError(
            f"entry {name!r} is {entry.dtype} of shape {list(entry.shape)}, expected {' or '.join(dtypes)} "
            f"of shape {want_text}",
            tensor=name,
        )


def _check_ranks(header: Header, entries: Mapping[str, HasShape]) -> None:
    """Check what a single shape does not tell: columns within the rank, and one scale for each column of an i8 segment."""
    rank = entries["basis"].shape[0]
    if not 1 <= rank <= min(header.dim, MAX_RANK):
        raise CorruptError(f"the basis has {rank} rows, expected 1 to {min(header.dim, MAX_RANK)}", tensor="basis")
    if "singular_values" in entries and entries["singular_values"].shape != (rank,):
        raise CorruptError(f"'singular_values' has not one value for each of {rank} rows of 'basis'")
    for segment in header.segments:
        names = vector_entries(header, segment, entries)
        first, columns = segment.entry(names[0]), entries[segment.entry(names[0])].shape[1]
        if not 1 <= columns <= rank:
            raise CorruptError(f"entry {first!r} has {columns} columns for a basis of {rank} rows", tensor=first)
        if len(names) == 2 and entries[segment.entry("index")].shape[1] != columns:
            raise CorruptError(f"segment {segment.name}: 'values' and 'index' differ in shape", tensor=first)
        _check_scale(segment, entries, rank if len(names) == 2 else columns)


def _check_scale(segment: Segment, entries: Mapping[str, HasShape], columns: int) -> None:
    stored = entries.get(segment.entry("coefficients")) or entries[segment.entry("values")]
    name = segment.entry("scale")
    if stored.dtype == "I8":
        if name not in entries or len(entries[name].shape) != 1 or not 1 <= entries[name].shape[0] <= columns:
            raise CorruptError(
                f"entry {name!r}, the scales of i8 coefficients, is missing or has the wrong shape", tensor=name
            )
        if stored is entries.get(segment.entry("coefficients")) and entries[name].shape != (columns,):
            raise CorruptError(f"entry {name!r} must have one scale for each of {columns} columns", tensor=name)
        if entries[name].dtype != "F32":
            raise CorruptError(f"entry {name!r} must be F32", tensor=name)
    elif name in entries:
        raise CorruptError(f"entry {name!r} belongs to i8 coefficients, these are {stored.dtype}", tensor=name)
