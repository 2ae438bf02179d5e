"""Writes that happen wholly or not at all, and one writer at a time. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gmem_bank.errors import LockedError, OutputExistsError, WriteError

logger = logging.getLogger(__name__)


def temporary_path(path: Path) -> Path:
    """Return the hidden path that a new version of `path` is written to: fixed, so that a killed writer's is found."""
    return path.with_name(f".{path.name}.tmp")


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def sync_folder(folder: Path) -> None:
    """Make a rename in the folder survive a power cut, where the file system can; the rename itself has happened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # some network and user-space file systems refuse to sync a folder
        logger.warning("could not sync the folder %s: %s", folder, error)


def explain(error: OSError, path: Path, needed: int | None = None) -> WriteError:
    """Turn an operating-system error of a write into one that says what to do."""
    reason = error.strerror or str(error)
    size = "" if needed is None else f" ({needed:,} bytes were needed, {_free(path.parent):,} are free there)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        hint = "Free some space or write elsewhere, then run the same command again."
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        hint = "Write elsewhere."
    else:
        hint = "Run the same command again once the disk answers."
    return WriteError(f"could not write {path}: {reason}{size}. What was there before still stands. {hint}", path=path)


def _free(folder: Path) -> int:
    with contextlib.suppress(OSError):
        return shutil.disk_usage(folder).free
    return 0


@contextlib.contextmanager
def replacing(path: Path, *, needed: int | None = None) -> Iterator[BinaryIO]:
    """Open a temporary file in the same folder and, if the block ends well, put it in the place of `path`.

    The file is fsynced before the rename and the folder after it; on any error the temporary file is removed and `path`
    is untouched.

    Args:
        path: file to create or replace; its folder is made if absent.
        needed: bytes about to be written, for the message.

    Raises:
        WriteError: the operating system refused.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w+b") as stream:
            yield stream
            stream.flush()
            with contextlib.suppress(FileNotFoundError):
                os.fchmod(stream.fileno(), stat.S_IMODE(path.stat().st_mode))  # who may read it stays as it was
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        _discard(temporary)
        if isinstance(error, WriteError):
            raise
        raise explain(error, path, needed) from error
    except BaseException:
        _discard(temporary)
        raise
    sync_folder(path.parent)


def _discard(temporary: Path) -> None:
    if temporary.is_dir() and not temporary.is_symlink():
        shutil.rmtree(temporary, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        temporary.unlink()


@contextlib.contextmanager
def making_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder and, if the block ends well, rename it to `path`, which must not exist or be empty.

    Raises:
        WriteError: the operating system refused; nothing is left.
    """
    temporary = temporary_path(path)
    _discard(temporary)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        sync_folder(temporary)
        temporary.replace(path)
    except OSError as error:
        _discard(temporary)
        if isinstance(error, WriteError):
            raise
        raise explain(error, path) from error
    except BaseException:
        _discard(temporary)
        raise
    sync_folder(path.parent)


def require_free(path: Path, overwrite: bool) -> None:
    """Raise OutputExistsError where something is at a path and must not be overwritten."""
    if not overwrite and path.exists():
        raise OutputExistsError(f"{path} exists: choose another name with -o, or give --overwrite", path=path)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a small file atomically."""
    with replacing(path, needed=len(data)) as stream:
        stream.write(data)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the advisory lock of a bank for a whole edit, and clear what a killed writer left.

    Raises:
        LockedError: another process holds it.
        WriteError: the folder cannot be written.
    """
    lock = _lock_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(lock, path)
    except OSError as error:
        if isinstance(error, LockedError):
            raise
        raise explain(error, path) from error
    try:
        _discard(temporary_path(path))
        yield
    finally:
        _discard(lock)  # while it is still held: a waiter then finds another inode and tries again
        os.close(descriptor)


def _acquire(lock: Path, path: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockedError(
                f"another process is writing {path}: wait for it to end, then run the same command again", path=path
            ) from error
        except OSError:
            os.close(descriptor)
            raise
        if _same_inode(descriptor, lock):
            return descriptor
        os.close(descriptor)


def _same_inode(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
