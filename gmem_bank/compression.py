"""Compress banks: factorise dense ones, truncate factored ones, several into one; streamed.

Shapes: N rows, D dimensions, R rank.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gmem_bank import kinds
from gmem_bank.bank import MemoryBank
from gmem_bank.builder import staging_folder
from gmem_bank.combine import absorb_banks
from gmem_bank.criteria import Goal, rank_for_bytes, rank_for_cosine, rank_for_energy
from gmem_bank.draft import Draft
from gmem_bank.editing import Edit, EditReport, editing
from gmem_bank.encoders import require_same_encoder
from gmem_bank.errors import ConfigError, CorruptError, GMemError, WriteError
from gmem_bank.fitting import gather_moments, project_rows
from gmem_bank.kinds import FactoredBank
from gmem_bank.moments import NOTHING, Directions, Moments, SumStore, principal, spectrum_of
from gmem_bank.ops import PathLike
from gmem_bank.plotting import draw_spectrum, require_drawable
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json
from gmem_bank.quality import sample_rows
from gmem_bank.rewrite import join_if_many
from gmem_bank.scalars import require_whole
from gmem_bank.segment_rows import Plan, SegmentRows, plan_for, rows_of
from gmem_bank.space import TINY_NORM
from gmem_bank.storage import num_bytes
from gmem_bank.storage.rules import MAX_RANK
from gmem_bank.stored_fit import measure, put_into, put_shapes
from gmem_bank.threads import one_thread_a_product

FIELDS = (
    "rank", "rank_asked", "dtype", "energy", "cosine", "neighbour_overlap_at_10", "neighbours_among", "relative_error",
    "optimal_relative_error", "optimum_known_to", "bytes_before", "bytes_after", "grow_below", "warnings",
)  # fmt: skip
"""What a report has in its details."""
NO_PARENT = "0" * 64
"""As long as a fingerprint."""


def compress(
    bank_path: PathLike | Sequence[PathLike],
    *,
    rank: int | None = None,
    energy: float | None = None,
    target_cosine: float | None = None,
    max_bytes: int | None = None,
    dtype: str = "f32",
    memory_limit: int | None = None,
    seed: int = 0,
    plot: PathLike | None = None,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
    progress: Progress = no_progress,
) -> EditReport:
    """Store snippets as coefficients on their principal directions, as far as exactly one of four goals asks.

    One pass adds up the mean and the (D, D) scatter matrix of all rows (float32 products of chunks, each shifted by its own
    mean, merged in float64: Chan, Golub and LeVeque 1979), whose eigenvectors are the basis; a second pass writes coefficients.
    Masked rows count like others. Memory does not grow with N but for some 50 bytes a row. The same call again ends in the same
    bytes after a kill: of dense rows the first pass is taken up where it was, all else begins anew. A factored bank is
    diagonalised anew and truncated.

    Args:
        bank_path: the bank; or several of one encoder, whose rows become one bank.
        rank: R, 1 to D; fewer where the rows span fewer directions.
        energy: share of the centred squared norm to keep, above 0, at most 1: the smallest rank that does.
        target_cosine: mean cosine of snippets to what is read of them: the smallest rank that reaches it.
        max_bytes: size of the bank on disk, all of it: the largest rank that fits.
        dtype: coefficients as "f32", "f16", or "i8" with a scale a component and segment.
        memory_limit: bytes of working memory; None: some 200 MB for 768 dimensions.
        seed: draws the rows that neighbours are compared among.
        plot: .html or .png file for the spectrum, new; drawn with `dry_run` too.
        output: bank to write; default: replace the bank (of several, give one).
        dry_run: write nothing: report rank, energy and bytes after the first pass.
        undo: keep the bank as it was for `undo`.
        progress: told rows done and rows in all, both passes together.

    Returns:
        A report with FIELDS in its details. "energy" is what the second pass found kept, "cosine" has mean, p1, p5, median, min,
        "relative_error" is ‖s - ŝ‖ over ‖s - mean‖ of all rows together, "optimal_relative_error" that of the best basis with
        exact coefficients (Eckart and Young 1936), rounding where it is below "optimum_known_to"; "warnings" has sentences, one
        where the former passes the latter by more than a thousandth. With `dry_run` energy is that of the first pass, and what
        only the second one knows is left out; "bytes_after" may then be up to 128 above what is written. Where the
        bank was made before, what would have to be measured again is None.

    Raises:
        ConfigError: not one goal, one out of range, or one that cannot be reached (the message says what can).
        CorruptError: a row is not finite, or an entry is damaged; nothing is written.
        EncoderMismatchError, ConceptExistsError: of several banks, encoders differ or a key occurs twice.
    """
    paths = [bank_path] if isinstance(bank_path, str | os.PathLike) else list(bank_path)
    if not paths:
        raise ConfigError("no bank is given: name one, or several and a new one for them", key="bank_path")
    if len(paths) > 1 and output is None:
        raise ConfigError("several banks are compressed into a new one: give its name with -o", key="output")
    goal = Goal(rank=rank, energy=energy, target_cosine=target_cosine, max_bytes=max_bytes, dtype=dtype).plain()
    require_whole("seed", seed, 0)
    others = [kinds.open(path) for path in paths[1:]]
    arguments = goal.to_json() | ({"banks": [bank.fingerprint for bank in others]} if others else {})
    with editing(paths[0], "compress", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        folder = staging_folder(edit.target, "compress")
        if edit.made is not None:
            if not dry_run:
                shutil.rmtree(folder, ignore_errors=True)  # of this very command, killed after its last write
            return _unchanged(edit, goal, plot)
        goal.check(edit.bank.dim)
        if plot is not None:
            require_drawable(Path(plot))
        job = job_of(edit, others, memory_limit, progress)
        try:
            with one_thread_a_product():
                report, found = _compressed(edit, job, goal, folder, seed)
        except GMemError as error:
            if not dry_run:
                _tidy(folder, resumes=isinstance(error, WriteError))
            raise
        if not dry_run:
            shutil.rmtree(folder, ignore_errors=True)
        if plot is not None:  # last: a kill before leaves the name free for the same command again
            draw_spectrum(edit.bank, np.sqrt(spectrum_of(found)), plot)
    return report


def _tidy(folder: Path, *, resumes: bool) -> None:
    """Remove what an error leaves: all of it where the same command would end there again, else all but the first pass's sums."""
    if not resumes:
        shutil.rmtree(folder, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        (folder / "coefficients").unlink(missing_ok=True)  # these begin anew, and a full disk wants the room
        folder.rmdir()  # where there is nothing else in it


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is compressed, and how."""

    draft: Draft
    banks: list[MemoryBank]
    rows: list[SegmentRows]
    plan: Plan
    progress: Progress

    @property
    def bytes_before(self) -> int:
        """Of all banks on disk."""
        return sum(bank.stored.num_bytes for bank in self.banks)


def job_of(edit: Edit, others: Sequence[MemoryBank], memory_limit: int | None, progress: Progress) -> Job:
    """Return what an edit of a bank, and of others whose rows follow, has to do."""
    for other in others:
        require_same_encoder(other.encoder, edit.bank.encoder)
    draft = edit.draft()
    banks = [edit.bank, *others]
    origins = absorb_banks(draft, banks, "error").origins
    if all(bank.header.kind == "dense" for bank in banks):
        join_if_many(draft)
        origins = [0] * len(draft.segments)
    return Job(
        draft=draft, banks=banks, rows=rows_of(draft, banks, origins),
        plan=plan_for(edit.bank.dim, draft.num_rows, memory_limit), progress=progress,
    )  # fmt: skip


def moments_of(job: Job, folder: Path | None = None) -> Moments:
    """Return the moments of a job's rows; its sums survive a kill in a folder."""
    plan: dict[str, object] = {
        "banks": [bank.fingerprint for bank in job.banks], "chunk_rows": job.plan.chunk_rows, "version": 2,
    }  # fmt: skip
    store = SumStore(folder, plan) if folder is not None else None
    # the second pass has as many rows
    return gather_moments(job.rows, job.plan, store, lambda done, total: job.progress(done, 2 * total))


def _compressed(edit: Edit, job: Job, goal: Goal, folder: Path, seed: int) -> tuple[EditReport, Moments]:
    found = moments_of(job, None if edit.dry_run else folder)
    require_directions(found, edit.bank)
    most = min(edit.bank.dim, MAX_RANK, max(found.count - 1, 1))

    def size(rank: int) -> int:
        return size_of(job, edit, rank, goal.dtype)

    chosen = goal.rank
    if goal.energy is not None:
        chosen = rank_for_energy(spectrum_of(found), goal.energy)
    elif goal.max_bytes is not None:
        chosen = rank_for_bytes(size, most, goal.max_bytes, goal.dtype)
    directions = principal(found, most if chosen is None else min(chosen, most))
    if goal.target_cosine is not None:
        chosen = rank_for_cosine(job.rows, directions, found.mean, job.plan, goal)
    basis = directions.basis[:chosen]
    facts = _first_facts(found, directions, len(basis)) | {
        "rank_asked": len(basis) if goal.rank is None else goal.rank, "dtype": goal.dtype, "bytes_before": job.bytes_before,
    }  # fmt: skip
    notes = [] if goal.energy is None else _beyond_rounding(found, len(basis), goal.energy)
    noted: dict[str, Json] = {"rank": len(basis)}
    if edit.dry_run:
        facts |= {"bytes_after": size(len(basis)), "warnings": notes}
        return edit.finish(job.draft, num_rows=job.draft.num_rows, noted=noted, details=facts), found
    sample = sample_rows(np.arange(job.draft.num_rows), job.plan.sample_rows, seed)
    fitted = project_rows(
        job.rows, basis, found.mean, job.plan, folder / "coefficients", sample=sample,
        progress=lambda done, total: job.progress(total + done, 2 * total),
    )  # fmt: skip
    quality = measure(fitted, goal.dtype, sample, plan=job.plan)
    optimum, known_to = float(facts["optimal_relative_error"]), float(facts["optimum_known_to"])
    notes += quality.warnings(fitted, goal.dtype, optimum, known_to)
    facts |= quality.report(fitted) | {"warnings": notes}
    put_into(job.draft, fitted, goal.dtype, quality.grow_below())
    report = edit.finish(job.draft, num_rows=job.draft.num_rows, noted=noted, details=facts)
    facts |= {"grow_below": quality.grow_below(), "bytes_after": kinds.open(edit.target).stored.num_bytes}
    return report, found


def require_directions(found: Moments, bank: MemoryBank) -> None:
    """Raise CorruptError where rows are so short, but not zero, that float32 cannot hold their squares."""
    square = found.energy / max(found.count, 1) + float(found.mean @ found.mean)
    if 0 < square < TINY_NORM**2:
        raise CorruptError(
            f"the snippets of {bank.path} have a length of {np.sqrt(square):.3g} in the mean: below {TINY_NORM} they have no "
            "direction in float32, whose squares vanish. Build the bank from larger numbers",
            path=bank.path,
        )


def _first_facts(found: Moments, directions: Directions, rank: int) -> dict[str, Any]:
    """Return what the first pass says of a rank: its energy there, and the error of the best basis."""
    if found.energy <= 0:
        return {"rank": rank, "energy": 1.0, "optimal_relative_error": 0.0, "optimum_known_to": 0.0}
    beyond = found.energy - float(directions.energies[:rank].sum())
    unsure = max(found.rounding, NOTHING * found.energy)
    return {
        "rank": rank, "energy": 1 - max(beyond, 0.0) / found.energy,
        "optimal_relative_error": float(np.sqrt(max(beyond, 0.0) / found.energy)),
        "optimum_known_to": float(np.sqrt(unsure / found.energy)),
    }  # fmt: skip


def _beyond_rounding(found: Moments, rank: int, energy: float) -> list[str]:
    """Return what is to be said where a share of energy takes every direction that float32 sums tell from rounding."""
    if not found.rounding or rank < int(np.count_nonzero(spectrum_of(found))) or rank == len(found.mean):
        return []
    return [
        f"an energy of {energy} lies beyond what float32 sums tell: rank {rank} has every direction above their rounding"
    ]


def _unchanged(edit: Edit, goal: Goal, plot: PathLike | None) -> EditReport:
    """Report on a bank that is there already, and draw the spectrum that a kill has left undrawn."""
    made = edit.made
    assert isinstance(made, FactoredBank)
    if plot is not None and not Path(plot).exists() and made.singular_values is not None:
        require_drawable(Path(plot))
        draw_spectrum(made, made.singular_values.astype(np.float64), plot)
    return edit.unchanged(
        details=dict.fromkeys(FIELDS)
        | {
            "rank": made.rank, "rank_asked": goal.rank if goal.rank is not None else made.rank, "dtype": goal.dtype,
            "bytes_before": None if edit.in_place else edit.bank.stored.num_bytes, "bytes_after": made.stored.num_bytes,
            "grow_below": made.header.extras.get("grow_below"), "warnings": [],
        }
    )  # fmt: skip


def size_of(job: Job, edit: Edit, rank: int, dtype: str, keep: int | None = None) -> int:
    """Return the bytes of the whole bank at a rank, with so many coefficients kept a row (None: all).

    Where an edit has no arguments, as a sweep's has none, they are those of the commands that would make the bank. Figures in
    the header may come out shorter than is thought here, which makes it 64 bytes less at times.
    """
    put_shapes(job.draft, rank, dtype, keep)
    num_rows, arguments = job.draft.num_rows, edit.arguments or {"rank": rank, "dtype": dtype}
    entry = {"operation": edit.operation, "arguments": dict(arguments), "num_rows": num_rows, "rank": rank}
    header, payloads = job.draft.finish(entry)
    if keep is not None:
        masked = {"operation": "mask", "arguments": {"keep": keep}, "num_rows": num_rows, "parent": NO_PARENT}
        header = replace(header, history=(*header.history, masked))
    return num_bytes(edit.target, header, payloads)
