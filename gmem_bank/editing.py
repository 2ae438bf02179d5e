"""What every edit shares: the lock, doing nothing twice, `--dry-run`, the write, and the state that `undo` goes back to."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gmem_bank import kinds
from gmem_bank.bank import MemoryBank
from gmem_bank.draft import Draft
from gmem_bank.errors import GMemError, OutputExistsError
from gmem_bank.index_clearing import clear_index
from gmem_bank.provenance import Json
from gmem_bank.storage import atomic, previous, real_target, write
from gmem_bank.storage.schema import Header

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EditReport:
    """What an operation did, or with `dry_run` would do."""

    operation: str
    bank: str
    output: str
    concept: str | None = None
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
    details: dict[str, Json] = field(default_factory=dict)
    """What this operation alone has to say."""
    fingerprint: str
    """Of the bank afterwards; of the bank as it is with `dry_run`."""
    unchanged: bool = False
    """True: the bank already was what the operation makes."""
    dry_run: bool = False
    """True: nothing was written."""
    deleted_index: str | None = None
    """The index beside the bank, where it went with what was not to be kept for `undo`."""

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return dataclasses.asdict(self)


@dataclass(kw_only=True)
class Edit:
    """One operation on one bank, from `editing`."""

    operation: str
    arguments: Mapping[str, Json]
    bank: MemoryBank
    target: Path
    made: MemoryBank | None
    """The bank that this very operation has left already, if it has."""
    dry_run: bool
    keep_undo: bool
    deleted_index: str | None = None
    """As in the report."""

    @property
    def in_place(self) -> bool:
        """Whether the bank itself is what will be replaced."""
        return self.target.resolve() == self.bank.path.resolve()

    def draft(self) -> Draft:
        """Return a draft of the new bank."""
        return Draft(self.bank, self.target)

    def unchanged(self, *, concept: str | None = None, **facts: Any) -> EditReport:
        """Report that the work was done already."""
        made = self.made if self.made is not None else self.bank
        keys = made.keys(made.all_rows_of(concept)) if concept is not None and concept in made.names else []
        return self._report(made.header, **{"concept": concept, "keys": keys, "unchanged": True, **facts})

    def finish(
        self, draft: Draft, *, num_rows: int, noted: Mapping[str, Json] | None = None, **facts: Any
    ) -> EditReport:
        """Write the draft with one entry in its history.

        Args:
            draft: the new bank.
            num_rows: rows that the operation added, removed or touched, for the history.
            noted: what else the history says of it.
            facts: fields of the report.
        """
        entry = {"operation": self.operation, "arguments": dict(self.arguments), "num_rows": num_rows, **(noted or {})}
        header, payloads = draft.finish(entry)
        if not self.dry_run:
            header = commit(self.bank, self.target, header, payloads, self.keep_undo and not draft.only_appended)
            if not self.keep_undo:
                self.forget()
        report = self._report(header, **facts)
        return dataclasses.replace(report, fingerprint=self.bank.fingerprint) if self.dry_run else report

    def forget(self) -> None:
        """Delete what holds rows that the bank no longer has: earlier states, and an index beside it that has such rows."""
        previous.tidy(self.target, ())
        if self.in_place:
            self.deleted_index = clear_index(kinds.open(self.target)) or self.deleted_index

    def _report(self, header: Header, **facts: Any) -> EditReport:
        known: dict[str, Any] = {"operation": self.operation, "bank": str(self.bank.path), "output": str(self.target)}
        known |= {"num_rows": header.num_rows, "fingerprint": header.fingerprint, "dry_run": self.dry_run}
        known["deleted_index"] = self.deleted_index
        return EditReport(**{**known, **facts})


@contextlib.contextmanager
def editing(
    bank_path: str | os.PathLike[str],
    operation: str,
    arguments: Mapping[str, Json],
    *,
    output: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    undo: bool = True,
) -> Iterator[Edit]:
    """Open a bank for one operation, under the lock of the file that will be written.

    Args:
        bank_path: the bank.
        operation: the verb, for the history.
        arguments: what decides the result, for the history: the same verb with the same arguments is not done twice.
        output: bank file to write; default: replace the bank.
        dry_run: nothing is written, and no lock taken.
        undo: whether the bank as it was is kept for `undo` where the new one cannot give it back.

    Raises:
        BankNotFoundError, FormatError, CorruptError: the bank cannot be opened.
        OutputExistsError: the output is there and is something else.
        LockedError: another process is editing it.
    """
    target = real_target(bank_path if output is None else output)
    kinds.open(bank_path)  # where there is no bank, no folder is made for its lock
    with contextlib.nullcontext() if dry_run else atomic.locked(target):
        bank = kinds.open(bank_path)
        made = result_of(bank, target, operation, arguments)
        edit = Edit(
            operation=operation,
            arguments=arguments,
            bank=bank,
            target=target,
            made=made,
            dry_run=dry_run,
            keep_undo=undo,
        )
        if made is not None and not dry_run:  # a kill may have come between the write and the tidying
            previous.tidy(target, labels_needed(made.header)) if undo else edit.forget()
        yield edit


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
        return kinds.open(target)
    except GMemError as error:
        raise OutputExistsError(
            f"{target} exists: choose another name with -o, or delete it first", path=target
        ) from error


def commit(bank: MemoryBank, target: Path, header: Header, payloads: Mapping[str, Any], keep_previous: bool) -> Header:
    """Write a bank in the place of what is at `target`, keeping that for `undo` where asked."""
    if target.resolve() == bank.path.resolve() and keep_previous:
        previous.keep(target, state_label(bank.header))
    try:
        final = write(target, header, payloads)
    except BaseException:
        if target.exists():
            previous.tidy(target, labels_needed(bank.header))
        raise
    try:
        previous.tidy(target, labels_needed(final))
    except GMemError as error:  # the edit is done: what could not be cleared away is no failure of it
        logger.warning("could not clear what older states of %s have left: %s", target, error)
    return final


def state_label(header: Header) -> str:
    """Return the label that a state of a bank is kept under: how many operations made it, and its fingerprint."""
    return f"{len(header.history)}-{header.fingerprint[:12]}"


def labels_needed(header: Header) -> set[str]:
    """Return the label of the one kept state that `undo` may ask for: the one before the last edit that did not just append."""
    for place in range(len(header.history) - 1, 0, -1):
        entry = header.history[place]
        if "appended" not in entry:
            return {f"{place}-{str(entry.get('parent'))[:12]}"}
    return set()
