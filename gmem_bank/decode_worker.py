"""A process that decodes images for another: `python -m gmem_bank.decode_worker`, started by `decode_pool`.

It reads a JSON line for each job on stdin and answers on stdout with a JSON line and the raw pixels; at the end of its input
it ends. Neither side unpickles anything, no memory is shared, and nothing of the caller's program is imported again.

Shapes: n images of a job, S×S pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
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


def decode_one(item: Item, preprocessing: Mapping[str, Any]) -> tuple[str, NDArray[np.uint8] | str]:
    """Return the sha256 of an image's bytes ("" where there are none) and its (S, S, 3) crop, or why there is none."""
    data = b""
    try:
        data = read_item(item)
        pixels = crop(decode_picture(data), preprocessing)
    except SourceError as error:
        return _sha256(data), error.message.removeprefix(f"{item.path}: ")
    return _sha256(data), np.ascontiguousarray(pixels[:, ::-1]) if item.flipped else pixels


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if data else ""


def answer(line: bytes, output: BinaryIO) -> None:
    """Do one job: {"items": [[key, path, size, flipped, inside, place, column], …], "preprocessing": {…}}.

    The answer is [[sha256, reason or null], …] on a line, then the pixels of those that have no reason.
    """
    job = json.loads(line)
    results = [decode_one(_item(record), job["preprocessing"]) for record in job["items"]]
    facts = [[digest, found if isinstance(found, str) else None] for digest, found in results]
    output.write(json.dumps(facts).encode() + b"\n")
    for _, found in results:
        if not isinstance(found, str):
            output.write(found.data)
    output.flush()


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


def main() -> int:
    """Answer jobs until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever started this; then the input ends
    os.nice(NICE)
    warnings.simplefilter("ignore")  # Pillow warns of oddities that decode well; failures raise
    answers = _own_output()
    with contextlib.suppress(BrokenPipeError):  # whoever asked is gone
        for line in sys.stdin.buffer:
            answer(line, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
