"""Which columns of a table, or arrays of a file, hold images, classes and keys; and the keys that follow.

Shapes: N images.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import overload

from gmem_bank.errors import SourceError
from gmem_bank.naming import concept_name_problem

NONE = "none"
"""Asked for as the label column: no classes, whatever columns there are."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What the user asked for; None: found by its usual name."""

    image: str | None = None
    """Column of a table, or array of a .npz file, that holds the images."""
    label: str | None = None
    """Its classes, which become concepts; "none" for no classes."""
    key: str | None = None
    """Column of a table that names the images; None: "<stem>/<number>"."""

    def label_among(self, usual: Sequence[str], names: Sequence[str], path: Path) -> str | None:
        """Return the label column to take, if any; raises SourceError where the one asked for is not there."""
        if self.label == NONE:
            return None
        if self.label is None:
            return usual[0] if usual else None
        if self.label not in names:
            raise SourceError(
                f"{path} has no column {self.label!r}; it has {list(names)[:12]}", path=path, key=self.label
            )
        return self.label

    def refuse_key(self, path: Path) -> None:
        """Raise SourceError where a key column is asked for of a file that can have none."""
        if self.key is not None:
            raise SourceError(f"{path}: --key-column is for tables", path=path, key=self.key)

    def refuse_all(self, source: str) -> None:
        """Raise SourceError where any column is asked for of a source that has none."""
        if (self.image, self.label, self.key) != (None, None, None):
            raise SourceError(
                f"{source} has no columns: --image-column, --label-column and --key-column are for arrays and tables"
            )


def numbered(stem: str, row: int, num_rows: int, *, flat: bool) -> str:
    """Return "<stem>/<number>" with leading zeros, or where `flat` "<stem>-<number>"."""
    return f"{stem}{'-' if flat else '/'}{row:0{len(str(num_rows - 1))}d}"


def labelled_key(classes: Sequence[str] | None, row: int, name: str) -> str:
    """Return the name, below its class where it has one."""
    return f"{classes[row]}/{name}" if classes is not None and classes[row] else name


class Classes(Sequence[str]):
    """The class of every image, "" where it has none: each name once, and four bytes an image.

    Args:
        names: the names.
        numbers: of every image the place of its name.
    """

    def __init__(self, names: Sequence[str], numbers: Sequence[int]) -> None:
        self._names, self._numbers = names, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return the class of an image, or those of several."""
        if isinstance(index, slice):
            return [self._names[number] for number in self._numbers[index]]
        return self._names[self._numbers[index]]


def class_names(labels: Iterable[object], path: Path) -> Classes:
    """Return a concept's name for every label: slashes become dashes, and None, NaN and -1 are no class, as data sets have it.

    Raises:
        SourceError: a label that is no text or number, one that cannot name a concept, or two that get one name.
    """
    numbers, places = array("i"), dict[str, int]()
    for label in labels:
        numbers.append(places.setdefault(_class_text(label, path), len(places)))
    names: dict[str, str] = {}
    for text in places:
        name = text.replace("/", "-").replace("\\", "-").strip()
        problem = concept_name_problem(name) if text else ""
        if problem:
            raise SourceError(
                f"{path}: the class {text[:60]!r} cannot name a concept: it {problem}. --label-column none leaves classes out",
                path=path,
            )
        if names.setdefault(name, text) != text:
            raise SourceError(
                f"{path}: the classes {names[name]!r} and {text!r} would both be the concept {name!r}", path=path
            )
    return Classes(list(names), numbers)


def _class_text(label: object, path: Path) -> str:
    if label is None or label == -1 or (isinstance(label, float) and math.isnan(label)):
        return ""
    if isinstance(label, bytes):
        return label.decode(errors="replace")
    if not isinstance(label, (str, Integral)):
        raise SourceError(f"{path}: a class must be a text or a whole number, got {str(label)[:60]!r}", path=path)
    return str(label)
