"""Operations on a bank: each makes a new file from an old one, atomically, with one entry in its history.

Shapes: N rows of the old bank, n new rows, D dimensions.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import bank as bank_module
from gmem_bank import manipulate, segments
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConceptExistsError, ConfigError, GMemError, OutputExistsError, first_three, suggest
from gmem_bank.naming import concept_name_problem
from gmem_bank.provenance import Json, Source
from gmem_bank.query import snippet_of
from gmem_bank.rewrite import append_segment, concepts_after, keep_rows
from gmem_bank.space import to_space, unusable_rows
from gmem_bank.storage import atomic, real_target


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """What an operation did."""

    operation: str
    bank: str
    output: str
    concept: str | None
    num_added: int = 0
    num_removed: int = 0
    num_rows: int
    """Rows of the bank afterwards."""
    skipped: list[dict[str, str]] = field(default_factory=list)
    """Files that gave no row: path and reason."""
    keys: list[str] = field(default_factory=list)
    """Keys of the new rows."""
    dropped_concepts: list[str] = field(default_factory=list)
    """Other concepts that lost their last row."""
    fingerprint: str
    unchanged: bool = False
    """True: the bank already was what the operation makes."""

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


def check_concept_name(name: str) -> str:
    """Return the name; raises ConfigError where it cannot be one (empty, a path, control characters)."""
    problem = concept_name_problem(name)
    if problem:
        raise ConfigError(f"{name!r} cannot name a concept, it {problem}: give a plain word with --name", key=name)
    return name


def remove_concept(
    bank_path: str | os.PathLike[str], name: str, *, output: str | os.PathLike[str] | None = None
) -> EditReport:
    """Delete a concept and its rows; the rows after them move up, keys stay.

    Args:
        bank_path: the bank.
        name: the concept.
        output: bank file to write; default: replace the bank.

    Raises:
        UnknownKeyError: no such concept; the nearest names are offered.
        GMemError: no row would be left.
    """
    target = edit_target(bank_path, output)
    with atomic.locked(target):
        bank = bank_module.open(bank_path)
        arguments = {"name": name}
        made = result_of(bank, target, "remove-concept", arguments)
        if made is not None and name not in made.names:
            return _unchanged(made, "remove-concept", bank_path, target, name)
        doomed = bank.all_rows_of(name)
        keep = np.ones(len(bank), np.bool_)
        keep[doomed] = False
        if not keep.any():
            raise GMemError(
                f"{bank.path}: {name!r} holds every row, and a bank must keep at least one: delete the file instead"
            )
        concepts = concepts_after(bank, keep, without=name)
        dropped = [other for other in bank.names if other != name and other not in concepts]
        entry = {"operation": "remove-concept", "arguments": arguments, "num_rows": len(doomed)}
        header = keep_rows(bank, target, keep, concepts, entry)
    return EditReport(
        operation="remove-concept", bank=str(bank_path), output=str(target), concept=name, num_removed=len(doomed),
        num_rows=header.num_rows, dropped_concepts=dropped, fingerprint=header.fingerprint,
    )  # fmt: skip


def interpolate(
    bank_path: str | os.PathLike[str],
    first: str,
    second: str,
    *,
    method: str = "slerp",
    steps: int = 6,
    name: str | None = None,
    seed: int = 0,
    output: str | os.PathLike[str] | None = None,
) -> EditReport:
    """Write the way from one snippet to another as rows of a new concept.

    Args:
        bank_path: the bank.
        first: key of a row, or a concept (its mean snippet); t = 0.
        second: the same; t = 1.
        method: "linear", "slerp", "concat" or "mask".
        steps: rows to write, both ends included; at least 2.
        name: the new concept; default "<first>-to-<second>".
        seed: for "mask".
        output: bank file to write; default: replace the bank.

    Raises:
        UnknownKeyError: neither a concept nor a key.
        ConceptExistsError: the name is taken.
        ConfigError: unknown method, or fewer than two steps.
    """
    if method not in manipulate.METHODS:
        raise ConfigError(f"unknown method {method!r}.{suggest(method, manipulate.METHODS)}", key="method")
    if steps < 2:
        raise ConfigError(f"steps must be at least 2 (both ends are written), got {steps}", key="steps")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}", key="seed")
    target = edit_target(bank_path, output)
    with atomic.locked(target):
        bank = bank_module.open(bank_path)
        label = f"{_label(first)}-to-{_label(second)}"
        concept = check_concept_name(name if name is not None else label)
        arguments = {"first": first, "second": second, "method": method, "steps": steps, "name": concept, "seed": seed}
        made = result_of(bank, target, "interpolate", arguments)
        if made is not None and concept in made.names:
            return _unchanged(made, "interpolate", bank_path, target, concept)
        if concept in bank.names:
            raise ConceptExistsError(taken_message(bank, concept), path=bank.path, key=concept)
        rows = _way(bank, first, second, steps, method, seed)
        keys = [f"{concept}/{step:0{len(str(steps - 1))}d}" for step in range(steps)]
        require_new_keys(bank, keys)
        entry = {"operation": "interpolate", "arguments": arguments, "num_rows": steps}
        snippets = segments.snippet_payload(lambda: [rows], steps, bank.dim, stored_dtype(bank))
        derived = [Source(kind="derived", prefix=f"{concept}/")]
        header = append_segment(bank, target, concept, keys, derived, np.zeros(steps, np.int64), snippets, entry)
    return EditReport(
        operation="interpolate", bank=str(bank_path), output=str(target), concept=concept, num_added=steps,
        num_rows=header.num_rows, keys=keys, fingerprint=header.fingerprint,
    )  # fmt: skip


def _way(bank: MemoryBank, first: str, second: str, steps: int, method: str, seed: int) -> NDArray[np.float32]:
    """Return the (steps, D) snippets from one item to another, in the bank's space; raises GMemError where one is zero."""
    points = manipulate.interpolate(snippet_of(bank, first), snippet_of(bank, second), steps, method, seed=seed)
    reasons = unusable_rows(points, bank.space)
    if reasons:
        raise GMemError(f"step {min(reasons)} of {method} between {first!r} and {second!r} has no direction: try slerp")
    return to_space(points, bank.space)


def _unchanged(
    made: MemoryBank, operation: str, bank_path: str | os.PathLike[str], target: Path, concept: str
) -> EditReport:
    keys = made.keys(made.all_rows_of(concept)) if concept in made.names else []
    return EditReport(
        operation=operation,
        bank=str(bank_path),
        output=str(target),
        concept=concept,
        num_rows=len(made),
        keys=keys,
        fingerprint=made.fingerprint,
        unchanged=True,
    )


# -- what every edit shares


def edit_target(bank_path: str | os.PathLike[str], output: str | os.PathLike[str] | None) -> Path:
    """Return the file that an edit writes: the bank itself, or `output`; raises FormatError for a wrong suffix."""
    return real_target(bank_path if output is None else output)


def result_of(bank: MemoryBank, target: Path, operation: str, arguments: Mapping[str, Json]) -> MemoryBank | None:
    """Return the bank at `target` where it already is what the operation makes of `bank`, None where it is to be made.

    A kill can come after the last write, so that the same command meets its own result.

    Raises:
        OutputExistsError: something else is there.
    """
    in_place = target.resolve() == bank.path.resolve()
    if not in_place and not target.exists():
        return None
    there = bank if in_place else _other(target)
    last = there.history[-1] if there.history else {}
    made = last.get("operation") == operation and last.get("arguments") == arguments
    if made and (in_place or last.get("parent") == bank.fingerprint):
        return there
    if not in_place:
        raise OutputExistsError(f"{target} exists: choose another name with -o, or delete it first", path=target)
    return None


def _other(target: Path) -> MemoryBank:
    try:
        return bank_module.open(target)
    except GMemError as error:
        raise OutputExistsError(
            f"{target} exists: choose another name with -o, or delete it first", path=target
        ) from error


def _label(item: str) -> str:
    return item.replace("/", "_").replace("\\", "_")


def stored_dtype(bank: MemoryBank) -> str:
    """Return how a bank stores snippets: "f32", "f16" or "bf16"."""
    stored = bank.stored.dtype(bank.header.segments[-1].entry("snippets"))
    return {"F32": "f32", "F16": "f16", "BF16": "bf16"}[stored]


def require_new_keys(bank: MemoryBank, keys: Sequence[str]) -> None:
    """Raise ConceptExistsError where the bank has one of the keys."""
    taken = [key for key, row in zip(keys, bank.find_rows(keys), strict=True) if row >= 0]
    if taken:
        raise ConceptExistsError(
            f"{bank.path} already has rows with key {first_three(taken)}: choose another --name", key=taken[0]
        )


def taken_message(bank: MemoryBank, concept: str) -> str:
    """Return what to say where a concept's name is taken."""
    return (
        f"{bank.path} already has a concept {concept!r} ({len(bank.all_rows_of(concept))} rows): choose another --name, or "
        f"remove it first with 'gmem-bank remove-concept {concept} --bank {bank.path}'"
    )
