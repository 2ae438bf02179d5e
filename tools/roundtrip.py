"""What a tokenizer loses on real photos: PSNR of images decoded from their latents, as JSON.

python -m tools.roundtrip IMAGES --tokenizer taef2 --weights DIR [--size 224] [--num 50]

Takes images spread evenly over a folder, by name, cropped to a square as for training. Beside it stands what is left when they
are made as small as the latents by bicubic resampling and enlarged again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import gmem_bank
from gmem_gen.autoencoders import Weights
from gmem_gen.tokenizers import TokenizerMaker

BATCH = 10


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the (B,) peak signal-to-noise ratios in dB of (B, H, W, 3) uint8 images."""
    errors = (images.astype(np.float64) - others.astype(np.float64)) ** 2
    return 10 * np.log10(255**2 / np.maximum(errors.mean(axis=(1, 2, 3)), 1e-12))


def made_small(image: np.ndarray, factor: int) -> np.ndarray:
    """Return an (H, W, 3) image after a journey through one of a `factor`-th of its side."""
    small = Image.fromarray(image).resize(
        (image.shape[1] // factor, image.shape[0] // factor), Image.Resampling.BICUBIC
    )
    return np.asarray(small.resize((image.shape[1], image.shape[0]), Image.Resampling.BICUBIC))


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("--tokenizer", default="taef2")
    parser.add_argument("--weights", default="")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--num", type=int, default=50)
    given = parser.parse_args()
    tokenizer = TokenizerMaker(given.tokenizer, Weights(place=given.weights)).make(given.size)
    found = sorted(given.images.rglob("*.jpg"))
    paths = [
        found[place] for place in np.unique(np.linspace(0, len(found) - 1, min(given.num, len(found))).astype(int))
    ]
    factor = given.size // tokenizer.latent.size
    decoded, small = [], []
    for start in range(0, len(paths), BATCH):
        batch = paths[start : start + BATCH]
        images = np.stack([gmem_bank.center_crop(gmem_bank.read_image(path), given.size) for path in batch])
        decoded.append(psnr(images, tokenizer.decode(tokenizer.encode(images))))
        small.append(psnr(images, np.stack([made_small(image, factor) for image in images])))
    record = {
        "tokenizer": given.tokenizer, "size": given.size, "latent": [tokenizer.latent.channels, tokenizer.latent.size],
        "num_images": len(paths), "psnr_mean": round(float(np.concatenate(decoded).mean()), 3),
        "psnr_min": round(float(np.concatenate(decoded).min()), 3),
        "psnr_bicubic": round(float(np.concatenate(small).mean()), 3),
    }  # fmt: skip
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
