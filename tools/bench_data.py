"""How fast a training's data are read, against opening the file for each sample as the published data set does, as JSON.

python -m tools.bench_data [--folder DIR] [--megabytes 1024] [--batch 32] [--pairs 5]

Both read the same shards in the same random order, warm, in turn, and both end in one tensor a batch: samples of 1.6 MiB (latent
and patch tokens of both flips, as published) and of 16 KiB (a latent of 32×16×16 in f16, all that a step without patch tokens
uses). "opened" opens a file for every sample with safetensors and takes a slice of its mapped tensor; "ours" is
`gmem_bank.Shards`. "latents" is what the trainer gets: 16 KiB widened to float32 and normalised. Then, with none of the files in
the page cache, reads and bytes from the disk are counted as Linux tells them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

import gmem_bank
from gmem_bank.shards import shard_name
from gmem_gen.tokenizers import Normalisation

SAMPLES = {"1.6 MiB": ((410, 1024), "f32", 64), "16 KiB": ((32, 16, 16), "f16", 4096)}
"""Name → shape, type, rows a shard."""
STORED = {"f32": torch.float32, "f16": torch.float16}


def make_shards(folder: Path, shape: tuple[int, ...], dtype: str, rows: int, per_shard: int) -> gmem_bank.Shards:
    """Write random numbers."""
    writer, rng = gmem_bank.ShardWriter(folder, {"plan": 0}), np.random.default_rng(0)
    counts = [min(per_shard, rows - start) for start in range(0, rows, per_shard)]
    for number, count in enumerate(counts):
        keys = [f"{number}/{row}" for row in range(count)]
        writer.write(number, keys, rng.standard_normal((count, *shape), np.float32), dtype=dtype)
    writer.finish(len(counts), {})
    return gmem_bank.Shards(folder)


def opened(folder: Path, rows: np.ndarray, per_shard: int) -> torch.Tensor:
    """Return (B, …) samples, a file opened for each."""
    parts = []
    for row in rows.tolist():
        with safe_open(folder / shard_name(row // per_shard), "pt") as file:
            parts.append(file.get_slice("values")[row % per_shard : row % per_shard + 1])
    return torch.cat(parts)


def rate(read: Callable[[np.ndarray], Any], rows: np.ndarray, batch: int) -> float:
    """Return samples a second."""
    began = time.perf_counter()
    for start in range(0, len(rows), batch):
        read(rows[start : start + batch])
    return len(rows) / (time.perf_counter() - began)


def drop(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def counters() -> dict[str, int]:
    """Return what this process has read so far: calls, bytes asked for, bytes that came from the disk."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {name: int(value) for name, value in lines}


def cold(read: Callable[[np.ndarray], Any], folder: Path, rows: np.ndarray, sample_bytes: int) -> dict[str, float]:
    """Return reads and bytes from the disk of one sample, one sample at a time, with nothing in the page cache."""
    drop(folder)
    first, before = counters(), counters()
    looking = before["syscr"] - first["syscr"]  # the counters themselves are read
    began = time.perf_counter()
    for row in rows:
        read(rows[rows == row])
    seconds = time.perf_counter() - began
    after = counters()
    return {
        "reads_a_sample": round((after["syscr"] - before["syscr"] - looking) / len(rows), 3),
        "disk_bytes_over_sample_bytes": round(
            (after["read_bytes"] - before["read_bytes"]) / len(rows) / sample_bytes, 3
        ),
        "samples_a_second": round(len(rows) / seconds, 1),
    }


def measure(folder: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Time both readers in turn, then count the reads of both from the disk."""
    shape, dtype, per_shard = SAMPLES[name]
    sample_bytes = int(np.prod(shape)) * STORED[dtype].itemsize
    rows = max(2 * per_shard, options.megabytes * 2**20 // sample_bytes)
    shards = make_shards(folder, shape, dtype, rows, per_shard)
    order = np.random.default_rng(1).permutation(rows)[: options.samples or rows]
    readers: dict[str, Callable[[np.ndarray], Any]] = {
        "opened": lambda own: opened(folder, own, per_shard),
        "ours": lambda own: torch.from_numpy(shards.read_stored(own)),
    }
    if len(shape) == 3:
        normal = Normalisation.none(shape[0])
        readers["latents"] = lambda own: normal.apply(torch.from_numpy(shards.read_stored(own)))
    assert torch.equal(readers["opened"](order[:9]), readers["ours"](order[:9]))
    rates: dict[str, list[float]] = {reader: [] for reader in readers}
    for _ in range(options.pairs + 1):
        for reader, read in readers.items():
            rates[reader].append(rate(read, order, options.batch))
    result: dict[str, Any] = {"bytes": sample_bytes, "rows": rows, "shards": -(-rows // per_shard)}
    for reader, values in rates.items():
        result[f"samples_a_second_{reader}"] = round(statistics.median(values[1:]), 1)  # the first round warms up
    ratios = [a / b for a, b in zip(rates["ours"][1:], rates["opened"][1:], strict=True)]
    result["ours_over_opened"] = round(statistics.median(ratios), 3)
    few = order[: options.cold]
    result["cold"] = {reader: cold(readers[reader], folder, few, sample_bytes) for reader in ("ours", "opened")}
    return result


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where to put the shards; default: a temporary folder"
    )
    for option, default in (("--megabytes", 1024), ("--batch", 32), ("--pairs", 5), ("--cold", 200), ("--samples", 0)):
        parser.add_argument(option, type=int, default=default)
    options = parser.parse_args()
    record: dict[str, Any] = {"threads": torch.get_num_threads(), "batch": options.batch}
    for number, name in enumerate(SAMPLES):
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            record[name] = measure(Path(folder) / f"shards-{number}", name, options)
    print(json.dumps(record, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
