"""What a batch of samples is drawn from: rows of a bank, or snippets made on the spot without writing to it.

Shapes: B samples, K distinct snippets, D snippet dimension, T points of a way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.errors import ConfigError, UnknownKeyError
from gmem_gen import conditioning
from gmem_gen.conditioning import Bank
from gmem_gen.outputs import Progress, no_progress

DEFAULT_SAMPLES = 16
LABEL_LENGTH = 100
Load = Callable[[], gmem_bank.Encoder]
"""Gives the encoder that a bank was made with; called only where an image or a text has to be encoded."""


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What each sample is conditioned on, and which random numbers it gets."""

    rows: NDArray[np.int64]
    """(B,) one row a sample: of the bank, or of `snippets` where there are any."""
    keys: list[str]
    """B names: keys of rows, paths of images, texts, sums, points of a way."""
    label: str
    """A short name for files."""
    snippets: NDArray[np.float32] | None = None
    """(K, D) in the bank's space; None: the bank's own rows."""
    streams: NDArray[np.int64] | None = None
    """(B,) which stream of random numbers each sample has; None: sample i has stream i."""
    made: Mapping[str, Any] = field(default_factory=dict)
    """How the snippets were made, for the record."""

    def __len__(self) -> int:
        return len(self.rows)

    def digest(self) -> str:
        """Return the sha256 of all that decides the samples here: rows or snippets, names and streams."""
        parts = (self.rows, self.streams, self.snippets)
        told = "\n".join(self.keys).encode()
        digest = hashlib.sha256(told)
        for part in parts:
            digest.update(b"-" if part is None else str(part.shape).encode() + np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def choose_conditions(
    bank: Bank, *, concept: str | Sequence[str] | None, keys: Sequence[str], num: int | None, per_snippet: int, seed: int,
    same_noise: bool = False,
) -> Conditions:  # fmt: skip
    """Return the rows to sample from.

    Args:
        bank: where from.
        concept: take its rows, in the bank's order, over and over where more are wanted; of more rows than are wanted, a
            choice drawn by `seed`. Several concepts: the rows of all of them.
        keys: or take exactly these rows, in this order.
        num: samples wanted; None: of every key, or of 16 rows (fewer where the concept has fewer).
        per_snippet: samples of each row, one after the other.
        seed: for the choice; 0 or more.
        same_noise: every row begins from the same noise; several samples of a row still differ.

    Raises:
        UnknownKeyError: no such concept or key, or all its rows are masked.
        ConfigError: both a concept and keys, or counts below 1.
    """
    concepts = [concept] if isinstance(concept, str) else list(concept or ())
    if concepts and keys:
        raise ConfigError("give either a concept or keys, not both")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}", key="seed")
    _check_counts(num, per_snippet)
    if keys:
        pool, label = bank.rows_for(keys), "keys"
    elif concepts:
        found = np.concatenate([_rows_of(bank, name) for name in concepts])
        pool = found[np.sort(np.unique(found, return_index=True)[1])]  # a row of two of them once
        label = _label("+".join(concepts))
    else:
        pool, label = bank.rows(), "random"
        if not len(pool):
            raise UnknownKeyError("every row of the bank is masked: there is nothing to sample from")
    total = num if num is not None else (len(pool) if keys else min(len(pool), DEFAULT_SAMPLES)) * per_snippet
    wanted = -(-total // per_snippet)
    if not keys and wanted < len(pool):
        # Asking for more then only adds to what was drawn; a concept that fits whole keeps its order, so that an
        # interpolation reads as the way it is.
        pool = np.random.Generator(np.random.PCG64(seed)).permutation(pool)[:wanted]
    rows = np.resize(np.repeat(pool, per_snippet), total)
    return Conditions(
        rows=rows, keys=conditioning.names_of(bank, rows), label=label, streams=_streams(total, per_snippet, same_noise)
    )


def _rows_of(bank: Bank, concept: str) -> NDArray[np.int64]:
    rows = conditioning.concept_rows(bank, concept)
    if not len(rows):
        raise UnknownKeyError(f"every row of concept {concept!r} is masked", key=concept)
    return rows


def snippet_conditions(
    snippets: NDArray[np.float32], names: Sequence[str], *, label: str = "snippets", num: int | None = None,
    per_snippet: int = 1, same_noise: bool = False, made: Mapping[str, Any] | None = None,
) -> Conditions:  # fmt: skip
    """Return snippets that are in no bank as conditions.

    Args:
        snippets: (K, D) float32 in the space of the bank that the model was trained on.
        names: K names, for the record.
        label: a short name for files.
        num: samples wanted, the snippets over and over; None: `per_snippet` of each.
        per_snippet: samples of each snippet, one after the other.
        same_noise: as in `choose_conditions`.
        made: how they were made, for the record.

    Raises:
        ConfigError: no snippet, another number of names, values that are not finite, or counts below 1.
    """
    _check_counts(num, per_snippet)
    if snippets.ndim != 2 or not len(snippets) or len(snippets) != len(names):
        raise ConfigError(
            f"expected (K, D) snippets and K names, got shape {snippets.shape} and {len(names)} names: give a name each"
        )
    bad = np.flatnonzero(~np.isfinite(snippets).all(axis=1))
    if len(bad):
        raise ConfigError(f"the snippet of {names[bad[0]]!r} is not finite", key=names[bad[0]])
    total = num if num is not None else len(snippets) * per_snippet
    rows = np.resize(np.repeat(np.arange(len(snippets)), per_snippet), total)
    return Conditions(
        rows=rows, keys=[names[row] for row in rows.tolist()], label=_label(label), snippets=snippets,
        streams=_streams(total, per_snippet, same_noise), made=dict(made or {}),
    )  # fmt: skip


def image_conditions(
    bank: Bank, images: Sequence[str], *, load: Load | None = None, num: int | None = None, per_snippet: int = 1,
    same_noise: bool = False, progress: Progress = no_progress,
) -> Conditions:  # fmt: skip
    """Return images as conditions: encoded on the spot by the bank's own encoder, with nothing trained or written.

    Args:
        bank: a bank file; names encoder, preprocessing and space.
        images: files, or folders of them.
        load: gives the encoder; None loads the one that the bank records.
        num, per_snippet, same_noise: as in `snippet_conditions`.
        progress: told images encoded and images in all.

    Raises:
        SourceError: an image that cannot be read; it is named.
        EncoderError, EncoderMismatchError: the encoder cannot be loaded, or is another than the bank's.
    """
    names, snippets = gmem_bank.image_snippets(_file_of(bank), images, load, progress=progress)
    label = Path(names[0]).stem + (f"-and-{len(names) - 1}-more" if len(names) > 1 else "")
    return snippet_conditions(
        snippets, names, label=label, num=num, per_snippet=per_snippet, same_noise=same_noise, made={"kind": "images"}
    )


def text_conditions(
    bank: Bank, texts: Sequence[str], *, load: Load | None = None, num: int | None = None, per_snippet: int = 1,
    same_noise: bool = False,
) -> Conditions:  # fmt: skip
    """Return texts as conditions, for a bank of an encoder that understands them (CLIP, SigLIP 2).

    A text's embedding lies where that encoder puts it, which is near images of what it says but not among them.

    Raises:
        EncoderError: the bank's encoder understands no text.
        ConfigError: an empty text.
    """
    snippets = gmem_bank.text_snippets(_file_of(bank), texts, load)
    return snippet_conditions(
        snippets, list(texts), label=texts[0], num=num, per_snippet=per_snippet, same_noise=same_noise,
        made={"kind": "texts"},
    )  # fmt: skip


def interpolation_conditions(
    bank: Bank, first: str, second: str, *, frames: int = 8, method: str = "slerp", seed: int = 0, load: Load | None = None,
    per_snippet: int = 1, same_noise: bool = False,
) -> Conditions:  # fmt: skip
    """Return the way from one snippet to another as conditions, both ends included.

    Args:
        bank: a bank file.
        first: key, concept (its mean snippet) or image file; t = 0.
        second: the same; t = 1.
        frames: T, points of the way; at least 2.
        method: "linear", "slerp", "concat" or "mask".
        seed: for "mask".
        load, per_snippet: as in `image_conditions`.
        same_noise: every point begins from the same noise, so that only the snippet changes along the way.

    Raises:
        UnknownKeyError: an end is neither a concept nor a key nor a file.
        ConfigError: unknown method, or fewer than two points.
        GMemError: a point has no direction.
    """
    resolve = _resolver(load)
    way = gmem_bank.interpolate_snippets(
        _file_of(bank), first, second, method=method, steps=frames, seed=seed, resolve=resolve
    )
    names = [f"{first} → {second}, t = {t:.4g}" for t in np.linspace(0.0, 1.0, frames)]
    made = {"kind": "interpolation", "first": first, "second": second, "method": method, "frames": frames}
    label = f"{_short(first)}-to-{_short(second)}"
    return snippet_conditions(way, names, label=label, per_snippet=per_snippet, same_noise=same_noise, made=made)


def composition_conditions(
    bank: Bank, sums: Sequence[str], *, load: Load | None = None, num: int | None = None, per_snippet: int = 1,
    same_noise: bool = False,
) -> Conditions:  # fmt: skip
    """Return weighted sums such as "cat + 0.5*neon - dog" as conditions; items are keys, concepts or image files.

    Raises:
        ConfigError: a sum that cannot be read, or is empty.
        UnknownKeyError: an item is neither a concept nor a key nor a file.
        GMemError: a sum has no direction.
    """
    resolve = _resolver(load)
    snippets = np.stack([gmem_bank.compose_snippet(_file_of(bank), terms, resolve=resolve) for terms in sums])
    return snippet_conditions(
        snippets, list(sums), label=re.sub(r"\s+", "", sums[0]), num=num, per_snippet=per_snippet, same_noise=same_noise,
        made={"kind": "compositions"},
    )  # fmt: skip


def _resolver(load: Load | None) -> Callable[[gmem_bank.MemoryBank, str], NDArray[np.float32]]:
    return lambda bank, item: gmem_bank.snippet_or_image(bank, item, load)


def _file_of(bank: Bank) -> gmem_bank.MemoryBank:
    if isinstance(bank, gmem_bank.MemoryBank):
        return bank
    raise ConfigError(
        f"{type(bank).__name__} is not a bank of ours: images, texts and arithmetic need one opened by gmem_bank.open"
    )


def _check_counts(num: int | None, per_snippet: int) -> None:
    if per_snippet < 1 or (num is not None and num < 1):
        raise ConfigError("the number of samples must be at least 1")


def _streams(total: int, per_snippet: int, same_noise: bool) -> NDArray[np.int64] | None:
    return np.arange(total) % per_snippet if same_noise else None


def _short(item: str) -> str:
    path = Path(item)
    return path.stem if path.is_file() else item


def _label(text: str) -> str:
    """Return a text as the name of a file: letters, digits and a few signs."""
    return re.sub(r"[^\w.+*=-]+", "_", text).strip("._")[:LABEL_LENGTH] or "samples"
