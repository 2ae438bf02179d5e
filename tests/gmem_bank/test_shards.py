"""Shards: what is written is read, by any thread, by other programs, and from the layout of earlier versions."""

from __future__ import annotations

import gc
import json
import os
import resource
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import gmem_bank
from gmem_bank import open_files, shards
from gmem_bank.errors import CorruptError, GMemError, SourceError, UnknownKeyError

SHAPE = (4, 3, 2)


def num_open() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def write(folder: str, counts: list[int], dtype: str, shape: tuple[int, ...] = SHAPE, **entries: object) -> np.ndarray:
    """Shards of so many rows each; gives all values."""
    values = np.random.default_rng(0).standard_normal((sum(counts), *shape)).astype(np.float32)
    writer, start = gmem_bank.ShardWriter(Path(folder), {"plan": dtype}), 0
    for number, count in enumerate(counts):
        keys = [f"k{row}" for row in range(start, start + count)]
        own = {"places": np.arange(start, start + count, dtype=np.int64)}
        writer.write(number, keys, values[start : start + count], dtype=dtype, entries=own)
        start += count
    writer.finish(len(counts), {})
    return values


@pytest.mark.parametrize("shape", [SHAPE, (5,), (1,), ()])
@pytest.mark.parametrize(("dtype", "kind"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_values_are_rounded_to_nearest_and_read_back(dtype: str, kind: torch.dtype, shape: tuple[int, ...]) -> None:
    """As PyTorch rounds them; odd sizes too; with the entries beside them, and by the safetensors package."""
    values = write("s", [3, 1, 4], dtype, shape)
    expected = torch.from_numpy(values).to(kind)
    found = gmem_bank.Shards("s")
    order = np.array([7, 0, 3, 3, 2])
    np.testing.assert_array_equal(found.read(order), expected.float().numpy()[order])
    assert found.entry("places").tolist() == list(range(8))
    assert found.holds(["k3", "k8", "k0"]).tolist() == [True, False, True]
    with safe_open("s/00002.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("values"), expected[4:])


def test_keys_are_found_even_where_their_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """All hashes forced to one of two: every key has its own row, and one that is not there has none."""
    write("s", [3, 1, 4], "f32")
    hashes = shards.key_tables.hashes_of
    monkeypatch.setattr(shards.key_tables, "hashes_of", lambda keys: hashes(keys) % np.uint64(2))
    found = gmem_bank.Shards("s")
    order = ["k7", "k0", "k3", "k3", "k2", "k1", "k4", "k5", "k6"]
    assert found.rows_for(order).tolist() == [7, 0, 3, 3, 2, 1, 4, 5, 6]
    assert found.holds(["other", "k3", "another", "\ud800"]).tolist() == [False, True, False, False]
    assert found.holds([]).tolist() == [] == found.rows_for([]).tolist()
    with pytest.raises(UnknownKeyError, match=r"nothing for 2 keys, such as 'k9', 'x'"):
        found.rows_for(["k1", "k9", "x"])


def test_keys_take_sixteen_bytes_each_once_they_were_looked_up() -> None:
    """A million keys as texts in a dictionary would take 220 MB for the whole training."""
    count = 20_000
    write("s", [count // 2, count // 2], "f32", (1,))
    found, order = gmem_bank.Shards("s"), [f"k{row}" for row in range(count)]
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        assert np.array_equal(found.rows_for(order), np.arange(count))
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept < 24 * count


def test_rows_begin_at_a_page() -> None:
    """So that a row of whole pages is no more than its own."""
    write("s", [3], "f16", (32, 16, 16))
    data = Path("s/00000.safetensors").read_bytes()
    header = int.from_bytes(data[:8], "little")
    assert (8 + header) % 4096 == 0
    with safe_open("s/00000.safetensors", "np") as file:
        assert data[8 + header : 8 + header + 3 * 16384] == file.get_tensor("values").tobytes()


def test_shards_of_the_earlier_layout_are_read(tmp_path: Path) -> None:
    """As the safetensors package lays them out, keys first."""
    values = write("s", [2, 3], "f16")
    for path in sorted(Path("s").glob("*.safetensors")):
        stored = {name: array for name, array in load_file(path).items() if name != "places"}
        save_file(stored, path)
    found = gmem_bank.Shards("s")
    np.testing.assert_array_equal(found.read(np.arange(5)), values.astype(np.float16).astype(np.float32))
    with pytest.raises(CorruptError, match="no entry 'places'"):
        found.entry("places")


def test_threads_read_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """One file open at a time, many readers: every one gets its own rows, and no descriptor is left."""
    monkeypatch.setattr(open_files, "MOST_OPEN", 1)
    values = write("s", [2] * 20, "f32")
    gc.collect()  # files that other tests have left in circles are not counted
    before = num_open()
    found = gmem_bank.Shards("s")

    def read(seed: int, found: gmem_bank.Shards = found) -> bool:
        rows = np.random.default_rng(seed).integers(0, 40, 30)
        return bool((found.read(rows) == values[rows]).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(200)))
    assert num_open() <= before + 1
    del found, read
    assert num_open() == before


def test_what_goes_wrong_later_is_said() -> None:
    """A file cut or removed after it was opened, numbers that f16 cannot hold."""
    write("s", [2, 2], "f32")
    found = gmem_bank.Shards("s")
    path = Path("s/00001.safetensors")
    os.truncate(path, path.stat().st_size - 200)
    found.read(np.array([0]))
    with pytest.raises(CorruptError, match="was cut short"):
        found.read(np.array([0, 3]))
    path.unlink()
    with pytest.raises(SourceError, match="00001"):
        gmem_bank.Shards("s")
    with pytest.raises(GMemError, match="65504"):
        gmem_bank.ShardWriter(Path("t"), {}).write(0, ["k"], np.full((1, 2), 1e6, np.float32), dtype="f16")


def flip_bit(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    """In values, in what lies beside them, in the index; files without a hash, of earlier versions, are believed."""
    write("s", [2, 3], "f16")
    path, index = Path("s/00001.safetensors"), Path("s/index.json")
    whole, seen = path.read_bytes(), []
    gmem_bank.Shards("s").require_sound(lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (5, 5)]
    start = 8 + int.from_bytes(whole[:8], "little")
    for offset in (start, start + 3 * 24 * 2, len(whole) - 1):
        flip_bit(path, offset)
        with pytest.raises(CorruptError, match=r"00001.*its bytes have changed.*makes damaged shards anew"):
            gmem_bank.Shards("s").require_sound()
        path.write_bytes(whole)
    turned = load_file(path)
    save_file({**turned, "values": turned["values"][::-1].copy()}, path)
    gmem_bank.Shards("s").require_sound()
    path.write_bytes(whole)
    text = index.read_text()
    index.write_text(text.replace('"facts":{}', '"facts":{"a":1}'))
    with pytest.raises(CorruptError, match="its text has changed"):
        gmem_bank.Shards("s")
    earlier = json.loads(text)
    del earlier["sha256"]
    index.write_text(json.dumps(earlier))
    assert len(gmem_bank.Shards("s")) == 5


def test_other_open_files_leave_room(tmp_path: Path) -> None:
    """Where the process may open no more, files that were used first are closed."""
    values = write("s", [1] * 60, "f32")
    found = gmem_bank.Shards("s")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open() + 8, before[1]))
    try:
        order = np.random.default_rng(0).permutation(60)
        np.testing.assert_array_equal(found.read(order), values[order])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
