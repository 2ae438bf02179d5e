"""The files of the published GMem code, read and distrusted: by torch's safe reader only, checked as the rows pass.

They hold a plain tensor, or C = U·√S and M = V·√S with a snippet = C·Mᵀ + mean; here coefficients are U·S, the basis is Vᵀ.

Shapes: N rows, b rows of a block, D dimensions, K components of the file, R rank.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import errors, factors
from gmem_bank.errors import CorruptError, FormatError, why_not_loaded
from gmem_bank.provenance import Json
from gmem_bank.space import Space, all_finite, to_space, unusable_rows

NUM_SIZES = {"C": 2, "M": 2, "S": 1, "mean": 1}
"""Tensors of a factored official bank, and how many sizes each has; beside them are the whole numbers:"""
NUMBERS = ("latent_dim", "feature_dim")
ORTHONORMAL = 1e-4
"""How far from orthonormal M/√S may be to be taken as the basis: as far as `verify` allows."""
MAX_ENTRIES, MAX_PICKLE_BYTES = 64, 1 << 20
"""A bank is an archive of about ten entries; its structure takes a few hundred bytes, its values lie outside of that."""
BLOCK_BYTES = 16 << 20
AGAIN = "save all parts of one bank again"


@dataclass(frozen=True, kw_only=True)
class Official:
    """What of an official file goes into a bank: (b, columns) snippets or coefficients, checked as they pass."""

    num_rows: int
    dim: int
    blocks: Callable[[], Iterator[NDArray[np.float32]]]
    factors: Mapping[str, NDArray[np.float32]]
    """Basis, mean, and singular values where they hold; nothing for a dense bank."""
    details: Mapping[str, Json]


def check_torch_archive(
    path: Path, *, what: str = "bank", max_entries: int = MAX_ENTRIES, max_pickle_bytes: int = MAX_PICKLE_BYTES
) -> None:
    """Raise unless a file is a sound, uncompressed zip as `torch.save` writes it: a mapping reader takes that for granted.

    Args:
        path: the file.
        what: what it should hold, for messages.
        max_entries: most parts it may have.
        max_pickle_bytes: most bytes that its structure may take; the values of tensors lie outside of that.

    Raises:
        BankNotFoundError: no such file.
        FormatError: not such an archive, or not one of `what`.
        CorruptError: a part does not match its sum.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
            foreign = len(entries) > max_entries or size > max_pickle_bytes
            packed = any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries)
            # sums are all 0 where torch was told to leave them out
            checkable = not foreign and not packed and all(entry.CRC for entry in entries)
            damaged = archive.testzip() if checkable else None
    except FileNotFoundError as error:
        raise errors.BankNotFoundError(f"no file at {path}: name the file to import", path=path) from error
    except OSError as error:
        raise FormatError(f"it could not be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError) as error:
        raise FormatError(
            f"not a whole file of torch.save ({error}): it was cut short, or is a plain pickle, which is never read since that "
            "executes it. Restore it; or, if you trust it, load it yourself and save it again with torch.save"
        ) from error
    if foreign or packed:
        reason = f"it has more parts than a {what}" if foreign else "it was compressed after it was saved"
        raise FormatError(f"{reason}: save the {what} again with torch.save")
    if damaged is not None:
        raise CorruptError(f"its part {damaged!r} does not match its sum")


def read_torch_archive(
    path: Path, *, what: str, holding: str, max_entries: int = MAX_ENTRIES, max_pickle_bytes: int = MAX_PICKLE_BYTES,
    also: Sequence[type] = (),
) -> Any:  # fmt: skip
    """Return what is in a file of `torch.save`, mapped, by torch's safe reader; nothing in it is executed.

    Args:
        path: the file.
        what: what it should hold, for messages.
        holding: what of that can be read, for messages.
        max_entries: as `check_torch_archive` takes it.
        max_pickle_bytes: likewise.
        also: plain containers that may be made beside tensors, tables and numbers.

    Raises:
        BankNotFoundError, CorruptError: as `check_torch_archive` raises them.
        FormatError: no such archive, or it holds more.
    """
    check_torch_archive(path, what=what, max_entries=max_entries, max_pickle_bytes=max_pickle_bytes)
    return _loaded(path, holding, also)


def _loaded(path: Path, holding: str, also: Sequence[type] = ()) -> Any:
    import torch

    try:
        with torch.serialization.safe_globals(list(also)):
            return torch.load(str(path), weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a hostile structure makes the reader raise anything
        raise FormatError(
            "it holds more than tensors, tables and numbers, or is damaged; nothing in it was executed "
            f"({why_not_loaded(error)}): have its maker save {holding}"
        ) from error


def read_official(path: Path, space: Space) -> Official:
    """Return what a file holds that `check_torch_archive` let pass; the values of rows are checked as they pass."""
    import torch

    loaded = _loaded(path, "a plain tensor or the dictionary of a factored bank")
    most = path.stat().st_size
    if isinstance(loaded, torch.Tensor):
        return _dense(_tensor(loaded, "the tensor", 2, most), space)
    names = {*NUM_SIZES, *NUMBERS}
    if not isinstance(loaded, dict) or set(loaded) != names:
        found = sorted(str(name)[:40] for name in loaded)[:8] if isinstance(loaded, dict) else type(loaded).__name__
        raise FormatError(
            f"an official bank is a tensor, or a dictionary of {sorted(names)}, not {found}: save just that"
        )
    tensors = {name: _tensor(loaded[name], name, ndim, most) for name, ndim in NUM_SIZES.items()}
    # an export of ours that was saved as it is has tensors of one number
    stated = [loaded[name] for name in NUMBERS]
    numbers = [int(v) if _is_plain(v) and v.dtype == torch.int64 and not v.ndim else v for v in stated]
    _check_sizes(tensors, *numbers)
    return _factored(tensors, space)


def _is_plain(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and not value.is_nested and value.layout == torch.strided and value.is_cpu


def _tensor(value: Any, name: str, ndim: int, most: int) -> Any:
    """Return a value if it is an ordinary tensor of floats that has its own bytes among the `most` of the file."""
    import torch

    plain = _is_plain(value)
    shape = list(value.shape) if plain else []
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if not plain or value.dtype not in floats or len(shape) != ndim or not value.numel():
        found = f"{value.dtype} of shape {shape}" if plain else type(value).__name__
        raise FormatError(
            f"{name} is {found}, expected floats with {ndim} sizes: convert and save it again", tensor=name
        )
    if value.numel() * value.element_size() > most:  # strides of 0 make a terabyte of one number
        raise FormatError(
            f"{name} has shape {shape}, more than the file can hold: clone and save it again", tensor=name
        )
    return value.detach().resolve_neg()


def _check_sizes(tensors: Mapping[str, Any], latent_dim: object, feature_dim: object) -> None:
    (num_rows, rank), dim = tensors["C"].shape, len(tensors["M"])
    for name, wanted in (("M", [dim, rank]), ("S", [rank]), ("mean", [dim])):
        shape = list(tensors[name].shape)
        if shape != wanted:
            reason = f"{name} has shape {shape}, expected {wanted} for C of {[num_rows, rank]}"
            raise FormatError(f"{reason}: {AGAIN}", tensor=name)
    if type(feature_dim) is not int or feature_dim != dim or rank > dim:
        raise FormatError(
            f"feature_dim is {feature_dim!r}, but M has shape {[dim, rank]}: {AGAIN}", tensor="feature_dim"
        )
    # the published code cuts a rank that is too large to what there can be, and saves the number that was asked for
    if type(latent_dim) is not int or not (latent_dim == rank or latent_dim > rank == min(num_rows, dim)):
        raise FormatError(
            f"latent_dim is {latent_dim!r}, but C and M have {rank} columns: {AGAIN}", tensor="latent_dim"
        )


def _row_blocks(tensor: Any) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, (b, columns) float32), over the memory map itself where the file holds float32."""
    step = max(1, BLOCK_BYTES // (4 * tensor.shape[1]))
    for first in range(0, len(tensor), step):
        yield first, np.ascontiguousarray(tensor[first : first + step].float().numpy())


def _require_usable(rows: NDArray[np.float32], first: int, space: Space) -> None:
    reasons = {} if space == "raw" and all_finite(rows) else unusable_rows(rows, space)
    for row, reason in sorted(reasons.items()):
        raise CorruptError(f"row {first + row}: {reason}", row=first + row)


def _dense(tensor: Any, space: Space) -> Official:
    def blocks() -> Iterator[NDArray[np.float32]]:
        for first, block in _row_blocks(tensor):
            _require_usable(block, first, space)
            yield to_space(block, space)

    num_rows, dim = tensor.shape
    return Official(num_rows=num_rows, dim=dim, blocks=blocks, factors={}, details={"kind": "dense", "dim": dim})


def _factored(tensors: Mapping[str, Any], space: Space) -> Official:
    M, S, mean = (tensors[name].double().numpy() for name in ("M", "S", "mean"))
    for name, values in (("M", M), ("S", S), ("mean", mean)):
        if not np.isfinite(values).all() or (name == "S" and values.min() < 0):
            raise CorruptError(f"{name} has values that cannot be", tensor=name)
    kept = M.any(axis=0)
    if not kept.any():
        raise FormatError("all its rows are the mean: import them as a plain tensor", tensor="M")
    basis, turn, off = orthonormal(M[:, kept], S[kept])
    entries = {"basis": basis.astype(np.float32), "mean": mean.astype(np.float32)}
    if off <= ORTHONORMAL:
        entries["singular_values"] = S[kept].astype(np.float32)

    def blocks() -> Iterator[NDArray[np.float32]]:
        for first, block in _row_blocks(tensors["C"]):
            wide = block[:, kept].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named below
                coefficients = np.ascontiguousarray(wide * turn if turn.ndim == 1 else wide @ turn, np.float32)
            _require_usable(coefficients, first, "raw")
            if space == "unit":
                _require_usable(factors.reconstruct(coefficients, entries["basis"], entries["mean"]), first, space)
            yield coefficients

    details = {
        "kind": "factored", "dim": len(mean), "rank": len(basis), "dropped_components": int((~kept).sum()),
        "orthonormal_within": off, "reorthonormalised": off > ORTHONORMAL,
    }  # fmt: skip
    return Official(num_rows=len(tensors["C"]), dim=len(mean), blocks=blocks, factors=entries, details=details)


def orthonormal(
    M: NDArray[np.float64], S: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return an orthonormal basis, what turns rows of C into coefficients in it, and how far M/√S was from being one.

    C·Mᵀ stays what it is: either M/√S is the basis and coefficients are C times a (K,) vector, or M = P·Σ·Wᵀ gives the basis
    Pᵀ and coefficients are C times the (K, R) matrix W·Σ. The entry of largest size in each row of the basis is positive.

    Args:
        M: (D, K), no column all zeros.
        S: (K,), 0 or more.
    """
    turn = np.sqrt(np.where(S > 0, S, 1.0))
    basis = (M / turn).T
    off = float(np.abs(basis @ basis.T - np.eye(len(basis))).max())
    if off > ORTHONORMAL:
        left, sizes, right = np.linalg.svd(M, full_matrices=False)
        real = sizes > sizes[0] * 1e-12
        basis, turn = left.T[real], (right.T * sizes)[:, real]
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)
    signs = np.where(largest < 0, -1.0, 1.0)
    return basis * signs, turn * signs[:, 0], off
