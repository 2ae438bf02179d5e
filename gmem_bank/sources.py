"""Sources: which images there are, in one order, and where the image of a row lies."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gmem_bank.decoding import EXTENSIONS, read_bytes, read_span
from gmem_bank.errors import SourceError
from gmem_bank.interface import ImagesFrom
from gmem_bank.naming import FLIP_SUFFIX, concept_name_problem, key_problem
from gmem_bank.provenance import IMAGE_KINDS, Source, relative_to_bank, sha256_of

BANK_FOLDER = ".gmem"
"""A folder of this suffix is a bank and no source of images."""
RUN_MARKER = ".gmem-run"
"""A folder with this file in it is a training run of ours and no source of images."""


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """A file that gave no row, and why."""

    path: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """Return {"path": …, "reason": …}."""
        return {"path": self.path, "reason": self.reason}


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image of a source."""

    key: str
    path: Path
    size: int
    """Bytes."""
    modified: int
    """Nanoseconds; tells a resumed build that a file was replaced, and never enters a bank."""
    flipped: bool = False
    """True: the twin whose picture is mirrored left to right."""
    offset: int = -1
    """Of a member of a tar file: where its bytes begin; -1: the path is the image's own file."""

    def read(self) -> bytes:
        """Return the image's bytes; raises SourceError."""
        return read_bytes(self.path) if self.offset < 0 else read_span(self.path, self.offset, self.size)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a source in their one order, and what else lay there."""

    root: Path
    prefix: str
    items: tuple[Item, ...]
    ignored: tuple[Skipped, ...]
    kind: str = "folder"
    """Of the provenance record: "folder", "list" or "tar"."""

    def to_source(self, bank_folder: Path, digest: str) -> Source:
        """Return the provenance record of the source, with its content digest, for a bank in that folder."""
        return Source(
            kind=self.kind,
            path=relative_to_bank(self.root, bank_folder),
            prefix=self.prefix,
            digest=digest,
            num_images=len(self.items),
        )

    def content_digest(self) -> str:
        """Return the digest that encoding these files as they are now would record; reads every file."""
        return digest_of((item.key, content_hash(item)) for item in self.items)


def with_flips(listing: Listing) -> Listing:
    """Return the listing with a mirrored twin after each image, its key ending in "#flip"."""
    twins = (replace(item, key=item.key + FLIP_SUFFIX, flipped=True) for item in listing.items)
    pairs = (item for pair in zip(listing.items, twins, strict=True) for item in pair)
    return replace(listing, items=tuple(pairs))


def content_hash(item: Item) -> str:
    """Return the sha256 of an image file's bytes, "" where it is empty or cannot be read."""
    try:
        data = item.read()
    except SourceError:
        return ""
    return hashlib.sha256(data).hexdigest() if data else ""


def digest_of(contents: Iterable[tuple[str, str]]) -> str:
    """Return the digest of a source from (key, sha256 of the file) in order."""
    return sha256_of([list(pair) for pair in contents])


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


def list_folder(root: str | os.PathLike[str], *, prefix: str = "", exclude: Sequence[Path] = ()) -> Listing:
    """List the images below a folder, sorted by path, hidden and run folders left out.

    Args:
        root: folder; links to files are followed, links to folders are not.
        prefix: put before each path to make its key.
        exclude: files to pass over without a word (our own outputs).

    Raises:
        SourceError: no such folder, not a folder, or no image in it.
    """
    folder = require_folder(root)
    ours = {path.resolve() for path in exclude}
    names = {path.name for path in exclude}
    items: list[Item] = []
    ignored: list[Skipped] = []
    for path in _walk(folder, ignored):
        if path.name in names and path.parent.resolve() / path.name in ours:
            continue
        found = _item(path, prefix + path.relative_to(folder).as_posix())
        if isinstance(found, Item):
            items.append(found)
        else:
            ignored.append(Skipped(path=printable_path(path.relative_to(folder).as_posix()), reason=found))
    if not items:
        raise SourceError(_no_images(folder, ignored), path=folder)
    items.sort(key=lambda item: item.key.encode())
    return Listing(root=folder, prefix=prefix, items=tuple(items), ignored=tuple(ignored))


def list_file(path: str | os.PathLike[str], *, prefix: str = "") -> Listing:
    """List the images that a text file names, one a line, relative to its folder; keys are the lines, in their order.

    Raises:
        SourceError: no such file, no usable image in it, or a line that occurs twice.
    """
    where = require_path(path)
    try:
        lines = [line.strip() for line in where.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"could not read {where}: {error}", path=where) from error
    found = [(line, _item(where.parent / line, prefix + line)) for line in lines]
    items = [item for _, item in found if isinstance(item, Item)]
    ignored = tuple(Skipped(path=printable_path(line), reason=item) for line, item in found if isinstance(item, str))
    twice = {item.key for item in items}
    if len(twice) != len(items):
        raise SourceError(f"{where} names an image twice", path=where)
    if not items:
        raise SourceError(_no_images(where, ignored), path=where)
    return Listing(root=where.parent, prefix=prefix, items=tuple(items), ignored=ignored, kind="list")


def list_images(path: str | os.PathLike[str], *, prefix: str = "") -> Listing:
    """List a folder of images, or a single image file as a listing of one; raises SourceError."""
    where = require_path(path)
    if not where.is_file():
        return list_folder(where, prefix=prefix)
    item = _item(where, prefix + where.name)
    if not isinstance(item, Item):
        raise SourceError(f"{where}: {item}", path=where)
    return Listing(root=where.parent, prefix=prefix, items=(item,), ignored=())


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
    if source.kind not in IMAGE_KINDS or (source.kind == "tar" and images is None):
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


def _walk(folder: Path, ignored: list[Skipped]) -> list[Path]:
    """Return the files below a folder, links to folders followed, hidden and run folders left out."""
    found: list[Path] = []

    def complain(error: OSError) -> None:
        ignored.append(Skipped(path=printable_path(str(error.filename)), reason=f"unreadable folder: {error.strerror}"))

    for where, folders, files in os.walk(folder, onerror=complain, followlinks=True):
        here = Path(where)
        if RUN_MARKER in files and here != folder:
            ignored.append(
                Skipped(path=printable_path(here.relative_to(folder).as_posix()), reason="a training run of gmem-gen")
            )
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not name.endswith(BANK_FOLDER))
        for name in [name for name in folders if _is_cycle(here / name)]:
            folders.remove(name)
            path = printable_path((here / name).relative_to(folder).as_posix())
            ignored.append(Skipped(path=path, reason="a link to a folder that it lies in"))
        found.extend(here / name for name in files if not name.startswith("."))
    return sorted(found)


def _is_cycle(path: Path) -> bool:
    if not path.is_symlink():
        return False
    target = os.path.realpath(path)
    return Path(os.path.realpath(path.parent)).is_relative_to(target)


def _item(path: Path, key: str) -> Item | str:
    """Return the item of a file, or why it is none."""
    if path.suffix.lower() not in EXTENSIONS:
        return "not an image by its extension"
    problem = key_problem(key)
    if problem:
        return f"its path {problem}"
    if class_folder_problem(key):
        return class_folder_problem(key)
    try:
        facts = path.stat()
    except OSError as error:
        return f"a link to nothing, or gone: {error.strerror}"
    if not stat.S_ISREG(facts.st_mode):
        return "not a regular file"
    return Item(key=key, path=path, size=facts.st_size, modified=facts.st_mtime_ns)


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
