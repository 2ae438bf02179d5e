"""Shards as webdataset writes them: classes beside images, what else stands there, and files that were cut short."""

from __future__ import annotations

import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import gmem_bank
from gmem_bank.cli import main
from gmem_bank.columns import Columns
from gmem_bank.errors import SourceError
from gmem_bank.tars import list_tars
from tests.gmem_bank.test_bad_sources import END, header, member
from tests.gmem_bank.test_tars import pack

PIXELS = gmem_bank.load_encoder("pixels")


@pytest.fixture
def pictures(photos: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(photos.rglob("*.jpg"))]


def shard(path: str, pictures: list[bytes], classes: list[str], *, class_first: bool = False) -> None:
    """Samples of an image, a class and a caption."""
    files: list[tuple[str, bytes]] = []
    for number, (picture, label) in enumerate(zip(pictures, classes, strict=True)):
        own = [(f"{number:04d}.jpg", picture), (f"{number:04d}.cls", label.encode())]
        files += [*(own[::-1] if class_first else own), (f"{number:04d}.json", b"{}")]
    pack(Path(path), files)


@pytest.mark.parametrize("class_first", [False, True])
def test_classes_beside_images_become_concepts(pictures: list[bytes], class_first: bool) -> None:
    """In either order within a sample; -1 and nothing are no class; pictures are found again, also where the shards have moved."""
    shard("a.tar", pictures[:5], ["3", "cat\n", "3", "-1", ""], class_first=class_first)
    shard("b.tar", pictures[5:7], ["3", "cat"], class_first=class_first)
    Path("b.tar").rename("c.tar")
    shard("b.tar", pictures[5:6], ["dog"])
    report = gmem_bank.build("[ab].tar", PIXELS, "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    keys = ["3/0000.jpg", "cat/0001.jpg", "3/0002.jpg", "0003.jpg", "0004.jpg", "dog/0000.jpg"]
    assert bank.keys(bank.rows()) == keys
    assert report.concepts == {"3": 2, "cat": 1, "dog": 1}
    assert bank.sources[0].columns == {"label": "cls"}
    for row, picture in enumerate(pictures[:6]):
        Path("one.jpg").write_bytes(picture)
        np.testing.assert_array_equal(bank.read_image(row), gmem_bank.read_image("one.jpg"))
    assert gmem_bank.build("[ab].tar", PIXELS, "bank.safetensors").unchanged
    Path("there").mkdir()
    for name in "ab":
        Path(f"{name}.tar").rename(f"there/{name}.tar")
    Path("one.jpg").write_bytes(pictures[1])
    np.testing.assert_array_equal(bank.read_image(1, images="there"), gmem_bank.read_image("one.jpg"))


def test_what_stands_beside_images_is_one_line_of_the_report(pictures: list[bytes]) -> None:
    """And what could not be used has a line of its own, before it."""
    shard("a.tar", [*pictures[:5], b"no image"], ["0"] * 6)
    with tarfile.open("a.tar", "a") as archive:
        archive.addfile(tarfile.TarInfo("alone.json"))
        archive.addfile(tarfile.TarInfo("0005.pkl"))
    report = gmem_bank.build("a.tar", PIXELS, "bank.safetensors")
    assert [entry["path"] for entry in report.skipped] == ["0/0005.jpg", "a.tar:alone.json", "a.tar:0005.pkl", "a.tar"]
    assert report.skipped[-1]["reason"] == "members that stand beside images: 6 .cls, 6 .json; .cls name classes"
    assert report.num_unreadable == 1


def test_classes_can_be_left_out_and_do_not_hide_folders(pictures: list[bytes]) -> None:
    """An image in a folder has its class by that; --label-column none leaves the others; a class must be able to name a concept."""
    shard("a.tar", pictures[:2], ["3", "4"])
    assert list(list_tars("a.tar", columns=Columns(label="none")).items.all_keys()) == ["0000.jpg", "0001.jpg"]
    listing = list_tars("a.tar", columns=Columns(label="cls"), prefix="new/")
    assert list(listing.items.all_keys()) == ["new/3/0000.jpg", "new/4/0001.jpg"]
    for wrong in (Columns(label="json"), Columns(image="jpg"), Columns(key="id")):
        with pytest.raises(SourceError, match="--label-column cls or none"):
            list_tars("a.tar", columns=wrong)
    pack(Path("f.tar"), [("hat/1.jpg", pictures[0]), ("hat/1.cls", b"7"), ("2.jpg", pictures[1]), ("2.cls", b"../up"),
                         ("3.jpg", pictures[2]), ("3.cls", b"x" * 2000)])  # fmt: skip
    listing = list_tars("f.tar")
    assert list(listing.items.all_keys()) == ["hat/1.jpg", "2.jpg", "3.jpg"]
    assert "cannot name a concept" in listing.ignored[0].reason
    assert dict(listing.columns) == {}


def test_banks_of_before_find_their_pictures(pictures: list[bytes]) -> None:
    """Their keys have no class, and their source does not say that one was taken."""
    shard("a.tar", pictures[:2], ["3", "4"])
    gmem_bank.build("a.tar", PIXELS, "bank.safetensors", columns=Columns(label="none"))
    bank = gmem_bank.open("bank.safetensors")
    assert bank.sources[0].columns == {}
    assert bank.keys(bank.rows()) == ["0000.jpg", "0001.jpg"]
    Path("one.jpg").write_bytes(pictures[1])
    np.testing.assert_array_equal(bank.read_image(1), gmem_bank.read_image("one.jpg"))


CUTS = {
    "within data": (lambda good, more: good + more[:900], r"'more\.jpg' at byte [\d,]+ has [\d,]+ bytes by its header"),
    "ten million kilobytes": (lambda good, more: good + header("more.jpg", 10 << 30) + END, "10,737,418,240 bytes by its header"),
    "within a header": (lambda good, more: good + more[:300], "no end mark"),
    "between members": (lambda good, more: good, "no end mark"),
    "within padding": (lambda good, more: good[:-3], "a header is expected at byte"),
    "pax record": (lambda good, more: good + header("pax", 8 << 30, kind=tarfile.XHDTYPE) + END, "announces 8,589,934,592 bytes"),
    "long name": (
        lambda good, more: good + header("long", 10 << 30, kind=tarfile.GNUTYPE_LONGNAME) + END, "announces 10,737,418,240 bytes",
    ),
    "after a long name": (
        lambda good, more: good + member("long", b"x" * 200 + b".jpg\0", kind=tarfile.GNUTYPE_LONGNAME) + more[:100],
        "a header is expected at byte",
    ),
}  # fmt: skip


@pytest.mark.parametrize("cut", CUTS)
def test_the_images_before_a_cut_are_taken_and_the_cut_is_said_first(pictures: list[bytes], cut: str) -> None:
    """A download that stopped: what it is, where, and what to do stands above every other remark; nothing of the rest is made up."""
    make, words = CUTS[cut]
    smallest = min((picture for picture in pictures if len(picture) % 512), key=len)
    notes = b"".join(member(f"{number}.md", b"x") for number in range(12))
    data = make(notes + member("good.jpg", smallest), member("more.jpg", smallest))
    Path("cut.tar").write_bytes(data)
    report = gmem_bank.build("cut.tar", PIXELS, "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    assert bank.keys(bank.rows()) == ["good.jpg"]
    first = report.skipped[0]
    assert first["path"] == "cut.tar"
    assert re.search(words, first["reason"]), first
    assert f"the file ends at {len(data):,}: it was cut short or damaged. Only the images before" in first["reason"]
    said = CliRunner().invoke(main, ["build", "cut.tar", "-e", "pixels", "-o", "again.safetensors", "-q"])
    assert said.exit_code == 0
    assert "skipped cut.tar:" in said.stderr.splitlines()[0]


def test_a_cut_before_the_first_image_and_damage_in_the_middle_are_refused(pictures: list[bytes]) -> None:
    """With what was found there: nothing is built."""
    whole = member("good.jpg", pictures[0])
    for data, words in (
        (whole[:600], r"no images in x\.tar .*'good\.jpg' at byte 512 has"), (whole[:100], "a header is expected at byte 0"),
        (whole + b"\xff" * 512 + whole + END, rf"a header at byte {len(whole):,} of [\d,]+ is none \(damaged\)"),
        (whole + member("long", b"name\0", kind=tarfile.GNUTYPE_LONGNAME) + END, r"at byte [\d,]+ of [\d,]+ is none \(end of file"),
        (b"\x1f\x8b" * 900, r"at byte 0 of 1,800 is none \(invalid header\)"),
    ):  # fmt: skip
        Path("x.tar").write_bytes(data)
        with pytest.raises(SourceError, match=words):
            gmem_bank.build("x.tar", PIXELS, "bank.safetensors")
    assert not Path("bank.safetensors").exists()


def test_an_image_twice_in_one_file_is_said_of_that_file(pictures: list[bytes]) -> None:
    """Of two files both are named."""
    pack(Path("two.tar"), [("a.jpg", pictures[0]), ("a.jpg", pictures[1])])
    with pytest.raises(SourceError, match=r"'a\.jpg' is twice in the source, in two\.tar itself: "):
        list_tars("two.tar")
