"""Samples in a folder of PNGs.

Shapes: B samples in all, b samples of a batch, H×W pixels, C channels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmem_bank.errors import OutputExistsError
from gmem_gen.images import replace_file, to_image
from gmem_gen.stores import Plan, add_up, json_in, require_same_plan, write_json, writing

MARKER, RECORD = ".gmem-samples", "samples.json"
"""The plan; the record, there when all samples are."""
_OURS = re.compile(r"\d{6,}\.png|\.tally-\d+-of-\d+\.json|\.gmem-samples|samples\.json")
_LEFT = re.compile(r"\..*\.tmp")
"""What a killed process had not finished."""


class FolderStore:
    """A folder of PNGs, 000000.png and on, each complete or not there at all; samples.json beside them at the end.

    Args:
        folder: new, empty, or of this plan.
        plan: all that decides the samples.
        num_images: B.
        overwrite: clear a folder of other samples instead of refusing it.

    Raises:
        OutputExistsError: it holds something else.
        WriteError: it cannot be written.
    """

    def __init__(self, folder: Path, plan: Plan, num_images: int, *, overwrite: bool = False) -> None:
        self.path, self.num_images, self.record = folder, num_images, folder / RECORD
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            present = sorted(path.name for path in folder.iterdir() if not _LEFT.fullmatch(path.name))
            foreign = [name for name in present if not _OURS.fullmatch(name)]
            if foreign or (present and MARKER not in present):
                raise OutputExistsError(
                    f"{folder} holds other files, such as {(foreign or present)[0]!r}: give an empty folder to --save-images",
                    path=folder,
                )
            if present and not overwrite:
                require_same_plan(folder, json_in(folder / MARKER), plan)
            elif present and json_in(folder / MARKER) != plan:
                for name in present:
                    (folder / name).unlink()
            write_json(folder / MARKER, plan)

    def _file(self, place: int) -> Path:
        return self.path / f"{place:06d}.png"

    def done(self) -> NDArray[np.bool_]:
        """Return (B,) which samples are kept already."""
        found = np.zeros(self.num_images, np.bool_)
        with os.scandir(self.path) as entries:
            for entry in entries:
                stem, dot, suffix = entry.name.partition(".")
                # a file of no bytes is what a power cut leaves of one that was just renamed
                if dot and suffix == "png" and stem.isdigit() and int(stem) < self.num_images and entry.stat().st_size:
                    found[int(stem)] = True
        return found

    def write(self, places: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """Keep (b, H, W, C) samples."""
        with writing(self.path):
            for place, pixels in zip(places.tolist(), images, strict=True):
                image = to_image(pixels)
                replace_file(self._file(place), partial(image.save, format="PNG"))

    def read(self, place: int) -> NDArray[np.uint8]:
        """Return the (H, W, C) pixels of a kept sample."""
        with Image.open(self._file(place)) as image:
            pixels = np.asarray(image)
        return pixels if pixels.ndim == 3 else pixels[..., None]

    def tally(self, name: str, counts: Mapping[str, int]) -> dict[str, int]:
        """Add counts to those of a process, and return the counts of all."""
        with writing(self.path):
            return add_up(self.path, ".tally-", name, counts)

    def finish(self, record: Mapping[str, Any]) -> list[Path]:
        """Write the record."""
        with writing(self.path):
            for pattern in (".*.png.*.tmp", f".{MARKER}.*.tmp"):  # not tallies, which others may be writing
                for left in self.path.glob(pattern):
                    left.unlink(missing_ok=True)
            write_json(self.record, record)
        return [self.path, self.record]
