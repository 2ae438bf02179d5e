"""The experiments' own machinery: cells are computed once, sections are written from figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmem_bank
from tools import experiment_insertion, experiments
from tools.experiment_composition import METHODS, blend, packed, pairs, shares, snippets_of, unpacked
from tools.experiment_judging import RealImages, embedded
from tools.experiment_kit import Cells, Judge, write_section
from tools.experiment_speed import ratios


def test_a_cell_is_computed_once_for_its_settings(tmp_path: Path) -> None:
    """Other settings are another cell; a cell that failed is computed again."""
    calls = []

    def compute(work: Path) -> dict:
        calls.append(work)
        if len(calls) == 1:
            raise RuntimeError
        return {"figure": len(calls)}

    cells = Cells(tmp_path)
    with pytest.raises(RuntimeError):
        cells.get("a", {"steps": 1}, compute)
    assert cells.get("a", {"steps": 1}, compute)["figure"] == 2
    assert Cells(tmp_path).get("a", {"steps": 1}, compute)["figure"] == 2
    assert cells.get("a", {"steps": 2}, compute)["figure"] == 3


def test_a_section_replaces_itself_and_nothing_else(tmp_path: Path) -> None:
    """Written twice it is there once, in its place."""
    page = tmp_path / "RESULTS.md"
    for name, text in (("a", "first"), ("b", "second"), ("a", "third"), ("a", "third")):
        write_section(name, text, page)
    assert page.read_text().split("<!-- a -->")[1].split("<!-- end of a -->")[0].strip() == "third"
    assert page.read_text().count("second") == 1
    assert "first" not in page.read_text()
    assert page.read_text().index("third") < page.read_text().index("second")
    before = page.read_bytes()
    write_section("a", "third", page)
    assert page.read_bytes() == before
    assert b"<!-- end of a -->\n\n<!-- b -->" in before


def test_ratios_are_of_steps_to_the_baselines_best() -> None:
    """The best of 'classes' is 3, at 400 steps, which the memory has at 100; 'nothing' has 1, which it never reaches."""
    curves = {"memory": (3, 2.5, 2), "classes": (9, 5, 3), "nothing": (9, 5, 1)}
    rows = [
        {"model": name, "step": step, "frechet": value}
        for name, values in curves.items()
        for step, value in zip((100, 200, 400), values, strict=True)
    ]
    assert ratios(rows) == {"classes": 4.0, "nothing": None}


def test_shares_count_samples_with_both_parents_near() -> None:
    """Of four samples two have 0 and 6 near; the third and fourth have more of the 3 than of either parent."""
    near = np.array([["0", "6", "3"], ["6", "0", "0"], ["3", "3", "0"], ["3", "3", "3"]])
    assert shares(near, "0", "6") == {"both": 0.5, "elsewhere": 0.5}
    assert shares(near[:2, :2], "0", "6") == {"both": 1.0, "elsewhere": 0.0}


def test_every_class_is_paired_twice() -> None:
    """Ten classes, ten pairs, all around."""
    found = pairs([str(digit) for digit in range(10)], 3)
    assert found[:2] == [("0", "3"), ("1", "4")]
    assert found[-1] == ("9", "2")
    assert sorted(name for pair in found for name in pair) == sorted(2 * [str(digit) for digit in range(10)])
    with pytest.raises(SystemExit, match="give 1 to 9"):
        pairs([str(digit) for digit in range(10)], 10)


def test_a_blend_is_the_mean_of_pixels_without_overflow() -> None:
    """250 and 252 give 251, not what 8 bits would leave of their sum; pictures survive JSON."""
    mean = blend(np.full((2, 2, 3), 250, np.uint8), np.full((2, 2, 3), 252, np.uint8))
    assert mean.dtype == np.uint8
    assert (mean == 251).all()
    noise = np.random.default_rng(0).integers(0, 256, (5, 4, 3), np.uint8)
    assert (unpacked(json.loads(json.dumps(packed(noise)))) == noise).all()


def test_snippets_half_way_are_of_each_pair_of_rows(tmp_path: Path) -> None:
    """Linear ones are what `compose` makes of "a + b"; mixed dimensions come from one of the two; parents are rows as they are."""
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32))
    gmem_bank.build_precomputed(gmem_bank.read_array(tmp_path / "rows.npy"), tmp_path / "bank.safetensors")
    bank = gmem_bank.open(tmp_path / "bank.safetensors")
    keys = [bank.keys(np.arange(3)), bank.keys(np.arange(3, 6))]
    a, b = (snippets_of(bank, way, keys, 0) for way in ("first parent", "second parent"))
    np.testing.assert_array_equal(np.concatenate([a, b]), bank.snippets(np.arange(6)))
    composed = [gmem_bank.compose_snippet(bank, {one: 1.0, other: 1.0}) for one, other in zip(*keys, strict=True)]
    np.testing.assert_allclose(snippets_of(bank, "linear", keys, 0), composed, atol=1e-6)
    concatenated = np.concatenate([a[:, :3], b[:, 3:]], axis=1)
    concatenated /= np.linalg.norm(concatenated, axis=1, keepdims=True)
    np.testing.assert_allclose(snippets_of(bank, "concat", keys, 0), concatenated, atol=1e-6)
    for way in METHODS:
        np.testing.assert_allclose(np.linalg.norm(snippets_of(bank, way, keys, 0), axis=1), 1, atol=1e-6)


def test_real_images_vote_and_classify(tmp_path: Path) -> None:
    """Bars that stand and bars that lie: each image is nearest to itself, and a classifier knows copies from wrong folders."""
    rng = np.random.default_rng(0)
    for index in range(16):
        pixels = rng.integers(0, 60, (8, 8), np.uint8)
        name = ("lying", "standing")[index % 2]
        pixels[(slice(2, 5), slice(None))[:: 1 if name == "lying" else -1]] += 190
        for folder, label in (("real", name), ("right", name), ("wrong", "standing")):
            (tmp_path / folder / label).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / label / f"{index:02d}.png")
    real, judge = RealImages(Judge(), tmp_path / "real"), Judge().load()
    assert real.classified(tmp_path / "right") == 1.0
    assert real.classified(tmp_path / "wrong") == 0.5
    source = gmem_bank.open_images(tmp_path / "real")
    near = real.classes_near([source.read(place) for place in range(len(source))], 8)
    assert (near == embedded(judge, tmp_path / "real")[1][:, None]).all()


def test_the_classifier_has_columns_where_it_judged() -> None:
    """Figures from before there was one are still written; with it, both ratios are said."""
    names = ("seen", "not inserted", "projected", "basis grown")
    old = {"rows": [{"class": "0", **dict.fromkeys(names, 0.5)}], "share_of_seen": 1.0}
    assert "classifier" not in experiment_insertion.words(old)
    row = old["rows"][0] | {f"{name}: classifier": 0.25 for name in names}
    said = experiment_insertion.words({"rows": [row], "share_of_seen": 1.0, "share_of_seen_classified": 0.75})
    assert said.count("(classifier)") == 4
    assert said.endswith("1; by the classifier: 0.75.")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("speed", ["steps=[2,4]", "num=50"]),
        ("compression", ["steps=2", "num=50", "ranks=[8]", 'dtypes=["i8"]', "keep=[1.0,0.5]"]),
        ("insertion", ["steps=2", "num=50", 'classes=["9"]']),
        ("composition", ["steps=2", "num=3"]),
    ],
)
def test_an_experiment_runs_and_is_written_from_its_figures(name: str, settings: list[str], monkeypatch) -> None:
    """At a tiny size: table, plot and section; then again from the stored figures alone."""
    results = Path("results")
    monkeypatch.setattr(experiments, "FIGURES", results)
    monkeypatch.setattr(experiments, "write_section", lambda stem, text: write_section(stem, text, Path("RESULTS.md")))
    words = [
        "experiments",
        name,
        "--publish",
        "--variant",
        "tiny",
        *(word for pair in settings for word in ("--set", pair)),
    ]
    monkeypatch.setattr(sys, "argv", words)
    assert experiments.main() == 0
    found = json.loads((results / f"{name}-digits-tiny.json").read_text())
    assert found["figures"]["rows"]
    assert (results / f"{name}-digits-tiny.png").stat().st_size > 1000
    page = Path("RESULTS.md").read_text()
    Path("RESULTS.md").unlink()
    monkeypatch.setattr(sys, "argv", ["experiments", name, "--from-json"])
    assert experiments.main() == 0
    assert Path("RESULTS.md").read_text() == page
