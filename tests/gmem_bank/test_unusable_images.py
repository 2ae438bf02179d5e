"""What is said of images that give no row: sound but of one colour, absent, without a name that tells, or noisy on stderr."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gmem_bank
from gmem_bank.errors import SourceError
from gmem_bank.sources import list_file, list_folder


@pytest.mark.parametrize("name", ["hog", "pixels"])
def test_a_black_image_is_sound_and_kept_in_raw_space(photos: Path, name: str) -> None:
    """It has no direction; the reason says that the picture is not at fault, and which bank holds it."""
    Image.new("RGB", (64, 48)).save(photos / "black.png")
    report = gmem_bank.build(photos, gmem_bank.load_encoder(name), "unit.safetensors")
    [reason] = [entry["reason"] for entry in report.skipped if entry["path"] == "black.png"]
    assert reason.startswith("the image is sound, but its snippet is all zeros")
    assert reason.endswith("a bank built with --space raw keeps it")
    gmem_bank.build(photos, gmem_bank.load_encoder(name, space="raw"), "raw.safetensors")
    raw = gmem_bank.open("raw.safetensors")
    [row] = raw.rows_for(["black.png"])
    np.testing.assert_array_equal(raw.snippets(np.array([row])), 0)
    assert len(raw) == report.num_rows + 1


def test_files_that_are_absent_or_have_no_extension_are_told_apart(photos: Path) -> None:
    """A line of a list that names nothing, a link to nothing, and a sound JPEG that is called nothing."""
    good = next(photos.rglob("*.jpg"))
    (photos / "dead.jpg").symlink_to("nowhere")
    (photos / "hat" / "IMG").write_bytes(good.read_bytes())
    (photos / "list.txt").write_text(f"missing.jpg\ndead.jpg\nhat/IMG\n{good}\n")
    reasons = {entry.path: entry.reason for entry in list_file(photos / "list.txt").ignored}
    assert reasons["missing.jpg"] == "no such file"
    assert reasons["dead.jpg"] == "a link to nothing"
    assert reasons["hat/IMG"] == "it has no extension: an image needs one, such as .jpg"
    assert {entry.path for entry in list_folder(photos).ignored} == {"dead.jpg", "hat/IMG", "list.txt"}


def test_what_pillow_logs_does_not_reach_the_terminal() -> None:
    """A TIFF that claims 65,535 samples a pixel: one reason in the report, nothing without a file's name on stderr."""
    Path("images").mkdir()
    Image.new("RGB", (8, 8), "red").save("images/good.png")
    Image.new("RGB", (8, 8)).save("images/odd.tif")
    data = Path("images/odd.tif").read_bytes()
    at = data.index(struct.pack("<HHIH", 277, 3, 1, 3)) + 8  # SamplesPerPixel, one SHORT, which is 3
    Path("images/odd.tif").write_bytes(data[:at] + b"\xff\xff" + data[at + 2 :])
    command = [sys.executable, "-m", "gmem_bank", "build", "images", "-e", "random-projection", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)  # here logging has a handler of pytest's
    [line] = done.stderr.splitlines()
    assert line.startswith("  skipped odd.tif: not a readable image")


@pytest.mark.parametrize("make", ["npy", "npz", "pickle"])
def test_arrays_of_python_objects_are_called_that(make: str) -> None:
    """As a source of images and of snippets; NumPy's own words do not say why they are refused."""
    objects = np.array([{}, {}], dtype=object)
    path = Path(f"x.{'npz' if make == 'npz' else 'npy'}")
    if make == "npz":
        np.savez(path, images=objects)
    else:
        np.save(path, objects, allow_pickle=True)
    if make == "pickle":
        path.write_bytes(objects.dumps())
    for read in (
        lambda: gmem_bank.build(path, gmem_bank.load_encoder("pixels"), "b.safetensors"),
        lambda: gmem_bank.read_array(path),
    ):
        with pytest.raises(SourceError, match="it holds pickled Python objects, which can run code and are never read"):
            read()
