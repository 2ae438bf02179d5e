"""From the bytes of an image file to RGB pixels, as a person would see them.

Shapes: H×W pixels.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Mapping
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import SourceError

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
FOREIGN = (
    (4, b"ftyphei", "a HEIC image"),
    (4, b"ftyphev", "a HEIC image"),
    (4, b"ftypmif1", "a HEIF image"),
    (4, b"ftypmsf1", "a HEIF image"),
    (4, b"ftypavi", "an AVIF image that this Pillow cannot read"),
    (4, b"JXL ", "a JPEG XL image"),
    (0, b"\xff\x0a", "a JPEG XL image"),
    (12, b"CgBI", "a PNG in Apple's own variant"),
    (0, b"8BPS", "a Photoshop document"),
    (0, b"%PDF", "a PDF document"),
    (0, b"\0\0\1\0", "an icon"),
)
"""Where what stands in files that are pictures to people, and not to us."""
TIFF = (b"II*\0", b"MM\0*")
"""How a TIFF begins."""
GREY_MODES = ("1", "L", "LA", "La", "I", "F")
"""Modes of Pillow without colour."""
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 0x0112, 258, 262, 339
"""Tags of EXIF and TIFF."""
MAX_PIXELS = 178_956_970
"""Twice what Pillow warns of, which is where Pillow itself refuses."""
MAX_FILE_BYTES = 2 << 30


def read_image(path: str | os.PathLike[str], *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode an image file to RGB as a person would see it.

    EXIF orientation is applied, transparency is laid over white, samples of more than 8 bits are scaled to 8, CMYK, palette
    and grey become RGB; of an animation the first frame is taken. Damaged EXIF data turn nothing and lose no picture.

    Args:
        path: the file.
        max_pixels: larger images are refused before they are decoded.

    Returns:
        (H, W, 3) uint8.

    Raises:
        SourceError: absent, empty, not an image, truncated or too large; the reason is in the message.
    """
    where = Path(path)
    return decode_named(read_bytes(where), where, max_pixels=max_pixels)


def decode_named(data: bytes, where: Path, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode the bytes of an image file, whose path is put into an error; see `read_image`."""
    try:
        return decode_image(data, max_pixels=max_pixels)
    except SourceError as error:
        raise SourceError(f"{where}: {error}", path=where) from error.__cause__


def read_bytes(path: Path) -> bytes:
    """Return a file's bytes; raises SourceError where it is absent, unreadable or too large."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise SourceError(f"{path}: more than {MAX_FILE_BYTES >> 20} MiB for one image", path=path)
        return path.read_bytes()
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}", path=path) from error


def read_span(path: Path, offset: int, size: int) -> bytes:
    """Return bytes from inside a file; raises SourceError where they are not all there."""
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            data = stream.read(size)
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}", path=path) from error
    if len(data) != size:
        raise SourceError(f"{path}: it was cut short", path=path)
    return data


@cache
def _formats() -> tuple[str, ...]:
    """Return those of FORMATS that this Pillow can read; its plug-ins have to be loaded before they may be named."""
    from PIL import Image

    # Pillow logs what it then raises; without a handler of the caller's own, Python would print that without a file's name
    logging.getLogger("PIL").addHandler(logging.NullHandler())
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode the bytes of an image file; see `read_image`."""
    return np.array(decode_picture(data, max_pixels=max_pixels), np.uint8)


def decode_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of an image file to a Pillow image in RGB; see `read_image`."""
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
                return _to_rgb(image, data[24] if image.format == "PNG" else 8)  # where IHDR has its depth
    except SourceError:
        raise
    except Exception as error:
        raise SourceError(f"not a readable image ({_reason(data, error)})") from error


def has_one_channel(data: bytes) -> bool | None:
    """Say whether an image file has grey alone, with or without transparency; None where it cannot be read."""
    from PIL import Image

    try:
        with Image.open(BytesIO(data), formats=_formats()) as image:
            return image.mode in GREY_MODES or image.mode.startswith("I;16")
    except Exception:  # noqa: BLE001 - whatever a damaged file makes Pillow raise; reading it says what
        return None


def _to_rgb(image: Image.Image, png_depth: int) -> Image.Image:
    from PIL import Image, ImageChops

    image.load()
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = _to_8_bit(np.asarray(image), image)
        return _upright(Image.fromarray(grey), image).convert("RGB")
    _scale_clear_colour(image, png_depth)
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        white = Image.new("RGBA", layered.size, (255, 255, 255, 255))
        return _upright(Image.alpha_composite(white, layered), image).convert("RGB")
    if (image.format, image.mode) == ("JPEG", "CMYK") and "adobe" not in image.info:
        return _upright(ImageChops.invert(image).convert("RGB"), image)  # only Adobe's inks are stored inverted
    return _upright(image if image.mode == "RGB" else image.convert("RGB"), image)


def _upright(picture: Image.Image, original: Image.Image) -> Image.Image:
    """Turn a picture as the EXIF data of the image that it was made from say; damaged data say nothing."""
    from PIL import Image

    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }  # fmt: skip
    turn = None
    with contextlib.suppress(Exception):  # whatever damaged metadata make Pillow raise: the pixels are sound
        turn = turns.get(original.getexif().get(ORIENTATION, 1))
    return picture if turn is None else picture.transpose(turn)


def _scale_clear_colour(image: Image.Image, depth: int) -> None:
    """Bring a PNG's transparent colour, which Pillow keeps in the file's own depth, to the 8 bits of its pixels."""
    clear = image.info.get("transparency")
    if image.mode == "L" and depth in (2, 4) and isinstance(clear, int):
        image.info["transparency"] = clear % 2**depth * 255 // (2**depth - 1)
    elif image.mode == "RGB" and depth == 16 and isinstance(clear, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in clear)


def _to_8_bit(samples: NDArray[Any], image: Image.Image) -> NDArray[np.uint8]:
    """Scale grey samples of more than 8 bits to 8: white is what the file says, or else the least usual white that holds them."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    (bits, *_), (kind, *_) = _tag(tags, BITS_PER_SAMPLE, 0), _tag(tags, SAMPLE_FORMAT, 1)
    if image.mode.startswith("I;16"):
        white = 2.0**bits - 1 if bits else 65535.0
        scaled = (np.arange(65536) * (255.0 / white)).round().clip(0, 255).astype(np.uint8)[samples]
        grey = 255 - scaled if _tag(tags, PHOTOMETRIC, 1)[0] == 0 else scaled
        clear = image.info.get("transparency")
        return np.where(samples == clear, np.uint8(255), grey) if isinstance(clear, int) else grey
    if image.mode == "I" and (bits, kind) == (32, 1):
        samples = samples.view(np.uint32)  # Pillow has no unsigned mode of 32 bits
    values = samples.astype(np.float64)
    top = values.max(initial=0.0, where=np.isfinite(values))
    usual = {"F": (1.0, 255.0, 65535.0), "I": (32767.0,) if bits == 16 else (65535.0, 2.0**31 - 1, 2.0**32 - 1)}
    white = next((white for white in usual[image.mode] if top <= white), top)
    values = np.nan_to_num(values, nan=0.0, posinf=white, neginf=0.0)
    return (values * (255.0 / white)).round().clip(0, 255).astype(np.uint8)


def _tag(tags: Mapping[int, Any], number: int, default: int) -> tuple[int, ...]:
    """Return a TIFF tag as a tuple."""
    value = tags.get(number, default)
    return value if isinstance(value, tuple) else (value,)


def _reason(data: bytes, error: Exception) -> str:
    """Return why bytes are no readable image, without what differs from run to run, such as memory addresses."""
    from PIL import UnidentifiedImageError

    known = next((what for place, magic, what in FOREIGN if data[place : place + len(magic)] == magic), "")
    if known:
        return f"{known}: convert it to JPEG or PNG"
    if data[:64].lstrip()[:5].lower() in (b"<html", b"<!doc"):
        return "a web page: the download of an image failed"
    if not isinstance(error, UnidentifiedImageError):  # whose own text holds a memory address
        return f"{type(error).__name__}: {error}"
    return "a TIFF of a kind that Pillow cannot read" if data[:4] in TIFF else "its format is not known"
