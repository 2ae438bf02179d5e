"""How fast a bank is read, grown, described and verified, beside named peers in the same run, as JSON.

python -m tools.bench_bank [--rows 400000] [--large-rows 1000000] [--runs 5] [--threads 2] [--folder DIR]

Needs about three times the large bank's size (1.5 GB at the default) on disk, in --folder or the temporary folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import gmem_bank
from gmem_bank import keys as key_tables
from gmem_bank import segments
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.space import to_space
from gmem_bank.storage import write
from gmem_bank.storage.schema import Header, Segment

DIM = 768
BATCH = 1024
BLOCK = 20_000
# The peak is the kernel's for the program itself: rusage of a child would count the pages of whoever started it.
PROGRAM = """
import atexit, pathlib, re
@atexit.register
def peak():
    status = pathlib.Path("/proc/self/status").read_text()
    pathlib.Path("peak").write_text(re.search(r"VmHWM:\\s*(\\d+)", status)[1])
from gmem_bank.cli import main
main()
"""
TOOL = [sys.executable, "-c", PROGRAM]


def make_bank(path: Path, num_rows: int, space: str) -> None:
    """Write a bank of random f16 snippets, in blocks."""

    def blocks() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for start in range(0, num_rows, BLOCK):
            block = rng.standard_normal((min(BLOCK, num_rows - start), DIM), dtype=np.float32)
            yield to_space(block, space)

    keys = [f"class{row % 100:02d}/{row:07d}.jpg" for row in range(num_rows)]
    concepts = segments.concepts_of_folders(keys)
    header = Header(
        kind="dense", space=space, dim=DIM, segments=(Segment(name="0", num_rows=num_rows),), concepts=tuple(concepts),
        encoder=EncoderSpec(name="made-up", family="precomputed", dim=DIM, space=space),
        sources=(Source(kind="array", path="x.npy"),), history=({"operation": "build", "arguments": {}, "num_rows": num_rows},),
    )  # fmt: skip
    snippets = segments.snippet_payload(blocks, num_rows, DIM, "f16")
    own = segments.segment_payloads("0", key_tables.encode(keys), np.zeros(num_rows, np.int64), snippets)
    table = segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys)))
    write(path, header, own | table | segments.concept_payloads(concepts))


def seconds(work: Callable[..., Any], *arguments: Any) -> float:
    """Return the wall time of a call."""
    started = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - started


def ratio(times: dict[str, list[float]], ours: str, peer: str) -> float:
    """Return how many times as fast as a peer we are: the median over pairs of one turn."""
    return round(statistics.median(p / o for o, p in zip(times[ours], times[peer], strict=True)), 3)


def gather(folder: Path, num_rows: int, runs: int, threads: int) -> dict[str, Any]:
    """Gather random rows as float32."""
    import torch
    from safetensors import safe_open

    torch.set_num_threads(threads)
    result: dict[str, Any] = {"rows": num_rows, "dim": DIM, "batch": BATCH, "torch_threads": threads}
    rng = np.random.default_rng(1)
    for space in ("raw", "unit"):
        path = folder / f"{space}.safetensors"
        make_bank(path, num_rows, space)
        plain = gmem_bank.open(path)
        hdf5 = folder / f"{space}.h5"
        gmem_bank.save(plain, hdf5)
        other = gmem_bank.open(hdf5)
        array = torch.from_numpy(np.array(plain.stored.array("0/snippets")))
        for bank in (plain, other):  # warm: every page has been touched
            for start in range(0, num_rows, 8192):
                bank.snippets(np.arange(start, min(start + 8192, num_rows)))

        def peer(rows: np.ndarray, array: Any = array, space: str = space) -> Any:
            taken = array.index_select(0, torch.from_numpy(rows)).float()
            return torch.nn.functional.normalize(taken) if space == "unit" else taken

        def by_opening(rows: np.ndarray, path: Path = path) -> None:
            for row in rows.tolist():
                with safe_open(path, "pt") as stored:
                    stored.get_slice("0/snippets")[row : row + 1]

        times: dict[str, list[float]] = {"safetensors": [], "hdf5": [], "torch index_select": [], "open per row": []}
        for turn in range(40 * runs):
            rows = rng.integers(0, num_rows, BATCH)
            times["safetensors"].append(seconds(plain.snippets, rows))
            times["torch index_select"].append(seconds(peer, rows))
            times["hdf5"].append(seconds(other.snippets, rows))
            few = rows[:16] if turn % 8 == 0 else rows[:1]
            times["open per row"].append(seconds(by_opening, few) * BATCH / len(few))
        np.testing.assert_allclose(plain.snippets(rows), peer(rows).numpy(), atol=1e-6)
        result[space] = {
            "million_rows_per_second": {n: round(BATCH / statistics.median(t) / 1e6, 4) for n, t in times.items()},
            "times_torch_index_select": ratio(times, "safetensors", "torch index_select"),
            "times_opening_per_row": ratio(times, "safetensors", "open per row"),
            "hdf5_times_safetensors": ratio(times, "hdf5", "safetensors"),
        }
        path.unlink()
        hdf5.unlink()
    return result


def run(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command; return its wall time and its peak memory in MB."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    wall = time.perf_counter() - started
    return wall, int((folder / "peak").read_text()) / 1024 if (folder / "peak").exists() else 0.0


def large(folder: Path, num_rows: int, runs: int) -> dict[str, Any]:
    """Insert into, describe and verify a large bank."""
    bank = folder / "bank.safetensors"
    make_bank(bank, num_rows, "unit")
    np.save(folder / "new.npy", np.random.default_rng(2).standard_normal((1000, DIM), dtype=np.float32))
    insert = [*TOOL, "insert-concept", "new.npy", "--name", "fresh", "--no-report"]
    times: dict[str, list[float]] = {
        name: [] for name in ("cp and sync", "insert", "insert into folder", "info", "verify", "hashlib")
    }
    peaks: dict[str, float] = {}
    run([*TOOL, "shard", "bank.safetensors"], folder)
    copy = folder / "copy"
    for _ in range(runs):
        times["cp and sync"].append(seconds(subprocess.run, ["sh", "-c", f"cp {bank} {copy} && sync {copy}"]))
        copy.unlink()
        for name, target in (("insert", "bank.safetensors"), ("insert into folder", "bank.gmem")):
            wall, peak = run([*insert, "-b", target], folder)
            times[name].append(wall)
            peaks[name] = max(peak, peaks.get(name, 0.0))
            run([*TOOL, "undo", target], folder)
        times["info"].append(run([*TOOL, "info", "bank.safetensors"], folder)[0])
        times["hashlib"].append(seconds(hashlib_pass, bank))
        times["verify"].append(seconds(verified, bank))
    return {
        "rows": num_rows,
        "bytes": bank.stat().st_size,
        "seconds": {name: round(statistics.median(values), 3) for name, values in times.items()},
        "insert_over_cp_and_sync": round(1 / ratio(times, "insert", "cp and sync"), 3),
        "verify_times_hashlib": ratio(times, "verify", "hashlib"),
        "peak_megabytes": {name: round(peak, 1) for name, peak in peaks.items()},
    }


def hashlib_pass(path: Path) -> None:
    """Hash a file as plainly as it can be done."""
    with path.open("rb") as stream:
        hashlib.file_digest(stream, "sha256").hexdigest()


def verified(path: Path) -> None:
    """Verify a bank, which must be sound."""
    if not gmem_bank.verify(path).ok:
        raise SystemExit("the bank is not sound")


def main() -> int:
    """Measure all, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--large-rows", type=int, default=1_000_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count() or 1, help="of PyTorch, in both sides of the gather"
    )
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=given.folder))
    try:
        result = {
            "large": large(folder, given.large_rows, given.runs),  # before PyTorch is loaded: it would help verify
            "gather": gather(folder, given.rows, given.runs, given.threads),
        }
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
