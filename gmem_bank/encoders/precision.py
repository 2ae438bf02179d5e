"""Which type a network runs in, and what that costs: bf16 is nearly twice as fast where the machine has units for it.

Shapes: B images, D dimensions.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from gmem_bank.encoders.names import DTYPES
from gmem_bank.errors import EncoderError

TORCH_DTYPES = dict(zip(DTYPES[1:], (torch.float32, torch.bfloat16, torch.float16), strict=True))
PAYS_FROM_WIDTH = 384
"""Narrower networks gain nothing from bf16 on a CPU with AMX (measured)."""


def choose_dtype(asked: str, device: torch.device, width: int, *, reloading: bool = False) -> str:
    """Return "fp32", "bf16" or "fp16"; "auto" takes bf16 where the device computes in it and the network is wide enough.

    Args:
        asked: "auto", "fp32", "bf16" or "fp16".
        device: where the network runs.
        width: its hidden size.
        reloading: a bank is there in this type: slow is better than not at all.

    Raises:
        EncoderError: unknown, or fp16 for a new bank on a CPU, which has no units for it.
    """
    if asked not in DTYPES:
        raise EncoderError(f"dtype must be one of {', '.join(DTYPES)}, not {asked!r}", key="dtype")
    if asked == "fp16" and device.type == "cpu" and not reloading:
        raise EncoderError("fp16 is slower than fp32 on a CPU: take bf16 or fp32", key="dtype")
    if asked != "auto":
        return asked
    return "bf16" if _computes_bf16(device) and (device.type != "cpu" or width >= PAYS_FROM_WIDTH) else "fp32"


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def mean_cosine(rows: NDArray[np.float32], others: NDArray[np.float32]) -> float | None:
    """Return the mean cosine of (B, D) rows to others, over those where both are finite and not zero; None: there are none."""
    a, b = rows.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    usable = np.logical_and(*(np.isfinite(length) & (length > 0) for length in lengths))
    if not usable.any():
        return None
    return float(np.mean(np.vecdot(a[usable], b[usable]) / (lengths[0] * lengths[1])[usable]))
