"""Patch tokens of a bank's images, for losses that compare a generator's features with an encoder's (REPA, arXiv 2410.06940).

Shapes: T patch tokens of an image, D dimensions.
"""

from __future__ import annotations

import os

import numpy as np

from gmem_bank.bank import MemoryBank
from gmem_bank.batch_size import AUTO, BatchSize, resolve
from gmem_bank.encoders import Encoder, SupportsPatchTokens, require_same_encoder
from gmem_bank.encoding import run
from gmem_bank.errors import EncoderError
from gmem_bank.image_shards import ImageWork, ShardsReport, write_image_shards
from gmem_bank.interface import ImagesFrom
from gmem_bank.progress import Progress, no_progress

SHARD_BYTES = 16 << 20
"""Of f32 tokens: what an interrupted run may have to do again."""


def write_tokens(
    bank: MemoryBank,
    encoder: Encoder,
    output: str | os.PathLike[str],
    *,
    dtype: str = "f16",
    flip: bool = False,
    images: ImagesFrom = None,
    batch_size: BatchSize = AUTO,
    num_workers: int | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> ShardsReport:
    """Encode the images of a bank's active rows into a folder of shards by key (`Shards` reads it); resumable.

    Args:
        bank: rows without an image (arrays, interpolations) are left out.
        encoder: the one that made the bank, with patch tokens.
        output: folder for the shards.
        dtype: "f16", "f32" or "bf16".
        flip: also the mirrored twin of every image, under its key with "#flip".
        images: where the images are, instead of where the provenance says.
        batch_size: images per call of the encoder.
        num_workers: as in `build`.
        overwrite: replace shards that were made otherwise.
        progress: told images done and images in all.

    Raises:
        EncoderError: the encoder has no patch tokens.
        EncoderMismatchError: it did not make the bank.
        SourceError: an image is gone or cannot be decoded; finished shards stay, and the same call goes on.
        OutputExistsError: the folder holds something else.
    """
    require_same_encoder(encoder.spec, bank.encoder)
    if not isinstance(encoder, SupportsPatchTokens):
        raise EncoderError(
            f"encoder {encoder.spec.describe()} has no patch tokens: DINOv2 and other vision transformers have"
        )
    size = resolve(batch_size, encoder)
    blank = np.zeros((1, *[int(encoder.spec.preprocessing["crop_size"])] * 2, 3), np.uint8)
    work = ImageWork(
        preprocessing=encoder.spec.preprocessing,
        make=lambda crops: {"values": run(encoder, encoder.encode_tokens, crops)},
        plan={"encoder": encoder.spec.fingerprint, "software": encoder.spec.software},
        facts=lambda _: {"holds": "patch tokens", "encoder": encoder.spec.to_json()},
    )
    return write_image_shards(
        bank, work, output, dtype=dtype, flip=flip, images=images, batch_size=size,
        rows_per_shard=max(size, SHARD_BYTES // encoder.encode_tokens(blank).nbytes), num_workers=num_workers,
        overwrite=overwrite, progress=progress,
    )  # fmt: skip
