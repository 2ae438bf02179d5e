"""A process that decodes images for another, started by `decode_process`.

It reads a JSON line for each job on stdin, puts the pixels into memory that it shares with whoever asks, and answers on stdout
with a JSON line; at the end of its input it ends. Neither side unpickles anything, and nothing of the caller's program is
imported again.

Shapes: n images of a job, S×S pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gmem_bank.contents import read_item
from gmem_bank.decoding import decode_picture
from gmem_bank.encoders.preprocess import crop
from gmem_bank.errors import SourceError
from gmem_bank.listing import Item

NICE = 10
"""Workers yield to the encoder: on a CPU its threads wait for one another, and one that is held up holds up all."""
MOST_REASON = 500
"""Characters: answers to jobs ahead must fit into a pipe, or both sides would wait for the other to read."""


def decode_one(item: Item, preprocessing: Mapping[str, Any]) -> tuple[str, NDArray[np.uint8] | str]:
    """Return the sha256 of an image's bytes ("" where there are none) and its (S, S, 3) crop, or why there is none."""
    data = b""
    try:
        data = read_item(item)
        pixels = crop(decode_picture(data), preprocessing)
    except SourceError as error:
        return _sha256(data), error.message.removeprefix(f"{item.path}: ")[:MOST_REASON]
    except MemoryError:
        return _sha256(data), "there is too little memory to decode it"
    return _sha256(data), np.ascontiguousarray(pixels[:, ::-1]) if item.flipped else pixels


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""


def answer(line: bytes, memory: NDArray[np.uint8]) -> bytes:
    """Do one job: {"items": [[key, path, size, flipped, inside, place, column], …], "preprocessing": {…}, "place": byte}.

    Args:
        line: the job, as JSON.
        memory: (bytes,); pixels of images that can be used are put there one after the other, from "place" on.

    Returns:
        [[sha256, reason or null], …], as JSON on a line.
    """
    job = json.loads(line)
    place: int = job["place"]
    facts: list[tuple[str, str | None]] = []
    for record in job["items"]:
        digest, found = decode_one(_item(record), job["preprocessing"])
        if isinstance(found, str):
            facts.append((digest, found))
            continue
        memory[place : place + found.size] = found.reshape(-1)
        place += found.size
        facts.append((digest, None))
    return json.dumps(facts).encode() + b"\n"


def record_of(item: Item) -> list[Any]:
    """Return what a worker has to know of an image, as JSON."""
    return [item.key, os.fspath(item.path), item.size, item.flipped, item.inside, item.place, item.column]


def _item(record: list[Any]) -> Item:
    key, path, size, flipped, inside, place, column = record
    return Item(
        key=key, path=Path(path), size=size, modified=0, flipped=flipped, inside=inside, place=place, column=column
    )


def _own_output() -> BinaryIO:
    """Return stdout for answers alone, and keep stderr for Python: libraries write to both of their own accord."""
    answers = os.fdopen(os.dup(1), "wb")
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    return answers


def main(descriptor: int) -> int:
    """Answer jobs until the input ends; the descriptor is that of the shared memory."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this; then the input ends
    os.nice(NICE)
    warnings.simplefilter("ignore")  # Pillow warns of oddities that decode well; failures raise
    answers = _own_output()
    memory = np.frombuffer(mmap.mmap(descriptor, 0), np.uint8)
    os.close(descriptor)
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        for line in sys.stdin.buffer:
            answers.write(answer(line, memory))
            answers.flush()
    return 0
