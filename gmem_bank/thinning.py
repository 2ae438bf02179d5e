"""Coefficient masks: of each snippet of a factored bank only some coefficients are kept, and stored sparse.

Kept coefficients stay bit for bit as they are stored. A mask is not taken back but by `undo`.

Shapes: n rows of a segment, b rows of a block, R_k columns of a segment, m coefficients kept at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, kinds, segments, streams
from gmem_bank.draft import Draft
from gmem_bank.editing import EditReport, editing
from gmem_bank.errors import ConfigError, CorruptError
from gmem_bank.kinds import FactoredBank
from gmem_bank.ops import PathLike
from gmem_bank.provenance import Json
from gmem_bank.quality import SAMPLE_ROWS, overlap, sample_rows, summary
from gmem_bank.scalars import real, require_whole, whole
from gmem_bank.storage import Payload
from gmem_bank.storage.schema import Segment

ITEM_BYTES = {"F32": 4, "F16": 2, "I8": 1, "U16": 2}
FEW_ROWS = 1024
"""Made dense at a time."""
ROUNDING = 1e-9
"""Of a share of a snippet's energy."""

Choose = Callable[[NDArray[np.float32], NDArray[np.bool_]], NDArray[np.bool_]]
"""Takes (b, R_k) coefficients and which of them are there; returns which of those stay."""


def mask_coefficients(
    bank_path: PathLike,
    *,
    keep: int | None = None,
    keep_energy: float | None = None,
    keep_random: float | None = None,
    seed: int = 0,
    allow_larger: bool = False,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> EditReport:
    """Keep only some coefficients of each snippet of a factored bank; give exactly one of the three.

    Args:
        bank_path: the bank.
        keep: so many of each snippet's coefficients, the largest; of equal ones the first.
        keep_energy: of each snippet the fewest, largest first, that hold this share of the squared norm of its coefficients;
            above 0, at most 1.
        keep_random: each coefficient with this probability, above 0, at most 1 (the paper's random masking, made once).
        seed: of `keep_random`: a mask for a seed and a place in the bank, whatever the values.
        allow_larger: make the mask although the bank takes more room with it: each coefficient kept takes two bytes more for
            its place, in every row as many as in the fullest.
        output, dry_run, undo: as in other edits.

    Returns:
        A report with "coefficient_bytes_before", "coefficient_bytes_after", "break_even" (coefficients kept a row up to which
        a mask saves room), "num_kept" and "num_coefficients" of active and masked rows, "cosine" (mean, p1, p5, median, min)
        between snippets before and after and "neighbour_overlap_at_10", on at most 8,192 active rows, "bytes_before" and
        "bytes_after".

    Raises:
        ConfigError: the bank is dense, a number is out of range, or the bank would be larger.
    """
    arguments: dict[str, Json] = {
        name: value for name, value in (("keep", keep), ("keep_energy", keep_energy), ("keep_random", keep_random))
        if value is not None
    }  # fmt: skip
    _check(arguments, seed)
    arguments = {name: whole(value) if name == "keep" else real(value) for name, value in arguments.items()}
    if keep_random is not None:
        arguments["seed"] = require_whole("seed", seed, 0)
    with editing(bank_path, "mask", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None:
            return edit.unchanged()
        if not isinstance(edit.bank, FactoredBank):
            raise ConfigError(
                f"{edit.bank.path} is dense, its snippets have no coefficients to mask: make a factored bank of it first, such "
                "as with 'gmem-bank compress --rank 64'",
                path=edit.bank.path,
            )
        draft = edit.draft()
        parts, counts, changed = [], np.zeros(2, np.int64), False
        for number, segment in enumerate(draft.segments):
            choose = _chooser(arguments, seed, number)
            entries, kept, there = _thinned(draft, segment, choose)
            counts += kept, there
            changed = changed or kept < there or _fewer_slots(draft, segment, entries)
            parts.append((segment, entries))
        if not changed and edit.in_place:
            return edit.unchanged(details={"num_kept": int(counts[0]), "num_coefficients": int(counts[1])})
        draft.replace_segments(parts)
        facts: dict[str, Json] = {
            "num_kept": int(counts[0]), "num_coefficients": int(counts[1]), "bytes_before": edit.bank.stored.num_bytes,
        }  # fmt: skip
        facts |= _room(edit.bank, draft, allow_larger=allow_larger)
        facts |= _quality(edit.bank, draft)
        report = edit.finish(draft, num_rows=len(edit.bank), details=facts)
        if not dry_run:
            facts["bytes_after"] = kinds.open(edit.target).stored.num_bytes
        return report


def break_even(rank: int, item_bytes: int) -> int:
    """Return how many kept coefficients of so many bytes a row, with two bytes each for their places, take no more than all."""
    return rank * item_bytes // (item_bytes + 2)


def _num_bytes(payload: Payload) -> int:
    return ITEM_BYTES[payload.dtype] * payload.shape[0] * payload.shape[1]


def _room(bank: FactoredBank, draft: Draft, *, allow_larger: bool) -> dict[str, Json]:
    """Return what coefficients take before and after; raise ConfigError where that grows unasked."""
    sizes = [0, 0]
    for place, payloads in enumerate((bank.stored.payloads(), draft.payloads)):
        for segment in draft.segments:
            for what in ("coefficients", "values", "index"):
                payload = payloads.get(segment.entry(what))
                sizes[place] += 0 if payload is None else _num_bytes(payload)
    last = draft.segments[-1]
    kind = draft.payloads.get(last.entry("values"), draft.payloads.get(last.entry("coefficients")))
    assert kind is not None
    even = break_even(bank.rank, ITEM_BYTES[kind.dtype])
    if sizes[1] > sizes[0] and not allow_larger:
        raise ConfigError(
            f"with this mask the coefficients of {bank.path} would take {sizes[1]:,} bytes, now {sizes[0]:,}: a mask saves "
            f"room where no row keeps more than {even} of {bank.rank}; keep fewer, or allow a larger bank with --allow-larger",
            key="allow_larger",
        )
    return {"coefficient_bytes_before": sizes[0], "coefficient_bytes_after": sizes[1], "break_even": even}


def _check(arguments: Mapping[str, Any], seed: int) -> None:
    if len(arguments) != 1:
        raise ConfigError("give exactly one of keep, keep_energy and keep_random", key="keep")
    [(name, value)] = arguments.items()
    if name == "keep" and (whole(value) or 0) < 1:
        raise ConfigError(f"keep must be a whole number, at least 1, got {value}", key="keep")
    if name != "keep" and not 0 < real(value) <= 1:
        raise ConfigError(f"{name} must be above 0 and at most 1, got {value}", key=name)
    require_whole("seed", seed, 0)


def _chooser(arguments: Mapping[str, Any], seed: int, number: int) -> Callable[[], Choose]:
    """Return what makes the choice of a segment, from its first row on each time it is made."""
    if "keep" in arguments:
        return lambda: lambda values, there: largest(values, int(arguments["keep"])) & there
    if "keep_energy" in arguments:
        return lambda: lambda values, there: by_energy(values, float(arguments["keep_energy"])) & there

    def make() -> Choose:
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, number])))
        return lambda values, there: (rng.random(values.shape) < arguments["keep_random"]) & there

    return make


def largest(values: NDArray[np.float32], count: int) -> NDArray[np.bool_]:
    """Return the (b, R) mask of the `count` largest magnitudes a row; of equal ones the first."""
    order = np.argsort(-np.abs(values), axis=1, kind="stable")[:, :count]
    chosen = np.zeros(values.shape, np.bool_)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def by_energy(values: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """Return the (b, R) mask of the fewest coefficients a row, largest first, that hold a share of their squared norm."""
    squares = np.square(values, dtype=np.float64)
    order = np.argsort(-squares, axis=1, kind="stable")
    sums = np.cumsum(np.take_along_axis(squares, order, axis=1), axis=1)
    if share >= 1:
        return np.ones(values.shape, np.bool_)
    needed = sums - np.take_along_axis(squares, order, axis=1) < share * sums[:, -1:] * (1 - ROUNDING)
    chosen = np.zeros(values.shape, np.bool_)
    np.put_along_axis(chosen, order, needed, axis=1)
    return chosen


def _thinned(draft: Draft, segment: Segment, choose: Callable[[], Choose]) -> tuple[dict[str, Payload], int, int]:
    """Return the entries of a segment with its coefficients masked, how many are kept and how many were there."""
    entries, rank = draft.segment_entries(segment), draft.payloads["basis"].shape[0]
    most = kept = there = 0
    decide = choose()
    for codes, values in _dense_blocks(entries, rank):
        present = codes != 0
        chosen = decide(values, present)
        most = max(most, int(chosen.sum(axis=1).max()))
        kept, there = kept + int(chosen.sum()), there + int(present.sum())
    first = entries.get("values", entries.get("coefficients"))
    assert first is not None
    if kept == there and ("coefficients" in entries or max(most, 1) == first.shape[1]):
        return entries, kept, there  # nothing goes: what is dense stays so, which takes less room
    width, num_rows = max(most, 1), segment.num_rows
    own = {what: payload for what, payload in entries.items() if what not in ("coefficients", "values", "index")}
    own["values"] = Payload(
        dtype=first.dtype, shape=(num_rows, width), blocks=lambda: _slots(entries, rank, choose, width, index=False)
    )
    own["index"] = Payload(
        dtype="U16", shape=(num_rows, width), blocks=lambda: _slots(entries, rank, choose, width, index=True)
    )
    return own, kept, there


def _fewer_slots(draft: Draft, segment: Segment, entries: Mapping[str, Payload]) -> bool:
    old = draft.segment_entries(segment)
    return "values" in entries and ("values" not in old or old["values"].shape != entries["values"].shape)


def _dense_blocks(entries: Mapping[str, Payload], rank: int) -> Iterator[tuple[NDArray[Any], NDArray[np.float32]]]:
    """Yield (b, R_k) coefficients as they are stored, and as float32."""
    scale = streams.read(entries["scale"]) if "scale" in entries else None
    if "coefficients" in entries:
        for block in streams.row_blocks(entries["coefficients"]):
            for start in range(0, len(block), FEW_ROWS):
                codes = block[start : start + FEW_ROWS]
                yield codes, segments.scaled(codes, scale)
        return
    index = streams.read(entries["index"])
    rank, row = (rank if scale is None else len(scale)), 0
    for block in streams.row_blocks(entries["values"]):
        for start in range(0, len(block), FEW_ROWS):
            part = block[start : start + FEW_ROWS]
            codes = np.zeros((len(part), rank), part.dtype)
            places = index[row : row + len(part)].astype(np.int64)
            factors.require_within(places, rank, "index")
            filled = np.nonzero(part)  # unused slots hold 0, at index 0, where another may be in use
            codes[filled[0], places[filled]] = part[filled]
            if np.count_nonzero(codes) < len(filled[0]):
                raise CorruptError(
                    "entry 'index' names a coefficient twice in a row: no mask is made from it", tensor="index"
                )
            row += len(part)
            yield codes, segments.scaled(codes, scale)


def _slots(
    entries: Mapping[str, Payload], rank: int, choose: Callable[[], Choose], width: int, *, index: bool
) -> Iterator[memoryview]:
    """Yield the bytes of `values`, or of `index`: chosen coefficients of each row in order, then unused slots."""
    decide = choose()
    for codes, values in _dense_blocks(entries, rank):
        chosen = decide(values, codes != 0)
        order = np.argsort(~chosen, axis=1, kind="stable")[:, :width]
        used = np.take_along_axis(chosen, order, axis=1)
        slots = order.astype(np.uint16) if index else np.take_along_axis(codes, order, axis=1)
        yield (
            np.where(used, slots, np.zeros((), slots.dtype))
            .astype(slots.dtype, order="C")
            .view(np.uint8)
            .data.cast("B")
        )


def _quality(bank: FactoredBank, draft: Draft) -> dict[str, Json]:
    """Return what the masks keep, of a sample of active rows."""
    rows = sample_rows(bank.rows(), SAMPLE_ROWS, 0)
    if not len(rows):
        return {}
    before = factors.reconstruct(bank.coefficients(rows), bank.basis, bank.mean)
    after, first = np.empty_like(before), 0
    for segment in draft.segments:
        inside = rows[(rows >= first) & (rows < first + segment.num_rows)] - first
        places = np.searchsorted(rows, inside + first)
        row = 0
        for _, values in _dense_blocks(draft.segment_entries(segment), bank.rank):
            own = (inside >= row) & (inside < row + len(values))
            read = values[inside[own] - row]
            after[places[own]] = factors.reconstruct(read, bank.basis[: read.shape[1]], bank.mean)
            row += len(values)
        first += segment.num_rows
    same = overlap(before, after)
    return {
        "cosine": {name: round(value, 8) for name, value in summary(factors.cosines(before, after)).items()},
        "neighbour_overlap_at_10": None if same is None else round(same, 6), "neighbours_among": len(rows),
    }  # fmt: skip
