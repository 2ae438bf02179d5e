"""Write the golden indexes of the current version, and their bank, to tests/data/indexes (an existing one is never replaced).

python -m tools.make_golden_index

One index of every kind over 260 rows of 8 numbers, and what brute force in NumPy finds for five queries.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

import gmem_bank
from gmem_bank.index_choice import KINDS
from gmem_bank.index_facts import VERSION

NUM_ROWS, DIM, K = 260, 8, 5
FOLDER = Path(__file__).parents[1] / "tests" / "data" / "indexes"


def main() -> int:
    """Write what is not there."""
    FOLDER.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((NUM_ROWS, DIM)).astype(np.float32), rng.standard_normal((5, DIM))
    bank = FOLDER / f"v{VERSION}-bank.safetensors"
    if not bank.exists():
        array = FOLDER / "rows.npy"  # beside the bank, whose source path is relative
        np.save(array, rows)
        gmem_bank.build_precomputed(gmem_bank.read_array(array), bank, space="raw")
        array.unlink()
        bank.with_name(f"{bank.name}.report.json").unlink()
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        order = np.argsort(-(queries @ unit.T), axis=1)[:, :K]
        answers = {"queries": np.float32(queries).tolist(), "rows": order.tolist()}
        bank.with_suffix(".json").write_text(json.dumps(answers) + "\n")
    for kind in KINDS:
        path = FOLDER / f"v{VERSION}-{kind}.index"
        if not path.exists():
            gmem_bank.build_index(bank, kind=kind, recall=0.5, output=path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
