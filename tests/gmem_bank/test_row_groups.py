"""Tables read in random order: every row group once, in bounded memory; and keys found without keeping their text twice."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gmem_bank import key_places, keys, table_files
from gmem_bank.columns import Columns
from gmem_bank.contents import list_source, read_item
from gmem_bank.errors import SourceError
from gmem_bank.key_places import KeyPlaces
from gmem_bank.listing import Items, RowGroups
from gmem_bank.narrowing import Narrowing, in_runs, narrowed

FILES, GROUPS, ROWS, SIZE = 5, 4, 6, 1000
"""Of the tables here: row groups a file, rows a group, bytes an image."""


@pytest.fixture
def values(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The cells of "t-*.parquet" in order; memory for some three groups, runs of two."""
    rng = np.random.default_rng(0)
    cells = [rng.bytes(SIZE) for _ in range(FILES * GROUPS * ROWS)]
    for number in range(FILES):
        own = cells[number * GROUPS * ROWS : (number + 1) * GROUPS * ROWS]
        pq.write_table(pa.table({"image": own}), f"t-{number}.parquet", row_group_size=ROWS, compression="none")
    monkeypatch.setattr(table_files, "_MEMORY", table_files._Memory())
    monkeypatch.setattr(table_files, "CACHED_BYTES", int(3.5 * ROWS * SIZE))
    monkeypatch.setattr("gmem_bank.narrowing.WHOLE_BYTES", int(2.5 * ROWS * SIZE))
    return cells


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, int]]:
    """How often each row group was read, by file and group."""
    counted: Counter[tuple[str, int]] = Counter()
    read = table_files._ParquetTable.read_group

    def counting(table: table_files._ParquetTable, name: str, group: int) -> object:
        counted[table.path.name, group] += 1
        return read(table, name, group)

    monkeypatch.setattr(table_files._ParquetTable, "read_group", counting)
    return counted


def test_a_shuffled_table_is_read_once(values: list[bytes], reads: Counter[tuple[str, int]]) -> None:
    """Over many files, each row group is decoded one time; every row comes once, with its own bytes, in an order of its own."""
    listing = list_source("t-*.parquet")
    cells = dict(zip(listing.items.all_keys(), values, strict=True))
    orders = []
    for seed in (1, 1, 2):
        reads.clear()
        table_files._MEMORY = table_files._Memory()
        items = narrowed(listing, Narrowing(shuffle_seed=seed), 8).items
        assert all(read_item(item) == cells[item.key] for item in items)
        assert sorted(items.all_keys()) == sorted(cells)
        assert set(reads.values()) == {1}
        assert len(reads) == FILES * GROUPS
        orders.append(list(items.all_keys()))
    assert orders[0] == orders[1] != orders[2]
    files = [key.split("/")[0] for key in orders[0]]
    assert sum(a != b for a, b in zip(files, files[1:], strict=False)) > FILES * GROUPS // 2


def test_rows_of_any_order_take_bounded_memory(values: list[bytes], reads: Counter[tuple[str, int]]) -> None:
    """Groups used longest ago are dropped; a row that returns to one of the last three finds it."""
    items = list_source("t-*.parquet").items
    for place in np.random.default_rng(1).permutation(len(items)).tolist():
        assert read_item(items[place]) == values[place]
        kept = table_files._MEMORY._kept
        assert table_files._MEMORY.num_bytes == sum(found.nbytes for found in kept.values())
        assert table_files._MEMORY.num_bytes <= table_files.CACHED_BYTES
    reads.clear()
    for place in (0, ROWS, 2 * ROWS, 1, ROWS + 1, 2 * ROWS + 1, 2):
        read_item(items[place])
    assert sum(reads.values()) <= 3


def test_a_limit_takes_a_sample_of_all_rows_not_of_the_first_groups(values: list[bytes]) -> None:
    """Which rows are drawn does not depend on row groups: they are those that a folder's shuffle would draw."""
    listing = list_source("t-*.parquet")
    drawn = np.random.Generator(np.random.PCG64(7)).permutation(len(values))[:12]
    items = narrowed(listing, Narrowing(shuffle_seed=7, limit=12), 8).items
    assert sorted(items.all_keys()) == sorted(listing.items.key(int(place)) for place in drawn)


def test_groups_that_all_fit_are_shuffled_freely_and_one_too_large_keeps_its_order() -> None:
    """One run is the plain order drawn; rows of a group that is streamed lie together and go forwards."""
    groups = RowGroups()
    for start, size in ((0, 60 << 20), (10, 500 << 20), (30, 60 << 20), (40, 0)):
        groups.append(start, size)
    drawn = np.random.default_rng(3).permutation(50)
    ordered = in_runs(drawn, groups, np.random.default_rng(4))
    assert sorted(ordered.tolist()) == list(range(50))
    large = np.flatnonzero((ordered >= 10) & (ordered < 30))
    assert ordered[large].tolist() == list(range(10, 30))
    assert large.tolist() == list(range(large[0], large[0] + 20))
    without = drawn[(drawn < 10) | (drawn >= 30)]
    np.testing.assert_array_equal(in_runs(without, groups, np.random.default_rng(4)), without)


def test_values_that_unpack_to_more_than_the_file_said_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet stores equal values once: a small row group may be a large one in memory, which is not kept."""
    value = bytes(range(256)) * 40
    pq.write_table(pa.table({"image": [value] * 500}), "same.parquet", row_group_size=500)
    assert Path("same.parquet").stat().st_size < 100_000
    monkeypatch.setattr(table_files, "_MEMORY", table_files._Memory())
    monkeypatch.setattr(table_files, "WHOLE_BYTES", 1 << 20)
    for row in (0, 499, 3):
        assert table_files.opened(Path("same.parquet")).cell("image", row) == value
    assert table_files._MEMORY.num_bytes == 0


def test_keys_are_found_where_hashes_collide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text decides: equal hashes are neither one key nor a key twice."""
    items = Items(Path())
    for key in ("a", "b", "c", "b", "a"):
        items.append(key, 0, 0)
    for hashes in (key_places.hashes_of, lambda keys: np.zeros(len(list(keys)), np.uint64)):
        for module in (keys, key_places):
            monkeypatch.setattr(module, "hashes_of", hashes)
        places = KeyPlaces(items)
        assert [places.find(key) for key in ("a", "b", "c", "d")] == [0, 1, 2, None]
        assert places.repeated() == (1, 3)
        assert KeyPlaces(items.take([2, 1, 0])).repeated() is None


def test_listing_a_table_takes_no_text_for_every_key() -> None:
    """A key column and a column of classes: less than 130 bytes an image at the peak, of which 64 are the listing."""
    number = 20_000
    names = [f"class-{row % 100:03d}/image-{row:08d}" for row in range(number)]
    columns = {"image": [b"x"] * number, "id": names, "label": [name[:9] for name in names]}
    pq.write_table(pa.table(columns), "t.parquet", row_group_size=1000)
    wanted = Columns(key="id", label="none"), Columns(label="label")
    list_source("t.parquet", columns=wanted[0])  # what is imported and opened once
    for asked in wanted:
        tracemalloc.start()
        listing = list_source("t.parquet", columns=asked)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(listing.items) == number
        assert peak < 130 * number
    columns["id"][-1] = columns["id"][7]
    pq.write_table(pa.table(columns), "t.parquet", row_group_size=1000)
    with pytest.raises(SourceError, match=r"two rows of t\.parquet have the key .class-007/image-00000007"):
        list_source("t.parquet", columns=wanted[0])
