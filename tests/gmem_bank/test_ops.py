"""Operations: nothing lost, nothing changed that should stay."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gmem_bank import builder, derive, ops
from gmem_bank.bank import MemoryBank
from gmem_bank.encoders import load_encoder
from gmem_bank.errors import (
    ConceptExistsError,
    ConfigError,
    EncoderMismatchError,
    GMemError,
    OutputExistsError,
    UnknownKeyError,
)
from gmem_bank.insertion import insert_concept
from gmem_bank.kinds import open as open_bank
from gmem_bank.rewrite import save
from gmem_bank.verifier import verify
from tests.conftest import BankMaker


@pytest.fixture
def hog_bank(photos: Path, tmp_path: Path) -> Path:
    """A HOG bank of the photos."""
    path = tmp_path / "bank.safetensors"
    builder.build(photos, load_encoder("hog"), path)
    return path


def content(bank: MemoryBank) -> tuple[list[str], dict[str, list[int]], list[int], np.ndarray]:
    """Keys, concepts, active rows and snippets."""
    concepts = {name: bank.rows_of(name).tolist() for name in bank.names}
    return bank.keys(np.arange(len(bank))), concepts, bank.rows().tolist(), bank.snippets(bank.rows())


def same(a: MemoryBank, b: MemoryBank) -> bool:
    """Whether two banks agree in keys, concepts, mask and snippets."""
    first, second = content(a), content(b)
    return first[:3] == second[:3] and np.array_equal(first[3], second[3])


def test_insert_appends_a_segment_and_leaves_old_ones_byte_identical(hog_bank: Path, new_photos: Path) -> None:
    """Old entries keep their hashes; the new rows are the encoder's, under <concept>/<path>."""
    before = open_bank(hog_bank)
    report = insert_concept(hog_bank, [new_photos], load_encoder("hog"))
    after = open_bank(hog_bank)
    for name, digest in before.header.hashes.items():
        if name.startswith("0/"):
            assert after.header.hashes[name] == digest
    assert report.keys == [f"images/{path.name}" for path in sorted(new_photos.iterdir())]
    assert after.rows_of("images").tolist() == list(range(24, 32))
    assert verify(hog_bank).ok
    # the same images built alone give the same snippets
    alone = builder.build(new_photos, load_encoder("hog"), hog_bank.with_name("alone.safetensors"))
    np.testing.assert_allclose(
        after.snippets(after.rows_of("images")), open_bank(alone.bank).snippets(np.arange(8)), atol=1e-6
    )


def test_remove_of_insert_is_the_identity(hog_bank: Path, new_photos: Path) -> None:
    """remove(insert(b)) = b in keys, concepts, mask and snippets."""
    before = open_bank(hog_bank)
    insert_concept(hog_bank, [new_photos], load_encoder("hog"))
    ops.remove_concept(hog_bank, "images")
    after = open_bank(hog_bank)
    assert same(before, after)
    assert after.sources == before.sources
    assert [entry["operation"] for entry in after.history] == ["build", "insert-concept", "remove-concept"]


@given(
    doomed=st.sampled_from(["class0", "class1", "class2"]), cut=st.integers(1, 19), masked=st.sets(st.integers(0, 19))
)
def test_removal_keeps_exactly_the_other_rows(make_bank: BankMaker, doomed: str, cut: int, masked: set[int]) -> None:
    """Whatever the segments and the mask: other keys, snippets, concepts and mask bits stay, in order."""
    active = np.array([row not in masked for row in range(20)])
    bank = make_bank(parts=(cut, 20 - cut), active=active)
    keys = bank.keys(np.arange(20))
    ops.remove_concept(bank.path, doomed)
    after = open_bank(bank.path)
    kept = [row for row in range(20) if not keys[row].startswith(doomed)]
    assert after.keys(np.arange(len(after))) == [keys[row] for row in kept]
    kept_active = [row for row in kept if active[row]]
    np.testing.assert_array_equal(after.snippets(after.rows()), bank.snippets(np.array(kept_active, np.int64)))
    assert after.rows().tolist() == [kept.index(row) for row in kept_active]
    assert set(after.names) == {"class0", "class1", "class2"} - {doomed}
    assert verify(after.path).ok


def test_the_same_insert_again_does_nothing(hog_bank: Path, new_photos: Path) -> None:
    """A kill after the last write must not make the same command fail."""
    insert_concept(hog_bank, [new_photos], load_encoder("hog"))
    before = hog_bank.read_bytes()
    report = insert_concept(hog_bank, [new_photos], load_encoder("hog"))
    assert report.unchanged
    assert report.num_added == 0
    assert hog_bank.read_bytes() == before


def test_a_taken_name_with_other_images_is_refused(hog_bank: Path, new_photos: Path) -> None:
    """A concept of that name with other images is an error that says how to go on."""
    with pytest.raises(ConceptExistsError, match=r"already has a concept 'hat' \(8 rows\).*--name.*remove-concept"):
        insert_concept(hog_bank, [new_photos], load_encoder("hog"), name="hat")
    insert_concept(hog_bank, [new_photos], load_encoder("hog"))
    next(new_photos.iterdir()).unlink()
    with pytest.raises(ConceptExistsError):
        insert_concept(hog_bank, [new_photos], load_encoder("hog"))


def test_an_interrupted_insert_is_taken_up_where_it_stopped(hog_bank: Path, new_photos: Path) -> None:
    """Finished batches are not encoded again, and the bank is the one of an uninterrupted insert."""
    reference = hog_bank.with_name("reference.safetensors")
    insert_concept(hog_bank, [new_photos], load_encoder("hog"), output=reference, batch_size=2)

    class Killed(BaseException):
        pass

    class Dying:
        def __init__(self, calls: int) -> None:
            self.inner, self.left = load_encoder("hog"), calls
            self.spec = self.inner.spec

        def encode(self, images: np.ndarray) -> np.ndarray:
            if self.left == 0:
                raise Killed
            self.left -= 1
            return self.inner.encode(images)

    before = hog_bank.read_bytes()
    with pytest.raises(Killed):
        insert_concept(hog_bank, [new_photos], Dying(3), batch_size=2)
    assert hog_bank.read_bytes() == before
    insert_concept(hog_bank, [new_photos], Dying(1), batch_size=2)
    assert hog_bank.read_bytes() == reference.read_bytes()
    assert not list(hog_bank.parent.glob(".bank*"))


def test_a_foreign_encoder_is_refused_and_both_are_named(hog_bank: Path, new_photos: Path) -> None:
    """Another encoder, or the same with other parameters, cannot insert."""
    for encoder in (
        load_encoder("pixels"),
        load_encoder("hog", parameters={"orientations": 12}),
        load_encoder("hog", space="raw"),
    ):
        with pytest.raises(EncoderMismatchError) as caught:
            insert_concept(hog_bank, [new_photos], encoder)
        assert open_bank(hog_bank).encoder.describe() in str(caught.value)
        assert encoder.spec.describe() in str(caught.value)


def test_output_writes_a_new_bank_whose_sources_still_lead_to_the_images(hog_bank: Path, new_photos: Path) -> None:
    """With -o the old bank is untouched, and paths are relative to the new place."""
    before = hog_bank.read_bytes()
    target = hog_bank.parent / "sub" / "folder" / "new.safetensors"
    insert_concept(hog_bank, [new_photos], load_encoder("hog"), output=target)
    assert hog_bank.read_bytes() == before
    bank = open_bank(target)
    assert not len(bank.missing_images(bank.image_rows()))
    assert bank.read_image(25).shape[2] == 3
    with pytest.raises(OutputExistsError):
        ops.remove_concept(hog_bank, "hat", output=target)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "../a", "a\\b", "a\nb", "a\0"])
def test_names_that_are_paths_are_refused(hog_bank: Path, new_photos: Path, name: str) -> None:
    """A concept's name becomes part of keys, so it cannot be a path."""
    with pytest.raises(ConfigError, match="cannot name a concept"):
        insert_concept(hog_bank, [new_photos], load_encoder("hog"), name=name)


def test_several_folders_need_a_name_and_different_keys(hog_bank: Path, new_photos: Path, photos: Path) -> None:
    """Keys inside one concept must differ."""
    with pytest.raises(ConfigError, match="--name"):
        insert_concept(hog_bank, [new_photos, photos], load_encoder("hog"))
    with pytest.raises(GMemError, match="twice"):
        insert_concept(hog_bank, [new_photos, new_photos], load_encoder("hog"), name="x")
    report = insert_concept(hog_bank, [photos / "hat", sorted(new_photos.iterdir())[0]], load_encoder("hog"), name="x")
    assert report.num_added == 9
    bank = open_bank(hog_bank)
    assert not len(bank.missing_images(bank.image_rows()))


def test_the_last_rows_cannot_be_removed(make_bank: BankMaker) -> None:
    """A bank keeps at least one row."""
    bank = make_bank(rows=3, keys=["a/1", "a/2", "a/3"])
    with pytest.raises(GMemError, match="no row would be left"):
        ops.remove_concept(bank.path, "a")
    with pytest.raises(UnknownKeyError, match="Did you mean 'a'"):
        ops.remove_concept(bank.path, "aa")


def test_interpolation_writes_the_right_rows(make_bank: BankMaker) -> None:
    """Ends are the two snippets, the middle is half way, concepts stand for their mean, rows have norm 1."""
    bank = make_bank(rows=12, dim=6)
    derive.interpolate(bank.path, "class0/000.png", "class1/001.png", steps=3)
    derive.interpolate(bank.path, "class0", "class2", steps=2, method="linear", name="means")
    after = open_bank(bank.path)
    name = "class0_000.png-to-class1_001.png"
    assert after.keys(after.rows_of(name)) == [f"{name}/{step}" for step in range(3)]
    rows, old = after.snippets(after.rows_of(name)), bank.snippets(np.array([0, 1]))
    np.testing.assert_allclose(rows[[0, 2]], old, atol=1e-6)
    middle = old.sum(axis=0) / np.linalg.norm(old.sum(axis=0))
    np.testing.assert_allclose(rows[1], middle, atol=1e-6)
    mean = bank.snippets(bank.rows_of("class0")).mean(axis=0)
    np.testing.assert_allclose(after.snippets(after.rows_of("means"))[0], mean / np.linalg.norm(mean), atol=1e-6)
    with pytest.raises(ConceptExistsError):
        derive.interpolate(bank.path, "class0", "class2", name="means")
    with pytest.raises(UnknownKeyError, match="neither a concept nor a key"):
        derive.interpolate(bank.path, "class0", "nothing")


def test_history_and_fingerprint_tell_what_happened(make_bank: BankMaker) -> None:
    """Each edit adds one entry with its parent's fingerprint; the fingerprint follows content, not history."""
    bank = make_bank()
    derive.interpolate(bank.path, "class0", "class1", name="x")
    edited = open_bank(bank.path)
    assert edited.history[-1]["parent"] == bank.fingerprint != edited.fingerprint
    ops.remove_concept(bank.path, "x")
    back = open_bank(bank.path)
    assert back.fingerprint == bank.fingerprint
    assert len(back.history) == 3


def test_a_kill_after_the_rename_makes_the_same_edit_a_no_op(
    make_bank: BankMaker, hog_bank: Path, new_photos: Path
) -> None:
    """Every edit, in place or with -o, met by its own result, changes nothing; another result in the way is refused."""
    for index, outputs in enumerate([(None, None), ("out.safetensors", "removed.safetensors")]):
        path = make_bank(f"made-{index}.safetensors").path
        for edit, arguments, output in (
            (derive.interpolate, ("class0", "class1"), outputs[0]),
            (ops.remove_concept, ("class2",), outputs[1]),
        ):
            first = edit(path, *arguments, output=output)
            again = edit(path, *arguments, output=output)
            assert again.unchanged
            assert again.fingerprint == first.fingerprint
            assert again.num_rows == first.num_rows
    for _ in range(2):
        report = insert_concept(hog_bank, [new_photos], load_encoder("hog"), output="inserted.safetensors")
    assert report.unchanged
    assert len(open_bank("inserted.safetensors")) == 32
    with pytest.raises(OutputExistsError):
        derive.interpolate(hog_bank, "hat", "dress", output="inserted.safetensors")


def test_a_class_folder_inserted_under_its_own_name_is_already_there(photos: Path, hog_bank: Path) -> None:
    """A folder that the build took as a class can be 'inserted': its rows are the same."""
    report = insert_concept(hog_bank, [photos / "hat"], load_encoder("hog"))
    assert report.unchanged
    assert report.num_rows == 24


def test_save_writes_the_same_bank_elsewhere(hog_bank: Path) -> None:
    """Rows, keys, concepts and history stay; source paths lead to the images from the new place."""
    bank = open_bank(hog_bank)
    save(bank, hog_bank.with_name("copy.safetensors"))
    assert hog_bank.with_name("copy.safetensors").read_bytes() == hog_bank.read_bytes()
    save(bank, hog_bank.parent / "deep" / "er" / "copy.safetensors")
    moved = open_bank(hog_bank.parent / "deep" / "er" / "copy.safetensors")
    assert same(bank, moved)
    assert moved.history == bank.history
    assert not len(moved.missing_images(moved.image_rows()))


@given(
    snippets=hnp.arrays(
        np.float32, st.tuples(st.integers(1, 12), st.integers(1, 5)), elements=st.floats(-1e3, 1e3, width=32)
    ).filter(lambda a: (np.linalg.norm(a, axis=1) > 1e-1).all()),
    dtype=st.sampled_from(["f32", "f16", "bf16"]),
    space=st.sampled_from(["raw", "unit"]),
    data=st.data(),
)
def test_open_of_save_is_the_identity_in_bytes_and_values(
    make_bank: BankMaker, snippets: np.ndarray, dtype: str, space: str, data: st.DataObject
) -> None:
    """For any snippets, keys, segments, mask, type and space."""
    count = len(snippets)
    letters = st.text(
        st.characters(codec="utf-8", exclude_characters="/\\", exclude_categories=["C", "Z"]), min_size=1, max_size=5
    )
    unique = st.lists(letters.filter(lambda n: n not in (".", "..")), min_size=count, max_size=count, unique=True)
    keys = [f"{data.draw(st.sampled_from(['a', 'é', 'b c']))}/{name}" for name in data.draw(unique)]
    cut = data.draw(st.integers(1, count))
    active = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    parts = (cut, count - cut) if cut < count else (count,)
    bank = make_bank(snippets=snippets, keys=keys, dtype=dtype, space=space, active=active, parts=parts)
    save(bank, "again.safetensors")
    assert Path("again.safetensors").read_bytes() == bank.path.read_bytes()
    again = open_bank("again.safetensors")
    assert again.keys(np.arange(count)) == keys
    assert again.rows_for(keys).tolist() == list(range(count))
    tolerance = {"f32": 1e-6, "f16": 1e-3, "bf16": 1e-2}[dtype]
    expected = snippets / np.linalg.norm(snippets, axis=1, keepdims=True) if space == "unit" else snippets
    scale = np.abs(expected[active]).max(initial=1)
    np.testing.assert_allclose(again.snippets(again.rows()), expected[active], atol=tolerance * scale)
    assert verify("again.safetensors").ok


@pytest.mark.parametrize("entry", ["0/snippets", "0/keys.bytes", "0/source", "keys.hash", "keys.row", "concepts.rows"])
def test_nothing_is_made_from_a_damaged_entry(make_bank: BankMaker, entry: str) -> None:
    """A removal writes entries anew with new hashes: made from damaged ones, verify would call the damage sound."""
    bank = make_bank()
    place = bank.stored.place(entry)
    data = bytearray(bank.path.read_bytes())
    data[place.end - 1] ^= 1
    bank.path.write_bytes(data)
    with pytest.raises(GMemError):
        ops.remove_concept(bank.path, "class0")
    assert bank.path.read_bytes() == data
    assert not verify(bank.path).ok
