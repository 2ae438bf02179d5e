"""Banks of the published GMem code: .pth files in, by torch's safe reader only; safetensors in their layout out.

They hold a plain tensor, or C = U·√S and M = V·√S, which give a snippet as C·Mᵀ + mean; coefficients here are U·S, the basis Vᵀ.

Shapes: N rows, n active rows, b rows of a block, D dimensions, K components of the file, R rank.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, kinds, segments, streams
from gmem_bank import keys as key_tables
from gmem_bank.bank import MemoryBank, all_finite
from gmem_bank.builder import DEFAULT_BANK, localised
from gmem_bank.editing import EditReport
from gmem_bank.errors import (
    BankNotFoundError,
    ConfigError,
    CorruptError,
    EncoderMismatchError,
    FormatError,
    GMemError,
    OutputExistsError,
)
from gmem_bank.kinds import FactoredBank
from gmem_bank.naming import concept_name_problem
from gmem_bank.ops import PathLike
from gmem_bank.provenance import EncoderSpec, Json, Source, relative_to_bank, sha256_of_file
from gmem_bank.space import Space, to_space, unusable_rows
from gmem_bank.storage import Payload, atomic, container, real_target, safetensors_store, write
from gmem_bank.storage.rules import COEFFICIENT_DTYPES, SNIPPET_DTYPES
from gmem_bank.storage.schema import Header, Segment

if TYPE_CHECKING:
    from torch import Tensor

MATRICES = {"C": 2, "M": 2, "S": 1, "mean": 1}
"""Tensors of a factored official bank, and how many sizes each has."""
NUMBERS = ("latent_dim", "feature_dim")
DENSE_NAME = "memory_bank"
"""What the one tensor of a dense bank is called in an export."""
ORTHONORMAL = 1e-4
"""How far from orthonormal V may be to count as a basis: as far as `verify` allows."""
MAX_PICKLE_BYTES = 1 << 20
"""The structure of a bank takes a few hundred bytes; its values lie outside of it."""
BLOCK_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class _Official:
    """What of an official file goes into a bank."""

    num_rows: int
    dim: int
    blocks: Callable[[], Iterator[NDArray[np.float32]]]
    """Yields (b, D) snippets in the space, or (b, R) coefficients, checked, in the order of the file."""
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
    """Make a bank of an official .pth file; the same call again finds that it is done.

    The file is read in blocks through a memory map, and nothing in it is executed. Components that contribute nothing (singular
    value 0) are left out; a basis that is not orthonormal is made so without a change of the snippets.

    Args:
        path: a plain (N, D) tensor of floats, or a dictionary of C (N, K), M (D, K), S (K,), mean (D,), latent_dim, feature_dim.
        output: bank file to write.
        space: "raw", or "unit" to normalise; None takes that of `encoder_spec`, else "raw". A row without a direction is an
            error in unit space only.
        dtype: "f32", "f16", "bf16" (dense) or "i8" (factored): how vectors are stored.
        prefix: rows get the keys "<prefix>/<index>"; None takes the file's name without its ending.
        encoder_spec: what made the snippets, which the file does not say; None: an unknown encoder of this file's own, so that
            two files never pass as made by one.
        overwrite: replace what is at `output`.

    Raises:
        BankNotFoundError: no such file.
        FormatError: not an official bank, or shapes and types that cannot be.
        CorruptError: cut, damaged, or values that are not finite; the row is named.
        EncoderMismatchError: `encoder_spec` has another dimension.
        ConfigError: a space, dtype or prefix that cannot be.
        OutputExistsError: something else is at `output`, and overwriting was not asked for.
        LockedError, WriteError: another writer, or no room; what was there stands.
    """
    source, target = Path(path), real_target(output)
    wanted: Space = space or ("unit" if encoder_spec is not None and encoder_spec.space == "unit" else "raw")
    if wanted not in ("raw", "unit"):
        raise ConfigError(f"space must be 'raw' or 'unit', not {wanted!r}", key="space")
    # the published configurations name their banks .pth.pth
    name = source.stem.removesuffix(".pth") if prefix is None else prefix
    problem = concept_name_problem(name)
    if problem:
        raise ConfigError(f"{name!r} cannot begin the keys, it {problem}: give a plain word as prefix", key="prefix")
    _check_archive(source)
    with atomic.locked(target):
        digest = sha256_of_file(source)
        encoder = None if encoder_spec is None else replace(encoder_spec, space=wanted).fingerprint
        arguments = {"digest": digest, "space": wanted, "dtype": dtype, "prefix": name, "encoder": encoder}
        if target.exists() and not overwrite:
            return _report(source, _made_before(target, arguments), target, unchanged=True)
        official = _read(source, wanted)
        spec = _spec(source, target, official.dim, wanted, digest, encoder_spec)
        origin = Source(
            kind="array", path=relative_to_bank(source, target.parent), prefix=f"{name}/", digest=digest,
            num_images=official.num_rows,
        )  # fmt: skip
        header = _write(target, official, spec, origin, arguments)
    return _report(source, header, target, num_added=official.num_rows, details=dict(official.details))


def _report(source: Path, header: Header, target: Path, **facts: Any) -> EditReport:
    return EditReport(
        operation="import", bank=str(source), output=str(target), num_rows=header.num_rows,
        fingerprint=header.fingerprint, **facts,
    )  # fmt: skip


def _made_before(target: Path, arguments: Mapping[str, Json]) -> Header:
    """Return the header of the bank at `target`; raises OutputExistsError unless this very import made it."""
    try:
        header = kinds.open(target).header
    except GMemError:
        header = None
    if header is None or [(e.get("operation"), e.get("arguments")) for e in header.history] != [("import", arguments)]:
        raise OutputExistsError(
            f"{target} exists and is not what this import makes: choose another name with -o, or replace it with --overwrite",
            path=target,
        )
    return header


def _spec(source: Path, target: Path, dim: int, space: Space, digest: str, given: EncoderSpec | None) -> EncoderSpec:
    if given is None:
        return EncoderSpec(name="unknown", family=f"imported:{digest[:16]}", dim=dim, space=space)
    if given.dim != dim:
        raise EncoderMismatchError(
            f"{source} has snippets of dimension {dim}, {given.describe()} makes others: name the encoder that made them, or none",
            path=source,
        )
    return localised(replace(given, space=space), target)


def _write(
    target: Path, official: _Official, spec: EncoderSpec, origin: Source, arguments: Mapping[str, Json]
) -> Header:
    num_rows = official.num_rows
    width = len(str(num_rows - 1))
    keys = [f"{origin.prefix}{row:0{width}d}" for row in range(num_rows)]
    text, offsets = key_tables.encode(keys)
    header = Header(
        kind="factored" if official.factors else "dense", space=spec.space, dim=official.dim,
        segments=(Segment(name="0", num_rows=num_rows),), encoder=spec, sources=(origin,),
        history=({"operation": "import", "arguments": dict(arguments), "num_rows": num_rows},),
    )  # fmt: skip
    payloads = {
        **{name: Payload.of(values) for name, values in official.factors.items()},
        **{f"0/{what}": payload for what, payload in _vectors(official, str(arguments["dtype"])).items()},
        "0/keys.bytes": Payload.of(text),
        "0/keys.offsets": Payload.of(offsets),
        "0/source": Payload.of(np.zeros(num_rows, np.uint32)),
        **segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys))),
    }
    return write(target, header, payloads)


def _vectors(official: _Official, dtype: str) -> dict[str, Payload]:
    """Return what rows are stored as, in one pass over the file; i8 takes one more for its scales."""
    known = COEFFICIENT_DTYPES if official.factors else SNIPPET_DTYPES
    if dtype not in known:
        raise ConfigError(f"dtype must be one of {', '.join(known)} for this bank, not {dtype!r}", key="dtype")
    columns = len(official.factors["basis"]) if official.factors else official.dim
    if dtype != "i8":
        stored = segments.snippet_payload(official.blocks, official.num_rows, columns, dtype)
        return {"coefficients" if official.factors else "snippets": stored}
    largest = np.max([np.abs(block).max(axis=0) for block in official.blocks()], axis=0)
    scale = factors.quantise(largest[None])[1]
    whole = Payload(
        dtype="I8", shape=(official.num_rows, columns),
        blocks=lambda: (factors.quantise_by(block, scale).data.cast("B") for block in official.blocks()),
    )  # fmt: skip
    return {"coefficients": whole, "scale": Payload.of(scale)}


# -- reading


def _check_archive(path: Path) -> None:
    """Raise unless the file is a whole, uncompressed zip as `torch.save` writes it: the reader below trusts that."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(
                entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size for entry in entries
            ):
                # torch maps compressed bytes as if they were values, and says nothing
                raise FormatError(f"{path} was compressed after it was saved: save it again with torch.save", path=path)
            if any(entry.filename.endswith(".pkl") and entry.file_size > MAX_PICKLE_BYTES for entry in entries):
                raise FormatError(f"{path} has far more structure than a bank: it is another kind of file", path=path)
            for entry in entries:
                if entry.CRC:  # torch can be told to leave these sums out, and then writes 0
                    _read_through(archive, entry)
    except FileNotFoundError as error:
        raise BankNotFoundError(f"no file at {path}: name the .pth file to import", path=path) from error
    except OSError as error:
        raise FormatError(f"could not read {path}: {error.strerror or error}", path=path) from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, GMemError):
            raise
        if start.startswith(b"PK"):
            raise CorruptError(
                f"{path} was cut short or damaged ({error}): restore it from a copy", path=path
            ) from error
        raise FormatError(
            f"{path} is not a file as torch.save writes it (a plain pickle is never read, since that executes it): if you "
            "trust it, load it yourself and save it again with torch.save",
            path=path,
        ) from error


def _read_through(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as stream:
        while stream.read(BLOCK_BYTES):
            pass


def _read(path: Path, space: Space) -> _Official:
    """Return what a file holds, checked but for the values of its rows, which are checked as they pass."""
    import torch

    try:
        loaded = torch.load(str(path), weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0][:200] or type(error).__name__
        raise FormatError(
            f"{path} holds more than tensors and numbers, or is damaged; nothing in it was executed ({reason}): have its maker "
            "save a plain tensor, or the dictionary of a factored bank",
            path=path,
        ) from error
    if isinstance(loaded, torch.Tensor):
        return _dense(_tensor(loaded, "the tensor", 2, path), path, space)
    if not isinstance(loaded, dict):
        raise FormatError(f"{path} holds a {type(loaded).__name__}, not a bank: a tensor or a dictionary", path=path)
    names = {*MATRICES, *NUMBERS}
    if set(loaded) != names:
        missing, extra = sorted(names - set(loaded)), [str(name)[:40] for name in loaded if name not in names]
        raise FormatError(
            f"{path} is not the dictionary of a factored bank: it lacks {missing} and has {extra[:3]} too many",
            path=path,
        )
    tensors = {name: _tensor(loaded[name], name, ndim, path) for name, ndim in MATRICES.items()}
    _check_sizes(tensors, *(_whole(loaded[name], name, path) for name in NUMBERS), path)
    return _factored(tensors, path, space)


def _tensor(value: object, name: str, ndim: int, path: Path) -> Tensor:
    """Return a value if it is an ordinary tensor of floats, each of whose values has its own bytes in the file."""
    import torch

    if not isinstance(value, torch.Tensor) or value.is_nested or value.layout != torch.strided or not value.is_cpu:
        raise FormatError(f"{path}: {name} is not an ordinary tensor", path=path, tensor=name)
    shape = list(value.shape)
    if value.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64) or len(shape) != ndim:
        kind = f"{value.dtype} of shape {shape}"
        raise FormatError(f"{path}: {name} is {kind}, expected floats with {ndim} sizes", path=path, tensor=name)
    if not value.numel():
        raise FormatError(f"{path}: {name} has shape {shape}: there is nothing in it", path=path, tensor=name)
    if value.numel() * value.element_size() > path.stat().st_size:  # strides of 0 make a terabyte of one number
        raise CorruptError(
            f"{path}: {name} says it has shape {shape}, more than the file holds", path=path, tensor=name
        )
    return value.detach().resolve_neg()


def _whole(value: object, name: str, path: Path) -> int:
    import torch

    if isinstance(value, torch.Tensor) and value.ndim == 0 and value.dtype == torch.int64 and value.is_cpu:
        return int(value)  # an export of ours that was saved as it is
    if type(value) is not int:
        raise FormatError(f"{path}: {name} is not a whole number", path=path, tensor=name)
    return value


def _check_sizes(tensors: Mapping[str, Tensor], latent_dim: int, feature_dim: int, path: Path) -> None:
    (num_rows, rank), dim = tensors["C"].shape, tensors["M"].shape[0]
    for name, wanted in (("M", (dim, rank)), ("S", (rank,)), ("mean", (dim,))):
        shape = tuple(tensors[name].shape)
        if shape != wanted:
            raise FormatError(
                f"{path}: {name} has shape {list(shape)}, expected {list(wanted)} beside C of {[num_rows, rank]} and M of "
                f"{list(tensors['M'].shape)}",
                path=path, tensor=name,
            )  # fmt: skip
    if rank > dim or feature_dim != dim:
        raise FormatError(f"{path}: {rank} components and feature_dim {feature_dim} for {dim} dimensions", path=path)
    # the published code cuts a rank that is too large to what there can be, and goes on saying what was asked for
    if latent_dim != rank and not latent_dim > rank == min(num_rows, dim):
        raise FormatError(f"{path}: latent_dim says {latent_dim}, C and M have {rank} columns", path=path)


def _row_blocks(tensor: Tensor) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """Yield (first row, (b, K) float32), over the memory map itself where the file holds float32."""
    import torch

    step = max(1, BLOCK_BYTES // (4 * tensor.shape[1]))
    for first in range(0, len(tensor), step):
        yield first, tensor[first : first + step].to(torch.float32).numpy()


def _require_usable(snippets: NDArray[np.float32], first: int, space: Space, path: Path) -> None:
    if space == "raw" and all_finite(snippets):
        return
    reasons = unusable_rows(snippets, space)
    if reasons:
        row = min(reasons)
        hint = "take it out and save the file again"
        raise CorruptError(f"{path}: row {first + row}: {reasons[row]}: {hint}", path=path, row=first + row)


def _dense(tensor: Tensor, path: Path, space: Space) -> _Official:
    def blocks() -> Iterator[NDArray[np.float32]]:
        for first, block in _row_blocks(tensor):
            _require_usable(block, first, space, path)
            yield to_space(block, space)

    num_rows, dim = tensor.shape
    return _Official(num_rows=num_rows, dim=dim, blocks=blocks, factors={}, details={"kind": "dense", "dim": dim})


def _factored(tensors: Mapping[str, Tensor], path: Path, space: Space) -> _Official:
    M, S, mean = (tensors[name].double().numpy() for name in ("M", "S", "mean"))
    for name, values in (("M", M), ("S", S), ("mean", mean)):
        if not np.isfinite(values).all() or (name == "S" and (values < 0).any()):
            raise CorruptError(
                f"{path}: {name} has values that cannot be: restore it from a copy", path=path, tensor=name
            )
    if not M.any():
        raise FormatError(f"{path}: all its rows are the mean, there is no component to import", path=path, tensor="M")
    kept = M.any(axis=0)
    basis, turn, off = _orthonormal(M[:, kept], S[kept])
    factors_ = {"basis": basis.astype(np.float32), "mean": mean.astype(np.float32)}
    as_saved = off <= ORTHONORMAL
    if as_saved:
        factors_["singular_values"] = S[kept].astype(np.float32)

    def blocks() -> Iterator[NDArray[np.float32]]:
        for first, block in _row_blocks(tensors["C"]):
            wide = block[:, kept].astype(np.float64)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is named below
                coefficients = np.asarray(wide * turn if turn.ndim == 1 else wide @ turn, np.float32)
            _require_usable(coefficients, first, "raw", path)
            if space == "unit":
                _require_usable(
                    factors.reconstruct(coefficients, factors_["basis"], factors_["mean"]), first, space, path
                )
            yield coefficients

    details = {
        "kind": "factored", "dim": len(mean), "rank": len(basis), "dropped_components": int((~kept).sum()),
        "orthonormal_within": off, "reorthonormalised": not as_saved,
    }  # fmt: skip
    return _Official(num_rows=len(tensors["C"]), dim=len(mean), blocks=blocks, factors=factors_, details=details)


def _orthonormal(
    M: NDArray[np.float64], S: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """Return an orthonormal basis (R, D), what turns rows of C into coefficients in it, and how far M/√S was from one.

    C·Mᵀ stays what it is. Where M/√S is a basis, coefficients are C times a (K,) vector; where it is not, M = P·Σ·Wᵀ gives the
    basis Pᵀ, and coefficients are C times the (K, R) matrix W·Σ.

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
    largest = np.take_along_axis(basis, np.abs(basis).argmax(axis=1)[:, None], axis=1)[:, 0]
    signs = np.where(largest < 0, -1.0, 1.0)
    return basis * signs[:, None], turn * signs, off


# -- writing


def to_official(bank: MemoryBank) -> dict[str, NDArray[Any]]:
    """Return a bank's active rows as the published code holds them.

    C·Mᵀ + mean is the raw reconstruction, also of a bank in unit space; S are the norms of the columns of the coefficients.

    Args:
        bank: an open bank; rows that are masked are left out.

    Returns:
        Of a factored bank C (n, R), M (D, R), S (R,), mean (D,) float32, latent_dim and feature_dim () int64; of a dense one
        memory_bank (n, D) float32.

    Raises:
        GMemError: every row is masked.
        CorruptError: an entry does not match its hash, or a value is not finite.
    """
    return {name: streams.read(payload) for name, payload in _official_payloads(bank).items()}


def export_official(bank: MemoryBank, output: PathLike) -> EditReport:
    """Write `to_official` as a safetensors file, in bounded memory; a pickle is never written.

    The published code reads .pth files. Whoever wants one makes it of the export f, for a factored or a dense bank:
    `torch.save({k: v if v.ndim else v.item() for k, v in safetensors.torch.load_file(f).items()}, "bank.pth")` or
    `torch.save(safetensors.torch.load_file(f)["memory_bank"], "bank.pth")`.

    Args:
        bank: an open bank; rows that are masked are left out.
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
            raise OutputExistsError(f"{target} exists: choose another name, or delete it first", path=target)
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
    if not isinstance(bank, FactoredBank):
        stored = [
            segments.snippets_as_f32(_entries(bank, segment)["snippets"], bank.space)
            for segment in bank.header.segments
        ]
        return {DENSE_NAME: _checked(_active(bank, stored), bank)}
    stored = [segments.coefficients_as_f32(_entries(bank, segment), bank.rank) for segment in bank.header.segments]
    coefficients = _checked(_active(bank, stored), bank)
    squares = np.zeros(bank.rank)
    for block in streams.row_blocks(coefficients):
        squares += np.square(block, dtype=np.float64).sum(axis=0)
    # any S above zero is consistent with its own C and M; a column of zeros has no size of its own
    S = np.sqrt(np.where(squares > 0, squares, 1.0)).astype(np.float32)
    root = np.sqrt(S.astype(np.float64))
    basis, mean = (streams.read(bank.stored.payload(name)) for name in ("basis", "mean"))
    return {
        "C": streams.mapped(coefficients, lambda block: (block / root).astype(np.float32), "F32", coefficients.shape),
        "M": Payload.of((basis.T * root).astype(np.float32)),
        "S": Payload.of(S),
        "mean": Payload.of(mean),
        "latent_dim": Payload.of(np.array(bank.rank, np.int64)),
        "feature_dim": Payload.of(np.array(bank.dim, np.int64)),
    }


def _entries(bank: MemoryBank, segment: Segment) -> dict[str, Payload]:
    start = f"{segment.name}/"
    names = [name for name in bank.stored.names() if name.startswith(start)]
    return {name.removeprefix(start): bank.stored.payload(name) for name in names}


def _active(bank: MemoryBank, parts: list[Payload]) -> Payload:
    """Return the active rows of all segments' vectors, one after the other."""
    keep = np.zeros(len(bank), np.bool_)
    keep[bank.rows()] = True
    if not keep.any():
        raise GMemError(f"every row of {bank.path} is masked: unmask those to export", path=bank.path)
    ends = np.cumsum([part.shape[0] for part in parts])
    kept = [streams.filtered(part, keep[end - part.shape[0] : end]) for part, end in zip(parts, ends, strict=True)]
    return streams.chained([part for part in kept if part.shape[0]])


def _checked(payload: Payload, bank: MemoryBank) -> Payload:
    """Return f32 rows whose values are looked at as they pass; raises CorruptError where one is not finite."""

    def same(block: NDArray[Any]) -> NDArray[Any]:
        if not all_finite(block):
            raise CorruptError(
                f"{bank.path} has a value that is not finite: 'gmem-bank verify' names it", path=bank.path
            )
        return block

    return streams.mapped(payload, same, "F32", payload.shape)
