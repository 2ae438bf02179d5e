"""The kinds of banks: how each reads its snippets, and `open`, which gives the right one.

Shapes: N rows, B rows asked for, D dimensions, R rank, R_k columns of a segment, m kept coefficients.
"""

from __future__ import annotations

import os
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, segments
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import CorruptError
from gmem_bank.space import all_finite, scale_to_unit
from gmem_bank.storage import StoredBank, open_stored


def open(path: str | os.PathLike[str]) -> MemoryBank:  # noqa: A001 - the verb of the field: gmem_bank.open(path)
    """Open a bank.

    Args:
        path: a bank file (.safetensors, .h5) or a bank folder (.gmem).

    Returns:
        A DenseBank or a FactoredBank over a memory map: opening reads the header only.

    Raises:
        BankNotFoundError, FormatError, FormatVersionError, CorruptError: each with the path and what to do.
    """
    return of(open_stored(path))


def of(stored: StoredBank) -> MemoryBank:
    """Return the bank of the kind that an open store says it is."""
    return _KINDS[stored.header.kind](stored)


class DenseBank(MemoryBank):
    """One stored vector a row."""

    @cached_property
    def _gatherers(self) -> dict[str, segments.Gatherer]:
        names = {segment.name: segment.entry("snippets") for segment in self.header.segments}
        return {name: segments.Gatherer(self._stored.array(entry)) for name, entry in names.items()}

    def _gather(self, segment: str, rows: NDArray[np.int64], finite: bool) -> NDArray[np.float32]:
        values = self._gatherers[segment](rows, finite=finite)
        if self.space == "raw" or self._stored.dtype(f"{segment}/snippets") == "F32":
            return values  # f32 is in the bank's space as it is stored, bit for bit
        return scale_to_unit(values)

    @cached_property
    def is_unit_as_stored(self) -> bool:
        """Whether `directions` are of length 1 already."""
        types = {self._stored.dtype(segment.entry("snippets")) for segment in self.header.segments}
        return self.space == "unit" and types <= {"F32"}

    def _gather_directions(self, segment: str, rows: NDArray[np.int64], finite: bool) -> NDArray[np.float32]:
        return self._gatherers[segment](rows, finite=finite)


class FactoredBank(MemoryBank):
    """Coefficients a row, and one basis: snippet ≈ coefficients · basis + mean. Sparse and i8 segments are made dense here."""

    @cached_property
    def basis(self) -> NDArray[np.float32]:
        """(R, D) float32, orthonormal rows; read-only."""
        return self._factor("basis")

    @cached_property
    def mean(self) -> NDArray[np.float32]:
        """(D,) float32; read-only."""
        return self._factor("mean")

    @property
    def rank(self) -> int:
        """R."""
        return self._stored.shape("basis")[0]

    @cached_property
    def singular_values(self) -> NDArray[np.float32] | None:
        """(R,) float32, read-only; None where the bank holds none."""
        return self._factor("singular_values") if "singular_values" in self._stored else None

    def _factor(self, name: str) -> NDArray[np.float32]:
        values: NDArray[np.float32] = self._stored.array(name)
        if not np.isfinite(values).all():
            raise CorruptError(
                f"{self.path}: entry {name!r} is not finite: build it again", path=self.path, tensor=name
            )
        return values

    def coefficients(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B, R) float32 coefficients, zeros where a segment has fewer columns.

        Args:
            rows: (B,) integers, any order, repetitions allowed.

        Raises:
            UnknownKeyError, MaskedRowError, CorruptError: as `snippets`.
        """
        wanted = self._allowed(rows)
        result = np.zeros((len(wanted), self.rank), np.float32)
        for name, places, local in self._by_segment(wanted):
            columns = read_coefficients(self._stored, name, local, self.rank)
            result[places, : columns.shape[1]] = columns
        if not all_finite(result):
            self._name_bad_row(result, wanted)
        return result

    def inv_norms(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return (B,) float32 1/‖coefficients · basis + mean‖."""
        return factors.inverse_norms(self.coefficients(rows), self.basis, self.mean)

    def _gather(self, segment: str, rows: NDArray[np.int64], finite: bool) -> NDArray[np.float32]:  # noqa: ARG002 - few values
        columns = read_coefficients(self._stored, segment, rows, self.rank)
        with np.errstate(over="ignore", invalid="ignore"):
            snippets = factors.reconstruct(columns, self.basis[: columns.shape[1]], self.mean)
        return snippets if self.space == "raw" else scale_to_unit(snippets)


def read_coefficients(stored: StoredBank, segment: str, rows: NDArray[np.int64], rank: int) -> NDArray[np.float32]:
    """Return the (B, R_k) float32 coefficients of a segment's rows; (B, R) for a sparse segment."""
    sparse = f"{segment}/values" in stored
    name = f"{segment}/values" if sparse else f"{segment}/coefficients"
    values = stored.array(name).take(rows, axis=0)
    index = stored.array(f"{segment}/index").take(rows, axis=0) if sparse else None
    scale = stored.array(f"{segment}/scale") if values.dtype == np.int8 else None
    if scale is not None and index is not None:
        if index.size and int(index.max()) >= len(scale):
            raise CorruptError(
                f"{stored.path}: entry '{segment}/index' names a coefficient without a scale", path=stored.path
            )
        scale = scale[index]
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named by who asked
        wide = segments.scaled(values, scale)
        return wide if index is None else factors.scatter(wide, index, rank, f"{segment}/index")


_KINDS: dict[str, type[MemoryBank]] = {"dense": DenseBank, "factored": FactoredBank}
"""Kind in the header → class."""
