"""Images in tar files and in lists: the same bank as from the folder, and nothing hostile followed."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
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
    with pytest.raises(SourceError, match=r"one\.tar.*both have|both have.*'a\.jpg'"):
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
