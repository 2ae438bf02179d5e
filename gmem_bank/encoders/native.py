"""A model's own preprocessing, as its `preprocessor_config.json` says, by our own code.

The transformers library does these steps with Pillow or with torchvision, whichever is installed, and the two differ; here they
are always Pillow's, and part of the encoder's fingerprint.

Shapes: H×W pixels of an image, T side of the encoder's input.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import EncoderError

if TYPE_CHECKING:
    from PIL import Image

PREPROCESSOR = "preprocessor_config.json"
RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""Pillow's numbers, as the files have them."""
STEPS = ("do_resize", "do_rescale", "do_normalize")
MOST_RESIZED = 1 << 26
"""Pixels of a picture that is resized whole and then cropped, 256 MiB in Pillow; of more, only the crop is made."""
WIDEST_FILTER = 4
"""Source pixels on either side that a filter reaches at most: three of Lanczos, and one for rounding."""


def native_preprocessing(folder: Path, default_size: int) -> dict[str, Any]:
    """Return the record of what `preprocessor_config.json` asks for.

    Args:
        folder: the model's folder.
        default_size: T where the file names none.

    Raises:
        EncoderError: the file is absent or asks for what this code does not do; the field is named.
    """
    path = folder / PREPROCESSOR
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return _record(config, default_size)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise EncoderError(
            f"the preset 'native' needs a usable {path}: {error}. The preset 'gmem' needs none", path=folder
        ) from error


def _record(config: Mapping[str, Any], default_size: int) -> dict[str, Any]:
    off = [step for step in STEPS if not config.get(step, True)]
    if off:
        raise ValueError(f"it switches off {', '.join(off)}, which this code always does")
    size = config.get("size", default_size)
    size = {"shortest_edge": size} if isinstance(size, int) and config.get("do_center_crop") else size
    size = {"height": size, "width": size} if isinstance(size, int) else dict(size)
    if set(size) not in ({"shortest_edge"}, {"height", "width"}):
        raise ValueError(f"size {size} is neither a shortest edge nor height and width")
    crop = config.get("crop_size", default_size) if config.get("do_center_crop") else None
    crop = crop["height"] if isinstance(crop, dict) and crop["height"] == crop["width"] else crop
    side = crop if crop is not None else size.get("height")
    if not isinstance(side, int) or (crop is None and size.get("height") != size.get("width")):
        raise ValueError(f"size {size} and crop {crop} do not give a square")
    return {
        "preset": "native",
        "crop": "native",
        "crop_size": side,
        "resize": {name: int(value) for name, value in size.items()},
        "resample": RESAMPLE[int(config.get("resample", 2))],
        "center_crop": crop is not None,
        "rescale": float(config.get("rescale_factor", 1 / 255)),
        "mean": [float(value) for value in config["image_mean"]],
        "std": [float(value) for value in config["image_std"]],
        "alpha": "over white",
    }


def crop_native(picture: Image.Image, record: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the (T, T, 3) uint8 pixels that the record asks for: resized, and cropped in the middle (black where too small)."""
    from PIL import Image

    size, side = record["resize"], int(record["crop_size"])
    if "shortest_edge" in size:
        edge, short, long = size["shortest_edge"], min(picture.size), max(picture.size)
        other = int(edge * long / short)  # truncated, as the library does
        width, height = (edge, other) if picture.width <= picture.height else (other, edge)
    else:
        width, height = size["width"], size["height"]
    resample = Image.Resampling[str(record["resample"]).upper()]
    if not record["center_crop"]:
        return np.array(picture.resize((width, height), resample=resample))
    return np.array(resized_center(picture, width, height, side, resample))


def resized_center(picture: Image.Image, width: int, height: int, side: int, resample: Image.Resampling) -> Image.Image:
    """Return the central square of a picture resized to width × height, black where that is smaller than the square.

    Beyond MOST_RESIZED pixels (a line of pixels may be a million times as long as it is high) no more than the square is ever
    made, of the source pixels that its filter reaches; values may then differ by one, since places are rounded otherwise.
    """
    left, top = (width - side) // 2, (height - side) // 2
    if width * height <= MOST_RESIZED:
        resized = picture.resize((width, height), resample=resample)
        return resized.crop((left, top, left + side, top + side))
    window = (max(0, left), max(0, top), min(width, left + side), min(height, top + side))
    x, end_x, box_x, box_end_x = _needed(picture.width, width, window[0], window[2])
    y, end_y, box_y, box_end_y = _needed(picture.height, height, window[1], window[3])
    part = picture.crop((x, y, end_x, end_y))
    size = (window[2] - window[0], window[3] - window[1])
    square = part.resize(size, resample=resample, box=(box_x, box_y, box_end_x, box_end_y))
    left, top = min(left, 0), min(top, 0)  # what is too small lies in the middle
    return square.crop((left, top, left + side, top + side))


def _needed(size: int, resized: int, first: int, end: int) -> tuple[int, int, float, float]:
    """Return which pixels of `size` some of the `resized` ones are made of, and where within them these lie."""
    scale = size / resized
    reach = math.ceil(WIDEST_FILTER * max(1.0, scale))
    begin, stop = max(0, math.floor(first * scale) - reach), min(size, math.ceil(end * scale) + reach)
    return begin, stop, first * scale - begin, min(end * scale - begin, float(stop - begin))
