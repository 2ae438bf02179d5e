"""The arithmetic of factored banks: snippet ≈ coefficients · basis + mean, the rows of the basis orthonormal.

Shapes: N rows, B rows asked for, D dimensions, R rank, m kept coefficients, g grown directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import CorruptError
from gmem_bank.space import TINY_NORM

Blocks = Callable[[], Iterable[NDArray[np.float32]]]
"""Yields (b, D) float32 snippets in the bank's space."""

I8_LIMIT = 127
CHUNK_VALUES = 1 << 19
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
    """A basis that reaches new snippets, and how well the old one did."""

    basis: NDArray[np.float32]
    """(R + g, D): the old rows first, as they were."""
    cosines_before: NDArray[np.float64]
    """(n,) cosine of each snippet to its reconstruction by the old basis: what plain projection would have kept."""


def row_chunks(blocks: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """Yield the rows of (b, D) blocks in order, so many at a time that float64 arrays of them stay at 4 MB."""
    for block in blocks:
        step = max(1, CHUNK_VALUES // block.shape[1])
        for start in range(0, len(block), step):
            yield block[start : start + step]


def grow(blocks: Blocks, basis: NDArray[np.float32], mean: NDArray[np.float32], *, below: float) -> Grown:
    """Add to a basis the fewest residual directions by which all of n new snippets reach a cosine.

    Directions are the singular vectors of the residuals of those snippets that fall short, largest first. Snippets pass by
    twice; what is kept of them is a cosine a row and 3 D×D numbers.

    Args:
        blocks: yields (b, D) float32, n rows in all.
        basis: (R, D) float32, orthonormal rows.
        mean: (D,) float32.
        below: -1 to 1; a snippet whose reconstruction has a lower cosine makes the basis grow. -1 never grows.
    """
    wide, centre = basis.astype(np.float64), mean.astype(np.float64)
    room = basis.shape[1] - len(basis)
    before, residuals = [np.zeros(0)], np.zeros((0, basis.shape[1]))
    for snippets in row_chunks(blocks()):
        centred = snippets.astype(np.float64) - centre
        inside = centred @ wide.T @ wide
        before.append(cosines(snippets, inside + centre))
        short = before[-1] < below
        if room and short.any():
            residuals = _same_scatter(np.vstack([residuals, (centred - inside)[short]]))
    found = np.concatenate(before)
    if not len(residuals):
        return Grown(basis=basis, cosines_before=found)
    directions = np.linalg.svd(residuals, full_matrices=False)[2][:room]
    directions = directions[: _fewest(blocks, wide, directions, centre, below)]
    # one more orthogonalisation: the residuals were orthogonal to the basis only up to their own rounding
    added = np.linalg.qr(np.vstack([wide, directions]).T)[0].T[len(basis) :]
    grown = np.asarray(np.vstack([basis, signed(added)]), np.float32)
    return Grown(basis=grown, cosines_before=found)


def _same_scatter(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return at most 2 D rows with the singular values and right singular vectors of (m, D) rows: R of QR, if they are more."""
    return rows if len(rows) <= 2 * rows.shape[1] else np.asarray(np.linalg.qr(rows, mode="r"))


def _fewest(
    blocks: Blocks,
    basis: NDArray[np.float64],
    directions: NDArray[np.float64],
    mean: NDArray[np.float64],
    below: float,
) -> int:
    """Return how many of (d, D) directions are needed for all snippets to reach a cosine; d where even all do not do.

    Of s = x + μ and ŝ = c·B + μ, B orthonormal: s·ŝ = ‖c‖² + c·Bμ + x·μ + ‖μ‖² and ‖ŝ‖² = ‖c‖² + 2c·Bμ + ‖μ‖², so that sums over
    c from left to right give the cosines for every number of directions at once.
    """
    rank, both = len(basis), np.vstack([basis, directions])
    pull, lowest = both @ mean, np.ones(len(directions))
    for snippets in row_chunks(blocks()):
        centred = snippets.astype(np.float64) - mean
        kept = centred @ both.T
        squares, cross = (kept * kept).cumsum(axis=1)[:, rank:], (kept * pull).cumsum(axis=1)[:, rank:]
        products = squares + cross + (centred @ mean + mean @ mean)[:, None]
        norms = np.sqrt(np.maximum(squares + 2 * cross + mean @ mean, 0))
        norms *= np.linalg.norm(snippets.astype(np.float64), axis=1)[:, None]
        found = np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
        lowest = np.minimum(lowest, found.min(axis=0))
    enough = np.flatnonzero(lowest >= below)
    return int(enough[0]) + 1 if len(enough) else len(directions)


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
