"""What made a bank: the encoder, the sources, the operations; and the hashes that stand for them. Standard library only."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from gmem_bank.errors import FormatError

Json = Any


def canonical_json(value: Json) -> str:
    """Return the one JSON text of a value: sorted keys, no spaces, no NaN, plain UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of(value: Json) -> str:
    """Return the sha256 (64 hex digits) of a value's canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the sha256 (64 hex digits) of a file's bytes."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _build(cls: type[Any], record: Json, what: str) -> Any:
    """Build a dataclass from a JSON object; fields of a later minor version go into its `extras`."""
    fields = {f.name: f for f in dataclasses.fields(cls) if f.name != "extras"}
    if not isinstance(record, dict):
        raise FormatError(f"{what} must be a JSON object, got {type(record).__name__}")
    required = {
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    missing = sorted(required - set(record))
    if missing:
        raise FormatError(f"{what} lacks {missing}")
    known = {name: value for name, value in record.items() if name in fields}
    extras = {name: value for name, value in record.items() if name not in fields}
    try:
        return cls(**known, extras=extras)
    except (TypeError, ValueError) as error:
        raise FormatError(f"{what}: {error}") from error


def _to_json(instance: Any) -> dict[str, Json]:
    """Return what `_build` reads back: the fields, and the extras beside them."""
    record = {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance) if f.name != "extras"}
    plain = {name: dict(value) if isinstance(value, Mapping) else value for name, value in record.items()}
    return {**instance.extras, **plain}


def _check(wanted: type | tuple[type, ...], /, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is int):
            raise TypeError(f"{name} has the wrong type {type(value).__name__}")


DECIDING_FIELDS = ("dim", "family", "parameters", "preprocessing", "space", "weights_sha256")
"""What of an encoder decides its numbers, and so makes its fingerprint; the rest are labels."""


@dataclass(frozen=True, kw_only=True)
class EncoderSpec:
    """What turned images into snippets.

    Two specs with the same fingerprint give the same snippets, so labels (name, weights_path, software) stay out of it.
    """

    name: str
    """As the user typed it: "dinov2", "hog"."""
    family: str
    """Which code: "transformers:dinov2", "hog", or a plug-in's own word."""
    dim: int
    """D."""
    space: str
    """"raw" or "unit"."""
    weights_sha256: str | None = None
    """Hash of the weights; None for an encoder without any."""
    preprocessing: Mapping[str, Json] = field(default_factory=dict)
    """How pixels are prepared, see `encoders.preprocess`."""
    parameters: Mapping[str, Json] = field(default_factory=dict)
    """Everything else that changes the numbers."""
    weights_path: str | None = None
    """Folder given with --weights, relative to the bank; None for the hub or for no weights."""
    software: str = ""
    """The package and version that ran."""
    labels: Mapping[str, Json] = field(default_factory=dict)
    """Further facts that do not change the numbers, such as a hub revision."""
    extras: Mapping[str, Json] = field(default_factory=dict)
    """Fields of a later minor version: kept as they are."""

    def __post_init__(self) -> None:
        _check(str, name=self.name, family=self.family, space=self.space, software=self.software)
        _check(int, dim=self.dim)
        _check((str, type(None)), weights_sha256=self.weights_sha256, weights_path=self.weights_path)
        _check(Mapping, preprocessing=self.preprocessing, parameters=self.parameters, labels=self.labels)
        if self.dim < 1:
            raise ValueError(f"dim must be at least 1, got {self.dim}")
        if self.space not in ("raw", "unit"):
            raise ValueError(f"space must be 'raw' or 'unit', got {self.space!r}")

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of all that decides the numbers."""
        record = self.to_json()
        return sha256_of({name: record[name] for name in DECIDING_FIELDS})

    def to_json(self) -> dict[str, Json]:
        """Return a JSON object that `from_json` reads back."""
        return _to_json(self)

    @classmethod
    def from_json(cls, record: Json) -> Self:
        """Read a spec; raises FormatError."""
        spec: Self = _build(cls, record, "encoder")
        return spec

    def describe(self) -> str:
        """Return "dinov2 (dim 768, unit space, 1a2b3c4d)": enough to tell two encoders apart in a message."""
        return f"{self.name} (dim {self.dim}, {self.space} space, {self.fingerprint[:8]})"


IN_ONE_FILE = ("tar", "pixels", "table")
"""Kinds of sources whose images lie inside other files."""
IMAGE_KINDS = ("folder", "list", *IN_ONE_FILE)
"""Kinds of sources whose rows have an image."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where rows came from; every row points at one by its position in the bank's list."""

    kind: str
    """"folder" (images below a folder), "list" (images that a file names), "tar" (members of tar files), "pixels"
    (arrays of images), "table" (Parquet or Arrow), "array" (a file of snippets) or "derived" (arithmetic on other rows)."""
    path: str | None = None
    """Folder, relative to the bank's folder; absolute when it is on another root; None for derived rows."""
    prefix: str = ""
    """What keys of this source carry before the path inside it: "" or "<concept>/"."""
    digest: str = ""
    """sha256 over keys and contents of the images listed."""
    num_images: int = 0
    """Images listed, readable or not."""
    columns: Mapping[str, Json] = field(default_factory=dict)
    """Of "pixels" and "table": {"image": …, "label": …, "key": …}, what was taken from where; of "tar" {"label": "cls"} where
    classes stood beside the images; not written where empty."""
    extras: Mapping[str, Json] = field(default_factory=dict)
    """Fields of a later minor version: kept as they are."""

    def __post_init__(self) -> None:
        _check(str, kind=self.kind, prefix=self.prefix, digest=self.digest)
        _check((str, type(None)), path=self.path)
        _check(int, num_images=self.num_images)
        _check(Mapping, columns=self.columns)

    def to_json(self) -> dict[str, Json]:
        """Return a JSON object that `from_json` reads back."""
        record = _to_json(self)
        return record if self.columns else {name: value for name, value in record.items() if name != "columns"}

    @classmethod
    def from_json(cls, record: Json) -> Self:
        """Read a source; raises FormatError."""
        source: Self = _build(cls, record, "source")
        return source

    def folder(self, bank_folder: Path) -> Path | None:
        """Return the source's folder seen from the bank's folder, or None for derived rows."""
        return None if self.path is None else Path(os.path.normpath(bank_folder / self.path))


def literal_parent(path: Path) -> tuple[Path, Path]:
    """Return a path or glob pattern as the longest folder of it that is there, and what lies below: its last name at least."""
    count = 1 if path.anchor else 0
    while count < len(path.parts) - 1 and Path(*path.parts[: count + 1]).is_dir():
        count += 1
    return Path(*path.parts[:count]), Path(*path.parts[count:])


def relative_to_bank(path: Path, bank_folder: Path) -> str:
    """Return a path or glob pattern relative to the bank's folder in POSIX form, absolute when they share no root.

    Links among its folders are resolved; its last name is kept even where it is a link, since keys and kind follow the name.
    """
    start = bank_folder.resolve()
    if path.name in ("", ".."):
        target = path.resolve()
    else:
        parent, below = literal_parent(path)
        target = parent.resolve() / below
    if target.anchor != start.anchor:
        return target.as_posix()
    return Path(os.path.relpath(target, start)).as_posix()
