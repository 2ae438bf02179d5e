"""Every kind of bank in every form: the contract, and values by the words of the format alone."""

from __future__ import annotations

import numpy as np
import pytest

from gmem_bank import factors, kinds
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import CorruptError, FormatError
from gmem_bank.interface import Bank, SupportsConcepts, SupportsFactors, SupportsImages
from gmem_bank.kinds import FactoredBank
from gmem_bank.rewrite import save
from gmem_bank.segments import Gatherer, widen
from gmem_bank.storage import Payload, write
from tests.conftest import BankMaker, normalised, stored_oracle
from tests.contracts import BankContract

KINDS = [
    *(("dense", dtype) for dtype in ("f32", "f16", "bf16")),
    *(("factored", dtype) for dtype in ("f32", "f16", "i8")),
    *(("sparse", dtype) for dtype in ("f32", "f16", "i8")),
]
FORMS = ["bank.safetensors", "bank.h5", "bank.gmem"]
ACTIVE = np.arange(20) % 5 != 1


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
@pytest.mark.parametrize("form", FORMS)
class TestEveryKindInEveryForm(BankContract):
    """Two segments, some rows masked."""

    @pytest.fixture
    def bank(self, make_bank: BankMaker, kind: str, dtype: str, form: str) -> MemoryBank:
        return make_bank(form, kind=kind, dtype=dtype, parts=(13, 7), active=ACTIVE)

    @pytest.fixture
    def expected(self, bank: MemoryBank) -> np.ndarray:
        return stored_oracle(bank)

    @pytest.fixture
    def tolerance(self) -> float:
        return 1e-6

    def test_the_capabilities_are_those_of_the_kind(self, bank: MemoryBank, kind: str) -> None:
        """Only a factored bank offers factors."""
        assert isinstance(bank, SupportsConcepts)
        assert isinstance(bank, SupportsImages)
        assert isinstance(bank, SupportsFactors) == (kind != "dense")

    def test_factors_rebuild_the_snippets_and_obey_the_mask(
        self, bank: MemoryBank, expected: np.ndarray, kind: str
    ) -> None:
        """(c·B + μ)·inv_norm is the snippet, for whoever multiplies on a device of their own."""
        if not isinstance(bank, FactoredBank):
            return
        rows = bank.rows()[::-1]
        rebuilt = bank.coefficients(rows).astype(np.float64) @ bank.basis + bank.mean
        np.testing.assert_allclose(rebuilt * bank.inv_norms(rows)[:, None], expected[rows], atol=1e-6)
        with pytest.raises(IndexError, match="masked"):
            bank.coefficients(np.array([1]))
        assert not bank.basis.flags.writeable


def test_quantised_values_stay_close_to_the_exact_ones(make_bank: BankMaker) -> None:
    """i8 coefficients are off by at most half a scale each; f16 by their rounding."""
    exact = make_bank("a.safetensors", kind="factored", dtype="f32", space="raw")
    rows = exact.rows()
    coarse = make_bank("b.safetensors", kind="factored", dtype="i8", space="raw")
    assert isinstance(exact, FactoredBank)
    assert isinstance(coarse, FactoredBank)
    scale = np.abs(exact.coefficients(rows)).max(axis=0) / 127
    off = np.abs(coarse.coefficients(rows) - exact.coefficients(rows))
    assert (off <= scale / 2 * (1 + 1e-5)).all()
    assert off.max() > 0


@pytest.mark.parametrize("form", FORMS)
def test_saving_to_another_form_and_back_keeps_every_byte(make_bank: BankMaker, form: str) -> None:
    """convert is exact both ways, for every kind."""
    for number, (kind, dtype) in enumerate(KINDS):
        bank = make_bank(f"{number}.safetensors", kind=kind, dtype=dtype, parts=(5, 15), active=ACTIVE)
        save(bank, f"{number}-there-{form}")
        other = kinds.open(f"{number}-there-{form}")
        assert other.fingerprint == bank.fingerprint
        np.testing.assert_array_equal(other.snippets(other.rows()), bank.snippets(bank.rows()))
        save(other, f"{number}-back.safetensors")
        assert kinds.open(f"{number}-back.safetensors").path.read_bytes() == bank.path.read_bytes()


@pytest.mark.parametrize("dtype", ["<f4", "<f2", "<u2"])
def test_pytorch_and_numpy_gather_the_same_bits(dtype: str) -> None:
    """Whoever widens the values, they are the same."""
    rng = np.random.default_rng(0)
    stored = rng.standard_normal((400, 256)).astype(np.float32)
    stored = (stored.view(np.uint32) >> 16).astype(dtype) if dtype == "<u2" else stored.astype(dtype)
    stored.flags.writeable = False
    rows = rng.integers(0, 400, 300)
    np.testing.assert_array_equal(Gatherer(stored)(rows), widen(stored[rows]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize(("kind", "dtype"), KINDS[:3] + KINDS[3:5])
def test_a_bad_value_is_found_whenever_its_row_is_asked_for(
    make_bank: BankMaker, kind: str, dtype: str, count: int, value: float
) -> None:
    """Rows are looked at once each, so a bad one is found at its first gather and at every later one."""
    bank = make_bank("good.safetensors", rows=30, dim=256, kind=kind, dtype=dtype)
    entry = "0/snippets" if kind == "dense" else "0/coefficients"
    stored = np.array(bank.stored.array(entry))
    bits = np.array([value], np.float32).view(np.uint32)[0] >> 16
    stored[7, 3] = bits if stored.dtype == np.uint16 else value
    payload = Payload.of(stored, "BF16" if dtype == "bf16" else None)
    write("odd.safetensors", bank.header, bank.stored.payloads() | {entry: payload})
    odd = kinds.open("odd.safetensors")
    good = np.setdiff1d(np.arange(30), [7])
    for _ in range(2):
        odd.snippets(np.resize(good, count))
        for _ in range(2):
            with pytest.raises(CorruptError, match="row 7") as caught:
                odd.snippets(np.append(np.resize(good, count), 7))
            assert caught.value.row == 7


def test_reading_is_the_same_with_and_without_pytorch_loaded(make_bank: BankMaker) -> None:
    """A process that never loads PyTorch reads the same bits."""
    import subprocess
    import sys

    bank = make_bank(rows=400, dim=256, dtype="f16")
    code = (
        "import gmem_bank, hashlib, sys\n"
        "if sys.argv[1] == 'torch': import torch\n"
        "bank = gmem_bank.open('bank.safetensors')\n"
        "assert ('torch' in sys.modules) == (sys.argv[1] == 'torch')\n"
        "print(hashlib.sha256(bank.snippets(bank.rows()).tobytes()).hexdigest())\n"
    )
    digests = {
        subprocess.run([sys.executable, "-c", code, word], capture_output=True, text=True, check=True).stdout
        for word in ("torch", "none")
    }
    assert len(digests) == 1
    assert len(bank) == 400


# -- what only factored banks can get wrong


def factored_with(make_bank: BankMaker, **entries: np.ndarray) -> MemoryBank:
    """A factored bank with some of its entries replaced."""
    bank = make_bank("good.safetensors", kind="factored")
    payloads = bank.stored.payloads() | {name.replace("__", "/"): Payload.of(array) for name, array in entries.items()}
    write("odd.safetensors", bank.header, payloads)
    return kinds.open("odd.safetensors")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"basis": np.zeros((9, 8), np.float32)}, "basis has 9 rows"),
        ({"basis": np.zeros((3, 8), np.float32)}, "4 columns for a basis of 3 rows"),
        ({"basis": np.zeros((4, 7), np.float32)}, "expected F32 of shape any×8"),
        ({"mean": np.zeros(7, np.float32)}, "mean"),
        ({"singular_values": np.zeros(3, np.float32)}, "singular_values"),
        ({"0__coefficients": np.zeros((20, 4), np.int8)}, "scales of i8 coefficients, is missing"),
        ({"0__scale": np.ones(4, np.float32)}, "belongs to i8"),
        ({"0__coefficients": np.zeros((20, 4), np.int8), "0__scale": np.ones(3, np.float32)}, "one scale for each"),
    ],
)
def test_entries_that_do_not_fit_together_are_refused(
    make_bank: BankMaker, entries: dict[str, np.ndarray], message: str
) -> None:
    """Ranks, columns and scales are checked against one another before anything is read."""
    with pytest.raises(FormatError, match=message):
        factored_with(make_bank, **entries)


def test_an_index_beyond_the_rank_is_damage(make_bank: BankMaker) -> None:
    """A kept coefficient that the basis does not have is never read as another."""
    bank = make_bank("good.safetensors", kind="sparse")
    index = np.array(bank.stored.array("0/index"))
    index[3, 1] = 4
    write("odd.safetensors", bank.header, bank.stored.payloads() | {"0/index": Payload.of(index)})
    odd = kinds.open("odd.safetensors")
    with pytest.raises(CorruptError, match="coefficient 4 of 4"):
        odd.snippets(np.array([3]))


# -- the arithmetic


def test_growing_reaches_what_projection_loses_and_keeps_the_old_rows() -> None:
    """New directions bring every snippet above the threshold; the old basis stays bit for bit, and orthonormal with the new."""
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.standard_normal((32, 6)))[0].T.astype(np.float32)
    mean = rng.standard_normal(32).astype(np.float32) / 10
    inside = (rng.standard_normal((40, 6)) @ basis + mean).astype(np.float32)
    fresh = (rng.standard_normal((40, 2)) @ rng.standard_normal((2, 32))).astype(np.float32)
    both32 = np.vstack([inside, fresh])
    grown = factors.grow(lambda: [both32[:7], both32[7:]], basis, mean, below=0.999)
    np.testing.assert_array_equal(grown.basis[:6], basis)
    assert len(grown.basis) in (8, 9)  # two planted directions, and what of the mean they miss
    wide = grown.basis.astype(np.float64)
    np.testing.assert_allclose(wide @ wide.T, np.eye(len(wide)), atol=1e-6)
    rebuilt = factors.project(both32, grown.basis, mean).astype(np.float64) @ wide + mean
    both = both32.astype(np.float64)
    cosines = (normalised(rebuilt, "unit") * normalised(both, "unit")).sum(axis=1)
    assert cosines.min() >= 0.999
    by_projection = (both - mean) @ basis.T.astype(np.float64) @ basis + mean
    before = (normalised(by_projection, "unit") * normalised(both, "unit")).sum(axis=1)
    np.testing.assert_allclose(grown.cosines_before, before, atol=1e-6)
    assert before[40:].max() < 0.9
    assert len(factors.grow(lambda: [inside], basis, mean, below=0.999).basis) == 6
    assert len(factors.grow(lambda: [fresh], basis, mean, below=-1).basis) == 6


def test_growing_takes_the_fewest_directions_however_many_rows_there_are() -> None:
    """Of many rows, in blocks, the directions and their number are those that all residuals at once give."""
    rng = np.random.default_rng(6)
    basis = np.linalg.qr(rng.standard_normal((12, 3)))[0].T.astype(np.float32)
    mean = rng.standard_normal(12).astype(np.float32)
    rows = (rng.standard_normal((500, 12)) * np.geomspace(3, 0.03, 12)).astype(np.float32)
    grown = factors.grow(lambda: np.array_split(rows, 9), basis, mean, below=0.98)
    wide, centred = basis.astype(np.float64), rows.astype(np.float64) - mean
    inside = centred @ wide.T @ wide
    short = factors.cosines(rows, inside + mean) < 0.98
    directions = np.linalg.svd((centred - inside)[short])[2]
    for count in range(10):
        both = np.vstack([wide, directions[:count]])
        if factors.cosines(rows, centred @ both.T @ both + mean).min() >= 0.98:
            break
    assert len(grown.basis) == 3 + count < 12
    assert short.sum() > 24
    np.testing.assert_allclose(np.abs(np.vecdot(grown.basis[3:], directions[:count])), 1, atol=1e-6)


def test_inverse_norms_are_those_of_the_reconstructions() -> None:
    """The closed form by orthonormality equals the norm of what is rebuilt."""
    rng = np.random.default_rng(6)
    basis = np.linalg.qr(rng.standard_normal((16, 5)))[0].T.astype(np.float32)
    mean, coefficients = rng.standard_normal(16).astype(np.float32), rng.standard_normal((30, 5)).astype(np.float32)
    rebuilt = coefficients.astype(np.float64) @ basis + mean
    np.testing.assert_allclose(
        factors.inverse_norms(coefficients, basis, mean), 1 / np.linalg.norm(rebuilt, axis=1), rtol=1e-6
    )


def test_a_third_party_needs_only_the_interface(make_bank: BankMaker) -> None:
    """Every kind passes for the protocol that a generator sees."""
    for kind, dtype in KINDS:
        assert isinstance(make_bank(f"{kind}-{dtype}.h5", kind=kind, dtype=dtype), Bank)
