"""How many images an encoder is given at a time.

Shapes: none here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gmem_bank.encoders import DEFAULT_BATCH_SIZE, Encoder, SupportsBatchSize
from gmem_bank.errors import ConfigError
from gmem_bank.listing import Listing
from gmem_bank.staging import planned_batch_size

BatchSize = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"


def resolve(asked: BatchSize, encoder: Encoder) -> int:
    """Return the batch size: as asked, or for "auto" the encoder's own choice; raises ConfigError."""
    if asked == AUTO:
        return encoder.best_batch_size() if isinstance(encoder, SupportsBatchSize) else DEFAULT_BATCH_SIZE
    if type(asked) is not int or asked < 1:
        raise ConfigError(f"batch_size must be 'auto' or at least 1, got {asked!r}", key="batch_size")
    return asked


def resumed(
    asked: BatchSize, encoder: Encoder, staging: Path, listed: Callable[[int], list[Listing]], *, of_part: bool = False
) -> int:
    """Return the batch size, for "auto" that of unfinished work on the same images where there is any.

    Args:
        asked: a number or "auto".
        encoder: what encodes.
        staging: folder of the unfinished work.
        listed: returns the listings for a batch size (parts of a source are cut between batches).
        of_part: this is a part of a build, and "auto" DEFAULT_BATCH_SIZE: parts must be cut alike on whatever machine.
    """
    own = DEFAULT_BATCH_SIZE if of_part and asked == AUTO else resolve(asked, encoder)
    return own if asked != AUTO else planned_batch_size(staging, listed, encoder) or own
