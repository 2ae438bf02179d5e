"""Arithmetic on snippets: four ways from one to another. t = 0 is the first, t = 1 the second, everywhere.

Shapes: D dimensions, T values of t.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def linear(a: Vector, b: Vector, t: float) -> Vector:
    """Return (1 - t)·a + t·b for (D,) vectors."""
    return (1.0 - t) * a + t * b


def spherical(a: Vector, b: Vector, t: float) -> Vector:
    """Return the point at t on the great arc from a to b (Shoemake 1985), lengths interpolated linearly.

    Identical directions give that direction; opposite ones, between which every arc is as short, go by the coordinate
    axis that a has the least of, so that the result is defined and never zero.

    Args:
        a: (D,), not zero.
        b: (D,), not zero.
        t: 0 to 1.
    """
    length_a, length_b = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    start, end = a / length_a, b / length_b
    length = (1.0 - t) * length_a + t * length_b
    # The angle from chord lengths stays exact where arccos of a dot product near ±1 does not (Kahan).
    angle = 2.0 * np.arctan2(float(np.linalg.norm(start - end)), float(np.linalg.norm(start + end)))
    tangent = end - float(start @ end) * start
    if float(np.linalg.norm(tangent)) < 1e-9:
        if angle < np.pi / 2:
            return length * start
        axis = np.zeros_like(start)
        axis[int(np.argmin(np.abs(start)))] = 1.0
        tangent = axis - float(start @ axis) * start
    tangent /= float(np.linalg.norm(tangent))
    point: Vector = length * (np.cos(t * angle) * start + np.sin(t * angle) * tangent)
    return point


def concat(a: Vector, b: Vector, t: float) -> Vector:
    """Return the first (1 - t)·D dimensions of a and the rest of b; at t = 0.5 the two halves of the paper."""
    split = round((1.0 - t) * len(a))
    return np.concatenate([a[:split], b[split:]])


def masked(a: Vector, b: Vector, t: float, *, seed: int = 0) -> Vector:
    """Return each dimension from b with probability t, else from a; the same seed draws the same order of dimensions."""
    draws = np.random.Generator(np.random.PCG64(seed)).random(len(a))
    return np.where(draws < t, b, a)


METHODS: dict[str, Callable[..., Vector]] = {"linear": linear, "slerp": spherical, "concat": concat, "mask": masked}
"""Name on the command line → function."""


def interpolate(
    a: NDArray[np.float32], b: NDArray[np.float32], steps: int, method: str, *, seed: int = 0
) -> NDArray[np.float32]:
    """Return snippets at T = `steps` equally spaced t from 0 to 1, both ends included.

    Args:
        a: (D,) first snippet.
        b: (D,) second snippet.
        steps: T, at least 2.
        method: one of METHODS.
        seed: for "mask".

    Returns:
        (T, D) float32, not yet in any space.
    """
    options = {"seed": seed} if method == "mask" else {}
    first, second = a.astype(np.float64), b.astype(np.float64)
    points = [METHODS[method](first, second, float(t), **options) for t in np.linspace(0.0, 1.0, steps)]
    return np.stack(points).astype(np.float32)
