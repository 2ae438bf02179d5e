"""From the bytes of an image file to RGB pixels, as a person would see them.

Shapes: H×W pixels.
"""

from __future__ import annotations

import os
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

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
MAX_PIXELS = 178_956_970
"""Twice what Pillow warns of, which is where Pillow itself refuses."""
MAX_FILE_BYTES = 2 << 30


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

    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode the bytes of an image file; see `read_image`."""
    return np.array(decode_picture(data, max_pixels=max_pixels), np.uint8)


def decode_picture(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the bytes of an image file to a Pillow image in RGB; see `read_image`."""
    import warnings

    from PIL import Image, UnidentifiedImageError

    if not data:
        raise SourceError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities that decode well; failures raise
            with Image.open(BytesIO(data), formats=_formats()) as image:
                if image.width * image.height > max_pixels:
                    raise SourceError(f"{image.width}×{image.height} is more than {max_pixels:,} pixels")
                return _to_rgb(image)
    except SourceError:
        raise
    except UnidentifiedImageError as error:  # its own text holds a memory address
        raise SourceError("not a readable image (its format is not known)") from error
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
    return upright if upright.mode == "RGB" else upright.convert("RGB")


def _to_8_bit(samples: NDArray[np.generic], mode: str) -> NDArray[np.uint8]:
    """Scale 16-bit (or float 0..1) samples to 8 bits; 32-bit integers are 16-bit ones in Pillow's wider mode."""
    values = samples.astype(np.float64)
    scaled = values * 255.0 if mode == "F" and values.max(initial=0.0) <= 1.0 else values
    if mode != "F":
        scaled = values * (255.0 / 65535.0)
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
