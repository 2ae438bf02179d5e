"""Where the generator meets a bank: joining rows to images, gathering snippets, labels, images.

Everything goes through `gmem_bank.interface`, so every manipulation of a model's memory is an operation on its bank. No other
module knows the interface; they ask a bank for no more than what it is and which rows it has.

Shapes: N rows, M training rows, B batch, D snippet dimension, R rank, E width of the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import gmem_bank
from gmem_bank.errors import ConfigError, EncoderMismatchError, GMemError, SourceError, UnknownKeyError, first_three
from gmem_bank.interface import INTERFACE_VERSION, Bank, ImagesFrom, SupportsConcepts, SupportsFactors, SupportsImages
from gmem_gen.model import Generator
from gmem_gen.snippets import Reader, absorbed_projection, regularise, snippet_reader

# The rest of the generator has the type of a bank from here, and nothing else of its interface.
__all__ = [
    "Bank", "ImagesFrom", "Join", "Reader", "absorb", "class_names", "concept_keys", "concept_labels", "concept_rows",
    "concepts_of", "gather", "join_images", "join_keys", "labels", "names_of", "open_bank", "rank_of", "read_image", "reader",
    "record_of", "record_of_encoder", "regularise", "require_interface", "require_same_memory", "snippet_reader",
]  # fmt: skip


def open_bank(path: str | os.PathLike[str]) -> Bank:
    """Open a bank and check that it speaks this version of the interface; raises GMemError."""
    return require_interface(gmem_bank.open(path))


def require_interface(bank: Bank) -> Bank:
    """Return the bank; raises GMemError where it is none, or of another major version of the interface."""
    if not isinstance(bank, Bank):
        raise GMemError(f"{type(bank).__name__} does not offer the Bank interface (gmem_bank.interface.Bank)")
    if bank.interface_version[0] != INTERFACE_VERSION[0]:
        raise GMemError(
            f"the bank has interface {bank.interface_version}, this generator needs {INTERFACE_VERSION[0]}.x: upgrade gmem"
        )
    return bank


def record_of(bank: Bank) -> dict[str, Any]:
    """Return what a checkpoint or a result remembers of a bank."""
    numbers = {"fingerprint": bank.fingerprint, "num_rows": len(bank), "num_active": len(bank.rows())}
    return record_of_encoder(bank.encoder) | {"dim": bank.dim, "space": bank.space, **numbers}


def record_of_encoder(encoder: gmem_bank.EncoderSpec) -> dict[str, Any]:
    """Return the like of `record_of` for snippets of an encoder, where no bank of them is at hand."""
    return {
        "fingerprint": "", "dim": encoder.dim, "space": encoder.space, "encoder": encoder.name,
        "encoder_fingerprint": encoder.fingerprint, "num_rows": 0, "num_active": 0,
    }  # fmt: skip


def require_same_memory(bank: Bank, record: Mapping[str, Any], what: str) -> None:
    """Raise EncoderMismatchError, naming both encoders, unless a bank's snippets are those a model was trained on.

    Args:
        bank: the bank offered; its own fingerprint is free to differ, an edited bank must work.
        record: from `record_of`, as the checkpoint stores it; of an imported one the encoder's name may be all that is known.
        what: what was trained, for the message.
    """
    name, known = bank.encoder.name.removesuffix("-base"), record["encoder_fingerprint"]
    offered = (bank.encoder.fingerprint if known else name, bank.dim, bank.space)
    if offered != (known or record["encoder"], record["dim"], record["space"]):
        raise EncoderMismatchError(
            f"{what} was trained on snippets of {record['encoder']} (dim {record['dim']}, {record['space']} space, "
            f"{record['encoder_fingerprint'][:8]}), the bank holds snippets of {bank.encoder.describe()}: give a bank of the "
            "same encoder, or train again on this one"
        )


@dataclass(frozen=True, kw_only=True)
class Join:
    """The rows that have an image to learn from."""

    rows: NDArray[np.int64]
    """(M,) ascending."""
    keys: list[str]
    num_derived: int
    """Active rows computed from other rows: nothing to learn from."""
    missing: list[str]
    """Keys left out because their image is gone."""


def join_images(bank: Bank, images: ImagesFrom, *, allow_missing: bool) -> Join:
    """Return the rows to train on: every active row that came from an image, inserted concepts included.

    Args:
        bank: must offer SupportsImages.
        images: folder with the images under their keys, instead of where the provenance says they are.
        allow_missing: leave out rows whose image is gone, instead of stopping.

    Raises:
        SourceError: images are missing (how many, which, what to do), or there is none at all.
    """
    if not isinstance(bank, SupportsImages):
        raise SourceError("this bank does not know which images its rows came from, so there is nothing to train on")
    rows = bank.image_rows()
    missing_rows = bank.missing_images(rows, images)
    missing = bank.keys(missing_rows)
    if missing and not (allow_missing and len(missing) < len(rows)):
        where = "in --images, or where they were inserted from," if images else "where the bank was built from"
        some = " or leave them out with --allow-missing" if len(missing) < len(rows) else ""
        raise SourceError(
            f"{len(missing)} of {len(rows)} images are not {where}, such as {first_three(missing)}: give their folder "
            f"with --images{some}"
        )
    kept = rows[~np.isin(rows, missing_rows)]
    if not len(kept):
        raise SourceError("no active row of the bank came from an image: there is nothing to train on")
    return Join(rows=kept, keys=bank.keys(kept), num_derived=len(bank.rows()) - len(rows), missing=missing)


def join_keys(
    bank: Bank, holds: Callable[[Sequence[str]], NDArray[np.bool_]], *, allow_missing: bool, what: str, advice: str
) -> Join:
    """Return the rows to train on where what is learned lies ready by key: every active row that has it.

    Args:
        bank: must offer SupportsImages.
        holds: keys → which of them are there.
        allow_missing: leave out rows that have an image and nothing there, instead of stopping.
        what: is looked for, and where, for messages.
        advice: what to do about missing ones.

    Raises:
        SourceError: some are missing (how many, which, what to do), or all.
    """
    if not isinstance(bank, SupportsImages):
        raise SourceError(f"this bank does not know the keys of its rows, so there are no {what} to be found")
    rows = bank.rows()
    there = holds(bank.keys(rows))
    missing = bank.keys(np.setdiff1d(bank.image_rows(), rows[there]))
    if not there.any():
        examples = first_three(bank.keys(rows[:3]))
        raise SourceError(f"there are no {what} for any row of this bank, whose keys are such as {examples}: {advice}")
    if missing and not allow_missing:
        raise SourceError(
            f"there are no {what} for {len(missing)} of {len(missing) + int(there.sum())} rows, such as {first_three(missing)}: "
            f"{advice}, or leave these rows out with --allow-missing"
        )
    kept = rows[there]
    return Join(rows=kept, keys=bank.keys(kept), num_derived=len(rows) - len(kept) - len(missing), missing=missing)


def read_image(bank: Bank, row: int, images: ImagesFrom) -> NDArray[np.uint8]:
    """Return the (H, W, 3) uint8 image of a row; raises SourceError."""
    if not isinstance(bank, SupportsImages):
        raise SourceError("this bank does not know which images its rows came from")
    return bank.read_image(row, images)


def gather(bank: Bank, rows: NDArray[np.int64], device: torch.device | str) -> Tensor:
    """Return the (B, D) float32 snippets of rows on a device."""
    return torch.from_numpy(bank.snippets(rows)).to(device)


def reader(bank: Bank, model: Generator, classes: Sequence[str] = ()) -> Reader:
    """Return how a model best reads a bank: by factors where the bank has them, by labels where the model has classes.

    Args:
        bank: of the snippets that the model was trained on.
        model: in float32.
        classes: names of a class-conditional model's classes, in the order of its labels.
    """
    if model.config.condition == "class":
        label_of = _labeller(bank, classes)
        return Reader(network=model, read=lambda rows, device: label_of(rows).to(device), numbers_per_row=1)
    if model.config.condition == "none":
        return Reader(network=model, read=lambda rows, device: torch.zeros(len(rows), 0).to(device), numbers_per_row=0)
    if isinstance(bank, SupportsFactors) and len(bank.basis) + 1 < bank.dim:
        return absorb(bank, bank, model)
    return Reader(network=model, read=lambda rows, device: gather(bank, rows, device), numbers_per_row=bank.dim)


def absorb(bank: Bank, factors: SupportsFactors, model: Generator) -> Reader:
    """Return a model that takes a factored bank's coefficients, with the basis multiplied into its first linear layer.

    A row costs R + 1 numbers instead of D, and the result is the same up to rounding: [c, 1]/‖s‖ takes the place of the
    snippet s = c·B + μ. The null snippet, zeros, stays zeros. In raw space nothing is divided by ‖s‖.

    Args:
        bank: gives the space.
        factors: the same bank, as one with factors.
        model: its condition projection is replaced, everything else shared.
    """
    basis, mean = (torch.from_numpy(np.array(part)) for part in (factors.basis, factors.mean))
    projection = absorbed_projection(model.condition_projection, basis, mean)

    def read(rows: NDArray[np.int64], device: torch.device) -> Tensor:
        codes = np.concatenate([factors.coefficients(rows), np.ones((len(rows), 1), np.float32)], axis=1)
        if bank.space == "unit":
            codes *= factors.inv_norms(rows)[:, None]
        return torch.from_numpy(codes).to(device)

    return Reader(
        network=model.with_condition_projection(projection), read=read, numbers_per_row=projection.linear.in_features
    )


def rank_of(bank: Bank) -> int | None:
    """Return the rank of a factored bank; None for another."""
    return len(bank.basis) if isinstance(bank, SupportsFactors) else None


def class_names(bank: Bank) -> tuple[str, ...]:
    """Return the concepts of a bank as classes, in its order; raises ConfigError where there are none."""
    if not isinstance(bank, SupportsConcepts) or not bank.names:
        raise ConfigError(
            "a class-conditional model needs a bank with concepts, such as one of class folders", key="model.condition"
        )
    return bank.names


def concept_keys(bank: Bank, name: str) -> frozenset[str]:
    """Return the keys of a concept's active rows; raises UnknownKeyError for a concept that there is not."""
    if not isinstance(bank, SupportsConcepts) or not isinstance(bank, SupportsImages):
        raise UnknownKeyError("this bank has no concepts", key=name)
    return frozenset(bank.keys(bank.rows_of(name)))


def labels(bank: Bank, rows: NDArray[np.int64], classes: Sequence[str]) -> Tensor:
    """Return the (B,) int64 labels of rows: the number of the class whose concept holds them.

    Args:
        bank: with concepts.
        rows: (B,) active rows.
        classes: names, in the order of the labels.

    Raises:
        ConfigError: a row in none of the classes, or in two of them.
    """
    return _labeller(bank, classes)(rows)


def _labeller(bank: Bank, classes: Sequence[str]) -> Callable[[NDArray[np.int64]], Tensor]:
    """Return `labels` as a function of rows alone, so that a bank's concepts are walked once and not for every batch."""
    present = class_names(bank)
    assert isinstance(bank, SupportsConcepts)
    label_of = np.full(len(bank), -1, np.int64)
    for label, name in enumerate(classes):
        members = bank.rows_of(name) if name in present else np.zeros(0, np.int64)
        twice = members[label_of[members] >= 0]
        if len(twice):
            other = classes[label_of[twice[0]]]
            raise ConfigError(f"row {twice[0]} belongs to classes {other!r} and {name!r}: they must not overlap",
                              key="model.condition")  # fmt: skip
        label_of[members] = label

    def of(rows: NDArray[np.int64]) -> Tensor:
        result = label_of[rows]
        if (result < 0).any():
            raise ConfigError(
                f"{int((result < 0).sum())} rows, such as row {rows[result < 0][0]}, are of none of this model's {len(classes)} "
                "classes; a model with a memory (model.condition='memory') could draw them",
                key="model.condition",
            )
        return torch.from_numpy(result)

    return of


def concept_rows(bank: Bank, concept: str) -> NDArray[np.int64]:
    """Return the active rows of a concept, ascending; raises UnknownKeyError with the nearest names."""
    if not isinstance(bank, SupportsConcepts):
        raise UnknownKeyError("this bank has no concepts", key=concept)
    return bank.rows_of(concept)


def names_of(bank: Bank, rows: NDArray[np.int64]) -> list[str]:
    """Return the keys of rows, or their numbers where the bank keeps no keys."""
    return bank.keys(rows) if isinstance(bank, SupportsImages) else [str(row) for row in rows]


def concept_labels(bank: Bank, rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], tuple[str, ...]] | None:
    """Return the (B,) numbers of the concepts that rows belong to, and the concepts; None unless each row has exactly one."""
    if not isinstance(bank, SupportsConcepts) or not bank.names:
        return None
    found = np.full(len(bank), -1, np.int64)
    for number, name in enumerate(bank.names):
        members = bank.rows_of(name)
        found[members] = np.where(found[members] == -1, number, -2)
    result = found[rows]
    return None if (result < 0).any() else (result, bank.names)


def concepts_of(bank: Bank) -> dict[str, NDArray[np.int64]]:
    """Return concept → its active rows, in the bank's order; {} for a bank without concepts."""
    return {name: bank.rows_of(name) for name in bank.names} if isinstance(bank, SupportsConcepts) else {}
