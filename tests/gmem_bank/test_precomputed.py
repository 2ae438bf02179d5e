"""Banks of snippets from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

import gmem_bank
from gmem_bank.cli import main
from gmem_bank.errors import EncoderError, GMemError, OutputExistsError, SourceError

VALUES = np.random.default_rng(0).standard_normal((30, 6)).astype(np.float32)


@pytest.mark.parametrize("space", ["unit", "raw"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_values_and_keys_are_those_of_the_file(space: str, dtype: type) -> None:
    """Read through a map, block by block; keys with folders make concepts, numbers do not."""
    np.save("features.npy", VALUES.astype(dtype))
    report = gmem_bank.build_precomputed(gmem_bank.read_array(Path("features.npy")), "a.safetensors", space=space)
    bank = gmem_bank.open("a.safetensors")
    expected = VALUES.astype(dtype).astype(np.float32)
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True) if space == "unit" else expected
    np.testing.assert_allclose(bank.snippets(bank.rows()), expected, atol=1e-6)
    assert bank.keys(np.array([0, 29])) == ["features/00", "features/29"]
    assert (bank.names, report.num_rows, bank.encoder.name) == ((), 30, "precomputed")
    assert gmem_bank.build_precomputed(
        gmem_bank.read_array(Path("features.npy")), "a.safetensors", space=space
    ).unchanged
    np.savez("keyed.npz", snippets=VALUES, keys=np.array([f"{'cat' if i < 9 else 'dog'}/{i}.png" for i in range(30)]))
    gmem_bank.build_precomputed(gmem_bank.read_array(Path("keyed.npz")), "b.safetensors", space=space)
    assert gmem_bank.open("b.safetensors").concept_sizes() == {"cat": 9, "dog": 21}
    with pytest.raises(OutputExistsError, match="--overwrite"):
        gmem_bank.build_precomputed(gmem_bank.read_array(Path("keyed.npz")), "a.safetensors", space=space)


def test_by_command_and_then_an_insert_takes_arrays_too() -> None:
    """build --encoder precomputed, insert-concept FILE, merge of banks of one model; another model is foreign."""
    np.save("x.npy", VALUES)
    np.save("more.npy", VALUES[:4] + 1)
    np.save("again.npy", VALUES[:4] + 2)

    def run(*words: str, code: int = 0) -> str:
        result = CliRunner().invoke(main, words)
        assert result.exit_code == code, result.output
        return result.stdout if code == 0 else result.output

    built = json.loads(run("build", "x.npy", "-e", "precomputed", "--set", "model=mine", "--json"))
    assert (built["num_rows"], built["dim"]) == (30, 6)
    assert "+4 rows as concept 'more'" in run("insert-concept", "more.npy")
    run("build", "again.npy", "-e", "precomputed", "--set", "model=mine", "-o", "two.h5")
    run("build", "more.npy", "-e", "precomputed", "--set", "model=other", "-o", "three.h5")
    assert "+4 rows" in run("merge", "bank.safetensors", "two.h5")
    assert "differ in parameters" in run("merge", "bank.safetensors", "three.h5", code=1)
    assert "no parameter 'modle'" in run(
        "build", "x.npy", "-e", "precomputed", "--set", "modle=1", "-o", "y.h5", code=2
    )
    with pytest.raises(EncoderError, match="encodes nothing"):
        gmem_bank.load_encoder("precomputed")


def test_bad_rows_are_named_and_nothing_is_written() -> None:
    """NaN beyond the first block, and a key that occurs twice."""
    values = np.ones((9000, 3), np.float32)
    values[8500, 1] = np.nan
    np.save("x.npy", values)
    with pytest.raises(GMemError, match=r"row 8500 of x\.npy .*not finite") as caught:
        gmem_bank.build_precomputed(gmem_bank.read_array(Path("x.npy")), "bank.safetensors")
    assert caught.value.row == 8500
    np.savez("y.npz", snippets=values[:3], keys=np.array(["a", "b", "a"]))
    with pytest.raises(GMemError, match="'a'"):
        gmem_bank.build_precomputed(gmem_bank.read_array(Path("y.npz")), "bank.safetensors")
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["x.npy", "y.npz"]


def test_another_space_is_another_bank_and_options_without_meaning_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is passed over in silence; the report of the build lies beside the bank."""
    np.save("v.npy", np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32))
    build = ["build", "v.npy", "-e", "precomputed", "-o", "v.safetensors"]

    def run(*more: str) -> int:
        with pytest.raises(SystemExit) as ended:
            main([*build, *more])
        return int(ended.value.code or 0)

    assert run() == 0
    assert json.loads(Path("v.safetensors.report.json").read_text())["num_rows"] == 6
    assert run() == 0
    assert "already: nothing to do" in capsys.readouterr().err
    assert run("--space", "raw") == 1
    for option in (
        ["--limit", "3"],
        ["--flip"],
        ["--include", "*"],
        ["--workers", "1"],
        ["--batch-size", "4"],
        ["--device", "cpu"],
    ):
        assert run(*option) == 2
        assert f"{option[0]} has no meaning for --encoder precomputed" in capsys.readouterr().err


def test_safetensors_of_every_type(tmp_path: Path) -> None:
    """bfloat16, which NumPy lacks, is read as the numbers that it is; what nobody computes with is refused by its name."""
    import torch
    from safetensors.torch import save_file as save_tensors

    exact = torch.from_numpy(np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        save_tensors({"snippets": exact.to(dtype)}, "x.safetensors")
        np.testing.assert_array_equal(
            gmem_bank.read_array(Path("x.safetensors")).snippets, exact.to(dtype).double().numpy()
        )
    save_tensors({"snippets": exact.to(torch.float8_e4m3fn)}, "x.safetensors")
    with pytest.raises(
        SourceError, match=r"^x\.safetensors: array 'snippets' is of the type F8_E4M3.*: save it as F32, F16 or BF16"
    ):
        gmem_bank.read_array(Path("x.safetensors"))


def test_reasons_are_said_once(tmp_path: Path) -> None:
    """A file cut short, and one without an array at its top level."""
    import h5py

    save_file({"snippets": np.ones((2, 3), np.float32)}, "x.safetensors")
    Path("x.safetensors").write_bytes(Path("x.safetensors").read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"^could not read x\.safetensors: (?!could not read)"):
        gmem_bank.read_array(Path("x.safetensors"))
    with h5py.File("x.h5", "w") as file:
        file["group/snippets"] = np.ones((2, 3))
    with pytest.raises(SourceError, match="no array at its top level"):
        gmem_bank.read_array(Path("x.h5"))
