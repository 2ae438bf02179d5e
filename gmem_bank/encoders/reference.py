"""Reference encoders: no download, no weights, NumPy only; for first use, tests and as a floor to compare against.

Shapes: B images, S×S pixels, Y×X cells, O orientations, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.encoders import EncoderOptions, preprocess, refuse_unknown
from gmem_bank.errors import EncoderSettingError
from gmem_bank.provenance import EncoderSpec

LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601."""
ALGORITHM = 1
"""Part of every fingerprint: raised when a change here changes numbers, so that old banks are not mixed with new ones."""
LARGEST = 4096
HYS_CLIP = 0.2
EPSILON = 1e-2
"""Added to the squared norm of a block, whose gradients lie in 0 to 1: keeps noise in flat blocks small."""


def grey(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return (B, S, S) float32 luma in [0, 1] of (B, S, S, 3) uint8 images."""
    values: NDArray[np.float32] = images.astype(np.float32) @ np.asarray(LUMA, np.float32) / np.float32(255.0)
    return values


def _spec(name: str, options: EncoderOptions, parameters: Mapping[str, Any], dim: int) -> EncoderSpec:
    if options.weights is not None:
        raise EncoderSettingError(f"encoder {name!r} has no weights: leave --weights out", key=name)
    if options.device not in ("auto", "cpu"):
        raise EncoderSettingError(
            f"encoder {name!r} computes on the CPU only: leave --device {options.device} out", key="device"
        )
    return EncoderSpec(
        name=name,
        family=f"{name}/{ALGORITHM}",
        dim=dim,
        space=options.space,
        preprocessing=preprocess.square_preprocessing(int(parameters["size"])),
        parameters=dict(parameters),
        software=f"gmem {gmem_bank.__version__}",
    )


def _positive(name: str, parameters: Mapping[str, Any], *which: str) -> None:
    for parameter in which:
        value = parameters[parameter]
        if type(value) is not int or not 1 <= value <= LARGEST:
            raise EncoderSettingError(
                f"encoder {name!r}: {parameter} must be a positive integer up to {LARGEST}, got {value!r}",
                key=parameter,
            )


class Hog:
    """Histograms of oriented gradients (Dalal & Triggs, CVPR 2005).

    Each pixel's gradient votes with its magnitude for the two nearest orientations and the four nearest cells; cells are
    grouped in overlapping blocks, and each block is scaled to unit norm, clipped at 0.2 and scaled again (L2-Hys).
    """

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec
        self._parameters = spec.parameters

    @property
    def spec(self) -> EncoderSpec:
        """What decides the numbers."""
        return self._spec

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, D) float32 histograms of (B, S, S, 3) uint8 images."""
        bins, cell, block = (int(self._parameters[n]) for n in ("orientations", "cell", "block"))
        votes = self._votes(grey(images), bins)
        cells = _pool(votes, cell)
        blocks = _blocks(cells, block)
        return np.asarray(blocks.reshape(len(images), -1), np.float32)

    def _votes(self, values: NDArray[np.float32], bins: int) -> NDArray[np.float32]:
        """Return (B, S, S, O): every pixel's gradient magnitude, shared between its two nearest orientations."""
        padded = np.pad(values, ((0, 0), (1, 1), (1, 1)), mode="edge")
        dx = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
        dy = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
        turn = 2 * np.pi if self._parameters["signed"] else np.pi
        position = np.mod(np.arctan2(dy, dx), turn) / turn * bins  # bin k is centred on k/O of the turn
        low = np.floor(position)
        share = (position - low)[..., None]
        magnitude = np.hypot(dx, dy)[..., None]
        index = low.astype(np.int64)[..., None] % bins
        orientation = np.arange(bins)
        votes = magnitude * ((1 - share) * (index == orientation) + share * ((index + 1) % bins == orientation))
        return np.asarray(votes, np.float32)


def _pool(votes: NDArray[np.float32], cell: int) -> NDArray[np.float32]:
    """Return (B, Y, X, O): votes shared bilinearly between the four nearest cell centres."""
    size = votes.shape[1]
    centres = (np.arange(size // cell) + 0.5) * cell
    pixels = np.arange(size) + 0.5
    weight = np.maximum(0.0, 1.0 - np.abs(centres[:, None] - pixels[None, :]) / cell).astype(np.float32)
    pooled: NDArray[np.float32] = np.einsum("yh,bhwo,xw->byxo", weight, votes, weight, optimize=True)
    return pooled


def _blocks(cells: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """Return (B, Y', X', block·block·O): overlapping blocks of cells, each L2-Hys normalised."""
    windows = np.lib.stride_tricks.sliding_window_view(cells, (block, block), axis=(1, 2))
    flat = np.moveaxis(windows, 3, -1).reshape(*windows.shape[:3], -1).astype(np.float32)
    unit = flat / np.sqrt((flat**2).sum(-1, keepdims=True) + EPSILON)
    clipped = np.minimum(unit, HYS_CLIP)
    scaled: NDArray[np.float32] = clipped / np.sqrt((clipped**2).sum(-1, keepdims=True) + EPSILON)
    return scaled


def make_hog(name: str, options: EncoderOptions) -> Hog:
    """Make a HOG encoder.

    Args:
        name: "hog".
        options: parameters `size` (side in pixels, 32), `cell` (8), `block` (cells, 2), `orientations` (9), `signed`
            (False: a light-dark edge and a dark-light edge are the same orientation).
    """
    defaults = {"size": 32, "cell": 8, "block": 2, "orientations": 9, "signed": False}
    parameters = refuse_unknown(name, options.parameters, defaults)
    _positive(name, parameters, "size", "cell", "block", "orientations")
    cells = parameters["size"] // parameters["cell"]
    if parameters["size"] % parameters["cell"] or cells < parameters["block"]:
        raise EncoderSettingError(
            f"encoder 'hog': size {parameters['size']} must be a multiple of cell {parameters['cell']} and hold a block"
        )
    dim = (cells - parameters["block"] + 1) ** 2 * parameters["block"] ** 2 * parameters["orientations"]
    return Hog(_spec(name, options, parameters, dim))


class Pixels:
    """Grey pixels at a small size, minus their mean."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec

    @property
    def spec(self) -> EncoderSpec:
        """What decides the numbers."""
        return self._spec

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, S·S) float32 grey values minus the image's mean."""
        flat = grey(images).reshape(len(images), -1)
        return np.asarray(flat - flat.mean(axis=1, keepdims=True), np.float32)


def make_pixels(name: str, options: EncoderOptions) -> Pixels:
    """Make a pixel encoder; parameter `size` (side in pixels, 16)."""
    parameters = refuse_unknown(name, options.parameters, {"size": 16})
    _positive(name, parameters, "size")
    return Pixels(_spec(name, options, parameters, parameters["size"] ** 2))


class RandomProjection:
    """A fixed Gaussian projection of the pixels: keeps distances on average (Johnson & Lindenstrauss 1984)."""

    def __init__(self, spec: EncoderSpec) -> None:
        self._spec = spec
        size, dim = int(spec.parameters["size"]), spec.dim
        rng = np.random.Generator(np.random.PCG64(int(spec.parameters["seed"])))
        self._matrix = rng.standard_normal((size * size * 3, dim), np.float32) / np.float32(np.sqrt(dim))

    @property
    def spec(self) -> EncoderSpec:
        """What decides the numbers."""
        return self._spec

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, D) float32 projections of (B, S, S, 3) uint8 images, centred at mid-grey."""
        flat = images.reshape(len(images), -1).astype(np.float32) / np.float32(127.5) - np.float32(1.0)
        projected: NDArray[np.float32] = flat @ self._matrix
        return projected


def make_random_projection(name: str, options: EncoderOptions) -> RandomProjection:
    """Make a random projection; parameters `size` (side in pixels, 32), `dim` (D, 256), `seed` (0)."""
    parameters = refuse_unknown(name, options.parameters, {"size": 32, "dim": 256, "seed": 0})
    _positive(name, parameters, "size", "dim")
    return RandomProjection(_spec(name, options, parameters, parameters["dim"]))
