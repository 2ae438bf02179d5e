"""Snippets by arithmetic on snippets, in the bank's space; nothing is written.

Shapes: T points of a way, D dimensions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from gmem_bank import manipulate
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError, GMemError, suggest
from gmem_bank.resolving import snippet_of
from gmem_bank.space import to_space, unusable_rows

Resolve = Callable[[MemoryBank, str], NDArray[np.float32]]
"""Turns what the user named into a (D,) snippet: `snippet_of`, or `snippet_or_image`, which also takes image files."""


def interpolate_snippets(
    bank: MemoryBank,
    first: str,
    second: str,
    *,
    method: str = "slerp",
    steps: int = 6,
    seed: int = 0,
    resolve: Resolve = snippet_of,
) -> NDArray[np.float32]:
    """Return the way from one snippet to another, both ends included.

    Args:
        bank: an open bank.
        first: key of a row, or a concept (its mean snippet), or what else `resolve` takes; t = 0.
        second: the same; t = 1.
        method: "linear", "slerp", "concat" or "mask".
        steps: T, at least 2.
        seed: for "mask".
        resolve: what turns `first` and `second` into snippets.

    Returns:
        (T, D) float32 in the bank's space.

    Raises:
        ConfigError: unknown method, or fewer than two steps.
        UnknownKeyError: neither a concept nor a key.
        GMemError: a point has no direction, such as the middle of the straight line between opposite snippets.
    """
    check_way(method, steps, seed)
    points = manipulate.interpolate(resolve(bank, first), resolve(bank, second), steps, method, seed=seed)
    return _in_space(bank, points, f"{method} between {first!r} and {second!r} has no direction: try slerp")


def compose_snippet(
    bank: MemoryBank, terms: str | Mapping[str, float], *, resolve: Resolve = snippet_of
) -> NDArray[np.float32]:
    """Return a weighted sum of snippets, Σ wᵢ·sᵢ, as (D,) float32 in the bank's space.

    Args:
        bank: an open bank.
        terms: "cat + 0.5*neon - dog", or {"cat": 1.0, "neon": 0.5, "dog": -1.0}; items as in `interpolate_snippets`.
        resolve: what turns an item into a snippet.

    Raises:
        ConfigError: the expression cannot be read, or is empty.
        UnknownKeyError: an item is neither a concept nor a key.
        GMemError: the sum has no direction.
    """
    weights, text = read_terms(terms)
    wide = [weight * resolve(bank, item).astype(np.float64) for item, weight in weights.items()]
    total = np.asarray(np.sum(wide, axis=0)[None], np.float32)
    return _in_space(bank, total, f"{text!r} has no direction: its items cancel out").reshape(-1)


def _in_space(bank: MemoryBank, points: NDArray[np.float32], hint: str) -> NDArray[np.float32]:
    if unusable_rows(points, bank.space):
        raise GMemError(hint)
    return to_space(points, bank.space)


def check_way(method: str, steps: int, seed: int) -> None:
    """Raise ConfigError unless a way can be gone so."""
    if method not in manipulate.METHODS:
        raise ConfigError(f"unknown method {method!r}.{suggest(method, manipulate.METHODS)}", key="method")
    if steps < 2:
        raise ConfigError(f"steps must be at least 2 (both ends are among them), got {steps}", key="steps")
    if seed < 0:
        raise ConfigError(f"seed must be 0 or more, got {seed}", key="seed")


def read_terms(terms: str | Mapping[str, float]) -> tuple[dict[str, float], str]:
    """Return item → weight of a sum, and the sum as text; raises ConfigError."""
    weights = parse_terms(terms) if isinstance(terms, str) else dict(terms)
    if not weights or not all(np.isfinite(weight) for weight in weights.values()):
        raise ConfigError(
            'the sum has no item, or a weight that is not finite: write it as "cat + 0.5*neon - dog"', key="terms"
        )
    return weights, terms if isinstance(terms, str) else " + ".join(f"{w}*{item}" for item, w in weights.items())


_TERM = re.compile(
    r"\s*(?P<sign>[+-])?\s*"
    r"(?:(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\*\s*)?"
    r"(?P<item>'[^']+'|\"[^\"]+\"|[^\s+*'\"][^\s+*]*)\s*"
)


def parse_terms(text: str) -> dict[str, float]:
    """Read "cat + 0.5*neon - dog" into item → weight; quotes hold an item with spaces, '+' or '*'.

    A minus stands apart from names ("a - b"), since names may have one inside ("a-b").

    Raises:
        ConfigError: the expression cannot be read; the place is named.
    """
    weights: dict[str, float] = {}
    position = 0
    while position < len(text):
        match = _TERM.match(text, position)
        if match is None or match["item"] == "-" or (position and match["sign"] is None):
            raise ConfigError(
                f'cannot read {text!r} from {text[position : position + 20]!r}: write it as "cat + 0.5*neon - dog"',
                key="terms",
            )
        item = match["item"].strip("'\"")
        sign = -1.0 if match["sign"] == "-" else 1.0
        weights[item] = weights.get(item, 0.0) + sign * float(match["weight"] or 1)
        position = match.end()
    return weights
