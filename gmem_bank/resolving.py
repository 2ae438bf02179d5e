"""What stands for one snippet or some, as snippets: a key, a concept, images, texts.

Shapes: B images or texts, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.batch_size import AUTO, BatchSize
from gmem_bank.encoders import Encoder, SupportsText, may_understand_text, reload_encoder, require_same_encoder
from gmem_bank.encoding import encode_in_memory
from gmem_bank.errors import ConfigError, EncoderError, MaskedRowError, SourceError, UnknownKeyError, suggest
from gmem_bank.progress import Progress, no_progress
from gmem_bank.sources import list_images
from gmem_bank.space import to_space

Load = Callable[[], Encoder]
"""Gives the encoder that a bank was made with; called only where something has to be encoded."""
CHUNK_VALUES = 1 << 20
"""Of a concept's snippets that are added up at a time."""


def snippet_of(bank: MemoryBank, item: str) -> NDArray[np.float32]:
    """Return the (D,) snippet of a concept (the mean of its active rows, in the bank's space) or of a key.

    Raises:
        UnknownKeyError: neither a concept nor a key; the nearest names are offered.
    """
    if item in bank.names:
        rows = bank.rows_of(item)
        if not len(rows):
            raise UnknownKeyError(f"every row of concept {item!r} in {bank.path} is masked", path=bank.path, key=item)
        step = max(1, CHUNK_VALUES // bank.dim)
        chunks = (bank.snippets(rows[start : start + step]) for start in range(0, len(rows), step))
        total = sum((chunk.sum(axis=0, dtype=np.float64) for chunk in chunks), np.zeros(bank.dim))
        return to_space((total / len(rows)).astype(np.float32)[None], bank.space).reshape(-1)
    row = bank.find_rows([item])
    if row[0] < 0:
        raise UnknownKeyError(
            f"{bank.path} has neither a concept nor a key {item!r}.{suggest(item, bank.names)} "
            f"'gmem-bank list {bank.path}' shows both",
            path=bank.path, key=item,
        )  # fmt: skip
    if not np.isin(row, bank.rows()).all():
        raise MaskedRowError(
            f"the row of key {item!r} in {bank.path} is masked: 'gmem-bank unmask --key' shows it again",
            path=bank.path, key=item, row=int(row[0]),
        )  # fmt: skip
    return bank.snippets(row).reshape(-1)


def snippet_or_image(bank: MemoryBank, item: str, load: Load | None = None) -> NDArray[np.float32]:
    """Return the (D,) snippet of a concept or key, or else of an image file, encoded on the spot.

    Args:
        bank: where keys and concepts are looked up first.
        item: key, concept or path.
        load: as in `image_snippets`.

    Raises:
        UnknownKeyError: neither a concept nor a key nor a file.
        SourceError, EncoderError, EncoderMismatchError: as `image_snippets`.
    """
    inside = item in bank.names or bank.find_rows([item])[0] >= 0
    if inside or not Path(item).is_file():
        return snippet_of(bank, item)
    return image_snippets(bank, [item], load)[1].reshape(-1)


def image_snippets(
    bank: MemoryBank,
    paths: Sequence[str],
    load: Load | None = None,
    *,
    batch_size: BatchSize = AUTO,
    progress: Progress = no_progress,
) -> tuple[list[str], NDArray[np.float32]]:
    """Encode images as the bank's own were, without writing anything: decoded, cropped and embedded by the encoder it records.

    Args:
        bank: names the encoder and the space.
        paths: image files, or folders of them.
        load: gives the encoder; None loads the one that the bank records.
        batch_size: images per call of the encoder.
        progress: told images encoded and images in all.

    Returns:
        B paths, and their (B, D) snippets in the bank's space.

    Raises:
        SourceError: no such file, or an image that cannot be used; it is named.
        EncoderError: the encoder cannot be loaded.
        EncoderMismatchError: the loaded encoder did not make the bank.
    """
    listings = [list_images(path) for path in paths]
    encoder = load() if load is not None else reload_encoder(bank.encoder, bank.folder)
    require_same_encoder(encoder.spec, bank.encoder)
    total, names, found = sum(len(listing.items) for listing in listings), [], []
    for listing in listings:
        items, snippets, skipped = encode_in_memory(listing, encoder, batch_size=batch_size, progress=no_progress)
        if skipped:
            where = listing.root / skipped[0].path
            raise SourceError(f"{where} cannot be used: {skipped[0].reason}. Leave it out", path=where)
        names += [str(listing.root / item.key) for item in items]
        found.append(to_space(snippets, bank.space))
        progress(len(names), total)
    return names, np.concatenate(found)


def text_snippets(bank: MemoryBank, texts: Sequence[str], load: Load | None = None) -> NDArray[np.float32]:
    """Return the (B, D) snippets of texts, in the bank's space.

    Args:
        bank: of an encoder with a text tower.
        texts: B texts in words, none of them empty.
        load: as in `image_snippets`; not called for an encoder that is known to understand no text.

    Raises:
        ConfigError: an empty text.
        EncoderMismatchError: the encoder did not make the bank.
        EncoderError: it does not understand text.
    """
    if not all(text.strip() for text in texts):
        raise ConfigError("the text is empty: say in words what to look for", key="text")
    refusal = (
        f"encoder {bank.encoder.name!r} does not understand text: CLIP and SigLIP 2 do. Build a bank with one of those"
    )
    if not may_understand_text(bank.encoder.name):
        raise EncoderError(refusal)
    encoder = load() if load is not None else reload_encoder(bank.encoder, bank.folder)
    require_same_encoder(encoder.spec, bank.encoder)
    if not isinstance(encoder, SupportsText):
        raise EncoderError(refusal)
    return to_space(encoder.encode_texts(texts), bank.space)
