"""Sources: which images there are, in one order, and where the image of a row lies."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from gmem_bank.decoding import EXTENSIONS
from gmem_bank.errors import SourceError
from gmem_bank.interface import ImagesFrom
from gmem_bank.key_places import KeyPlaces
from gmem_bank.listing import Items, Listing, Skipped
from gmem_bank.naming import FLIP_SUFFIX, concept_name_problem, image_key_problem, key_problem
from gmem_bank.provenance import IMAGE_KINDS, IN_ONE_FILE, Source, literal_parent

BANK_FOLDER = ".gmem"
"""A folder of this suffix is a bank and no source of images."""
_NOT_DECODED = {
    "HEIC": (".heic", ".heif", ".hif"), "JPEG XL": (".jxl",), "SVG": (".svg",), "Photoshop": (".psd",), "OpenEXR": (".exr",),
    "camera raw": (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf"), "an icon": (".ico", ".icns"),
}  # fmt: skip
UNREADABLE = {
    suffix: f"{name} is not decoded here: convert it to JPEG or PNG"
    for name, all_of in _NOT_DECODED.items()
    for suffix in all_of
}
"""Pictures by their extension that no permitted format of Pillow reads."""
RUN_MARKER = ".gmem-run"
"""A folder with this file in it is a training run of ours and no source of images."""


def require_path(path: str | os.PathLike[str]) -> Path:
    """Return the path; raises SourceError where nothing is there."""
    where = Path(path)
    if not where.exists():
        raise SourceError(f"no such file or folder: {where}", path=where)
    return where


def require_folder(path: str | os.PathLike[str]) -> Path:
    """Return the path; raises SourceError where it is not a folder."""
    folder = require_path(path)
    if not folder.is_dir():
        raise SourceError(f"{folder} is not a folder: give the folder that holds the images", path=folder)
    return folder


def matching_files(pattern: str | os.PathLike[str]) -> list[Path]:
    """Return the file of a path, or the files that a glob pattern matches, sorted; raises SourceError where there is none."""
    path = Path(pattern)
    if path.is_file():
        return [path]
    parent, below = literal_parent(path)  # a folder that is there is no pattern, whatever brackets its name has
    found = sorted(glob.glob(os.fspath(below), root_dir=parent, recursive=True))  # noqa: PTH207
    if not found:
        raise SourceError(f"no file at {path}", path=path)
    return [parent / name for name in found]


def list_folder(root: str | os.PathLike[str], *, prefix: str = "", exclude: Sequence[Path] = ()) -> Listing:
    """List the images below a folder, sorted by path, hidden and run folders left out.

    Args:
        root: folder; links to files and to folders are followed, except back to a folder on the way, which is listed as ignored.
        prefix: put before each path to make its key.
        exclude: files to pass over without a word (our own outputs).

    Raises:
        SourceError: no such folder, not a folder, or no image in it.
    """
    folder = require_folder(root)
    ours = {path.resolve() for path in exclude}
    names = {path.name for path in exclude}
    items = Items(folder, prefix)
    ignored: list[Skipped] = []
    for path, inside in _walk(folder, ignored):
        if path.name in names and path.parent.resolve() / path.name in ours:
            continue
        found = _facts(path, prefix + inside)
        if isinstance(found, os.stat_result):
            items.append(prefix + inside, found.st_size, found.st_mtime_ns)
        else:
            ignored.append(Skipped(path=printable_path(inside), reason=found))
    ignored.sort(key=lambda entry: entry.path)
    if not items:
        raise SourceError(_no_images(folder, ignored), path=folder)
    return Listing(root=folder, items=items.sorted_by_key(), ignored=tuple(ignored))


def list_file(path: str | os.PathLike[str], *, prefix: str = "") -> Listing:
    """List the images that a text file names, one a line, in their order; keys are their paths in the file's folder.

    There are no comments: a line that begins with "#" is a file's name like any other. Blank lines are passed over.

    Raises:
        SourceError: no such file, no usable image in it, or a line that occurs twice.
    """
    where = require_path(path)
    try:
        lines = [line.strip() for line in where.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        lines = [_inside(line, where.parent) for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"could not read {where}: {error}", path=where) from error
    items, ignored = Items(where.parent, prefix), []
    for line in lines:
        found = _facts(where.parent / line, prefix + line)
        if isinstance(found, os.stat_result):
            items.append(prefix + line, found.st_size, found.st_mtime_ns)
        else:
            ignored.append(Skipped(path=printable_path(line), reason=found))
    twice = KeyPlaces(items).repeated()
    if twice:
        raise SourceError(f"{where} names an image twice, {items.key(twice[1])!r}: remove one line", path=where)
    if not items:
        raise SourceError(_no_images(where, ignored), path=where)
    return Listing(root=where.parent, items=items, ignored=tuple(ignored), kind="list")


def _inside(line: str, folder: Path) -> str:
    """Return a line of a list relative to the list's folder, where it names something in it by its whole path."""
    base = folder.resolve().as_posix() + "/"
    return line.removeprefix("./").removeprefix(base)


def list_images(path: str | os.PathLike[str], *, prefix: str = "") -> Listing:
    """List a folder of images, or a single image file as a listing of one; raises SourceError."""
    where = require_path(path)
    if not where.is_file():
        return list_folder(where, prefix=prefix)
    found = _facts(where, prefix + where.name)
    if not isinstance(found, os.stat_result):
        raise SourceError(f"{where}: {found}", path=where)
    items = Items(where.parent, prefix)
    items.append(prefix + where.name, found.st_size, found.st_mtime_ns)
    return Listing(root=where.parent, items=items, ignored=())


def image_path(key: str, source: Source, bank_folder: Path, images: ImagesFrom) -> Path:
    """Return where the image of a row should lie.

    Args:
        key: the row's key.
        source: the row's source.
        bank_folder: what the source's path is relative to.
        images: folders that hold images under their keys, or under their paths inside the folder that they were inserted
            from; the first that has the file is taken. An inserted row falls back on that folder itself.

    Raises:
        SourceError: the row was computed from other rows.
    """
    folder = source.folder(bank_folder)
    if folder is None:
        raise SourceError(f"row {key!r} was computed from other rows: it has no image", key=key)
    if source.kind not in IMAGE_KINDS or (source.kind in IN_ONE_FILE and images is None):
        raise SourceError(
            f"row {key!r} came from a source of kind {source.kind!r}, which this gmem cannot read", key=key
        )
    if key_problem(key):
        raise SourceError(f"the key {key!r} {key_problem(key)}: no image is read for it", key=key)
    key = key.removesuffix(FLIP_SUFFIX)
    inside = key.removeprefix(source.prefix)
    recorded = folder / inside
    if images is None:
        return recorded
    given = [images] if isinstance(images, (str, os.PathLike)) else images
    candidates = [Path(root) / name for root in given for name in dict.fromkeys((key, inside))]
    if source.prefix:
        candidates.append(recorded)
    return next((path for path in candidates if path.is_file()), candidates[0] if candidates else recorded)


def _walk(folder: Path, ignored: list[Skipped]) -> Iterator[tuple[Path, str]]:
    """Yield the files below a folder and their paths in it, links to folders followed, hidden and run folders left out."""

    def complain(error: OSError) -> None:
        ignored.append(Skipped(path=printable_path(str(error.filename)), reason=f"unreadable folder: {error.strerror}"))

    above = {str(folder): _identities(folder)}
    """Of every folder still to be walked: it and all that it lies in, by links and by itself."""
    for where, folders, files in os.walk(folder, onerror=complain, followlinks=True):
        here, way = Path(where), above.pop(where)
        inside = "" if here == folder else here.relative_to(folder).as_posix() + "/"
        if RUN_MARKER in files and here != folder:
            ignored.append(Skipped(path=printable_path(inside[:-1]), reason="a training run of gmem-gen"))
            folders.clear()
            continue
        wanted = sorted(name for name in folders if not name.startswith(".") and not name.endswith(BANK_FOLDER))
        folders.clear()
        for name in wanted:
            linked = (here / name).is_symlink()
            found = _identities(here / name) if linked else _identity(here / name)
            if linked and _identity(here / name) & way:
                reason = "a link to a folder that it lies in"
                ignored.append(Skipped(path=printable_path(inside + name), reason=reason))
            else:
                folders.append(name)
                above[os.path.join(where, name)] = way | found  # noqa: PTH118 - as os.walk joins them
        yield from ((here / name, inside + name) for name in sorted(files) if not name.startswith("."))


def _identity(folder: Path) -> frozenset[tuple[int, int]]:
    """Return what is the same for a folder by whatever path it is reached; empty where it is gone or may not be seen."""
    try:
        facts = folder.stat()
    except OSError:
        return frozenset()
    return frozenset({(facts.st_dev, facts.st_ino)})


def _identities(folder: Path) -> frozenset[tuple[int, int]]:
    """Return the identities of a folder and of all that it really lies in."""
    real = Path(os.path.realpath(folder))
    return frozenset().union(*map(_identity, (real, *real.parents)))


def _facts(path: Path, key: str) -> os.stat_result | str:
    """Return size and time of an image file, or why it is none."""
    suffix = Path(path.name.removesuffix(FLIP_SUFFIX)).suffix.lower()
    if suffix not in EXTENSIONS:
        return UNREADABLE.get(suffix, "not an image by its extension")
    problem = image_key_problem(key)
    if problem:
        return f"its path {problem}"
    if class_folder_problem(key):
        return class_folder_problem(key)
    try:
        facts = path.stat()
    except OSError as error:
        return f"a link to nothing, or gone: {error.strerror}"
    return facts if stat.S_ISREG(facts.st_mode) else "not a regular file"


def class_folder_problem(key: str) -> str:
    """Return why the first folder of a key cannot name a concept, or ""."""
    first, slash, _ = key.partition("/")
    problem = concept_name_problem(first) if slash else ""
    return f"its class folder cannot name a concept: the name {problem}" if problem else ""


def printable_path(text: str) -> str:
    """Return a path as text that can be written, whatever bytes it has."""
    return text.encode("utf-8", "backslashreplace").decode()


def _no_images(folder: Path, ignored: Sequence[Skipped]) -> str:
    seen = f" ({len(ignored)} other files, such as {ignored[0].path!r})" if ignored else " (the folder is empty)"
    return f"no images in {folder}{seen}: give a folder with files such as .jpg, .png or .webp"
