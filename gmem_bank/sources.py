"""Sources: which images there are, in one order, and how a file becomes RGB pixels.

Shapes: H×W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank.errors import GMemError, SourceError
from gmem_bank.provenance import Source, relative_to_bank, sha256_of

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {
    "BMP": (".bmp", ".dib"),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "MPO": (".mpo",),
    "PCX": (".pcx",),
    "PNG": (".png", ".apng"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
    "QOI": (".qoi",),
    "SGI": (".sgi", ".rgb", ".bw"),
    "TGA": (".tga",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "AVIF": (".avif",),
}
"""Pillow formats that may be decoded, and the file extensions that are taken for images."""
EXTENSIONS = frozenset(extension for extensions in FORMATS.values() for extension in extensions)
MAX_PIXELS = 200_000_000
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


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The images of a source in their one order, and what else lay there."""

    root: Path
    prefix: str
    items: tuple[Item, ...]
    ignored: tuple[Skipped, ...]

    @property
    def digest(self) -> str:
        """sha256 over keys and sizes: equal listings, equal digests; times do not matter."""
        return sha256_of([[item.key, item.size] for item in self.items])

    def to_source(self, bank_folder: Path) -> Source:
        """Return the provenance record of the source for a bank in that folder."""
        return Source(
            kind="folder", path=relative_to_bank(self.root, bank_folder), prefix=self.prefix, digest=self.digest,
            num_images=len(self.items),
        )  # fmt: skip


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
    items: list[Item] = []
    ignored: list[Skipped] = []
    for path in _walk(folder, ignored):
        relative = path.relative_to(folder).as_posix()
        if path.resolve() in ours:
            continue
        reason = _why_not(path, prefix + relative)
        if reason:
            ignored.append(Skipped(path=_printable(relative), reason=reason))
        else:
            items.append(Item(key=prefix + relative, path=path, size=path.stat().st_size))
    if not items:
        raise SourceError(_no_images(folder, ignored), path=folder)
    items.sort(key=lambda item: item.key.encode())
    return Listing(root=folder, prefix=prefix, items=tuple(items), ignored=tuple(ignored))


def list_images(path: str | os.PathLike[str], *, prefix: str = "") -> Listing:
    """List a folder of images, or a single image file as a listing of one; raises SourceError."""
    where = require_path(path)
    if not where.is_file():
        return list_folder(where, prefix=prefix)
    reason = _why_not(where, prefix + where.name)
    if reason:
        raise SourceError(f"{where}: {reason}", path=where)
    item = Item(key=prefix + where.name, path=where, size=where.stat().st_size)
    return Listing(root=where.parent, prefix=prefix, items=(item,), ignored=())


def image_path(key: str, source: Source, bank_folder: Path, images: str | os.PathLike[str] | None) -> Path:
    """Return where the image of a row should lie.

    Args:
        key: the row's key.
        source: the row's source.
        bank_folder: what the source's path is relative to.
        images: folder that holds images under their keys; a row inserted from elsewhere falls back on its own folder.

    Raises:
        SourceError: the row was computed from other rows.
    """
    folder = source.folder(bank_folder)
    if folder is None:
        raise SourceError(f"row {key!r} was computed from other rows: it has no image", key=key)
    recorded = folder / key.removeprefix(source.prefix)
    if images is None:
        return recorded
    given = Path(images) / key
    inserted = bool(source.prefix)
    return recorded if inserted and not given.is_file() and recorded.is_file() else given


def _walk(folder: Path, ignored: list[Skipped]) -> list[Path]:
    found: list[Path] = []

    def complain(error: OSError) -> None:
        ignored.append(Skipped(path=_printable(str(error.filename)), reason=f"unreadable folder: {error.strerror}"))

    for where, folders, files in os.walk(folder, onerror=complain):
        if RUN_MARKER in files and Path(where) != folder:
            ignored.append(
                Skipped(path=Path(where).relative_to(folder).as_posix(), reason="a training run of gmem-gen")
            )
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found.extend(Path(where, name) for name in files if not name.startswith("."))
    return sorted(found)


def _why_not(path: Path, key: str) -> str:
    if path.suffix.lower() not in EXTENSIONS:
        return "not an image by its extension"
    if not path.is_file():
        return "not a regular file, or a link to nothing"
    try:
        key_tables.check_key(key)
    except GMemError as error:
        return str(error)
    return ""


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _no_images(folder: Path, ignored: Sequence[Skipped]) -> str:
    seen = f" ({len(ignored)} other files, such as {ignored[0].path!r})" if ignored else " (the folder is empty)"
    return f"no images in {folder}{seen}: give a folder with files such as .jpg, .png or .webp"


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file to RGB as a person would see it.

    EXIF orientation is applied, transparency is laid over white, 16-bit samples are scaled to 8, CMYK, palette and grey
    become RGB; of an animation the first frame is taken.

    Args:
        path: the file.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        (H, W, 3) uint8.

    Raises:
        SourceError: absent, empty, not an image, truncated or too large; the reason is in the message.
    """
    where = Path(path)
    try:
        data = where.read_bytes()
    except OSError as error:
        raise SourceError(f"{where}: {error.strerror or error}", path=where) from error
    try:
        return decode_image(data, max_pixels=max_pixels)
    except SourceError as error:
        raise SourceError(f"{where}: {error}", path=where) from error.__cause__


@cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow can read; its plug-ins have to be loaded before they may be named."""
    from PIL import Image

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode the bytes of an image file; see `read_image`."""
    import warnings

    from PIL import Image

    if not data:
        raise SourceError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities that decode well; failures raise
            with Image.open(BytesIO(data), formats=_formats()) as image:
                if image.width * image.height > max_pixels:
                    raise SourceError(f"{image.width}×{image.height} is more than {max_pixels:,} pixels")
                return np.array(_to_rgb(image), np.uint8)
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"not a readable image ({type(error).__name__}: {error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image, ImageOps

    image.load()
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):
        return Image.fromarray(_to_8_bit(np.asarray(upright), upright.mode)).convert("RGB")
    if upright.has_transparency_data:
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layered).convert("RGB")
    return upright.convert("RGB")


def _to_8_bit(samples: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    """Scale 16-bit (or float 0..1) samples to 8 bits; 32-bit integers are 16-bit ones in Pillow's wider mode."""
    values = samples.astype(np.float64)
    scaled = values * 255.0 if mode == "F" and values.max(initial=0.0) <= 1.0 else values
    if mode != "F":
        scaled = values * (255.0 / 65535.0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
