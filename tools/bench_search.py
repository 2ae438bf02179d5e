"""How fast rows are found, beside FAISS called directly in the same run, as JSON.

python -m tools.bench_search [--rows 1000000] [--factored-rows 100000] [--queries 1000] [--threads 2] [--runs 5] [--torch]
    [--bank FILE] [--real BANK HELD_OUT]
    [--folder DIR]

Two parts: a factored bank (rank 64) searched in the coordinates of its factors against FAISS flat over its reconstruction; and
a large dense f16 bank (tools/make_large_bank.py) whose index is chosen automatically, against FAISS flat, and against the same
FAISS index with IndexRefine over its vectors in memory, as f32 and as f16. --rows 0 or --factored-rows 0 leaves a part out;
--bank FILE searches a bank of --rows rows that is there, by the index beside it, and --real BANK HELD_OUT indexes a bank in every
way and asks for the rows of another.
Needs the large bank's size (1.6 GB at the default) on disk, and its f32 and f16 vectors (4.6 GB) in memory for the peers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np

import gmem_bank
from gmem_bank.index_choice import KINDS
from gmem_bank.index_file import index_path, read_index
from tools.bench_bank import TOOL
from tools.make_large_bank import Clustered, write_bank

K = 10
TIE = 1e-5
BLOCK = 8192
OVER_F32, OVER_F16 = "FAISS, refined by f32 in memory", "FAISS, refined by f16 in memory"


def in_turns(works: dict[str, Callable[[], Any]], runs: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return the times of each work, done in turns after one turn to warm up, and what each gave last.

    With one thread it is processor time, which other work on the machine does not lengthen; else wall time.
    """
    clock = time.process_time if faiss.omp_get_max_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in works}
    results: dict[str, Any] = {}
    for turn in range(runs + 1):
        for name, work in works.items():
            started = clock()
            results[name] = work()
            if turn:
                times[name].append(clock() - started)
    return times, results


def ratio(times: dict[str, list[float]], ours: str, peer: str) -> float:
    """Return how many times as fast as a peer we are: the median over turns."""
    return round(statistics.median(p / o for o, p in zip(times[ours], times[peer], strict=True)), 3)


def seconds(times: dict[str, list[float]]) -> dict[str, float]:
    """Return the median of each."""
    return {name: round(statistics.median(own), 4) for name, own in times.items()}


def flat_over(bank: gmem_bank.MemoryBank, axes: np.ndarray | None = None) -> Any:
    """Return a FAISS flat index over the unit snippets of a bank, turned to axes where given."""
    flat = faiss.IndexFlatIP(bank.dim)
    for _, block in bank.snippet_blocks(bank.rows()):
        unit = block / np.linalg.norm(block, axis=1, keepdims=True)
        flat.add(np.ascontiguousarray(unit if axes is None else unit @ axes.T))
    return flat


def differing(scores: np.ndarray, rows: np.ndarray, true_scores: np.ndarray, true_rows: np.ndarray) -> int:
    """Return how many queries have other ids than brute force, rows within a tie of the last one left out."""
    count = 0
    for own, found, best, true in zip(scores, rows, true_scores, true_rows, strict=True):
        certain = set(true[best > best[-1] + TIE].tolist())
        count += not (certain <= set(found.tolist()) and np.allclose(np.sort(own), np.sort(best), atol=TIE))
    return count


def compressed(folder: Path, num_rows: int, num_queries: int, runs: int, rank: int, dim: int) -> dict[str, Any]:
    """Search a factored bank without reconstructing it."""
    made = Clustered(num_rows=num_rows, dim=dim)
    path = folder / "factored.safetensors"
    write_bank(path, made, dtype="f32", rank=rank)
    bank = gmem_bank.open(path)
    report = gmem_bank.build_index(path, kind="flat")
    index, flat, queries = gmem_bank.open_index(bank), flat_over(bank), made.queries(num_queries)
    times, found = in_turns({
        "by the index": lambda: index.nearest(queries, K),
        "streamed from the bank": lambda: bank.nearest(queries, K),
        "FAISS flat over the reconstruction": lambda: flat.search(queries, K),
    }, runs)  # fmt: skip
    peer = found["FAISS flat over the reconstruction"]
    return {
        "rows": num_rows, "dim": dim, "rank": rank, "queries": num_queries, "seconds": seconds(times),
        "numbers_a_row": report.dim, "bytes": report.num_bytes,
        "times_as_fast": ratio(times, "by the index", "FAISS flat over the reconstruction"),
        "times_as_fast_streamed": ratio(times, "streamed from the bank", "FAISS flat over the reconstruction"),
        "queries_with_other_ids": {name: differing(*found[name], *peer) for name in ("by the index", "streamed from the bank")},
        "asked": {"times_as_fast": 5, "queries_with_other_ids": 0},
    }  # fmt: skip


def kinds_of(path: Path, held_out: Path, folder: Path, runs: int) -> dict[str, Any]:
    """Index a real bank in every way, and search it for the rows of another bank."""
    bank, asking = gmem_bank.open(path), gmem_bank.open(held_out)
    queries, flat = asking.snippets(asking.rows()), flat_over(bank)
    works: dict[str, Callable[[], Any]] = {"FAISS flat": lambda: flat.search(queries, K)}
    found: dict[str, Any] = {"rows": len(bank), "dim": bank.dim, "queries": len(queries), "auto": ""}
    lines: dict[str, dict[str, Any]] = {}
    for kind in ("auto", *KINDS):
        output = folder / f"{kind}.index"
        started = time.perf_counter()
        report = gmem_bank.build_index(path, kind=kind, output=output)
        took = round(time.perf_counter() - started, 2)
        if kind == "auto":
            found["auto"] = report.kind
            continue
        index = gmem_bank.open_index(bank, output)
        works[kind] = lambda index=index: index.nearest(queries, K)  # type: ignore[misc]
        lines[kind] = {**report.settings, "bytes": report.num_bytes, "build_seconds": took}
    times, results = in_turns(works, runs)
    for kind, line in lines.items():
        line["queries_per_second"] = round(len(queries) / statistics.median(times[kind]))
        line["recall_at_10"] = shared(results[kind][1], results["FAISS flat"][1])
        line["times_as_fast_as_flat"] = ratio(times, kind, "FAISS flat")
    return found | {
        "FAISS flat queries_per_second": round(len(queries) / statistics.median(times["FAISS flat"])),
        "kinds": lines,
    }


def build(path: Path, kind: str) -> dict[str, Any]:
    """Build the index of a bank by command; return its report with seconds and peak memory."""
    command = [*TOOL, "index", path.name, "--kind", kind, "--quiet", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(faiss.omp_get_max_threads())}
    started = time.perf_counter()
    ran = subprocess.run(command, cwd=path.parent, env=environment, check=True, capture_output=True, text=True)
    took = round(time.perf_counter() - started, 1)
    peak = int((path.parent / "peak").read_text()) // 1024
    return {
        "build_seconds": took,
        "build_peak_mb": peak,
        "kind_given": kind,
        "measured_at_build": json.loads(ran.stdout)["measured"],
    }


def large(path: Path, made: Clustered, num_queries: int, runs: int) -> dict[str, Any]:
    """Search a large bank by its index, beside FAISS."""
    bank, queries = gmem_bank.open(path), made.queries(num_queries)
    index, state = gmem_bank.open_index(bank), read_index(index_path(path))
    axes, settings = state.axes, index.settings
    flat = flat_over(bank, axes)
    turned = queries if axes is None else queries @ axes.T
    works: dict[str, Callable[[], Any]] = {"by the index": lambda: index.nearest(queries, K)}
    if state.faiss is not None:
        half = faiss.IndexScalarQuantizer(bank.dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        half.train(turned)
        for start in range(0, flat.ntotal, BLOCK):
            half.add(flat.reconstruct_n(start, min(BLOCK, flat.ntotal - start)))
        works[OVER_F32] = direct(state.faiss, flat, queries, axes, settings)
        works[OVER_F16] = direct(state.faiss, half, queries, axes, settings)
    slow, found = in_turns(
        {"by the index": works["by the index"], "FAISS flat": lambda: flat.search(turned, K)}, max(1, runs // 8)
    )
    times, quick = in_turns(works, runs)
    result = {
        "rows": len(bank), "dim": bank.dim, "queries": num_queries, "kind": index.kind, "settings": settings,
        "bytes": index.path.stat().st_size, "seconds": seconds(times | {"FAISS flat": slow["FAISS flat"]}),
        "recall_at_10": shared(found["by the index"][1], found["FAISS flat"][1]),
        "times_as_fast_as_flat": ratio(slow, "by the index", "FAISS flat"),
        "asked": {"build_seconds": 600, "recall_at_10": 0.95, "times_as_fast_as_flat": 20, "overhead_over_faiss": 0.1},
    }  # fmt: skip
    for name in set(works) - {"by the index"}:
        result[f"overhead: {name}"] = round(1 / ratio(times, "by the index", name) - 1, 3)
        result[f"same ids: {name}"] = shared(quick["by the index"][1], quick[name][1])
    return result


def shared(rows: np.ndarray, others: np.ndarray) -> float:
    """Return the share of (B, k) rows that are among a query's others."""
    return round(
        float(np.mean([len(set(a) & set(b)) / K for a, b in zip(rows.tolist(), others.tolist(), strict=True)])), 4
    )


def direct(
    base: Any, flat: Any, queries: np.ndarray, axes: np.ndarray | None, settings: dict[str, Any]
) -> Callable[[], Any]:
    """Return a search by FAISS alone: the same index, candidates ordered again by vectors that it holds in memory."""
    refined = faiss.IndexRefine(base, flat)
    refined.k_factor = settings["rerank"]
    how = faiss.SearchParametersIVF(nprobe=settings["nprobe"])
    both = faiss.IndexRefineSearchParameters(k_factor=settings["rerank"], base_index_params=how)
    return lambda: refined.search(queries if axes is None else queries @ axes.T, K, params=both)


def main() -> int:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--factored-rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kind", default="auto")
    parser.add_argument("--torch", action="store_true", help="Load PyTorch, by which f16 is then widened.")
    parser.add_argument("--folder", type=Path, default=None)
    parser.add_argument(
        "--real", type=Path, nargs=2, metavar=("BANK", "HELD_OUT"), help="Index this bank in every way, too."
    )
    parser.add_argument(
        "--bank", type=Path, default=None, help="A bank of the generator, with its index, to search again."
    )
    options = parser.parse_args()
    faiss.omp_set_num_threads(options.threads)
    if options.torch:
        import torch

        torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"faiss": faiss.__version__, "threads": options.threads, "torch": options.torch}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if options.factored_rows:
            result["compressed"] = compressed(
                folder, options.factored_rows, options.queries, options.runs, options.rank, options.dim
            )
        if options.real:
            result["real"] = kinds_of(*options.real, folder, options.runs)
        if options.rows:
            made, path = Clustered(num_rows=options.rows, dim=options.dim), options.bank
            built: dict[str, Any] = {}
            if path is None:
                path = folder / "large.safetensors"
                write_bank(path, made, dtype="f16")
                built = build(path, options.kind)
            result["large"] = built | large(path, made, options.queries, options.runs)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
