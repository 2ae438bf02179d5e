"""How many images an encoder takes at a time.

Shapes: n images.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEFAULT_BATCH_SIZE = 32
"""Images a call where nobody asks for another number: on a CPU more gain nothing."""


def padded(images: NDArray[Any], size: int) -> Iterator[tuple[NDArray[Any], int]]:
    """Yield images `size` at a time, the last part filled up with zeros, and how many of each part are real."""
    for start in range(0, len(images), size):
        part = images[start : start + size]
        count = len(part)
        if count < size:
            part = np.concatenate([part, np.zeros((size - count, *part.shape[1:]), part.dtype)])
        yield part, count
