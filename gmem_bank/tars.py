"""Images in tar files (webdataset shards), read in place: nothing of an archive ever touches the disk.

Shapes: none here.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

from gmem_bank.decoding import EXTENSIONS, MAX_FILE_BYTES
from gmem_bank.errors import SourceError
from gmem_bank.key_places import KeyPlaces
from gmem_bank.listing import Items, Listing, Skipped
from gmem_bank.naming import FLIP_SUFFIX, image_key_problem
from gmem_bank.sources import UNREADABLE, class_folder_problem, matching_files, printable_path

SUFFIX = ".tar"
COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")


def is_tar_source(source: str) -> bool:
    """Say whether a source names tar files: one, or several by a glob pattern ("shards/*.tar")."""
    return source.lower().endswith((SUFFIX, *COMPRESSED)) and not Path(source).is_dir()


def tar_paths(pattern: str | Path) -> list[Path]:
    """Return the tar files of a path or glob pattern, sorted; raises SourceError where there is none, or it is compressed."""
    found = matching_files(pattern)
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
    items, ignored = Items(Path(pattern), prefix, inside="tar"), []
    for path in tar_paths(pattern):
        modified = path.stat().st_mtime_ns
        for key, offset, size, reason in _members(path, prefix):
            if reason:
                name = key.removeprefix(prefix)
                ignored.append(Skipped(path=f"{path.name}:{printable_path(name)}", reason=reason))
                continue
            items.append(key, size, modified, path=path, place=offset)
    if not items:
        raise SourceError(f"no images in {pattern} ({len(ignored)} other members)", path=str(pattern))
    twice = KeyPlaces(items).repeated()
    if twice:
        first, second = (items[place] for place in twice)
        raise SourceError(
            f"the image {second.key!r} is twice in the source, in {first.path} and in {second.path}: keys must differ within a "
            "bank, so rename or remove one",
            path=second.path,
            key=second.key,
        )
    return Listing(root=Path(pattern), items=items, ignored=tuple(ignored), kind="tar")


def _members(path: Path, prefix: str) -> Iterator[tuple[str, int, int, str]]:
    """Yield (key, offset, size, why it is no image or "") of the members of a tar file, folders left out."""
    try:
        file_size = path.stat().st_size
        with path.open("rb") as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                if member.size < 0 or archive.offset < member.offset_data:  # it would be read in circles
                    raise ValueError(f"{printable_path(member.name)!r} has a size of {member.size} bytes")
                archive.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                if not member.isdir():
                    name = member.name.removeprefix("./")
                    yield (
                        prefix + name,
                        member.offset_data,
                        member.size,
                        _problem(member, name, prefix + name, file_size),
                    )
            stream.seek(archive.offset)
            block = stream.read(tarfile.BLOCKSIZE)
            if len(block) == tarfile.BLOCKSIZE and any(block):
                raise ValueError(f"byte {archive.offset} of {file_size} is no header: what follows is lost")
            if len(block) < tarfile.BLOCKSIZE:
                yield prefix, 0, 0, "the archive has no end mark: it may have been cut short"
    except (OSError, tarfile.TarError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise SourceError(
            f"{path} is not a readable tar file: {error or type(error).__name__}. It may have been cut short or forged: fetch or "
            "pack it anew",
            path=path,
        ) from error


def _problem(member: tarfile.TarInfo, name: str, key: str, file_size: int) -> str:
    suffix = Path(name.removesuffix(FLIP_SUFFIX)).suffix.lower()
    if not member.isreg():
        return "a link or device in a tar file: never followed"
    if suffix not in EXTENSIONS:
        return UNREADABLE.get(suffix, "not an image by its extension")
    if image_key_problem(key) or class_folder_problem(key):
        return f"its path {image_key_problem(key)}" if image_key_problem(key) else class_folder_problem(key)
    if member.issparse():
        return "a sparse member of a tar file, whose bytes do not lie together"
    if member.offset_data + member.size > file_size:
        return "it lies beyond the end of the tar file, which was cut short"
    return f"more than {MAX_FILE_BYTES >> 20} MiB for one image" if member.size > MAX_FILE_BYTES else ""
