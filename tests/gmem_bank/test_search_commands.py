"""The commands index and search, the page of results, and files of vectors as queries."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import gmem_bank
from gmem_bank import query
from gmem_bank.cli import main
from gmem_bank.errors import (
    ConfigError,
    CorruptError,
    EncoderError,
    EncoderMismatchError,
    OutputExistsError,
    SourceError,
)
from gmem_bank.query import search, snippet_of
from gmem_bank.selection import Selection
from tests.conftest import BankMaker
from tests.gmem_bank.test_index import clustered


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def ids(result: Result) -> list[list[int]]:
    return [[hit["row"] for hit in one["hits"]] for one in json.loads(result.stdout)]


def test_index_and_search_by_commands(make_bank: BankMaker) -> None:
    """Built, used and said so, not used with --exact, stale after an insert, updated, rebuilt."""
    bank = make_bank(snippets=clustered())
    built = json.loads(
        run("index", str(bank.path), "--kind", "ivf-rabitq", "--nprobe", "10", "--rerank", "40", "--json").stdout
    )
    assert (built["kind"], built["num_rows"], built["settings"]) == ("ivf-rabitq", 400, {"nprobe": 10, "rerank": 40})
    assert built["num_bytes"] == Path(built["path"]).stat().st_size
    key = bank.keys(np.array([5]))[0]
    by_index = run("search", str(bank.path), key, "-k", "7", "--json")
    assert "searched by" in by_index.stderr
    assert "bank.safetensors.index (ivf-rabitq, nprobe 10, rerank 40)" in by_index.stderr
    exact = run("search", str(bank.path), key, "-k", "7", "--json", "--exact")
    assert exact.stderr == ""
    assert ids(by_index) == ids(exact)
    assert ids(exact)[0][0] == 5
    gmem_bank.insert_snippets(bank.path, clustered(5, seed=4), name="new", report=False)
    assert "--update" in run("search", str(bank.path), key, code=1).stderr
    run("search", str(bank.path), key, "--exact")
    text = run("index", str(bank.path), "--update").stdout
    assert "+5 rows, -0 rows" in text
    assert "recall@10" in text
    assert "nothing to do" in run("index", str(bank.path), "--update").stderr
    assert len(ids(run("search", str(bank.path), "new", "-k", "405", "--json"))[0]) == 405
    flat = run("index", str(bank.path)).stdout
    assert "flat (exact, which is fast enough at this size)" in flat


def test_sizes_and_efforts_are_spelt_as_elsewhere(make_bank: BankMaker) -> None:
    """20M as compress takes it; --effort and --nprobe are one; the table says how exact search was measured."""
    path = str(make_bank(snippets=clustered()).path)
    for name in ("--effort", "--nprobe"):
        built = run("index", path, "--kind", "ivf-flat", name, "3", "--rerank", "1", "--max-bytes", "0.5M", "--json")
        assert json.loads(built.stdout)["settings"] == {"nprobe": 3, "rerank": 1}
    assert "streamed from disk, first pass" in run("index", path).stdout
    assert ".parquet" in run("search", "--help").stdout
    assert "BANK" in run("search", path, code=2).stderr


def test_bad_arguments_to_index(make_bank: BankMaker) -> None:
    """One line on stderr, exit 1 or 2."""
    path = str(make_bank(snippets=clustered(60, 8)).path)
    for arguments, words, code in (
        (["--kind", "rabitq"], "'--kind'", 2), (["--recall", "0"], "'--recall'", 2),
        (["--recall", "1.5"], "'--recall'", 2), (["--recall", "nan"], "'--recall'", 2), (["--max-bytes", "100"], "--max-bytes", 1), (["--nlist", "61"], "nlist", 1),
        (["--kind", "ivf-flat", "--nprobe", "99"], "effort (nprobe) must be 1 to", 1), (["--update"], "no index at", 1),
        (["--update", "--kind", "flat"], "--kind needs a new one", 2),
        (["--kind", "ivf-flat", "--rerank", "0"], "'--rerank'", 2), (["--rerank", "99999999999"], "'--rerank'", 2), (["--nprobe", "3"], "flat has no effort (nprobe)", 1),
        (["--kind", "hnsw", "--nlist", "3"], "hnsw has no nlist", 1), (["--max-bytes", "20X"], "is not a size", 2),
        (["--max-bytes", "0.1K"], "--max-bytes", 1), (["--max-bytes", "0"], "at least 1 byte", 2), (["--update", "--effort", "3"], "--effort needs a new one", 2),
        (["--update", "--max-bytes", "3M"], "--max-bytes needs a new one", 2),
    ):  # fmt: skip
        assert words in run("index", path, *arguments, code=code).stderr
    assert "no bank at" in run("index", "absent.safetensors", code=1).stderr
    assert "no index at" in run("search", path, "class1", "--index", "absent.index", code=1).stderr
    assert sorted(p.name for p in Path().iterdir()) == ["bank.safetensors"]


@pytest.mark.parametrize("name", ["q.npy", "q.npz", "q.safetensors", "q.h5", "q.parquet"])
def test_a_file_of_vectors_is_a_query_a_row(make_bank: BankMaker, name: str) -> None:
    """Every form, any length of the vectors, any number type."""
    bank = make_bank(snippets=clustered(60, 8))
    vectors = bank.snippets(np.array([3, 17, 3])).astype(np.float64) * 5
    if name.endswith("npy"):
        np.save(name, vectors)
    elif name.endswith("npz"):
        np.savez(name, snippets=vectors, keys=np.array(["a", "b", "c"]))
    elif name.endswith("h5"):
        import h5py

        with h5py.File(name, "w") as stored:
            stored["snippets"] = vectors
    elif name.endswith("parquet"):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"snippets": pa.array(vectors.tolist())}), name)
    else:
        from safetensors.numpy import save_file

        save_file({"snippets": vectors}, name)
    found = search(bank, name, k=1)
    assert [result.hits[0].row for result in found] == [3, 17, 3]
    assert found[0].hits[0].score == pytest.approx(1, abs=1e-6)
    assert [result.query for result in found] == (["a", "b", "c"] if name.endswith("npz") else ["0", "1", "2"])


def test_files_of_vectors_that_cannot_be_asked(make_bank: BankMaker) -> None:
    """Dimension, NaN, zeros, infinite in f32, damaged."""
    bank = make_bank(snippets=clustered(60, 8))
    ones = np.ones((2, 8))
    for array, error, words in (
        (np.ones((2, 9)), EncoderMismatchError, "dimension 9"), (ones * [[1], [np.nan]], ConfigError, "'1' is not finite"),
        (ones * [[0], [1]], ConfigError, "'0' is all zeros"), (ones * 1e300, ConfigError, "'0' of q.npy has numbers beyond 3.4e38"),
        (np.ones(8), SourceError, "expected numbers"),
    ):  # fmt: skip
        np.save("q.npy", array)
        with pytest.raises(error, match=words):
            search(bank, "q.npy")
    Path("q.npy").write_bytes(b"no array")
    with pytest.raises(SourceError, match="could not read"):
        search(bank, "q.npy")


@pytest.mark.parametrize("suffix", ["safetensors", "h5", "gmem"])
def test_rows_of_another_bank_are_queries_if_one_encoder_made_both(make_bank: BankMaker, suffix: str) -> None:
    """Its active rows, by their keys; of another encoder, or damaged, it is refused, which vectors alone could not be."""
    bank = make_bank(snippets=clustered(60, 8))
    same = make_bank(f"same.{suffix}", snippets=clustered(60, 8)[[3, 17, 4]], active=np.array([True, True, False]))
    found = search(bank, str(same.path), k=1)
    assert [result.hits[0].row for result in found] == [3, 17]
    assert [result.query for result in found] == same.keys(np.array([0, 1]))
    other = make_bank(f"other.{suffix}", snippets=clustered(60, 9))
    with pytest.raises(EncoderMismatchError, match="dim"):
        search(bank, str(other.path))
    if suffix == "safetensors":
        Path("cut.safetensors").write_bytes(same.path.read_bytes()[:-100])
        with pytest.raises(CorruptError, match="cut short"):
            search(bank, "cut.safetensors")


def test_a_bank_of_masked_rows_is_said_so_before_images_are_encoded(photos: Path) -> None:
    """No encoder is loaded for nothing."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    gmem_bank.mask("bank.safetensors", gmem_bank.Selection(concepts=("hat",)))
    gmem_bank.remove("bank.safetensors", gmem_bank.Selection(concepts=("hat",), invert=True))
    bank = gmem_bank.open("bank.safetensors")

    def load() -> gmem_bank.Encoder:
        raise AssertionError("an encoder for nothing")

    with pytest.raises(ConfigError, match=r"every row of .* is masked"):
        search(bank, str(photos / "hat"), load=load)


def test_text_to_an_encoder_without_any(photos: Path) -> None:
    """What understands text is named."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    with pytest.raises(EncoderError, match="does not understand text"):
        search(gmem_bank.open("bank.safetensors"), "a red hat", text=True)


def test_the_page_shows_pictures_and_says_where_there_are_none(photos: Path) -> None:
    """Images as thumbnails; rows of arithmetic and lost images in words; keys and queries escaped; no script."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    gmem_bank.interpolate("bank.safetensors", "hat", "dress", steps=2)
    run("index", "bank.safetensors")
    lost = photos / gmem_bank.open("bank.safetensors").keys(np.array([0]))[0]
    lost.unlink()
    shown = run("search", "bank.safetensors", "hat", "-k", "26", "--html", "page.html")
    assert len(shown.stdout.splitlines()) == 26
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 23
    assert page.count("not from an image") == 2
    assert page.count("the image is not where it was") == 1
    assert "<script" not in page
    assert "bank.safetensors.index (flat)" in page
    assert "exists" in run("search", "bank.safetensors", "hat", "--html", "page.html", code=1).stderr
    run("search", "bank.safetensors", "hat", "--html", "page.html", "--overwrite")
    bank = gmem_bank.open("bank.safetensors")
    hit = gmem_bank.search(bank, bank.keys(np.array([9]))[0], k=1)[0].hits[0]
    result = gmem_bank.QueryHits(query="<b>&", hits=(hit,))
    assert gmem_bank.write_results_page("other.html", bank, [result]) == 1
    assert "&lt;b&gt;&amp;" in Path("other.html").read_text(encoding="utf-8")
    with pytest.raises(OutputExistsError):
        gmem_bank.write_results_page("other.html", bank, [result])


def test_files_of_a_folder_that_cannot_be_asked_are_named(photos: Path) -> None:
    """A damaged image and one of a foreign format, among three good ones: on stderr, in JSON, and on the page."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "bank.safetensors")
    folder = Path("asked")
    folder.mkdir()
    for place, picture in enumerate(sorted((photos / "hat").iterdir())[:3]):
        (folder / f"{place}.jpg").write_bytes(picture.read_bytes())
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff" + bytes(40))
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    shown = run("search", "bank.safetensors", "asked", "-k", "1", "--html", "page.html")
    assert "skipped damaged.jpg: not a readable image" in shown.stderr
    assert "skipped phone.heic: " in shown.stderr
    assert [line for line in shown.stdout.splitlines() if not line.startswith(" ")] == ["0.jpg", "1.jpg", "2.jpg"]
    found = json.loads(run("search", "bank.safetensors", "asked", "-k", "1", "--json").stdout)
    assert [(entry["query"], len(entry["hits"]), "skipped" in entry) for entry in found] == [
        ("0.jpg", 1, False), ("1.jpg", 1, False), ("2.jpg", 1, False), ("damaged.jpg", 0, True), ("phone.heic", 0, True),
    ]  # fmt: skip
    assert "not a readable image" in Path("page.html").read_text(encoding="utf-8")


def test_a_page_replaces_nothing_but_a_page(photos: Path) -> None:
    """The bank that is searched, its index or any other file stay, --overwrite or not."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "b.safetensors")
    before = Path("b.safetensors").read_bytes()
    bank = gmem_bank.open("b.safetensors")
    found = gmem_bank.search(bank, "hat", k=2, load=lambda: pytest.fail("not needed"))
    Path("notes.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"named \.html"):
        gmem_bank.write_results_page("b.safetensors", bank, found, overwrite=True)
    with pytest.raises(OutputExistsError, match="exists and is no page"):
        gmem_bank.write_results_page("notes.html", bank, found, overwrite=True)
    assert Path("b.safetensors").read_bytes() == before
    gmem_bank.write_results_page("page.html", bank, found)
    with pytest.raises(OutputExistsError, match="name another file with --html"):
        gmem_bank.write_results_page("page.html", bank, found)
    assert gmem_bank.write_results_page("page.html", bank, found, overwrite=True) == 2


def test_a_query_too_short_for_a_direction_is_refused(photos: Path) -> None:
    """Scaling a query changes no cosine; where float32 cannot tell its direction, that is said."""
    gmem_bank.build(photos, gmem_bank.load_encoder("hog"), "b.safetensors")
    bank = gmem_bank.open("b.safetensors")
    query = bank.snippets(np.array([3]))
    np.testing.assert_allclose(bank.nearest(query * 1e-9, 3)[0], bank.nearest(query, 3)[0], atol=1e-6)
    with pytest.raises(ConfigError, match="it has no direction in float32"):
        bank.nearest(query * np.float32(1e-20), 3)


@pytest.mark.parametrize("space", ["raw", "unit"])
def test_a_concept_is_asked_by_a_mean_that_takes_no_room(make_bank: BankMaker, space: str) -> None:
    """Its rows are added up some at a time, masked ones left out: the mean is that of all at once."""
    rows = np.random.default_rng(0).standard_normal((6000, 64)).astype(np.float32) + 1
    bank = make_bank(snippets=rows, keys=[f"all/{i}" for i in range(6000)], space=space, dtype="f32")
    gmem_bank.mask(bank.path, Selection(keys=("all/3",)))
    opened = gmem_bank.open(bank.path)
    snippet_of(opened, "all/0")  # what is kept once it is used
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(query, "CHUNK_VALUES", 1 << 14)
        tracemalloc.start()
        try:
            found = snippet_of(opened, "all")
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    wanted = np.delete(bank.snippets(np.arange(6000)).astype(np.float64), 3, axis=0).mean(axis=0)
    wanted /= np.linalg.norm(wanted) if space == "unit" else 1
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert peak < rows.nbytes / 2


def test_options_of_a_search_that_would_do_nothing(make_bank: BankMaker) -> None:
    """What excludes each other is wrong usage; what a query in the bank has no use for is said; k is a number of rows."""
    bank = make_bank()
    key = bank.keys(np.array([5]))[0]
    for arguments, words in (
        (["--exact", "--index", "absent"], "not both"), (["--overwrite"], "--html"), (["-k", "0"], "'-k'"),
    ):  # fmt: skip
        assert words in run("search", str(bank.path), key, *arguments, code=2).stderr
    said = run("search", str(bank.path), key, "--weights", "absent", "--batch-size", "3").stderr
    assert "nothing had to be encoded: --weights, --batch-size changed nothing" in said
    assert run("search", str(bank.path), key).stderr == ""
    for k in (0, -3, 1.5):
        with pytest.raises(ConfigError, match="k must be at least 1"):
            search(bank, key, k=k)


def test_a_page_that_cannot_be_is_refused_before_anything_is_encoded(make_bank: BankMaker) -> None:
    """Name and place are looked at first: an encoder of another kind than this one would take minutes."""
    bank = make_bank()
    Path("notes.html").write_text("mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gmem_bank, "search", lambda *_, **__: pytest.fail("the search was begun"))
        assert "named .html" in run("search", str(bank.path), "x.png", "--html", "page.txt", code=1).stderr
        assert "notes.html" in run("search", str(bank.path), "x.png", "--html", "notes.html", code=1).stderr


def test_concepts_of_what_is_found_are_looked_up_and_not_walked(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every hit has the names of all concepts that it is in, and no concept is read as a whole."""
    bank = make_bank(rows=30)
    gmem_bank.concept_of_rows(bank.path, "odd", Selection(keys=tuple(bank.keys(np.arange(1, 30, 2)))))
    opened = gmem_bank.open(bank.path)
    wanted = {row: tuple(name for name in opened.names if row in opened.all_rows_of(name)) for row in range(30)}
    monkeypatch.setattr(gmem_bank.MemoryBank, "all_rows_of", lambda *_: pytest.fail("a whole concept was read"))
    hits = search(opened, bank.keys([4])[0], k=30)[0].hits
    assert {hit.row: hit.concepts for hit in hits} == wanted
    assert len({len(names) for names in wanted.values()}) == 2
