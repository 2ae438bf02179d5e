"""kill -9 at random moments: the bank on disk stays valid, and the same command finishes the work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank.verifier import verify


def killed_until_done(command: list[str], check, longest: float, most: int = 60) -> int:
    """Run a command, killing it at random moments; after each kill call `check`; return the number of kills."""
    rng = np.random.default_rng(1)
    for kills in range(most):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(rng.uniform(0.1, longest) if kills < most - 10 else None)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            check()
            continue
        assert process.returncode == 0
        return kills
    raise AssertionError("never finished")


def many_photos(photos: Path, copies: int) -> None:
    for path in sorted(photos.rglob("*.jpg")):
        for copy in range(copies):
            shutil.copy(path, path.with_name(f"{path.stem}-{copy}.jpg"))


@pytest.mark.slow
def test_build_and_insert_survive_kills(photos: Path, new_photos: Path) -> None:
    """Both end byte-identical to an uninterrupted run, with no stray files; the old bank is valid after every kill."""
    many_photos(photos, 80)
    many_photos(new_photos, 200)
    encoder = gmem_bank.load_encoder("hog")
    gmem_bank.build(photos, encoder, "reference.safetensors", batch_size=8)
    bank, reference = Path("bank.safetensors"), Path("reference.safetensors")
    tool = [sys.executable, "-m", "gmem_bank"]

    def no_bank_or_a_whole_one() -> None:
        if bank.exists():
            assert verify(bank).ok

    build = [*tool, "build", str(photos), "-e", "hog", "-q", "--batch-size", "8", "-o", str(bank)]
    kills = killed_until_done(build, no_bank_or_a_whole_one, longest=1.2)
    assert bank.read_bytes() == reference.read_bytes()
    before = bank.read_bytes()
    gmem_bank.insert_concept(reference, [new_photos], encoder, batch_size=8)

    def old_or_new() -> None:
        assert verify(bank).ok
        assert bank.read_bytes() in (before, reference.read_bytes())

    insert = [*tool, "insert-concept", str(new_photos), "-q", "--batch-size", "8", "-b", str(bank)]
    kills += killed_until_done(insert, old_or_new, longest=1.2)
    assert bank.read_bytes() == reference.read_bytes()
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".")]
    assert kills > 0


@pytest.mark.slow
def test_a_writer_killed_between_write_and_rename_leaves_the_old_bank(photos: Path, new_photos: Path) -> None:
    """Stopped exactly before the rename, the old bank stands and the next edit clears the rest."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    before = Path("bank.safetensors").read_bytes()
    code = (
        "import os, pathlib\n"
        "pathlib.Path.replace = lambda self, target: os.kill(os.getpid(), 9) if target.name == 'bank.safetensors' else "
        "os.replace(self, target)\n"
        "from gmem_bank.cli import main\n"
        "main(['insert-concept', 'images'])\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert result.returncode == -signal.SIGKILL
    assert Path("bank.safetensors").read_bytes() == before
    assert Path(".bank.safetensors.tmp").exists()
    started = time.perf_counter()
    subprocess.run([sys.executable, "-m", "gmem_bank", "insert-concept", "images"], check=True, capture_output=True)
    assert time.perf_counter() - started < 60
    assert verify("bank.safetensors").num_rows == 32
    assert not [path for path in Path.cwd().iterdir() if path.name.startswith(".")]
