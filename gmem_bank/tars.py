"""Images in tar files (webdataset shards), read in place: nothing of an archive ever touches the disk.

Shapes: none here.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, cast

from gmem_bank.columns import NONE, Columns, labelled_key
from gmem_bank.decoding import EXTENSIONS, MAX_FILE_BYTES
from gmem_bank.errors import SourceError
from gmem_bank.key_places import KeyPlaces
from gmem_bank.listing import Items, Listing, Skipped
from gmem_bank.naming import FLIP_SUFFIX, concept_name_problem, image_key_problem
from gmem_bank.sources import UNREADABLE, class_folder_problem, matching_files, printable_path

SUFFIX = ".tar"
COMPRESSED = (".tgz", ".gz", ".bz2", ".xz", ".zst")
LABEL = "cls"
"""Members of this extension hold the class of the image of the same name, as webdataset writes them."""
SIDECARS = (f".{LABEL}", ".json", ".txt", ".caption", ".xml", ".npy", ".npz", ".id", ".index", ".url")
"""Extensions of what stands beside images in webdataset shards and is no image: counted, not listed one by one."""
LARGEST_LABEL = 1024
"""Bytes of a class."""
EXTENDING = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
"""Members that say something of the next one, such as its long name."""
LARGEST_HEADER = 1 << 20
"""Bytes of all that is said of one member: a long name, attributes, which parts of it are holes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Member:
    """A member of a tar file that is no folder, or, without a name, what is wrong with the file itself."""

    name: str
    offset: int = 0
    size: int = 0
    problem: str = ""
    """Why it is no image, "" where it may be one."""
    label: str | None = None
    """What a member that holds a class says."""

    @property
    def sample(self) -> str:
        """Its path up to the first dot of its name: the same for an image and what belongs to it."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def is_sidecar(self) -> bool:
        """Whether its extension is of what belongs to an image."""
        return self.name.lower().endswith(SIDECARS)


class _Headers:
    """A tar file as far as it speaks of its members: `tarfile` takes into memory whatever length a header announces."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell
        self.next_member()

    def next_member(self) -> None:
        """Begin anew to count."""
        self._left = LARGEST_HEADER

    def read(self, size: int) -> bytes:
        """Return bytes; raises tarfile.ReadError where one member has more than LARGEST_HEADER of them before its data."""
        self._left -= size
        if self._left < 0:
            raise tarfile.ReadError(f"more than {LARGEST_HEADER:,} bytes are said of one member")
        return self._stream.read(size)


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


def list_tars(pattern: str | Path, *, prefix: str = "", columns: Columns | None = None) -> Listing:
    """List the images in tar files, by file and then by their place in it.

    Members that are no images, links, devices, and paths that lead out of the archive are passed over with the reason. Of a file
    that was cut short the images before the cut are taken, and the cut is said first. An image in no folder whose class stands
    beside it ("0001.jpg", "0001.cls") gets the key "<class>/0001.jpg".

    Args:
        pattern: a path, or a glob pattern.
        prefix: put before each member's path to make its key.
        columns: label "none" leaves those classes out; nothing else can be asked for.

    Raises:
        SourceError: no such file, not a tar, no image in it, or two images with one key.
    """
    asked = columns or Columns()
    if asked.image or asked.key or asked.label not in (None, NONE, LABEL):
        raise SourceError(
            f"{pattern}: all that tar files have are classes in .{LABEL} members: --label-column {LABEL} or {NONE}"
        )
    items, ignored, beside = Items(Path(pattern), prefix, inside="tar"), list[Skipped](), Counter[str]()
    labelled = False
    for path in tar_paths(pattern):
        modified = path.stat().st_mtime_ns
        for _, group in groupby(_members(path), key=lambda member: member.sample):
            members = list(group)
            label = _label(path, members, ignored) if asked.label != NONE else ""
            labelled = labelled or bool(label)
            _append(items, ignored, beside, path, modified, members, label)
    ignored.sort(key=lambda entry: not entry.loud)
    if not items:
        first = f", first {ignored[0].path}: {ignored[0].reason}" if ignored else ""
        raise SourceError(f"no images in {pattern} ({len(ignored)} other members{first})", path=str(pattern))
    _require_unique(items)
    if beside:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(beside.items()))
        classes = f"; .{LABEL} name classes" * labelled
        ignored.append(Skipped(path=str(pattern), reason=f"members that stand beside images: {counts}{classes}"))
    record = {"label": LABEL} if labelled else {}
    return Listing(root=Path(pattern), items=items, ignored=tuple(ignored), kind="tar", columns=record)


def _label(path: Path, members: Sequence[_Member], ignored: list[Skipped]) -> str:
    """Return the class that stands beside the image of a sample, "" for none; one that cannot be used is listed."""
    for member in members:
        if member.label is None or "/" in member.name:
            continue
        text = member.label.strip()
        problem = (
            concept_name_problem(text) if text not in ("", "-1") else ""
        )  # data sets mark with -1 what has no class
        if problem:
            reason = f"the class {text[:60]!r} cannot name a concept: it {problem}"
            ignored.append(Skipped(path=f"{path.name}:{printable_path(member.name)}", reason=reason))
        return "" if problem or text == "-1" else text
    return ""


def _append(
    items: Items, ignored: list[Skipped], beside: Counter[str], path: Path, modified: int, members: Sequence[_Member],
    label: str,
) -> None:  # fmt: skip
    """Add the members of one sample: its images, what stands beside them, and what cannot be used."""
    has_image = any(not member.problem for member in members)
    for member in members:
        if member.problem and member.is_sidecar and has_image:
            beside[Path(member.name).suffix.lower()] += 1
            continue
        key = items.prefix + labelled_key([label], 0, member.name)
        problem = member.problem or _key_problem(key)
        if problem:
            where = f"{path.name}:{printable_path(member.name)}" if member.name else path.name
            ignored.append(Skipped(path=where, reason=problem, loud=not member.name))
        else:
            items.append(key, member.size, modified, path=path, place=member.offset)


def _key_problem(key: str) -> str:
    return f"its path {image_key_problem(key)}" if image_key_problem(key) else class_folder_problem(key)


def _require_unique(items: Items) -> None:
    twice = KeyPlaces(items).repeated()
    if twice:
        first, second = (items[place] for place in twice)
        where = f"{first.path} itself" if first.path == second.path else f"{first.path} and in {second.path}"
        raise SourceError(
            f"the image {second.key!r} is twice in the source, in {where}: keys must differ within a bank, so rename or remove "
            "one",
            path=second.path,
            key=second.key,
        )


def _members(path: Path) -> Iterator[_Member]:
    """Yield the members of a tar file, folders left out, and at its end what is wrong with it; raises SourceError."""
    archive = None
    try:
        file_size = path.stat().st_size
        with path.open("rb") as stream:
            try:
                headers = _Headers(stream)
                with tarfile.open(fileobj=cast("BinaryIO", headers), mode="r:") as archive:
                    yield from _listed(archive, headers, stream, file_size)
            except (
                tarfile.TarError,
                MemoryError,
                OverflowError,
                RecursionError,
            ):  # the last where header follows header
                if archive is None:
                    raise ValueError(_cut(stream, 0, file_size)) from None
                yield _end(_cut(stream, archive.offset, file_size))
    except (OSError, tarfile.TarError, ValueError, EOFError, MemoryError, OverflowError) as error:
        raise SourceError(
            f"{path} is not a readable tar file: {error or type(error).__name__}. Fetch it or pack it anew", path=path
        ) from error


def _listed(archive: tarfile.TarFile, headers: _Headers, stream: BinaryIO, file_size: int) -> Iterator[_Member]:
    while (member := archive.next()) is not None:
        headers.next_member()
        if member.size < 0 or archive.offset < member.offset_data:  # it would be read in circles
            raise ValueError(f"{printable_path(member.name)!r} has a size of {member.size} bytes")
        archive.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
        if member.isdir():
            continue
        name = member.name.removeprefix("./")
        if member.isreg() and member.offset_data + member.size > file_size:
            claims = f"{printable_path(name)!r} at byte {member.offset_data:,} has {member.size:,} bytes by its header"
            yield _end(_ends_before(claims, file_size))
            return
        problem = _problem(member, name)
        label = None
        if problem and member.isreg() and name.endswith(f".{LABEL}") and member.size <= LARGEST_LABEL:
            stream.seek(member.offset_data)
            label = stream.read(member.size).decode(errors="replace")
        yield _Member(name=name, offset=member.offset_data, size=member.size, problem=problem, label=label)
    stream.seek(archive.offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if len(block) == tarfile.BLOCKSIZE and any(block):
        raise ValueError(_no_header(archive.offset, file_size, "damaged"))
    if len(block) < tarfile.BLOCKSIZE:
        yield _end(_ends_before("no end mark follows the last member", file_size))


def _end(problem: str) -> _Member:
    return _Member(name="", problem=f"{problem}. Only the images before that are taken: fetch or pack the file anew")


def _ends_before(claims: str, file_size: int) -> str:
    return f"{claims}, and the file ends at {file_size:,}: it was cut short or damaged"


def _cut(stream: BinaryIO, offset: int, file_size: int) -> str:
    """Return why no member could be read at an offset, where the file was cut there; raises ValueError for other damage."""
    while offset + tarfile.BLOCKSIZE <= file_size:
        stream.seek(offset)
        try:
            header = tarfile.TarInfo.frombuf(stream.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise ValueError(_no_header(offset, file_size, error)) from error
        end = offset + tarfile.BLOCKSIZE + header.size
        if end > file_size:
            return _ends_before(f"a header at byte {offset:,} announces {header.size:,} bytes", file_size)
        if header.type not in EXTENDING or header.size < 0:
            raise ValueError(_no_header(offset, file_size, "damaged"))
        if header.size > LARGEST_HEADER:
            reason = f"it announces {header.size:,} bytes of attributes or a name, at most {LARGEST_HEADER:,} are read"
            raise ValueError(_no_header(offset, file_size, reason))
        offset = offset + tarfile.BLOCKSIZE + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return _ends_before(f"a header is expected at byte {offset:,}", file_size)


def _no_header(offset: int, file_size: int, reason: object) -> str:
    return f"what should be a header at byte {offset:,} of {file_size:,} is none ({reason})"


def _problem(member: tarfile.TarInfo, name: str) -> str:
    suffix = Path(name.removesuffix(FLIP_SUFFIX)).suffix.lower()
    if not member.isreg():
        return "a link or device in a tar file: never followed"
    if suffix not in EXTENSIONS:
        return UNREADABLE.get(suffix, "not an image by its extension")
    if member.issparse():
        return "a sparse member of a tar file, whose bytes do not lie together"
    return f"more than {MAX_FILE_BYTES >> 20} MiB for one image" if member.size > MAX_FILE_BYTES else ""
