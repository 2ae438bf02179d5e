"""Building: the same folder, the same bytes; whatever dies, the same command finishes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gmem_bank import builder
from gmem_bank.encoders import load_encoder
from gmem_bank.errors import ConfigError, EncoderError, LockedError, OutputExistsError, SourceError, WriteError
from gmem_bank.insertion import insert_concept
from gmem_bank.kinds import open as open_bank
from gmem_bank.verifier import verify


def test_two_builds_of_a_folder_are_byte_identical(photos: Path, tmp_path: Path) -> None:
    """Order, header and hashes do not depend on the run."""
    for name in ("a", "b"):
        builder.build(photos, load_encoder("hog"), tmp_path / f"{name}.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_rows_are_the_encoders_in_sorted_order_and_class_folders_are_concepts(photos: Path, tmp_path: Path) -> None:
    """Row i is the encoder's answer to the i-th path."""
    from gmem_bank.decoding import read_image
    from gmem_bank.encoders.preprocess import crop

    encoder = load_encoder("hog")
    report = builder.build(photos, encoder, tmp_path / "bank.safetensors", batch_size=5)
    bank = open_bank(tmp_path / "bank.safetensors")
    paths = sorted(path for path in photos.rglob("*.jpg"))
    assert bank.keys(np.arange(24)) == [path.relative_to(photos).as_posix() for path in paths]
    for row in (0, 7, 23):
        one = encoder.encode(crop(read_image(paths[row]), encoder.spec.preprocessing)[None])[0]
        np.testing.assert_allclose(bank.snippets(np.array([row]))[0], one / np.linalg.norm(one), atol=1e-6)
        np.testing.assert_array_equal(bank.read_image(row), read_image(paths[row]))
    assert report.concepts == {"dress": 8, "hat": 8, "shoes": 8}
    assert bank.rows_of("hat").tolist() == list(range(8, 16))
    assert verify(tmp_path / "bank.safetensors").ok


def test_broken_images_are_listed_with_their_reasons_and_do_not_stop_the_build(photos: Path, tmp_path: Path) -> None:
    """A truncated JPEG, a text called .jpg, an empty file, a blank image and a stray text are all accounted for."""
    good = next((photos / "hat").iterdir()).read_bytes()
    (photos / "hat" / "cut.jpg").write_bytes(good[: len(good) // 2])
    (photos / "hat" / "text.jpg").write_text("not an image")
    (photos / "hat" / "empty.png").touch()
    Image.new("RGB", (20, 20), "white").save(photos / "hat" / "blank.png")
    (photos / "notes.txt").write_text("hello")
    report = builder.build(photos, load_encoder("hog"), tmp_path / "bank.safetensors", batch_size=4)
    assert report.num_rows == 24
    assert report.num_unreadable == 4
    reasons = {entry["path"]: entry["reason"] for entry in report.skipped}
    assert set(reasons) == {"hat/cut.jpg", "hat/text.jpg", "hat/empty.png", "hat/blank.png", "notes.txt"}
    assert "truncated" in reasons["hat/cut.jpg"]
    assert "not a readable image" in reasons["hat/text.jpg"]
    assert "empty" in reasons["hat/empty.png"]
    assert "all zeros" in reasons["hat/blank.png"]
    assert "extension" in reasons["notes.txt"]
    written = json.loads((tmp_path / "bank.safetensors.report.json").read_text())
    assert written["skipped"] == report.skipped


class Dying:
    """An encoder that is killed after some batches."""

    class Killed(BaseException):
        pass

    def __init__(self, calls: int) -> None:
        self.inner, self.left = load_encoder("hog"), calls
        self.spec = self.inner.spec

    def encode(self, images: np.ndarray) -> np.ndarray:
        if self.left == 0:
            raise Dying.Killed
        self.left -= 1
        return self.inner.encode(images)


def test_an_interrupted_build_resumes_to_the_same_bytes_without_encoding_twice(photos: Path, tmp_path: Path) -> None:
    """Batches are cut on the listing, so unreadable images do not shift them."""
    (photos / "dress" / "00.jpg").write_text("broken")
    builder.build(photos, load_encoder("hog"), tmp_path / "reference.safetensors", batch_size=4)
    target = tmp_path / "bank.safetensors"
    for _ in range(6):
        with pytest.raises(Dying.Killed):
            builder.build(photos, Dying(1), target, batch_size=4)
        assert not target.exists()
    report = builder.build(photos, Dying(1), target, batch_size=4)
    assert report.num_resumed == 24
    assert target.read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    assert not list(tmp_path.glob(".bank*"))


def test_damaged_or_foreign_staging_is_not_trusted(photos: Path, tmp_path: Path) -> None:
    """A damaged batch is encoded again; batches of another encoder or listing are thrown away."""
    target = tmp_path / "bank.safetensors"
    with pytest.raises(Dying.Killed):
        builder.build(photos, Dying(3), target, batch_size=4)
    staged = sorted(builder.staging_folder(target, "build").glob("*/*.safetensors"))
    staged[0].write_bytes(staged[0].read_bytes()[:100])
    shutil.rmtree(photos / "shoes")
    report = builder.build(photos, load_encoder("hog"), target, batch_size=4)
    assert report.num_resumed == 0
    builder.build(photos, load_encoder("hog"), tmp_path / "fresh.safetensors", batch_size=4)
    assert target.read_bytes() == (tmp_path / "fresh.safetensors").read_bytes()


def test_a_finished_build_again_is_a_no_op_and_another_one_needs_overwrite(
    photos: Path, new_photos: Path, tmp_path: Path
) -> None:
    """Same images, same way: nothing to do. Anything else: refused, unless told to overwrite."""
    target = tmp_path / "bank.safetensors"
    first = builder.build(photos, load_encoder("hog"), target)
    again = builder.build(photos, load_encoder("hog"), target)
    assert again.unchanged
    assert again.fingerprint == first.fingerprint
    with pytest.raises(OutputExistsError, match="--overwrite"):
        builder.build(photos, load_encoder("pixels"), target)
    insert_concept(target, [new_photos], load_encoder("hog"))
    with pytest.raises(OutputExistsError, match="insert-concept"):
        builder.build(photos, load_encoder("hog"), target)
    assert builder.build(photos, load_encoder("pixels"), target, overwrite=True).encoder == "pixels"
    target.write_bytes(target.read_bytes()[:1000])
    with pytest.raises(OutputExistsError, match="cut short"):
        builder.build(photos, load_encoder("pixels"), target)


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-7), ("f16", 1e-3), ("bf16", 8e-3)])
def test_storage_types_keep_what_they_can(photos: Path, tmp_path: Path, dtype: str, tolerance: float) -> None:
    """A narrower type costs no more than its rounding."""
    builder.build(photos, load_encoder("hog"), tmp_path / "f32.safetensors")
    builder.build(photos, load_encoder("hog"), tmp_path / "x.safetensors", dtype=dtype)
    rows = np.arange(24)
    wide, stored = (open_bank(tmp_path / name).snippets(rows) for name in ("f32.safetensors", "x.safetensors"))
    np.testing.assert_allclose(stored, wide, atol=tolerance)


def test_bad_requests_are_clear(photos: Path, tmp_path: Path) -> None:
    """Absent and empty folders, wrong types, an encoder that breaks its promise."""
    encoder, target = load_encoder("hog"), tmp_path / "bank.safetensors"
    with pytest.raises(SourceError, match="no such file or folder"):
        builder.build(tmp_path / "nowhere", encoder, target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match="the folder is empty"):
        builder.build(tmp_path / "empty", encoder, target)
    (tmp_path / "empty" / "a.jpg").write_text("x")
    with pytest.raises(SourceError, match="none of the 1 images"):
        builder.build(tmp_path / "empty", encoder, target)
    with pytest.raises(ConfigError, match="dtype"):
        builder.build(photos, encoder, target, dtype="f64")

    class Liar(Dying):
        def encode(self, images: np.ndarray) -> np.ndarray:
            return np.zeros((len(images), 3), np.float32)

    with pytest.raises(EncoderError, match=r"returned float32 \[24, 3\]"):
        builder.build(photos, Liar(1), target)
    assert not target.exists()


def test_a_build_in_its_own_folder_leaves_out_what_is_ours(photos: Path) -> None:
    """The bank, its report, hidden folders and training runs are no images."""
    target = photos / "bank.safetensors"
    builder.build(photos, load_encoder("hog"), target)
    run = photos / "runs" / "bank"
    run.mkdir(parents=True)
    (run / ".gmem-run").touch()
    shutil.copy(next((photos / "hat").iterdir()), run / "sample.jpg")
    report = builder.build(photos, load_encoder("hog"), target, overwrite=True)
    assert report.num_rows == 24
    assert report.skipped == [{"path": "runs/bank", "reason": "a training run of gmem-gen"}]


@pytest.mark.parametrize("moment", ["bank", "report", "staging"])
def test_a_kill_after_the_bank_was_written_loses_neither_report_nor_reasons(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Killed after the rename, after the report, or before the batches are cleared: the same command completes all three."""
    (photos / "hat" / "bad.jpg").write_text("broken")
    target = tmp_path / "bank.safetensors"
    builder.build(photos, load_encoder("hog"), tmp_path / "reference.safetensors")

    def die(*args: object, **options: object) -> None:
        raise Dying.Killed

    with monkeypatch.context() as patch:
        if moment == "bank":
            patch.setattr(builder, "_report", die)
        elif moment == "report":
            patch.setattr(builder.atomic, "write_bytes", lambda path, data, real=builder.atomic.write_bytes: (
                die() if path.name.endswith("report.json") else real(path, data)))  # fmt: skip
        else:
            from gmem_bank.staging import Staging

            patch.setattr(Staging, "discard_all", die)
        with pytest.raises(Dying.Killed):
            builder.build(photos, load_encoder("hog"), target)
    report = builder.build(photos, load_encoder("hog"), target)
    assert [entry["path"] for entry in report.skipped] == ["hat/bad.jpg"]
    assert json.loads((tmp_path / "bank.safetensors.report.json").read_text())["num_unreadable"] == 1
    assert target.read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    assert not list(tmp_path.glob(".bank*"))


def test_a_no_op_still_names_what_gave_no_row(photos: Path, tmp_path: Path) -> None:
    """Built again, the skipped images are named again, with their reasons as long as the report is there."""
    (photos / "hat" / "bad.jpg").write_text("broken")
    target = tmp_path / "bank.safetensors"
    first = builder.build(photos, load_encoder("hog"), target)
    again = builder.build(photos, load_encoder("hog"), target)
    assert again.unchanged
    assert again.skipped == first.skipped
    builder.report_path(target).unlink()
    assert [entry["path"] for entry in builder.build(photos, load_encoder("hog"), target).skipped] == ["hat/bad.jpg"]


def test_an_image_replaced_by_another_of_the_same_size_is_noticed(photos: Path, tmp_path: Path) -> None:
    """By a finished bank through its contents, by a resumed build through its time of change."""
    import os

    pixels = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    bitmap, target = photos / "hat" / "a.bmp", tmp_path / "bank.safetensors"
    Image.fromarray(pixels).save(bitmap)
    builder.build(photos, load_encoder("hog"), target)
    os.utime(bitmap, (1, 1))
    assert builder.build(photos, load_encoder("hog"), target).unchanged
    Image.fromarray(pixels[::-1].copy()).save(bitmap)
    with pytest.raises(OutputExistsError):
        builder.build(photos, load_encoder("hog"), target)
    other = tmp_path / "other.safetensors"
    with pytest.raises(Dying.Killed):
        builder.build(photos, Dying(4), other, batch_size=4)
    Image.fromarray(pixels).save(bitmap)
    builder.build(photos, load_encoder("hog"), other, batch_size=4)
    builder.build(photos, load_encoder("hog"), tmp_path / "fresh.safetensors", batch_size=4)
    assert other.read_bytes() == (tmp_path / "fresh.safetensors").read_bytes()


def test_a_full_disk_during_a_build_keeps_finished_batches(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No room for a batch or for the bank: a clear error, and the same command finishes later."""
    target = tmp_path / "bank.safetensors"
    calls = []
    real = builder.atomic.write_bytes

    def full(path: Path, data: bytes) -> None:
        calls.append(path)
        if len(calls) == 4:
            raise builder.atomic.explain(OSError(28, "No space left on device"), path)
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(builder.atomic, "write_bytes", full)
        with pytest.raises(WriteError, match="No space left"):
            builder.build(photos, load_encoder("hog"), target, batch_size=4)
    assert not target.exists()
    assert builder.build(photos, load_encoder("hog"), target, batch_size=4).num_resumed == 8


def test_a_link_to_a_bank_is_followed(photos: Path, tmp_path: Path, new_photos: Path) -> None:
    """The bank behind the link is built, edited and locked; the link stays a link."""
    (tmp_path / "data").mkdir()
    (tmp_path / "far").mkdir()
    builder.build(photos, load_encoder("hog"), tmp_path / "data" / "bank.safetensors")
    link = tmp_path / "far" / "link.safetensors"
    link.symlink_to(tmp_path / "data" / "bank.safetensors")
    insert_concept(link, [new_photos], load_encoder("hog"))
    assert link.is_symlink()
    bank = open_bank(tmp_path / "data" / "bank.safetensors")
    assert len(bank) == 32
    assert not len(bank.missing_images(bank.image_rows()))
    with builder.atomic.locked(tmp_path / "data" / "bank.safetensors"), pytest.raises(LockedError):
        insert_concept(link, [new_photos], load_encoder("hog"), name="again")
