"""Images in arrays of pixels: every image as it is in the array, classes from labels, nothing unpacked that need not be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank import pixel_arrays
from gmem_bank.cli import main
from gmem_bank.columns import Columns
from gmem_bank.contents import list_source
from gmem_bank.errors import SourceError

PIXELS = gmem_bank.load_encoder("pixels", parameters={"size": 8})


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 9, 11, 3), dtype=np.uint8)


@pytest.mark.parametrize("form", ["npy", "npz", "compressed", "fortran"])
def test_every_image_is_as_it_is_in_the_array(images: np.ndarray, form: str) -> None:
    """Read by row in any order, in place or unpacked, in this process and in workers."""
    name = "x.npy" if form in ("npy", "fortran") else "x.npz"
    if form == "npy":
        np.save(name, images)
    elif form == "fortran":
        np.save(name, np.asfortranarray(images))
    else:
        (np.savez if form == "npz" else np.savez_compressed)(name, images=images, other=np.zeros(3))
    report = gmem_bank.build(name, PIXELS, "x.safetensors", num_workers=2)
    bank = gmem_bank.open(report.bank)
    assert bank.keys(bank.rows()) == [f"x/{row:02d}" for row in range(12)]
    assert report.concepts == {}
    for row in (7, 0, 11):
        np.testing.assert_array_equal(bank.read_image(row), images[row])
    expected = PIXELS.encode(np.stack([gmem_bank.center_crop(image, 8) for image in images]))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(bank.snippets(bank.rows()), expected, atol=1e-6)
    assert isinstance(pixel_arrays.open_pixels(Path(name), bank.sources[0].columns["image"]), np.memmap)


def test_grey_and_alpha(images: np.ndarray) -> None:
    """(N, H, W) and one channel are grey; alpha is laid over white."""
    grey = images[..., 0]
    np.save("g.npy", grey)
    np.save("one.npy", grey[..., None])
    rgba = np.concatenate([images, grey[..., None]], axis=3)
    np.save("a.npy", rgba)
    for name in ("g", "one"):
        bank = gmem_bank.open(gmem_bank.build(f"{name}.npy", PIXELS, f"{name}.safetensors").bank)
        np.testing.assert_array_equal(bank.read_image(3), np.repeat(grey[3][..., None], 3, 2))
    bank = gmem_bank.open(gmem_bank.build("a.npy", PIXELS, "a.safetensors").bank)
    alpha = grey[3][..., None] / 255.0
    np.testing.assert_array_equal(bank.read_image(3), np.rint(images[3] * alpha + 255 * (1 - alpha)).astype(np.uint8))


def test_labels_are_classes(images: np.ndarray) -> None:
    """By their usual name or as asked for; "none" leaves them out; a concept can be inserted from an array."""
    np.savez("d.npz", x=images, y=np.arange(12) % 3, words=np.array(["a", "b"] * 6))
    assert gmem_bank.build("d.npz", PIXELS, "y.safetensors").concepts == {"0": 4, "1": 4, "2": 4}
    report = gmem_bank.build("d.npz", PIXELS, "w.safetensors", columns=Columns(label="words"))
    assert report.concepts == {"a": 6, "b": 6}
    bank = gmem_bank.open(report.bank)
    np.testing.assert_array_equal(bank.read_image(5), images[5])
    assert gmem_bank.build("d.npz", PIXELS, "n.safetensors", columns=Columns(label="none")).concepts == {}
    np.save("more.npy", images[:4])
    with pytest.raises(SystemExit) as ended:
        main(["insert-concept", "more.npy", "--bank", "n.safetensors", "-q"])
    assert ended.value.code == 0
    bank = gmem_bank.open("n.safetensors")
    np.testing.assert_array_equal(bank.read_image(int(bank.rows_of("more")[2])), images[2])


def test_what_is_no_array_of_images_is_refused(images: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Floats, other shapes, objects, ambiguous names, labels that do not fit, damage and bombs."""
    np.save("float.npy", images.astype(np.float32))
    np.save("first.npy", images.transpose(0, 3, 1, 2))
    np.save("flat.npy", images.reshape(12, -1))
    np.save("empty.npy", images[:0])
    np.savez("names.npz", a=images, b=images)
    np.savez("labels.npz", images=images, labels=np.zeros(5))
    np.savez("slash.npz", images=images, labels=np.array(["a\nb"] * 12))
    np.savez("same.npz", images=images, labels=np.array(["a/b", "a-b"] * 6))
    np.save("one.npy", images[0])
    np.savez_compressed("bomb.npz", images=images)
    np.save("object.npy", np.array([{}, {}]), allow_pickle=True)
    Path("cut.npy").write_bytes(Path("float.npy").read_bytes()[:200])
    Path("noise.npz").write_bytes(b"PK noise")
    np.savez("wide.npz", images=images, labels=np.array(["a" * 10_000] * 12))
    monkeypatch.setattr(pixel_arrays, "LARGEST_UNPACKED", 100)
    monkeypatch.setattr(pixel_arrays, "LARGEST_LABELS", 400_000)
    for name, columns, message in [
        ("float.npy", None, r"float32 of shape \[12, 9, 11, 3\], expected images"),
        ("first.npy", None, r"uint8 of shape \[12, 3, 9, 11\].*channels come last: transpose it"),
        ("flat.npy", None, "expected images"),
        ("empty.npy", None, "expected images"),
        ("names.npz", None, r"has the arrays \['a', 'b'\]: --image-column"),
        ("names.npz", Columns(image="c"), "has the arrays"),
        ("names.npz", Columns(image="a", label="c"), "no column 'c'"),
        ("names.npz", Columns(image="a", key="b"), "--key-column is for tables"),
        ("labels.npz", None, r"labels 'labels' are float64 of shape \[5\], expected 12"),
        ("slash.npz", None, r"the class 'a\\nb' cannot name a concept.*--label-column none"),
        ("same.npz", None, "the classes 'a/b' and 'a-b' would both be the concept 'a-b'"),
        ("one.npy", None, r"may be one image or 9 grey ones: save it as \(1, 9, 11, 3\) or \(9, 11, 3, 1\)"),
        ("bomb.npz", None, "would unpack to"),
        ("wide.npz", None, "labels 'labels' of wide.npz.*480,128 bytes, more than 400,000"),
        ("object.npy", None, "could not read object.npy"),
        ("cut.npy", None, "could not read cut.npy"),
        ("noise.npz", None, "could not read noise.npz"),
        ("gone.npy", None, "no such file"),
    ]:
        with pytest.raises(SourceError, match=message):
            list_source(name, columns=columns)


PROGRAM = """
import sys
from pathlib import Path
from gmem_bank.pixel_arrays import open_pixels
images = open_pixels(Path("x.npz"), "images")
print(images.filename, int(images.sum()), flush=True)
sys.stdin.read()
"""


def opener(home: Path, **how: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "TMPDIR": str(home)}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, **streams, **how)


def test_a_compressed_array_is_unpacked_once_for_all_processes(images: np.ndarray, tmp_path: Path) -> None:
    """A second process maps the file of the first, which takes it along at its end; what a killed one left is cleared away."""
    np.savez_compressed("x.npz", images=images)
    home = tmp_path / "temporary"
    home.mkdir()
    with opener(home) as killed:
        killed.stdout.readline()
        killed.kill()
    assert len(list(home.rglob("*.npy"))) == 1
    with opener(home) as first:
        name, total = first.stdout.readline().split()
        with opener(home) as second:
            assert second.stdout.readline().split() == [name, total]
        assert int(total) == int(images.sum())
        assert list(home.rglob("*.*")) == [Path(name)]
        np.savez_compressed("x.npz", images=images[:5])
        with opener(home) as third:
            assert third.stdout.readline().split()[1] == str(int(images[:5].sum()))
    assert not list(home.rglob("*.*"))


def test_unpacked_arrays_are_not_taken_from_others_nor_written_where_there_is_no_room(
    images: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that others may write to is not used; a full disk is said with the way out."""
    np.savez_compressed("x.npz", images=images)
    home = tmp_path / "temporary"
    (home / f"gmem-unpacked-{os.getuid()}").mkdir(parents=True, mode=0o777)
    (home / f"gmem-unpacked-{os.getuid()}").chmod(0o777)
    monkeypatch.setattr("tempfile.tempdir", str(home))
    found = pixel_arrays.open_pixels(Path("x.npz"), "images")
    np.testing.assert_array_equal(found, images)
    assert Path(found.filename).parent != home / f"gmem-unpacked-{os.getuid()}"
    os.utime("x.npz", (1, 1))
    monkeypatch.setattr("gmem_bank.unpacking.SPARE_BYTES", 1 << 62)
    with pytest.raises(SourceError, match=r"has no room: save it as a \.npy"):
        list_source("x.npz")
