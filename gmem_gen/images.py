"""Writing samples: a grid to look at, single images for programs, a JSON that says how they were made.

Shapes: B images, H×W pixels, C channels.
"""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmem_bank.errors import ConfigError, OutputExistsError, WriteError

GAP = 2
SAMPLES_MARKER = ".gmem-samples"
_SAMPLE_NAME = re.compile(r"\d{6,}\.png")


def make_grid(images: NDArray[np.uint8], columns: int | None = None, *, min_cell: int = 64) -> Image.Image:
    """Return images side by side on white, small ones enlarged by whole pixels.

    Args:
        images: (B, H, W, C) uint8, C 1 or 3.
        columns: images in a row; None: about square.
        min_cell: least side of a cell in pixels.
    """
    count, height, width, channels = images.shape
    across = columns or math.ceil(math.sqrt(count))
    down = math.ceil(count / across)
    factor = max(1, math.ceil(min_cell / width))
    cell_height, cell_width = height * factor, width * factor
    sheet = np.full((down * (cell_height + GAP) + GAP, across * (cell_width + GAP) + GAP, 3), 255, np.uint8)
    for index, image in enumerate(images):
        row, column = divmod(index, across)
        top, left = GAP + row * (cell_height + GAP), GAP + column * (cell_width + GAP)
        big = image.repeat(factor, 0).repeat(factor, 1)
        sheet[top : top + cell_height, left : left + cell_width] = big if channels == 3 else big.repeat(3, 2)
    return Image.fromarray(sheet)


def to_image(pixels: NDArray[np.uint8]) -> Image.Image:
    """Return an (H, W, C) array as an image, grey for C = 1."""
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0])


def write_samples(
    images: NDArray[np.uint8],
    record: dict[str, Any],
    grid: Path,
    *,
    columns: int | None = None,
    folder: Path | None = None,
) -> list[Path]:
    """Write a grid PNG with a JSON beside it and, where a folder is given, every image as a PNG of its own.

    Raises:
        WriteError: the disk refused.
    """
    require_own(grid)
    written = [grid, grid.with_suffix(".json")]
    try:
        grid.parent.mkdir(parents=True, exist_ok=True)
        _replace(grid, lambda path: make_grid(images, columns).save(path, format="PNG"))
        text = json.dumps(record, indent=1, ensure_ascii=False)
        _replace(written[1], lambda path: path.write_text(text, encoding="utf-8"))
        if folder is not None:
            _empty(folder)
            for index, pixels in enumerate(images):
                written.append(folder / f"{index:06d}.png")
                to_image(pixels).save(written[-1])
    except OSError as error:
        if isinstance(error, OutputExistsError):
            raise
        where = error.filename or grid.parent
        raise WriteError(
            f"could not write samples to {where}: {error.strerror or error}. Free some space, or choose another place with -o "
            "and --save-images",
            path=grid,
        ) from error
    return written


def require_own(grid: Path) -> None:
    """Raise unless a grid may be written there: a .png that is new, or one that sampling wrote, with its record beside it.

    Raises:
        ConfigError: not a .png.
        OutputExistsError: a file of somebody else's is in the way.
    """
    if grid.suffix.lower() != ".png":
        raise ConfigError(f"{grid}: a grid of samples is a .png file", key="output")
    record = grid.with_suffix(".json")
    if not grid.exists() and not record.exists():
        return
    try:
        ours = "nfe" in json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise OutputExistsError(
            f"{grid} or {record.name} exists and is no grid of ours: choose another name with -o", path=grid
        )


def _empty(folder: Path) -> None:
    """Make a folder for samples, or clear one of ours: samples of two calls must not lie mixed in one folder.

    Raises:
        OutputExistsError: the folder holds something else than samples.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in present if name != SAMPLES_MARKER and not _SAMPLE_NAME.fullmatch(name)]
    if foreign or (present and SAMPLES_MARKER not in present):
        raise OutputExistsError(
            f"{folder} holds other files, such as {(foreign or present)[0]!r}: give an empty folder to --save-images",
            path=folder,
        )
    for name in present:
        (folder / name).unlink()
    (folder / SAMPLES_MARKER).touch()


def _replace(path: Path, write: Any) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
