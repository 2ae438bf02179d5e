"""Writing samples: a grid to look at, with a JSON that says how they were made.

Shapes: B images, H×W pixels, C channels.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmem_bank.errors import ConfigError, OutputExistsError, WriteError

GAP = 2


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


def write_grid(
    images: NDArray[np.uint8], record: Mapping[str, Any], grid: Path, *, columns: int | None = None
) -> list[Path]:
    """Write a grid PNG with a JSON beside it; return both.

    Raises:
        ConfigError, OutputExistsError: as `require_own`.
        WriteError: the disk refused.
    """
    require_own(grid)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    try:
        grid.parent.mkdir(parents=True, exist_ok=True)
        replace_file(grid, lambda path: make_grid(images, columns).save(path, format="PNG"))
        replace_file(grid.with_suffix(".json"), lambda path: path.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise WriteError(
            f"could not write samples to {error.filename or grid.parent}: {error.strerror or error}. Free some space, or choose "
            "another place with -o",
            path=grid,
        ) from error
    return [grid, grid.with_suffix(".json")]


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


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file beside its place and rename it: it is whole or what it was before."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
