"""Plots: the figures against brute force, the page against hostile names, the picture against emptiness."""

from __future__ import annotations

import base64
import io
import json
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmem_bank import bank as bank_module
from gmem_bank import builder, kinds, plot_measures, plot_page, plotting
from gmem_bank.bank import MemoryBank
from gmem_bank.encoders import load_encoder
from gmem_bank.errors import ConfigError, MissingDependencyError, WriteError
from gmem_bank.storage import Payload, write
from tests.conftest import BankMaker, synthetic_bank

HOSTILE = [
    "</script><script>alert(1)</script>/a.png",
    "quo\"te's & <b>bold</b>/b.png",
    "feed/line\nfeed\u2028c.png",
    "emoji 🦆/d.png",
    "$x_1$/e.png",
    "_hidden/f.png",
    "<!--/g.png",
    "x" * 300 + "/h.png",
]


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and the text of each script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] == "script" and self.cdata_elem == "script":
            self.scripts[-1] += data
        else:
            self.text += data

    @property
    def data(self) -> dict:
        return json.loads(self.scripts[0])


def with_singular_values(bank: MemoryBank, values: list[float], path: Path) -> MemoryBank:
    """The same factored bank with recorded singular values."""
    entry = {"singular_values": Payload.of(np.array(values, np.float32))}
    write(path, bank.header, {**bank.stored.payloads(), **entry})
    return kinds.open(path)


@pytest.mark.parametrize(("kind", "dtype"), [("dense", "f32"), ("dense", "f16"), ("factored", "i8"), ("sparse", "f32")])
@pytest.mark.parametrize("rows", [5, 90])
def test_spectrum_is_the_svd_of_the_centred_active_rows(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, kind: str, dtype: str, rows: int
) -> None:
    """Of more rows than dimensions and of fewer; blocks do not show; energy adds up to one."""
    monkeypatch.setattr(bank_module, "BLOCK_BYTES", 4 * 8 * 11)
    active = np.random.default_rng(1).random(rows) > 0.2
    snippets = np.random.default_rng(2).standard_normal((rows, 8)) * np.geomspace(1, 0.01, 8)
    bank = make_bank(snippets=(snippets + 3).astype(np.float32), kind=kind, dtype=dtype, active=active, space="raw")
    found = plot_measures.spectrum(bank)
    seen = bank.snippets(bank.rows()).astype(np.float64)
    expected = np.linalg.svd(seen - seen.mean(axis=0), compute_uv=False)
    assert found.values.shape == expected.shape == (min(8, active.sum()),)
    np.testing.assert_allclose(found.values, expected, rtol=1e-4, atol=1e-4 * expected[0])
    np.testing.assert_allclose(found.energy, np.cumsum(expected**2) / (expected**2).sum(), atol=1e-6)
    assert not found.stored


def test_a_large_mean_does_not_drown_a_planted_spectrum(make_bank: BankMaker) -> None:
    """Float32 products of unshifted rows would lose the small directions."""
    rng = np.random.default_rng(3)
    left = np.linalg.qr(np.column_stack([np.ones(400), rng.standard_normal((400, 5))]))[0][:, 1:]
    right = np.linalg.qr(rng.standard_normal((16, 5)))[0]
    planted = np.array([10, 5, 2, 1, 0.5])
    bank = make_bank(snippets=((left * planted) @ right.T + 50).astype(np.float32), space="raw")
    np.testing.assert_allclose(plot_measures.spectrum(bank).values[:5], planted, rtol=1e-3)


def test_recorded_singular_values_are_taken_as_they_are(make_bank: BankMaker, tmp_path: Path) -> None:
    """A factored bank's own, in order of size even after its basis has grown."""
    bank = with_singular_values(make_bank(kind="factored", rank=4), [3, 2, 0.5, 1], tmp_path / "stored.safetensors")
    found = plot_measures.spectrum(bank)
    assert found.stored
    assert found.values.tolist() == [3, 2, 1, 0.5]
    np.testing.assert_allclose(found.energy, np.array([9, 13, 14, 14.25]) / 14.25)
    assert found.ranks() == {"rank_90": 2, "rank_95": 3, "rank_99": 4}
    assert "As the bank recorded them" in found.describe()


def test_ranks_are_the_fewest_components(make_bank: BankMaker) -> None:
    """Counted by hand, on the edge too; equal rows need none."""
    values = np.sqrt(np.array([90.0, 5, 4, 1]))
    found = plot_measures.Spectrum(values=values, energy=np.cumsum(values**2) / 100, stored=False)
    assert found.ranks() == {"rank_90": 1, "rank_95": 2, "rank_99": 3}
    for rows in (1, 3, 30):
        equal = make_bank(f"{rows}.safetensors", snippets=np.full((rows, 8), 0.3, np.float32), space="raw")
        found = plot_measures.spectrum(equal)
        assert not found.values.any()
        assert found.ranks() == {"rank_90": 0, "rank_95": 0, "rank_99": 0}
        assert found.describe() == "No spread: all rows are equal."


def test_enormous_and_tiny_values_do_not_break_the_sums(make_bank: BankMaker) -> None:
    """Squares that float32 cannot hold."""
    snippets = np.random.default_rng(4).standard_normal((40, 8)).astype(np.float32)
    expected = plot_measures.spectrum(make_bank("1.safetensors", snippets=snippets, space="raw"))
    for scale in (1e25, 1e-25):
        scaled = make_bank(f"{scale}.safetensors", snippets=snippets * np.float32(scale), space="raw")
        np.testing.assert_allclose(plot_measures.spectrum(scaled).values, expected.values * scale, rtol=1e-4)
        assert np.isfinite(plot_measures.project(scaled).coordinates).all()


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_neighbour_distances_equal_brute_force(make_bank: BankMaker, kind: str) -> None:
    """The row itself does not count, its doubles do; masked rows do not."""
    snippets = np.random.default_rng(5).standard_normal((60, 8)).astype(np.float32)
    snippets[[20, 41, 42, 43]] = snippets[7]
    active = np.random.default_rng(6).random(60) > 0.3
    bank = make_bank(snippets=snippets, kind=kind, rank=6, active=active, space="raw")
    seen = bank.snippets(bank.rows()).astype(np.float64)
    unit = seen / np.linalg.norm(seen, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    found = plot_measures.neighbour_distances(bank)
    np.testing.assert_allclose(found.distances, 1 - cosines.max(axis=1), atol=2e-6)
    assert (found.num_compared, found.sampled) == (active.sum(), False)
    assert found.quantiles()["median"] == pytest.approx(float(np.median(1 - cosines.max(axis=1))), abs=2e-6)


def test_of_a_large_bank_a_sample_is_compared_and_said_so(make_bank: BankMaker) -> None:
    """The probes come from the sample; the seed decides it; distances in a sample are no smaller."""
    bank = make_bank(rows=200)
    whole = plot_measures.neighbour_distances(bank)
    found = plot_measures.neighbour_distances(bank, num_probes=30, sample=50, seed=1)
    assert (len(found.distances), found.num_compared, found.sampled) == (30, 50, True)
    assert "a sample" in found.describe() and "a sample" not in whole.describe()
    assert np.median(found.distances) > np.median(whole.distances)
    again = plot_measures.neighbour_distances(bank, num_probes=30, sample=50, seed=1)
    other = plot_measures.neighbour_distances(bank, num_probes=30, sample=50, seed=2)
    assert np.array_equal(found.distances, again.distances)
    assert not np.array_equal(found.distances, other.distances)


def test_pca_is_the_projection_on_the_first_two_singular_vectors(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to sign, whatever the blocks; of active rows only."""
    monkeypatch.setattr(bank_module, "BLOCK_BYTES", 4 * 8 * 11)
    snippets = np.random.default_rng(7).standard_normal((70, 8)) * np.array([5, 3, 1, 1, 1, 1, 1, 1]) + 2
    active = np.random.default_rng(8).random(70) > 0.2
    bank = make_bank(snippets=snippets.astype(np.float32), space="raw", active=active)
    found = plot_measures.project(bank)
    seen = snippets[active] - snippets[active].mean(axis=0)
    expected = seen @ np.linalg.svd(seen)[2][:2].T
    signs = np.sign((found.coordinates * expected).sum(axis=0))
    np.testing.assert_allclose(found.coordinates, expected * signs, atol=1e-4)
    assert found.rows.tolist() == np.flatnonzero(active).tolist()
    assert (found.method, found.num_active) == ("pca", active.sum())


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_a_map_is_the_same_for_the_same_seed(make_bank: BankMaker, method: str) -> None:
    """The sample too, which is stated."""
    bank = make_bank(rows=60)
    first, again, other = (plot_measures.project(bank, method=method, num_rows=40, seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.rows, again.rows) and np.array_equal(first.coordinates, again.coordinates)
    assert not np.array_equal(first.rows, other.rows)
    assert len(first.rows) == 40 and (np.diff(first.rows) > 0).all()
    assert first.describe().startswith("40 of 60 active rows, drawn at random")
    assert plot_measures.project(bank, method=method).describe().startswith("All active rows")


@pytest.mark.parametrize("space", ["unit", "raw"])
def test_tsne_keeps_planted_clusters_together(make_bank: BankMaker, space: str) -> None:
    """Each row's nearest neighbour on the map is of its own cluster."""
    rng = np.random.default_rng(9)
    cluster = np.arange(90) % 3
    snippets = (np.eye(3, 8)[cluster] * 5 + rng.standard_normal((90, 8)) * 0.3).astype(np.float32)
    found = plot_measures.project(make_bank(snippets=snippets, space=space), method="tsne")
    assert found.method == "tsne"
    apart = np.linalg.norm(found.coordinates[:, None] - found.coordinates, axis=2)
    np.fill_diagonal(apart, np.inf)
    assert np.array_equal(cluster[apart.argmin(axis=1)], cluster)


@pytest.mark.parametrize("method", ["pca", "tsne"])
@pytest.mark.parametrize("dim", [1, 8])
def test_few_rows_and_equal_rows_have_a_map(make_bank: BankMaker, method: str, dim: int) -> None:
    """Finite coordinates for 1, 2, 3, 4 and 6 rows, and for rows that are all equal."""
    for rows in (1, 2, 3, 4, 6):
        for equal in (False, True):
            snippets = np.random.default_rng(rows).standard_normal((rows, dim)).astype(np.float32)
            snippets = np.repeat(snippets[:1], rows, axis=0) if equal else snippets
            bank = make_bank(f"{rows}{equal}.safetensors", snippets=snippets, space="raw")
            found = plot_measures.project(bank, method=method)
            assert found.coordinates.shape == (rows, 2)
            assert np.isfinite(found.coordinates).all()
            assert found.method == (method if rows >= 4 else "pca")


def test_thumbnail_places_are_spread_out() -> None:
    """Farthest first; never nearer than the gap; each of equal points once; all where they are few."""
    line = np.column_stack([np.arange(11.0), np.zeros(11)]).astype(np.float32)
    assert sorted(plot_page.spread(line, 3)) == [0, 5, 10]
    assert plot_page.spread(line, 11) == list(range(11))
    assert sorted(plot_page.spread(line, 20, 0.25)) == [0, 5, 10]
    assert plot_page.spread(np.zeros((4, 2), np.float32), 3, 0.1) == [0]
    assert len(set(plot_page.spread(np.zeros((5, 2), np.float32), 3))) == 3
    assert plot_page.spread(np.zeros((0, 2), np.float32), 3, 0.1) == []


def test_the_page_of_photos_holds_everything(photos: Path) -> None:
    """Keys, concepts and coordinates in order, and for each row its own picture, 64 pixels at most; nothing from outside."""
    builder.build(photos, load_encoder("hog"), "bank.safetensors")
    bank = kinds.open("bank.safetensors")
    told: list[tuple[int, int]] = []
    report = plotting.plot(bank, "plot.html", progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (24, 24)
    page = Page(Path("plot.html"))
    shown = page.data["map"]
    assert shown["keys"] == bank.keys(bank.rows())
    assert shown["concepts"] == list(bank.names)
    assert shown["members"] == [[row // 8] for row in range(24)]
    np.testing.assert_allclose(
        np.column_stack([shown["x"], shown["y"]]), plot_measures.project(bank).coordinates, rtol=1e-5, atol=1e-6
    )
    assert sorted(map(int, shown["thumbnails"])) == list(range(24))
    for row, data in shown["thumbnails"].items():
        thumbnail = Image.open(io.BytesIO(base64.b64decode(data)))
        original = Image.fromarray(bank.read_image(int(row)))
        assert thumbnail.format == "JPEG" and max(thumbnail.size) == 64
        difference = np.asarray(original.resize(thumbnail.size), np.float64) - np.asarray(thumbnail, np.float64)
        assert np.abs(difference).mean() < 12
    assert report.num_thumbnails == 24 and report.num_missing_images == 0
    assert "24 of 24 images shown." in page.text
    addresses = [
        value for _, attributes in page.elements for name, value in attributes.items() if name in ("src", "href")
    ]
    assert (
        not addresses
        and "url(" not in page.text
        and "http" not in Path("plot.html").read_text().replace("http-equiv", "")
    )


def test_the_charts_of_the_page_hold_the_figures(make_bank: BankMaker) -> None:
    """Curves and bars are the spectrum and the distances."""
    bank = make_bank(rows=50)
    report = plotting.plot(bank, "plot.html", what=("spectrum", "neighbours"))
    data = Page(Path("plot.html")).data
    assert "map" not in data
    found, near = plot_measures.spectrum(bank), plot_measures.neighbour_distances(bank)
    energy, relative = (np.array(points) for _, _, points in data["spectrum"]["curves"])
    np.testing.assert_allclose(energy[:, 1], found.energy, atol=1e-6)
    np.testing.assert_allclose(relative[:, 1], found.values / found.values[0], atol=1e-6)
    np.testing.assert_allclose(energy[:, 0], np.linspace(0, 1, 8), atol=1e-6)
    bars = np.array(data["neighbours"]["bars"])
    assert round(bars.sum() * int(data["neighbours"]["y"][1][1])) == 50
    assert data["neighbours"]["curves"][0][2][0][0] == pytest.approx(np.median(near.distances) / near.distances.max())
    assert report.spectrum == {"num_values": 8, "stored": False, **found.ranks()}
    assert report.neighbours == {"num_probes": 50, "num_compared": 50, "sampled": False, **near.quantiles()}
    assert (report.num_shown, report.method) == (0, None)
    json.dumps(report.to_json(), allow_nan=False)


def test_long_curves_are_thinned_but_keep_their_ends(make_bank: BankMaker) -> None:
    """400 points at most."""
    bank = make_bank(rows=700, dim=600)
    plotting.plot(bank, "plot.html", what="spectrum")
    chart = Page(Path("plot.html")).data["spectrum"]
    points = chart["curves"][0][2]
    assert len(points) == 400 and points[0][0] == 0 and points[-1] == [1, 1]
    assert [label for _, label in chart["x"]] == ["1", "150", "300", "450", "600"]


@pytest.mark.parametrize("suffix", [".html", ".png"])
def test_names_cannot_break_out(tmp_path: Path, suffix: str) -> None:
    """Of keys, concepts and the file itself: read back exactly, and no element comes of them."""
    plain = synthetic_bank(tmp_path / "plain.safetensors", rows=len(HOSTILE))
    hostile = synthetic_bank(tmp_path / "<img src=x onerror=alert(1)>.safetensors", keys=HOSTILE, rows=len(HOSTILE))
    report = plotting.plot(hostile, tmp_path / f"hostile{suffix}")
    assert report.num_missing_images == len(HOSTILE)
    if suffix == ".png":
        assert np.asarray(Image.open(tmp_path / "hostile.png")).shape[1] > 1000
        return
    plotting.plot(plain, tmp_path / "plain.html")
    page, calm = Page(tmp_path / "hostile.html"), Page(tmp_path / "plain.html")
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in calm.elements]
    assert page.scripts[1:] == calm.scripts[1:] and len(page.scripts) == 2
    assert page.data["map"]["keys"] == HOSTILE
    assert page.data["map"]["concepts"] == list(hostile.names)
    assert "<img src=x onerror=alert(1)>.safetensors" in page.text
    assert f"0 of {len(HOSTILE)} images shown, {len(HOSTILE)} missing" in page.text


def test_a_picture_shows_each_panel(photos: Path) -> None:
    """Not blank, with colours of its concepts and the photos themselves; the same bytes again; pyplot stays out."""
    builder.build(photos, load_encoder("hog"), "bank.safetensors")
    bank = kinds.open("bank.safetensors")
    report = plotting.plot(bank, "plot.png")
    image = Image.open("plot.png")
    pixels = np.asarray(image.convert("RGB"))
    assert image.format == "PNG" and image.size[0] > image.size[1] > 400
    for third in np.array_split(pixels, 3, axis=1):
        assert (third != 255).any(axis=2).mean() > 0.02
    for colour in plot_page.COLOURS[:3]:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == wanted).all(axis=2).sum() > 20
    assert 10 <= report.num_thumbnails <= 24
    plotting.plot(bank, "bare.png", thumbnails=False)
    distinct = [
        len(np.unique(np.asarray(Image.open(name).convert("RGB")).reshape(-1, 3), axis=0))
        for name in ("plot.png", "bare.png")
    ]
    assert distinct[0] > 3 * distinct[1]
    first = Path("plot.png").read_bytes()
    plotting.plot(bank, "plot.png")
    assert Path("plot.png").read_bytes() == first
    assert "matplotlib.pyplot" not in sys.modules


def test_missing_and_broken_images_are_counted_not_fatal(photos: Path) -> None:
    """One absent, one that is no image any more; the rest have their thumbnail."""
    builder.build(photos, load_encoder("hog"), "bank.safetensors")
    bank = kinds.open("bank.safetensors")
    gone, broken = bank.keys(np.array([2, 9]))
    (photos / gone).unlink()
    (photos / broken).write_bytes(b"not an image")
    report = plotting.plot(bank, "plot.html")
    assert (report.num_thumbnails, report.num_missing_images) == (22, 2)
    page = Page(Path("plot.html"))
    assert set(page.data["map"]["thumbnails"]) == {str(row) for row in range(24)} - {"2", "9"}
    assert "22 of 24 images shown, 2 missing or unreadable." in page.text
    shutil.rmtree(photos)
    assert plotting.plot(bank, "plot.html").num_missing_images == 24
    bare = plotting.plot(bank, "plot.html", thumbnails=False)
    assert (bare.num_thumbnails, bare.num_missing_images) == (0, 0)


def test_thumbnails_have_a_limit(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page says how many of the images it shows."""
    builder.build(photos, load_encoder("hog"), "bank.safetensors")
    monkeypatch.setitem(plotting.THUMBNAILS, ".html", (5, 0.0))
    report = plotting.plot(kinds.open("bank.safetensors"), "plot.html")
    assert (report.num_thumbnails, report.num_missing_images) == (5, 0)
    assert "5 of 24 images shown." in Page(Path("plot.html")).text


def test_rows_in_several_concepts_and_in_none(tmp_path: Path, photos: Path) -> None:
    """The first concept in file order gives the colour; concepts without a row on the map are left out."""
    keys = ["loose.png", "a/1.png", "b/2.png", "c/3.png"]
    bank = synthetic_bank(tmp_path / "bank.safetensors", keys=keys, rows=4, active=np.array([1, 1, 1, 0]))
    rows = bank.all_rows_of
    entries = {
        "concepts.rows": Payload.of(np.array([1, 2, 2, 3])),
        "concepts.offsets": Payload.of(np.array([0, 2, 3, 4])),
    }
    write(tmp_path / "both.safetensors", bank.header, {**bank.stored.payloads(), **entries})
    both = kinds.open(tmp_path / "both.safetensors")
    assert rows("a").tolist() == [1] and both.all_rows_of("a").tolist() == [1, 2]
    plotting.plot(both, "plot.html")
    shown = Page(Path("plot.html")).data["map"]
    assert (shown["concepts"], shown["members"]) == (["a", "b"], [[], [0], [0, 1]])
    plotting.plot(both, "plot.png")


def test_more_concepts_than_colours(tmp_path: Path) -> None:
    """Colours begin again; the picture's legend stops at twenty and says so."""
    keys = [f"{row:02d}/x.png" for row in range(25)]
    bank = synthetic_bank(tmp_path / "bank.safetensors", keys=keys, rows=25)
    plotting.plot(bank, "plot.png")
    plotting.plot(bank, "plot.html")
    data = Page(Path("plot.html")).data
    assert [members[0] for members in data["map"]["members"]] == list(range(25))
    assert len(data["colours"]) == len(set(data["colours"])) == 20


@pytest.mark.parametrize("suffix", [".html", ".png"])
@pytest.mark.parametrize(
    "options",
    [
        {"rows": 1},
        {"rows": 2},
        {"rows": 12, "kind": "factored", "active": np.arange(12) % 2 == 0},
        {"rows": 12, "kind": "sparse", "dtype": "i8", "parts": (5, 7)},
        {"rows": 12, "dim": 1, "space": "raw", "rank": 1},
    ],
)
def test_every_kind_of_bank_can_be_drawn(make_bank: BankMaker, suffix: str, options: dict) -> None:
    """One row, few rows, factored, masked, sparse, one dimension."""
    bank = make_bank(**options)
    report = plotting.plot(bank, f"plot{suffix}", method="tsne", thumbnails=False)
    assert report.num_shown == report.num_active == len(bank.rows())
    assert Path(report.output).stat().st_size > 5000
    if suffix == ".html":
        shown = Page(Path("plot.html"))
        assert shown.data["map"]["keys"] == bank.keys(bank.rows())
        assert ("One active row" in shown.text) == (len(bank.rows()) == 1)
        canvases = [attributes.get("data-chart") for tag, attributes in shown.elements if tag == "canvas"]
        assert canvases == ([None] if len(bank.rows()) == 1 else ["spectrum", None, "neighbours"])


def test_a_page_is_the_same_bytes_again_and_needs_no_matplotlib(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Panels stand in the order asked for."""
    bank = make_bank(rows=30)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("one.html", "two.HTML"):
        plotting.plot(bank, name, what=("map", "spectrum", "map"), method="tsne", num_rows=20, seed=7)
    assert Path("one.html").read_bytes() == Path("two.HTML").read_bytes()
    classes = [attributes.get("class") for tag, attributes in Page(Path("one.html")).elements if tag == "figure"]
    assert classes == ["map", "spectrum"]
    with pytest.raises(MissingDependencyError, match=r"pip install matplotlib \(the extra gmem\[plot\]\)") as caught:
        plotting.plot(bank, "one.png")
    assert caught.value.extra == "plot"
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(MissingDependencyError, match="faiss-cpu"):
        plotting.plot(bank, "one.html")
    assert sorted(path.name for path in Path().iterdir()) == ["bank.safetensors", "one.html", "two.HTML"]


def test_bad_requests_are_clear(make_bank: BankMaker) -> None:
    """Suffix, panels, method, numbers, a bank with every row masked, a folder that is a file; nothing is written."""
    bank = make_bank(rows=6)
    for output in ("plot.svg", "plot", "bank.safetensors"):
        with pytest.raises(ConfigError, match=r"\.png or a \.html"):
            plotting.plot(bank, output)
    for what in ((), ("map", "heat"), "heat"):
        with pytest.raises(ConfigError, match="some of spectrum, map, neighbours"):
            plotting.plot(bank, "plot.html", what=what)
    for options in ({"method": "umap"}, {"num_rows": 0}, {"seed": -1}):
        with pytest.raises(ConfigError):
            plot_measures.project(bank, **options)
    for options in ({"num_probes": 0}, {"sample": 1}, {"seed": -1}):
        with pytest.raises(ConfigError, match="num_probes must be 1 or more"):
            plot_measures.neighbour_distances(bank, **options)
    masked = make_bank("masked.safetensors", rows=3, active=np.zeros(3))
    for panel in plotting.PANELS:
        with pytest.raises(ConfigError, match=r"every row of .*masked\.safetensors is masked"):
            plotting.plot(masked, "plot.html", what=[panel])
    with pytest.raises(WriteError):
        plotting.plot(bank, "bank.safetensors/plot.html")
    assert sorted(path.name for path in Path().iterdir()) == ["bank.safetensors", "masked.safetensors"]
