"""The container: read back by the safetensors package, and never trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from gmem_bank.errors import CorruptError, FormatError, GMemError
from gmem_bank.storage import container, open_stored
from gmem_bank.storage.safetensors_store import read_container
from gmem_bank.storage.stored import OpenFile
from tests.conftest import BankMaker


def test_safetensors_package_reads_our_file(make_bank: BankMaker) -> None:
    """Every entry has the same values through the safetensors package."""
    bank = make_bank(parts=(12, 8))
    theirs = load_file(bank.path)
    assert set(theirs) == set(bank.stored.names())
    for name, values in theirs.items():
        np.testing.assert_array_equal(values, bank.stored.array(name))


def test_we_parse_a_file_of_the_safetensors_package() -> None:
    """A file written by the package parses to the same shapes and bytes."""
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(3, dtype=np.int64)}
    data = save(arrays, metadata={"k": "v"})
    length = container.header_bytes_of(data[:8], len(data))
    parsed = container.parse(data[8 : 8 + length], len(data))
    assert parsed.metadata == {"k": "v"}
    for name, array in arrays.items():
        entry = parsed.entries[name]
        raw = data[parsed.data_start + entry.begin : parsed.data_start + entry.end]
        np.testing.assert_array_equal(np.frombuffer(raw, array.dtype).reshape(entry.shape), array)


def test_data_starts_on_64_bytes_and_entries_are_aligned_to_their_items(make_bank: BankMaker) -> None:
    """Data starts 64-byte aligned and no entry straddles its item size."""
    bank = make_bank(rows=7, keys=[f"k{i}/é{i}" for i in range(7)])
    parsed = read_container(OpenFile(bank.path))
    assert parsed.data_start % 64 == 0
    for entry in parsed.entries.values():
        assert (parsed.data_start + entry.begin) % container.ITEM_SIZE[entry.dtype] == 0


@given(data=st.data())
def test_any_damage_to_a_file_is_a_clear_error_or_harmless(
    make_bank: BankMaker, tmp_path: Path, data: st.DataObject
) -> None:
    """A file cut, grown or with a byte of its header flipped raises one of our errors or opens."""
    original = make_bank().path.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "grow", "flip", "length"]))
    damaged = bytearray(original)
    header_end = 8 + int.from_bytes(original[:8], "little")
    if kind == "cut":
        damaged = damaged[: data.draw(st.integers(0, len(original) - 1))]
    elif kind == "grow":
        damaged += b"\0" * data.draw(st.integers(1, 100))
    elif kind == "flip":
        damaged[data.draw(st.integers(8, header_end - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        damaged[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(damaged)
    try:
        open_stored(path)
    except GMemError as error:
        assert isinstance(error, FormatError)
        assert str(path) in str(error)
    else:
        assert kind in ("flip", "length")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775807,9],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"__metadata__":{"a":1}}',
        b"[" * 100_000,
    ],
)
def test_impossible_headers_are_refused(header: bytes) -> None:
    """A header that contradicts itself or the file is corrupt."""
    with pytest.raises(CorruptError):
        container.parse(header, 8 + len(header) + 4)
