"""What a user may point at: an image, a folder, a concept, a key, an array or a text, each turned into snippets and looked up.

Shapes: B queries, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import kinds
from gmem_bank.arrays import is_array_file, read_array
from gmem_bank.bank import MemoryBank
from gmem_bank.batch_size import AUTO, BatchSize
from gmem_bank.coordinates import require_active
from gmem_bank.encoders import Encoder, SupportsText, may_understand_text, reload_encoder, require_same_encoder
from gmem_bank.encoding import encode_in_memory
from gmem_bank.errors import (
    ConfigError,
    CorruptError,
    EncoderError,
    EncoderMismatchError,
    FormatError,
    FormatVersionError,
    MaskedRowError,
    SourceError,
    UnknownKeyError,
    suggest,
)
from gmem_bank.index import require_faiss
from gmem_bank.indexed import BankIndex
from gmem_bank.listing import Skipped
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json
from gmem_bank.scalars import require_whole
from gmem_bank.sources import list_images
from gmem_bank.space import to_space

Load = Callable[[], Encoder]
"""Gives the encoder that a bank was made with; called only where something has to be encoded."""
CHUNK_VALUES = 1 << 20
"""Of a concept's snippets that are added up at a time."""


@dataclass(frozen=True, kw_only=True)
class Hit:
    """One row found."""

    row: int
    key: str
    score: float
    """Cosine."""
    concepts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class QueryHits:
    """The rows nearest to one query, best first."""

    query: str
    hits: tuple[Hit, ...]
    skipped: str = ""
    """Why a file of a folder could not be asked, "" where it was: then there are no hits."""

    def to_json(self) -> dict[str, Json]:
        """Return the hits as a JSON object, with "skipped" where the query could not be asked."""
        hits = [{**vars(hit), "concepts": list(hit.concepts)} for hit in self.hits]
        return {"query": self.query, "hits": hits, **({"skipped": self.skipped} if self.skipped else {})}


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


def search(
    bank: MemoryBank,
    query: str,
    *,
    k: int = 10,
    index: BankIndex | None = None,
    load: Load | None = None,
    text: bool = False,
    batch_size: BatchSize = AUTO,
    progress: Progress = no_progress,
) -> list[QueryHits]:
    """Find the rows nearest to whatever `query` points at; files of a folder that cannot be asked come last, with the reason.

    Args:
        bank: where to look.
        query: a concept or a key of the bank, or else a path: to an image, to a folder (each image is a query), to an array
            file (each row is a query; its length does not count), or to another bank of the same encoder (each active row is).
        k: rows a query; more than the bank has gives all of them.
        index: from `open_index`; None compares with every row.
        load: called when images or text have to be encoded; None loads the encoder that the bank records.
        text: the query is a text in words, for a bank of an encoder that understands them (CLIP, SigLIP 2).
        batch_size: images per call of the encoder.
        progress: told images encoded and images in all.

    Raises:
        UnknownKeyError: not a path, nor a concept or key.
        SourceError: no image there, or an array file that cannot be read.
        EncoderMismatchError: the loaded encoder did not make the bank, or a bank of another one or an array of another dimension.
        EncoderError: text, and the encoder understands none.
        ConfigError: a query without a direction or not finite, k below 1, or every row is masked.
    """
    if not query:
        raise UnknownKeyError("the query is empty: give a concept, a key, an image or a folder", key=query)
    k = require_whole("k", k, 1)
    require_faiss()  # this, and that there are rows to find, before minutes go into encoding images
    require_active(bank, len(bank.rows()))
    loader = _loader(bank, load or (lambda: reload_encoder(bank.encoder, bank.folder)))
    if text:
        labels, snippets, skipped = [query], text_snippets(bank, [query], loader), list[Skipped]()
    else:
        labels, snippets, skipped = _snippets_of(bank, query, loader, batch_size, progress)
    _require_direction(labels, snippets)
    nearest = bank.nearest if index is None else index.nearest
    scores, rows = nearest(snippets, min(k, len(bank.rows())))
    return [*_as_hits(bank, labels, scores, rows), *(_unasked(entry) for entry in skipped)]


def _loader(bank: MemoryBank, load: Callable[[], Encoder]) -> Callable[[], Encoder]:
    """Return what loads a bank's encoder, which raises EncoderError where its snippets came from arrays."""

    def none_known() -> Encoder:
        raise EncoderError(
            f"the snippets of {bank.path} came from arrays: what made them is not known here, so that no image and no text can "
            "be turned into one. Ask by a key, a concept, a file of vectors (.npy, .npz, .safetensors, .h5, .parquet) or a bank",
            path=bank.path,
        )

    return none_known if bank.encoder.name == "precomputed" else load


def _snippets_of(
    bank: MemoryBank, query: str, load: Load, batch_size: BatchSize, progress: Progress
) -> tuple[list[str], NDArray[np.float32], list[Skipped]]:
    """Return the labels and the (B, D) snippets of a query that is not text, and which files of a folder are none."""
    path = Path(query)
    if query in bank.names or bank.find_rows([query])[0] >= 0 or not path.exists():
        return [query], snippet_of(bank, query)[None], []
    other = _bank_at(path)
    if other is not None:
        require_same_encoder(other.encoder, bank.encoder)
        rows = other.rows()
        return other.keys(rows), other.snippets(rows), []
    if is_array_file(path):
        found = read_array(path)
        if found.snippets.shape[1] != bank.dim:
            raise EncoderMismatchError(
                f"{path} holds vectors of dimension {found.snippets.shape[1]}, {bank.path} snippets of {bank.dim}",
                path=path,
            )
        with np.errstate(over="ignore"):
            narrow = np.array(found.snippets, np.float32)
        beyond = np.flatnonzero((np.isfinite(found.snippets) & ~np.isfinite(narrow)).any(axis=1))
        if len(beyond):
            label = found.keys[beyond[0]]
            raise ConfigError(
                f"query {label!r} of {path} has numbers beyond 3.4e38, the largest of float32: scale it down, which changes no "
                "cosine",
                key=label,
            )
        return found.keys, narrow, []
    encoder = load()
    require_same_encoder(encoder.spec, bank.encoder)
    listing = list_images(query)
    items, snippets, skipped = encode_in_memory(listing, encoder, batch_size=batch_size, progress=progress)
    return [item.key for item in items], snippets, [*skipped, *listing.ignored]


def _unasked(entry: Skipped) -> QueryHits:
    return QueryHits(query=entry.path, hits=(), skipped=entry.reason)


def _bank_at(path: Path) -> MemoryBank | None:
    """Return the bank that lies at a path, None where something else does."""
    try:
        return kinds.open(path)
    except (FormatVersionError, CorruptError):
        raise
    except FormatError:
        return None


def _require_direction(labels: Sequence[str], snippets: NDArray[np.float32]) -> None:
    bad = np.flatnonzero(~np.isfinite(snippets).all(axis=1))
    if len(bad):
        raise ConfigError(f"query {labels[bad[0]]!r} is not finite", key=labels[bad[0]])
    empty = np.flatnonzero(~snippets.any(axis=1))
    if len(empty):
        raise ConfigError(f"query {labels[empty[0]]!r} is all zeros: it has no direction", key=labels[empty[0]])


def _as_hits(
    bank: MemoryBank, labels: Sequence[str], scores: NDArray[np.float32], rows: NDArray[np.int64]
) -> list[QueryHits]:
    members = _concepts_of(bank, rows)
    keys = [bank.keys(row) for row in rows]
    return [
        QueryHits(
            query=label,
            hits=tuple(
                Hit(row=int(row), key=key, score=float(score), concepts=members.get(int(row), ()))
                for row, key, score in zip(rows[i], keys[i], scores[i], strict=True)
            ),
        )
        for i, label in enumerate(labels)
    ]


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


def _concepts_of(bank: MemoryBank, rows: NDArray[np.int64]) -> dict[int, tuple[str, ...]]:
    """Return row → names of its concepts; their rows are ascending, so that few are looked at, not all members of all."""
    members: dict[int, tuple[str, ...]] = {}
    if not bank.names:
        return members
    found, offsets, all_rows = (
        np.unique(rows),
        bank.stored.array("concepts.offsets"),
        bank.stored.array("concepts.rows"),
    )
    sound = len(offsets) == len(bank.names) + 1 and 0 <= offsets[0] <= offsets[-1] <= len(all_rows)
    if not sound or (np.diff(offsets) < 0).any():
        raise CorruptError(
            f"{bank.path}: the table of its concepts is damaged", path=bank.path, tensor="concepts.offsets"
        )
    for name, begin, end in zip(bank.names, offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        own = all_rows[begin:end]
        places = np.searchsorted(own, found)
        known = places < len(own)
        for row in found[known][own[places[known]] == found[known]].tolist():
            members[row] = (*members.get(row, ()), name)
    return members
