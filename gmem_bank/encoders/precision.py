"""Which type a network runs in, and what that costs: bf16 is nearly twice as fast where the machine has units for it.

Shapes: B images, D dimensions.
"""

from __future__ import annotations

import torch

from gmem_bank.encoders.names import DTYPES
from gmem_bank.errors import EncoderError

TORCH_DTYPES = dict(zip(DTYPES[1:], (torch.float32, torch.bfloat16, torch.float16), strict=True))
PAYS_FROM_WIDTH = 384
"""Narrower networks gain nothing from bf16 on a CPU (measured)."""


def choose_dtype(asked: str, device: torch.device, width: int) -> str:
    """Return "fp32", "bf16" or "fp16"; "auto" takes bf16 where the device computes in it and the network is wide enough.

    Args:
        asked: "auto", "fp32", "bf16" or "fp16".
        device: where the network runs.
        width: its hidden size.

    Raises:
        EncoderError: unknown, or fp16 on a CPU, which has no units for it.
    """
    if asked not in DTYPES:
        raise EncoderError(f"dtype must be one of {', '.join(DTYPES)}, not {asked!r}", key="dtype")
    if asked == "fp16" and device.type == "cpu":
        raise EncoderError("fp16 is slower than fp32 on a CPU: take bf16 or fp32", key="dtype")
    if asked != "auto":
        return asked
    return "bf16" if _computes_bf16(device) and (device.type != "cpu" or width >= PAYS_FROM_WIDTH) else "fp32"


def _computes_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
