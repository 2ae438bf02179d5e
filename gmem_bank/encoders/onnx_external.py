"""Which files outside an ONNX file its weights lie in: a walk over the protobuf message, as a parser would read it.

A name that was overlooked would be read by the runtime from the working folder, past the fingerprint; so every place that can
hold a tensor is visited, and what is not well formed is refused.

Shapes: none here.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
"""Wire types; the others (groups) are in no ONNX file."""
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external data"},
    "external data": {},
}
"""Message → field → message inside it (onnx.proto), as far as it leads to external data."""
KEY, VALUE = 1, 2


def external_names(model: bytes) -> set[str]:
    """Return the file names of all external data of an ONNX file's bytes; raises ValueError where they are malformed."""
    names: set[str] = set()
    found = [("model", memoryview(model))]
    while found:  # no recursion: messages may lie in each other as deep as the file likes
        message, data = found.pop()
        if message == "external data":
            names |= _location(data)
            continue
        inside = MESSAGES[message]
        found += [(inside[number], value) for number, value in _fields(data) if number in inside]
    return names


def _location(entry: memoryview) -> set[str]:
    """Return the value of an entry whose key is "location", as a set of at most one."""
    fields = [(number, str(value, "utf-8")) for number, value in _fields(entry) if number in (KEY, VALUE)]
    record = dict(fields)
    if len(record) != len(fields):
        raise ValueError("an entry of external data says its key or value twice")
    return {record.get(VALUE, "")} if record.get(KEY) == "location" else set()


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Yield number and bytes of every length-delimited field; the others are passed over."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if not 0 < number < 1 << 29:
            raise ValueError(f"there is no field {number}")
        if wire == VARINT:
            _, at = _varint(data, at)
            continue
        if wire not in (FIXED64, BYTES, FIXED32):
            raise ValueError(f"field {number} has the wire type {wire}, which ONNX does not use")
        size, at = _varint(data, at) if wire == BYTES else (8 if wire == FIXED64 else 4, at)
        if size > len(data) - at:
            raise ValueError(f"field {number} goes on beyond its end")
        if wire == BYTES:
            yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """Return a variable-length number of at most 64 bits, and the place after it."""
    value = 0
    for place in range(10):
        if at + place >= len(data):
            raise ValueError("it ends within a number")
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number has more than ten bytes")
