"""The one place where a space is applied: `raw` leaves a snippet as it is, `unit` gives it an L2 norm of 1.

Shapes: N rows, D dimensions.
"""

from __future__ import annotations

import sys
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Space = Literal["raw", "unit"]

MANY = 1 << 16
"""Values from which on PyTorch's threads pay, where it is loaded already."""
TINY_NORM = 1e-12
"""A snippet shorter than this has no direction and cannot be brought to unit length."""
NO_DIRECTION = "its snippet is all zeros, or so short that it has no direction: a bank built with --space raw keeps it"


def to_space(snippets: NDArray[np.float32], space: Space) -> NDArray[np.float32]:
    """Return the snippets in a space.

    Args:
        snippets: (N, D) float32, finite.
        space: "raw" or "unit".

    Returns:
        (N, D) float32; the same array for "raw", a new one for "unit". A row of zeros stays zero.
    """
    if space == "raw":
        return snippets
    return scale_to_unit(snippets.copy())


def scale_to_unit(snippets: NDArray[np.float32]) -> NDArray[np.float32]:
    """Bring (N, D) snippets to length 1 in place, and return them; a row of zeros stays zero."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.vecdot(snippets, snippets))
    if (
        not norms.max(initial=0.0) < np.inf
    ):  # values whose squares f32 does not hold; one that is not finite makes its row NaN
        _scale_wide(snippets, np.flatnonzero(~np.isfinite(norms)))
        norms[~np.isfinite(norms)] = 1.0
    inverse = np.reciprocal(np.maximum(norms, np.float32(TINY_NORM)))[:, None]
    torch = sys.modules.get("torch")
    if torch is not None and snippets.size > MANY:
        torch.from_numpy(snippets).mul_(torch.from_numpy(inverse))  # the same products, by all its threads
    else:
        snippets *= inverse
    return snippets


def _scale_wide(snippets: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
    with np.errstate(invalid="ignore"):
        wide = snippets[rows].astype(np.float64)
        snippets[rows] = wide / np.sqrt(np.vecdot(wide, wide))[:, None]


def all_finite(values: NDArray[np.float32]) -> bool:
    """Say whether all values are finite: a finite sum of them says yes in one pass, else they are looked at one by one."""
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())


def unusable_rows(snippets: NDArray[np.float32], space: Space) -> dict[int, str]:
    """Return row → reason for every row that cannot be a snippet of the space.

    Args:
        snippets: (N, D) float32.
        space: "raw" or "unit".
    """
    reasons = {int(row): "its snippet is not finite" for row in np.flatnonzero(~np.isfinite(snippets).all(axis=1))}
    if space == "unit":
        norms = np.linalg.norm(snippets.astype(np.float64), axis=1)
        for row in np.flatnonzero(norms < TINY_NORM):
            reasons.setdefault(int(row), NO_DIRECTION)
    return reasons
