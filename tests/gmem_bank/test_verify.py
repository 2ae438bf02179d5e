"""verify: any changed byte is found."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gmem_bank.errors import GMemError
from gmem_bank.storage import Payload, write
from gmem_bank.verifier import verify
from tests.conftest import BankMaker


def test_a_sound_bank_has_no_problems(make_bank: BankMaker) -> None:
    """Every kind of stored type verifies."""
    for dtype in ("f32", "f16", "bf16"):
        report = verify(make_bank(f"{dtype}.safetensors", dtype=dtype, parts=(5, 15)).path)
        assert report.problems == []
        assert report.num_rows == 20


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(make_bank: BankMaker, place: float, bit: int) -> None:
    """Opening refuses the file, or verify names a problem; only the header's padding and text between fields is free."""
    path = make_bank().path
    data = bytearray(path.read_bytes())
    position = int(place * len(data))
    data[position] ^= 1 << bit
    path.write_bytes(data)
    try:
        report = verify(path)
    except GMemError:
        return
    assert not report.ok


def test_wrong_content_with_right_hashes_is_found(make_bank: BankMaker) -> None:
    """A writer with a bug leaves hashes that fit: norms, key tables and concepts are checked themselves."""
    bank = make_bank()
    payloads = bank.stored.payloads()
    wrong = {
        "0/snippets": bank.stored.array("0/snippets") * np.float32(2),
        "keys.hash": np.sort(bank.stored.array("keys.hash") + np.uint64(1)),
        "keys.row": bank.stored.array("keys.row")[::-1].copy(),
        "concepts.rows": bank.stored.array("concepts.rows")[::-1].copy(),
        "0/source": np.full(20, 9, np.uint32),
    }
    for name, array in wrong.items():
        write("wrong.safetensors", bank.header, {**payloads, name: Payload.of(array)})
        assert not verify("wrong.safetensors").ok, name
