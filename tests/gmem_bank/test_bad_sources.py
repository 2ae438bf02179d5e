"""Archives and lists by careless and hostile hands: what is sound is taken, the rest has its reason, nothing is followed."""

from __future__ import annotations

import io
import pickle
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank.errors import SourceError
from gmem_bank.sources import list_file, list_folder
from gmem_bank.tars import list_tars
from tests.picture_oracle import write_png


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, **fields: object) -> bytes:
    """The 512 bytes that announce a member."""
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    block = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"%011o\0" % size if 0 <= size < 8**11 else b"\x80" + size.to_bytes(11, "big", signed=True)
    if size < 0:
        block[124] = 0xFF
    return checked(block)


def checked(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def member(name: str, data: bytes, **fields: object) -> bytes:
    return header(name, len(data), **fields) + data + b"\0" * (-len(data) % 512)


END = b"\0" * 1024


@pytest.fixture
def picture(photos: Path) -> bytes:
    return min((path.read_bytes() for path in photos.rglob("*.jpg")), key=len)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_and_foreign_names_are_whole(form: int) -> None:
    """Names of 300 letters, in other scripts and with pax records that concern something else keep every letter."""
    names = ["a/" + "long" * 75 + ".jpg", "ü/你好 " + "é" * 120 + ".png", "a/short.jpg"]
    with tarfile.open("names.tar", "w", format=form) as archive:
        for place, name in enumerate(names):
            data = write_png(np.full((4, 4 + place, 3), 40 * place), 8, 2)
            found = tarfile.TarInfo(name)
            found.size = len(data)
            found.pax_headers = {"comment": "x" * 5000, "mtime": "1.5", "SCHILY.xattr.user.note": "y"}
            archive.addfile(found, io.BytesIO(data))
    assert [item.key for item in list_tars("names.tar").items] == names
    gmem_bank.build("names.tar", gmem_bank.load_encoder("random-projection"), "bank.safetensors")
    bank = gmem_bank.open("bank.safetensors")
    assert bank.keys(bank.rows()) == names
    for row in range(3):
        np.testing.assert_array_equal(bank.read_image(row), np.full((4, 4 + row, 3), 40 * row))


def test_paths_out_of_the_archive_in_every_spelling(picture: bytes, tmp_path: Path) -> None:
    """Absolute, upward, by a pax record or by GNU's long name: passed over, and not one byte is written."""
    before = set(tmp_path.rglob("*"))
    parts = [member(name, picture) for name in ("/etc/a.jpg", "../b.jpg", "x/../../c.jpg", "good/1.jpg")]
    for number, path in enumerate(("/abs/by-pax.jpg", "../by-pax.jpg")):
        body = f"path={path}\n"
        record = f"{len(body) + 3} {body}".encode()
        parts.append(member("pax", record, kind=tarfile.XHDTYPE) + member(f"plain{number}.jpg", picture))
    parts.append(member("long", b"../../by-gnu.jpg\0", kind=tarfile.GNUTYPE_LONGNAME) + member("plain.jpg", picture))
    Path("up.tar").write_bytes(b"".join(parts) + END)
    listing = list_tars("up.tar")
    assert [item.key for item in listing.items] == ["good/1.jpg"]
    assert [skipped.reason for skipped in listing.ignored] == ["its path leads out of its source"] * 6
    gmem_bank.build("up.tar", gmem_bank.load_encoder("pixels"), "bank.safetensors")
    new = {path.name for path in tmp_path.rglob("*")} - {path.name for path in before}
    assert new == {"up.tar", "bank.safetensors", "bank.safetensors.report.json", ".bank.safetensors.lock"} & new


def test_links_and_devices_and_pickles_are_never_opened(picture: bytes) -> None:
    """Whatever its name says, what is no plain file is passed over, and a pickle named .jpg is no image."""
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
    parts = [header(f"{n}.jpg", 0, kind=kind, linkname="/etc/passwd") for n, kind in enumerate(kinds)]
    code = pickle.dumps(Exploding())
    parts += [member("good.jpg", picture), member("code.jpg", code), member("code.pkl", code)]
    Path("kinds.tar").write_bytes(b"".join(parts) + END)
    report = gmem_bank.build("kinds.tar", gmem_bank.load_encoder("pixels"), "bank.safetensors")
    reasons = {entry["path"]: entry["reason"] for entry in report.skipped}
    assert (report.num_rows, report.num_unreadable, len(reasons)) == (1, 1, 7)
    assert "not a readable image" in reasons["code.jpg"]
    assert "extension" in reasons["kinds.tar:code.pkl"]
    assert all("never followed" in reasons[f"kinds.tar:{n}.jpg"] for n in range(5))


class Exploding:
    """Does harm where it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return exec, ("raise SystemExit('unpickled')",)


def test_sizes_that_are_not_there(picture: bytes) -> None:
    """Ten thousand million bytes announced and three given: what lies before is taken, said, and no memory is taken."""
    for size in (10 << 30, 1 << 61):
        Path("huge.tar").write_bytes(member("good.jpg", picture) + header("huge.jpg", size) + b"abc" + END)
        listing = list_tars("huge.tar")
        assert [item.key for item in listing.items] == ["good.jpg"]
        assert (
            f"'huge.jpg' at byte {listing.items[0].place + len(member('', picture)):,} has {size:,}"
            in listing.ignored[0].reason
        )
    one = member("a.jpg", picture)
    whole = one + member("b.jpg", picture) + END
    for cut in (100, 512, 700, len(one) - 600):
        Path("cut.tar").write_bytes(whole[:cut])
        with pytest.raises(SourceError, match="cut short"):
            list_tars("cut.tar")
    for cut in (len(one), len(one) + 700, len(whole) - len(END) - 600):
        Path("cut.tar").write_bytes(whole[:cut])
        listing = list_tars("cut.tar")
        assert [item.key for item in listing.items] == ["a.jpg"]
        assert [(found.path, found.loud) for found in listing.ignored] == [("cut.tar", True)]
    Path("noise.tar").write_bytes(np.random.default_rng(0).bytes(10_000))
    with pytest.raises(SourceError, match="not a readable tar"):
        list_tars("noise.tar")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("negative", "size"), ("backwards", "size"), ("sparse", "sparse"), ("record of 2 EiB", "cut short"),
        ("no end mark", "cut short"),
    ],
)  # fmt: skip
def test_claims_that_lead_nowhere_or_round_in_circles(picture: bytes, name: str, words: str) -> None:
    """Sizes below zero, holes, boundless records and a missing end are said; the listing ends, and what it gives can be read."""
    good = member("good.jpg", picture)
    sparse = bytearray(header("hole.jpg", 512, kind=tarfile.GNUTYPE_SPARSE))
    sparse[386:410], sparse[483:495] = b"%011o\0%011o\0" % (0, 512), b"%011o\0" % 700
    data = {
        "negative": good + header("bad.jpg", -100) + END,
        "backwards": good + (note := member("note.txt", b"x")) + header("bad.txt", -512 - len(note)) + END,
        "sparse": good + checked(sparse) + b"x" * 512 + member("more.jpg", picture) + END,
        "record of 2 EiB": good + header("pax", 1 << 61, kind=tarfile.XHDTYPE) + b"abc" + END,
        "no end mark": good + member("more.jpg", picture)[:300],
    }[name]
    Path("odd.tar").write_bytes(data)
    try:
        report = gmem_bank.build("odd.tar", gmem_bank.load_encoder("pixels"), "bank.safetensors")
    except SourceError as error:
        assert words in str(error)
        return
    assert words in " ".join(entry["reason"] for entry in report.skipped)
    bank = gmem_bank.open("bank.safetensors")
    assert set(bank.keys(bank.rows())) <= {"good.jpg", "more.jpg"}


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
@pytest.mark.parametrize("first", [False, True])
def test_a_record_of_gigabytes_is_not_read(picture: bytes, kind: bytes, first: bool) -> None:
    """The file has a hole of 2 GiB where the record is: it is refused with the place, and takes no memory."""
    before = b"" if first else member("good.jpg", picture)
    with Path("hole.tar").open("wb") as stream:
        stream.write(before + header("record", 2 << 30, kind=kind))
        stream.seek(2 << 30, 1)
        stream.write(member("next.jpg", picture) + END)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=rf"byte {len(before):,} of .*announces 2,147,483,648 bytes"):
            list_tars("hole.tar")
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_headers_upon_headers_end_in_a_reason(picture: bytes) -> None:
    """Thousands of records before one member would be a call inside a call each."""
    for count in (900, 5000):
        Path("chain.tar").write_bytes(
            member("good.jpg", picture)
            + member("record", b"9 path=a\n", kind=tarfile.XHDTYPE) * count
            + member("x", b"") + END
        )  # fmt: skip
        with pytest.raises(SourceError, match="damaged"):
            list_tars("chain.tar")


def test_scrambled_archives_end_in_a_listing_or_a_reason(picture: bytes) -> None:
    """Hundreds of archives with random bytes changed in headers: nothing else than our error ever comes out."""
    whole = member("a/1.jpg", picture[:600]) + member("b/2.jpg", picture[:600]) + END
    rng = np.random.default_rng(1)
    for _ in range(300):
        noisy = bytearray(whole)
        for place in rng.integers(0, 512, 2):
            noisy[place] = rng.integers(0, 256)
        noisy[:512] = checked(noisy[:512]) if noisy[124] < 0x80 else noisy[:512]
        Path("noisy.tar").write_bytes(noisy)
        try:
            listing = list_tars("noisy.tar")
        except SourceError:
            continue
        assert all(0 < len(item.key) <= 256 and item.size <= len(whole) for item in listing.items)


def test_two_images_of_one_key_are_refused_with_both_places(picture: bytes, photos: Path) -> None:
    """In one archive, in two, and in a list: the key is named, and nothing is built."""
    Path("same.tar").write_bytes(member("a.jpg", picture) + member("./a.jpg", picture[:-1]) + END)
    with pytest.raises(SourceError, match=r"'a\.jpg' is twice.*same\.tar"):
        list_tars("same.tar")
    line = next(photos.rglob("*.jpg")).relative_to(photos).as_posix()
    (photos / "twice.txt").write_text(f"{line}\n\n{line}\n")
    with pytest.raises(SourceError, match="twice"):
        gmem_bank.build(photos / "twice.txt", gmem_bank.load_encoder("pixels"), "bank.safetensors")
    assert not Path("bank.safetensors").exists()


def test_a_list_with_carriage_returns_blanks_and_what_is_not_there(photos: Path) -> None:
    """Lines end as on any system; folders, absolute and absent paths and other files are reported by their line."""
    keys = [item.key for item in list_folder(photos).items][:3]
    odd = ["hat", "/etc/passwd.png", "gone/1.jpg", "list.txt"]
    (photos / "list.txt").write_bytes("\r\n".join([keys[0], "", f"  {keys[1]}  ", *odd, keys[2]]).encode())
    listing = list_file(photos / "list.txt")
    assert [item.key for item in listing.items] == keys
    assert [skipped.path for skipped in listing.ignored] == odd
    (photos / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SourceError, match="could not read"):
        list_file(photos / "bytes.txt")


def test_a_list_as_find_and_windows_write_it(photos: Path) -> None:
    """Lines that begin with "./" name the same keys as those without, once; a byte order mark is no part of a name."""
    keys = [item.key for item in list_folder(photos).items][:3]
    (photos / "list.txt").write_bytes(b"\xef\xbb\xbf" + "\n".join(f"./{key}" for key in keys).encode())
    assert [item.key for item in list_file(photos / "list.txt").items] == keys
    (photos / "twice.txt").write_text(f"{keys[0]}\n./{keys[0]}\n")
    with pytest.raises(SourceError, match="twice"):
        list_file(photos / "twice.txt")
