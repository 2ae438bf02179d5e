"""Writing: atomic, deterministic, and readable for ever."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gmem_bank.errors import BankNotFoundError, CorruptError, FormatError, FormatVersionError, LockedError, WriteError
from gmem_bank.kinds import open as open_bank
from gmem_bank.provenance import sha256_of
from gmem_bank.storage import Payload, atomic, open_stored, write
from gmem_bank.storage.schema import parse_header
from gmem_bank.verifier import verify
from tests.conftest import DATA, BankMaker, stored_oracle


def rewritten(bank_path: Path, target: Path) -> None:
    stored = open_stored(bank_path)
    write(target, stored.header, stored.payloads())


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_open_then_save_is_the_identity_in_bytes(make_bank: BankMaker, tmp_path: Path, dtype: str) -> None:
    """A bank written again from what was read has the same bytes."""
    bank = make_bank(dtype=dtype, parts=(3, 17))
    rewritten(bank.path, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == bank.path.read_bytes()


GOLDEN = sorted(path for path in (DATA / "banks").iterdir() if path.suffix != ".json")


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda path: path.name)
def test_golden_banks_of_every_version_read_by_value_and_rewrite_by_byte(golden: Path, tmp_path: Path) -> None:
    """Committed banks keep their values and their bytes for ever (HDF5, laid out by its library: their values)."""
    bank = open_bank(golden)
    expected = json.loads((golden.parent / (golden.name.removesuffix(".safetensors") + ".json")).read_text())
    assert bank.keys(np.arange(len(bank))) == expected["keys"]
    assert {name: bank.rows_of(name).tolist() for name in bank.names} == expected["concepts"]
    assert bank.fingerprint == expected["fingerprint"]
    np.testing.assert_allclose(bank.snippets(bank.rows()), np.array(expected["snippets"]), atol=1e-7)
    np.testing.assert_allclose(bank.snippets(bank.rows()), stored_oracle(bank), atol=1e-6)
    assert verify(golden).ok
    again = tmp_path / f"again{golden.suffix}"
    rewritten(golden, again)
    if golden.is_dir():
        assert {f.name: f.read_bytes() for f in again.iterdir()} == {f.name: f.read_bytes() for f in golden.iterdir()}
    elif golden.suffix == ".safetensors":
        assert again.read_bytes() == golden.read_bytes()
    assert open_bank(again).fingerprint == expected["fingerprint"]


def test_there_are_golden_banks_of_every_version_and_form() -> None:
    """None was deleted."""
    assert {path.name for path in GOLDEN} == {
        "v1.0-dense.safetensors", "v1.1-dense.safetensors", "v1.1-dense-bf16.h5", "v1.1-factored-i8.safetensors",
        "v1.1-factored-f32.h5", "v1.1-sparse-f16.gmem",
    }  # fmt: skip


def test_extra_entries_and_fields_of_a_later_minor_version_survive_a_rewrite(
    make_bank: BankMaker, tmp_path: Path
) -> None:
    """What this version does not understand is kept."""
    stored = make_bank().stored
    payloads = stored.payloads()
    payloads["thumbnails"] = Payload.of(np.arange(5, dtype=np.uint8))
    header = replace(stored.header, extras={"colour": "blue"}, version=(1, 7))
    write(tmp_path / "later.safetensors", header, payloads)
    rewritten(tmp_path / "later.safetensors", tmp_path / "again.safetensors")
    again = open_stored(tmp_path / "again.safetensors")
    assert again.header.extras == {"colour": "blue"}
    assert again.array("thumbnails").tolist() == [0, 1, 2, 3, 4]


def test_a_newer_major_version_says_what_to_do(make_bank: BankMaker) -> None:
    """Version 2 is refused with the way out."""
    record = json.loads(make_bank().header.to_json())
    with pytest.raises(FormatVersionError, match="upgrade"):
        parse_header({**record, "version": [2, 0]})


FIELDS = [
    "kind",
    "space",
    "dim",
    "num_rows",
    "segments",
    "encoder",
    "sources",
    "concepts",
    "history",
    "hashes",
    "fingerprint",
]


def signed(record: dict) -> dict:
    """A header record whose fingerprint and checksum fit, as a faulty writer would leave it."""
    record = {name: value for name, value in record.items() if name not in ("fingerprint", "checksum")}
    record["fingerprint"] = sha256_of({name: value for name, value in record.items() if name != "history"})
    return {**record, "checksum": sha256_of(record)}


@pytest.mark.parametrize("field", FIELDS)
def test_a_header_field_changed_by_hand_is_refused(make_bank: BankMaker, field: str) -> None:
    """No field can be changed without the reader noticing, even the history, which the fingerprint leaves out."""
    record = json.loads(make_bank().header.to_json())
    with pytest.raises(CorruptError, match="checksum"):
        parse_header({**record, field: "changed"})


@pytest.mark.parametrize("field", FIELDS[:-1])
@pytest.mark.parametrize("value", [None, -1, True, 2**60, "x", ["x"], [None], [{}], {"a": 1}])
def test_a_header_that_cannot_be_is_refused_though_its_hashes_fit(
    make_bank: BankMaker, field: str, value: object
) -> None:
    """Wrong types and impossible values raise our error, never another."""
    record = json.loads(make_bank().header.to_json())
    if (field, value) != ("concepts", ["x"]):  # a list of names is what it should be; the entries then disagree
        with pytest.raises(FormatError):
            parse_header(signed({**record, field: value}))


class FullDisk:
    """A file that has room for some bytes only."""

    def __init__(self, stream: object, room: int) -> None:
        self._stream, self._room = stream, room

    def write(self, data: bytes) -> int:
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._stream.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def __enter__(self) -> FullDisk:
        return self

    def __exit__(self, *args: object) -> None:
        self._stream.close()


@pytest.mark.parametrize("room", [0, 100, 3000])
def test_a_full_disk_leaves_the_old_bank_and_no_temporary_file(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    """A write that fails half way changes nothing and says how much was needed."""
    bank = make_bank(rows=200)
    before = bank.path.read_bytes()
    real_open = Path.open

    def limited(self: Path, mode: str = "r", *args: object, **options: object) -> object:
        stream = real_open(self, mode, *args, **options)
        return FullDisk(stream, room) if "w" in mode else stream

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(WriteError, match=r"No space left.*bytes were needed.*still stands"):
        rewritten(bank.path, bank.path)
    monkeypatch.undo()
    assert bank.path.read_bytes() == before
    assert sorted(path.name for path in bank.path.parent.iterdir()) == [bank.path.name]


def test_two_writers_exclude_one_another_and_leave_no_lock(tmp_path: Path) -> None:
    """The second writer is told to wait; afterwards no lock file is left."""
    path = tmp_path / "bank.safetensors"
    with atomic.locked(path), pytest.raises(LockedError, match="another process"), atomic.locked(path):
        pass
    with atomic.locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    """A stale temporary file and a stale lock do not outlive the next edit."""
    path = tmp_path / "bank.safetensors"
    atomic.temporary_path(path).write_bytes(b"half")
    (tmp_path / ".bank.safetensors.lock").touch()
    with atomic.locked(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_absent_folder_other_file_and_wrong_suffix_have_their_own_messages(
    tmp_path: Path, make_bank: BankMaker
) -> None:
    """Each wrong path says what is wrong with it."""
    with pytest.raises(BankNotFoundError, match="gmem-bank build"):
        open_bank(tmp_path / "none.safetensors")
    with pytest.raises(FormatError, match="folder"):
        open_bank(tmp_path)
    (tmp_path / "text.safetensors").write_text("hello, this is not a bank at all")
    with pytest.raises(CorruptError, match="not a safetensors file"):
        open_bank(tmp_path / "text.safetensors")
    stored = make_bank().stored
    with pytest.raises(FormatError, match=r"ends in \.safetensors"):
        write(tmp_path / "bank.bin", stored.header, {})
