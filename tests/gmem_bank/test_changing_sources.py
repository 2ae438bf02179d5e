"""A source that changes under a build, and one that is cut into parts: what is finished is what a single run would give."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank.encoders import Encoder
from gmem_bank.errors import OutputExistsError

PLACES = Path("a"), Path("b")
"""Two folders alike, so that banks of what lies in them may be compared by their bytes."""


class Meddling:
    """An encoder that does something before one of its batches; True from it is the end of the process."""

    def __init__(self, encoder: Encoder, batch: int, action: Callable[[], bool]) -> None:
        self.spec, self._encoder, self._left, self._action = encoder.spec, encoder, batch, action

    def encode(self, images: np.ndarray) -> np.ndarray:
        self._left -= 1
        if self._left == 0 and self._action():
            raise KeyboardInterrupt
        return self._encoder.encode(images)


def replace(folder: Path) -> None:
    """The second photo gets the picture of the last."""
    files = sorted(folder.rglob("*.jpg"))
    files[1].write_bytes(files[-1].read_bytes())


def add_first(folder: Path) -> None:
    """A photo that sorts before all others."""
    shutil.copy(next(folder.rglob("*.jpg")), folder / "dress" / "000-new.jpg")


def add_last(folder: Path) -> None:
    """A photo that sorts after all others."""
    shutil.copy(next(folder.rglob("*.jpg")), folder / "shoes" / "zzz.jpg")


def remove(folder: Path) -> None:
    """The photo before the last is gone."""
    sorted(folder.rglob("*.jpg"))[-2].unlink()


def rename(folder: Path) -> None:
    """A class folder has another name."""
    (folder / "hat").rename(folder / "caps")


def damage(folder: Path) -> None:
    """The third photo is cut in half."""
    path = sorted(folder.rglob("*.jpg"))[2]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


CHANGES = (replace, add_first, add_last, remove, rename, damage)


def fresh(change: Callable[[Path], None], photos: Path) -> bytes:
    """The bank of a changed copy of the photos that nobody touches meanwhile."""
    where = PLACES[1]
    shutil.copytree(photos, where / "photos")
    change(where / "photos")
    gmem_bank.build(where / "photos", gmem_bank.load_encoder("hog"), where / "bank.safetensors", batch_size=4)
    return (where / "bank.safetensors").read_bytes()


def no_strays(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if path.name.startswith(".") and not path.name.endswith(".lock")]


@pytest.mark.parametrize(("change", "workers"), [*((change, 0) for change in CHANGES), (replace, 2), (add_first, 2)])
def test_a_change_between_a_kill_and_the_next_run(photos: Path, change: Callable[[Path], None], workers: int) -> None:
    """Batches of the folder as it was are of no use, wholly or in part: the bank is that of the folder as it is."""
    wanted = fresh(change, photos)
    own, bank = shutil.copytree(photos, PLACES[0] / "photos"), PLACES[0] / "bank.safetensors"
    hog = gmem_bank.load_encoder("hog")
    with pytest.raises(KeyboardInterrupt):
        gmem_bank.build(own, Meddling(hog, 4, lambda: True), bank, batch_size=4)
    assert len(list(bank.with_name(".bank.safetensors.build").glob("*/*.safetensors"))) == 3
    change(own)
    report = gmem_bank.build(own, hog, bank, batch_size=4, num_workers=workers)
    assert (report.num_outdated, report.num_resumed) == (3, 0)
    assert bank.read_bytes() == wanted
    assert no_strays(PLACES[0])


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_a_build_runs_that_is_then_killed(photos: Path, change: Callable[[Path], None]) -> None:
    """What was encoded before the change and after it does not mix in the bank that the next run finishes."""
    wanted = fresh(change, photos)
    own, bank = shutil.copytree(photos, PLACES[0] / "photos"), PLACES[0] / "bank.safetensors"
    hog = gmem_bank.load_encoder("hog")
    with pytest.raises(KeyboardInterrupt):
        interrupted = Meddling(hog, 5, lambda: True)
        gmem_bank.build(own, Meddling(interrupted, 3, lambda: bool(change(own))), bank, batch_size=4)
    gmem_bank.build(own, hog, bank, batch_size=4)
    assert bank.read_bytes() == wanted
    assert no_strays(PLACES[0])


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_while_a_build_runs_to_its_end(photos: Path, change: Callable[[Path], None]) -> None:
    """The next run sees that the bank is not that of the folder, says so, and with overwrite makes the one that is."""
    wanted = fresh(change, photos)
    own, bank = shutil.copytree(photos, PLACES[0] / "photos"), PLACES[0] / "bank.safetensors"
    hog = gmem_bank.load_encoder("hog")
    report = gmem_bank.build(own, Meddling(hog, 4, lambda: bool(change(own))), bank, batch_size=4)
    assert report.num_rows + len(report.skipped) == 24
    with pytest.raises(OutputExistsError, match="not built from these images"):
        gmem_bank.build(own, hog, bank, batch_size=4)
    gmem_bank.build(own, hog, bank, batch_size=4, overwrite=True)
    assert bank.read_bytes() == wanted


def test_an_archive_that_is_replaced_between_a_kill_and_the_next_run(photos: Path) -> None:
    """Members at other places, the same names: the bank is that of the new archive."""
    files = sorted(photos.rglob("*.jpg"))
    hog = gmem_bank.load_encoder("hog")

    def pack(where: Path, order: list[Path]) -> Path:
        where.mkdir(exist_ok=True)
        with tarfile.open(where / "photos.tar", "w") as archive:
            for path in order:
                archive.add(path, path.relative_to(photos).as_posix())
        return where / "photos.tar"

    gmem_bank.build(pack(PLACES[1], files[::-1]), hog, PLACES[1] / "bank.safetensors", batch_size=4)
    old, bank = pack(PLACES[0], files), PLACES[0] / "bank.safetensors"
    with pytest.raises(KeyboardInterrupt):
        gmem_bank.build(old, Meddling(hog, 4, lambda: True), bank, batch_size=4)
    gmem_bank.build(pack(PLACES[0], files[::-1]), hog, bank, batch_size=4)
    assert bank.read_bytes() == (PLACES[1] / "bank.safetensors").read_bytes()


def test_parts_by_the_command_with_workers_are_the_whole(photos: Path) -> None:
    """Three parts built apart and merged have the keys, the bits, the concepts and the skipped files of one build."""
    for name in ("dress/bad.png", "hat/bad.png", "shoes/bad.png"):
        (photos / name).write_bytes(b"\x89PNG\r\n\x1a\n not really")
    options = ["-e", "hog", "--batch-size", "4", "--workers", "2", "--dtype", "f16", "-q", "--json"]

    def build(output: str, *more: str) -> list[dict[str, str]]:
        command = [sys.executable, "-m", "gmem_bank", "build", str(photos), *options, "-o", output, *more]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)["skipped"]

    skipped = build("whole.safetensors")
    parts = [build(f"{shard}.safetensors", "--num-shards", "3", "--shard", str(shard)) for shard in range(3)]
    assert [entry for part in parts for entry in part] == skipped
    assert len(skipped) == 3
    command = [sys.executable, "-m", "gmem_bank", "merge", "0.safetensors", "1.safetensors", "2.safetensors"]
    subprocess.run([*command, "-o", "merged.safetensors"], check=True, capture_output=True)
    whole, merged = gmem_bank.open("whole.safetensors"), gmem_bank.open("merged.safetensors")
    rows = whole.rows()
    assert merged.keys(merged.rows()) == whole.keys(rows)
    assert merged.snippets(rows).tobytes() == whole.snippets(rows).tobytes()
    assert {name: merged.rows_of(name).tolist() for name in merged.names} == {
        name: whole.rows_of(name).tolist() for name in whole.names
    }
