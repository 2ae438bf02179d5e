"""One compression of a bank's rows in a process of its own, by the package or by a peer; its times and peak memory as JSON.

python -m tools.compress_peers NAME BANK OUTPUT RANK THREADS

`compress` is the whole command. `pca-file` is what a user of scikit-learn writes for the same: read the snippets with
safetensors, fit PCA by the covariance matrix, transform, write what a factored bank holds with safetensors, sync. `pca` is fit
and transform of the array in memory, `svd` torch.linalg.svd of the array less its mean, in memory. Imports are not timed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


def status(name: str) -> float:
    """Return a line of /proc/self/status in megabytes."""
    found = re.search(name + r":\s*(\d+)", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def read(bank: Path) -> np.ndarray:
    """Return the snippets of a dense bank of one segment, as safetensors reads them."""
    with safe_open(bank, framework="numpy") as stored:
        found: np.ndarray = stored.get_tensor("0/snippets")
    return found


def write(output: Path, **arrays: np.ndarray) -> None:
    """Write arrays and sync them."""
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, output)
    with output.open("rb") as stream:
        os.fsync(stream.fileno())


def prepare(name: str, bank: Path, output: Path, rank: int, threads: int) -> Callable[[], object]:
    """Import what a way needs, read what it starts from, and return the rest of it."""
    if name == "compress":
        import scipy.linalg  # noqa: F401 - as the peers' imports, before the time begins
        import threadpoolctl  # type: ignore[import-untyped]  # noqa: F401

        import gmem_bank
        from gmem_bank import compression  # noqa: F401

        return lambda: gmem_bank.compress(bank, rank=rank, output=output)
    if name == "svd":
        import torch

        torch.set_num_threads(threads)
        matrix = torch.from_numpy(read(bank))
        return lambda: torch.linalg.svd(matrix - matrix.mean(dim=0), full_matrices=False)
    from sklearn.decomposition import PCA

    if name == "pca":
        values = read(bank)
        return lambda: PCA(rank, svd_solver="covariance_eigh").fit(values).transform(values)

    def whole() -> None:
        snippets = read(bank)
        fitted = PCA(rank, svd_solver="covariance_eigh").fit(snippets)
        coefficients = fitted.transform(snippets)
        factors = {"basis": fitted.components_, "mean": fitted.mean_, "singular_values": fitted.singular_values_}
        write(output, coefficients=coefficients, **factors)

    return whole


def main() -> int:
    """Do it once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=("compress", "pca-file", "pca", "svd"))
    parser.add_argument("bank", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("rank", type=int)
    parser.add_argument("threads", type=int)
    given = parser.parse_args()
    given.output.unlink(missing_ok=True)
    work = prepare(given.name, given.bank, given.output, given.rank, given.threads)
    before, started, used = status("VmRSS"), time.perf_counter(), time.process_time()
    work()
    times = {"seconds": time.perf_counter() - started, "processor_seconds": time.process_time() - used}
    print(json.dumps(times | {"peak_megabytes_above_start": status("VmHWM") - before}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
