"""The folder store: the same segments in separate safetensors files under a manifest, opened as one bank.

A file is named after its content, so an edit writes only what is new, and a manifest that replaces another may go on using
its files. `manifest.json` holds the bank's header; nothing is a part of the bank that it does not list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from gmem_bank.errors import BankNotFoundError, CorruptError, FormatError, GMemError
from gmem_bank.provenance import Json, canonical_json, sha256_of
from gmem_bank.storage import atomic, container, rules, safetensors_store, schema
from gmem_bank.storage.payload import Payload, known_hashes
from gmem_bank.storage.stored import OpenFile, Place, StoredBank, naming

SUFFIX = ".gmem"
MANIFEST = "manifest.json"
FORMAT = "gmem-bank-folder"
_OUR_HIDDEN = re.compile(
    r"\.undo-\d+-[0-9a-f]{12}\.manifest\.json|\.?\.(segment-[A-Za-z0-9_-]{1,64}|factors|tables)\.new(\.tmp)?|\.manifest\.json\.tmp"
)
"""What a killed writer of ours may leave; all else in the folder is somebody's."""
_FILE_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}-[0-9a-f]{16}\.safetensors")


def open_bank(path: Path, manifest: str = MANIFEST) -> StoredBank:
    """Open a bank folder: the manifest, and the headers of its files.

    Args:
        path: the folder.
        manifest: the manifest's file name, where not the current one is wanted.

    Raises:
        BankNotFoundError, FormatError, CorruptError: with the path in the message.
    """
    try:
        record = _read_manifest(path, manifest)
        header = schema.parse_header(record["header"])
        try:
            files = {name: OpenFile(path / name) for name in record["files"]}
        except BankNotFoundError as error:
            if _read_manifest(path, manifest) != record:
                return open_bank(path, manifest)  # an edit came between the manifest and its files
            raise CorruptError(f"its file {Path(str(error.path)).name} is gone") from error
        places: dict[str, Place] = {}
        for name, size in record["files"].items():
            file = files[name]
            if file.size != size:
                raise CorruptError(f"its file {name} has {file.size} bytes, the manifest says {size}")
            own = safetensors_store.places_of(file, safetensors_store.read_container(file))
            twice = sorted(set(own) & set(places))
            if twice:
                raise CorruptError(f"entry {twice[0]!r} is in two of its files", tensor=twice[0])
            places |= own
        return StoredBank(path, header, places, sum(record["files"].values()) + (path / manifest).stat().st_size)
    except GMemError as error:
        naming(error, path)
        raise


def _read_manifest(path: Path, manifest: str) -> dict[str, Json]:
    if not path.exists():
        raise BankNotFoundError(
            f"no bank at {path}: make one with 'gmem-bank shard BANK -o {path}', or name another with --bank", path=path
        )
    try:
        text = (path / manifest).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FormatError(f"{path} is a folder without {manifest}: not a bank", path=path) from error
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"could not read {path / manifest}: {error}", path=path) from error
    try:
        record = json.loads(text)
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise FormatError("the manifest does not say that this is a gmem bank")
        rendered = _render(record.get("header"), record.get("files"))
    except GMemError:  # a ValueError too
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"the manifest is not valid JSON: {error}") from error
    if text != rendered:
        raise CorruptError("the manifest does not match its checksum: it was changed or damaged")
    files = record["files"]
    if not isinstance(files, dict) or not all(
        _FILE_NAME.fullmatch(name) and type(size) is int for name, size in files.items()
    ):
        raise CorruptError("the manifest's list of files is damaged")
    return record


def _render(header: Json, files: Json) -> str:
    record = {"format": FORMAT, "header": header, "files": files}
    return canonical_json({**record, "checksum": sha256_of(record)}) + "\n"


def files_of(path: Path, manifest: str = MANIFEST) -> set[str]:
    """Return the names of the files that a manifest lists."""
    return set(_read_manifest(path, manifest)["files"])


def write(path: Path, header: schema.Header, payloads: Mapping[str, Payload]) -> schema.Header:
    """Write a bank folder; its own files that do not change are not written again.

    Args, Returns: as `safetensors_store.write`.

    Raises:
        FormatError: the folder exists and is not a bank.
        WriteError: the disk refused; the previous manifest stands.
    """
    if not path.exists() or not any(path.iterdir()):
        with atomic.making_folder(path) as folder:
            return _write_into(folder, header, payloads)
    if not (path / MANIFEST).is_file():
        raise FormatError(f"{path} exists and is not a bank: choose another folder", path=path)
    return _write_into(path, header, payloads)


def num_bytes(header: schema.Header, payloads: Mapping[str, Payload]) -> int:
    """Return the size of the manifest and of the files that `write` would make."""
    files: dict[str, int] = {}
    for group, own in _grouped(header, payloads).items():
        entries = container.lay_out({name: (payload.dtype, payload.shape) for name, payload in own.items()})
        size = len(container.render(entries, {})) + max(entry.end for entry in entries.values())
        files[_file_name(group, {})] = size
    text = replace(header, hashes=known_hashes(payloads)).to_json()
    return sum(files.values()) + len(_render(json.loads(text), files).encode())


def _grouped(header: schema.Header, payloads: Mapping[str, Payload]) -> dict[str, dict[str, Payload]]:
    """Return file → its entries."""
    groups: dict[str, dict[str, Payload]] = {}
    for name, payload in payloads.items():
        groups.setdefault(_group(name, header), {})[name] = payload
    return groups


def _write_into(folder: Path, header: schema.Header, payloads: Mapping[str, Payload]) -> schema.Header:
    groups = _grouped(header, payloads)
    hashes: dict[str, str] = {}
    files: dict[str, int] = {}
    for group in sorted(groups):
        file, size, own = _write_group(folder, group, groups[group])
        hashes |= own
        files[file] = size
    final = replace(header, hashes=hashes)
    rules.check_entries(final, payloads)
    atomic.write_bytes(folder / MANIFEST, _render(json.loads(final.to_json()), files).encode())
    return final


def _group(entry: str, header: schema.Header) -> str:
    """Return which file an entry goes to: its segment's, the factors' or the tables'."""
    owner = entry.partition("/")[0]
    if any(segment.name == owner for segment in header.segments):
        return f"segment-{owner}"
    return "factors" if entry in rules.FACTORS else "tables"


def _file_name(group: str, hashes: Mapping[str, str]) -> str:
    return f"{group}-{sha256_of(dict(hashes))[:16]}.safetensors"


def _write_group(folder: Path, group: str, payloads: Mapping[str, Payload]) -> tuple[str, int, dict[str, str]]:
    """Write one file, unless all of it comes from there; return its name, its size and the hashes of its entries.

    A file of that name that other entries are to be written to may be damaged: it is replaced.
    """
    entries = container.lay_out({name: (payload.dtype, payload.shape) for name, payload in payloads.items()})
    head = container.render(entries, {})
    size = len(head) + max(entry.end for entry in entries.values())
    hashes = known_hashes(payloads)
    if schema.EMPTY_HASH not in hashes.values():
        name = _file_name(group, hashes)
        own = {payload.file.resolve() if payload.file else None for payload in payloads.values()}
        if own == {(folder / name).resolve()} and (folder / name).is_file() and (folder / name).stat().st_size == size:
            return name, size, hashes
    draft = folder / f".{group}.new"
    with atomic.replacing(draft, needed=size) as stream:
        stream.write(head)
        hashes = safetensors_store.write_entries(stream, entries, payloads)
    name = _file_name(group, hashes)
    draft.replace(folder / name)
    return name, size, hashes


def sweep(path: Path, manifests: set[str]) -> None:
    """Remove what none of the manifests lists: files of older states, and what a killed writer left."""
    listed = set().union(*(files_of(path, manifest) for manifest in manifests)) | manifests
    for file in path.iterdir():
        ours = _FILE_NAME.fullmatch(file.name) or _OUR_HIDDEN.fullmatch(file.name)
        if file.name not in listed and ours and file.is_file():
            file.unlink(missing_ok=True)
