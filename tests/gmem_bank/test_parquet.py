"""Parquet: what pandas and Arrow read back is what the bank holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas
import pyarrow
import pytest
from pyarrow import parquet as arrow_parquet

from gmem_bank import builder, kinds, parquet, plot_measures
from gmem_bank.encoders import load_encoder
from gmem_bank.errors import ConfigError, MissingDependencyError, WriteError
from gmem_bank.parquet import export_parquet
from gmem_bank.provenance import Source
from gmem_bank.storage import Payload, write
from tests.conftest import BankMaker, synthetic_bank

COLUMNS = ["row", "key", "concept", "concepts", "source", "active", "image", "vector"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": 1},
        {"dtype": "bf16", "parts": (3, 17)},
        {"kind": "factored", "space": "raw"},
        {"kind": "sparse", "dtype": "i8", "active": np.arange(20) % 3 != 1},
        {"active": np.zeros(20)},
    ],
)
def test_pandas_reads_back_exactly_the_bank(make_bank: BankMaker, options: dict) -> None:
    """Every row, masked ones without a vector; every value bit for bit."""
    bank = make_bank(**options)
    report = export_parquet(bank, "bank.parquet")
    table = pandas.read_parquet("bank.parquet")
    rows = np.arange(len(bank))
    active = np.isin(rows, bank.rows())
    assert list(table.columns) == report.columns == COLUMNS
    assert table["row"].dtype == np.int64 and table["row"].tolist() == rows.tolist()
    assert table["key"].tolist() == bank.keys(rows)
    assert table["concept"].tolist() == [f"class{row % 3}" for row in rows]
    assert [list(names) for names in table["concepts"]] == [[f"class{row % 3}"] for row in rows]
    assert table["active"].dtype == np.bool_ and table["active"].tolist() == active.tolist()
    assert table["vector"].isna().tolist() == (~active).tolist()
    expected = bank.snippets(bank.rows())
    for row, snippet in zip(bank.rows().tolist(), expected, strict=True):
        vector = table["vector"][row]
        assert vector.dtype == np.float32
        assert np.array_equal(vector, snippet)
    assert (report.num_rows, report.num_active, report.num_row_groups) == (len(bank), active.sum(), 1)
    assert report.bytes == Path("bank.parquet").stat().st_size
    assert report.to_json()["output"] == "bank.parquet"


def test_types_and_metadata(make_bank: BankMaker) -> None:
    """Plain lists, and whence the table came."""
    bank = make_bank(active=np.arange(20) > 3)
    export_parquet(bank, "bank.parquet", coordinates=np.zeros((16, 2)))
    schema = arrow_parquet.read_schema("bank.parquet")
    text = pyarrow.string()
    assert {field.name: field.type for field in schema} == {
        "row": pyarrow.int64(), "key": text, "concept": text, "concepts": pyarrow.list_(text), "source": text,
        "active": pyarrow.bool_(), "image": text, "vector": pyarrow.list_(pyarrow.float32()), "x": pyarrow.float32(),
        "y": pyarrow.float32(),
    }  # fmt: skip
    facts = {name.decode(): value.decode() for name, value in schema.metadata.items() if name.startswith(b"gmem.")}
    assert facts == {
        "gmem.fingerprint": bank.fingerprint, "gmem.dim": "8", "gmem.space": "unit", "gmem.encoder": "made-up",
        "gmem.encoder_fingerprint": bank.encoder.fingerprint,
    }  # fmt: skip


@pytest.mark.parametrize("vectors", [True, False])
def test_row_groups_bound_the_memory(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, vectors: bool) -> None:
    """Seven rows at a time give the same table as all at once; no read is larger; progress is told."""
    bank = make_bank(rows=23, parts=(10, 13), active=np.arange(23) % 4 != 0)
    export_parquet(bank, "whole.parquet", vectors=vectors)
    monkeypatch.setattr(parquet, "GROUP_BYTES", 4 * 8 * 7)
    monkeypatch.setattr(parquet, "GROUP_ROWS", 7 if not vectors else 1000)
    asked: list[int] = []
    read = type(bank).snippets
    monkeypatch.setattr(type(bank), "snippets", lambda self, rows: asked.append(len(rows)) or read(self, rows))
    told: list[tuple[int, int]] = []
    report = export_parquet(
        bank, "parts.parquet", vectors=vectors, progress=lambda done, total: told.append((done, total))
    )
    stored = arrow_parquet.ParquetFile("parts.parquet")
    assert report.num_row_groups == stored.num_row_groups == 4
    assert [stored.metadata.row_group(group).num_rows for group in range(4)] == [7, 7, 7, 2]
    assert told == [(7, 23), (14, 23), (21, 23), (23, 23)]
    assert max(asked, default=0) <= 7 and bool(asked) == vectors
    assert arrow_parquet.read_table("parts.parquet").equals(arrow_parquet.read_table("whole.parquet"))
    assert ("vector" in report.columns) == vectors


def test_paths_lead_from_the_table_to_the_images(photos: Path) -> None:
    """Also from another folder than the bank's; a flipped row has the picture it was made of; masked rows have theirs."""
    builder.build(photos, load_encoder("hog"), "bank.safetensors")
    bank = kinds.open("bank.safetensors")
    for output in ("bank.parquet", "tables/deep/bank.parquet"):
        export_parquet(bank, output)
        table = pandas.read_parquet(output)
        for key, image, source in zip(table["key"], table["image"], table["source"], strict=True):
            assert not Path(image).is_absolute()
            assert (Path(output).parent / image).samefile(photos / key)
            assert (Path(output).parent / source).samefile(photos)


def test_rows_without_an_image_have_none(tmp_path: Path) -> None:
    """Derived rows have neither source nor image; rows of an array have a source only; flips lose their suffix."""
    bank = synthetic_bank(tmp_path / "bank.safetensors", keys=["a/1.png#flip", "b/2", "c/3", "a/xx/4.png"], rows=4)
    header = type(bank.header)(
        **{
            **vars(bank.header),
            "sources": (
                Source(kind="folder", path="pictures", prefix="a/"),
                Source(kind="array", path="vectors.npy"),
                Source(kind="derived"),
            ),
        }
    )
    text = np.frombuffer(bytes(bank.stored.array("0/keys.bytes")).replace(b"xx", b".."), np.uint8)  # as no writer would
    changed = {"0/source": Payload.of(np.array([0, 1, 2, 0], np.uint32)), "0/keys.bytes": Payload.of(text)}
    write(tmp_path / "other.safetensors", header, {**bank.stored.payloads(), **changed})
    export_parquet(kinds.open(tmp_path / "other.safetensors"), tmp_path / "bank.parquet")
    table = pandas.read_parquet(tmp_path / "bank.parquet").astype(object)
    assert [value if isinstance(value, str) else None for value in table["source"]] == [
        "pictures",
        "vectors.npy",
        None,
        "pictures",
    ]
    assert [value if isinstance(value, str) else None for value in table["image"]] == [
        "pictures/1.png",
        None,
        None,
        None,
    ]


def test_concepts_of_each_row_in_file_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several, one or none, over row groups."""
    monkeypatch.setattr(parquet, "GROUP_ROWS", 2)
    bank = synthetic_bank(
        tmp_path / "bank.safetensors", keys=["loose.png", "b/1.png", "a/2.png", "c/3.png", "c/4.png"], rows=5
    )
    assert bank.names == ("a", "b", "c")
    members = {
        "concepts.rows": Payload.of(np.array([1, 2, 1, 1, 3])),
        "concepts.offsets": Payload.of(np.array([0, 2, 3, 5])),
    }
    write(tmp_path / "both.safetensors", bank.header, {**bank.stored.payloads(), **members})
    export_parquet(kinds.open(tmp_path / "both.safetensors"), tmp_path / "bank.parquet")
    table = arrow_parquet.read_table(tmp_path / "bank.parquet")
    assert table["concepts"].to_pylist() == [[], ["a", "b", "c"], ["a"], ["c"], []]
    assert table["concept"].to_pylist() == [None, "a", "a", "c", None]


def test_a_bank_without_concepts(tmp_path: Path) -> None:
    """Empty lists, and nulls."""
    bank = synthetic_bank(tmp_path / "bank.safetensors", keys=["1.png", "2.png"], rows=2)
    export_parquet(bank, tmp_path / "bank.pq")
    table = arrow_parquet.read_table(tmp_path / "bank.pq")
    assert table["concepts"].to_pylist() == [[], []] and table["concept"].to_pylist() == [None, None]


def test_hostile_keys_come_back(tmp_path: Path) -> None:
    """Quotes, line feeds, emoji, and a key of the greatest length."""
    keys = ["a\"b'/1.png", "line\nfeed.png", "🦆/\u2028.png", "</script>", "k" * 65_535]
    export_parquet(synthetic_bank(tmp_path / "bank.safetensors", keys=keys, rows=5), tmp_path / "bank.parquet")
    assert pandas.read_parquet(tmp_path / "bank.parquet")["key"].tolist() == keys


def test_coordinates_stand_by_their_rows(make_bank: BankMaker) -> None:
    """Those of `project`, or anyone's; masked rows and NaN are null; another shape is refused."""
    active = np.arange(20) % 5 != 2
    bank = make_bank(active=active)
    places = plot_measures.project(bank, num_rows=len(bank)).coordinates
    export_parquet(bank, "bank.parquet", coordinates=places)
    table = arrow_parquet.read_table("bank.parquet")
    for column, expected in zip(("x", "y"), places.T, strict=True):
        given = table[column].to_pylist()
        assert [value is None for value in given] == (~active).tolist()
        assert [value for value in given if value is not None] == expected.tolist()
    places[0] = np.nan
    export_parquet(bank, "bank.parquet", coordinates=places.astype(np.float64))
    assert arrow_parquet.read_table("bank.parquet")["x"].to_pylist()[:2] == [None, places[1, 0]]
    for wrong in (np.zeros((20, 2)), np.zeros((16, 3)), np.zeros(32)):
        with pytest.raises(ConfigError, match="each of 16 active rows"):
            export_parquet(bank, "bank.parquet", coordinates=wrong)


def test_failures_leave_what_was_there(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """A suffix that would hit the bank, no pyarrow, an error half way, a folder that is a file."""
    bank = make_bank()
    with pytest.raises(ConfigError, match=r"named \.parquet or \.pq"):
        export_parquet(bank, "bank.safetensors")
    export_parquet(bank, "bank.parquet")
    before = Path("bank.parquet").read_bytes()
    monkeypatch.setattr(parquet, "GROUP_ROWS", 3)

    def stop(done: int, total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_parquet(bank, "bank.parquet", progress=stop)
    with pytest.raises(WriteError):
        export_parquet(bank, "bank.safetensors/bank.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"pip install pyarrow \(the extra gmem\[parquet\]\)") as caught:
        export_parquet(bank, "bank.parquet")
    assert caught.value.extra == "parquet"
    assert Path("bank.parquet").read_bytes() == before
    assert sorted(path.name for path in Path().iterdir()) == ["bank.parquet", "bank.safetensors"]


def test_the_same_bank_gives_the_same_bytes(make_bank: BankMaker) -> None:
    """No time and no order of chance in the table."""
    bank = make_bank(rows=50)
    for name in ("one.parquet", "two.parquet"):
        export_parquet(bank, name)
    assert Path("one.parquet").read_bytes() == Path("two.parquet").read_bytes()
