"""Earlier states of a bank, kept for `undo`: a hidden hard link beside a file, a hidden manifest inside a folder.

A label says which state it is; whether it is the one before the last edit is for the caller to check.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Collection
from pathlib import Path

from gmem_bank.storage import atomic, is_folder_form, open_stored
from gmem_bank.storage.stored import StoredBank

logger = logging.getLogger(__name__)


def _current(path: Path) -> Path:
    return path / "manifest.json" if is_folder_form(path) else path


def place_of(path: Path, label: str) -> Path:
    """Return where the state of that label is kept."""
    current = _current(path)
    return current.with_name(f".undo-{label}.{current.name}")


def keep(path: Path, label: str) -> None:
    """Keep the bank as it is now; raises WriteError."""
    place = place_of(path, label)
    try:
        place.unlink(missing_ok=True)
        try:
            place.hardlink_to(_current(path))
        except OSError as error:
            logger.info("%s takes no hard links (%s): the previous bank is copied", path.parent, error)
            shutil.copyfile(_current(path), place)
    except OSError as error:
        raise atomic.explain(error, place) from error


def labels(path: Path) -> set[str]:
    """Return the labels of the states that are kept."""
    current = _current(path)
    ours = re.compile(rf"\.undo-(\d+-[0-9a-f]{{12}})\.{re.escape(current.name)}")
    try:
        names = [file.name for file in current.parent.iterdir()]
    except OSError:
        return set()
    return {match[1] for name in names if (match := ours.fullmatch(name))}


def open_previous(path: Path, label: str) -> StoredBank:
    """Open a kept state; raises as `open_stored` does."""
    if is_folder_form(path):
        from gmem_bank.storage import folder_store

        return folder_store.open_bank(path, place_of(path, label).name)
    return open_stored(place_of(path, label))


def restore(path: Path, label: str) -> None:
    """Put a kept state in the place of the current one; raises WriteError."""
    try:
        place_of(path, label).replace(_current(path))
    except OSError as error:
        raise atomic.explain(error, path) from error
    atomic.sync_folder(_current(path).parent)


def tidy(path: Path, keep_labels: Collection[str]) -> None:
    """Forget all states but those, and in a folder remove the files that only they used."""
    for label in labels(path) - set(keep_labels):
        with contextlib.suppress(OSError):
            place_of(path, label).unlink()
    if is_folder_form(path):
        from gmem_bank.storage import folder_store

        manifests = {place_of(path, label).name for label in labels(path)}
        folder_store.sweep(path, manifests | {folder_store.MANIFEST})
