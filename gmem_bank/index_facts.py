"""What an index says of itself: canonical JSON under a sha256, each fact of its type and in its range before it is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gmem_bank.errors import CorruptError, FormatError, FormatVersionError, GMemError
from gmem_bank.index_choice import KINDS, MOST_EFFORT, MOST_LISTS
from gmem_bank.storage import container

METADATA_KEY = "gmem_index"
VERSION = 1
MOST = 1 << 48
"""More rows, dimensions or bytes than any index has; sums of them stay within 64 bits."""
FACTS = {
    "version": int, "kind": str, "dim": int, "bank": str, "content": dict, "settings": dict, "measured": list,
    "trained_rows": int, "num_lists": int, "hashes": dict,
}  # fmt: skip
SETTINGS = ("nprobe", "rerank")
START_BYTES = 1 << 16


def facts_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the checked facts from the metadata of an index file.

    Raises:
        FormatError, FormatVersionError: another file, or an index by a newer version.
        CorruptError: damaged, or facts that cannot be.
    """
    text = metadata.get(METADATA_KEY)
    if text is None:
        raise FormatError(
            "a safetensors file, but not an index of a bank: give another --index, or another name with -o"
        )
    if hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() != metadata.get(f"{METADATA_KEY}_sha256"):
        raise CorruptError("what it says of itself does not match its hash")
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"what it says of itself is not JSON: {error}") from error
    if not isinstance(facts, dict):
        raise CorruptError("what it says of itself is not a JSON object")
    version = facts.get("version")
    if isinstance(version, int) and version > VERSION:
        raise FormatVersionError(
            f"an index of version {version}, this program reads up to {VERSION}: build it again, or update gmem"
        )
    for name, wanted in FACTS.items():
        if type(facts.get(name)) is not wanted:  # exactly: True is an int too
            raise CorruptError(f"its {name} is missing or of the wrong type")
    _check(facts)
    return facts


def facts_rows(facts: Mapping[str, Any]) -> int:
    """Return N from checked facts."""
    return sum(num_rows for num_rows, _ in facts["content"]["segments"])


def _check(facts: dict[str, Any]) -> None:
    kind = facts["kind"]
    _require(facts["version"] == VERSION, "version")
    _require(kind in KINDS, "kind")
    _require(0 < facts["dim"] < MOST, "dim")
    _require(_is_count(facts["trained_rows"]), "trained_rows")
    lists = facts["num_lists"]
    _require(1 <= lists <= MOST_LISTS if kind.startswith("ivf") else lists == 0, "num_lists")
    _require(all(isinstance(value, str) for value in facts["hashes"].values()), "hashes")
    _require(_are_settings(facts["settings"], kind, lists), "settings")
    _require(all(map(_is_measured, facts["measured"])), "measured")
    _require(_is_content(facts["content"]), "content")


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise CorruptError(f"its {name} is not one that an index can have")


def _is_count(value: object, least: int = 0, most: int = MOST) -> bool:
    return type(value) is int and least <= value <= most


def _are_settings(settings: dict[str, Any], kind: str, lists: int) -> bool:
    if kind == "flat":
        return not settings
    most = MOST_EFFORT if kind == "hnsw" else lists
    return (
        set(settings) == set(SETTINGS) and _is_count(settings["nprobe"], 1, most) and _is_count(settings["rerank"], 1)
    )


def _is_measured(line: object) -> bool:
    if not isinstance(line, dict) or {type(line.get("kind")), type(line.get("how", ""))} != {str}:
        return False
    numbers = [line.get("recall"), line.get("queries_per_second"), line.get("bytes")]
    real = all(isinstance(number, int | float) and -MOST <= number <= MOST for number in numbers)  # nor is NaN
    return real and all(_is_count(line[name], 1) for name in SETTINGS if name in line)


def _is_content(content: dict[str, Any]) -> bool:
    if not (_is_count(content.get("dim"), 1) and {type(content.get(name)) for name in ("space", "encoder")} == {str}):
        return False
    segments, factors = content.get("segments"), content.get("factors")
    if not isinstance(segments, list) or not all(map(_is_segment, segments)):
        return False
    if factors is None:
        return "factors" in content
    known = isinstance(factors, dict) and {type(factors.get(name)) for name in ("mean", "basis")} == {str}
    return known and _is_count(factors.get("rank"))


def _is_segment(segment: object) -> bool:
    return isinstance(segment, list) and len(segment) == 2 and _is_count(segment[0]) and isinstance(segment[1], str)


def is_ours(path: Path) -> bool:
    """Say whether a file is an index, damaged or not: by its metadata, or where its header cannot be read by how it begins."""
    with path.open("rb") as file:
        start = file.read(START_BYTES)
        try:
            length = container.header_bytes_of(start[: container.PREFIX_BYTES], path.stat().st_size)
            file.seek(container.PREFIX_BYTES)
            metadata = json.loads(file.read(length).decode()).get("__metadata__", {})
            return METADATA_KEY in metadata
        except (GMemError, ValueError, AttributeError, TypeError, RecursionError):
            return f'"{METADATA_KEY}":"'.encode() in start  # in a text of another file its quotes are escaped
