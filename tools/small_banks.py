"""The smallest whole files of a bank that keep what is asked for, measured by NumPy beside the package, as JSON.

python -m tools.small_banks --bank train.safetensors [--held-out test.safetensors] [--cosine 0.95] [--overlap 0.7] [--points 1]

Keys begin with the class ("cat/0001.jpg"). First file: mean cosine to the bank of at least --cosine. Second: overlap of the 10
nearest neighbours of at least --overlap, and a 10-NN accuracy on the held-out bank at most --points below that of the bank
itself. For each dtype the rank is found by halving; the files are written, and read back by the package. `--synthetic N` makes a
bank of N rows instead, with 768 dimensions and the spectrum σ_k ∝ k^(-1/2), in ten classes whose centres have half that spread.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank

K, SAMPLE = 10, 2048
HELD_OUT = 2000
CENTRE = 0.5
"""Length of the classes' centres, of 1 for the rows about them."""


def unit_rows(path: Path) -> NDArray[np.float32]:
    """Return all snippets of a bank, of length 1."""
    bank = gmem_bank.open(path)
    snippets = bank.snippets(bank.rows())
    return snippets / np.linalg.norm(snippets, axis=1, keepdims=True)


def classes(path: Path) -> NDArray[np.str_]:
    """Return the class of every row."""
    bank = gmem_bank.open(path)
    return np.array([key.split("/")[0] for key in bank.keys(bank.rows())])


def nearest(
    queries: NDArray[np.float32], rows: NDArray[np.float32], itself: NDArray[np.int64] | None
) -> NDArray[np.int64]:
    """Return the (B, K) nearest rows by cosine, each query's own row left out."""
    found = []
    for start in range(0, len(queries), 256):
        scores = queries[start : start + 256] @ rows.T
        if itself is not None:
            scores[np.arange(len(scores)), itself[start : start + 256]] = -np.inf
        found.append(np.argpartition(-scores, K, axis=1)[:, :K])
    return np.concatenate(found)


class Judge:
    """Measures a compressed bank against the bank it was made of."""

    def __init__(self, bank: Path, held_out: Path | None) -> None:
        self.rows, self.classes = unit_rows(bank), classes(bank)
        self.sample = np.sort(
            np.random.default_rng(0).choice(len(self.rows), min(SAMPLE, len(self.rows)), replace=False)
        )
        self.neighbours = nearest(self.rows[self.sample], self.rows, self.sample)
        self.queries = None if held_out is None else unit_rows(held_out)
        self.truth = None if held_out is None else classes(held_out)
        self.full = self.accuracy(self.rows)

    def accuracy(self, rows: NDArray[np.float32]) -> float | None:
        """Return the share of held-out rows that their nearest neighbours classify rightly."""
        if self.queries is None or self.truth is None:
            return None
        votes = self.classes[nearest(self.queries, rows, None)]
        names, places = np.unique(votes, return_inverse=True)
        counts = np.apply_along_axis(np.bincount, 1, places.reshape(votes.shape), minlength=len(names))
        return float(np.mean(names[counts.argmax(axis=1)] == self.truth))

    def facts(self, path: Path) -> dict[str, Any]:
        """Return what a compressed bank kept."""
        rows = unit_rows(path)
        cosines = np.vecdot(rows.astype(np.float64), self.rows.astype(np.float64))
        found = nearest(rows[self.sample], rows, self.sample)
        shared = [len(set(a) & set(b)) / K for a, b in zip(found.tolist(), self.neighbours.tolist(), strict=True)]
        return {
            "bytes": path.stat().st_size, "cosine_mean": round(float(cosines.mean()), 5),
            "cosine_min": round(float(cosines.min()), 4),
            "overlap_at_10": round(float(np.mean(shared)), 4), "knn_accuracy": self.accuracy(rows),
        }  # fmt: skip


def smallest(
    judge: Judge, bank: Path, folder: Path, dtype: str, good: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return the facts of the lowest rank that is good."""
    low, high, best = 1, gmem_bank.open(bank).dim, {}
    while low <= high:
        rank = (low + high) // 2
        path = folder / f"{dtype}-{rank}.safetensors"
        if not path.exists():
            gmem_bank.compress([bank], rank=rank, dtype=dtype, output=path)
        facts = {"rank": rank, "dtype": dtype, **judge.facts(path)}
        if good(facts):
            best, high = facts, rank - 1
        else:
            low = rank + 1
    return best


def synthetic(folder: Path, num_rows: int) -> tuple[Path, Path]:
    """Write a bank with the stated spectrum, and one of held-out rows from the same classes."""
    rng = np.random.default_rng(0)
    spread = np.arange(1, 769) ** -0.5
    centres, turn = rng.standard_normal((10, 768)) * spread, np.linalg.qr(rng.standard_normal((768, 768)))[0]
    paths = []
    for name, count in (("synthetic", num_rows), ("held-out", HELD_OUT)):
        own = rng.integers(0, 10, count)
        values = (CENTRE * centres[own] + rng.standard_normal((count, 768)) * spread) @ turn
        keys = np.array([f"c{c}/{row:06d}" for row, c in enumerate(own)])
        np.savez(folder / f"{name}.npz", snippets=values.astype(np.float32), keys=keys)
        paths.append(folder / f"{name}.safetensors")
        gmem_bank.build_precomputed(gmem_bank.read_array(folder / f"{name}.npz"), paths[-1])
    return paths[0], paths[1]


def main() -> int:
    """Search, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=Path)
    parser.add_argument("--held-out", type=Path)
    parser.add_argument("--synthetic", type=int, metavar="N")
    parser.add_argument(
        "--sweep", type=int, nargs="+", metavar="RANK", help="Give the table of 'compress --sweep' at these ranks."
    )
    parser.add_argument("--cosine", type=float, default=0.95)
    parser.add_argument("--overlap", type=float, default=0.7)
    parser.add_argument("--points", type=float, default=1.0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bank, held_out = synthetic(folder, given.synthetic) if given.synthetic else (given.bank, given.held_out)
        judge = Judge(bank, held_out)
        least = -1.0 if judge.full is None else judge.full - given.points / 100
        goals: dict[str, Callable[[dict[str, Any]], bool]] = {
            f"mean cosine >= {given.cosine}": lambda facts: facts["cosine_mean"] >= given.cosine,
            f"overlap >= {given.overlap}, accuracy within {given.points} points": lambda facts: (
                facts["overlap_at_10"] >= given.overlap and (facts["knn_accuracy"] or 0.0) >= least
            ),
        }
        result: dict[str, Any] = {"bytes": bank.stat().st_size, "rows": len(judge.rows), "knn_accuracy": judge.full}
        for goal, good in goals.items():
            result[goal] = {dtype: smallest(judge, bank, folder, dtype, good) for dtype in ("f32", "f16", "i8")}
        if given.sweep:
            result["sweep"] = gmem_bank.sweep(bank, ranks=given.sweep).to_json()["ways"]
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
