"""kill -9 and Ctrl-C in the middle of builds with workers: resumed, the bank is that of a build that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank.verifier import verify

COPIES = 16
BUILD = [sys.executable, "-m", "gmem_bank", "build"]
OPTIONS = ["-e", "hog", "--batch-size", "8", "--workers", "2"]


@pytest.fixture
def sources(photos: Path) -> dict[str, str]:
    """Some four hundred photos in a folder and in three tars, one in twenty unreadable."""
    for path in sorted(photos.rglob("*.jpg")):
        data = path.read_bytes()
        for copy in range(COPIES):
            path.with_name(f"{path.stem}-{copy}.jpg").write_bytes(data[: len(data) // 2 if copy % 20 == 3 else None])
        (path.parent / f"{path.stem}-none.png").touch()
    files = sorted(path for path in photos.rglob("*") if path.is_file())
    for shard in range(3):
        with tarfile.open(f"shard-{shard}.tar", "w") as archive:
            for path in files[shard::3]:
                archive.add(path, path.relative_to(photos).as_posix())
    return {"folder": str(photos), "tar": "shard-*.tar"}


def start(source: str, bank: Path, dtype: str) -> subprocess.Popen[bytes]:
    """Start a build in a process group of its own."""
    command = [*BUILD, source, *OPTIONS, "--dtype", dtype, "-o", str(bank)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def processes() -> Iterator[tuple[int, int, int]]:
    """Every process that runs: its own number, its parent's and its group's."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent, group, *_ = stat.read_text().rpartition(")")[2].split()
            if state != "Z":  # dead, and not yet buried
                yield int(stat.parent.name), int(parent), int(group)


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return sorted(own for own, parent, _ in processes() if parent == pid)


def require_gone(group: int) -> None:
    """Of a process group nothing runs on for more than seconds."""
    for _ in range(300):
        if group not in {found for _, _, found in processes()}:
            return
        time.sleep(0.02)
    os.killpg(group, signal.SIGKILL)
    raise AssertionError("a worker outlived its build")


def strike(process: subprocess.Popen[bytes], target: str, delay: float) -> bool:
    """Kill after a delay; say whether there was something to kill. The build, but not a worker, is then gone."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
        return False
    if target == "worker":
        workers = children(process.pid)
        if workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(workers[0], signal.SIGKILL)
        return bool(workers)
    (os.killpg if target == "group" else os.kill)(process.pid, signal.SIGKILL)
    return True


def finish(process: subprocess.Popen[bytes]) -> str:
    """Wait for the end, be it sound or killed, and for that of its workers; return what it said on stderr."""
    _, said = process.communicate(timeout=60)
    require_gone(process.pid)
    return said.decode()


def hidden() -> Iterator[Path]:
    return (path for path in Path.cwd().rglob("*") if path.name.startswith("."))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_fifty_kills_of_builds(sources: dict[str, str]) -> None:
    """The build, its whole group or one worker dies: resumed to the end, the file is byte for byte that of one run."""
    references = {}
    for kind in ("folder", "tar"):
        for dtype in ("f32", "f16"):
            bank = Path(f"{kind}-{dtype}/bank.safetensors")
            started = time.perf_counter()
            finish(start(sources[kind], bank, dtype))
            took = time.perf_counter() - started
            report = json.loads(bank.with_name(bank.name + ".report.json").read_text())
            references[kind, dtype] = (bank.read_bytes(), report["skipped"], took)
            shutil.rmtree(bank.parent)
    rng = np.random.default_rng(0)
    counts = {"build": 0, "group": 0, "worker": 0}
    resumed = 0
    while sum(counts.values()) < 50:
        for (kind, dtype), (reference, skipped, took) in references.items():
            bank = Path(f"{kind}-{dtype}/bank.safetensors")
            for attempt in range(40):
                process = start(sources[kind], bank, dtype)
                target = ("build", "group", "worker")[attempt % 3]
                counts[target] += attempt < 30 and strike(process, target, rng.uniform(0.1, 0.8 * took))
                said = finish(process)
                if process.returncode == 0:
                    break
                assert process.returncode == -signal.SIGKILL, said
                assert not bank.exists() or verify(bank).ok
            assert bank.read_bytes() == reference
            report = json.loads(bank.with_name(bank.name + ".report.json").read_text())
            assert report["skipped"] == skipped
            resumed += report["num_resumed"] > 0
            assert not list(hidden())
            shutil.rmtree(bank.parent)
    assert min(counts.values()) >= 5
    assert resumed >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_ctrl_c_leaves_what_the_same_command_takes_up(sources: dict[str, str], kind: str) -> None:
    """SIGINT to the group, as a terminal sends it: no worker stays, a short message, and the next run resumes."""
    bank = Path("out/bank.safetensors")
    finish(start(sources[kind], Path("whole/bank.safetensors"), "f32"))
    process = start(sources[kind], bank, "f32")
    staging = bank.with_name(f".{bank.name}.build")
    while len(list(staging.glob("*/*.safetensors"))) < 5:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    said = finish(process)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert len(said.replace("\r", "\n").strip().splitlines()[-1]) < 120
    assert not bank.exists()
    finish(start(sources[kind], bank, "f32"))
    assert bank.read_bytes() == Path("whole/bank.safetensors").read_bytes()
    assert json.loads(Path("out/bank.safetensors.report.json").read_text())["num_resumed"] >= 40
    assert not list(hidden())


@pytest.mark.slow
def test_all_workers_killed_at_once_do_not_lose_the_build(sources: dict[str, str]) -> None:
    """Others take their places, their jobs are done again, and nothing differs."""
    gmem_bank.build(sources["folder"], gmem_bank.load_encoder("hog"), "whole.safetensors", batch_size=8)
    process = start(sources["folder"], Path("bank.safetensors"), "f32")
    while not list(Path(".bank.safetensors.build").glob("*/*.safetensors")):
        assert process.poll() is None
        time.sleep(0.01)
    workers = children(process.pid)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    said = finish(process)
    assert process.returncode == 0, said
    assert len(workers) == 2
    assert Path("bank.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
