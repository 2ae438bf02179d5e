"""Run the first commands of the README, word for word, on real photos in an empty folder.

The encoder is a small random DINOv2 that is put into a hub cache of its own, so nothing is downloaded. Prints one line a
command and, last, how many passed.

    python -m tools.first_commands [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMMANDS = (
    "gmem-bank build --encoder dinov2",
    "gmem-bank insert-concept images/",
    "gmem-gen train --bank bank.safetensors",
    "gmem-gen sample --bank bank.safetensors --concept images",
)


def prepare(folder: Path) -> dict[str, str]:
    """Lay out photos and a hub cache; return the environment."""
    from tests.conftest import make_hub_cache

    work = folder / "work"
    shutil.copytree(ROOT / "tests" / "data" / "photos", work)
    make_hub_cache(folder / "hf-home")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "HF_HOME": str(folder / "hf-home"), "HF_HUB_OFFLINE": "1", "PATH": path}


def run(folder: Path) -> int:
    """Run every command; return how many failed."""
    environment, work, failed = prepare(folder), folder / "work", 0
    for command in COMMANDS:
        if command.startswith("gmem-bank insert-concept"):
            shutil.copytree(ROOT / "tests" / "data" / "new_photos" / "images", work / "images")
        started = time.perf_counter()
        result = subprocess.run(shlex.split(command), cwd=work, env=environment, check=False)
        print(
            f"{'ok' if result.returncode == 0 else 'FAILED'}  {time.perf_counter() - started:6.1f} s  {command}",
            flush=True,
        )
        failed += result.returncode != 0
    if not (work / "runs" / "bank" / "samples" / "images.png").is_file():
        print("FAILED  no grid was written")
        failed += 1
    print(f"{len(COMMANDS) - failed} passed, {failed} failed")
    return failed


def main() -> int:
    """Run in a temporary folder, or in one that is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="work here and leave everything to look at")
    keep = parser.parse_args().keep
    if keep is not None:
        return run(keep)
    with tempfile.TemporaryDirectory() as folder:
        return run(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
