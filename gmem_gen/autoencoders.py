"""Pretrained autoencoders: where their weights are, and the one way that all of them are called.

Shapes: B batch, H×W pixels, c·h·w latent.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from gmem_bank.errors import EncoderError, GMemError

AUTOENCODERS = {
    "sd-vae": ("diffusers_autoencoders", "stabilityai/sd-vae-ft-mse"),
    "taesd": ("diffusers_autoencoders", "madebyollin/taesd"),
    "dc-ae": ("diffusers_autoencoders", "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers"),
    "taef2": ("taef2", ""),
    "va-vae": ("va_vae", ""),
}
"""Name → module that loads it, and repository on the hub where no weights are given ("": they must be)."""
VARIATIONAL = ("sd-vae", "va-vae")
"""Those that give a distribution of latents, from which a sample can be drawn; the others give one latent an image."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Where an autoencoder's weights are, and which latent of its posterior is taken."""

    place: str = ""
    """A folder or file, or "OWNER/NAME" on the hub; "": the autoencoder's own repository."""
    revision: str = ""
    """Of the hub: branch, tag or commit; "": the main branch."""
    posterior: str = "mean"
    """"mean", or "sample": drawn for each image, by its pixels, so that the same image has the same latent."""
    sha256: str = ""
    """What they must be; "": any."""


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """A loaded network.

    Both functions take and give images (B, 3, H, W) float32 in [−1, 1] and latents (B, c, h, w) as the network has them.
    """

    module: nn.Module
    factor: int
    """H / h."""
    channels: int
    """c."""
    posterior: Callable[[Tensor], tuple[Tensor, Tensor | None]]
    """Images → mean and, where the network has one, standard deviation of the latents."""
    decode: Callable[[Tensor], Tensor]
    place: str
    revision: str | None
    sha256: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    """More for the record: the model's own scaling factor, the software."""


class LazyAutoencoder:
    """An autoencoder that is loaded when it is first needed; calls from several threads are safe.

    Args:
        name: one of AUTOENCODERS.
        weights: where they are.
        device: where it computes, in float32.
        record: what a checkpoint remembers of it, where there is one; it is then not loaded to be described.
    """

    def __init__(
        self, name: str, weights: Weights, *, device: str = "cpu", record: Mapping[str, Any] | None = None
    ) -> None:
        self.name, self._weights, self.device = name, weights, device
        self._record = dict(record) if record is not None else None
        self._lock = threading.Lock()
        self._loaded: Autoencoder | None = None

    @classmethod
    def from_record(cls, record: Mapping[str, Any], *, place: str = "", device: str = "cpu") -> LazyAutoencoder:
        """Return what `record` described, from another place where one is given; raises KeyError."""
        kept = {name: record[name] for name in ("name", "weights", "weights_sha256", "posterior")}
        own = {
            name: record[name] for name in ("revision", "scaling_factor", "shift_factor", "software") if name in record
        }
        weights = Weights(
            place=place or str(kept["weights"]), revision="" if place else str(own.get("revision") or ""),
            posterior=str(kept["posterior"]), sha256=str(kept["weights_sha256"]),
        )  # fmt: skip
        if place:  # what is made from here on finds them there
            own.pop("revision", None)
            kept["weights"] = Path(place).resolve().as_posix() if Path(place).exists() else place
        return cls(str(kept["name"]), weights, device=device, record={**kept, **own})

    def _load(self) -> Autoencoder:
        with self._lock:
            if self._loaded is None:
                module, repository = AUTOENCODERS[self.name]
                place = self._weights.place or repository
                if not place:
                    raise EncoderError(
                        f"tokenizer {self.name!r} needs its weights: --tokenizer-weights (data.tokenizer_weights)",
                        key=self.name,
                    )
                loaded = self._read(module, place)
                _require_same_weights(self.name, loaded, self._weights.sha256)
                # convolutions are a third faster with channels last
                loaded.module.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
                self._loaded = loaded
        return self._loaded

    def _read(self, module: str, place: str) -> Autoencoder:
        load = import_module(f"gmem_gen.{module}").load
        try:
            loaded: Autoencoder = load(
                self.name, place, self._weights.revision or None, known=bool(self._weights.sha256)
            )
        except GMemError as error:
            if self._record is None:
                raise
            raise EncoderError(
                f"{error} (These are the weights that the latents were made with, {self._weights.sha256[:8]}. Where they are now "
                "can be given with --tokenizer-weights.)",
                key=self.name,
            ) from error
        return loaded

    def shape(self) -> tuple[int, int]:
        """Return (H / h, c)."""
        loaded = self._load()
        return loaded.factor, loaded.channels

    def encode(self, values: Tensor, images: NDArray[np.uint8]) -> Tensor:
        """Return the (B, c, h, w) latents of (B, 3, H, W) values in [−1, 1], on the autoencoder's device.

        Args:
            values: what it sees.
            images: the same as (B, H, W, 3) uint8: they decide what is drawn of a posterior.
        """
        loaded = self._load()
        with torch.inference_mode():
            mean, std = loaded.posterior(values.to(self.device).contiguous(memory_format=torch.channels_last))
            if self._weights.posterior == "mean" or std is None:
                return mean
            return mean + std * torch.stack([_noise(image, tuple(mean.shape[1:])) for image in images]).to(mean)

    def decode(self, latents: Tensor) -> Tensor:
        """Return (B, 3, H, W) values, about [−1, 1], for (B, c, h, w) latents."""
        loaded = self._load()
        with torch.inference_mode():
            return loaded.decode(latents.to(self.device).contiguous(memory_format=torch.channels_last))

    def record(self) -> dict[str, Any]:
        """Return what tells this autoencoder from others, and where its weights are, as JSON."""
        if self._record is not None:
            return dict(self._record)
        loaded = self._load()
        return {
            "name": self.name, "weights": loaded.place, "weights_sha256": loaded.sha256, "posterior": self._weights.posterior,
            **({"revision": loaded.revision} if loaded.revision else {}), **loaded.facts,
        }  # fmt: skip


def _require_same_weights(name: str, loaded: Autoencoder, wanted: str) -> None:
    if wanted and loaded.sha256 != wanted:
        raise EncoderError(
            f"{loaded.place} holds other weights of {name!r} ({loaded.sha256[:8]}) than the latents were made with "
            f"({wanted[:8]}): give those with --tokenizer-weights",
            key=name,
        )


def _noise(image: NDArray[np.uint8], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal numbers that an image decides, whatever batch it is in."""
    seed = int.from_bytes(hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=7).digest(), "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
