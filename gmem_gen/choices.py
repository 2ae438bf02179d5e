"""What a setting may be: one of several words, or a value that makes sense."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from typing import Any, Literal

from gmem_bank.errors import ConfigError, suggest


def require(condition: bool, section: str, name: str, value: object, what: str) -> None:
    """Raise ConfigError "SECTION.NAME must be WHAT" where the condition does not hold."""
    if not condition:
        raise ConfigError(f"{section}.{name} must be {what}, got {value!r}", key=f"{section}.{name}")


PUBLISHED_NAMES = {"inccreasing-decreasing": "increasing-decreasing", "heun2": "heun", "lognorm": "logit-normal"}
"""Names of the published code, where ours are others."""


def choose(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return the choice that a value means: as it stands, in another case, or by its published name.

    Raises:
        ConfigError: none of them; a near one is suggested.
    """
    if value in choices:
        return str(value)
    word = str(value).casefold()
    word = PUBLISHED_NAMES.get(word, word)
    for choice in choices:
        if choice.casefold() == word:
            return choice
    raise ConfigError(
        f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.{suggest(word, choices)}", key=name
    )


def choose_all(config: Any, section: str) -> None:
    """Check the fields that are one of several words, and put the word itself where a published name was given."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            chosen = choose(f"{section}.{name}", getattr(config, name), typing.get_args(hint))
            object.__setattr__(config, name, chosen)
