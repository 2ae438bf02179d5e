"""What compress, sweep and mask take: numbers of any type, rows too short to be squared, full disks, limits of memory; by command, too."""

from __future__ import annotations

import json
import resource
import signal
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import gmem_bank
from gmem_bank import kinds
from gmem_bank.cli import main
from gmem_bank.errors import ConfigError, CorruptError, MaskedRowError, WriteError
from gmem_bank.selection import Selection
from gmem_bank.sweeping import sweep
from gmem_bank.thinning import mask_coefficients
from tests.conftest import BankMaker
from tests.gmem_bank.test_compress import spread


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize(
    "goal",
    [
        {"rank": np.int64(3)}, {"energy": np.float32(0.9)}, {"target_cosine": np.float64(0.9)}, {"max_bytes": np.int64(30_000)},
    ],
)  # fmt: skip
def test_numbers_of_numpy_are_numbers(make_bank: BankMaker, goal: dict[str, np.number]) -> None:
    """The bank, its history and its report are those of Python's own."""
    reports, contents = [], []
    for name, given in (("a", goal), ("b", {key: value.item() for key, value in goal.items()})):
        bank = make_bank(f"{name}.safetensors", snippets=spread())
        report = gmem_bank.compress(bank.path, **given, seed=np.int64(1))
        reports.append(json.loads(json.dumps(report.to_json()))["details"])
        contents.append(bank.path.read_bytes())
    assert reports[0] == reports[1]
    assert contents[0] == contents[1]


def test_what_is_no_number_is_refused(make_bank: BankMaker) -> None:
    """In words, whatever it is."""
    bank = make_bank(snippets=spread())
    for options in (
        {"rank": 2.5}, {"rank": True}, {"energy": "0.9"}, {"energy": float("nan")}, {"target_cosine": True}, {"max_bytes": 1e5},
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
            gmem_bank.compress(bank.path, **options)
    for options in ({"seed": -1}, {"seed": 1.5}, {"memory_limit": 1e9}):
        with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
            gmem_bank.compress(bank.path, rank=2, **options)
    with pytest.raises(ConfigError, match="no bank is given"):
        gmem_bank.compress([])


def test_coefficient_masks_and_sweeps_take_numbers_of_numpy(make_bank: BankMaker) -> None:
    """And their reports are JSON."""
    for number, options in enumerate(
        ({"keep": np.int64(3)}, {"keep_energy": np.float32(0.5)}, {"keep_random": np.float32(0.5), "seed": np.int64(4)})
    ):
        bank = make_bank(f"{number}.safetensors", snippets=spread(), kind="factored", rank=8)
        json.dumps(mask_coefficients(bank.path, allow_larger=True, **options).to_json())
        assert gmem_bank.verify(bank.path).problems == []
    dense = make_bank("dense.safetensors", snippets=spread())
    json.dumps(sweep(dense.path, ranks=[np.int64(4)], seed=np.int64(1)).to_json())


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_rows_too_short_to_be_squared_are_refused(make_bank: BankMaker, kind: str) -> None:
    """As search does; their error would come out as 0 and their neighbours as the same. A thousand times TINY_NORM is enough."""
    bank = make_bank(snippets=spread() * np.float32(1e-30), space="raw", kind=kind, rank=6)
    before = bank.path.read_bytes()
    for work in (lambda: gmem_bank.compress(bank.path, rank=4), lambda: sweep(bank.path, ranks=[4])):
        with pytest.raises(CorruptError, match=r"length of .* no direction in float32"):
            work()
    assert bank.path.read_bytes() == before
    assert [path.name for path in Path().iterdir()] == ["bank.safetensors"]
    short = make_bank("short.safetensors", snippets=spread() * np.float32(1e-9), space="raw")
    plain = make_bank("plain.safetensors", snippets=spread(), space="raw")
    first, second = (gmem_bank.compress(bank.path, rank=4).details for bank in (short, plain))
    assert first["cosine"]["mean"] == pytest.approx(second["cosine"]["mean"], abs=1e-6)
    assert first["relative_error"] == pytest.approx(second["relative_error"], rel=1e-4)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be larger than 24 KB, as where a disk is full; Python ignores the signal."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, old[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_disk_too_full_for_the_coefficients_says_so_before_they_are_made(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """What is lacking and how much; no part of them keeps the disk full, the first pass's sums stay for the same command."""
    bank = make_bank(snippets=spread(900, 16))
    request.getfixturevalue("small_files")
    with monkeypatch.context() as patch:
        patch.setattr("gmem_bank.fitting._project_chunk", lambda *_: pytest.fail("made for nothing"))
        with pytest.raises(WriteError, match=r"too large.*43,200 bytes were needed.*Free some space"):
            gmem_bank.compress(bank.path, rank=12)
    folder = Path(".bank.safetensors.compress")
    assert [path.name for path in folder.iterdir()] == ["sums.safetensors"]


def test_a_disk_that_is_full_leaves_no_empty_folder(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor a file of coefficients where the bank itself found no room."""
    bank = make_bank(snippets=spread(900, 16))

    def full(*_: object, **__: object) -> None:
        raise WriteError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("gmem_bank.moments.SumStore.save", lambda self, *_, **__: (self.folder.mkdir(), full()))
        with pytest.raises(WriteError):
            gmem_bank.compress(bank.path, rank=3)
    assert [path.name for path in Path().iterdir()] == ["bank.safetensors"]
    with monkeypatch.context() as patch:
        patch.setattr("gmem_bank.editing.write", full)
        with pytest.raises(WriteError):
            gmem_bank.compress(bank.path, rank=3)
    assert [path.name for path in Path(".bank.safetensors.compress").iterdir()] == ["sums.safetensors"]
    gmem_bank.compress(bank.path, rank=3)
    assert not Path(".bank.safetensors.compress").exists()


@pytest.mark.parametrize("form", ["bank.safetensors", "bank.h5", "bank.gmem"])
def test_a_sweep_tells_the_bytes_of_the_banks_that_the_commands_make(make_bank: BankMaker, form: str) -> None:
    """To the 64 bytes that figures in the header may save."""
    bank = make_bank(form, snippets=spread(500, 16))
    for way in sweep(bank.path, ranks=[4, 16]).ways:
        output = f"{way.rank}-{way.dtype}-{way.keep}{Path(form).suffix}"
        gmem_bank.compress(bank.path, rank=way.rank, dtype=way.dtype, output=output)
        if way.keep is not None:
            mask_coefficients(output, keep=way.keep, allow_larger=True, undo=False)
        assert 0 <= way.bytes - kinds.open(output).stored.num_bytes <= 64, way


@pytest.mark.parametrize("kind", ["dense", "factored"])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_that_are_all_the_same_keep_all_their_energy(make_bank: BankMaker, kind: str, rows: int) -> None:
    """There is none to lose; so say a sweep, a dry run and a compression."""
    values = np.tile(spread(1, 16), (rows, 1))
    bank = make_bank(snippets=values, kind=kind, rank=1)
    assert {way.energy for way in sweep(bank.path).ways} == {1.0}
    assert gmem_bank.compress(bank.path, rank=1, dry_run=True).details["energy"] == 1
    assert gmem_bank.compress(bank.path, rank=1).details["energy"] == 1


def test_only_a_rank_that_was_asked_for_is_said_to_have_been(make_bank: BankMaker) -> None:
    """Of another goal no rank was asked."""
    values = (spread(300, 4) @ np.random.default_rng(0).standard_normal((4, 16))).astype(np.float32)
    for name, option, said in (("a", "--max-bytes=1G", False), ("b", "--energy=1", False), ("c", "--rank=9", True)):
        path = make_bank(f"{name}.safetensors", snippets=values, space="raw").path
        assert ("rank 9 was asked for" in run("compress", str(path), option)) is said


def test_memory_stays_below_its_limit(make_bank: BankMaker) -> None:
    """What NumPy and Python hold beyond the start, for every goal and for the table."""
    bank = make_bank(snippets=np.random.default_rng(0).standard_normal((12_000, 128)).astype(np.float32))
    gmem_bank.compress(bank.path, rank=2, output="warm.safetensors")
    sweep("warm.safetensors", ranks=[2])
    limit = 12 << 20
    for number, work in enumerate((
        lambda out: gmem_bank.compress(bank.path, rank=128, dtype="i8", memory_limit=limit, output=out),
        lambda out: gmem_bank.compress(bank.path, rank=128, memory_limit=limit, output=out),
        lambda out: gmem_bank.compress(bank.path, target_cosine=0.9, dtype="i8", memory_limit=limit, output=out),
        lambda _: sweep(bank.path, ranks=[128], memory_limit=limit),
    )):  # fmt: skip
        tracemalloc.start()
        work(f"{number}.safetensors")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit, (number, peak)


def test_usage_errors_exit_with_2_and_name_the_option(make_bank: BankMaker) -> None:
    """What no bank could be given is a usage error; what this bank has not is none."""
    path = str(make_bank(snippets=spread()).path)
    for arguments, words in (
        (["compress"], "exactly one of --rank, --energy, --target-cosine, --max-bytes; none was given"),
        (["compress", "--rank", "3", "--target-cosine", "0.9"], "got --rank and --target-cosine"),
        (["compress", "--rank", "0"], "'--rank'"), (["compress", "--energy", "1.1"], "'--energy'"),
        (["compress", "--energy", "nan"], "'--energy'"), (["compress", "--target-cosine", "1"], "'--target-cosine'"),
        (["compress", "--max-bytes", "0"], "'--max-bytes'"), (["compress", "--max-bytes", "x"], "powers of 1024"),
        (["compress", "--rank", "3", "--memory-limit", "0"], "'--memory-limit'"), (["mask"], "say which rows"),
        (["mask", "--keep-energy", "nan"], "'--keep-energy'"), (["remove"], "say which rows"), (["select"], "say which rows"),
    ):  # fmt: skip
        assert words in run(arguments[0], path, *arguments[1:], code=2)
    assert "--memory-limit must be" not in run("compress", path, "--rank", "17", code=1)
    assert "a memory limit of" in run("compress", path, "--rank", "3", "--memory-limit", "1K", code=1)
    assert "--keep-energy" not in run("mask", path, "--keep", "3", code=1)


def test_the_library_says_options_as_options_where_a_command_asked() -> None:
    """max_bytes is --max-bytes there; names in paths stay."""

    @main.command("broken-for-a-test")
    @__import__("click").option("--max-bytes")
    def broken(max_bytes: str) -> None:
        raise ConfigError("max_bytes must be more; see a/max_bytes.txt")

    try:
        assert run("broken-for-a-test", code=1) == "Error: --max-bytes must be more; see a/max_bytes.txt\n"
    finally:
        del main.commands["broken-for-a-test"]


def test_info_tells_of_a_coefficient_mask(make_bank: BankMaker) -> None:
    """How many coefficients a row keeps at most; None without a mask."""
    path = str(make_bank(snippets=spread(), kind="factored", rank=8).path)
    assert json.loads(run("info", path, "--json"))["coefficients_kept"] is None
    assert "coefficient mask" not in run("info", path)
    mask_coefficients(path, keep=2)
    assert json.loads(run("info", path, "--json"))["coefficients_kept"] == 2
    assert "at most 2 coefficients kept a row (coefficient mask)" in run("info", path)


def test_queries_that_cannot_be_asked_of_a_bank_of_arrays_say_what_can(make_bank: BankMaker, photos: Path) -> None:
    """Not that it should be built again; a masked row is named by its key, and no index is told of before."""
    np.save("x.npy", spread(12, 8))
    gmem_bank.build_precomputed(gmem_bank.read_array("x.npy"), "x.safetensors")
    gmem_bank.build_index("x.safetensors")
    for query in ([str(photos)], [str(next(photos.glob("*/*.jpg")))], ["a hat", "--text"]):
        output = run("search", "x.safetensors", *query, code=1)
        assert "came from arrays" in output
        assert "a file of vectors" in output
        assert "searched by" not in output
    bank = gmem_bank.open("x.safetensors")
    key = bank.keys(np.array([4]))[0]
    gmem_bank.mask(bank.path, Selection(keys=(key,)))
    with pytest.raises(MaskedRowError, match=f"key '{key}'"):
        gmem_bank.search(gmem_bank.open("x.safetensors"), key)


def test_a_removal_that_leaves_only_masked_rows_says_so(make_bank: BankMaker) -> None:
    """It is done: a deletion on request must not wait for a mask to be lifted."""
    bank = make_bank(snippets=spread(6, 8))
    keys = bank.keys(np.arange(6))
    gmem_bank.mask(bank.path, Selection(keys=tuple(keys[:5])))
    assert "every row that is left is masked" in run("remove", str(bank.path), "--key", keys[5])
