"""What cannot be compressed, masked, indexed or asked, by command: exit 1, one sentence that says what to do, nothing written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from gmem_bank.cli import main
from tests.conftest import BankMaker


def run(*arguments: str, code: int = 0) -> str:
    quiet = () if arguments[0] in ("mask", "unmask", "remove", "verify") else ("-q",)  # those that show no progress
    result = CliRunner().invoke(main, [*arguments, *quiet], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def refused(*arguments: str) -> str:
    """The one line that a command ends with; files are as before."""
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    output = run(*arguments, code=1).strip()
    after = {
        path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and not path.name.endswith(".lock")
    }
    assert after == {path: data for path, data in before.items() if not path.name.endswith(".lock")}
    assert output.startswith("Error: ") and output.count("\n") == 0, output
    return output


def rows(num: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num, dim)).astype(np.float32)


@pytest.mark.parametrize("rank", ["0", "9", "-1"])
def test_ranks_that_no_bank_has(make_bank: BankMaker, rank: str) -> None:
    """The bank's dimension is said."""
    make_bank(snippets=rows(20))
    assert "rank must be 1 to 8" in refused("compress", "--rank", rank, "-o", "out.safetensors")


def test_a_rank_above_what_few_rows_span_is_lowered_and_said_so(make_bank: BankMaker) -> None:
    """Five rows span four directions; one row, and rows that are all equal, one that is not used."""
    for snippets, rank in ((rows(5), 4), (rows(1), 1), (np.repeat(rows(1), 9, axis=0), 1)):
        bank = make_bank(snippets=snippets)
        text = run("compress", "--rank", "8", "-o", "out.safetensors")
        assert f"8 was asked for: the rows span {rank} directions" in text
        assert "mean 1.0000" in text
        assert "energy    1.0000" in text
        run("verify", "out.safetensors")
        for path in (bank.path, Path("out.safetensors")):
            path.unlink()


def test_a_compressed_bank_is_truncated_and_gets_nothing_back(make_bank: BankMaker) -> None:
    """Defined: diagonalised anew, by its own coefficients; a higher rank than it has is lowered."""
    make_bank(snippets=rows(40))
    run("compress", "--rank", "4", "-o", "four.safetensors")
    assert "rank 2" in run("compress", "four.safetensors", "--rank", "2", "-o", "two.safetensors")
    text = run("compress", "four.safetensors", "--rank", "6", "-o", "six.safetensors")
    assert "the rows span 4 directions" in text
    assert "energy    1.0000" in text


def test_indexes_that_do_not_fit(make_bank: BankMaker) -> None:
    """Stale, cut, empty, foreign, another bank's: each is said, with the command that helps."""
    bank = make_bank(snippets=rows(60))
    np.save("q.npy", rows(2, seed=1))
    np.save("new.npy", rows(3, seed=2))
    run("index", str(bank.path))
    index = Path(f"{bank.path}.index")
    whole = index.read_bytes()
    for data, words in (
        (whole[: len(whole) // 2], "cut short"), (b"", "0 bytes"), (Path("q.npy").read_bytes(), "not a safetensors file"),
        (bank.path.read_bytes(), "not an index of a bank"), (whole[:-1] + bytes([whole[-1] ^ 1]), "does not match its hash"),
    ):  # fmt: skip
        index.write_bytes(data)
        assert words in refused("search", str(bank.path), "q.npy")
    other = make_bank("other.safetensors", snippets=rows(60, seed=3))
    run("index", str(other.path))
    index.write_bytes(Path(f"{other.path}.index").read_bytes())
    assert "made for another bank" in refused("search", str(bank.path), "q.npy")
    assert "made for another bank" in refused("index", str(bank.path), "--update")
    index.write_bytes(whole)
    run("insert-concept", "new.npy", "--bank", str(bank.path), "--name", "new", "--no-report", "--same-encoder")
    stale = refused("search", str(bank.path), "q.npy")
    assert "--update" in stale
    assert "--exact" in stale
    run("search", str(bank.path), "q.npy", "--exact")
    run("index", str(bank.path), "--update")
    run("search", str(bank.path), "q.npy")


def test_queries_that_cannot_be_asked_and_more_rows_than_there_are(make_bank: BankMaker) -> None:
    """Another dimension, another encoder's bank, no such name, NaN; k above N gives all rows."""
    bank = make_bank(snippets=rows(20))
    other = make_bank("other.safetensors", snippets=rows(4, dim=9))
    np.save("wide.npy", rows(2, dim=9))
    np.save("nan.npy", np.full((1, 8), np.nan, np.float32))
    for indexed in (False, True):
        if indexed:
            run("index", str(bank.path), "--kind", "ivf-flat", "--nlist", "2")
        assert "dimension 9" in refused("search", str(bank.path), "wide.npy")
        assert "they differ in dim" in refused("search", str(bank.path), str(other.path))
        assert "not finite" in refused("search", str(bank.path), "nan.npy")
        assert "neither a concept nor a key" in refused("search", str(bank.path), "nothing")
        assert len(run("search", str(bank.path), bank.keys(np.array([3]))[0], "-k", "1000").splitlines()) == 20


def test_where_every_row_is_masked(make_bank: BankMaker) -> None:
    """The last active row cannot be hidden; where the others have gone, nothing is found, and the command that helps is named."""
    bank = make_bank(snippets=rows(12))  # row r has concept r % 3
    np.save("q.npy", rows(1, seed=1))
    assert "no row would be left active" in run("mask", str(bank.path), "--pattern", "*", code=1)
    run("mask", str(bank.path), "--concept", "class0")
    run("remove", str(bank.path), "--concept", "class0", "--invert")
    for _ in range(2):
        assert "unmask" in refused("search", str(bank.path), "q.npy")
        run("index", str(bank.path))
    assert "masked" in refused("compress", str(bank.path), "--sweep")
    run("compress", str(bank.path), "--rank", "2", "-o", "two.safetensors")
    assert "unmask" in refused("search", "two.safetensors", "q.npy")
    run("unmask", "two.safetensors")
    run("search", "two.safetensors", "q.npy")
