"""Patch tokens of an encoder beside a training: joined to its rows by key, brought to the model's grid.

Shapes: M rows with images, B batch, T tokens of the encoder on a g×g grid, P dimension, G×G grid of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

import gmem_bank
from gmem_bank.errors import ConfigError, FormatError, SourceError, UnknownKeyError


class PatchTokens:
    """The tokens of M rows.

    Args:
        folder: that `gmem-bank tokens` wrote.
        keys: of the rows; a mirrored twin has tokens of its own.
        resampling: "bilinear", "bicubic", or "none": another grid than the model's is refused.

    Raises:
        SourceError: no such folder, keys without tokens, or something else than patch tokens.
    """

    def __init__(self, folder: str, keys: list[str], resampling: str) -> None:
        self._shards, self._resampling, self._grid = gmem_bank.Shards(folder), resampling, 0
        holds = self._shards.facts.get("holds", "patch tokens")
        if len(self._shards.shape) != 2 or holds != "patch tokens":
            raise SourceError(
                f"{folder} holds no patch tokens, but {holds}: arrays of shape {self._shards.shape}", path=folder
            )
        try:
            self._rows = self._shards.rows_for(keys)
        except UnknownKeyError as error:
            twins = (
                " (mirrored twins have tokens of their own: 'gmem-bank tokens --flip')"
                if gmem_bank.FLIP_SUFFIX in str(error.key)
                else ""
            )
            raise SourceError(
                f"{error}{twins}: write them with 'gmem-bank tokens' from this bank", path=folder, key=error.key
            ) from error
        self.num_tokens, self.dim = self._shards.shape

    def fit(self, grid: int) -> None:
        """Prepare for a model of grid×grid tokens; raises ConfigError where the encoder's cannot be brought to it."""
        side = math.isqrt(self.num_tokens)
        if side * side != self.num_tokens:
            raise ConfigError(f"{self.num_tokens} patch tokens form no square grid", key="data.tokens")
        if side != grid and self._resampling == "none":
            raise ConfigError(
                f"the encoder has {side}×{side} patch tokens, the model {grid}×{grid}: set data.token_resampling='bilinear', or "
                "another model.patch_size", key="data.token_resampling",
            )  # fmt: skip
        self._grid = grid

    def require_sound(self) -> None:
        """Read the files through once; raises CorruptError for one that is not what was written."""
        self._shards.require_sound()

    def remark(self, bank: Mapping[str, Any]) -> str:
        """Return what is odd about them beside a bank, of which `conditioning.record_of` is given: another encoder; else ""."""
        try:
            encoder = gmem_bank.EncoderSpec.from_json(self._shards.facts.get("encoder"))
        except FormatError:
            return f"{self._shards.folder} does not say which encoder made its patch tokens"
        if encoder.fingerprint == bank["encoder_fingerprint"]:
            return ""
        return f"patch tokens are those of {encoder.describe()}, while the bank holds snippets of {bank['encoder']}"

    def record(self) -> dict[str, Any]:
        """Return what a checkpoint remembers of them."""
        encoder = self._shards.facts.get("encoder")
        return {"num_tokens": self.num_tokens, "dim": self.dim, "encoder": encoder, "resampling": self._resampling}

    def __call__(self, places: NDArray[np.int64]) -> Tensor:
        """Return the (B, G·G, P) float32 tokens of rows by place."""
        tokens = torch.from_numpy(self._shards.read(self._rows[places]))
        side = math.isqrt(self.num_tokens)
        if side == self._grid:
            return tokens
        image = tokens.transpose(1, 2).reshape(len(tokens), self.dim, side, side)
        size = (self._grid, self._grid)
        resized = functional.interpolate(image, size, mode=self._resampling, antialias=self._grid < side)
        return resized.flatten(2).transpose(1, 2).contiguous()
