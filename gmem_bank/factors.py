"""The arithmetic of factored banks: snippet ≈ coefficients · basis + mean, the rows of the basis orthonormal.

Shapes: N rows, B rows asked for, D dimensions, R rank, m kept coefficients, g grown directions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError
from gmem_bank.space import TINY_NORM

I8_LIMIT = 127
GROW_BELOW = 0.99
"""Cosine of a new snippet to its reconstruction below which the basis grows, where the bank recorded none of its own."""


def reconstruct(
    coefficients: NDArray[np.float32], basis: NDArray[np.float32], mean: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return coefficients · basis + mean.

    Args:
        coefficients: (B, R) float32.
        basis: (R, D) float32.
        mean: (D,) float32.

    Returns:
        (B, D) float32, not yet in any space.
    """
    snippets = coefficients @ basis
    snippets += mean
    return snippets


def inverse_norms(
    coefficients: NDArray[np.float32], basis: NDArray[np.float32], mean: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return 1/‖coefficients · basis + mean‖ without forming it: ‖c·B + μ‖² = ‖c‖² + 2c·(Bμ) + ‖μ‖² for orthonormal B.

    Args:
        coefficients: (B, R) float32.
        basis: (R, D) float32.
        mean: (D,) float32.

    Returns:
        (B,) float32; a norm of zero gives zero, as `to_space` leaves a row of zeros.
    """
    wide, centre = coefficients.astype(np.float64), mean.astype(np.float64)
    squares = np.vecdot(wide, wide) + 2 * wide @ (basis.astype(np.float64) @ centre) + centre @ centre
    norms = np.sqrt(np.maximum(squares, 0.0))
    shortest = np.maximum(norms, TINY_NORM)  # as `to_space` has it, and within f32
    return np.asarray(np.divide(1.0, shortest, out=np.zeros_like(norms), where=norms > 0), np.float32)


def scale_of(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the (R,) i8 scales for the (R,) largest absolute coefficients; 1 where theirs would be 0, as of 1e-44."""
    scale = np.asarray(largest / I8_LIMIT, np.float32)
    return np.where(scale > 0, scale, np.float32(1))


def quantise(coefficients: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return (n, R) int8 and the (R,) float32 scales of the columns: value ≈ int8 · scale, off by at most half a scale."""
    largest = np.abs(coefficients).max(axis=0, initial=0.0)
    scale = scale_of(largest)
    return quantise_by(coefficients, scale), scale


def quantise_by(coefficients: NDArray[np.float32], scale: NDArray[np.float32]) -> NDArray[np.int8]:
    """Return (n, R) int8 for given (R,) scales: rounded to nearest, ends clipped."""
    whole: NDArray[np.int8] = np.clip(np.rint(coefficients / scale), -I8_LIMIT, I8_LIMIT).astype(np.int8)
    return whole


def scatter(
    values: NDArray[np.float32], index: NDArray[np.uint16], rank: int, name: str = "index"
) -> NDArray[np.float32]:
    """Return (B, R) coefficients from the kept ones.

    Args:
        values: (B, m) float32; unused slots hold 0.
        index: (B, m) columns; unused slots hold 0.
        rank: R.
        name: the entry that the index came from, for the message.

    Raises:
        CorruptError: an index beyond the rank.
    """
    require_within(index, rank, name)
    dense = np.zeros(len(values) * rank, np.float32)
    places = index + np.arange(0, len(values) * rank, rank)[:, None]
    # unused slots add 0 to column 0; in one dimension it is eight times as fast as in two
    np.add.at(dense, places.ravel(), values.ravel())
    return dense.reshape(len(values), rank)


def require_within(index: NDArray[np.integer], rank: int, name: str) -> None:
    """Raise CorruptError where an index of a kept coefficient is beyond the rank."""
    if index.size and int(index.max()) >= rank:
        raise CorruptError(f"entry {name!r} names coefficient {int(index.max())} of {rank}", tensor=name)


def project(
    snippets: NDArray[np.float32], basis: NDArray[np.float32], mean: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the (n, R) coefficients of (n, D) snippets: (s - μ)·Bᵀ, products in float64."""
    centred = snippets.astype(np.float64) - mean
    return np.asarray(centred @ basis.astype(np.float64).T, np.float32)


@dataclass(frozen=True, kw_only=True)
class Grown:
    """A basis that reaches new snippets, and how well."""

    basis: NDArray[np.float32]
    """(R + g, D): the old rows first, as they were."""
    coefficients: NDArray[np.float32]
    """(n, R + g)."""
    cosines_before: NDArray[np.float64]
    """(n,) cosine of each snippet to its reconstruction by the old basis: what plain projection would have kept."""
    cosines_after: NDArray[np.float64]
    """(n,) the same by the grown basis."""


def grow(
    snippets: NDArray[np.float32], basis: NDArray[np.float32], mean: NDArray[np.float32], *, below: float
) -> Grown:
    """Project snippets, and add to the basis the fewest residual directions by which all reach a cosine.

    Directions are taken from the singular vectors of the residuals of those snippets that fall short, largest first.

    Args:
        snippets: (n, D) float32.
        basis: (R, D) float32, orthonormal rows.
        mean: (D,) float32.
        below: -1 to 1; a snippet whose reconstruction has a lower cosine makes the basis grow. -1 never grows.
    """
    wide, centre = basis.astype(np.float64), mean.astype(np.float64)
    centred = snippets.astype(np.float64) - centre
    before = cosines(snippets, centred @ wide.T @ wide + centre)
    short = before < below
    room = basis.shape[1] - len(basis)
    if not short.any() or not room:
        return Grown(
            basis=basis, coefficients=project(snippets, basis, mean), cosines_before=before, cosines_after=before
        )
    residuals = centred[short] - centred[short] @ wide.T @ wide
    directions = np.linalg.svd(residuals, full_matrices=False)[2][:room]

    def reached(count: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        grown = np.vstack([wide, directions[:count]])
        return grown, cosines(snippets, centred @ grown.T @ grown + centre)

    low, high = 1, len(directions)
    while (
        low < high
    ):  # more directions never lower a reconstruction's quality by much, so the fewest is found by halving
        middle = (low + high) // 2
        if (reached(middle)[1] >= below).all():
            high = middle
        else:
            low = middle + 1
    # one more orthogonalisation: the residuals were orthogonal to the basis only up to their own rounding
    grown = np.linalg.qr(reached(low)[0].T)[0].T
    grown = np.asarray(np.vstack([basis, signed(grown[len(basis) :])]), np.float32)
    after = cosines(snippets, centred @ grown.astype(np.float64).T @ grown + centre)
    return Grown(basis=grown, coefficients=project(snippets, grown, mean), cosines_before=before, cosines_after=after)


def cosines(a: NDArray[np.floating], b: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the (n,) cosines between rows; 0 where one has no direction."""
    first, second = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    cosines: NDArray[np.float64] = np.divide(np.vecdot(first, second), norms, out=np.zeros(len(first)), where=norms > 0)
    return cosines


def signed(directions: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return directions with the sign convention: the entry of largest size of each row is positive."""
    largest = np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1)
    return np.where(largest < 0, -directions, directions)
