"""kill -9 at random moments: the bank on disk stays valid, and the same command finishes the work."""

from __future__ import annotations

import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank.editing import EditReport
from gmem_bank.verifier import verify
from tests.conftest import synthetic_bank


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


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".gmem"])
def test_compress_survives_kills(tmp_path: Path, suffix: str) -> None:
    """In place: the dense bank or the factored one, sound; in the end the bytes of an uninterrupted run, and no strays."""
    for name in ("bank", "reference"):
        synthetic_bank(tmp_path / f"{name}{suffix}", rows=60_000, dim=256, dtype="f16")
    bank, reference = tmp_path / f"bank{suffix}", tmp_path / f"reference{suffix}"
    dense = gmem_bank.open(bank).fingerprint
    code = (
        "import gmem_bank.moments as m; m.SAVE_SECONDS = 0; from gmem_bank.cli import main; main()"  # each sum is kept
    )
    command = [sys.executable, "-c", code, "compress", "--rank", "40", "--dtype", "i8", "-q"]
    started = time.perf_counter()
    subprocess.run([*command, str(reference)], check=True, stdout=subprocess.DEVNULL)
    longest = 1.1 * (time.perf_counter() - started)
    made = gmem_bank.open(reference).fingerprint

    def old_or_new() -> None:
        assert verify(bank).ok
        assert gmem_bank.open(bank).fingerprint in (dense, made)

    kills = killed_until_done([*command, str(bank)], old_or_new, longest)
    assert gmem_bank.open(bank).fingerprint == made
    assert kills > 0
    if bank.is_file():
        assert bank.read_bytes() == reference.read_bytes()
    require_tidy_beside(bank)
    gmem_bank.undo(bank)
    assert gmem_bank.open(bank).fingerprint == dense


def require_tidy_beside(bank: Path) -> None:
    """No staging folder, lock or temporary file of the bank is left."""
    names = [path.name for path in bank.parent.iterdir() if path.name.startswith(f".{bank.name}.")]
    assert not names


# -- one bank edited over and over, by children that are killed

EDITS: dict[str, Callable[..., EditReport]] = {
    "insert": lambda bank, **options: gmem_bank.insert_snippets(
        bank,
        np.random.default_rng(1).standard_normal((2000, 256)).astype(np.float32),
        name="new",
        report=False,
        **options,
    ),
    "merge": lambda bank, **options: gmem_bank.merge(bank, [bank.with_stem("other")], **options),
    "remove": lambda bank, **options: gmem_bank.remove_concept(bank, "new", **options),
    "undo": gmem_bank.undo,
    "remove again": lambda bank, **options: gmem_bank.remove_concept(bank, "new", **options),
    "remove merged": lambda bank, **options: gmem_bank.remove_concept(bank, "other", **options),
}
"""A round that ends with the bank it began with."""


def in_child(edit: Callable[..., EditReport], bank: Path, delay: float | None) -> int:
    """Run an edit in a child, killed after a delay; return the child's status: 0, or minus the signal."""
    child = os.fork()
    if not child:
        try:
            edit(bank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def state_of(bank: Path) -> str:
    """Open and verify; return the fingerprint of the content."""
    report = verify(bank)
    assert report.ok, report.problems
    return gmem_bank.open(bank).fingerprint


def require_tidy(bank: Path) -> None:
    """Beside a bank lie no hidden files, but for the one earlier state that undo may need; in a folder nothing unlisted."""
    history = gmem_bank.open(bank).history
    kept = [f"{n}-{entry['parent'][:12]}" for n, entry in enumerate(history) if n and "appended" not in entry][-1:]
    current = bank / "manifest.json" if bank.is_dir() else bank
    allowed = {current.parent / f".undo-{label}.{current.name}" for label in kept}
    hidden = {path for path in bank.parent.rglob("*") if path.name.startswith(".")}
    assert hidden <= allowed, f"stray files: {sorted(map(str, hidden - allowed))}"
    if bank.is_dir():
        listed = {name for manifest in {current, *hidden} for name in json.loads(manifest.read_text())["files"]}
        there = {path.name for path in bank.iterdir()} - {path.name for path in (current, *hidden)}
        assert there == listed


def drive(folder: Path, suffix: str, kills: int) -> None:
    """Edit a bank in children killed at random moments until so many died; print how many left the old and the new bank."""
    bank = folder / f"bank{suffix}"
    rng = np.random.default_rng(kills)
    fingerprints = [state_of(bank)]
    longest: dict[str, float] = {}
    for name, edit in EDITS.items():  # one round without kills: what each edit makes, and how long it takes
        started = time.perf_counter()
        assert in_child(edit, bank, None) == 0
        longest[name] = time.perf_counter() - started
        fingerprints.append(state_of(bank))
        require_tidy(bank)
    assert fingerprints[0] == fingerprints[-1] != fingerprints[1]
    counts: collections.Counter[str] = collections.Counter()
    while counts["killed"] < kills:
        for place, (name, edit) in enumerate(EDITS.items()):
            before, after = fingerprints[place : place + 2]
            status = in_child(edit, bank, rng.uniform(0, 1.05 * longest[name]))
            assert status in (0, -signal.SIGKILL)
            counts["killed" if status else "finished"] += 1
            found = state_of(bank)
            assert found in (before, after), f"a kill in {name} left neither the old bank nor the new one"
            if status:
                counts["old" if found == before else "new"] += 1
            if found == before or name != "undo":  # the same command again, finished this time
                assert edit(bank).unchanged == (found == after)
                assert state_of(bank) == after
                require_tidy(bank)
    print(json.dumps({**counts, "milliseconds": {name: round(1000 * took) for name, took in longest.items()}}))


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "kills"), [(".safetensors", 200), (".h5", 40), (".gmem", 40)])
def test_one_bank_survives_many_kills(tmp_path: Path, suffix: str, kills: int) -> None:
    """Inserts, merges, removals and undos of one bank, killed anywhere: the old bank or the new one, sound, and no strays."""
    synthetic_bank(tmp_path / f"bank{suffix}", rows=20_000, dim=256, dtype="f16")
    synthetic_bank(tmp_path / f"other{suffix}", rows=2000, dim=256, dtype="f16", prefix="other/", seed=1)
    code = f"from tests.test_kill import drive, Path; drive(Path({str(tmp_path)!r}), {suffix!r}, {kills})"
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    counts = json.loads(result.stdout)
    assert counts["killed"] >= kills
    assert counts["old"] > kills / 20
    assert counts["new"] > 0 or kills < 100
