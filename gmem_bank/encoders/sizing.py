"""The batch size that suits a device: by its memory, not by the clock, so that the choice is the same every time.

Shapes: none here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gmem_bank.encoders import DEFAULT_BATCH_SIZE

PROBE_IMAGES = 8
LARGEST = 512
SHARE = 0.25
"""Of a GPU's memory that a batch may take: beyond a few hundred images a larger one is no faster."""


def best_batch_size(device: torch.device, encode: Callable[[int], object]) -> int:
    """Return how many images to encode at a time.

    Args:
        device: where the encoder runs.
        encode: encodes so many blank images.

    Returns:
        DEFAULT_BATCH_SIZE on a CPU; on CUDA the largest power of two, up to LARGEST, whose working memory is within SHARE of the
        device's.
    """
    if device.type != "cuda":
        return DEFAULT_BATCH_SIZE
    encode(1)  # what is allocated once
    return largest_that_fits(_bytes_an_image(device, encode), torch.cuda.get_device_properties(device).total_memory)


def largest_that_fits(bytes_an_image: int, total: int) -> int:
    """Return the largest power of two, 1 to LARGEST, of which so many bytes each fit into SHARE of the total."""
    fits = max(1, int(total * SHARE) // max(1, bytes_an_image))
    return min(LARGEST, 1 << (fits.bit_length() - 1))


def _bytes_an_image(device: torch.device, encode: Callable[[int], object]) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    encode(PROBE_IMAGES)
    return int(torch.cuda.max_memory_allocated(device) - before) // PROBE_IMAGES
