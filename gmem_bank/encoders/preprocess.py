"""Pixels on their way into an encoder: a square crop on the CPU, then resize and normalise on the device.

We own these steps, and they are part of an encoder's fingerprint, because an image processor that picks its backend by
what else is installed makes two banks of the same images differ.

Shapes: B images, H×W pixels, S the side of the square crop, T the side of the encoder's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.encoders import native

if TYPE_CHECKING:
    import torch
    from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GMEM_CROP = 256
GMEM_INPUT = 224


def gmem_preprocessing(input_size: int = GMEM_INPUT) -> dict[str, Any]:
    """Return the record of the preprocessing of GMem (arXiv 2412.08781): ADM crop to 256, bicubic to the input size.

    Args:
        input_size: T in pixels; 224 for DINOv2.
    """
    return {
        "preset": "gmem",
        "crop": "adm",
        "crop_size": GMEM_CROP,
        "resize": "bicubic, no antialias",
        "input_size": input_size,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "alpha": "over white",
    }


def square_preprocessing(size: int) -> dict[str, Any]:
    """Return the record of the reference encoders' preprocessing: ADM crop to `size`, nothing else."""
    return {"preset": "square", "crop": "adm", "crop_size": size, "alpha": "over white"}


def center_crop(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Return the central square of an image at a given size, as ADM does (Dhariwal & Nichol 2021, arXiv 2105.05233).

    The image is halved with a box filter while its short side is at least twice `size`, then brought to `size` with a
    bicubic filter (up or down), then cropped in the middle.

    Args:
        image: (H, W, 3) uint8.
        size: S in pixels.

    Returns:
        (S, S, 3) uint8.
    """
    from PIL import Image

    return crop_picture(Image.fromarray(image), size)


def crop_picture(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """Return what `center_crop` does, of a Pillow image in RGB."""
    from PIL import Image

    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = max(size, round(picture.width * scale)), max(size, round(picture.height * scale))
    return np.array(native.resized_center(picture, width, height, size, Image.Resampling.BICUBIC))


def crop(image: NDArray[np.uint8] | Image.Image, preprocessing: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Return the (S, S, 3) uint8 crop of an (H, W, 3) array or a Pillow image that a preprocessing record asks for."""
    from PIL import Image

    picture = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    if preprocessing.get("crop", "adm") == "native":
        return native.crop_native(picture, preprocessing)
    return crop_picture(picture, int(preprocessing["crop_size"]))


def preprocessing_problem(preprocessing: Mapping[str, Any]) -> str:
    """Return why a record cannot be followed, or "": it needs `crop_size`; `crop`, where given, is "adm" or "native"."""
    size = preprocessing.get("crop_size")
    if type(size) is not int or size < 1:
        return f"spec.preprocessing['crop_size'] must be a positive integer, got {size!r}"
    if preprocessing.get("crop", "adm") not in ("adm", "native"):
        return f"spec.preprocessing['crop'] must be 'adm' or 'native', got {preprocessing['crop']!r}"
    return ""


def to_input(images: torch.Tensor, preprocessing: Mapping[str, Any]) -> torch.Tensor:
    """Return what the network sees.

    Args:
        images: (B, S, S, 3) uint8 on any device.
        preprocessing: record with mean and std, and for the preset "gmem" input_size.

    Returns:
        (B, 3, T, T) float32: [0,1], minus mean, over std; for "gmem" then bicubic to T without antialias (in that order).
    """
    import torch
    from torch.nn import functional

    rescale = float(preprocessing.get("rescale", 0.0))
    pixels = images.permute(0, 3, 1, 2).to(torch.float32)
    values = pixels * rescale if rescale else pixels / 255.0
    mean = torch.tensor(preprocessing["mean"], device=values.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing["std"], device=values.device).view(1, 3, 1, 1)
    if preprocessing["preset"] == "native":
        return (values - mean) / std
    size = int(preprocessing["input_size"])
    return functional.interpolate((values - mean) / std, size=(size, size), mode="bicubic", align_corners=False)
