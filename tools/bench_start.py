"""How long the light commands take to start: medians over runs, beside a bare interpreter, as JSON.

python -m tools.bench_start [--runs 11]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

import gmem_bank


def seconds(command: list[str], folder: str) -> float:
    """Return the wall time of a command."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> int:
    """Measure in turns, so that a noisy moment hits all alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=11)
    runs = parser.parse_args().runs
    scripts = Path(sys.executable).parent
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "python -c 'import numpy, click'": [sys.executable, "-c", "import numpy, click"],
        "gmem-bank --help": [str(scripts / "gmem-bank"), "--help"],
        "gmem-gen --help": [str(scripts / "gmem-gen"), "--help"],
        "gmem-bank info": [str(scripts / "gmem-bank"), "info", "bank.safetensors"],
    }
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for index in range(8):
            pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(Path(folder) / f"{index}.png")
        gmem_bank.build(folder, gmem_bank.load_encoder("hog"), Path(folder) / "bank.safetensors")
        times: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(runs):
            for name, command in commands.items():
                times[name].append(seconds(command, folder))
    print(json.dumps({name: round(statistics.median(values), 3) for name, values in times.items()}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
