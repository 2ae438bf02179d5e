"""Banks that are parts of one build (`--num-shards`): whether they fit together, and whether all are there.

Shapes: none here.
"""

from __future__ import annotations

from collections.abc import Sequence

from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError
from gmem_bank.provenance import Json

DECIDING = ("num_shards", "batch_size", "num_listed", "limit", "shuffle_seed", "flip", "include", "exclude")
"""What must be the same of all parts: else images are missing between them, or stand in two."""


def check_parts(banks: Sequence[MemoryBank]) -> dict[str, Json]:
    """Return {"parts": {"of": …, "missing": […]}} where banks are parts of one build, {} where none is.

    Raises:
        ConfigError: they were cut in different ways, or the source had another number of images meanwhile.
    """
    parts = [(bank, arguments) for bank in banks if (arguments := _arguments(bank)).get("num_shards", 1) > 1]
    if not parts:
        return {}
    first, wanted = parts[0]
    for bank, arguments in parts[1:]:
        differing = [name for name in DECIDING if arguments.get(name) != wanted.get(name)]
        if differing:
            facts = ", ".join(f"{name} {wanted.get(name)} and {arguments.get(name)}" for name in differing)
            raise ConfigError(
                f"{first.path} and {bank.path} are parts of builds that were cut in different ways ({facts}), so that together "
                "they are no whole: build them alike",
                key=differing[0],
            )
    have = {arguments.get("shard", 0) for _, arguments in parts}
    total = int(wanted["num_shards"])
    return {"parts": {"of": total, "missing": sorted(set(range(total)) - have)}}


def _arguments(bank: MemoryBank) -> dict[str, Json]:
    """Return how a bank was built, {} where it was made or edited otherwise."""
    history = bank.history
    if len(history) != 1 or history[0].get("operation") != "build":
        return {}
    arguments = history[0].get("arguments")
    return arguments if isinstance(arguments, dict) else {}
