"""Official banks: values in and out against NumPy, and files that lie."""

from __future__ import annotations

import pickle
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch

from gmem_bank import legacy_export, official
from gmem_bank.errors import (
    BankNotFoundError,
    ConfigError,
    CorruptError,
    EncoderMismatchError,
    FormatError,
    GMemError,
    OutputExistsError,
)
from gmem_bank.kinds import DenseBank, FactoredBank
from gmem_bank.kinds import open as open_bank
from gmem_bank.legacy import import_official
from gmem_bank.legacy_export import export_official, to_official
from gmem_bank.ops import mask, remove
from gmem_bank.provenance import EncoderSpec, sha256_of_file
from gmem_bank.selection import Selection
from gmem_bank.storage import Payload, write
from gmem_bank.verifier import verify
from tests.conftest import DATA, BankMaker, stored_oracle

LEGACY = DATA / "legacy"
SPEC = EncoderSpec(name="mine", family="made-up", dim=96, space="unit")


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    """What the published code computed from these very files."""
    return load_file(LEGACY / "memory_bank.safetensors")


@pytest.fixture
def full() -> Path:
    return Path(shutil.copy(LEGACY / "full_bank.pth", "full_bank.pth"))


@pytest.fixture
def dmd() -> Path:
    return Path(shutil.copy(LEGACY / "dmd_bank.pth", "dmd_bank.pth"))


def factors(rows: int = 30, dim: int = 12, rank: int = 5, seed: int = 0) -> dict[str, Any]:
    """A factored bank as the published code makes it: SVD of centred rows, the roots of S shared out."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal((rows, dim)) + rng.standard_normal(dim)
    mean = values.mean(axis=0)
    U, S, Vt = np.linalg.svd(values - mean, full_matrices=False)
    root = np.sqrt(S[:rank])
    tensors = {"C": U[:, :rank] * root, "M": Vt[:rank].T * root, "S": S[:rank], "mean": mean}
    return {name: torch.tensor(t, dtype=torch.float32) for name, t in tensors.items()} | {
        "latent_dim": rank,
        "feature_dim": dim,
    }


def published(record: dict[str, Any]) -> np.ndarray:
    """The (N, D) snippets of a factored bank by the published formula, in float64."""
    C, M, mean = (np.asarray(record[name], np.float64) for name in ("C", "M", "mean"))
    return C @ M.T + mean


def saved(value: object, name: str = "bank.pth") -> Path:
    torch.save(value, name)
    return Path(name)


def snippets(path: str | Path = "bank.safetensors") -> np.ndarray:
    bank = open_bank(path)
    return bank.snippets(bank.rows())


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


# -- import


def test_a_dense_file_gives_its_rows_bit_for_bit(full: Path, golden: dict[str, np.ndarray]) -> None:
    """The published dense bank comes in as it is, under keys of its file's name, from a source with its hash."""
    report = import_official(full, "banks/new.safetensors")
    bank = open_bank("banks/new.safetensors")
    assert isinstance(bank, DenseBank)
    np.testing.assert_array_equal(snippets(bank.path), golden["bank"])
    assert (bank.space, bank.dim, len(bank)) == ("raw", 96, 500)
    assert bank.keys(np.array([0, 7, 499])) == ["full_bank/000", "full_bank/007", "full_bank/499"]
    digest = sha256_of_file(full)
    source = bank.sources[0]
    assert (source.kind, source.path, source.prefix) == ("array", "../full_bank.pth", "full_bank/")
    assert (source.digest, source.num_images) == (digest, 500)
    assert (bank.encoder.name, bank.encoder.family) == ("unknown", f"imported:{digest[:16]}")
    assert [(entry["operation"], entry["num_rows"]) for entry in bank.history] == [("import", 500)]
    assert verify(bank.path).problems == []
    assert (report.num_added, report.num_rows, report.unchanged) == (500, 500, False)
    assert report.fingerprint == bank.fingerprint


def test_unit_space_normalises(full: Path, golden: dict[str, np.ndarray]) -> None:
    """In unit space each row is the file's, divided by its norm."""
    torch.save(torch.from_numpy(golden["bank"] * 3), "scaled.pth")
    import_official("scaled.pth", space="unit")
    wide = golden["bank"].astype(np.float64)
    np.testing.assert_allclose(snippets(), wide / np.linalg.norm(wide, axis=1, keepdims=True), atol=1e-6)
    assert open_bank("bank.safetensors").encoder.space == "unit"


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_a_dense_file_is_narrowed(full: Path, golden: dict[str, np.ndarray], dtype: str) -> None:
    """Narrow types are those of NumPy and torch, rounded to nearest."""
    import_official(full, dtype=dtype)
    torch_dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]
    np.testing.assert_array_equal(snippets(), torch.from_numpy(golden["bank"]).to(torch_dtype).float().numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_tensors_of_other_floats_are_read(dtype: torch.dtype) -> None:
    """Any type of floats, and any order of the values in memory, is brought to float32."""
    values = torch.from_numpy(np.random.default_rng(0).standard_normal((9, 5))).to(dtype)
    path = saved(values.t().contiguous().t())
    import_official(path)
    np.testing.assert_array_equal(snippets(), values.float().numpy())
    import_official(path, dtype="f16", overwrite=True)
    np.testing.assert_array_equal(snippets(), values.float().half().float().numpy())


def test_a_factored_file_gives_the_published_reconstruction(dmd: Path, golden: dict[str, np.ndarray]) -> None:
    """Snippets are those that the published code reconstructs, to 1e-6, and the bank is a sound factored one."""
    report = import_official(dmd)
    bank = open_bank("bank.safetensors")
    assert isinstance(bank, FactoredBank)
    np.testing.assert_allclose(snippets(), golden["dmd.recon"], atol=1e-6)
    assert verify(bank.path).problems == []
    assert bank.rank == 16
    assert report.details["dropped_components"] == 0
    assert report.details["reorthonormalised"] is False


def test_factors_are_those_of_an_svd(dmd: Path, golden: dict[str, np.ndarray]) -> None:
    """Basis, singular values and coefficients are U·S and V of the centred rows, the largest entry of each row positive."""
    import_official(dmd)
    bank = open_bank("bank.safetensors")
    assert isinstance(bank, FactoredBank)
    wide = golden["bank"].astype(np.float64)
    U, S, Vt = np.linalg.svd(wide - wide.mean(axis=0), full_matrices=False)
    V, coefficients = Vt[:16], (U * S)[:, :16]
    signs = np.array([np.sign(row[np.abs(row).argmax()]) for row in V])
    np.testing.assert_allclose(bank.mean, wide.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(bank.singular_values, S[:16], rtol=1e-5)
    np.testing.assert_allclose(bank.basis, V * signs[:, None], atol=1e-4)
    np.testing.assert_allclose(bank.coefficients(bank.rows()), coefficients * signs, atol=1e-4)
    np.testing.assert_allclose(bank.basis @ bank.basis.T, np.eye(16), atol=5e-6)
    assert (np.take_along_axis(bank.basis, np.abs(bank.basis).argmax(axis=1)[:, None], axis=1) > 0).all()


def test_a_factored_file_in_unit_space_and_f16(dmd: Path, golden: dict[str, np.ndarray]) -> None:
    """Space and type of the coefficients are the caller's choice."""
    import_official(dmd, space="unit", dtype="f16")
    wide = golden["dmd.recon"].astype(np.float64)
    assert open_bank("bank.safetensors").stored.dtype("0/coefficients") == "F16"
    np.testing.assert_allclose(snippets(), wide / np.linalg.norm(wide, axis=1, keepdims=True), atol=1e-3)


def test_a_factored_file_in_i8(dmd: Path, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each coefficient is off by half a scale at most, the scale being the 127th part of the largest in its column."""
    import_official(dmd, "exact.safetensors")
    exact = open_bank("exact.safetensors")
    assert isinstance(exact, FactoredBank)
    wide = exact.coefficients(exact.rows())
    for module in (official, legacy_export):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 16 * 7)
    import_official(dmd, dtype="i8")
    bank = open_bank("bank.safetensors")
    assert isinstance(bank, FactoredBank)
    scale = np.abs(wide).max(axis=0) / 127
    np.testing.assert_allclose(bank.stored.array("0/scale"), scale, rtol=1e-6)
    assert (np.abs(bank.coefficients(bank.rows()) - wide) <= scale * 0.5001).all()
    assert verify(bank.path).ok


def test_a_singular_value_of_zero_is_dropped() -> None:
    """The published code divides by it and stores NaN for rows added later; the component holds nothing, so it goes."""
    record = factors()
    record["S"][3] = 0
    record["M"][:, 3] = 0
    expected = published(record)
    record["C"][-1, 3] = torch.nan
    report = import_official(saved(record))
    bank = open_bank("bank.safetensors")
    np.testing.assert_allclose(snippets(), expected, atol=1e-6)
    assert isinstance(bank, FactoredBank)
    assert (bank.rank, report.details["dropped_components"]) == (4, 1)
    np.testing.assert_allclose(bank.singular_values, np.delete(record["S"].numpy(), 3), rtol=1e-7)
    assert verify(bank.path).ok


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("what", ["tilted", "dependent", "wrong S", "S of zero"])
def test_a_basis_that_is_none_is_made_one(what: str, seed: int) -> None:
    """Whatever M and S are, snippets stay C·Mᵀ + mean and the basis becomes orthonormal."""
    record, rng = factors(seed=seed), np.random.default_rng(seed)
    if what == "tilted":
        record["M"] += torch.from_numpy(rng.standard_normal((12, 5)).astype(np.float32))
    elif what == "dependent":
        record["M"][:, 4] = 2 * record["M"][:, 1]
    elif what == "wrong S":
        record["S"] *= torch.from_numpy(rng.uniform(0.5, 2, 5).astype(np.float32))
    else:
        record["S"][2] = 0
    report = import_official(saved(record))
    bank = open_bank("bank.safetensors")
    assert isinstance(bank, FactoredBank)
    np.testing.assert_allclose(snippets(), published(record), atol=1e-5)
    np.testing.assert_allclose(bank.basis @ bank.basis.T, np.eye(bank.rank), atol=1e-6)
    assert bank.rank == (4 if what == "dependent" else 5)
    assert report.details["reorthonormalised"] is True
    assert bank.singular_values is None
    assert verify(bank.path).ok
    assert (np.take_along_axis(bank.basis, np.abs(bank.basis).argmax(axis=1)[:, None], axis=1) > 0).all()


def test_halved_factors_are_made_orthonormal() -> None:
    """Factors that someone stored as float16 are off by 1e-3: their snippets still come in to float32 rounding."""
    record = {name: t.half() if isinstance(t, torch.Tensor) else t for name, t in factors().items()}
    report = import_official(saved(record))
    assert report.details["reorthonormalised"] is True
    np.testing.assert_allclose(snippets(), published(record), atol=1e-5)
    assert verify("bank.safetensors").ok


def test_an_ordered_dictionary_and_a_rank_that_was_cut_are_official_too() -> None:
    """The published reader refuses its own OrderedDict; its writer notes the rank that was asked for, not the one it gave."""
    record = OrderedDict(factors(rows=6, dim=12, rank=6) | {"latent_dim": 64})
    import_official(saved(record))
    np.testing.assert_allclose(snippets(), published(record), atol=1e-6)


def test_rows_come_in_blocks(monkeypatch: pytest.MonkeyPatch, full: Path, dmd: Path, golden: dict[str, Any]) -> None:
    """Many blocks give the bytes that one gives, in both directions, and a bad row in a later block is named."""
    import_official(full, "a.safetensors")
    import_official(dmd, "b.safetensors")
    export_official(open_bank("b.safetensors"), "c.safetensors")
    for module in (official, legacy_export):
        monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 96 * 7)
    import_official(full, "a7.safetensors")
    import_official(dmd, "b7.safetensors")
    export_official(open_bank("b7.safetensors"), "c7.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("a7.safetensors").read_bytes()
    assert Path("b.safetensors").read_bytes() == Path("b7.safetensors").read_bytes()
    one, many = load_file("c.safetensors"), load_file("c7.safetensors")
    for name, values in one.items():
        np.testing.assert_allclose(values, many[name], rtol=1e-6)
    bad = golden["bank"].copy()
    bad[321, 5] = np.inf
    with pytest.raises(CorruptError, match="row 321"):
        import_official(saved(torch.from_numpy(bad)), "bad.safetensors")


# -- who made it, and doing it twice


def test_two_files_never_pass_as_made_by_one_encoder(full: Path, dmd: Path) -> None:
    """The unknown encoders of two files have different fingerprints, unless the caller names the encoder of both."""
    import_official(full, "a.safetensors")
    import_official(dmd, "b.safetensors")
    first, second = (open_bank(f"{name}.safetensors").encoder.fingerprint for name in "ab")
    assert first != second
    import_official(full, "a.safetensors", encoder_spec=SPEC, overwrite=True)
    import_official(dmd, "b.safetensors", encoder_spec=SPEC, overwrite=True)
    for name in "ab":
        bank = open_bank(f"{name}.safetensors")
        assert (bank.encoder.fingerprint, bank.space) == (SPEC.fingerprint, "unit")


def test_a_given_encoder_must_fit(full: Path) -> None:
    """A spec of another dimension is refused; an explicit space wins over the spec's."""
    with pytest.raises(EncoderMismatchError, match=r"full_bank\.pth.*dimension 96.*mine \(dim 7"):
        import_official(full, encoder_spec=EncoderSpec(name="mine", family="f", dim=7, space="raw"))
    import_official(full, encoder_spec=SPEC, space="raw", prefix="cats")
    bank = open_bank("bank.safetensors")
    assert (bank.space, bank.encoder.space, bank.encoder.name) == ("raw", "raw", "mine")
    assert bank.keys(np.array([3])) == ["cats/003"]


def test_the_published_double_ending_stays_out_of_the_keys(full: Path) -> None:
    """The published configurations name banks .pth.pth."""
    import_official(full.rename("cls.pth.pth"))
    assert open_bank("bank.safetensors").keys(np.array([0])) == ["cls/000"]


def test_the_same_import_again_does_nothing(full: Path, dmd: Path) -> None:
    """A finished import is recognised by file and settings; anything else is refused, or replaced on request."""
    first = import_official(full)
    before = Path("bank.safetensors").read_bytes()
    again = import_official(full)
    assert (again.unchanged, again.num_added, again.fingerprint) == (True, 0, first.fingerprint)
    assert Path("bank.safetensors").read_bytes() == before
    for path, options in ((dmd, {}), (full, {"space": "unit"}), (full, {"dtype": "f16"}), (full, {"prefix": "x"})):
        with pytest.raises(OutputExistsError, match="overwrite"):
            import_official(path, **options)
    remove("bank.safetensors", Selection(keys=("full_bank/007",)))
    with pytest.raises(OutputExistsError):
        import_official(full)
    import_official(full, overwrite=True)
    assert Path("bank.safetensors").read_bytes() == before


def test_something_else_at_the_output_stays(full: Path) -> None:
    """A file that is no bank is not overwritten without asking."""
    Path("bank.safetensors").write_text("mine")
    with pytest.raises(OutputExistsError):
        import_official(full)
    assert Path("bank.safetensors").read_text() == "mine"


@pytest.mark.parametrize("form", ["bank.h5", "bank.gmem"])
def test_every_form_of_bank_can_be_written(dmd: Path, golden: dict[str, np.ndarray], form: str) -> None:
    """The suffix of the output names the store."""
    import_official(dmd, form)
    np.testing.assert_allclose(snippets(form), golden["dmd.recon"], atol=1e-6)


# -- files that lie


def changed(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: factors() | changes


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in factors().items() if key != name}


def poisoned(name: str, value: float, *place: int) -> dict[str, Any]:
    record = factors()
    record[name][place] = value
    return record


BAD = {
    "list": (lambda: [torch.ones(2, 2)], "not list"),
    "number": (lambda: 3, "not int"),
    "integers": (lambda: torch.ones(4, 3, dtype=torch.int64), r"torch\.int64 of shape \[4, 3\]"),
    "complex": (lambda: torch.ones(4, 3, dtype=torch.complex64), "complex64"),
    "vector": (lambda: torch.ones(4), r"shape \[4\]"),
    "no rows": (lambda: torch.ones(0, 3), r"shape \[0, 3\]"),
    "no columns": (lambda: torch.ones(3, 0), r"shape \[3, 0\]"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "the tensor is Tensor"),
    "without storage": (lambda: torch.ones(3, 2, device="meta"), "the tensor is Tensor"),
    "expanded": (lambda: torch.ones(1, 1).expand(10**6, 10**6), "more than the file can hold"),
    "state of a model": (lambda: {"layer.weight": torch.ones(2, 2)}, r"not \['layer.weight'\]"),
    "numbered keys": (lambda: {1: torch.ones(2, 2)}, r"not \['1'\]"),
    "no M": (lambda: without("M"), "dictionary of"),
    "one too many": (changed(extra=1), "'extra'"),
    "M is a list": (changed(M=[1.0]), "M is list"),
    "S is integers": (changed(S=torch.ones(5, dtype=torch.int32)), "S is torch.int32"),
    "C is one row": (changed(C=torch.ones(5)), r"C is .* shape \[5\]"),
    "M is turned": (changed(M=torch.ones(5, 12)), r"M has shape \[5, 12\]"),
    "M has another rank": (changed(M=torch.ones(12, 4)), r"M has shape \[12, 4\], expected \[12, 5\]"),
    "S is short": (changed(S=torch.ones(4)), r"S has shape \[4\], expected \[5\]"),
    "mean is long": (changed(mean=torch.ones(13)), r"mean has shape \[13\], expected \[12\]"),
    "more components than dimensions": (
        changed(C=torch.ones(30, 13), M=torch.ones(12, 13), S=torch.ones(13), latent_dim=13), r"M has shape \[12, 13\]",
    ),
    "latent_dim below": (changed(latent_dim=4), "latent_dim is 4, but C and M have 5 columns"),
    "latent_dim above": (changed(latent_dim=6), "latent_dim is 6"),
    "latent_dim is text": (changed(latent_dim="5"), "latent_dim is '5'"),
    "latent_dim is two": (changed(latent_dim=torch.tensor([5, 5])), "latent_dim is tensor"),
    "latent_dim is a float": (changed(latent_dim=torch.tensor(5.0)), "latent_dim is tensor"),
    "feature_dim": (changed(feature_dim=13), "feature_dim is 13"),
    "feature_dim is true": (changed(feature_dim=True), "feature_dim is True"),
    "M not finite": (lambda: poisoned("M", np.nan, 3, 1), "M has values"),
    "mean not finite": (lambda: poisoned("mean", np.inf, 3), "mean has values"),
    "S below zero": (lambda: poisoned("S", -1.0, 2), "S has values"),
    "C not finite": (lambda: poisoned("C", np.nan, 17, 2), "row 17: its snippet is not finite"),
    "no component": (changed(M=torch.zeros(12, 5), S=torch.zeros(5)), "all its rows are the mean"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_official_bank_is_refused(name: str) -> None:
    """The message names the file and what is wrong in it; nothing is left behind."""
    make, message = BAD[name]
    path = saved(make())
    with pytest.raises(FormatError, match=message) as caught:
        import_official(path)
    assert str(caught.value).startswith("bank.pth: ")
    assert files() == ["bank.pth"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_a_value_that_is_not_finite_names_its_row(value: float) -> None:
    """Also one that is finite in the file's float64 and not in float32."""
    values = torch.ones(8, 3, dtype=torch.float64)
    values[5, 1] = value
    with pytest.raises(CorruptError, match=r"bank\.pth: row 5: its snippet is not finite") as caught:
        import_official(saved(values))
    assert caught.value.row == 5


def test_a_row_of_zeros_is_refused_where_it_needs_a_direction() -> None:
    """Raw space takes a row of zeros as it is; unit space cannot, of a dense or a factored bank."""
    values = torch.ones(8, 3)
    values[6] = 0
    with pytest.raises(CorruptError, match="row 6: its snippet is all zeros"):
        import_official(saved(values), space="unit")
    import_official("bank.pth")
    np.testing.assert_array_equal(snippets(), values.numpy())
    record = factors()
    record["mean"][:], record["C"][4] = 0, 0
    with pytest.raises(CorruptError, match="row 4: its snippet is all zeros"):
        import_official(saved(record, "f.pth"), "f.safetensors", space="unit")


class Touch:
    """Makes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("touched"),)


@pytest.mark.parametrize("how", ["torch", "torch, in a bank", "torch, old form", "pickle"])
def test_code_in_a_file_is_never_run(how: str) -> None:
    """A file that would run code is refused, whatever its form, and the code does not run."""
    match how:
        case "torch":
            torch.save(Touch(), "bank.pth")
        case "torch, in a bank":
            torch.save(factors() | {"mean": Touch()}, "bank.pth")
        case "torch, old form":
            torch.save(Touch(), "bank.pth", _use_new_zipfile_serialization=False)
        case _:
            Path("bank.pth").write_bytes(pickle.dumps(Touch()))
    with pytest.raises(FormatError, match=r"bank\.pth: .*(nothing in it was executed|never read)"):
        import_official("bank.pth")
    assert files() == ["bank.pth"]
    if how == "pickle":
        pickle.loads(Path("bank.pth").read_bytes())
        assert Path("touched").exists(), "the file does nothing, so this test shows nothing"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_refused(full: Path, share: float) -> None:
    """At whatever place it was cut."""
    full.write_bytes(full.read_bytes()[: int(share * full.stat().st_size)])
    with pytest.raises(FormatError, match=r"full_bank\.pth: .*cut short"):
        import_official(full)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_never_changes_a_value(golden: dict[str, np.ndarray], place: float, bit: int) -> None:
    """Wherever a bit flips, the file is refused or the snippets are still the right ones."""
    data = bytearray((LEGACY / "dmd_bank.pth").read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    Path("flipped.pth").write_bytes(data)
    try:
        import_official("flipped.pth", overwrite=True)
    except GMemError:
        return
    np.testing.assert_allclose(snippets(), golden["dmd.recon"], atol=1e-6)


def test_a_flipped_value_is_found(full: Path) -> None:
    """The archive's sums are checked, since the reader below does not."""
    data = bytearray(full.read_bytes())
    data[len(data) // 2] ^= 1
    full.write_bytes(data)
    with pytest.raises(CorruptError, match=r"'full_bank/data/0' does not match its sum"):
        import_official(full)


def rezipped(path: Path, compression: int, change: Callable[[str, bytes], bytes] = lambda _, data: data) -> Path:
    """Pack a .pth anew, its parts changed."""
    target = path.with_name(f"re-{path.name}")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, change(entry.filename, old.read(entry)))
    return target


def test_a_compressed_archive_is_refused(full: Path, golden: dict[str, np.ndarray]) -> None:
    """A mapping reader would take the compressed bytes for values; the same archive, stored, is read."""
    with pytest.raises(FormatError, match="compressed"):
        import_official(rezipped(full, zipfile.ZIP_DEFLATED))
    import_official(rezipped(full, zipfile.ZIP_STORED))
    np.testing.assert_array_equal(snippets(), golden["bank"])


def test_an_archive_without_sums_is_read() -> None:
    """torch can be told not to compute them."""
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(torch.arange(6.0).reshape(3, 2) + 1)
    finally:
        torch.serialization.set_crc32_options(True)
    import_official(path)
    np.testing.assert_array_equal(snippets(), [[1, 2], [3, 4], [5, 6]])


def test_a_structure_that_lies_about_its_values_is_refused(full: Path) -> None:
    """A shape beyond the stored bytes, and a structure of megabytes, are refused before anything is made of them."""

    def taller(name: str, data: bytes) -> bytes:
        assert data.count(b"M\xf4\x01K\x60") == 1 or not name.endswith(".pkl")
        return data.replace(b"M\xf4\x01K\x60", b"M\xf5\x01K\x60") if name.endswith(".pkl") else data

    with pytest.raises(FormatError, match="nothing in it was executed"):
        import_official(rezipped(full, zipfile.ZIP_STORED, taller))
    with pytest.raises(FormatError, match="more parts than a bank"):
        import_official(saved({f"k{number}": f"{number:01000}" for number in range(2000)}))
    with pytest.raises(FormatError, match="more parts than a bank"):
        import_official(saved({f"k{number}": torch.ones(1) for number in range(80)}))


def test_paths_and_settings_that_cannot_be(full: Path, dmd: Path) -> None:
    """Each has its own error, and leaves no bank."""
    with pytest.raises(BankNotFoundError, match=r"no file at absent\.pth"):
        import_official("absent.pth")
    Path("folder.pth").mkdir()
    with pytest.raises(FormatError, match=r"folder\.pth"):
        import_official("folder.pth")
    with pytest.raises(FormatError, match="a bank ends in"):
        import_official(full, "bank.pt")
    with pytest.raises(ConfigError, match="space"):
        import_official(full, space="cosine")  # type: ignore[arg-type]
    for path, dtype in ((full, "i8"), (dmd, "bf16"), (dmd, "f64")):
        with pytest.raises(ConfigError, match="dtype must be one of"):
            import_official(path, dtype=dtype)
    for prefix in ("", "..", "/etc"):
        with pytest.raises(GMemError, match="leads out of its source"):
            import_official(full, prefix=prefix)
    with pytest.raises(GMemError, match="65504"):
        import_official(saved(torch.full((2, 2), 1e6)), dtype="f16")
    assert not Path("bank.safetensors").exists()


def test_a_failed_import_leaves_the_bank_that_is_there(full: Path) -> None:
    """Overwriting happens wholly or not at all."""
    import_official(full)
    before = Path("bank.safetensors").read_bytes()
    values = torch.ones(4, 2)
    values[3, 0] = torch.nan
    with pytest.raises(CorruptError):
        import_official(saved(values), overwrite=True)
    assert Path("bank.safetensors").read_bytes() == before
    assert files() == ["bank.pth", "bank.safetensors", "full_bank.pth"]


# -- export


@pytest.mark.parametrize("parts", [(20,), (5, 1, 14)])
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("factored", "f32"), ("factored", "f16"), ("factored", "i8"), ("sparse", "f32"), ("sparse", "i8")],
)
def test_official_factors_give_our_reconstruction(
    make_bank: BankMaker, kind: str, dtype: str, parts: tuple[int, ...]
) -> None:
    """C·Mᵀ + mean is the raw reconstruction of the active rows, by the published formula, for every kind of factored bank."""
    active = np.arange(20) % 4 != 1
    bank = make_bank(kind=kind, dtype=dtype, parts=parts, space="raw", active=active)
    record = to_official(bank)
    assert {name: (t.dtype, t.shape) for name, t in record.items()} == {
        "C": (np.float32, (15, 4)), "M": (np.float32, (8, 4)), "S": (np.float32, (4,)), "mean": (np.float32, (8,)),
        "latent_dim": (np.int64, ()), "feature_dim": (np.int64, ()),
    }  # fmt: skip
    assert (int(record["latent_dim"]), int(record["feature_dim"])) == (4, 8)
    np.testing.assert_allclose(published(record), stored_oracle(bank)[active], atol=1e-5)
    np.testing.assert_allclose(record["C"] @ record["M"].T + record["mean"], bank.snippets(bank.rows()), atol=1e-5)


def test_official_factors_keep_the_published_arithmetic(dmd: Path, full: Path, golden: dict[str, np.ndarray]) -> None:
    """Import and export give back the file's own factors up to sign, and its projection of a new snippet."""
    import_official(dmd)
    record = to_official(open_bank("bank.safetensors"))
    theirs = torch.load(dmd, weights_only=True)
    for name in ("C", "M"):
        np.testing.assert_allclose(np.abs(record[name]), theirs[name].abs().numpy(), atol=1e-5)
    np.testing.assert_allclose(record["S"], theirs["S"].numpy(), rtol=1e-5)
    np.testing.assert_allclose(published(record), golden["dmd.recon"], atol=1e-6)
    coefficients = (golden["snippet.in_subspace"] - record["mean"]) @ record["M"] / record["S"]
    np.testing.assert_allclose(np.abs(coefficients), np.abs(golden["dmd.coeff_in"]), atol=1e-5)
    np.testing.assert_allclose(coefficients @ record["M"].T + record["mean"], golden["dmd.add_exact_in"], atol=1e-6)


def test_singular_values_follow_the_rows(make_bank: BankMaker) -> None:
    """After rows went, S is what the rows that are left have, whatever the bank was made with."""
    bank = make_bank(kind="factored", space="raw")
    write(
        "s.safetensors", bank.header, bank.stored.payloads() | {"singular_values": Payload.of(np.ones(4, np.float32))}
    )
    remove("s.safetensors", Selection(patterns=("class0/*",)))
    bank = open_bank("s.safetensors")
    assert isinstance(bank, FactoredBank)
    norms = np.linalg.norm(bank.coefficients(bank.rows()).astype(np.float64), axis=0)
    record = to_official(bank)
    np.testing.assert_allclose(record["S"], norms, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(record["C"], axis=0), np.sqrt(norms), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(record["M"], axis=0), np.sqrt(norms), rtol=1e-5)


def test_a_component_that_no_row_uses_gets_a_size_of_one(make_bank: BankMaker) -> None:
    """No S is zero, so the published projection divides by none."""
    bank = make_bank(kind="factored", space="raw")
    assert isinstance(bank, FactoredBank)
    coefficients = bank.coefficients(bank.rows())
    coefficients[:, 2] = 0
    write("z.safetensors", bank.header, bank.stored.payloads() | {"0/coefficients": Payload.of(coefficients)})
    bank = open_bank("z.safetensors")
    record = to_official(bank)
    assert record["S"][2] == 1
    np.testing.assert_allclose(record["M"][:, 2], bank.basis[2], atol=1e-7)  # type: ignore[attr-defined]
    np.testing.assert_allclose(published(record), stored_oracle(bank), atol=1e-5)


def test_a_unit_bank_exports_what_its_consumers_normalise(make_bank: BankMaker) -> None:
    """The official factors hold the raw reconstruction: divided by its norms it is the bank's snippets."""
    bank = make_bank(kind="factored", space="unit")
    raw = published(to_official(bank))
    assert not np.allclose(np.linalg.norm(raw, axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(raw / np.linalg.norm(raw, axis=1, keepdims=True), bank.snippets(bank.rows()), atol=1e-5)


@pytest.mark.parametrize(("dtype", "space"), [("f32", "unit"), ("f16", "raw"), ("bf16", "unit")])
def test_a_dense_bank_exports_its_active_rows(make_bank: BankMaker, dtype: str, space: str) -> None:
    """One tensor, memory_bank, of the snippets as they are read."""
    active = np.arange(20) != 3
    bank = make_bank(dtype=dtype, space=space, parts=(7, 13), active=active)
    report = export_official(bank, "out/export.safetensors")
    stored = load_file("out/export.safetensors")
    assert list(stored) == ["memory_bank"]
    np.testing.assert_allclose(stored["memory_bank"], stored_oracle(bank)[active], atol=1e-6)
    np.testing.assert_array_equal(stored["memory_bank"], to_official(bank)["memory_bank"])
    assert (report.num_rows, report.details["bytes"]) == (19, Path("out/export.safetensors").stat().st_size)


def test_an_export_becomes_a_pth_by_one_line_and_comes_back(dmd: Path, full: Path, golden: dict[str, Any]) -> None:
    """The line that the documentation gives makes what this module, and the published formula, read as the same snippets."""
    import_official(dmd, "a.safetensors")
    export_official(open_bank("a.safetensors"), "f.safetensors")
    torch.save({k: v if v.ndim else v.item() for k, v in load_torch("f.safetensors").items()}, "f.pth")
    record = torch.load("f.pth", weights_only=True)
    assert (record["latent_dim"], record["feature_dim"]) == (16, 96)
    np.testing.assert_allclose(published(record), golden["dmd.recon"], atol=1e-6)
    import_official("f.pth", "b.safetensors")
    np.testing.assert_allclose(snippets("b.safetensors"), snippets("a.safetensors"), atol=1e-6)
    import_official(saved(load_torch("f.safetensors"), "as-it-is.pth"), "g.safetensors")
    np.testing.assert_array_equal(snippets("g.safetensors"), snippets("b.safetensors"))
    first, second = open_bank("a.safetensors"), open_bank("b.safetensors")
    np.testing.assert_allclose(second.basis, first.basis, atol=1e-6)  # type: ignore[attr-defined]
    np.testing.assert_allclose(second.singular_values, first.singular_values, rtol=1e-5)  # type: ignore[attr-defined]
    import_official(full, "c.safetensors")
    export_official(open_bank("c.safetensors"), "d.safetensors")
    torch.save(load_torch("d.safetensors")["memory_bank"], "d.pth")
    import_official("d.pth", "e.safetensors")
    np.testing.assert_array_equal(snippets("e.safetensors"), golden["bank"])


def test_an_export_never_overwrites_and_is_never_a_pickle(make_bank: BankMaker) -> None:
    """What is at the output stays, the bank itself above all; a .pth is not written."""
    bank = make_bank()
    before = bank.path.read_bytes()
    with pytest.raises(OutputExistsError):
        export_official(bank, bank.path)
    Path("link.safetensors").symlink_to("nowhere")
    with pytest.raises(OutputExistsError):
        export_official(bank, "link.safetensors")
    for name in ("bank.pth", "bank.pt", "bank"):
        with pytest.raises(FormatError, match="no pickle"):
            export_official(bank, name)
    assert bank.path.read_bytes() == before
    assert files() == ["bank.safetensors", "link.safetensors"]


def test_a_bank_without_an_active_row_has_nothing_to_export(make_bank: BankMaker) -> None:
    """It says so instead of writing an empty file."""
    bank = make_bank(kind="factored", active=np.zeros(20, np.bool_))
    with pytest.raises(GMemError, match=r"every row of .* is masked"):
        to_official(bank)
    with pytest.raises(GMemError, match=r"every row of .* is masked"):
        export_official(bank, "export.safetensors")
    assert not Path("export.safetensors").exists()


def test_exported_bytes_are_the_same_from_run_to_run(make_bank: BankMaker) -> None:
    """Equal banks give equal exports."""
    bank = make_bank(kind="factored")
    export_official(bank, "a.safetensors")
    export_official(bank, "b.safetensors")
    assert Path("a.safetensors").read_bytes() == Path("b.safetensors").read_bytes()


def test_a_value_that_is_not_finite_is_not_exported(make_bank: BankMaker) -> None:
    """A damaged row is named instead."""
    bank = make_bank(kind="factored", space="raw")
    coefficients = np.array(bank.stored.array("0/coefficients"))
    coefficients[3, 1] = np.nan
    write("n.safetensors", bank.header, bank.stored.payloads() | {"0/coefficients": Payload.of(coefficients)})
    with pytest.raises(CorruptError) as caught:
        export_official(open_bank("n.safetensors"), "export.safetensors")
    assert caught.value.row == 3
    assert not Path("export.safetensors").exists()


def test_masked_rows_stay_out_by_any_way_of_masking(dmd: Path, golden: dict[str, np.ndarray]) -> None:
    """A row that is masked after the import is not in the export."""
    import_official(dmd)
    mask("bank.safetensors", Selection(keys=("dmd_bank/000", "dmd_bank/499")))
    np.testing.assert_allclose(
        published(to_official(open_bank("bank.safetensors"))), golden["dmd.recon"][1:499], atol=1e-6
    )
