"""Numbers that a caller gives: of any integer or real type, NumPy's too, taken as Python's own; anything else is refused."""

from __future__ import annotations

import math
import operator
from typing import Any

from gmem_bank.errors import ConfigError


def whole(value: object) -> int | None:
    """Return a whole number of any integer type as an int; None: it is none, as True is none."""
    try:
        return None if type(value).__name__ in ("bool", "bool_") else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def real(value: Any) -> float:
    """Return a number of any type as a float; NaN: it is none."""
    try:
        return math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError):
        return math.nan


def require_whole(name: str, value: object, least: int, most: int | None = None) -> int:
    """Return a whole number in a range as an int; raises ConfigError that names the setting."""
    number = whole(value)
    if number is None or number < least or (most is not None and number > most):
        upto = f"at least {least}" if most is None else f"{least} to {most}"
        raise ConfigError(
            f"{name} must be {upto}, a whole number; got {value}", key=name.rpartition(" ")[2].strip("()")
        )
    return number
