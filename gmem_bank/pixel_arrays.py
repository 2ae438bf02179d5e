"""Images in arrays of pixels (.npy, .npz), read in place where the file allows it.

Shapes: N images, H×W pixels, C channels (1, 3 or 4).
"""

from __future__ import annotations

import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.arrays import why_unreadable
from gmem_bank.columns import Classes, Columns, class_names, labelled_key, numbered
from gmem_bank.errors import SourceError
from gmem_bank.listing import Items, Listing
from gmem_bank.unpacking import unpacked

SUFFIXES = (".npy", ".npz")
IMAGE_NAMES = ("images", "image", "x", "data", "arr_0", "x_train", "pixels")
LABEL_NAMES = ("labels", "label", "y", "y_train", "targets")
LARGEST_UNPACKED = 4 << 30
"""Bytes: a compressed array has to be unpacked, once, into a temporary file that every process maps."""
LARGEST_LABELS = 256 << 20
"""Bytes: labels are read into memory."""
DEFAULT_ARRAY = "array"


def list_pixels(path: Path, *, prefix: str = "", columns: Columns | None = None) -> Listing:
    """List the images of an array file.

    Args:
        path: a .npy of shape (N, H, W) or (N, H, W, C) uint8, or a .npz with one; labels (N,) in a .npz name classes.
        prefix: put before each key, which is "<stem>/<number>", or "<class>/<stem>-<number>" where there are labels.
        columns: which arrays to take; None: by their names, see IMAGE_NAMES and LABEL_NAMES.

    Raises:
        SourceError: unreadable, no array of images, or labels that do not fit.
    """
    asked = columns or Columns()
    asked.refuse_key(path)
    names = _array_names(path)
    image = _chosen(path, asked.image, IMAGE_NAMES, names)
    images = open_pixels(path, image)
    label = asked.label_among([name for name in LABEL_NAMES if name in names], names, path) if names else None
    classes = None if label is None else _classes(path, label, len(images))
    facts = path.stat()
    items = Items(path, prefix, inside="pixels", column=image)
    size = images[0].nbytes
    for row in range(len(images)):
        name = numbered(path.stem, row, len(images), flat=classes is not None)
        items.append(prefix + labelled_key(classes, row, name), size, facts.st_mtime_ns, path=path, place=row)
    record = {"image": image} | ({} if label is None else {"label": label})
    return Listing(
        root=path, items=items, ignored=(), kind="pixels", columns=record, classes=bool(prefix) or classes is not None
    )


def holds_pixels(path: Path) -> bool:
    """Say whether an array file has an array of three or four dimensions; raises SourceError where it cannot be read."""
    try:
        return any(len(_shape(path, name)) in (3, 4) for name in _array_names(path) or [DEFAULT_ARRAY])
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"could not read {path}: {why_unreadable(error)}", path=path) from error


def _shape(path: Path, array: str) -> tuple[int, ...]:
    if path.suffix.lower() == ".npy":
        return tuple(np.load(path, mmap_mode="r", allow_pickle=False).shape)
    with zipfile.ZipFile(path) as archive, archive.open(f"{array}.npy") as stream:
        return _header(stream)[0]


def read_pixels_at(path: Path, array: str, row: int) -> bytes:
    """Return one image of an array as the bytes of a PNM file (grey, RGB, or PAM with alpha); raises SourceError."""
    images = open_pixels(path, array)
    if not 0 <= row < len(images):
        raise SourceError(f"{path} has {len(images)} images, not one numbered {row}", path=path)
    pixels = images[row]
    height, width, channels = pixels.shape if pixels.ndim == 3 else (*pixels.shape, 1)
    if channels == 4:  # laid over white, as alpha is everywhere; PNM has none
        alpha = pixels[..., 3:].astype(np.float64) / 255.0
        pixels = np.rint(pixels[..., :3] * alpha + 255.0 * (1.0 - alpha)).astype(np.uint8)
    magic = "P5" if channels == 1 else "P6"
    return f"{magic} {width} {height} 255\n".encode() + np.ascontiguousarray(pixels).tobytes()


def open_pixels(path: Path, array: str) -> NDArray[np.uint8]:
    """Return the (N, H, W) or (N, H, W, C) array, mapped where it lies plainly in the file; raises SourceError."""
    try:
        found = _open(path, path.stat().st_mtime_ns, array)
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(f"could not read {path}: {why_unreadable(error)}", path=path) from error
    if found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] in (1, 3, 4):
        height, width, channels = found.shape
        raise SourceError(
            f"{path}: array {array!r} of shape {list(found.shape)} may be one image or {height} grey ones: save it as "
            f"(1, {height}, {width}, {channels}) or ({height}, {width}, {channels}, 1)",
            path=path,
        )
    fits = found.dtype == np.uint8 and found.ndim in (3, 4) and (found.ndim == 3 or found.shape[3] in (1, 3, 4))
    if not fits or not found.size:
        raise SourceError(
            f"{path}: array {array!r} is {found.dtype} of shape {list(found.shape)}, expected images: uint8 (N, H, W) or "
            "(N, H, W, 1, 3 or 4)"
            + " (channels come last: transpose it)"
            * (found.ndim == 4 and found.shape[1] in (1, 3, 4)),
            path=path,
        )
    return found


@lru_cache(maxsize=4)
def _open(path: Path, _modified: int, array: str) -> NDArray[Any]:
    if path.suffix.lower() == ".npy":
        mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        return mapped
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo(f"{array}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            return _mapped(path, archive, member)
        if member.file_size > LARGEST_UNPACKED:
            raise ValueError(
                f"{array!r} would unpack to {member.file_size:,} bytes: save it as a .npy, which is read in place"
            )
    found: NDArray[Any] = np.load(unpacked(path, member.filename), mmap_mode="r", allow_pickle=False)
    return found


def _mapped(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """Return a member that was stored without compression as a map of the file."""
    with archive.open(member) as stream:
        shape, fortran, dtype = _header(stream)
        if dtype.hasobject:
            raise ValueError("it holds pickled objects")
        offset = stream.tell()
    with path.open("rb") as raw:  # 30 bytes, the last two pairs of which say how much follows before the data
        raw.seek(member.header_offset + 26)
        lengths = np.frombuffer(raw.read(4), "<u2")
    start = member.header_offset + 30 + int(lengths.sum()) + offset
    return np.memmap(path, dtype, "r", start, shape, "F" if fortran else "C")


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether in Fortran order, and dtype of an array that begins here."""
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(stream)
    if version[0] not in read:
        raise ValueError(f"an array of version {version} of the format, which is not known")
    return read[version[0]](stream)


def _array_names(path: Path) -> list[str]:
    """Return the arrays of a .npz, [] for a .npy."""
    if path.suffix.lower() == ".npy":
        return []
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except (OSError, zipfile.BadZipFile) as error:
        raise SourceError(f"could not read {path}: {why_unreadable(error)}", path=path) from error


def _chosen(path: Path, asked: str | None, usual: tuple[str, ...], names: list[str]) -> str:
    if not names:
        if asked not in (None, DEFAULT_ARRAY):
            raise SourceError(f"{path} has one array without a name: leave --image-column out", path=path)
        return DEFAULT_ARRAY
    found = asked or next((name for name in usual if name in names), names[0] if len(names) == 1 else None)
    if found not in names:
        raise SourceError(f"{path} has the arrays {names[:8]}: --image-column says which holds the images", path=path)
    return found


def _classes(path: Path, label: str, num_images: int) -> Classes:
    try:
        with zipfile.ZipFile(path) as archive:
            size = archive.getinfo(f"{label}.npy").file_size
            if size > LARGEST_LABELS:
                raise ValueError(
                    f"they take {size:,} bytes, more than {LARGEST_LABELS:,}: save them as numbers or short texts"
                )
            with archive.open(f"{label}.npy") as stream:
                labels: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise SourceError(
            f"could not read the labels {label!r} of {path}: {why_unreadable(error)}", path=path
        ) from error
    if labels.shape != (num_images,) or labels.dtype.kind not in "iuUS":
        raise SourceError(
            f"{path}: labels {label!r} are {labels.dtype} of shape {list(labels.shape)}, expected {num_images} numbers or texts",
            path=path,
        )
    return class_names(labels, path)
