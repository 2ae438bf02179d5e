"""pyarrow, or an error that says how to get it.

Shapes: none here.
"""

from __future__ import annotations

from typing import Any

from gmem_bank.errors import MissingDependencyError


def require_pyarrow() -> Any:
    """Return the pyarrow module, its Parquet part with it; raises MissingDependencyError that names the extra."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            "Parquet and Arrow tables need pyarrow: pip install pyarrow (the extra gmem[parquet])", extra="parquet"
        ) from error
    return pyarrow
