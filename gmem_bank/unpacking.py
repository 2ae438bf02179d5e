"""Members of zip archives unpacked once for all processes of a user, into a temporary file that is mapped.

Shapes: none here.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import zipfile
from pathlib import Path

SPARE_BYTES = 64 << 20
"""Of room that stays free on the disk of the temporary folder."""
_ONE_AT_A_TIME = threading.Lock()


def unpacked(path: Path, member: str) -> Path:
    """Return a file with the bytes of a member, unpacked by the first process that asks and removed when that one ends.

    The file is known by the archive's path, size and time of change, and lies in a folder of the user's own in the system's
    temporary folder.

    Args:
        path: the archive.
        member: a name in it.

    Raises:
        OSError: unreadable, or no room.
        KeyError, zipfile.BadZipFile, zlib.error: no such member, or damage.
    """
    facts = path.stat()
    about = f"{path.resolve()}\0{member}\0{facts.st_size}\0{facts.st_mtime_ns}"
    name = hashlib.sha256(about.encode(errors="surrogateescape")).hexdigest()[:32]
    folder = _own_folder()
    with _ONE_AT_A_TIME:
        for there in folder.glob(f"{name}.*.npy"):
            if _maker_lives(there):
                return there
        _tidy(folder)
        made = folder / f"{name}.{os.getpid()}.npy"
        _unpack(path, member, made)
        atexit.register(_remove, made, os.getpid())
    return made


def _unpack(path: Path, member: str, made: Path) -> None:
    """Write the file under another name first, so that nobody maps a part of it."""
    with zipfile.ZipFile(path) as archive:
        size = archive.getinfo(member).file_size
        if shutil.disk_usage(made.parent).free < size + SPARE_BYTES:
            raise OSError(
                f"{member!r} unpacks to {size:,} bytes, for which {made.parent} has no room: save it as a .npy, which is read in "
                "place, or let TMPDIR name a folder with room"
            )
        part = made.with_suffix(".part")
        try:
            with archive.open(member) as stream, part.open("wb") as out:
                shutil.copyfileobj(stream, out, 1 << 20)
            part.replace(made)
        finally:
            part.unlink(missing_ok=True)


def _own_folder() -> Path:
    """Return the user's folder for such files; a new one where its usual name belongs to somebody else."""
    user = _user()
    folder = _usual_folder(user)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    facts = folder.lstat()
    ours = stat.S_ISDIR(facts.st_mode) and (os.name == "nt" or (facts.st_uid == user and not facts.st_mode & 0o077))
    return folder if ours else Path(tempfile.mkdtemp(prefix="gmem-unpacked-"))


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _usual_folder(user: int) -> Path:
    return Path(tempfile.gettempdir()) / f"gmem-unpacked-{user}"


def _maker_lives(made: Path) -> bool:
    """Say whether the process whose number is in a file's name is running."""
    number = made.name.split(".")[1]
    if not number.isdecimal():
        return False
    if os.name == "nt":  # signal 0 would end it there
        return True
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _tidy(folder: Path) -> None:
    """Remove what killed processes left; whoever has such a file mapped keeps it."""
    for made in folder.iterdir():
        if made.suffix in (".npy", ".part") and made.name.count(".") == 2 and not _maker_lives(made):
            with contextlib.suppress(OSError):
                made.unlink()


def _remove(made: Path, maker: int) -> None:
    if os.getpid() == maker:  # and not a fork of it
        with contextlib.suppress(OSError):
            made.unlink()
        if made.parent != _usual_folder(_user()):
            with contextlib.suppress(OSError):
                made.parent.rmdir()
