"""A folder of odd and broken images becomes a bank: every file is a row with the right pixels, or is reported.

The folder is tests/data/odd, or the one that the variable GMEM_ODD_IMAGES names.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmem_bank
from gmem_bank.decoding import EXTENSIONS, FORMATS, read_image
from tests.conftest import DATA
from tests.gmem_bank.test_odd_images import TURNED
from tests.picture_oracle import read_png

ROOT = Path(os.environ.get("GMEM_ODD_IMAGES", DATA / "odd")).resolve()
NOT_PNG = "pngsuite/iphone/"
"""Apple's variant: the manifest's reader took its second, empty try for a success."""


def manifest() -> dict[str, dict[str, str]]:
    with (ROOT / "manifest.csv").open(newline="", encoding="utf-8") as stream:
        return {line["file"]: line for line in csv.DictReader(stream)}


def taken(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def readable(name: str, line: dict[str, str]) -> bool:
    """Whether the manifest says that the pixels can be had, in a format that is read here."""
    return line["rgb"] == "True" and line["fmt"] in FORMATS and not name.startswith(NOT_PNG)


def orientation(line: dict[str, str]) -> int:
    return int(line["orient"]) if line["orient"] in map(str, range(1, 9)) else 1


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[gmem_bank.Bank, dict[str, str]]:
    """The bank that the command builds of the whole folder by two workers, and what it reports: path → reason."""
    bank = tmp_path_factory.mktemp("odd") / "bank.safetensors"
    command = [
        sys.executable,
        "-m",
        "gmem_bank",
        "build",
        str(ROOT),
        "-e",
        "pixels",
        "--space",
        "raw",
        "--workers",
        "2",
    ]
    result = subprocess.run(
        [*command, "-q", "--json", "-o", str(bank)], capture_output=True, text=True, check=False, errors="replace"
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    report = json.loads(result.stdout)
    assert json.loads(bank.with_name(bank.name + ".report.json").read_text())["skipped"] == report["skipped"]
    reasons = {entry["path"]: entry["reason"] for entry in report["skipped"]}
    assert len(reasons) == len(report["skipped"])
    opened = gmem_bank.open(bank)
    assert report["num_rows"] == len(opened)
    return opened, reasons


def test_rows_and_reports_are_all_files(built) -> None:
    """Each file below the folder is one row or one line of the report, and none is both; every reason is a sentence of ours."""
    bank, reasons = built
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()}
    rows = bank.keys(bank.rows())
    assert len(rows) + len(reasons) == len(files)
    assert {*rows, *reasons} == files
    for path, reason in reasons.items():
        assert (
            reason.startswith(("the file is empty", "not a readable image (")) == taken(path) or "more than" in reason
        )
        assert "0x" not in reason
        assert str(ROOT) not in reason


def test_what_is_read_and_what_is_refused_is_what_the_manifest_says(built) -> None:
    """An independent reading of each file, recorded beside it, agrees on which have pixels."""
    bank, _ = built
    rows = set(bank.keys(bank.rows()))
    wanted = {name for name, line in manifest().items() if taken(name) and readable(name, line)}
    assert rows == wanted


def test_pixels_are_those_of_an_independent_reader(built) -> None:
    """Every PNG equals the reader of the tests, turned as its EXIF says; every other image has the size of the manifest."""
    bank, _ = built
    num_png = 0
    for name, line in manifest().items():
        if not (taken(name) and readable(name, line)):
            continue
        got = bank.read_image(int(bank.rows_for([name])[0]))
        told = 1 if line["fmt"] == "TIFF" else orientation(line)  # the manifest has the upright size of a TIFF
        turned = TURNED[told](np.zeros((int(line["h"]), int(line["w"]))))
        if not name.startswith("pillow/avif/"):  # which turn by boxes of their own, not by EXIF
            assert got.shape == (*turned.shape, 3), name
        if line["fmt"] == "PNG":
            wanted = TURNED[orientation(line)](read_png((ROOT / name).read_bytes())).astype(int)
            assert np.abs(got - wanted).max() <= 1, name
            num_png += 1
    assert num_png >= 90


def test_snippets_are_those_of_the_pixels(built) -> None:
    """A row's snippet is the formula of the encoder on a crop of that very file: no row was swapped by the workers."""
    bank, _ = built
    keys = bank.keys(bank.rows())
    for row in range(0, len(keys), 5):
        picture = Image.fromarray(read_image(ROOT / keys[row]))
        while min(picture.size) >= 32:
            picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
        scale = 16 / min(picture.size)
        width, height = max(16, round(picture.width * scale)), max(16, round(picture.height * scale))
        left, top = (width - 16) // 2, (height - 16) // 2
        resized = picture.resize((width, height), Image.Resampling.BICUBIC)
        luma = np.array(resized)[top : top + 16, left : left + 16] @ [0.299, 0.587, 0.114] / 255
        wanted = (luma - luma.mean()).ravel()
        np.testing.assert_allclose(bank.snippets(np.array([row]))[0], wanted, atol=1e-5, err_msg=keys[row])


def test_one_photograph_in_many_guises() -> None:
    """Another name, another extension, bytes after its end and each orientation show the same pixels; CMYK nearly so."""
    folder = ROOT / "made_here"
    photo = read_image(folder / "UPPER_CASE.JPG")
    for name in ("jpeg_named.png", "no_extension", "name with spaces é你.jpg", "trailing_junk.jpg"):
        np.testing.assert_array_equal(read_image(folder / name), photo, err_msg=name)
    upright = read_image(folder / "photo_exif_orientation_1.jpg")
    for number, turn in TURNED.items():
        np.testing.assert_array_equal(read_image(folder / f"photo_exif_orientation_{number}.jpg"), turn(upright))
    for name, tolerance in (
        ("photo_cmyk.jpg", 6),
        ("photo.webp", 12),
        ("photo.avif", 12),
        ("photo_progressive.jpg", 6),
    ):
        other = read_image(folder / name).astype(float)
        small = np.array(Image.fromarray(photo).resize(other.shape[1::-1], Image.Resampling.BOX))
        assert np.abs(other - small).mean() < tolerance, name
