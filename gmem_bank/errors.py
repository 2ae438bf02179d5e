"""Every error this project raises, in one tree.

GMemError
├── BankNotFoundError        (FileNotFoundError)   no bank at that path
├── FormatError              (ValueError)          not a bank, or not one this reader understands
│   ├── FormatVersionError                         written by a newer major version
│   └── CorruptError                               damaged: cut, overwritten, values that cannot be
├── EncoderError             (ValueError)          unknown encoder, or weights that cannot be loaded
│   ├── EncoderMismatchError                       a bank or snippets of another encoder, dimension or space
│   └── EncoderSettingError      (ConfigError)     an encoder's name, device or parameter that is unknown or out of range
├── UnknownKeyError          (KeyError)            a row key, concept or row number that the bank does not have
├── MaskedRowError           (IndexError)          a masked row was asked for
├── ConceptExistsError       (ValueError)          the concept name is taken
├── SourceError              (ValueError)          a source with no usable image
├── OutputExistsError        (FileExistsError)     refusing to overwrite
├── WriteError               (OSError)             the disk refused; the previous file stands
├── LockedError              (OSError)             another process is editing the same bank
├── StaleIndexError          (ValueError)          an index of another bank, or of another state of this one
├── MissingDependencyError   (ImportError)         an optional package is not installed
├── CheckpointError          (ValueError)          a generator checkpoint that is absent, damaged or foreign
└── ConfigError              (ValueError)          a setting that is unknown or out of range

A message says what happened, where, and what to do next. `assert` is kept for our own mistakes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import Any


class GMemError(Exception):
    """Root of the tree; carries the place as data.

    Args:
        message: what, where, what to do.
        path: file or folder concerned.
        tensor: entry of a file concerned.
        key: row key, concept or setting concerned.
        row: row number concerned.
        extra: optional-dependency extra that would help.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        tensor: str | None = None,
        key: str | None = None,
        row: int | None = None,
        extra: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path: Any = path  # Any: ImportError has an attribute of this name and another type
        self.tensor = tensor
        self.key = key
        self.row = row
        self.extra = extra

    def __str__(self) -> str:
        return self.message


class BankNotFoundError(GMemError, FileNotFoundError):
    """There is no bank at the path."""


class FormatError(GMemError, ValueError):
    """The file is not a bank, or not one that this reader understands."""


class FormatVersionError(FormatError):
    """The file was written by a newer major version of the format."""


class CorruptError(FormatError):
    """The file is damaged."""


class EncoderError(GMemError, ValueError):
    """The encoder is unknown, or its weights cannot be loaded."""


class EncoderMismatchError(EncoderError):
    """Snippets of another encoder, dimension or space were offered."""


class UnknownKeyError(GMemError, KeyError):
    """The bank has no such row key, concept or row number."""


class MaskedRowError(GMemError, IndexError):
    """A masked row was asked for: a mask is a promise."""


class ConceptExistsError(GMemError, ValueError):
    """The concept name is taken."""


class SourceError(GMemError, ValueError):
    """The source holds no usable image."""


class OutputExistsError(GMemError, FileExistsError):
    """The output exists and overwriting was not asked for."""


class WriteError(GMemError, OSError):
    """The operating system refused a write; what was there before still stands."""


class LockedError(GMemError, OSError):
    """Another process is editing the same bank."""


class StaleIndexError(GMemError, ValueError):
    """The index was made for another bank, or for another state of this one."""


class MissingDependencyError(GMemError, ImportError):
    """An optional package is not installed."""


class CheckpointError(GMemError, ValueError):
    """A generator checkpoint is absent, damaged or made for something else."""


class ConfigError(GMemError, ValueError):
    """A setting is unknown or out of range."""


class EncoderSettingError(EncoderError, ConfigError):
    """An encoder's name, device or parameter is unknown or out of range."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'a' or 'b'?" for the known words nearest to `word`, or "" when none is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(name) for name in near)}?" if near else ""


def first_three(names: Sequence[str]) -> str:
    """Return up to three names quoted, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def unusable_images(reasons: Mapping[str, str], total: int) -> SourceError:
    """Return the error for images that a bank has rows of and that can no longer be read.

    Args:
        reasons: key → why; the first ten are told.
        total: images that were looked at.
    """
    told = [f"{key!r} ({reason})" for key, reason in list(reasons.items())[:10]]
    more = f" and {len(reasons) - len(told)} more" if len(reasons) > len(told) else ""
    return SourceError(
        f"{len(reasons)} of {total} images cannot be used: {', '.join(told)}{more}. They could be read when the bank was built: "
        "restore them, give another folder with --images, or remove their rows with 'gmem-bank remove --key KEY'",
        key=next(iter(reasons)),
    )


def reason_of(error: BaseException) -> str:
    """Return what an error says; of one of the operating system's its words alone, without number and path."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def why_not_loaded(error: BaseException) -> str:
    """Return in some words why torch's safe reader refused a file, without its advice to read the file unsafely."""
    text = str(error)
    asked = re.search(r"GLOBAL `?([\w.]+)", text)
    if asked:
        return f"it asks for {asked[1][:100]}"
    lines = [line.strip() for line in text.splitlines() if "weights_only" not in line and "torch.load" not in line]
    return next((line[:200] for line in lines if line), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory ran out: Python's own, or what PyTorch raises for it on a CPU or a GPU."""
    if isinstance(error, MemoryError):
        return True
    told = isinstance(error, RuntimeError) and type(error).__module__.partition(".")[0] in ("builtins", "torch")
    return told and any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "DefaultCPUAllocator")
    )
