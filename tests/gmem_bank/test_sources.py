"""Sources: one order, every file accounted for, pixels as a person would see them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmem_bank.contents import content_digest
from gmem_bank.decoding import decode_image, read_image
from gmem_bank.errors import SourceError
from gmem_bank.sources import list_file, list_folder, matching_files


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


GRADIENT = np.stack(np.meshgrid(np.arange(32) * 8, np.arange(16) * 16), axis=-1).astype(np.uint8)
RGB = np.concatenate([GRADIENT, 255 - GRADIENT[..., :1]], axis=-1)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "QOI"])
def test_lossless_formats_decode_to_their_pixels(kind: str) -> None:
    """What was written is what is read."""
    np.testing.assert_array_equal(decode_image(saved(Image.fromarray(RGB), kind)), RGB)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """Each of the eight orientations shows the upright picture."""
    turns = {1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [4], 7: [6], 8: [2]}
    undo = {0: 0, 1: 1, 3: 3, 5: 5, 6: 6, 4: 2, 2: 4}
    image = Image.fromarray(RGB)
    for turn in turns[orientation]:
        image = image.transpose(Image.Transpose(undo[turn]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(decode_image(saved(image, "PNG", exif=exif)), RGB)


def test_transparency_is_laid_over_white() -> None:
    """Not over black, and not whatever colour lies under it."""
    alpha = np.zeros((2, 3, 4), np.uint8)
    alpha[0, 0] = (200, 0, 0, 255)
    alpha[0, 1] = (0, 0, 0, 128)
    rgb = decode_image(saved(Image.fromarray(alpha), "PNG"))
    assert rgb[0, 0].tolist() == [200, 0, 0]
    assert rgb[0, 1].tolist() == [127, 127, 127]
    assert (rgb[1] == 255).all()
    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    rgb = decode_image(saved(palette, "PNG", transparency=1))
    assert rgb[0].tolist() == [[10, 20, 30], [255, 255, 255]]


def test_16_bit_grey_is_scaled_not_clipped() -> None:
    """65535 is white, half of it mid-grey."""
    samples = np.array([[0, 32768, 65535, 257]], np.uint16)
    rgb = decode_image(saved(Image.fromarray(samples), "PNG"))
    assert rgb[0, :, 0].tolist() == [0, 128, 255, 1]


def test_grey_palette_cmyk_and_1_bit_become_rgb() -> None:
    """All modes give three channels of the right colour."""
    grey = Image.fromarray(GRADIENT[..., 0])
    np.testing.assert_array_equal(decode_image(saved(grey, "PNG")), np.repeat(GRADIENT[..., :1], 3, axis=2))
    ones = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert decode_image(saved(ones, "PNG"))[0].tolist() == [[0, 0, 0], [255, 255, 255]]
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(decode_image(saved(red, "TIFF"))[4, 4].astype(int) - [255, 0, 0]).max() <= 2


def test_of_an_animation_the_first_frame_is_taken() -> None:
    """A GIF of two frames gives its first."""
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


def test_what_cannot_be_decoded_says_why() -> None:
    """Empty, foreign, cut and oversized images raise our error with the reason."""
    data = saved(Image.fromarray(RGB), "PNG")
    for broken, reason in (
        (b"", "empty"),
        (b"GIF89a", "not a readable"),
        (data[:60], "not a readable"),
        (b"%PDF-1.4 xx", "not a readable"),
    ):
        with pytest.raises(SourceError, match=reason):
            decode_image(broken)
    with pytest.raises(SourceError, match="more than 100 pixels"):
        decode_image(data, max_pixels=100)


def test_listing_is_sorted_recursive_and_accounts_for_every_file(tmp_path: Path) -> None:
    """Order is by key bytes; hidden, foreign and dangling files are not taken; nothing else is lost."""
    for name in (
        "b/2.png",
        "a-b/1.jpg",
        "a/1.jpg",
        "B.PNG",
        "a/.hidden.png",
        ".git/x.png",
        "a/readme.md",
        "z/deep/er/q.webp",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nothing")
    listing = list_folder(tmp_path, prefix="new/")
    assert [item.key for item in listing.items] == [
        "new/B.PNG",
        "new/a-b/1.jpg",
        "new/a/1.jpg",
        "new/b/2.png",
        "new/z/deep/er/q.webp",
    ]
    assert {skipped.path for skipped in listing.ignored} == {"a/readme.md", "dangling.png"}


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    """A linked class folder is a class folder; a loop of links is listed, not walked, and stops nothing."""
    real = tmp_path / "elsewhere" / "cats"
    real.mkdir(parents=True)
    (real / "1.png").write_bytes(b"x")
    source = tmp_path / "source"
    (source / "dogs").mkdir(parents=True)
    (source / "dogs" / "2.png").write_bytes(b"x")
    (source / "cats").symlink_to(real)
    (source / "dogs" / "up").symlink_to(source)
    (source / "loop.png").symlink_to(source / "loop.png")
    listing = list_folder(source)
    assert [item.key for item in listing.items] == ["cats/1.png", "dogs/2.png"]
    assert {skipped.path for skipped in listing.ignored} == {"dogs/up", "loop.png"}


def test_folders_that_link_to_each_other_are_walked_once(tmp_path: Path) -> None:
    """Each lies in the other once, as the links say; the way back is listed."""
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.png").write_bytes(b"x")
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    listing = list_folder(tmp_path)
    assert list(listing.items.all_keys()) == ["a/a.png", "a/other/b.png", "b/b.png", "b/other/a.png"]
    assert [skipped.path for skipped in listing.ignored] == ["a/other/other", "b/other/other"]
    assert {skipped.reason for skipped in listing.ignored} == {"a link to a folder that it lies in"}


def test_links_to_what_the_source_lies_in_are_not_followed(tmp_path: Path) -> None:
    """Neither from the source to the folder above it, nor from a linked folder to the one above that."""
    for name in ("source/a/1.png", "beside.png", "store/in/2.png", "store/beside.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "source" / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "source" / "in").symlink_to(tmp_path / "store" / "in")
    (tmp_path / "store" / "in" / "up").symlink_to(tmp_path / "store")
    listing = list_folder(tmp_path / "source")
    assert list(listing.items.all_keys()) == ["a/1.png", "in/2.png"]
    assert [skipped.path for skipped in listing.ignored] == ["a/up", "in/up"]


def test_folders_with_brackets_in_their_names_are_no_patterns(tmp_path: Path) -> None:
    """Only what lies below the folders that are there is matched; a pattern over folders still is one."""
    for name in ("ph [1]/a [2]/x-1.tar", "ph [1]/a [2]/x-2.tar", "ph [1]/a 2/x-3.tar"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")

    def found(pattern: str) -> list[str]:
        return [path.name for path in matching_files(tmp_path / pattern)]

    assert found("ph [1]/a [2]/x-*.tar") == ["x-1.tar", "x-2.tar"]
    assert found("ph [1]/a [2]/x-2.tar") == ["x-2.tar"]
    assert found("ph [1]/a ?/*.tar") == ["x-3.tar"]
    assert found("ph [1]/**/*.tar") == ["x-3.tar", "x-1.tar", "x-2.tar"]
    with pytest.raises(SourceError, match="no file at"):
        found("ph [2]/*.tar")


def test_a_line_that_begins_with_a_hash_is_a_name(tmp_path: Path) -> None:
    """Lists have no comments."""
    for name in ("#1.png", "2.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("#1.png\n\n2.png\n# not there\n")
    listing = list_file(tmp_path / "list.txt")
    assert list(listing.items.all_keys()) == ["#1.png", "2.png"]
    assert [skipped.path for skipped in listing.ignored] == ["# not there"]


def test_names_that_end_as_twins_do_are_listed_as_unusable(tmp_path: Path) -> None:
    """Folder files and lines of a list; the twin of the image beside it keeps its key for itself."""
    for name in ("c/a.png", "c/a.png#flip", "c/a#flip"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "list.txt").write_text("c/a.png\nc/a.png#flip\n")
    for listing in (list_folder(tmp_path), list_file(tmp_path / "list.txt")):
        assert list(listing.items.all_keys()) == ["c/a.png"]
        reasons = {skipped.path: skipped.reason for skipped in listing.ignored}
        assert "ends in '#flip', which marks mirrored twins" in reasons["c/a.png#flip"]


def test_folders_whose_names_cannot_name_a_concept_are_listed(tmp_path: Path) -> None:
    """A newline or a backslash in a class folder's name is said, not turned into a name that no command takes."""
    for name in ("good", "new\nline", "back\\slash"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"x")
    listing = list_folder(tmp_path)
    assert [item.key for item in listing.items] == ["good/1.png"]
    assert len(listing.ignored) == 2
    assert all("class folder" in skipped.reason for skipped in listing.ignored)


def test_content_digest_follows_keys_and_contents_not_times(tmp_path: Path) -> None:
    """A touched file changes nothing; another content of the same size, or another name, does."""
    import os

    path = tmp_path / "a.png"
    path.write_bytes(b"123")
    digest = content_digest(list_folder(tmp_path))
    os.utime(path, (1, 1))
    assert content_digest(list_folder(tmp_path)) == digest
    path.write_bytes(b"124")
    assert content_digest(list_folder(tmp_path)) != digest
    path.write_bytes(b"123")
    path.rename(tmp_path / "b.png")
    assert content_digest(list_folder(tmp_path)) != digest


def test_a_file_name_that_is_not_unicode_is_listed_not_fatal(tmp_path: Path) -> None:
    """Keys are UTF-8, so such a file is passed over with the reason."""
    (tmp_path / "good.png").write_bytes(b"x")
    with open(bytes(tmp_path) + b"/bad\xff.png", "wb") as stream:  # noqa: PTH123 - a path of bytes
        stream.write(b"x")
    listing = list_folder(tmp_path)
    assert len(listing.items) == 1
    assert listing.ignored[0].path == "bad\\udcff.png"
    assert "Unicode" in listing.ignored[0].reason


def test_read_image_names_the_path(tmp_path: Path) -> None:
    """An absent file is named."""
    with pytest.raises(SourceError, match=r"gone\.png: No such file"):
        read_image(tmp_path / "gone.png")
