"""From pixels to what the model draws, and back: pixels themselves, or the latents of an autoencoder.

Every tokenizer gives and takes normalised latents. What it is, its per-channel mean and standard deviation included, is its
record: JSON that checkpoints and folders of latents keep, so that samples are decoded by exactly what training used.

Shapes: B batch, C channels of the images, H×W pixels, c·h·w latent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gmem_bank.errors import CheckpointError, ConfigError, suggest
from gmem_gen.autoencoders import AUTOENCODERS, VARIATIONAL, LazyAutoencoder, Weights
from gmem_gen.model import LatentShape

PIXELS = "pixels"
TOKENIZERS = (PIXELS, *AUTOENCODERS)
Record = Mapping[str, Any]
ENCODED_PIXELS = 32 * 256 * 256
"""Of the images that an autoencoder is given at a time, so that memory does not depend on the batch."""


@runtime_checkable
class Tokenizer(Protocol):
    """Turns images into what the model draws, and back."""

    @property
    def name(self) -> str:
        """One of TOKENIZERS."""

    @property
    def latent(self) -> LatentShape:
        """(c, h = w)."""

    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Return (B, c, h, w) float32 normalised latents of (B, H, W, C) uint8 images, on the CPU."""

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return (B, H, W, C) uint8 images of (B, c, h, w) normalised latents on any device."""

    def record(self) -> dict[str, Any]:
        """Return all that `make_tokenizer` needs, as JSON."""


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """The per-channel statistics of latents; (z − mean) / std is what the model learns."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    """Positive; 1 for a channel that is constant."""

    @classmethod
    def none(cls, channels: int) -> Normalisation:
        """Return the one that changes nothing."""
        return cls(mean=(0.0,) * channels, std=(1.0,) * channels)

    def apply(self, latents: Tensor) -> Tensor:
        """Return normalised float32 latents (B, c, h, w)."""
        mean, std = self._shaped(latents.device)
        return (latents.float() - mean) / std

    def undo(self, latents: Tensor) -> Tensor:
        """Return what an autoencoder decodes for normalised latents (B, c, h, w)."""
        mean, std = self._shaped(latents.device)
        return latents.float() * std + mean

    def _shaped(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=torch.float32, device=device) for values in (self.mean, self.std))
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def to_bytes(values: Tensor) -> NDArray[np.uint8]:
    """Return (B, H, W, C) uint8 for (B, C, H, W) values in [−1, 1], clipped and rounded to nearest."""
    scaled = (values.float().cpu() + 1.0) * 127.5
    return scaled.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()


def to_values(images: NDArray[np.uint8]) -> Tensor:
    """Return (B, C, H, W) float32 in [−1, 1] for (B, H, W, C) uint8."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0


class PixelTokenizer:
    """Pixels in [−1, 1]: no download, nothing lost but what 8 bits lose."""

    name = PIXELS

    def __init__(self, size: int, channels: int) -> None:
        self.latent = LatentShape(channels=channels, size=size)

    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Return (B, C, H, W) float32 in [−1, 1] for (B, H, W, C) uint8."""
        return to_values(images)

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return (B, H, W, C) uint8 for (B, C, H, W), clipped and rounded to nearest."""
        return to_bytes(latents)

    def record(self) -> dict[str, Any]:
        """Return name, image size and channels."""
        return {"name": self.name, "image_size": self.latent.size, "channels": self.latent.channels}


class AutoencoderTokenizer:
    """Latents of an autoencoder, normalised; its weights are read when they are first needed.

    Args:
        autoencoder: the network, or where it is.
        image_size: H = W.
        latent: of such images.
        normalisation: of the latents.
    """

    def __init__(
        self, autoencoder: LazyAutoencoder, image_size: int, latent: LatentShape, normalisation: Normalisation
    ) -> None:
        self._autoencoder, self.image_size = autoencoder, image_size
        self.latent, self.normalisation = latent, normalisation
        self.name = autoencoder.name

    @property
    def device(self) -> str:
        """Where the autoencoder computes."""
        return self._autoencoder.device

    def load(self) -> None:
        """Read the weights now; raises EncoderError where they cannot be had, or are others than recorded."""
        self._autoencoder.shape()

    def with_normalisation(self, normalisation: Normalisation) -> AutoencoderTokenizer:
        """Return the same tokenizer with other statistics."""
        return AutoencoderTokenizer(self._autoencoder, self.image_size, self.latent, normalisation)

    def encode(self, images: NDArray[np.uint8]) -> Tensor:
        """Return (B, c, h, w) float32 normalised latents for (B, H, W, 3) uint8."""
        return self.normalisation.apply(self.encode_raw(images))

    def encode_raw(self, images: NDArray[np.uint8]) -> Tensor:
        """Return (B, c, h, w) float32 latents as the autoencoder gives them."""
        at_a_time = max(1, ENCODED_PIXELS // self.image_size**2)
        parts = [images[start : start + at_a_time] for start in range(0, len(images), at_a_time)]
        return torch.cat([self._autoencoder.encode(to_values(part), part).float().cpu() for part in parts])

    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Return (B, H, W, 3) uint8 for (B, c, h, w)."""
        at_a_time = max(1, ENCODED_PIXELS // self.image_size**2)
        raw = self.normalisation.undo(latents)
        return np.concatenate([to_bytes(self._autoencoder.decode(part)) for part in torch.split(raw, at_a_time)])

    def record(self) -> dict[str, Any]:
        """Return name, weights and their sha256, sizes, and the statistics."""
        return {
            **self._autoencoder.record(), "image_size": self.image_size, "channels": 3,
            "latent": {"channels": self.latent.channels, "size": self.latent.size},
            "mean": list(self.normalisation.mean), "std": list(self.normalisation.std),
        }  # fmt: skip


def check_name(name: str) -> str:
    """Return the name of a tokenizer; raises ConfigError for an unknown one."""
    if name not in TOKENIZERS:
        raise ConfigError(
            f"unknown tokenizer {name!r} (there are: {', '.join(TOKENIZERS)}).{suggest(name, TOKENIZERS)}",
            key="data.tokenizer",
        )
    return name


class TokenizerMaker:
    """Makes tokenizers for a new training, with statistics that change nothing.

    Args:
        name: one of TOKENIZERS.
        weights: where an autoencoder's are; None: its own repository on the hub.
        device: where the autoencoder computes.

    Raises:
        ConfigError: unknown name; a sample of a posterior of one that has none.
    """

    def __init__(self, name: str, weights: Weights | None = None, device: str = "cpu") -> None:
        self.name = check_name(name)
        if weights is not None and weights.posterior != "mean" and name not in VARIATIONAL:
            raise ConfigError(
                f"tokenizer {name!r} makes one latent of an image, and no distribution to draw a sample from: posterior must be "
                "'mean'", key="data.posterior",
            )  # fmt: skip
        self._autoencoder = None if name == PIXELS else LazyAutoencoder(name, weights or Weights(), device=device)

    @property
    def factor(self) -> int:
        """Pixels on a side of one latent pixel; reads the weights."""
        return 1 if self._autoencoder is None else self._autoencoder.shape()[0]

    def make(self, image_size: int, channels: int = 3) -> Tokenizer:
        """Return a tokenizer.

        Args:
            image_size: side of the images in pixels.
            channels: of the images: 3, or for pixels 1.

        Raises:
            ConfigError: sizes that do not fit.
            GMemError: the weights cannot be had.
        """
        if self._autoencoder is None:
            return PixelTokenizer(image_size, channels)
        if channels != 3:
            raise ConfigError(f"tokenizer {self.name!r} takes colour images: set data.channels=3", key="data.channels")
        factor, latent_channels = self._autoencoder.shape()
        if image_size % factor:
            raise ConfigError(
                f"tokenizer {self.name!r} makes one latent of {factor}×{factor} pixels: data.image_size must be a multiple of "
                f"that, got {image_size}",
                key="data.image_size",
            )
        latent = LatentShape(channels=latent_channels, size=image_size // factor)
        return AutoencoderTokenizer(self._autoencoder, image_size, latent, Normalisation.none(latent_channels))


def new_tokenizer(
    name: str, image_size: int, channels: int, *, weights: Weights | None = None, device: str = "cpu"
) -> Tokenizer:
    """Return a tokenizer for a new training in one call; see `TokenizerMaker`."""
    return TokenizerMaker(name, weights, device).make(image_size, channels)


def make_tokenizer(
    record: Record | str, latent: LatentShape | None = None, *, weights: str = "", device: str = "cpu"
) -> Tokenizer:
    """Return the tokenizer that a checkpoint or a folder of latents recorded.

    Args:
        record: from `Tokenizer.record`; old checkpoints have only the name "pixels".
        latent: what the checkpoint's model draws; only such an old record needs it.
        weights: folder or file with an autoencoder's weights, where the recorded place is gone; they must be the same.
        device: where an autoencoder computes.

    Raises:
        CheckpointError: the record cannot be read.
        ConfigError: an unknown tokenizer.
    """
    facts = upgraded(record, latent)
    try:
        if check_name(str(facts["name"])) == PIXELS:
            return PixelTokenizer(int(facts["image_size"]), int(facts["channels"]))
        shape = LatentShape(channels=int(facts["latent"]["channels"]), size=int(facts["latent"]["size"]))
        normalisation = Normalisation(mean=tuple(map(float, facts["mean"])), std=tuple(map(float, facts["std"])))
        if {len(normalisation.mean), len(normalisation.std)} != {shape.channels} or not min(normalisation.std) > 0:
            raise ValueError("its statistics do not fit its channels")
        autoencoder = LazyAutoencoder.from_record(facts, place=weights, device=device)
        return AutoencoderTokenizer(autoencoder, int(facts["image_size"]), shape, normalisation)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"the record of the tokenizer cannot be read: {error!r}") from error


def upgraded(record: Record | str, latent: LatentShape | None) -> dict[str, Any]:
    """Return a tokenizer's record, of an old checkpoint's name too."""
    if isinstance(record, str):
        sizes = {} if latent is None else {"image_size": latent.size, "channels": latent.channels}
        return {"name": record, **sizes}
    return dict(record)


def with_statistics(tokenizer: AutoencoderTokenizer, record: Record | str | None) -> AutoencoderTokenizer:
    """Return the tokenizer with the statistics of a record, or as it is where there is none."""
    if record is None or isinstance(record, str):
        return tokenizer
    return tokenizer.with_normalisation(Normalisation(mean=tuple(record["mean"]), std=tuple(record["std"])))


def require_same(stored: Record | str, tokenizer: Tokenizer, where: str) -> None:
    """Raise ConfigError unless a tokenizer gives the latents that a stored one gave; where its weights lie may differ.

    Args:
        stored: the record.
        tokenizer: offered now.
        where: what was made with the stored one, for the message.
    """
    before, now = upgraded(stored, tokenizer.latent), tokenizer.record()
    facts = ("name", "image_size", "channels", "weights_sha256", "posterior")
    changed = [
        f"{fact} was {before.get(fact)!r}, is {now.get(fact)!r}" for fact in facts if before.get(fact) != now.get(fact)
    ]
    if changed:
        raise ConfigError(f"{where} has other latents: of its tokenizer {'; '.join(changed)}", key="data.tokenizer")
