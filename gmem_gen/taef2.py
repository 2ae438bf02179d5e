"""TAEF2, a tiny autoencoder: 8×8 pixels to one latent of 32 channels, images in [0, 1].

Parameter names are places in a sequence of layers, as in its two published files, taef2_encoder.safetensors and
taef2_decoder.safetensors.

Shapes: B batch, H×W pixels, h = H/8, w = W/8.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import gmem_bank
from gmem_bank.errors import EncoderError
from gmem_gen.autoencoders import Autoencoder

WIDTH, CHANNELS, FACTOR = 64, 32, 8
ENCODER, DECODER = "taef2_encoder.safetensors", "taef2_decoder.safetensors"


class Block(nn.Module):
    """Three convolutions around a shortcut, after an optional look at groups of channels (`pool`)."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        convolutions = [nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])
        self.pool = (
            nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False), nn.GroupNorm(4, 4 * WIDTH), nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
            if pooled
            else None
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 64, H, W) for the same."""
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """3·tanh(z/3)."""

    def forward(self, z: Tensor) -> Tensor:
        """Return latents in (−3, 3)."""
        return torch.tanh(z / 3) * 3


def make_encoder() -> nn.Sequential:
    """Return the network from (B, 3, H, W) in [0, 1] to (B, 32, h, w)."""
    layers: list[nn.Module] = [nn.Conv2d(3, WIDTH, 3, padding=1), Block()]
    for last in (False, False, True):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1, bias=False), *(Block(pooled=last) for _ in range(3))]
    return nn.Sequential(*layers, nn.Conv2d(WIDTH, CHANNELS, 3, padding=1))


def make_decoder() -> nn.Sequential:
    """Return the network from (B, 32, h, w) to (B, 3, H, W), about [0, 1]."""
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(CHANNELS, WIDTH, 3, padding=1), nn.ReLU()]
    for number in range(3):
        layers += [*(Block(pooled=number == 0) for _ in range(3)), nn.Upsample(scale_factor=2)]
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, Block(), nn.Conv2d(WIDTH, 3, 3, padding=1))


def load(name: str, place: str, revision: str | None, *, known: bool) -> Autoencoder:  # noqa: ARG001 - there is no hub for it
    """Load both networks from a folder; raises EncoderError."""
    folder = Path(place)
    halves = {ENCODER: make_encoder(), DECODER: make_decoder()}
    for file, network in halves.items():
        _fill(network, folder / file)
    encoder, decoder = halves.values()
    return Autoencoder(
        module=nn.ModuleList([encoder, decoder]), factor=FACTOR, channels=CHANNELS,
        posterior=lambda images: (encoder((images + 1) / 2), None),
        decode=lambda latents: decoder(latents).clamp(0, 1) * 2 - 1,
        place=folder.resolve().as_posix(), revision=None,
        sha256=hashlib.sha256("".join(gmem_bank.sha256_of_file(folder / file) for file in halves).encode()).hexdigest(),
    )  # fmt: skip


def _fill(network: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise EncoderError(f"no file {path}: tokenizer 'taef2' takes a folder with {ENCODER} and {DECODER}", path=path)
    try:
        tensors = load_file(path)
        network.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        raise EncoderError(f"{path} does not hold the weights of TAEF2: {error}", path=path) from error
