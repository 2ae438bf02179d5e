"""Several processes make the training that one makes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gmem_bank
from gmem_gen import checkpoint as checkpoints
from gmem_gen.distributed import Processes
from tests.gmem_gen.test_training_options import nearly_equal_weights

SETTINGS = [
    "data.image_size=16", "model.width=32", "model.depth=2", "model.num_heads=2", "train.batch_size=8", "train.log_every=1",
    "train.warmup_steps=2", "train.num_threads=1", "data.flip=random", "train.snippet_noise=0.1",
    "data.validation_fraction=0.2", "train.validate_every=10", "train.sample_every=10", "train.sample_images=2",
    "sample.num_steps=2", "train.ema_decay=[0.999,0.9]", "train.checkpoint_every=10",
]  # fmt: skip


def command(processes: int, out: str, *settings: str) -> list[str]:
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    )
    words = [word for setting in (*SETTINGS, *settings) for word in ("--set", setting)]
    return [sys.executable, *launch, "-m", "gmem_gen", "train", "--device", "cpu", "--json", "--out", out, *words]


def run(processes: int, out: str, *settings: str) -> dict[str, object]:
    done = subprocess.run(
        command(processes, out, *settings),
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stderr.count("budget:") == 1  # one of them speaks
    return json.loads(done.stdout)


@pytest.fixture
def bank(photos: Path) -> str:
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors", narrowing=gmem_bank.Narrowing(flip=True))
    return "bank.safetensors"


def test_shares_are_runs_that_cover_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample once, as equal as can be, whatever the numbers."""
    for count in range(1, 6):
        for items in range(12):
            shares = []
            for rank in range(count):
                processes = object.__new__(Processes)
                processes.count, processes.rank = count, rank
                shares.append(list(processes.share(items)))
            assert [item for share in shares for item in share] == list(range(items))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
def test_two_and_three_processes_equal_one_after_twenty_steps(bank: str) -> None:
    """Loss to 1e-5, weights to 1e-4 (relative L2), validation too; also in parts, and with shares of different sizes."""
    one = run(1, "one", "train.max_steps=20")
    two = run(2, "two", "train.max_steps=20", "train.accumulation=2")
    three = run(3, "three", "train.max_steps=20")
    assert (one["num_processes"], two["num_processes"], three["num_processes"]) == (1, 2, 3)
    for other in ("two", "three"):
        nearly_equal_lines("one", other)
        assert sorted(path.name for path in Path(other).rglob("*.png")) == sorted(
            path.name for path in Path("one").rglob("*.png")
        )


def nearly_equal_lines(first: str, second: str) -> None:
    """All losses of the logs, validation included, and all weights."""
    pairs = [[json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()] for run in (first, second)]
    for mine, theirs in zip(*pairs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"elapsed", "images_per_second", "gradient_norm"}:
            assert mine[name] == pytest.approx(theirs[name], rel=1e-5), name
    nearly_equal_weights(first, second)


@pytest.mark.slow
def test_a_training_moves_between_one_process_and_two(bank: str) -> None:
    """Ten steps by one, ten more by two: what one alone gives."""
    run(1, "whole", "train.max_steps=20")
    run(1, "parts", "train.max_steps=10")
    assert run(2, "parts", "train.max_steps=20")["step"] == 20
    nearly_equal_lines("whole", "parts")


@pytest.mark.slow
def test_a_signal_stops_all_processes_at_one_step(bank: str) -> None:
    """SIGTERM to the launcher: a checkpoint is saved, nobody hangs, and the same command goes on."""
    process = subprocess.Popen(
        command(2, "run", "train.max_steps=100000"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    log = Path("run/log.jsonl")
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") > 5:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    saved = checkpoints.step_of(checkpoints.list_checkpoints(Path("run"))[-1])
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert saved == last
    assert run(2, "run", f"train.max_steps={saved + 2}")["step"] == saved + 2


@pytest.mark.slow
def test_more_processes_than_images_are_refused(bank: str) -> None:
    """By every process, with the reason."""
    done = subprocess.run(
        command(3, "run", "train.batch_size=2", "train.max_steps=1"), check=False, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "one each at least" in done.stderr
