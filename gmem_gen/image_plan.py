"""How a training gets its images: as pixels, as latents that lie ready, or as latents that are made first or on the way.

Shapes: M training images, c·h·w latent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gmem_bank.errors import ConfigError, GMemError
from gmem_gen import conditioning, tokenizers
from gmem_gen.autoencoders import Weights
from gmem_gen.channel_moments import ChannelMoments
from gmem_gen.conditioning import Bank, ImagesFrom, Join
from gmem_gen.config import Config, DataConfig
from gmem_gen.data import DEFAULT_SIZE, PixelCache, PixelImages, TrainingImages, default_image_size
from gmem_gen.latents import (
    DEFAULT_SIDE,
    encode,
    join_latents,
    open_latent_images,
    open_latents,
    require_same_images,
)
from gmem_gen.model import LatentShape
from gmem_gen.outputs import Progress
from gmem_gen.tokenizers import (
    PIXELS,
    AutoencoderTokenizer,
    Normalisation,
    Record,
    Tokenizer,
    TokenizerMaker,
    with_statistics,
)

STATISTICS_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """What will be trained on, before minutes go into preparing it."""

    join: Join
    data: DataConfig
    """With tokenizer and image size resolved."""
    latent: LatentShape
    open: Callable[[Path, Progress], TrainingImages]
    """The run's cache folder, and what is told images done and images in all → the images of `join`, in its order."""


def plan_images(
    bank: Bank,
    images: ImagesFrom,
    config: Config,
    *,
    stored: Config | None = None,
    record: Record | str | None = None,
    device: str = "cpu",
) -> ImagePlan:
    """Join rows to images or latents, and choose size and tokenizer where they were left to us; prepares nothing yet.

    Args:
        bank: read through the interface.
        images: override of the recorded folders.
        config: as asked for.
        stored: of the training that goes on: it keeps what was chosen when it began.
        record: its tokenizer, whose statistics stay, whatever the images are now.
        device: where an autoencoder computes.

    Raises:
        SourceError: images or latents are missing.
        ConfigError: a tokenizer, size or folder of latents that does not fit.
    """
    planned = _of_latents if config.data.latents else _of_images
    plan, tokenizer = planned(bank, images, _continued(config, stored), record, device)
    if record is not None:
        tokenizers.require_same(record, tokenizer, "the training that goes on here")
    return plan


def _continued(config: Config, stored: Config | None) -> Config:
    """Return the configuration with image size and tokenizer of the training that goes on, where they are not given."""
    if stored is None:
        return config
    data = dataclasses.replace(
        config.data, image_size=config.data.image_size or stored.data.image_size,
        tokenizer=config.data.tokenizer or stored.data.tokenizer,
    )  # fmt: skip
    return dataclasses.replace(config, data=data)


def _of_latents(
    bank: Bank, images: ImagesFrom, config: Config, record: Record | str | None, device: str
) -> tuple[ImagePlan, Tokenizer]:
    """Plan a training on latents that lie ready."""
    shards, tokenizer = open_latents(config.data, device=device)
    join = join_latents(bank, shards, tokenizer.image_size, images, allow_missing=config.data.allow_missing)
    facts = tokenizer.record()
    _require_made_so(config.data, facts)
    data = dataclasses.replace(
        config.data, tokenizer=tokenizer.name, image_size=tokenizer.image_size, posterior=facts["posterior"]
    )

    def open_images(_folder: Path, progress: Progress) -> TrainingImages:
        shards.require_sound(progress)  # a flipped bit would otherwise be learned from without a word
        return open_latent_images(shards, join, tokenizer, record)

    return ImagePlan(join=join, data=data, latent=tokenizer.latent, open=open_images), tokenizer


def _require_made_so(data: DataConfig, facts: Record) -> None:
    """Raise ConfigError for a setting that says how latents are made, beside latents that were made otherwise."""
    made = {name: facts[name] for name in ("channels", "posterior")} | {
        "tokenizer_revision": "",
        "statistics_images": 0,
    }
    usual = DataConfig()
    for name, there in made.items():
        asked = getattr(data, name)
        if asked not in (there, getattr(usual, name)):
            raise ConfigError(
                f"data.{name} is {asked!r}, which the latents in {data.latents} cannot follow: they are made already. Leave it "
                "out, or encode the images again", key=f"data.{name}",
            )  # fmt: skip


def _of_images(
    bank: Bank, images: ImagesFrom, config: Config, record: Record | str | None, device: str
) -> tuple[ImagePlan, Tokenizer]:
    """Plan a training on images: as pixels, or encoded first, or encoded as they are read."""
    data, name = config.data, config.data.tokenizer or PIXELS
    weights = Weights(place=data.tokenizer_weights, revision=data.tokenizer_revision, posterior=data.posterior)
    maker = TokenizerMaker(name, weights, device)
    join = conditioning.join_images(bank, images, allow_missing=data.allow_missing)
    multiple = maker.factor * max(1, config.model.patch_size)
    most = DEFAULT_SIZE if name == PIXELS else DEFAULT_SIDE
    size = data.image_size or default_image_size(bank, join, images, most=most, multiple=multiple)
    tokenizer = maker.make(size, data.channels)
    data = dataclasses.replace(data, tokenizer=name, image_size=size)

    def open_images(folder: Path, progress: Progress) -> TrainingImages:
        if isinstance(tokenizer, AutoencoderTokenizer) and not data.encode_on_the_fly:
            lying = dataclasses.replace(data, latents=str(folder / "latents"))
            if record is None or not _still_good(bank, join, images, lying, tokenizer):
                encode(bank, tokenizer, lying.latents, join=join, images=images, overwrite=True, progress=progress)
            shards, ready = open_latents(lying, device=device)
            return open_latent_images(shards, join, ready, record)
        cache = PixelCache(folder, bank, join, images, size=size, channels=data.channels, progress=progress)
        if not isinstance(tokenizer, AutoencoderTokenizer):
            return PixelImages(cache, tokenizer)
        known = with_statistics(tokenizer, record) if record is not None else _measured(tokenizer, cache, data)
        return PixelImages(cache, known)

    return ImagePlan(join=join, data=data, latent=tokenizer.latent, open=open_images), tokenizer


def _still_good(bank: Bank, join: Join, images: ImagesFrom, lying: DataConfig, tokenizer: AutoencoderTokenizer) -> bool:
    """Say whether the latents that a training began with are whole and of these images, wherever these lie and whenever changed.

    Files that were copied have other times, and their latents are the same; as in `join_latents` some images tell.
    """
    try:
        shards, made = open_latents(dataclasses.replace(lying, tokenizer_weights=""))  # only described
        tokenizers.require_same(made.record(), tokenizer, lying.latents)
        if not shards.holds(join.keys).all():
            return False
        require_same_images(bank, shards, join, tokenizer.image_size, images)
    except GMemError:
        return False  # derived data: made again
    return True


def _measured(tokenizer: AutoencoderTokenizer, cache: PixelCache, data: DataConfig) -> AutoencoderTokenizer:
    """Return the tokenizer with the statistics of so many of the images, spread evenly."""
    places = np.unique(np.linspace(0, len(cache) - 1, min(data.statistics_images, len(cache))).astype(np.int64))
    moments = ChannelMoments(tokenizer.latent.channels)
    for start in range(0, len(places), STATISTICS_BATCH):
        moments.add(tokenizer.encode_raw(cache.read(places[start : start + STATISTICS_BATCH])).numpy())
    return tokenizer.with_normalisation(Normalisation(**moments.statistics()))
