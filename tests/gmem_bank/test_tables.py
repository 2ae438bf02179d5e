"""Images in the columns of Parquet and Arrow tables: the same rows as the same images in a folder."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gmem_bank
from gmem_bank import arrays, table_files, tables
from gmem_bank.cli import main
from gmem_bank.columns import Columns
from gmem_bank.contents import list_source, read_item
from gmem_bank.errors import SourceError
from gmem_bank.narrowing import Narrowing

HOG = gmem_bank.load_encoder("hog")


def jpegs(photos: Path) -> list[Path]:
    return sorted(photos.rglob("*.jpg"))


def huggingface_table(paths: list[Path], names: list[str]) -> pa.Table:
    """As the datasets library writes it: {bytes, path}, a numbered label, the names in the metadata."""
    images = pa.array(
        [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    labels = pa.array([names.index(path.parent.name) for path in paths], pa.int64())
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    return pa.table({"image": images, "label": labels}).replace_schema_metadata(metadata)


@pytest.fixture
def classes(photos: Path) -> list[str]:
    return sorted({path.parent.name for path in jpegs(photos)})


@pytest.mark.parametrize("row_group_size", [1, 5, 1000])
def test_a_table_gives_the_snippets_and_classes_of_the_same_images_in_a_folder(
    photos: Path, classes: list[str], row_group_size: int, tmp_path: Path
) -> None:
    """Row by row, for any size of row group; classes become concepts."""
    paths = jpegs(photos)
    pq.write_table(huggingface_table(paths, classes), tmp_path / "train.parquet", row_group_size=row_group_size)
    folder = gmem_bank.open(gmem_bank.build(photos, HOG, "folder.safetensors").bank)
    report = gmem_bank.build(tmp_path / "train.parquet", HOG, "table.safetensors")
    table = gmem_bank.open(report.bank)
    assert report.concepts == {name: sum(path.parent.name == name for path in paths) for name in classes}
    np.testing.assert_array_equal(table.snippets(table.rows()), folder.snippets(folder.rows()))
    assert table.keys(table.rows())[0] == f"{classes[0]}/train-00"
    assert table.sources[0].columns == {"image": "image", "label": "label"}
    np.testing.assert_array_equal(table.read_image(3), gmem_bank.read_image(paths[3]))
    assert len(table.missing_images(table.rows())) == 0


def test_rows_are_read_in_any_order_from_large_row_groups(
    photos: Path, classes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streaming forwards, and starting again where a row lies before, gives each row its own bytes."""
    paths = jpegs(photos)
    pq.write_table(huggingface_table(paths, classes), tmp_path / "t.parquet", row_group_size=len(paths) - 3)
    monkeypatch.setattr(table_files, "WHOLE_BYTES", 1)
    monkeypatch.setattr(table_files, "STREAM_ROWS", 4)
    for row in np.random.default_rng(0).permutation(len(paths)).tolist():
        assert tables.read_cell(tmp_path / "t.parquet", "image", row) == paths[row].read_bytes()


def test_worker_processes_read_tables(photos: Path, classes: list[str], tmp_path: Path) -> None:
    """The bank is the same, byte for byte, whether one process decodes or several."""
    pq.write_table(huggingface_table(jpegs(photos), classes), tmp_path / "t.parquet", row_group_size=7)
    gmem_bank.build(tmp_path / "t.parquet", HOG, "alone.safetensors", num_workers=0)
    gmem_bank.build(tmp_path / "t.parquet", HOG, "many.safetensors", num_workers=2)
    assert Path("alone.safetensors").read_bytes() == Path("many.safetensors").read_bytes()


@pytest.mark.parametrize("as_file", [False, True])
def test_arrow_tables_and_folders_of_the_datasets_library(
    photos: Path, classes: list[str], as_file: bool, tmp_path: Path
) -> None:
    """A stream or a file of Arrow, by itself or as save_to_disk lays it out; a folder of splits names them."""
    paths = jpegs(photos)
    table = huggingface_table(paths, classes)
    folder = tmp_path / "train"
    folder.mkdir()
    writer = pa.ipc.new_file if as_file else pa.ipc.new_stream
    for number, part in enumerate((table.slice(0, 4), table.slice(4))):
        with writer(str(folder / f"data-{number}.arrow"), part.schema) as sink:
            sink.write_table(part)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": f"data-{n}.arrow"} for n in (0, 1)]}))
    listing = list_source(folder)
    assert [read_item(item) for item in listing.items] == [path.read_bytes() for path in paths]
    assert len(list_source(folder / "data-0.arrow").items) == 4
    bank = gmem_bank.open(gmem_bank.build(folder, HOG, "b.safetensors").bank)
    np.testing.assert_array_equal(bank.read_image(5), gmem_bank.read_image(paths[5]))
    (tmp_path / "dataset_dict.json").write_text("{}")
    with pytest.raises(SourceError, match=r"splits.*train"):
        list_source(tmp_path)


def test_plain_columns_keys_and_labels(photos: Path, tmp_path: Path) -> None:
    """Bytes without a struct; a key column names rows; without classes the file's name is no concept; a glob is all files."""
    paths = jpegs(photos)[:6]
    columns = {"jpg": [p.read_bytes() for p in paths], "id": [p.stem for p in paths], "group": ["x", "y"] * 3}
    for number in (0, 1):
        pq.write_table(pa.table({n: v[3 * number : 3 * number + 3] for n, v in columns.items()}), f"p{number}.parquet")
    assert list(list_source("p*.parquet").items.all_keys()) == [f"p{n}/{row}" for n in (0, 1) for row in range(3)]
    assert gmem_bank.build("p*.parquet", HOG, "plain.safetensors").concepts == {}
    named = list_source("p*.parquet", columns=Columns(key="id", label="group"))
    assert list(named.items.all_keys()) == [f"{'xy'[i % 2]}/{p.stem}" for i, p in enumerate(paths)]
    report = gmem_bank.build("p*.parquet", HOG, "named.safetensors", columns=Columns(key="id", label="group"))
    bank = gmem_bank.open(report.bank)
    assert report.concepts == {"x": 3, "y": 3}
    np.testing.assert_array_equal(bank.read_image(2), gmem_bank.read_image(paths[2]))
    inserted = gmem_bank.insert_concept(bank.path, ["p0.parquet"], HOG, name="more")
    assert inserted.num_added == 3
    assert gmem_bank.open(bank.path).keys(np.array([6])) == ["more/p0/0"]


def test_unusable_cells_are_listed_and_passed_over(photos: Path) -> None:
    """No bytes, no image and no key each have their reason."""
    good = jpegs(photos)[0].read_bytes()
    pq.write_table(
        pa.table({"image": [good, None, b"no image", good, good], "id": ["a", "b", "c", None, "d/../e"]}), "t.parquet"
    )
    report = gmem_bank.build("t.parquet", HOG, "b.safetensors", columns=Columns(key="id"))
    reasons = {entry["path"]: entry["reason"] for entry in report.skipped}
    assert report.num_rows == 1
    assert "no bytes in column" in reasons["b"]
    assert "not a readable image" in reasons["c"]
    assert {"t.parquet:3", "t.parquet:4"} < set(reasons)


def test_a_key_that_ends_as_that_of_a_twin_is_unusable(photos: Path) -> None:
    """No key occurs twice with mirrored twins, and no picture is read back mirrored that was not."""
    good = [path.read_bytes() for path in jpegs(photos)[:3]]
    pq.write_table(pa.table({"image": good, "id": ["c/a", "c/a#flip", "c/b"]}), "t.parquet")
    report = gmem_bank.build(
        "t.parquet", HOG, "b.safetensors", columns=Columns(key="id"), narrowing=Narrowing(flip=True)
    )
    bank = gmem_bank.open(report.bank)
    assert bank.keys(bank.rows()) == ["c/a", "c/a#flip", "c/b", "c/b#flip"]
    plain = gmem_bank.read_image(jpegs(photos)[0])
    np.testing.assert_array_equal(bank.read_image(0), plain)
    np.testing.assert_array_equal(bank.read_image(1), plain[:, ::-1])
    reasons = {entry["path"]: entry["reason"] for entry in report.skipped}
    assert "'c/a#flip' ends in '#flip', which marks mirrored twins" in reasons["t.parquet:1"]


def test_tables_without_images_are_refused_with_what_they_have(photos: Path) -> None:
    """No column of images, several of them, another column asked for, a key twice, damaged files."""
    good = jpegs(photos)[0].read_bytes()
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), "none.parquet")
    pq.write_table(pa.table({"a": [good], "b": [good]}), "two.parquet")
    pq.write_table(pa.table({"image": [good, good], "id": ["k", "k"]}), "twice.parquet")
    Path("cut.parquet").write_bytes(Path("two.parquet").read_bytes()[:-20])
    Path("noise.arrow").write_bytes(b"noise" * 50)
    for name, columns, message in [
        ("none.parquet", None, r"no column of images \(binary\) among \['text', 'n'\]: --image-column"),
        ("two.parquet", None, r"\['a', 'b'\] that can hold images: --image-column"),
        ("none.parquet", Columns(image="text"), "column 'text' is string, expected binary"),
        ("none.parquet", Columns(image="gone"), "no column 'gone'; it has"),
        ("twice.parquet", Columns(key="id"), "two rows of twice.parquet have the key 'k'"),
        ("twice.parquet", Columns(label="gone"), "no column 'gone'"),
        ("cut.parquet", None, "not a readable table"),
        ("noise.arrow", None, "not a readable table"),
        ("gone.parquet", None, "no file at gone.parquet"),
    ]:
        with pytest.raises(SourceError, match=message):
            list_source(name, columns=columns)
    with pytest.raises(SourceError, match="has no columns: --image-column"):
        list_source(photos, columns=Columns(image="x"))


def test_data_sets_of_the_hub_come_from_its_cache(
    photos: Path, classes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf://datasets/OWNER/NAME reads the Parquet files of a cached snapshot; one that is not there is named."""
    commit = "0" * 40
    repository = tmp_path / "hub" / "datasets--owner--name"
    snapshot = repository / "snapshots" / commit / "data"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    blob = repository / "blobs" / ("ab" * 32)
    pq.write_table(huggingface_table(jpegs(photos), classes), blob)
    (snapshot / "train-00000.parquet").symlink_to(Path("../../../blobs") / blob.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    listing = list_source("hf://datasets/owner/name")
    assert [read_item(item) for item in listing.items] == [path.read_bytes() for path in jpegs(photos)]
    for source in ("hf://datasets/owner/name", snapshot / "train-00000.parquet"):
        bank = gmem_bank.open(gmem_bank.build(source, HOG, "hub.safetensors", overwrite=True).bank)
        assert bank.keys(np.array([9])) == [f"{jpegs(photos)[9].parent.name}/train-00000-09"]
        np.testing.assert_array_equal(bank.read_image(9), gmem_bank.read_image(jpegs(photos)[9]))
    with pytest.raises(SourceError, match=r"owner/other is not in the hub cache.*hf download"):
        list_source("hf://datasets/owner/other")
    with pytest.raises(SourceError, match="is not hf://datasets/OWNER/NAME"):
        list_source("hf://datasets/owner")


def test_snippets_in_a_parquet_table(photos: Path) -> None:
    """`precomputed` reads a column of vectors and one of keys, also from our own export; ragged and absent vectors are named."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((5, 7)).astype(np.float32)
    keys = [f"a/{i}" for i in range(5)]
    pq.write_table(pa.table({"embedding": list(vectors), "path": keys, "size": [1] * 5}), "v.parquet")
    found = gmem_bank.read_array(Path("v.parquet"))
    np.testing.assert_array_equal(found.snippets, vectors)
    assert found.keys == keys
    with pytest.raises(SystemExit) as ended:
        main(["build", "v.parquet", "-e", "precomputed", "-o", "v.safetensors", "--space", "raw", "-q"])
    assert ended.value.code == 0
    bank = gmem_bank.open("v.safetensors")
    np.testing.assert_array_equal(bank.snippets(bank.rows()), vectors)
    gmem_bank.export_parquet(bank, "again.parquet")
    np.testing.assert_array_equal(gmem_bank.read_array(Path("again.parquet")).snippets, vectors)
    pq.write_table(pa.table({"vector": [[1.0, 2.0], [1.0]]}), "ragged.parquet")
    with pytest.raises(SourceError, match="the vector of row 1 has 1 numbers, the first 2"):
        gmem_bank.read_array(Path("ragged.parquet"))
    pq.write_table(pa.table({"vector": [[1.0, 2.0], None]}), "null.parquet")
    with pytest.raises(SourceError, match="row 1 has no value in column 'vector'"):
        gmem_bank.read_array(Path("null.parquet"))


def test_a_table_of_images_is_inserted_as_images_and_one_of_vectors_as_vectors(
    photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`insert-concept` looks at what the file holds."""
    gmem_bank.build(photos, HOG, "b.safetensors")
    buffer = io.BytesIO(jpegs(photos)[0].read_bytes())
    pq.write_table(pa.table({"image": [buffer.getvalue()]}), "one.parquet")
    with pytest.raises(SystemExit) as ended:
        main(["insert-concept", "one.parquet", "--bank", "b.safetensors", "-q"])
    assert ended.value.code == 0
    bank = gmem_bank.open("b.safetensors")
    np.testing.assert_allclose(bank.snippets(bank.rows_of("one"))[0], bank.snippets(np.array([0]))[0], atol=1e-6)


def test_labels_as_data_sets_have_them(photos: Path) -> None:
    """No label (null, -1) is no class, slashes become dashes, numbers without names are mentioned and not taken."""
    good = jpegs(photos)[0].read_bytes()
    names = ["T - shirt / top", "hat"]
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table({"image": [good] * 4, "label": [0, -1, None, 1]})
    pq.write_table(
        table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}}).encode()}),
        "t.parquet",
    )
    report = gmem_bank.build("t.parquet", HOG, "t.safetensors")
    assert report.concepts == {"T - shirt - top": 1, "hat": 1}
    bank = gmem_bank.open(report.bank)
    assert bank.keys(bank.rows()) == ["T - shirt - top/t-0", "t-1", "t-2", "hat/t-3"]
    pq.write_table(pa.table({"image": [good], "label": [7]}), "n.parquet")
    report = gmem_bank.build("n.parquet", HOG, "n.safetensors")
    assert report.concepts == {}
    assert "--label-column label makes them classes" in report.skipped[0]["reason"]
    pq.write_table(pa.table({"image": [good], "id": [b"x"]}), "b.parquet")
    with pytest.raises(SourceError, match="column 'id' is binary, expected texts or whole numbers for keys"):
        list_source("b.parquet", columns=Columns(image="image", key="id"))


def test_moved_tables_and_patterns_are_found(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Images lie in a table given by --images, or in a folder that has it; insert-concept takes a pattern of tables."""
    paths = jpegs(photos)[:4]
    Path("data").mkdir()
    pq.write_table(pa.table({"image": [p.read_bytes() for p in paths]}), "data/part.parquet")
    gmem_bank.build("data/part.parquet", HOG, "b.safetensors")
    Path("data").rename("elsewhere")
    bank = gmem_bank.open("b.safetensors")
    with pytest.raises(SourceError):
        bank.read_image(2)
    for place in ("elsewhere", "elsewhere/part.parquet"):
        np.testing.assert_array_equal(bank.read_image(2, place), gmem_bank.read_image(paths[2]))
        assert len(bank.missing_images(bank.rows(), place)) == 0
    with pytest.raises(SystemExit) as ended:
        main(["insert-concept", "elsewhere/p*.parquet", "--bank", "b.safetensors", "--name", "more", "-q"])
    assert ended.value.code == 0
    assert len(gmem_bank.open("b.safetensors").rows_of("more")) == 4


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
def test_offsets_that_lead_out_of_an_arrow_file_are_found(kind: object, photos: Path) -> None:
    """Pyarrow would read wherever they point, and the process would die of it: every offset, of values and of rows."""
    pictures = [path.read_bytes() for path in jpegs(photos)[:3]]
    table = pa.table({"image": pa.array(pictures, pa.binary()), "label": pa.array([0, 1, 0])})
    with kind("sound.arrow", table.schema) as writer:  # type: ignore[operator]
        writer.write_table(table)
    data = Path("sound.arrow").read_bytes()
    offsets = np.cumsum([0, *map(len, pictures)]).astype(np.int32)
    assert data.count(offsets.tobytes()) == 1
    for place, value in ((3, 2**31 - 1), (1, -5), (1, 2**30)):
        forged = offsets.copy()
        forged[place] = value
        Path("forged.arrow").write_bytes(data.replace(offsets.tobytes(), forged.tobytes()))
        with pytest.raises(SourceError, match=r"forged\.arrow: column 'image' is damaged"):
            table_files.opened(Path("forged.arrow").absolute()).cell("image", 1)
        with pytest.raises(SourceError, match="column 'image' is damaged"):
            next(table_files.opened(Path("forged.arrow").absolute()).column("image"))
        table_files._open.cache_clear()
    assert table_files.opened(Path("sound.arrow").absolute()).cell("image", 1) == pictures[1]


@pytest.mark.parametrize("kind", [pa.ipc.new_file, pa.ipc.new_stream])
@pytest.mark.parametrize("codec", ["zstd", "lz4"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_compressed_arrow_is_refused_before_it_is_unpacked(kind: object, codec: str, dictionary: bool) -> None:
    """A file of a few kilobytes would take a gigabyte in every process."""
    values = pa.array([b"\0" * (1 << 20)] * 8, pa.binary())
    table = pa.table({"image": values.dictionary_encode() if dictionary else values})
    with kind("small.arrow", table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:  # type: ignore[operator]
        writer.write_table(table)
    before = pa.total_allocated_bytes()
    with pytest.raises(SourceError, match=r"small\.arrow is compressed.*as Parquet"):
        table_files.opened(Path("small.arrow").absolute())
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_small_parquet_file_of_many_equal_snippets_is_not_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers of 84 MB in 2 kB are refused by what the file says of itself; texts, of which it says nothing, as they come."""
    zeros = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(128 * 163_840, np.float32)), 128)
    pq.write_table(pa.table({"snippets": zeros}), "zeros.parquet", compression="zstd")
    before = pa.total_allocated_bytes()
    with pytest.raises(SourceError, match=r"zeros\.parquet would unpack to 83,886,080 bytes"):
        gmem_bank.read_array(Path("zeros.parquet"))
    assert pa.total_allocated_bytes() - before < 1 << 20
    monkeypatch.setattr(arrays, "MODEST_BYTES", 1 << 20)
    ones = pa.FixedSizeListArray.from_arrays(pa.array(np.ones(4000, np.float32)), 2)
    pq.write_table(pa.table({"snippets": ones, "key": ["x" * 1000] * 2000}), "keys.parquet")
    with pytest.raises(SourceError, match=r"keys\.parquet would unpack"):
        gmem_bank.read_array(Path("keys.parquet"))
