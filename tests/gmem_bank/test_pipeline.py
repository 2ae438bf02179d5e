"""Decoding ahead, and which images are taken: nothing depends on who decodes, and parts add up to the whole."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import gc
import hashlib
import itertools
import os
import signal
import threading
import time
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank import decode_process
from gmem_bank.decode_pool import Decoded, DecodePool, default_workers
from gmem_bank.decode_worker import MOST_REASON
from gmem_bank.errors import ConfigError, GMemError, SourceError
from gmem_bank.listing import Item
from gmem_bank.narrowing import Narrowing, narrowed
from gmem_bank.sources import list_folder

ADM = {"crop": "adm", "crop_size": 32}


@pytest.fixture
def odd_photos(photos: Path) -> Path:
    """Photos, and among them what cannot be decoded."""
    (photos / "hat/broken.jpg").write_bytes(b"\xff\xd8\xff not a photo")
    (photos / "hat/empty.png").touch()
    (photos / "shoes/cut.jpg").write_bytes(next((photos / "shoes").glob("*.jpg")).read_bytes()[:3000])
    return photos


def same(a: Decoded, b: Decoded) -> bool:
    return a.hashes == b.hashes and a.reasons == b.reasons and np.array_equal(a.crops, b.crops)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_give_what_this_process_would_in_the_same_order(odd_photos: Path, num_workers: int) -> None:
    """Pixels, hashes and reasons, whoever decodes, flips included."""
    items = list_folder(odd_photos).items.with_flips()
    batches = [items[start : start + 7] for start in range(0, len(items), 7)]
    with DecodePool(ADM, 0) as pool:
        expected = list(pool.batches(batches))
    with DecodePool(ADM, num_workers) as pool:
        got = list(pool.batches(batches))
    assert len(got) == len(batches)
    assert all(same(a, b) for a, b in zip(expected, got, strict=True))
    reasons = [reason for batch in got for reason in batch.reasons if reason is not None]
    assert len(reasons) == 6
    assert "the file is empty" in reasons


def test_a_worker_that_is_killed_is_replaced(photos: Path) -> None:
    """Its job is done again by another; a build with workers is byte for byte one without."""
    items = list_folder(photos).items
    batches = [items[start : start + 4] for start in range(0, len(items), 4)]
    with DecodePool(ADM, 1) as pool:
        results = pool.batches(batches)
        first = next(results)
        [victim] = [worker.pid for worker in pool._workers]
        os.kill(victim, signal.SIGKILL)
        rest = list(results)
        assert [worker.pid for worker in pool._workers] != [victim]
    with DecodePool(ADM, 0) as pool:
        assert all(same(a, b) for a, b in zip([first, *rest], pool.batches(batches), strict=True))


def test_a_job_that_kills_every_worker_is_named(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice dead on the same images is an error that says which they are and how to find out more."""
    monkeypatch.setattr(decode_process, "WORKER", ("-c", "raise SystemExit(3)"))
    items = list_folder(photos).items[:5]
    with DecodePool(ADM, 1) as pool, pytest.raises(GMemError, match=f"{items[0].key}.*--workers 0"):
        list(pool.batches([items]))


def test_long_reasons_and_paths_do_not_stop_the_talk(photos: Path) -> None:
    """Jobs and answers that fill a pipe, of a worker with a job ahead; reasons are cut alike with and without workers."""
    folder = Path(*["é" * 120] * 8)
    folder.mkdir(parents=True)
    for number in range(40):
        (folder / f"{number:02d}.jpg").write_bytes(b"no image")
    items = list_folder(Path(folder.parts[0])).items
    assert len(items) == 40
    batches = [items[at : at + 16] for at in range(0, 40, 16)]
    with DecodePool(ADM, 1) as pool, DecodePool(ADM, 0) as plain:
        for found, expected in zip(pool.batches(batches), plain.batches(batches), strict=True):
            assert same(found, expected)
    absent = Item(key="absent.jpg", path=Path("x" * 5000), size=1, modified=0, inside="tar", place=0)
    with DecodePool(ADM, 1) as pool, DecodePool(ADM, 0) as plain:
        [found], [expected] = pool.batches([[absent] * 64]), plain.batches([[absent] * 64])
    assert found.reasons == expected.reasons
    assert all(len(str(reason)) <= MOST_REASON for reason in found.reasons)


def test_memory_of_both_leaves_nothing_behind(photos: Path) -> None:
    """No descriptor and no map of it are there afterwards; pixels are the caller's own."""
    gc.collect()
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    items = list_folder(photos).items
    with DecodePool(ADM, 2) as pool:
        first, *others = pool.batches([items[at : at + 3] for at in range(0, 24, 3)])
        before = first.crops.copy()
        assert "gmem pixels" in Path("/proc/self/maps").read_text()
    del pool
    gc.collect()
    np.testing.assert_array_equal(first.crops, before)
    assert len(others) == 7
    assert "gmem pixels" not in Path("/proc/self/maps").read_text()
    assert len(list(Path("/proc/self/fd").iterdir())) <= descriptors


def test_no_room_for_a_worker_is_said(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that cannot be had ends with an error that says what to do, not with a signal."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        DecodePool(ADM, 2) as pool,
        pytest.raises(GMemError, match=r"could not be started.*No space left.*--workers 0"),
    ):
        list(pool.batches([list_folder(photos).items[:5]]))


def test_large_crops_are_sent_in_small_jobs(photos: Path) -> None:
    """One image a job where it fills the memory that is set aside for eight small ones."""
    record = {"crop": "adm", "crop_size": 1024}
    items = list_folder(photos).items[:3]
    with DecodePool(record, 1) as pool, DecodePool(record, 0) as plain:
        [found], [expected] = pool.batches([items]), plain.batches([items])
        assert pool._workers[0]._pixels.nbytes == 2 * 1024**2 * 3
    assert same(found, expected)


def test_no_more_workers_than_are_needed(photos: Path) -> None:
    """Beside a caller who is slower than one worker there are one or two; one who waits for each batch gets all."""
    items = list_folder(photos).items[:8]
    with DecodePool(ADM, 6) as pool:
        for _ in pool.batches([items[at : at + 1] for at in range(8)]):
            while pool._jobs.qsize() or any(worker.num_waiting for worker in pool._workers):
                time.sleep(0.01)
            time.sleep(0.05)
        assert len(pool._workers) <= 2
    with DecodePool(ADM, 6) as pool:
        for _ in pool.batches(itertools.repeat(items)):
            if len(pool._workers) == 6:
                break


def test_no_worker_outlives_its_pool(photos: Path) -> None:
    """Also where the caller stops early."""
    items = list_folder(photos).items
    with DecodePool(ADM, 2) as pool:
        next(pool.batches([items[:4], items[4:8], items[8:]]))
        workers = list(pool._workers)
        assert workers
    assert not any(Path(f"/proc/{worker.pid}").exists() for worker in workers)
    assert default_workers() >= 1


def test_a_build_does_not_depend_on_its_workers(odd_photos: Path) -> None:
    """The same bytes with none, one and two processes."""
    encoder = gmem_bank.load_encoder("hog")
    banks = []
    for workers in (0, 1, 2):
        path = Path(f"{workers}/bank.safetensors")
        gmem_bank.build(odd_photos, encoder, path, batch_size=5, num_workers=workers)
        banks.append(path.read_bytes())
    assert banks[0] == banks[1] == banks[2]


def test_patterns_limits_and_seeds_take_what_they_say(photos: Path) -> None:
    """Against a plain listing; the history records what was asked for."""
    encoder = gmem_bank.load_encoder("pixels")
    keys = [item.key for item in list_folder(photos).items]

    def built(**options: object) -> list[str]:
        gmem_bank.build(photos, encoder, "b.safetensors", narrowing=Narrowing(**options), overwrite=True)
        bank = gmem_bank.open("b.safetensors")
        return bank.keys(np.arange(len(bank)))

    assert built() == keys
    assert built(include=("hat/*", "*/0*")) == [k for k in keys if k.startswith("hat/") or k.split("/")[1][0] == "0"]
    assert built(exclude=("hat/*",), limit=5) == [k for k in keys if not k.startswith("hat/")][:5]
    shuffled = built(shuffle_seed=3)
    assert sorted(shuffled) == keys != shuffled
    assert built(shuffle_seed=3, limit=6) == shuffled[:6]
    assert built(limit=2, flip=True) == [keys[0], keys[0] + "#flip", keys[1], keys[1] + "#flip"]
    assert gmem_bank.open("b.safetensors").history[0]["arguments"] == {
        "batch_size": 32, "dtype": "f32", "flip": True, "limit": 2,
    }  # fmt: skip
    with pytest.raises(SourceError, match="left by the patterns"):
        built(include=("cat/*",))
    for wrong in ({"limit": 0}, {"shuffle_seed": -1}, {"num_shards": 2, "shard": 2}, {"num_shards": 0}):
        with pytest.raises(ConfigError):
            Narrowing(**wrong)


def test_patterns_are_those_of_the_shell_and_translated_once(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a key is made of, a pattern means what fnmatch says of it; a million keys do not translate it a million times."""
    listing = list_folder(photos)
    keys = [item.key for item in listing.items]
    for include, exclude in [
        (("h?t/*", "*[0-3].jpg"), ()), (("*",), ("shoes/*[!5].jpg", "hat*")), ((), ("shoes/0*",)), (("hat", "*.jpg"), ("*.JPG",)),
    ]:  # fmt: skip
        taken = narrowed(listing, Narrowing(include=include, exclude=exclude), 8)
        wanted = [
            key for key in keys
            if (not include or any(fnmatch.fnmatchcase(key, pattern) for pattern in include))
            and not any(fnmatch.fnmatchcase(key, pattern) for pattern in exclude)
        ]  # fmt: skip
        assert list(taken.items.all_keys()) == wanted
    translated = []
    translate = fnmatch.translate
    monkeypatch.setattr(fnmatch, "translate", lambda pattern: translated.append(pattern) or translate(pattern))
    narrowed(listing, Narrowing(include=("*.jpg",), exclude=("a", "b")), 8)
    assert sorted(translated) == ["*.jpg", "a", "b"]


def test_parts_merged_in_order_are_the_whole_bit_for_bit(photos: Path) -> None:
    """Parts are cut between batches, so every image meets the encoder in the same company."""
    encoder = gmem_bank.load_encoder("hog")
    gmem_bank.build(photos, encoder, "whole.safetensors", batch_size=5)
    for shard in range(3):
        narrowing = Narrowing(num_shards=3, shard=shard)
        gmem_bank.build(photos, encoder, f"{shard}.safetensors", batch_size=5, narrowing=narrowing)
    gmem_bank.merge("0.safetensors", ["1.safetensors", "2.safetensors"], output="merged.safetensors")
    whole, merged = gmem_bank.open("whole.safetensors"), gmem_bank.open("merged.safetensors")
    assert merged.keys(merged.rows()) == whole.keys(whole.rows())
    np.testing.assert_array_equal(merged.snippets(merged.rows()), whole.snippets(whole.rows()))
    assert {n: merged.rows_of(n).tolist() for n in merged.names} == {n: whole.rows_of(n).tolist() for n in whole.names}
    with pytest.raises(SourceError, match="too few for 9 shards"):
        gmem_bank.build(photos, encoder, "x.safetensors", batch_size=5, narrowing=Narrowing(num_shards=9, shard=0))


def test_nothing_in_the_working_folder_is_run(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of the names that a worker imports may lie among the images."""
    for name in ("hashlib", "numpy", "json", "PIL", "gmem_bank"):
        Path(f"{name}.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    items = list_folder(photos).items[:4]
    with DecodePool(ADM, 1) as pool:
        [found] = pool.batches([items])
    assert not Path("ran").exists()
    assert found.hashes == [hashlib.sha256(item.path.read_bytes()).hexdigest() for item in items]


def test_leaving_a_pool_early_does_not_hang(photos: Path) -> None:
    """However soon after the first job: no worker is started once the pool is closing."""
    items = list_folder(photos).items[:16]
    for delay in np.linspace(0.0, 0.03, 12):
        with DecodePool(ADM, 4) as pool:
            jobs = pool.batches([items[at : at + 4] for at in range(0, 16, 4)] * 3)

            def ask(jobs=jobs) -> None:
                with contextlib.suppress(OSError, ValueError, GMemError, CancelledError, RuntimeError):
                    next(jobs)

            threading.Thread(target=ask, daemon=True).start()
            time.sleep(delay)
        assert not pool._workers
