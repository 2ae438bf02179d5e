"""Deletion on request, where an index lies beside the bank: it holds rows too, and goes where the bank no longer has them."""

from __future__ import annotations

from pathlib import Path

from gmem_bank import row_identity
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import GMemError
from gmem_bank.index_facts import facts_of, facts_rows, is_ours
from gmem_bank.index_file import index_path
from gmem_bank.storage import atomic
from gmem_bank.storage.safetensors_store import read_container
from gmem_bank.storage.stored import OpenFile


def clear_index(bank: MemoryBank) -> str | None:
    """Delete the index beside a bank unless all that it holds is in the bank as it is; return its path where it was deleted.

    Bringing it up to date would not do: its clusters were fitted to rows that are gone. An index elsewhere is not known here.

    Raises:
        LockedError: it is being written.
        WriteError: it cannot be deleted.
    """
    path = index_path(bank.path)
    with atomic.locked(path):  # which also clears what a killed writer has left
        if not path.is_file() or not is_ours(path) or _holds_only_rows_of(bank, path):
            return None
        try:
            path.unlink()
        except OSError as error:
            raise atomic.explain(error, path) from error
    return str(path)


def _holds_only_rows_of(bank: MemoryBank, path: Path) -> bool:
    """Say whether every segment that an index was made of is in the bank, byte for byte; of a damaged one it is not known."""
    try:
        facts = facts_of(read_container(OpenFile(path)).metadata)
    except GMemError:
        return False
    old, new = facts["content"], row_identity.content_of(bank)
    if old["dim"] != new["dim"] or not row_identity.same_factors(bank, old):
        return False
    return len(row_identity.kept_segments(old, new)[1]) == facts_rows(facts)
