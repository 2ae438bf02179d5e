"""What an encoder offers, and what its factory is told.

Shapes: B images, S×S pixels, T patches, D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gmem_bank.provenance import EncoderSpec

DEFAULT_BATCH_SIZE = 32
"""Images a call where nobody asks for another number: on a CPU more gain nothing."""


@runtime_checkable
class Encoder(Protocol):
    """What every encoder offers."""

    @property
    def spec(self) -> EncoderSpec:
        """What decides the numbers; `spec.preprocessing["crop_size"]` is S."""

    def encode(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, D) float32 raw embeddings of (B, S, S, 3) uint8 images; the space is applied by the bank.

        It is called from one thread at a time, which may be another than the one that made the encoder.
        """


@runtime_checkable
class SupportsPrecision(Protocol):
    """An encoder that may run in less than float32, and can say what that costs."""

    def cosine_to_fp32(self, images: NDArray[np.uint8]) -> float | None:
        """Return the mean cosine between the embeddings of (B, S, S, 3) images and those of float32; None: not known."""


@runtime_checkable
class SupportsBatchSize(Protocol):
    """An encoder that knows how many images it is best given at a time."""

    def best_batch_size(self) -> int:
        """Return the number: the same on machines of a kind, so that builds there give the same bytes."""


@runtime_checkable
class SupportsPatchTokens(Protocol):
    """An encoder that has an embedding for every patch of an image."""

    def encode_tokens(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (B, T, D) float32 patch tokens, row by row of the image, of (B, S, S, 3) images; raises EncoderError."""


@runtime_checkable
class SupportsText(Protocol):
    """An encoder whose embeddings of texts and of images can be compared."""

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return (B, D) float32 raw embeddings; raises EncoderError where the model has no text tower."""


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """What a factory is told."""

    weights: Path | None = None
    """Local folder with the weights; None: the hub cache or the hub."""
    device: str = "auto"
    """"auto", "cpu", "cuda", "cuda:1", "mps"."""
    space: str = "unit"
    """Space that the snippets will be stored in."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Encoder-specific settings; a factory refuses those it does not know."""
    reloading: bool = False
    """True: for a bank that is there, whose settings are followed even where others would be advised."""
