"""Images in tar files (webdataset shards), read in place: nothing of an archive ever touches the disk.

Shapes: none here.
"""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from gmem_bank.decoding import EXTENSIONS, MAX_FILE_BYTES
from gmem_bank.errors import SourceError
from gmem_bank.naming import key_problem
from gmem_bank.sources import (
    Item,
    Listing,
    Skipped,
    class_folder_problem,
    list_file,
    list_folder,
    list_images,
    printable_path,
    require_path,
)

SUFFIX = ".tar"
LISTS = (".txt", ".lst")
COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")


def is_tar_source(source: str) -> bool:
    """Say whether a source names tar files: one, or several by a glob pattern ("shards/*.tar")."""
    return source.lower().endswith((SUFFIX, *COMPRESSED)) and not Path(source).is_dir()


def tar_paths(pattern: str | Path) -> list[Path]:
    """Return the tar files of a path or glob pattern, sorted; raises SourceError where there is none, or it is compressed."""
    text = str(pattern)
    found = [Path(text)] if Path(text).is_file() else [Path(path) for path in sorted(glob.glob(text))]  # noqa: PTH207
    if not found:
        raise SourceError(f"no tar file at {text}", path=text)
    packed = [path for path in found if path.suffix.lower() in COMPRESSED]
    if packed:
        raise SourceError(
            f"{packed[0]} is compressed, so that images in it cannot be read in place: unpack it to a .tar"
        )
    return found


def list_tars(pattern: str | Path, *, prefix: str = "") -> Listing:
    """List the images in tar files, by file and then by their place in it.

    Members that are no images, links, devices, and paths that lead out of the archive are passed over with the reason.

    Args:
        pattern: a path, or a glob pattern.
        prefix: put before each member's path to make its key.

    Raises:
        SourceError: no such file, not a tar, no image in it, or two images with one key.
    """
    items: dict[str, Item] = {}
    ignored: list[Skipped] = []
    for path in tar_paths(pattern):
        for found in _members(path, prefix):
            if isinstance(found, Skipped):
                ignored.append(found)
            elif found.key in items:
                raise SourceError(
                    f"{path} and {items[found.key].path} both have an image {found.key!r}: keys must differ within a bank",
                    path=path, key=found.key,
                )  # fmt: skip
            else:
                items[found.key] = found
    if not items:
        raise SourceError(f"no images in {pattern} ({len(ignored)} other members)", path=str(pattern))
    return Listing(root=Path(pattern), prefix=prefix, items=tuple(items.values()), ignored=tuple(ignored), kind="tar")


def require_source(source: str) -> None:
    """Raise SourceError where there is nothing at a source, before minutes go into loading an encoder."""
    if is_tar_source(source):
        tar_paths(source)
    else:
        require_path(source)


def list_source(source: str | Path, *, prefix: str = "", exclude: Sequence[Path] = ()) -> Listing:
    """List whatever a source is: a folder, an image, a text file that names images (.txt, .lst), tar files.

    Args:
        source: a path, or a glob pattern of tar files.
        prefix: put before each path to make its key.
        exclude: files in a folder to pass over without a word.

    Raises:
        SourceError: nothing there, or no image in it.
    """
    path = Path(source)
    if is_tar_source(str(source)):
        return list_tars(source, prefix=prefix)
    if path.is_dir() or not path.exists():
        return list_folder(path, prefix=prefix, exclude=exclude)
    return list_file(path, prefix=prefix) if path.suffix.lower() in LISTS else list_images(path, prefix=prefix)


def _members(path: Path, prefix: str) -> list[Item | Skipped]:
    try:
        facts = path.stat()
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if not member.isdir()]
    except (OSError, tarfile.TarError, ValueError, EOFError) as error:
        raise SourceError(f"{path} is not a readable tar file: {error}", path=path) from error
    return [_member(path, member, prefix, facts.st_size, facts.st_mtime_ns) for member in members]


def _member(path: Path, member: tarfile.TarInfo, prefix: str, file_size: int, modified: int) -> Item | Skipped:
    name = member.name.removeprefix("./")
    key = prefix + name
    reason = ""
    if not member.isreg():
        reason = "a link or device in a tar file: never followed"
    elif Path(name).suffix.lower() not in EXTENSIONS:
        reason = "not an image by its extension"
    elif key_problem(key) or class_folder_problem(key):
        reason = f"its path {key_problem(key)}" if key_problem(key) else class_folder_problem(key)
    elif member.offset_data + member.size > file_size:
        reason = "it lies beyond the end of the tar file, which was cut short"
    elif member.size > MAX_FILE_BYTES:
        reason = f"more than {MAX_FILE_BYTES >> 20} MiB for one image"
    if reason:
        return Skipped(path=f"{path.name}:{printable_path(name)}", reason=reason)
    return Item(key=key, path=path, size=member.size, modified=modified, offset=member.offset_data)


def member_of(pattern: Path, prefix: str, key: str) -> Item | None:
    """Return the item of a key in tar files, or None where it is not there; the archives are read through once."""
    stamps = tuple((str(path), path.stat().st_mtime_ns) for path in tar_paths(pattern))
    return _index(stamps, prefix).get(key)


@lru_cache(maxsize=16)
def _index(stamps: tuple[tuple[str, int], ...], prefix: str) -> dict[str, Item]:
    found = (item for path, _ in stamps for item in _members(Path(path), prefix))
    return {item.key: item for item in found if isinstance(item, Item)}
