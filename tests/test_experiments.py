"""The experiments' own machinery: cells are computed once, sections are written from figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tools import experiments
from tools.experiment_kit import Cells, write_section
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


def test_ratios_are_of_steps_to_the_baselines_best() -> None:
    """The best of 'classes' is 3, at 400 steps, which the memory has at 100; 'nothing' has 1, which it never reaches."""
    curves = {"memory": (3, 2.5, 2), "classes": (9, 5, 3), "nothing": (9, 5, 1)}
    rows = [
        {"model": name, "step": step, "frechet": value}
        for name, values in curves.items()
        for step, value in zip((100, 200, 400), values, strict=True)
    ]
    assert ratios(rows) == {"classes": 4.0, "nothing": None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("speed", ["steps=[2,4]", "num=50"]),
        ("compression", ["steps=2", "num=50", "ranks=[8]", 'dtypes=["i8"]', "keep=[1.0,0.5]"]),
        ("insertion", ["steps=2", "num=50"]),
    ],
)
def test_an_experiment_runs_and_is_written_from_its_figures(name: str, settings: list[str], monkeypatch) -> None:
    """At a tiny size: table, plot and section; then again from the stored figures alone."""
    results = Path("results")
    monkeypatch.setattr(experiments, "FIGURES", results)
    monkeypatch.setattr(experiments, "write_section", lambda stem, text: write_section(stem, text, Path("RESULTS.md")))
    words = ["experiments", name, "--publish", *(word for pair in settings for word in ("--set", pair))]
    monkeypatch.setattr(sys, "argv", words)
    assert experiments.main() == 0
    found = json.loads((results / f"{name}-digits.json").read_text())
    assert found["figures"]["rows"]
    assert (results / f"{name}-digits.png").stat().st_size > 1000
    page = Path("RESULTS.md").read_text()
    Path("RESULTS.md").unlink()
    monkeypatch.setattr(sys, "argv", ["experiments", name, "--from-json"])
    assert experiments.main() == 0
    assert Path("RESULTS.md").read_text() == page
