"""PNG and TIFF by the book (W3C PNG, third edition; TIFF 6.0), in plain zlib and NumPy: what images should look like.

Shapes: H×W pixels, C channels.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
PASSES = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""Adam7: first row, first column, step of rows, step of columns."""


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 of colours and alpha in 0 to 1 laid over white."""
    return np.rint(255 * (colour * alpha + 1 - alpha)).astype(np.uint8)


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(samples: np.ndarray, depth: int, colour_type: int, *extra: bytes) -> bytes:
    """Return a PNG of (H, W, C) samples, unfiltered; `extra` chunks go before the pixels."""
    height, width = samples.shape[:2]
    bits = samples[..., None] >> np.arange(depth - 1, -1, -1) & 1
    rows = np.packbits(bits.reshape(height, -1).astype(np.uint8), axis=1)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], axis=1).tobytes()
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    end = chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    return SIGNATURE + chunk(b"IHDR", header) + b"".join(extra) + end


def write_tiff(samples: np.ndarray, *tags: tuple[int, int], photometric: int = 1, bits: int = 0) -> bytes:
    """Return an uncompressed TIFF of (H, W) samples in their own byte order, with further (tag, short) pairs.

    `bits` 12 packs pairs of samples into three bytes; 0 takes the samples as they are.
    """
    order = ">" if samples.dtype.byteorder == ">" else "<"
    kind = {"u": 1, "i": 2, "f": 3}[samples.dtype.kind]
    data = samples.tobytes()
    if bits == 12:
        data = np.packbits(samples.reshape(-1, 1) >> np.arange(11, -1, -1) & 1).tobytes()
    height, width = samples.shape
    entries = {
        256: width, 257: height, 258: bits or 8 * samples.itemsize, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height,
        279: len(data), 339: kind, **dict(tags),
    }  # fmt: skip
    lines = [struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())]
    directory = struct.pack(f"{order}H", len(lines)) + b"".join(lines) + b"\0\0\0\0"
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HI", 42, 8 + len(data))
    return head + data + directory


def read_png(data: bytes) -> np.ndarray:
    """Return the (H, W, 3) uint8 pixels of a sound PNG over white, gamma and background aside."""
    chunks = dict(_chunks(data))
    width, height, depth, colour_type, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    samples = np.zeros((height, width, CHANNELS[colour_type]), np.int64)
    stream = zlib.decompress(b"".join(data for kind, data in _chunks(data) if kind == b"IDAT"))
    for top, left, down, right in PASSES if interlaced else ((0, 0, 1, 1),):
        part = samples[top::down, left::right]
        if part.size:
            part[...], stream = _unfiltered(stream, part.shape, depth)
    return _coloured(samples, depth, colour_type, chunks)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], len(SIGNATURE)
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        found.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + length]))
        place += length + 12
    return found


def _unfiltered(stream: bytes, shape: tuple[int, ...], depth: int) -> tuple[np.ndarray, bytes]:
    height, width, channels = shape
    length, back = -(-width * channels * depth // 8), max(1, channels * depth // 8)
    above, lines = bytearray(length), []
    for row in range(height):
        start = row * (length + 1)
        kind, line = stream[start], bytearray(stream[start + 1 : start + 1 + length])
        for i in range(length):
            a, b = line[i - back] if i >= back else 0, above[i]
            c = above[i - back] if i >= back else 0
            line[i] = (line[i] + (0, a, b, (a + b) // 2, _paeth(a, b, c))[kind]) & 255
        lines.append(line)
        above = line
    bits = np.unpackbits(np.frombuffer(b"".join(lines), np.uint8).reshape(height, length), axis=1)
    values = bits[:, : width * channels * depth].reshape(height, width, channels, depth).astype(np.int64)
    return values @ (1 << np.arange(depth - 1, -1, -1)), stream[height * (length + 1) :]


def _paeth(a: int, b: int, c: int) -> int:
    return min((a, b, c), key=lambda near: abs(a + b - c - near))


def _coloured(samples: np.ndarray, depth: int, colour_type: int, chunks: dict[bytes, bytes]) -> np.ndarray:
    clear = chunks.get(b"tRNS")
    if colour_type == 3:
        palette = np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3) / 255
        alphas = np.ones(len(palette))
        alphas[: len(clear or b"")] = np.frombuffer(clear or b"", np.uint8) / 255
        return over_white(palette[samples[..., 0]], alphas[samples[..., 0]][..., None])
    values = samples / (2**depth - 1)
    if colour_type in (4, 6):
        return over_white(np.broadcast_to(values[..., :-1], (*samples.shape[:2], 3)), values[..., -1:])
    alpha = np.ones((*samples.shape[:2], 1))
    if clear is not None:
        alpha[(samples == struct.unpack(f">{samples.shape[2]}H", clear)).all(axis=2)] = 0
    return over_white(np.broadcast_to(values, (*samples.shape[:2], 3)), alpha)
