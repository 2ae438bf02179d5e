"""What may name a row or a concept. Names come from folders, commands and files of others; keys lead to images."""

from __future__ import annotations

MAX_KEY_BYTES = 65_535
FLIP_SUFFIX = "#flip"
"""Ends the key of a row whose image was mirrored left to right before it was encoded."""


def concept_name_problem(name: str) -> str:
    """Return why a text cannot name a concept ("is empty", …), or "" where it can: one part of a path, printable."""
    if not name.strip():
        return "is empty"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "looks like a path"
    if name != name.strip():
        return "begins or ends with a space"
    if not name.isprintable():
        return "has control characters"
    return ""


def key_problem(key: str) -> str:
    """Return why a text cannot be a key, or "" where it can: a relative path in UTF-8 that stays inside its source."""
    try:
        size = len(key.encode())
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if not 1 <= size <= MAX_KEY_BYTES or "\0" in key:
        return f"must have 1 to {MAX_KEY_BYTES} bytes and no NUL"
    if key.startswith("/") or ".." in key.split("/"):
        return "leads out of its source"
    return ""


def image_key_problem(key: str) -> str:
    """Return why a text cannot be the key of an image in a source, or "" where it can: no key of a mirrored twin either."""
    return key_problem(key) or (
        f"ends in {FLIP_SUFFIX!r}, which marks mirrored twins" if key.endswith(FLIP_SUFFIX) else ""
    )
