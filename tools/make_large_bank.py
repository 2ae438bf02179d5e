"""A large bank for benchmarks: clustered snippets with the spectrum of a real one, streamed to a file.

    python -m tools.make_large_bank big.safetensors --rows 1000000 --dim 768 --dtype f16

A snippet is mean + group + cluster + its own deviation, each drawn with singular values falling as (i + 10)^-0.75 (90 % of the
energy in the first third of the components), turned by one random rotation, and brought to length 1. Rows come in no order of
cluster. The same options give the same bytes; queries are drawn from the same clusters with deviations of their own.

Shapes: N rows, D dimensions, b rows of a block.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import factors, keys, segments
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.space import scale_to_unit
from gmem_bank.storage import Payload, write
from gmem_bank.storage.schema import Header, Segment
from gmem_bank.vectors import coefficient_payloads

BLOCK_ROWS = 8192
ROWS_PER_CLUSTER = 250
NUM_GROUPS = 64
SHARES = {"mean": 0.3, "group": 0.5, "cluster": 0.45, "own": 0.65}
"""Lengths of the parts of a snippet."""


@dataclass(frozen=True, kw_only=True)
class Clustered:
    """Where the snippets come from."""

    num_rows: int
    dim: int = 768
    seed: int = 0

    def _draw(self, rng: np.random.Generator, num: int) -> NDArray[np.float32]:
        sizes = (np.arange(self.dim) + 10.0) ** -0.75
        sizes = (sizes / np.linalg.norm(sizes)).astype(np.float32)
        return rng.standard_normal((num, self.dim), np.float32) * sizes

    @cached_property
    def _fixed(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(C, D) centres, not yet turned, and the (D, D) rotation."""
        rng = np.random.default_rng([self.seed, 1])
        num = max(1, self.num_rows // ROWS_PER_CLUSTER)
        groups = self._draw(rng, NUM_GROUPS)[rng.integers(NUM_GROUPS, size=num)]
        centres = (
            SHARES["mean"] * self._draw(rng, 1) + SHARES["group"] * groups + SHARES["cluster"] * self._draw(rng, num)
        )
        rotation = np.linalg.qr(rng.standard_normal((self.dim, self.dim)))[0]
        return centres, rotation.astype(np.float32)

    def _snippets(self, rng: np.random.Generator, num: int) -> NDArray[np.float32]:
        centres, rotation = self._fixed
        values = centres[rng.integers(len(centres), size=num)] + SHARES["own"] * self._draw(rng, num)
        return scale_to_unit(values @ rotation)

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Yield (b, D) float32 unit snippets, N in all."""
        for start in range(0, self.num_rows, BLOCK_ROWS):
            rng = np.random.default_rng([self.seed, 2, start])
            yield self._snippets(rng, min(BLOCK_ROWS, self.num_rows - start))

    def queries(self, num: int) -> NDArray[np.float32]:
        """Return (num, D) float32 unit snippets that are not in the bank."""
        return self._snippets(np.random.default_rng([self.seed, 3]), num)


def write_bank(path: Path, made: Clustered, *, dtype: str = "f16", rank: int | None = None) -> None:
    """Write the snippets as a dense bank, or with `rank` as a factored one (basis by eigenvectors of the Gram matrix)."""
    num, vectors = made.num_rows, {}
    entries: dict[str, Payload] = {}
    if rank is None:
        vectors = {"snippets": segments.snippet_payload(made.blocks, num, made.dim, dtype)}
    else:
        basis, mean = _factors(made, rank)
        coefficients = np.concatenate([factors.project(block, basis, mean) for block in made.blocks()])
        vectors = coefficient_payloads(coefficients, dtype)
        entries = {"basis": Payload.of(basis), "mean": Payload.of(mean)}
    names = [f"{row:09d}.png" for row in range(num)]
    text, offsets = keys.encode(names)
    entries |= segments.key_table_payloads(*keys.sorted_table(keys.hashes_of(names)))
    entries |= {f"0/{what}": payload for what, payload in vectors.items()}
    entries |= {"0/keys.bytes": Payload.of(text), "0/keys.offsets": Payload.of(offsets)}
    entries["0/source"] = Payload.of(np.zeros(num, np.uint32))
    header = Header(
        kind="dense" if rank is None else "factored", space="unit", dim=made.dim, concepts=(),
        segments=(Segment(name="0", num_rows=num),), sources=(Source(kind="folder", path="."),),
        encoder=EncoderSpec(name="clustered", family="clustered", dim=made.dim, space="unit"),
        history=({"operation": "build", "arguments": {"seed": made.seed}, "num_rows": num},),
    )  # fmt: skip
    write(path, header, entries)


def _factors(made: Clustered, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    gram, total = np.zeros((made.dim, made.dim)), np.zeros(made.dim)
    for block in made.blocks():
        gram += block.T @ block
        total += block.sum(axis=0, dtype=np.float64)
    mean = total / made.num_rows
    vectors = np.linalg.eigh(gram - made.num_rows * np.outer(mean, mean))[1]
    return np.ascontiguousarray(vectors[:, ::-1][:, :rank].T, np.float32), mean.astype(np.float32)


def main() -> None:
    """Write a bank."""
    parser = argparse.ArgumentParser(description="Write a large clustered bank for benchmarks.")
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--dtype", default="f16", help="f32, f16 or bf16; with --rank f32, f16 or i8")
    parser.add_argument("--rank", type=int, default=None, help="Write a factored bank of this rank.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    made = Clustered(num_rows=options.rows, dim=options.dim, seed=options.seed)
    write_bank(options.output, made, dtype=options.dtype, rank=options.rank)


if __name__ == "__main__":
    main()
