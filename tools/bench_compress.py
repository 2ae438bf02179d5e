"""How fast and how exactly banks are compressed, beside named peers in the same run, as JSON.

python -m tools.bench_compress [--rows 200000] [--rank 64] [--runs 3] [--threads 2] [--memory-rows 1000000] [--parts PART...]
    [--folder DIR]

`compress` is the whole command: reading, checking hashes, both passes, the report, writing and syncing the bank. The peers, in
turns with it: scikit-learn's PCA by the covariance matrix from file to file, as a user would write it, and in memory; and
torch.linalg.svd of the centred matrix, in memory. Each run has a process and as many cores as threads (tools/compress_peers.py).
The part "memory" takes 3 GB of disk at its default.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
from gmem_bank import keys as key_tables
from gmem_bank import moments, segments
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.storage import write
from gmem_bank.storage.schema import Header, Segment

DIM = 768
BLOCK = 20_000
PARTS = ("speed", "reading", "mean", "classes", "insertion", "memory")


def rows_of(num_rows: int, mean: float, seed: int = 0) -> Iterator[NDArray[np.float32]]:
    """Yield blocks of rows whose spectrum falls to a hundredth, around a mean."""
    rng = np.random.default_rng(seed)
    turn = np.linalg.qr(rng.standard_normal((DIM, DIM)))[0].astype(np.float32)
    centre = (mean * rng.standard_normal(DIM)).astype(np.float32)
    sizes = np.geomspace(1, 0.01, DIM).astype(np.float32)
    for start in range(0, num_rows, BLOCK):
        yield (rng.standard_normal((min(BLOCK, num_rows - start), DIM), dtype=np.float32) * sizes) @ turn + centre


def make_bank(path: Path, num_rows: int, mean: float) -> None:
    """Write a dense f32 bank, in blocks."""
    keys = [f"class{row % 100:02d}/{row:07d}.jpg" for row in range(num_rows)]
    concepts = segments.concepts_of_folders(keys)
    header = Header(
        kind="dense", space="raw", dim=DIM, segments=(Segment(name="0", num_rows=num_rows),), concepts=tuple(concepts),
        encoder=EncoderSpec(name="made-up", family="precomputed", dim=DIM, space="raw"),
        sources=(Source(kind="array", path="x.npy"),), history=({"operation": "build", "arguments": {}, "num_rows": num_rows},),
    )  # fmt: skip
    snippets = segments.snippet_payload(lambda: rows_of(num_rows, mean), num_rows, DIM, "f32")
    own = segments.segment_payloads("0", key_tables.encode(keys), np.zeros(num_rows, np.int64), snippets)
    table = segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys)))
    write(path, header, own | table | segments.concept_payloads(concepts))


def alone(name: str, bank: Path, output: Path, rank: int, threads: int) -> dict[str, float]:
    """Compress once in a process of its own (see `compress_peers`), on as many cores as it may have threads."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "tools.compress_peers", name, str(bank), str(output), str(rank), str(threads)]
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:threads])
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    finally:
        os.sched_setaffinity(0, cores)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def exactness(bank: Path, output: Path) -> dict[str, float]:
    """Return errors against eigenvalues of a scatter matrix that is summed in float64, mean first."""
    values = gmem_bank.open(bank).stored.array("0/snippets")
    mean = values.mean(axis=0, dtype=np.float64)
    scatter, lost = np.zeros((DIM, DIM)), 0.0
    made: Any = gmem_bank.open(output)
    basis, centre = made.basis.astype(np.float64), made.mean.astype(np.float64)
    for start in range(0, len(values), BLOCK):
        block = values[start : start + BLOCK].astype(np.float64)
        rows = np.arange(start, start + len(block))
        lost += float(np.square(block - made.coefficients(rows).astype(np.float64) @ basis - centre).sum())
        block -= mean
        scatter += block.T @ block
    sigma = np.sqrt(np.linalg.eigvalsh(scatter)[::-1])
    rank = len(basis)
    optimum = np.sqrt((sigma[rank:] ** 2).sum())
    counted = sigma[:rank] >= sigma[0] / 100
    return {
        "error_over_optimum_minus_1": float(np.sqrt(lost) / optimum - 1) if optimum else float(np.sqrt(lost)),
        "largest_relative_error_of_a_singular_value": float(
            np.abs(made.singular_values / sigma[:rank] - 1)[counted].max()
        ),
        "values_looked_at": int(counted.sum()),
    }


def speed(folder: Path, num_rows: int, rank: int, runs: int, threads: int) -> dict[str, Any]:
    """Time compress and the peers in turns, the slow SVD in fewer of them; ratios are medians over turns."""
    bank, output, other = (folder / name for name in ("bank.safetensors", "out.safetensors", "peer.safetensors"))
    make_bank(bank, num_rows, 1.0)
    times: dict[str, list[float]] = {"compress": [], "pca-file": [], "pca": [], "svd": []}
    used: dict[str, list[float]] = {name: [] for name in times}
    peaks: dict[str, float] = {}
    for turn in range(runs):
        for name in times if turn < max(1, runs // 3) else ("compress", "pca-file", "pca"):
            found = alone(name, bank, output if name == "compress" else other, rank, threads)
            times[name].append(found["seconds"])
            used[name].append(found["processor_seconds"])
            peaks[name] = max(peaks.get(name, 0.0), found["peak_megabytes_above_start"])
    other.unlink(missing_ok=True)
    mine = times.pop("compress")
    return {
        "rows": num_rows, "dim": DIM, "rank": rank, "threads": threads, "seconds": {"compress": mine, **times},
        "times_as_fast": {
            name: float(np.median([t / m for t, m in zip(own, mine, strict=False)])) for name, own in times.items()
        },
        "processor_seconds": {name: float(np.median(own)) for name, own in used.items()},
        "peak_megabytes_above_start": peaks, "exactness": exactness(bank, output),
    }  # fmt: skip


def large_mean(folder: Path, num_rows: int, threads: int) -> dict[str, Any]:
    """Compress rows whose mean is a hundred times their largest spread, to full rank."""
    bank, output = folder / "mean.safetensors", folder / "mean-out.safetensors"
    make_bank(bank, num_rows, 100.0)
    alone("compress", bank, output, DIM - 8, threads)
    return {"rows": num_rows, "mean": 100.0, "rank": DIM - 8, **exactness(bank, output)}


def sorted_classes(num_rows: int = 20_000, dim: int = 512, rank: int = 256) -> dict[str, float]:
    """Return the basis's error over the optimum, less 1, for 20 classes one after the other, by their distance in spreads."""
    rng, found = np.random.default_rng(3), {}
    inside = rng.standard_normal((num_rows, dim)) * np.geomspace(1, 0.01, dim)
    for apart in (10, 30, 100):
        centres = apart * rng.standard_normal((20, dim))
        values = np.asarray(inside + centres[np.arange(num_rows) * 20 // num_rows], np.float32)
        sums = moments.RunningSums(dim)
        for start in range(0, num_rows, 2048):
            sums.add(moments.sum_chunk(values[start : start + 2048].copy(), wide=False))
        basis = moments.principal(sums.moments(), rank).basis
        exact = values - values.mean(axis=0, dtype=np.float64)
        optimum = np.sqrt(np.linalg.eigvalsh(exact.T @ exact)[: dim - rank].sum())
        found[str(apart)] = float(np.linalg.norm(exact - exact @ basis.T @ basis) / optimum - 1)
    return found


def insertion(folder: Path) -> dict[str, Any]:
    """Insert 100 snippets orthogonal to a bank's basis: what grows, what projection would keep, what truncation keeps."""
    bank = folder / "grow.safetensors"
    make_bank(bank, 5000, 0.0)
    gmem_bank.compress(bank, rank=64)
    before: Any = gmem_bank.open(bank)
    rng = np.random.default_rng(1)
    new = rng.standard_normal((100, DIM))
    new -= new @ before.basis.T.astype(np.float64) @ before.basis
    few = np.linalg.svd(new, full_matrices=False)[2][:8]
    new = np.asarray(10 * (rng.standard_normal((100, 8)) @ few), np.float32)
    hashes = {name: value for name, value in before.header.hashes.items() if name.startswith("0/")}
    report = gmem_bank.insert_snippets(bank, new, name="new", grow_below=0.999, report=False).details
    after = gmem_bank.open(bank).header.hashes
    cut = gmem_bank.compress(bank, rank=64).details
    kept = gmem_bank.open(bank).snippets(np.arange(5000, 5100))
    cosines = np.vecdot(kept, new) / np.linalg.norm(kept, axis=1) / np.linalg.norm(new, axis=1)
    return {
        "grown_directions": report["grown_directions"], "cosine": report["cosine"],
        "cosine_by_projection": report["cosine_by_projection"],
        "old_segment_unchanged": all(after[name] == value for name, value in hashes.items()),
        "after_truncation": {"rank": cut["rank"], "cosine_mean": float(cosines.mean()), "cosine_min": float(cosines.min())},
    }  # fmt: skip


def reading(folder: Path, num_rows: int, runs: int) -> dict[str, Any]:
    """Gather 1,024 random rows a call from compressed banks, as snippets: million rows a second."""
    bank, rng, found = folder / "bank.safetensors", np.random.default_rng(2), {}
    if not bank.exists():
        make_bank(bank, num_rows, 1.0)
    for name, dtype in (("f32", "f32"), ("f16", "f16"), ("i8", "i8"), ("f32, 16 kept", "f32"), ("i8, 16 kept", "i8")):
        path = folder / "read.safetensors"
        path.unlink(missing_ok=True)
        gmem_bank.compress(bank, rank=64, dtype=dtype, output=path)
        if "kept" in name:
            gmem_bank.mask_coefficients(path, keep=16, undo=False)
        opened = gmem_bank.open(path)
        opened.snippets(opened.rows()[:100_000])
        rows = rng.integers(0, min(100_000, len(opened)), (20 * runs, 1024))
        times = []
        for own in rows:
            started = time.perf_counter()
            opened.snippets(own)
            times.append(time.perf_counter() - started)
        found[name] = round(1024 / float(np.median(times)) / 1e6, 4)
    return found


def memory(folder: Path, num_rows: int, rank: int, threads: int) -> dict[str, Any]:
    """Compress many rows: peak memory."""
    bank = folder / "many.safetensors"
    make_bank(bank, num_rows, 1.0)
    return {"rows": num_rows, **alone("compress", bank, folder / "many-out.safetensors", rank, threads)}


def main() -> int:
    """Measure all, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the peers and of compress")
    parser.add_argument("--memory-rows", type=int, default=1_000_000)
    parser.add_argument("--mean-rows", type=int, default=50_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    works: dict[str, Callable[[], Any]] = {
        "speed": lambda: speed(folder, given.rows, given.rank, given.runs, given.threads),
        "reading": lambda: reading(folder, given.rows, given.runs),
        "mean": lambda: large_mean(folder, given.mean_rows, given.threads),
        "classes": sorted_classes,
        "insertion": lambda: insertion(folder),
        "memory": lambda: memory(folder, given.memory_rows, given.rank, given.threads),
    }
    try:
        result = {name: work() for name, work in works.items() if name in given.parts}
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
