"""Data sets of the Hugging Face hub as sources: "hf://datasets/OWNER/NAME/PATTERN", from the hub cache or the hub.

Shapes: none here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gmem_bank.errors import MissingDependencyError, SourceError

HUB = "hf://datasets/"
DEFAULT_PATTERN = "*.parquet"


@cache
def hub_pattern(address: str) -> str:
    """Return the glob pattern, in the hub cache, of the Parquet files that an address names.

    Args:
        address: "hf://datasets/OWNER/NAME[@REVISION][/PATTERN]"; without a pattern every Parquet file is taken.

    Raises:
        MissingDependencyError: huggingface_hub is not installed.
        SourceError: not such an address, or the data set is not in the cache and could not be fetched.
    """
    parts = address.removeprefix(HUB).split("/", 2)
    if len(parts) < 2 or not all(parts[:2]):
        raise SourceError(f"{address!r} is not hf://datasets/OWNER/NAME[@REVISION][/PATTERN]", path=address)
    name, _, revision = parts[1].partition("@")
    pattern = parts[2] if len(parts) == 3 and parts[2] else DEFAULT_PATTERN
    if not pattern.endswith(".parquet"):
        raise SourceError(f"{address!r}: the pattern must end in .parquet", path=address)
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise MissingDependencyError(
            "this needs huggingface_hub: pip install huggingface_hub (the extra gmem[hf])", extra="hf"
        ) from error
    try:
        folder = snapshot_download(
            f"{parts[0]}/{name}", repo_type="dataset", revision=revision or None, allow_patterns=[pattern]
        )
    except Exception as error:  # the hub client raises its own, its transport's and the system's errors
        raise SourceError(
            f"the data set {parts[0]}/{name} is not in the hub cache and could not be fetched ({type(error).__name__}): on a "
            f"machine with a network run 'hf download --repo-type dataset {parts[0]}/{name}' and copy the cache (HF_HOME)",
            path=address,
        ) from error
    return str(Path(folder) / ("**/" * (pattern == DEFAULT_PATTERN) + pattern))
