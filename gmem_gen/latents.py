"""Latents of a bank's images: encoded once into shards by key, with the statistics of all of them, and read for training.

Shapes: N latents, M training images, B batch, c·h·w latent, S×S pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

import gmem_bank
from gmem_bank.errors import ConfigError, SourceError
from gmem_gen import conditioning
from gmem_gen.autoencoders import Weights
from gmem_gen.channel_moments import ChannelMoments
from gmem_gen.conditioning import Bank, ImagesFrom, Join
from gmem_gen.config import DataConfig
from gmem_gen.data import default_image_size, to_pixels
from gmem_gen.outputs import Progress, no_progress
from gmem_gen.tokenizers import AutoencoderTokenizer, Record, Tokenizer, TokenizerMaker, make_tokenizer, with_statistics

HOLDS = "latents"
DEFAULT_SIDE = 256
SHARD_BYTES = 32 << 20
"""Most that a shard's latents take as f32."""
SHARD_ROWS = 1024
BATCH_SIZES = {"cpu": 16, "cuda": 64}
PROBES = 16
"""Images looked at to see whether the latents of a bank that was edited since are of the same images."""
THUMBNAIL = 8
DECODERS_DIFFER = 8
"""Of 255: more than decoders of the same file ever differ by in the mean of a 64th of an image."""


def encode(
    bank: str | os.PathLike[str] | Bank,
    tokenizer: str | Tokenizer,
    output: str | os.PathLike[str],
    *,
    weights: Weights | None = None,
    image_size: int | None = None,
    device: str = "cpu",
    join: Join | None = None,
    images: ImagesFrom = None,
    allow_missing: bool = False,
    flip: bool = False,
    dtype: str = "f16",
    batch_size: int | None = None,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> gmem_bank.ShardsReport:
    """Encode the images of a bank into a folder of latents by key; the same call again goes on where the last one stopped.

    Args:
        bank: a bank, or where it is.
        tokenizer: sd-vae, taesd, dc-ae, taef2 or va-vae; or one that is there, whose statistics are not used.
        output: folder for the shards.
        weights: of a tokenizer by name; None: its own repository on the hub.
        image_size: S for a tokenizer by name; None: 256, or the short side of the smallest image where that is smaller.
        device: for a tokenizer by name.
        join: which rows; None: all with an image.
        images: where the images are, instead of where the provenance says.
        allow_missing: leave out rows whose image is gone, instead of stopping.
        flip: also the mirrored twin of every image, under its key with "#flip"; twins that are rows have theirs anyway.
        dtype: "f16", "f32" or "bf16".
        batch_size: images per call of the autoencoder; None: 16 on a CPU, 64 on a GPU.
        num_workers: processes that decode images ahead; None: one a core where there are enough images.
        overwrite: replace what was encoded otherwise.
        progress: told images done and images in all.

    Raises:
        SourceError: images are missing or cannot be decoded.
        OutputExistsError: the folder holds something else.
        ConfigError: pixels are no latents; a bank that is not a file.
    """
    opened = conditioning.open_bank(bank) if isinstance(bank, (str, os.PathLike)) else bank
    if not isinstance(opened, gmem_bank.MemoryBank):
        raise ConfigError("latents are encoded from the images of a bank file; of other banks set data.encode_on_the_fly=true",
                          key="data.encode_on_the_fly")  # fmt: skip
    join = join or conditioning.join_images(opened, images, allow_missing=allow_missing)
    if isinstance(tokenizer, str):
        maker = TokenizerMaker(tokenizer, weights, device)
        size = image_size or default_image_size(opened, join, images, most=DEFAULT_SIDE, multiple=maker.factor)
        tokenizer = maker.make(size)
    if not isinstance(tokenizer, AutoencoderTokenizer):
        raise ConfigError(
            "pixels are kept as they are: latents are of sd-vae, taesd, dc-ae, taef2 or va-vae", key="tokenizer"
        )
    batch = batch_size or BATCH_SIZES.get(tokenizer.device.split(":")[0], BATCH_SIZES["cpu"])
    latent_bytes = 4 * tokenizer.latent.channels * tokenizer.latent.size**2
    return gmem_bank.write_image_shards(
        opened, _work(tokenizer, conditioning.record_of(opened)), output, rows=join.rows, dtype=dtype, flip=flip,
        images=images, batch_size=batch, rows_per_shard=max(batch, min(SHARD_ROWS, SHARD_BYTES // latent_bytes)),
        num_workers=num_workers, overwrite=overwrite, progress=progress,
    )  # fmt: skip


def _work(tokenizer: AutoencoderTokenizer, bank: Mapping[str, Any]) -> gmem_bank.ImageWork:
    """Return what is made of images: their latents, small pictures of what these are of, and sums for the statistics."""
    channels = tokenizer.latent.channels
    record = tokenizer.record()

    def make(crops: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return {
            "values": tokenizer.encode_raw(crops).numpy(),
            "thumbnails": np.stack([thumbnail(crop) for crop in crops]),
        }

    def of_shard(values: NDArray[np.float32]) -> NDArray[np.float64]:
        moments = ChannelMoments(channels)
        moments.add(values)
        return moments.to_array()

    def facts(sums: Iterable[NDArray[np.float64]]) -> dict[str, Any]:
        moments = ChannelMoments(channels)
        for part in sums:
            moments.merge(part)
        return {"holds": HOLDS, "tokenizer": {**record, **moments.statistics()}, "bank": dict(bank)}

    plan = {name: value for name, value in record.items() if name not in ("mean", "std", "weights", "revision")}
    return gmem_bank.ImageWork(
        preprocessing={"preset": "square", "crop": "adm", "crop_size": tokenizer.image_size, "alpha": "over white"},
        make=make, plan={"tokenizer": plan}, of_shard=of_shard, facts=facts,
    )  # fmt: skip


def thumbnail(crop: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the (8, 8, 3) means of an (S, S, 3) crop: enough to tell images apart, whoever decoded them."""
    return np.asarray(Image.fromarray(crop).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX))


class LatentImages:
    """Training images that were encoded before: latents read by key, each by one read of its own bytes.

    Args:
        shards: from `open_latents`.
        join: rows whose keys are all there.
        tokenizer: its statistics normalise what is read.
    """

    def __init__(self, shards: gmem_bank.Shards, join: Join, tokenizer: Tokenizer) -> None:
        assert isinstance(tokenizer, AutoencoderTokenizer)
        self._shards, self._rows = shards, shards.rows_for(join.keys)
        self.tokenizer, self.latent = tokenizer, tokenizer.latent

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, places: NDArray[np.int64]) -> Tensor:
        """Return (B, c, h, w) float32 normalised latents."""
        stored = self._shards.read_stored(self._rows[places])
        latents = torch.from_numpy(stored)
        if stored.dtype == np.uint16:
            latents = latents.view(torch.bfloat16)
        return self.tokenizer.normalisation.apply(latents)


def open_latents(data: DataConfig, *, device: str = "cpu") -> tuple[gmem_bank.Shards, AutoencoderTokenizer]:
    """Open the folder of latents that a configuration names, and what made them.

    Raises:
        SourceError: no such folder, or unfinished.
        ConfigError: it holds something else, or latents of another tokenizer or image size than the configuration names.
    """
    shards = gmem_bank.Shards(data.latents)
    record = shards.facts.get("tokenizer")
    if shards.facts.get("holds") != HOLDS or not isinstance(record, dict):
        raise ConfigError(
            f"{data.latents} holds {shards.facts.get('holds', 'something else')}, not latents: 'gmem-gen encode' writes those",
            key="data.latents",
        )
    for name, wanted, found in (("tokenizer", data.tokenizer, record.get("name")),
                                ("image_size", data.image_size, record.get("image_size"))):  # fmt: skip
        if wanted and wanted != found:
            raise ConfigError(
                f"the latents in {data.latents} were made with {name} {found!r}, and data.{name} is {wanted!r}: leave that out, "
                "or encode the images again",
                key=f"data.{name}",
            )
    tokenizer = make_tokenizer(record, weights=data.tokenizer_weights, device=device)
    assert isinstance(tokenizer, AutoencoderTokenizer)
    if shards.shape != (tokenizer.latent.channels, tokenizer.latent.size, tokenizer.latent.size):
        raise ConfigError(f"the latents in {data.latents} are not of the shape that was recorded", key="data.latents")
    if data.tokenizer_weights:
        tokenizer.load()  # other weights are told now, not with the first samples
    return shards, tokenizer


def join_latents(bank: Bank, shards: gmem_bank.Shards, size: int, images: ImagesFrom, *, allow_missing: bool) -> Join:
    """Return the rows to train on: every active row whose key has a latent, whether or not its image is still there.

    Args:
        bank: read through the interface.
        shards: the latents.
        size: S that they were made at.
        images: override of the recorded folders, for a look at some images where the bank has changed.
        allow_missing: leave out rows that have an image and no latent, instead of stopping.

    Raises:
        SourceError: latents are missing (how many, which, what to do), or are of other images.
    """
    join = conditioning.join_keys(
        bank, shards.holds, allow_missing=allow_missing, what=f"latents in {shards.folder}",
        advice="encode them with 'gmem-gen encode' (a new folder, or --overwrite)",
    )  # fmt: skip
    made_of = shards.facts.get("bank")
    if not isinstance(made_of, dict) or made_of.get("fingerprint") != bank.fingerprint:
        require_same_images(bank, shards, join, size, images)
    return join


def require_same_images(bank: Bank, shards: gmem_bank.Shards, join: Join, size: int, images: ImagesFrom) -> None:
    """Look at some images that are there, and raise SourceError where one is not what its latent was made of."""
    places = np.unique(np.linspace(0, len(join.rows) - 1, min(PROBES, len(join.rows))).astype(np.int64))
    known = shards.entry("thumbnails")[shards.rows_for([join.keys[place] for place in places])]
    for place, wanted in zip(places.tolist(), known.astype(np.int16), strict=True):
        try:
            image = conditioning.read_image(bank, int(join.rows[place]), images)
        except SourceError:
            continue  # gone: nothing to compare
        if np.abs(thumbnail(to_pixels(image, size, 3)) - wanted).max() > DECODERS_DIFFER:
            raise SourceError(
                f"the latents in {shards.folder} are of another bank: the image of row {join.keys[place]!r} is not the one that "
                "its latent was made of. Encode the images of this bank into another folder",
                path=shards.folder,
                key=join.keys[place],
            )


def open_latent_images(
    shards: gmem_bank.Shards, join: Join, tokenizer: AutoencoderTokenizer, record: Record | str | None
) -> LatentImages:
    """Return latents normalised by their own statistics, or by those of the training that goes on."""
    return LatentImages(shards, join, with_statistics(tokenizer, record))
