"""Where the generator meets a bank, and the only place: joining rows to images, gathering snippets, masking them.

Everything goes through `gmem_bank.interface`, so every manipulation of a model's memory is an operation on its bank.

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
from gmem_gen.snippets import absorbed_projection, regularise

# The rest of the generator has the type of a bank from here, and nothing else of its interface.
__all__ = [
    "Bank", "Conditions", "ImagesFrom", "Join", "Reader", "absorb", "choose_conditions", "class_names", "concepts_of", "gather",
    "join_images", "keys_of", "labels", "open_bank", "read_image", "reader", "record_of", "regularise", "require_interface",
    "require_same_memory",
]  # fmt: skip

DEFAULT_SAMPLES = 16


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
    return {
        "fingerprint": bank.fingerprint,
        "dim": bank.dim,
        "space": bank.space,
        "encoder": bank.encoder.name,
        "encoder_fingerprint": bank.encoder.fingerprint,
        "num_rows": len(bank),
        "num_active": len(bank.rows()),
    }


def require_same_memory(bank: Bank, record: Mapping[str, Any], what: str) -> None:
    """Raise EncoderMismatchError, naming both encoders, unless a bank's snippets are those a model was trained on.

    Args:
        bank: the bank offered; its own fingerprint is free to differ, an edited bank must work.
        record: from `record_of`, as the checkpoint stores it.
        what: what was trained, for the message.
    """
    offered = (bank.encoder.fingerprint, bank.dim, bank.space)
    if offered != (record["encoder_fingerprint"], record["dim"], record["space"]):
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
        where = (
            "in --images, or where they were inserted from," if images is not None else "where the bank was built from"
        )
        advice = "give their folder with --images" + (
            " or leave them out with --allow-missing" if len(missing) < len(rows) else ""
        )
        raise SourceError(
            f"{len(missing)} of {len(rows)} images are not {where}, such as {first_three(missing)}: {advice}"
        )
    kept = rows[~np.isin(rows, missing_rows)]
    if not len(kept):
        raise SourceError("no active row of the bank came from an image: there is nothing to train on")
    return Join(rows=kept, keys=bank.keys(kept), num_derived=len(bank.rows()) - len(rows), missing=missing)


def read_image(bank: Bank, row: int, images: ImagesFrom) -> NDArray[np.uint8]:
    """Return the (H, W, 3) uint8 image of a row; raises SourceError."""
    if not isinstance(bank, SupportsImages):
        raise SourceError("this bank does not know which images its rows came from")
    return bank.read_image(row, images)


def gather(bank: Bank, rows: NDArray[np.int64], device: torch.device) -> Tensor:
    """Return the (B, D) float32 snippets of rows on a device."""
    return torch.from_numpy(bank.snippets(rows)).to(device)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A network, and how the conditions it takes are read from a bank."""

    network: Generator
    read: Callable[[NDArray[np.int64], torch.device], Tensor]
    """Rows → (B, …) conditions."""
    numbers_per_row: int
    """How many numbers a row costs on its way to the device."""


def reader(bank: Bank, model: Generator, classes: Sequence[str] = ()) -> Reader:
    """Return how a model best reads a bank: by factors where the bank has them, by labels where the model has classes.

    Args:
        bank: of the snippets that the model was trained on.
        model: in float32.
        classes: names of a class-conditional model's classes, in the order of its labels.
    """
    if model.config.condition == "class":
        return Reader(
            network=model, read=lambda rows, device: labels(bank, rows, classes).to(device), numbers_per_row=1
        )
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


def class_names(bank: Bank) -> tuple[str, ...]:
    """Return the concepts of a bank as classes, in its order; raises ConfigError where there are none."""
    if not isinstance(bank, SupportsConcepts) or not bank.names:
        raise ConfigError(
            "a class-conditional model needs a bank with concepts, such as one of class folders", key="model.condition"
        )
    return bank.names


def labels(bank: Bank, rows: NDArray[np.int64], classes: Sequence[str]) -> Tensor:
    """Return the (B,) int64 labels of rows: the number of the class whose concept holds them.

    Args:
        bank: with concepts.
        rows: (B,) active rows.
        classes: names, in the order of the labels.

    Raises:
        ConfigError: a row in none of the classes, or in two of them.
    """
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
    result = label_of[rows]
    if (result < 0).any():
        raise ConfigError(
            f"{int((result < 0).sum())} rows, such as row {rows[result < 0][0]}, are of none of this model's {len(classes)} "
            "classes; a model with a memory (model.condition='memory') could draw them",
            key="model.condition",
        )
    return torch.from_numpy(result)


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a batch of samples is conditioned on."""

    rows: NDArray[np.int64]
    """(B,) one row a sample."""
    keys: list[str]
    label: str
    """A short name for files."""


def choose_conditions(
    bank: Bank, *, concept: str | None, keys: Sequence[str], num: int | None, per_snippet: int, seed: int
) -> Conditions:
    """Return the rows to sample from.

    Args:
        bank: where from.
        concept: take its rows, in the bank's order, over and over where more are wanted; of more rows than are wanted, a
            choice drawn by `seed`.
        keys: or take exactly these rows, in this order.
        num: samples wanted; None: of every key, or of 16 rows (fewer where the concept has fewer).
        per_snippet: samples of each row, one after the other.
        seed: for the choice; 0 or more.

    Raises:
        UnknownKeyError: no such concept or key, or all its rows are masked.
        ConfigError: both a concept and keys, or counts below 1.
    """
    if concept is not None and keys:
        raise ConfigError("give either a concept or keys, not both")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}", key="seed")
    if per_snippet < 1 or (num is not None and num < 1):
        raise ConfigError("the number of samples must be at least 1")
    if keys:
        pool, label = bank.rows_for(keys), "keys"
    elif concept is not None:
        if not isinstance(bank, SupportsConcepts):
            raise UnknownKeyError("this bank has no concepts", key=concept)
        pool, label = bank.rows_of(concept), concept
        if not len(pool):
            raise UnknownKeyError(f"every row of concept {concept!r} is masked", key=concept)
    else:
        pool, label = bank.rows(), "random"
    total = num if num is not None else (len(pool) if keys else min(len(pool), DEFAULT_SAMPLES)) * per_snippet
    wanted = -(-total // per_snippet)
    if not keys and wanted < len(pool):
        # Asking for more then only adds to what was drawn; a concept that fits whole keeps its order, so that an
        # interpolation reads as the way it is.
        pool = np.random.Generator(np.random.PCG64(seed)).permutation(pool)[:wanted]
    rows = np.resize(np.repeat(pool, per_snippet), total)
    return Conditions(rows=rows, keys=keys_of(bank, rows), label=label)


def concepts_of(bank: Bank) -> dict[str, NDArray[np.int64]]:
    """Return concept → its active rows, in the bank's order; {} for a bank without concepts."""
    return {name: bank.rows_of(name) for name in bank.names} if isinstance(bank, SupportsConcepts) else {}


def keys_of(bank: Bank, rows: NDArray[np.int64]) -> list[str]:
    """Return the keys of rows; their numbers where the bank has none."""
    return bank.keys(rows) if isinstance(bank, SupportsImages) else [str(row) for row in rows]
