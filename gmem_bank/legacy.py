"""Banks of the published GMem code: .pth files in, by torch's safe reader only; safetensors in their layout out.

They hold a plain tensor, or C = U·√S and M = V·√S with a snippet = C·Mᵀ + mean; here coefficients are U·S, the basis is Vᵀ.

Shapes: N rows, n active rows, b rows of a block, D dimensions, K components of the file, R rank.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import errors, factors, kinds, segments, streams
from gmem_bank import keys as key_tables
from gmem_bank.bank import MemoryBank
from gmem_bank.builder import DEFAULT_BANK, localised
from gmem_bank.editing import EditReport
from gmem_bank.errors import CorruptError, FormatError
from gmem_bank.ops import PathLike
from gmem_bank.provenance import EncoderSpec, Json, Source, relative_to_bank, sha256_of_file
from gmem_bank.space import Space, all_finite, to_space, unusable_rows
from gmem_bank.storage import Payload, atomic, container, real_target, safetensors_store, write
from gmem_bank.storage.rules import SNIPPET_DTYPES
from gmem_bank.storage.schema import Header, Segment
from gmem_bank.storage.stored import naming

NUM_SIZES = {"C": 2, "M": 2, "S": 1, "mean": 1}
"""Tensors of a factored official bank, and how many sizes each has; beside them are the whole numbers:"""
NUMBERS = ("latent_dim", "feature_dim")
DENSE_NAME = "memory_bank"
"""What the one tensor of a dense bank is called in an export."""
ORTHONORMAL = 1e-4
"""How far from orthonormal M/√S may be to be taken as the basis: as far as `verify` allows."""
MAX_ENTRIES, MAX_PICKLE_BYTES = 64, 1 << 20
"""A bank is an archive of about ten entries; its structure takes a few hundred bytes, its values lie outside of that."""
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class _Official:
    """What of an official file goes into a bank: (b, columns) snippets or coefficients, checked as they pass."""

    num_rows: int
    dim: int
    blocks: Callable[[], Iterator[NDArray[np.float32]]]
    factors: Mapping[str, NDArray[np.float32]]
    """Basis, mean, and singular values where they hold; nothing for a dense bank."""
    details: Mapping[str, Json]


def import_official(
    path: PathLike,
    output: PathLike = DEFAULT_BANK,
    *,
    space: Space | None = None,
    dtype: str = "f32",
    prefix: str | None = None,
    encoder_spec: EncoderSpec | None = None,
    overwrite: bool = False,
) -> EditReport:
    """Make a bank of an official .pth file, through a memory map and without executing anything; done once, it is not redone.

    Components that contribute nothing (singular value 0) are left out; a basis that is not orthonormal is made so without
    changing any snippet.

    Args:
        path: a plain (N, D) tensor of floats, or a dictionary of C (N, K), M (D, K), S (K,), mean (D,), latent_dim, feature_dim.
        output: bank file to write.
        space: "raw", or "unit", where a row of zeros is an error; None takes that of `encoder_spec`, else "raw".
        dtype: "f32", "f16" or (dense banks) "bf16": how rows are stored.
        prefix: rows get the keys "<prefix>/<index>"; None takes the file's name without its ending.
        encoder_spec: what made the snippets, which the file does not say; None: an unknown encoder of this file's own, so that
            two files never pass as made by one.
        overwrite: replace what is at `output`.

    Raises:
        BankNotFoundError: no such file.
        FormatError: not an official bank, or shapes and types that cannot be.
        CorruptError: cut, damaged, or a value that cannot be; its row is named.
        EncoderMismatchError: `encoder_spec` has another dimension.
        ConfigError: a space or dtype that cannot be.
        OutputExistsError: something else is at `output`, and overwriting was not asked for.
        LockedError, WriteError: another writer, or no room; what was there stands.
    """
    source, target = Path(path), real_target(output)
    chosen: Any = space or (encoder_spec.space if encoder_spec is not None else "raw")
    if chosen not in ("raw", "unit"):
        raise errors.ConfigError(f"space must be 'raw' or 'unit', not {chosen!r}", key="space")
    given = None if encoder_spec is None else localised(replace(encoder_spec, space=chosen), target)
    # the published configurations call their banks .pth.pth
    arguments: dict[str, Any] = {
        "space": chosen,
        "dtype": dtype,
        "prefix": source.stem.removesuffix(".pth") if prefix is None else prefix,
    }
    facts: dict[str, Any]
    try:
        _check_archive(source)
        with atomic.locked(target):
            arguments |= {"digest": sha256_of_file(source), "encoder": None if given is None else given.fingerprint}
            if target.exists() and not overwrite:
                header, facts = _made_before(target, arguments), {"unchanged": True}
            else:
                official = _read(source, chosen)
                header = _write(source, target, official, given, arguments)
                facts = {"num_added": official.num_rows, "details": dict(official.details)}
    except errors.GMemError as error:
        naming(error, source)
        raise
    return EditReport(
        operation="import", bank=str(source), output=str(target), num_rows=header.num_rows,
        fingerprint=header.fingerprint, **facts,
    )  # fmt: skip


def _made_before(target: Path, arguments: Mapping[str, Json]) -> Header:
    """Return the header of the bank at `target`; raises OutputExistsError unless this very import made it."""
    with contextlib.suppress(errors.GMemError):
        header = kinds.open(target).header
        if [(entry["operation"], entry.get("arguments")) for entry in header.history] == [("import", arguments)]:
            return header
    raise errors.OutputExistsError(
        f"{target} exists and is not what this import makes: choose another name, or replace it with --overwrite",
        path=target,
    )


def _write(
    source: Path, target: Path, official: _Official, given: EncoderSpec | None, arguments: Mapping[str, Any]
) -> Header:
    num_rows, dim, basis = official.num_rows, official.dim, official.factors.get("basis")
    dtype, space, digest = arguments["dtype"], arguments["space"], arguments["digest"]
    spec = given or EncoderSpec(name="unknown", family=f"imported:{digest[:16]}", dim=dim, space=space)
    if spec.dim != dim:
        raise errors.EncoderMismatchError(f"its snippets have dimension {dim}, {spec.describe()} makes others")
    known = tuple(SNIPPET_DTYPES) if basis is None else ("f32", "f16")
    if dtype not in known:
        raise errors.ConfigError(f"dtype must be one of {', '.join(known)} for this bank, not {dtype!r}", key="dtype")
    columns, what = (dim, "snippets") if basis is None else (len(basis), "coefficients")
    origin = Source(
        kind="array", path=relative_to_bank(source, target.parent), prefix=f"{arguments['prefix']}/", digest=digest,
        num_images=num_rows,
    )  # fmt: skip
    keys = [f"{origin.prefix}{row:0{len(str(num_rows - 1))}d}" for row in range(num_rows)]
    text, offsets = key_tables.encode(keys)
    header = Header(
        kind="dense" if basis is None else "factored", space=space, dim=dim,
        segments=(Segment(name="0", num_rows=num_rows),), encoder=spec, sources=(origin,),
        history=({"operation": "import", "arguments": dict(arguments), "num_rows": num_rows},),
    )  # fmt: skip
    payloads = {
        **{name: Payload.of(values) for name, values in official.factors.items()},
        f"0/{what}": segments.snippet_payload(official.blocks, num_rows, columns, dtype),
        "0/keys.bytes": Payload.of(text),
        "0/keys.offsets": Payload.of(offsets),
        "0/source": Payload.of(np.zeros(num_rows, np.uint32)),
        **segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys))),
    }
    return write(target, header, payloads)


def _check_archive(path: Path) -> None:
    """Raise unless the file is a sound, uncompressed zip as `torch.save` writes it: a mapping reader takes that for granted."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            size = sum(entry.file_size for entry in entries if entry.filename.endswith(".pkl"))
            foreign = len(entries) > MAX_ENTRIES or size > MAX_PICKLE_BYTES
            packed = any(entry.compress_type or entry.compress_size != entry.file_size for entry in entries)
            # sums are all 0 where torch was told to leave them out
            checkable = not foreign and not packed and all(entry.CRC for entry in entries)
            damaged = archive.testzip() if checkable else None
    except FileNotFoundError as error:
        raise errors.BankNotFoundError(f"no file at {path}: name the .pth file to import", path=path) from error
    except OSError as error:
        raise FormatError(f"it could not be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError) as error:
        raise FormatError(
            f"not a whole file of torch.save ({error}): it was cut short, or is a plain pickle, which is never read since that "
            "executes it. Restore it; or, if you trust it, load it yourself and save it again with torch.save"
        ) from error
    if foreign or packed:
        reason = "it has more parts than a bank" if foreign else "it was compressed after it was saved"
        raise FormatError(f"{reason}: save the bank again with torch.save")
    if damaged is not None:
        raise CorruptError(f"its part {damaged!r} does not match its sum")


def _read(path: Path, space: Space) -> _Official:
    """Return what a file holds, checked; the values of rows are checked as they pass."""
    import torch

    try:
        loaded = torch.load(str(path), weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a hostile structure makes the reader raise anything
        reason = str(error).strip().partition("\n")[0][:200]
        raise FormatError(
            f"it holds more than tensors and numbers, or is damaged; nothing in it was executed ({reason}): have its maker save "
            "a plain tensor or the dictionary of a factored bank"
        ) from error
    most = path.stat().st_size
    if isinstance(loaded, torch.Tensor):
        return _dense(_tensor(loaded, "the tensor", 2, most), space)
    names = {*NUM_SIZES, *NUMBERS}
    if not isinstance(loaded, dict) or set(loaded) != names:
        found = sorted(str(name)[:40] for name in loaded)[:8] if isinstance(loaded, dict) else type(loaded).__name__
        raise FormatError(f"an official bank is a tensor, or a dictionary of {sorted(names)}, not {found}")
    tensors = {name: _tensor(loaded[name], name, ndim, most) for name, ndim in NUM_SIZES.items()}
    _check_sizes(tensors, loaded["latent_dim"], loaded["feature_dim"])
    return _factored(tensors, space)


def _tensor(value: Any, name: str, ndim: int, most: int) -> Any:
    """Return a value if it is an ordinary tensor of floats that has its own bytes among the `most` of the file."""
    import torch

    plain = isinstance(value, torch.Tensor) and not value.is_nested and value.layout == torch.strided and value.is_cpu
    shape = list(value.shape) if plain else []
    floats = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    if not plain or value.dtype not in floats or len(shape) != ndim or not value.numel():
        found = f"{value.dtype} of shape {shape}" if plain else type(value).__name__
        raise FormatError(f"{name} is {found}, expected floats with {ndim} sizes above 0", tensor=name)
    if value.numel() * value.element_size() > most:  # strides of 0 make a terabyte of one number
        raise FormatError(f"{name} has shape {shape}, more than the file can hold", tensor=name)
    return value.detach().resolve_neg()


def _check_sizes(tensors: Mapping[str, Any], latent_dim: object, feature_dim: object) -> None:
    (num_rows, rank), dim = tensors["C"].shape, len(tensors["M"])
    for name, wanted in (("M", [dim, rank]), ("S", [rank]), ("mean", [dim])):
        shape = list(tensors[name].shape)
        if shape != wanted:
            raise FormatError(f"{name} has shape {shape}, expected {wanted} for C of {[num_rows, rank]}", tensor=name)
    if type(feature_dim) is not int or feature_dim != dim or rank > dim:
        raise FormatError(f"feature_dim is {feature_dim!r}, but M has shape {[dim, rank]}", tensor="feature_dim")
    # the published code cuts a rank that is too large to what there can be, and saves the number that was asked for
    if type(latent_dim) is not int or not (latent_dim == rank or latent_dim > rank == min(num_rows, dim)):
        raise FormatError(f"latent_dim is {latent_dim!r}, but C and M have {rank} columns", tensor="latent_dim")


def _row_blocks(tensor: Any) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, (b, columns) float32), over the memory map itself where the file holds float32."""
    step = max(1, BLOCK_BYTES // (4 * tensor.shape[1]))
    for first in range(0, len(tensor), step):
        yield first, tensor[first : first + step].float().numpy()


def _require_usable(rows: NDArray[np.float32], first: int, space: Space) -> None:
    reasons = {} if space == "raw" and all_finite(rows) else unusable_rows(rows, space)
    for row, reason in sorted(reasons.items()):
        raise CorruptError(f"row {first + row}: {reason}", row=first + row)


def _dense(tensor: Any, space: Space) -> _Official:
    def blocks() -> Iterator[NDArray[np.float32]]:
        for first, block in _row_blocks(tensor):
            _require_usable(block, first, space)
            yield to_space(block, space)

    num_rows, dim = tensor.shape
    return _Official(num_rows=num_rows, dim=dim, blocks=blocks, factors={}, details={"kind": "dense", "dim": dim})


def _factored(tensors: Mapping[str, Any], space: Space) -> _Official:
    M, S, mean = (tensors[name].double().numpy() for name in ("M", "S", "mean"))
    for name, values in (("M", M), ("S", S), ("mean", mean)):
        if not np.isfinite(values).all() or (name == "S" and values.min() < 0):
            raise CorruptError(f"{name} has values that cannot be", tensor=name)
    kept = M.any(axis=0)
    if not kept.any():
        raise FormatError("all its rows are the mean: there is no component to import", tensor="M")
    basis, turn, off = orthonormal(M[:, kept], S[kept])
    entries = {"basis": basis.astype(np.float32), "mean": mean.astype(np.float32)}
    if off <= ORTHONORMAL:
        entries["singular_values"] = S[kept].astype(np.float32)

    def blocks() -> Iterator[NDArray[np.float32]]:
        for first, block in _row_blocks(tensors["C"]):
            wide = block[:, kept].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named below
                coefficients = np.asarray(wide * turn if turn.ndim == 1 else wide @ turn, np.float32)
            _require_usable(coefficients, first, "raw")
            if space == "unit":
                _require_usable(factors.reconstruct(coefficients, entries["basis"], entries["mean"]), first, space)
            yield coefficients

    details = {
        "kind": "factored", "dim": len(mean), "rank": len(basis), "dropped_components": int((~kept).sum()),
        "orthonormal_within": off, "reorthonormalised": off > ORTHONORMAL,
    }  # fmt: skip
    return _Official(num_rows=len(tensors["C"]), dim=len(mean), blocks=blocks, factors=entries, details=details)


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


def to_official(bank: MemoryBank) -> dict[str, NDArray[Any]]:
    """Return a bank's active rows as the published code holds them; masked rows are left out.

    C·Mᵀ + mean is the raw reconstruction, of a bank in unit space too (the published code normalises on use). S holds the norms
    of the columns of the coefficients, which any edit keeps true.

    Args:
        bank: an open bank.

    Returns:
        Of a factored bank C (n, R), M (D, R), S (R,), mean (D,) float32, latent_dim and feature_dim () int64; of a dense one
        memory_bank (n, D) float32.

    Raises:
        GMemError: every row is masked.
        CorruptError: a value is not finite.
    """
    return {name: streams.read(payload) for name, payload in _official_payloads(bank).items()}


def export_official(bank: MemoryBank, output: PathLike) -> EditReport:
    """Write what `to_official` gives as a safetensors file f, in bounded memory; a pickle is never written.

    Whoever needs a .pth makes it of a factored bank by `torch.save({k: v if v.ndim else v.item() for k, v in
    safetensors.torch.load_file(f).items()}, "bank.pth")`, of a dense one by `torch.save(load_file(f)["memory_bank"], …)`.

    Args:
        bank: an open bank.
        output: .safetensors file to write.

    Raises:
        FormatError: another ending.
        OutputExistsError: something is there.
        GMemError, CorruptError: as `to_official`.
        LockedError, WriteError: another writer, or no room.
    """
    target = Path(output)
    if target.suffix.lower() != ".safetensors":
        raise FormatError(f"{target}: an export ends in .safetensors, since no pickle is ever written", path=target)
    with atomic.locked(target):
        if target.exists() or target.is_symlink():
            raise errors.OutputExistsError(f"{target} exists: choose another name, or delete it first", path=target)
        payloads = _official_payloads(bank)
        entries = container.lay_out({name: (payload.dtype, payload.shape) for name, payload in payloads.items()})
        start = container.render(entries, {})
        size = len(start) + max(entry.end for entry in entries.values())
        with atomic.replacing(target, needed=size) as stream:
            stream.write(start)
            safetensors_store.write_entries(stream, entries, payloads)
    shapes = {name: list(payload.shape) for name, payload in payloads.items()}
    return EditReport(
        operation="export", bank=str(bank.path), output=str(target), num_rows=len(bank.rows()),
        details={"tensors": shapes, "bytes": size}, fingerprint=bank.fingerprint,
    )  # fmt: skip


def _official_payloads(bank: MemoryBank) -> dict[str, Payload]:
    rows = bank.rows()
    if not len(rows):
        raise errors.GMemError(f"every row of {bank.path} is masked: unmask those to export", path=bank.path)
    if not isinstance(bank, kinds.FactoredBank):
        blocks = lambda: (block for _, block in bank.snippet_blocks(rows))  # noqa: E731
        return {DENSE_NAME: segments.snippet_payload(blocks, len(rows), bank.dim, "f32")}
    S = np.sqrt(sum(np.square(block, dtype=np.float64).sum(axis=0) for block in _coefficients(bank, rows)))
    S = np.where(S > 0, S, 1.0).astype(np.float32)  # any S above zero fits its own C and M
    root = np.sqrt(S.astype(np.float64))
    scaled = lambda: ((block / root).astype(np.float32) for block in _coefficients(bank, rows))  # noqa: E731
    return {
        "C": segments.snippet_payload(scaled, len(rows), bank.rank, "f32"),
        "M": Payload.of((bank.basis.T * root).astype(np.float32)),
        "S": Payload.of(S),
        "mean": Payload.of(bank.mean),
        "latent_dim": replace(Payload.of(np.array([bank.rank])), shape=()),
        "feature_dim": replace(Payload.of(np.array([bank.dim])), shape=()),
    }


def _coefficients(bank: kinds.FactoredBank, rows: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    step = max(1, BLOCK_BYTES // (4 * bank.rank))
    for start in range(0, len(rows), step):
        yield bank.coefficients(rows[start : start + step])
        bank.stored.release()
