"""The stable interface: all that a generator may know of a bank. NumPy only.

`Bank` is what every bank promises; the `Supports…` protocols are capabilities, asked for with `isinstance`. A runtime
protocol looks only at names, so the real check is the contract test class that runs over every kind of bank.

Shapes: N rows (masked ones included), n active rows, B rows asked for, D dimensions, k neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gmem_bank.provenance import EncoderSpec
from gmem_bank.space import Space

ImagesFrom = str | PathLike[str] | Sequence[str | PathLike[str]] | None
"""Where images are, instead of where the provenance says: one folder, several, or None for the provenance."""

INTERFACE_VERSION = (1, 0)
"""(major, minor): a new capability raises minor; a change of `Bank` raises major."""


@runtime_checkable
class Bank(Protocol):
    """An immutable, ordered collection of snippets."""

    @property
    def interface_version(self) -> tuple[int, int]:
        """(major, minor) of the interface that this bank implements."""

    @property
    def dim(self) -> int:
        """D, the dimension of a snippet."""

    @property
    def space(self) -> Space:
        """The space of the snippets: "raw" or "unit"."""

    @property
    def encoder(self) -> EncoderSpec:
        """What made the snippets."""

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of the bank's content."""

    def __len__(self) -> int:
        """N, masked rows included."""

    def rows(self) -> NDArray[np.int64]:
        """Return the (n,) active rows, ascending."""

    def rows_for(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """Return the (B,) rows of keys, order kept; raises UnknownKeyError naming the first three unknown ones."""

    def snippets(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a new (B, D) float32 array in `space`; raises MaskedRowError or UnknownKeyError."""


@runtime_checkable
class SupportsConcepts(Protocol):
    """A bank with named sets of rows."""

    @property
    def names(self) -> tuple[str, ...]:
        """Concepts, in file order."""

    def rows_of(self, concept: str) -> NDArray[np.int64]:
        """Return the active rows of a concept, ascending; raises UnknownKeyError with the nearest names."""


@runtime_checkable
class SupportsImages(Protocol):
    """A bank that knows which images its rows came from."""

    def keys(self, rows: NDArray[np.int64]) -> list[str]:
        """Return the keys of rows, order kept."""

    def image_rows(self) -> NDArray[np.int64]:
        """Return the active rows that came from an image (not from arithmetic on other rows), ascending."""

    def missing_images(self, rows: NDArray[np.int64], images: ImagesFrom = None) -> NDArray[np.int64]:
        """Return those of the rows whose image is not where the provenance, or the folder `images`, says it is."""

    def read_image(self, row: int, images: ImagesFrom = None) -> NDArray[np.uint8]:
        """Return the (H, W, 3) RGB image of a row; raises SourceError where it is absent or unreadable."""


@runtime_checkable
class SupportsSearch(Protocol):
    """A bank that finds the rows nearest to a query."""

    def nearest(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the (B, k) cosines, descending, and (B, k) active rows for (B, D) queries."""


@runtime_checkable
class SupportsFactors(Protocol):
    """A factored bank: snippet ≈ coefficients · basis + mean."""

    @property
    def basis(self) -> NDArray[np.float32]:
        """(R, D), orthonormal rows."""

    @property
    def mean(self) -> NDArray[np.float32]:
        """(D,)."""

    def coefficients(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B, R) coefficients."""

    def inv_norms(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B,) 1/‖coefficients · basis + mean‖."""
