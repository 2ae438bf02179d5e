"""Whose numbers are compared: the judge, whether the generator learned to satisfy it, and a reference that is a bank.

Shapes: n rows, D dimensions.
"""

from __future__ import annotations

import dataclasses
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank.errors import BankNotFoundError, ConfigError, EncoderMismatchError, FormatError, SourceError
from gmem_gen import conditioning
from gmem_gen.checkpoint import LoadedCheckpoint
from gmem_gen.checkpoint_state import STATE, read_state
from gmem_gen.conditioning import Bank
from gmem_gen.image_sets import Embedded, ImageSet, from_source

PathLike = str | os.PathLike[str]
DEFAULT_JUDGE, DEFAULT_REPOSITORY = "dinov2", "facebook/dinov2-base"
"""Where none is named, and no bank brings one: in its space distances follow what people see (Stein et al. 2023, 2306.04675)."""
OWN_ENCODER = (
    "CIRCULAR: the judge is the bank's encoder, whose snippets the generator was trained on: it learned to satisfy it."
)
OWN_TOKENS = (
    "CIRCULAR: the judge is the encoder whose patch tokens the generator learned to predict: it learned to satisfy it."
)
MAYBE_OWN = (
    "The judge is the bank's encoder: if the samples' generator was trained on its snippets, it learned to satisfy the judge, "
    "and the figures are circular."
)
MAYBE_TOKENS = (
    "The generator was trained on patch tokens of an encoder that is not recorded: the judge may be that encoder."
)


def opened(path: PathLike) -> gmem_bank.MemoryBank:
    """Open a bank and check that it speaks this version of the interface; raises GMemError."""
    found = gmem_bank.open(path)
    conditioning.require_interface(found)
    return found


def reference_bank(reference: PathLike | None) -> gmem_bank.MemoryBank | None:
    """Return the reference as a bank, where its name says that it is one; raises BankNotFoundError where it is not there."""
    if reference is None or not gmem_bank.is_bank_path(reference):
        return None
    if not Path(reference).exists():
        raise BankNotFoundError(
            f"no bank at {reference}: name another, or real images, with --reference", path=reference
        )
    return opened(reference)


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
    refuse_statistics(path, "reference")
    return from_source(path, "the reference images")


def refuse_statistics(path: PathLike, option: str) -> None:
    """Raise ConfigError for an .npz of mean and covariance instead of images, SourceError for one that is cut short."""
    if Path(path).suffix.lower() != ".npz" or not Path(path).is_file():
        return
    if not zipfile.is_zipfile(path):
        raise SourceError(f"{path} is cut short, or is no .npz: copy or write it again", path=path)
    with zipfile.ZipFile(path) as archive:
        names = set(archive.namelist())
    if {"mu.npy", "sigma.npy"} <= names and "arr_0.npy" not in names:
        raise ConfigError(
            f"{path} holds mean and covariance of an encoder that it does not name, so there is no saying whether they are "
            "of the judge. Give the images, or as reference a bank of them, which knows its encoder",
            key=option,
        )


def same_network(first: gmem_bank.EncoderSpec, second: gmem_bank.EncoderSpec) -> bool:
    """Whether two specs give the same numbers but for the space that they are brought to."""
    one, two = (dataclasses.replace(spec, space="raw").fingerprint for spec in (first, second))
    return one == two


def same_weights(first: gmem_bank.EncoderSpec, second: gmem_bank.EncoderSpec) -> bool:
    """Whether two specs are one network, however it is asked: its size of images, pooling or precision make no other of it."""
    one, two = (
        (spec.family, spec.weights_sha256 or spec.name) for spec in (first, second)
    )  # what has no weights is known by its name
    return one == two


def circularity(
    judge: gmem_bank.EncoderSpec, bank: gmem_bank.MemoryBank | None, checkpoint: LoadedCheckpoint | None
) -> tuple[bool | None, str]:
    """Return whether a generator learned to satisfy the judge, None where that is not known, and what is to be said of it.

    Args:
        judge: what judges.
        bank: the generator's.
        checkpoint: the generator; None: samples were given, whose origin is not known.
    """
    own = bank is not None and same_weights(judge, bank.encoder)
    if checkpoint is None:
        return None, MAYBE_OWN if own else ""
    if own and checkpoint.model.config.condition == "memory":
        return True, OWN_ENCODER
    if not checkpoint.config.model.projection_dim:
        return False, ""
    encoder = _encoder_of_tokens(checkpoint)
    if encoder is None:
        return None, MAYBE_TOKENS
    return (True, OWN_TOKENS) if same_weights(judge, encoder) else (False, "")


def _encoder_of_tokens(checkpoint: LoadedCheckpoint) -> gmem_bank.EncoderSpec | None:
    """Return the encoder whose patch tokens a generator learned to predict; None where it is not recorded."""
    if not (checkpoint.path / STATE).is_file():  # an exported folder
        return None
    try:
        return gmem_bank.EncoderSpec.from_json((read_state(checkpoint.path).get("tokens") or {}).get("encoder"))
    except FormatError:
        return None


def default_judge(own: gmem_bank.MemoryBank | None, space: str, device: str) -> gmem_bank.Encoder:
    """Return the encoder that judges where none is named.

    Args:
        own: the generator's bank: the default does not judge what was trained on its own snippets.
        space, device: as in `load_encoder`.

    Raises:
        ConfigError: its weights are not on this machine, or they are those of the bank's own encoder.
    """
    advice = (
        "name an encoder with --encoder, another than the bank's own (gmem-bank encoders lists them), or give a bank of one as "
        "--reference"
    )
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        there = False
    else:
        there = isinstance(try_to_load_from_cache(DEFAULT_REPOSITORY, "model.safetensors"), str)
    if not there:
        raise ConfigError(
            f"there is no judge: the weights of {DEFAULT_JUDGE} ({DEFAULT_REPOSITORY}), the default, are not in the hub's cache "
            f"on this machine. Fetch them (hf download {DEFAULT_REPOSITORY}), or {advice}",
            key="encoder",
        )
    judge = gmem_bank.load_encoder(DEFAULT_JUDGE, space=space, device=device)
    if own is not None and same_weights(judge.spec, own.encoder):
        raise ConfigError(
            f"{DEFAULT_JUDGE}, the default judge, is the encoder of the bank, which its generator learned to satisfy: {advice}. "
            f"--encoder {DEFAULT_JUDGE} judges by it nevertheless, and says so",
            key="encoder",
        )
    return judge


def choose_judge(
    encoder: gmem_bank.Encoder | None, reference: gmem_bank.MemoryBank | None,
    load: Callable[[gmem_bank.MemoryBank], gmem_bank.Encoder], default: Callable[[], gmem_bank.Encoder],
) -> gmem_bank.Encoder:  # fmt: skip
    """Return the encoder to judge with: as given, or the one that made the bank to compare with, or the default.

    Raises:
        ConfigError: the default is wanted, and is not there.
        EncoderMismatchError: an encoder and a bank are given, and differ.
    """
    if encoder is None:
        return default() if reference is None else load(reference)
    if reference is not None and not same_network(encoder.spec, reference.encoder):
        raise EncoderMismatchError(
            f"the reference is a bank of {reference.encoder.describe()}, the judge is {encoder.spec.describe()}: their numbers "
            "cannot be compared. Leave the encoder out to judge with the bank's own, or give images as reference"
        )
    return encoder


def rows_of_bank(bank: gmem_bank.MemoryBank, chosen: NDArray[np.int64] | None = None) -> Embedded:
    """Return active rows of a bank as embeddings that are there already.

    Args:
        bank: the bank.
        chosen: which of its active rows; None: all.
    """
    rows = bank.rows() if chosen is None else bank.rows()[chosen]
    place_of = np.full(len(bank), -1, np.int64)
    place_of[rows] = np.arange(len(rows))
    members = {name: place_of[found] for name, found in conditioning.concepts_of(bank).items()}
    rank = conditioning.rank_of(bank)
    factored = "" if rank is None else f" reconstructed at rank {rank}"
    images = ImageSet(
        what=f"a bank of {len(bank.rows())} rows, {bank.space} space{factored}", keys=conditioning.names_of(bank, rows),
        read=lambda place: conditioning.read_image(bank, int(rows[place]), None),
        concepts={name: places[places >= 0] for name, places in members.items()},
    )  # fmt: skip
    return Embedded(images=images, values=snippets_of(bank, rows))


def snippets_of(bank: Bank, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return the (n, D) float32 snippets of rows."""
    found: NDArray[np.float32] = conditioning.gather(bank, rows, "cpu").numpy()
    return found
