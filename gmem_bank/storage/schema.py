"""The bank format, version 1: names, types and rules. Standard library only; docs/FORMAT.md says the same in prose.

A bank holds a header (one canonical JSON text) and named entries. This module is the header; `rules` says which entries it
calls for; where the bytes lie is the business of a store.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gmem_bank.errors import CorruptError, FormatError, FormatVersionError
from gmem_bank.naming import concept_name_problem
from gmem_bank.provenance import EncoderSpec, Json, Source, canonical_json, sha256_of

FORMAT = "gmem-bank"
VERSION = (1, 1)
METADATA_KEY = "gmem"
KINDS = ("dense", "factored")
EMPTY_HASH = "0" * 64


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A run of rows written together, never changed afterwards."""

    name: str
    num_rows: int
    extras: Mapping[str, Json] = field(default_factory=dict)
    """Fields of a later minor version: kept as they are."""

    def entry(self, what: str) -> str:
        """Return the name of one of the segment's entries, such as "0/snippets"."""
        return f"{self.name}/{what}"


@dataclass(frozen=True, kw_only=True)
class Header:
    """All of a bank that is not an array."""

    kind: str
    space: str
    dim: int
    segments: tuple[Segment, ...]
    encoder: EncoderSpec
    sources: tuple[Source, ...]
    concepts: tuple[str, ...] = ()
    history: tuple[Mapping[str, Json], ...] = ()
    hashes: Mapping[str, str] = field(default_factory=dict)
    """Entry name → sha256 of its bytes."""
    version: tuple[int, int] = VERSION
    extras: Mapping[str, Json] = field(default_factory=dict)
    """Fields of a later minor version: kept as they are."""

    @property
    def num_rows(self) -> int:
        """N."""
        return sum(segment.num_rows for segment in self.segments)

    @property
    def fingerprint(self) -> str:
        """sha256 over header and content hashes, itself and the history excluded."""
        record = self._record()
        del record["history"]
        return sha256_of(record)

    def _record(self) -> dict[str, Json]:
        return {
            **self.extras,
            "format": FORMAT,
            "version": list(self.version),
            "kind": self.kind,
            "space": self.space,
            "dim": self.dim,
            "num_rows": self.num_rows,
            "segments": [{**s.extras, "name": s.name, "num_rows": s.num_rows} for s in self.segments],
            "encoder": self.encoder.to_json(),
            "sources": [source.to_json() for source in self.sources],
            "concepts": list(self.concepts),
            "history": [dict(entry) for entry in self.history],
            "hashes": dict(self.hashes),
        }

    def to_json(self) -> str:
        """Return the canonical JSON text: equal banks, equal bytes."""
        record = {**self._record(), "fingerprint": self.fingerprint}
        return canonical_json({**record, "checksum": sha256_of(record)})


def parse_header_text(text: str) -> Header:
    """Read a header from its JSON text; raises as `parse_header` does."""
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"the bank's header is not valid JSON: {error}") from error
    return parse_header(record)


def parse_header(record: Json) -> Header:
    """Read a header and distrust it.

    Raises:
        FormatVersionError: a newer major version.
        FormatError: not a bank header, or fields that cannot be.
    """
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise FormatError("the file is not a gmem bank: its header does not say so")
    version = _pair(record.get("version"))
    if version[0] != VERSION[0]:
        raise FormatVersionError(
            f"the bank has format version {version[0]}.{version[1]}, this gmem reads {VERSION[0]}.x: "
            "upgrade with 'pip install -U gmem'"
        )
    own = {f.name for f in dataclasses.fields(Header)} - {"extras"}
    known = own | {"format", "num_rows", "fingerprint", "checksum"}
    missing = sorted(known - set(record))
    if missing:
        raise FormatError(f"the bank's header lacks {missing}")
    rest = {name: value for name, value in record.items() if name != "checksum"}
    try:
        checksum = sha256_of(rest)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"the bank's header holds what JSON does not have: {error}") from error
    if record["checksum"] != checksum:
        raise CorruptError("the bank's header does not match its checksum: it was changed or damaged")
    header = Header(
        version=version,
        kind=_one_of(record, "kind", KINDS),
        space=_one_of(record, "space", ("raw", "unit")),
        dim=_count(record, "dim", minimum=1),
        segments=tuple(_segment(item) for item in _list(record, "segments")),
        encoder=EncoderSpec.from_json(record["encoder"]),
        sources=tuple(Source.from_json(item) for item in _list(record, "sources")),
        concepts=tuple(_strings(record, "concepts")),
        history=tuple(_history(item) for item in _list(record, "history")),
        hashes=_hashes(record["hashes"]),
        extras={name: value for name, value in record.items() if name not in known},
    )
    _check_header(header, record)
    return header


def _check_header(header: Header, record: Mapping[str, Json]) -> None:
    names = [segment.name for segment in header.segments]
    if not names or len(set(names)) != len(names):
        raise CorruptError(f"the bank's segments {names} must be one or more with different names")
    for name in header.concepts:
        problem = concept_name_problem(name)
        if problem:
            raise CorruptError(f"the bank has a concept {name!r}, which {problem}", key=name)
    if len(set(header.concepts)) != len(header.concepts):
        raise CorruptError("the bank lists a concept twice")
    if record["num_rows"] != header.num_rows:
        raise CorruptError(f"the header says {record['num_rows']} rows, its segments have {header.num_rows}")
    if (header.encoder.dim, header.encoder.space) != (header.dim, header.space):
        raise CorruptError("the encoder's dimension and space differ from the bank's")
    if record["fingerprint"] != header.fingerprint:
        raise CorruptError("the bank's fingerprint does not match its header: whatever wrote it is at fault")


def _pair(value: Json) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2 and all(type(part) is int for part in value):
        return value[0], value[1]
    raise FormatError(f"the bank's version {value!r} is not [major, minor]")


def _one_of(record: Mapping[str, Json], name: str, known: tuple[str, ...]) -> str:
    value = record[name]
    if not isinstance(value, str) or value not in known:
        raise FormatError(f"the bank's {name} is {value!r}, this gmem knows {', '.join(known)}")
    return value


def _count(record: Mapping[str, Json], name: str, *, minimum: int) -> int:
    value = record[name]
    if type(value) is not int or not minimum <= value < 2**48:
        raise CorruptError(f"the bank's {name} is {value!r}, expected an integer of at least {minimum}")
    return value


def _list(record: Mapping[str, Json], name: str) -> list[Any]:
    value = record[name]
    if not isinstance(value, list):
        raise CorruptError(f"the bank's {name} is not a list")
    return value


def _strings(record: Mapping[str, Json], name: str) -> list[str]:
    values = _list(record, name)
    if not all(isinstance(value, str) for value in values):
        raise CorruptError(f"the bank's {name} is not a list of names")
    return values


def _segment(item: Json) -> Segment:
    if not isinstance(item, dict) or not {"name", "num_rows"} <= set(item) or not isinstance(item["name"], str):
        raise CorruptError(f"segment {item!r} must have a name and num_rows")
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", item["name"]):
        raise CorruptError(f"segment name {item['name']!r} must be 1 to 64 letters, digits, '_' or '-'")
    extras = {name: value for name, value in item.items() if name not in ("name", "num_rows")}
    return Segment(name=item["name"], num_rows=_count(item, "num_rows", minimum=1), extras=extras)


def _history(item: Json) -> Mapping[str, Json]:
    if (
        not isinstance(item, dict)
        or not isinstance(item.get("operation"), str)
        or not isinstance(item.get("arguments", {}), dict)
    ):
        raise CorruptError("a history entry must be an object that names its operation")
    return item


def _hashes(value: Json) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(h, str) and len(h) == 64 for h in value.values()):
        raise CorruptError("the bank's hashes are not a table of sha256 digits")
    return value
