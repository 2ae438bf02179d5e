"""Whose numbers are compared: the judge, the reference that is a bank, and its rows as embeddings.

Shapes: n rows, D dimensions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.errors import ConfigError, EncoderMismatchError
from gmem_gen import conditioning
from gmem_gen.conditioning import Bank
from gmem_gen.image_sets import Embedded, ImageSet, from_source

PathLike = str | os.PathLike[str]
BANK_SUFFIXES = (".safetensors", ".h5", ".hdf5", ".gmem")


def opened(path: PathLike) -> gmem_bank.MemoryBank:
    """Open a bank and check that it speaks this version of the interface; raises GMemError."""
    found = gmem_bank.open(path)
    conditioning.require_interface(found)
    return found


def reference_bank(reference: PathLike | None) -> gmem_bank.MemoryBank | None:
    """Return the reference as a bank, where its name says that it is one."""
    return opened(reference) if reference is not None and Path(reference).suffix in BANK_SUFFIXES else None


def space_of_features(asked: str | None, reference: gmem_bank.MemoryBank | None) -> str:
    """Return the space to compare in: as asked, else a reference bank's own, else raw; raises ConfigError."""
    own = "raw" if reference is None else reference.space
    if asked == "raw" and own == "unit":
        raise ConfigError(
            "the reference is a bank in unit space, whose rows have lost their length: leave the space out, or build the bank "
            "with --space raw",
            key="space",
        )
    return asked or own


def reference_images(path: PathLike) -> ImageSet:
    """Return real images to compare with.

    Raises:
        ConfigError: the file holds only statistics, of an encoder that it does not name.
        SourceError: no image there.
    """
    if Path(path).suffix == ".npz" and Path(path).is_file():
        with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else contextlib.nullcontext() as archive:
            names = set() if archive is None else set(archive.namelist())
        if {"mu.npy", "sigma.npy"} <= names and "arr_0.npy" not in names:
            raise ConfigError(
                f"{path} holds mean and covariance of an encoder that it does not name, so there is no saying whether they are "
                "of the judge. Give the images, or a bank of them: a bank is a reference that knows its encoder",
                key="reference",
            )
    return from_source(path, "the reference images")


def same_network(first: gmem_bank.EncoderSpec, second: gmem_bank.EncoderSpec) -> bool:
    """Whether two specs give the same numbers but for the space that they are brought to."""
    one, two = (dataclasses.replace(spec, space="raw").fingerprint for spec in (first, second))
    return one == two


def choose_judge(
    encoder: gmem_bank.Encoder | None, reference: gmem_bank.MemoryBank | None,
    load: Callable[[gmem_bank.MemoryBank], gmem_bank.Encoder],
) -> gmem_bank.Encoder:  # fmt: skip
    """Return the encoder to judge with: as given, or the one that made the bank to compare with.

    Raises:
        ConfigError: neither is there.
        EncoderMismatchError: both are, and differ.
    """
    if encoder is None:
        if reference is None:
            raise ConfigError("name an encoder to judge with, another than the generator's own, or a bank as reference",
                              key="encoder")  # fmt: skip
        return load(reference)
    if reference is not None and not same_network(encoder.spec, reference.encoder):
        raise EncoderMismatchError(
            f"the reference is a bank of {reference.encoder.describe()}, the judge is {encoder.spec.describe()}: their numbers "
            "cannot be compared. Leave the encoder out to judge with the bank's own, or give images as reference"
        )
    return encoder


def rows_of_bank(bank: gmem_bank.MemoryBank) -> Embedded:
    """Return the active rows of a bank as embeddings that are there already."""
    rows = bank.rows()
    place_of = np.full(len(bank), -1, np.int64)
    place_of[rows] = np.arange(len(rows))
    factored = " reconstructed at rank " + str(len(bank.basis)) if hasattr(bank, "basis") else ""
    images = ImageSet(
        what=f"a bank of {len(rows)} rows, {bank.space} space{factored}", keys=conditioning.names_of(bank, rows),
        read=lambda place: conditioning.read_image(bank, int(rows[place]), None),
        concepts={name: place_of[members] for name, members in conditioning.concepts_of(bank).items()},
    )  # fmt: skip
    return Embedded(images=images, values=snippets_of(bank, rows))


def snippets_of(bank: Bank, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the (n, D) float32 snippets of rows."""
    found: NDArray[np.float32] = conditioning.gather(bank, rows, "cpu").numpy()
    return found
