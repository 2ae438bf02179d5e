"""Which rows are trained on, which are held out, and which two rows are one picture and its mirror image.

Shapes: M rows with images, S training samples, V held-out rows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import FLIP_SUFFIX
from gmem_bank.errors import ConfigError, UnknownKeyError, first_three
from gmem_gen.settings import DataConfig


@dataclass(frozen=True, kw_only=True)
class Split:
    """Places among the M rows."""

    samples: NDArray[np.int64]
    """(S, 2) place of each training sample and of its mirrored twin, which is the same place where it has none."""
    held_out: NDArray[np.int64]
    """(V,) never trained on, nor are their twins."""


def split_rows(keys: list[str], config: DataConfig, seed: int, concept: frozenset[str] = frozenset()) -> Split:
    """Return what is trained on and what is held out.

    A picture and its mirrored twin are always on the same side. With data.flip "rows" each is a sample of its own; with
    "random" they are one sample, of which a coin decides at every step; with "none" twins are left out.

    Args:
        keys: of the M rows.
        config: flip, validation_fraction (by a hash of key and seed), validation_keys (a file).
        seed: of the training.
        concept: further keys to hold out.

    Raises:
        ConfigError: nothing is left to train on or, though asked for, held out; "random" without a twin; an unreadable file.
        UnknownKeyError: keys in the file that are none of the rows'.
    """
    place_of = {key: place for place, key in enumerate(keys)}
    chosen = _chosen(keys, config, seed, concept)
    own, twins, held = [], [], []
    for key, place in place_of.items():
        base = key.removesuffix(FLIP_SUFFIX)
        mirrored = base != key
        if base in chosen:
            held.append(place)
        elif config.flip == "rows":
            own.append(place)
            twins.append(place)
        elif not mirrored or (config.flip == "random" and base not in place_of):
            own.append(place)
            twins.append(place_of.get(key + FLIP_SUFFIX, place) if config.flip == "random" else place)
    if not own:
        raise ConfigError(
            "no row is left to train on: hold out fewer (data.validation_*)", key="data.validation_fraction"
        )
    wanted = bool(config.validation_fraction or config.validation_keys or config.validation_concept)
    if wanted and not held:
        raise ConfigError(
            f"none of {len(keys)} rows was held out: ask for more, such as data.validation_fraction=0.1",
            key="data.validation_fraction",
        )
    samples = np.stack([np.array(own, np.int64), np.array(twins, np.int64)], axis=1)
    if config.flip == "random" and (samples[:, 0] == samples[:, 1]).all():
        raise ConfigError(
            "data.flip='random' needs the mirrored twins of the bank's rows, and it has none: build it with --flip",
            key="data.flip",
        )
    return Split(samples=samples, held_out=np.array(held, np.int64))


def _chosen(keys: list[str], config: DataConfig, seed: int, concept: frozenset[str]) -> set[str]:
    """Return the keys, without the suffix of twins, of what is held out."""
    present = {key.removesuffix(FLIP_SUFFIX) for key in keys}
    chosen = {key.removesuffix(FLIP_SUFFIX) for key in concept} & present
    if config.validation_fraction:
        limit = int(config.validation_fraction * 2**64)
        chosen |= {key for key in present if _hash(key, seed) < limit}
    if config.validation_keys:
        asked = _read_keys(Path(config.validation_keys))
        unknown = sorted(asked - present)
        if unknown:
            raise UnknownKeyError(
                f"{config.validation_keys}: {len(unknown)} keys are of no row with an image, such as {first_three(unknown)}",
                path=config.validation_keys, key=unknown[0],
            )  # fmt: skip
        chosen |= asked
    return chosen


def _hash(key: str, seed: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest())


def _read_keys(path: Path) -> set[str]:
    try:
        # a key may hold what splitlines() takes for the end of a line, such as U+2028
        lines = [line.removesuffix("\r") for line in path.read_bytes().decode("utf-8").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"could not read the keys to hold out from {path}: {error}", path=path, key="data.validation_keys"
        ) from error
    return {line.removesuffix(FLIP_SUFFIX) for line in lines if line.strip()}
