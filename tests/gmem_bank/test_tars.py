"""Images in tar files and in lists: the same bank as from the folder, and nothing hostile followed."""

from __future__ import annotations

import io
import tarfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank import contents
from gmem_bank.columns import Columns
from gmem_bank.contents import list_source, read_item
from gmem_bank.errors import SourceError
from gmem_bank.tars import list_tars


def pack(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """A tar file of members in that order."""
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def packed(photos: Path, folder: Path, shards: int) -> str:
    """The photos in several tars, in sorted order; gives the pattern."""
    folder.mkdir()
    files = [(p.relative_to(photos).as_posix(), p.read_bytes()) for p in sorted(photos.rglob("*.jpg"))]
    size = -(-len(files) // shards)
    for number in range(shards):
        pack(folder / f"shard-{number:06d}.tar", files[number * size : (number + 1) * size])
    return f"{folder}/shard-*.tar"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bank_from_tars_is_that_from_the_folder(photos: Path, new_photos: Path, workers: int) -> None:
    """Keys, snippets, concepts, pictures; inserts from a tar too; the trainer's way to pixels works without unpacking."""
    encoder = gmem_bank.load_encoder("hog")
    pattern = packed(photos, Path("shards"), 3)
    gmem_bank.build(photos, encoder, "a.safetensors", batch_size=5)
    gmem_bank.build(pattern, encoder, "b.safetensors", batch_size=5, num_workers=workers)
    pack(Path("new.tar"), [(p.name, p.read_bytes()) for p in sorted(new_photos.iterdir())])
    gmem_bank.insert_concept("b.safetensors", ["new.tar"], encoder, name="images", flip=True)
    a, b = gmem_bank.open("a.safetensors"), gmem_bank.open("b.safetensors")
    rows = a.rows()
    assert b.keys(rows) == a.keys(rows)
    np.testing.assert_array_equal(b.snippets(rows), a.snippets(rows))
    assert {n: b.rows_of(n).tolist() for n in a.names} == {n: a.rows_of(n).tolist() for n in a.names}
    assert (b.sources[0].kind, b.sources[0].path) == ("tar", "shards/shard-*.tar")
    assert len(b.image_rows()) == 40
    assert len(b.missing_images(b.rows())) == 0
    for row in (0, 11, 23):
        np.testing.assert_array_equal(b.read_image(row), a.read_image(row))
    key = f"images/{sorted(new_photos.iterdir())[2].name}"
    plain, mirrored = (b.read_image(int(r)) for r in b.rows_for([key, key + "#flip"]))
    np.testing.assert_array_equal(mirrored, plain[:, ::-1])
    np.testing.assert_array_equal(plain, gmem_bank.read_image(new_photos / Path(key).name))
    np.testing.assert_array_equal(b.read_image(3, images=photos), a.read_image(3))
    assert gmem_bank.build(pattern, encoder, "c.safetensors", batch_size=5).num_rows == 24
    assert gmem_bank.build(pattern, encoder, "c.safetensors", batch_size=5).unchanged
    Path("shards/shard-000001.tar").unlink()
    assert len(b.missing_images(b.rows())) == 8


def test_what_a_hostile_tar_holds_is_passed_over_with_its_reason(photos: Path, tmp_path: Path) -> None:
    """Absolute paths, '..', links, devices, pickles, sizes beyond the end: listed, never followed, never written."""
    data = next(photos.rglob("*.jpg")).read_bytes()
    with tarfile.open("odd.tar", "w") as archive:
        for name in ("good/1.jpg", "/etc/abs.jpg", "../up.jpg", "a/../../b.jpg", "code.pkl", "good/2.jpg"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("dev.jpg", tarfile.CHRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    listing = list_tars("odd.tar")
    assert [item.key for item in listing.items] == ["good/1.jpg", "good/2.jpg"]
    assert all(read_item(item) == data for item in listing.items)
    reasons = {skipped.path: skipped.reason for skipped in listing.ignored}
    assert len(reasons) == 7
    assert "link or device" in reasons["odd.tar:link.jpg"]
    assert "leads out" in reasons["odd.tar:../up.jpg"]
    assert "not an image" in reasons["odd.tar:code.pkl"]
    whole = Path("odd.tar").read_bytes()
    Path("cut.tar").write_bytes(whole[: len(data) // 2])
    with pytest.raises(SourceError):
        list_tars("cut.tar")
    huge = tarfile.TarInfo("huge.jpg")
    huge.size = 10 << 30
    Path("huge.tar").write_bytes(huge.tobuf() + b"\0" * 2048)
    with pytest.raises(SourceError):
        list_tars("huge.tar")
    for name in ("junk.tar", "x.tar.gz", "none.tar", "none-*.tar"):
        if name.startswith(("junk", "x")):
            Path(name).write_bytes(b"\x1f\x8b junk")
        with pytest.raises(SourceError):
            list_source(name)
    pack(Path("one.tar"), [("a.jpg", data)])
    pack(Path("two.tar"), [("a.jpg", data)])
    with pytest.raises(SourceError, match=r"'a\.jpg' is twice in the source, in one\.tar and in two\.tar"):
        list_source("[ot][nw][eo].tar")


def test_a_list_gives_its_images_in_its_order(photos: Path) -> None:
    """Lines are keys relative to the list's folder; odd lines are reported; the same line twice is refused."""
    files = [p.relative_to(photos).as_posix() for p in sorted(photos.rglob("*.jpg"))]
    wanted = [files[9], files[2], files[20]]
    (photos / "list.txt").write_text("\n".join([*wanted, "", "gone.jpg", "../outside.jpg", "notes.md"]) + "\n")
    listing = list_source(photos / "list.txt")
    assert [item.key for item in listing.items] == wanted
    assert [skipped.path for skipped in listing.ignored] == ["gone.jpg", "../outside.jpg", "notes.md"]
    gmem_bank.build(photos / "list.txt", gmem_bank.load_encoder("pixels"), "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    assert bank.keys(bank.rows()) == wanted
    np.testing.assert_array_equal(bank.read_image(1), gmem_bank.read_image(photos / wanted[1]))
    assert (bank.sources[0].kind, bank.sources[0].path) == ("list", "photos")
    (photos / "twice.txt").write_text(f"{wanted[0]}\n{wanted[0]}\n")
    with pytest.raises(SourceError, match="names an image twice"):
        list_source(photos / "twice.txt")


def test_a_member_that_ends_as_a_twin_is_unusable(photos: Path) -> None:
    """Its key would be that of the mirrored twin of the member before it."""
    data = next(photos.rglob("*.jpg")).read_bytes()
    pack(Path("twins.tar"), [("a/1.jpg", data), ("a/1.jpg#flip", data)])
    listing = list_tars("twins.tar")
    assert list(listing.items.all_keys()) == ["a/1.jpg"]
    assert [skipped.path for skipped in listing.ignored] == ["twins.tar:a/1.jpg#flip"]
    assert "which marks mirrored twins" in listing.ignored[0].reason


def test_a_linked_tar_is_recorded_by_its_own_name(photos: Path, tmp_path: Path) -> None:
    """Its target has no suffix, and would be taken for an image; a pattern is kept below the folders that are there."""
    files = [(p.relative_to(photos).as_posix(), p.read_bytes()) for p in sorted(photos.rglob("*.jpg"))]
    (tmp_path / "store").mkdir()
    (tmp_path / "links").mkdir()
    pack(tmp_path / "store" / "abc", files)
    (tmp_path / "links" / "x.tar").symlink_to(tmp_path / "store" / "abc")
    (tmp_path / "by").symlink_to(tmp_path / "links")
    encoder = gmem_bank.load_encoder("pixels")
    for source, recorded in (
        ("by/x.tar", "links/x.tar"),
        ("by/[xy].tar", "links/[xy].tar"),
        ("by/**/*.tar", "links/**/*.tar"),
    ):
        report = gmem_bank.build(source, encoder, "b.safetensors", overwrite=True)
        bank = gmem_bank.open(report.bank)
        assert bank.sources[0].path == recorded
        np.testing.assert_array_equal(bank.read_image(5), gmem_bank.read_image(photos / files[5][0]))


def test_files_are_looked_at_once_a_second_and_the_image_s_own_file_always(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand rows of ten tars cost one look at each tar; a replaced tar, or one more, is noticed with the next row."""
    files = [(f"{number}.jpg", path.read_bytes()) for number, path in enumerate(sorted(photos.rglob("*.jpg"))[:10])]
    for number, file in enumerate(files):
        pack(Path(f"t-{number}.tar"), [file])
    looks: list[str] = []
    look = contents.matching_files
    monkeypatch.setattr(contents, "matching_files", lambda pattern: looks.append(pattern) or look(pattern))
    monkeypatch.setattr(contents.time, "monotonic", lambda: 100.0)

    def read(name: str) -> bytes | None:
        item = contents.find_item("t-*.tar", "", Columns(), name)
        return None if item is None else read_item(item)

    for _ in range(100):
        assert [read(name) for name, _ in files] == [data for _, data in files]
    assert len(looks) == 1
    pack(Path("t-3.tar"), [("before.jpg", files[5][1]), ("3.jpg", files[4][1])])
    assert read("3.jpg") == files[4][1]
    assert read("more.jpg") is None
    pack(Path("t-x.tar"), [("more.jpg", files[2][1])])
    assert read("more.jpg") == files[2][1]
    Path("t-4.tar").unlink()
    assert read("4.jpg") is None


def test_listed_sources_are_kept_by_their_number_of_images(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two always, more while they are few images; the one used longest ago goes first."""
    data = next(photos.rglob("*.jpg")).read_bytes()
    for name in "abcd":
        pack(Path(f"{name}.tar"), [(f"{number}.jpg", data) for number in range(4)])
    monkeypatch.setattr(contents, "_KNOWN", OrderedDict())
    for most, kept in ((12, ["b", "c", "d"]), (3, ["c", "d"])):
        monkeypatch.setattr(contents, "MOST_KNOWN", most)
        for name in "abcd":
            assert contents.find_item(f"{name}.tar", "", Columns(), "2.jpg") is not None
        assert [Path(asked[0]).stem for asked in contents._KNOWN] == kept
