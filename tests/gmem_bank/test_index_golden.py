"""Index files of version 1, written once: they open for ever, and find what brute force found then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank.index_file import read_index
from tests.conftest import DATA

GOLDEN = sorted((DATA / "indexes").glob("*.index"))


def test_there_is_one_of_every_kind_and_all_are_small() -> None:
    """Nobody has deleted one."""
    assert [path.name for path in GOLDEN] == [
        f"v1-{kind}.index" for kind in ("flat", "hnsw", "ivf-flat", "ivf-pq", "ivf-rabitq")
    ]
    assert all(path.stat().st_size < 100_000 for path in GOLDEN)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_a_golden_index_opens_and_finds(path: Path) -> None:
    """With all lists and candidates the answers are those of NumPy's brute force on the day."""
    bank = gmem_bank.open(DATA / "indexes" / "v1-bank.safetensors")
    known = json.loads((DATA / "indexes" / "v1-bank.json").read_text(encoding="utf-8"))
    index = gmem_bank.open_index(bank, path)
    everything = {"flat": {}, "hnsw": {"nprobe": 260, "rerank": 52}}.get(
        index.kind, {"nprobe": read_index(path).facts["num_lists"], "rerank": 52}
    )
    found = index.nearest(np.array(known["queries"], np.float32), 5, **everything)[1]
    np.testing.assert_array_equal(found, known["rows"])
