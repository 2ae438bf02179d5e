"""The quick start does what the README says, by its own figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tools import quickstart, quickstart_figures

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_digit_is_inserted_without_training_and_drawn(tmp_path: Path) -> None:
    """Seen digits at least 0.95, the inserted one at least 0.5 and 0.2 above before; report and figures are there."""
    out = tmp_path / "quick"
    subprocess.run(
        [sys.executable, "-m", "tools.quickstart", "--out", str(out)], cwd=ROOT, check=True, capture_output=True
    )
    figures = json.loads((out / "report.json").read_text())
    assert figures["seen_accuracy"] >= 0.95
    assert figures["inserted_accuracy"] >= 0.5
    assert figures["inserted_accuracy"] >= figures["before_accuracy"] + 0.2
    assert figures["classifier_accuracy"] >= 0.98
    assert figures["linear_accuracy"] > 0
    assert figures["seconds_total"] > 0
    page = (out / "report.html").read_text()
    assert page.count("<img src='data:image/png;base64,") == 7


def test_a_report_over_several_digits_gives_means_and_each(tmp_path: Path) -> None:
    """The same names as for one digit, averaged; nothing is lost."""
    from tools.quickstart_report import CAPTIONS, ROWS, write_report

    pictures = {name: np.zeros((3, 8, 8), np.uint8) for name in CAPTIONS}
    results = [
        {"figures": {**dict.fromkeys(ROWS, value), "held_out": digit}, "pictures": pictures, "commands": ["$ x"]}
        for digit, value in ((9, 0.5), (4, 1.0))
    ]
    write_report(tmp_path, results)
    figures = json.loads((tmp_path / "report.json").read_text())
    assert figures["inserted_accuracy"] == 0.75
    assert figures["seconds_total"] == 1.5
    assert [run["held_out"] for run in figures["runs"]] == [9, 4]
    write_report(tmp_path, results[:1])
    assert json.loads((tmp_path / "report.json").read_text()) == results[0]["figures"]


def test_digits_are_written_as_they_are_and_the_judge_is_good(tmp_path: Path) -> None:
    """1,797 real digits, the held-out class apart; the judge knows real ones and does not see its test part."""
    images, labels = quickstart.write_digits(tmp_path, 9)
    assert len(list((tmp_path / "digits").rglob("*.png"))) + len(list((tmp_path / "new" / "9").iterdir())) == 1797
    assert not (tmp_path / "digits" / "9").exists()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "digits" / "0" / "0000.png")), images[0])
    judge = quickstart_figures.Judge(images, labels)
    assert judge.accuracy >= 0.98
    assert judge.share(images[labels == 3], 3) > 0.98
    assert judge.share(images[labels == 3], 9) < 0.02
    assert sum(judge.counts(images)) == 1797


def test_a_folder_of_somebody_elses_is_never_emptied(tmp_path: Path) -> None:
    """Only a folder that the quick start made is cleared."""
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("precious")
    with pytest.raises(SystemExit, match="not made by the quick start"):
        quickstart.Game(9, tmp_path / "thesis", 0)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "precious"
    quickstart.Game(9, tmp_path / "ours", 0)
    quickstart.Game(9, tmp_path / "ours", 0)


def test_spread_is_zero_for_equal_samples_and_a_half_for_black_and_white() -> None:
    """Standard deviation over the samples of a snippet, averaged over pixels."""
    same = np.full((6, 8, 8), 77, np.uint8)
    assert quickstart_figures.pixel_spread(same, 3) == 0
    same[1::2] = 255
    same[::2] = 0
    assert quickstart_figures.pixel_spread(same, 2) == pytest.approx(0.5)
