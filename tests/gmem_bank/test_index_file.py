"""The file of an index: what is cut, flipped, grown or foreign is named, and never crashes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import gmem_bank
from gmem_bank import index_file
from gmem_bank.errors import CorruptError, FormatError, FormatVersionError, GMemError, OutputExistsError, WriteError
from gmem_bank.index_file import read_index, write_index
from tests.conftest import BankMaker
from tests.gmem_bank.test_index import KINDS, clustered

READER = """
import sys
from pathlib import Path
from gmem_bank.errors import GMemError
from gmem_bank.index_file import read_index
for name in sys.argv[1:]:
    try:
        read_index(Path(name))
        print("read", name)
    except GMemError as error:
        print("refused", name, type(error).__name__)
"""


def read_elsewhere(paths: list[Path]) -> list[str]:
    """Read files in another process; give what it said of each."""
    ran = subprocess.run(
        [sys.executable, "-c", READER, *map(str, paths)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.splitlines()


def made(bank: gmem_bank.MemoryBank, kind: str) -> Path:
    return Path(gmem_bank.build_index(bank.path, kind=kind, recall=0.5).path)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_and_equal_work_gives_equal_bytes(make_bank: BankMaker, kind: str) -> None:
    """read∘write is the identity, in bytes too."""
    path = made(make_bank(snippets=clustered(300, 8), kind="factored"), kind)
    state = read_index(path)
    write_index(Path("again.index"), state)
    assert Path("again.index").read_bytes() == path.read_bytes()
    assert state.kind == kind


@pytest.mark.parametrize("kind", ["flat", "ivf-rabitq", "hnsw"])
def test_a_damaged_index_is_refused(make_bank: BankMaker, kind: str) -> None:
    """Cut anywhere, any byte flipped, grown, empty, a picture, a bank: an error of ours, in a process that lives on."""
    bank = make_bank(snippets=clustered(300, 8))
    good = made(bank, kind).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [good[:n] for n in (0, 5, 8, 100, len(good) // 2, len(good) - 1)]
    for place in [0, 3, 9, 60, 200, *rng.integers(8, len(good), 60).tolist()]:
        damaged.append(good[:place] + bytes([good[place] ^ (1 << int(rng.integers(8)))]) + good[place + 1 :])
    damaged += [good + b"\0", b"\x89PNG" + good, bank.path.read_bytes(), b"IxFI" * 50]
    paths = []
    for number, data in enumerate(damaged):
        paths.append(Path(f"{number}.index"))
        paths[-1].write_bytes(data)
    said = read_elsewhere(paths)
    assert [line for line in said if not line.startswith("refused")] == []
    assert len(said) == len(paths)


def test_bytes_that_faiss_cannot_read_are_refused_though_their_hash_fits(make_bank: BankMaker) -> None:
    """Cut or foreign bytes under a hash that was made for them: FAISS's own checks, under limits from the size of the file."""
    state = read_index(made(make_bank(snippets=clustered(300, 8)), "ivf-flat"))
    faiss = pytest.importorskip("faiss")
    whole = faiss.serialize_index(state.faiss).tobytes()
    paths = []
    for number, data in enumerate(
        [whole[:-1], whole[: len(whole) // 2], b"", b"IxF2" + whole[4:], b"nope", whole[:37] + b"\xff" * 8 + whole[45:]]
    ):
        paths.append(Path(f"{number}.index"))
        write_raw(paths[-1], state, data)
    said = read_elsewhere(paths)
    assert all("refused" in line for line in said), said


def write_raw(path: Path, state: index_file.IndexState, data: bytes) -> None:
    """Write an index whose FAISS part is any bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_file, "pour", lambda _index, write: write(data))
        patch.setattr(index_file, "size_of_engine", lambda _index: len(data))
        write_index(path, dataclasses.replace(state, faiss=object()))


def test_a_table_that_names_a_row_twice_is_refused(make_bank: BankMaker) -> None:
    """Each row of the bank once."""
    state = read_index(made(make_bank(snippets=clustered(60, 8)), "flat"))
    for rows in (np.zeros(60, np.int64), np.arange(60) + 1, np.full(60, -1)):
        write_index(Path("bad.index"), dataclasses.replace(state, rows=rows))
        with pytest.raises(CorruptError, match="each row once"):
            read_index(Path("bad.index"))


def test_facts_that_cannot_be(make_bank: BankMaker) -> None:
    """A later version, missing and wrong facts, a flat index without vectors."""
    state = read_index(made(make_bank(snippets=clustered(60, 8)), "flat"))
    for change, words, error in (
        ({"dim": "8"}, "dim is missing", CorruptError), ({"dim": 9}, "9 coordinates for 8", CorruptError),
        ({"kind": "hnsw"}, "its settings", CorruptError), ({"content": {}}, "its content", CorruptError), ({"measured": None}, "measured", CorruptError),
    ):  # fmt: skip
        write_index(Path("bad.index"), dataclasses.replace(state, facts={**state.facts, **change}))
        with pytest.raises(error, match=words):
            read_index(Path("bad.index"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index_file, "VERSION", 2)
        write_index(Path("later.index"), state)
    with pytest.raises(FormatVersionError, match="version 2"):
        read_index(Path("later.index"))


def test_another_file_is_named_and_not_written_over(make_bank: BankMaker) -> None:
    """-o does not replace what is no index; a bank is no index."""
    bank = make_bank(rows=6)
    with pytest.raises(FormatError, match="not an index"):
        gmem_bank.open_index(bank, bank.path)
    Path("notes.txt").write_text("mine")
    for output in ("notes.txt", bank.path):
        with pytest.raises(OutputExistsError, match="is no index"):
            gmem_bank.build_index(bank.path, output=output)
    assert Path("notes.txt").read_text() == "mine"
    gmem_bank.build_index(bank.path, output="x.index")
    gmem_bank.build_index(bank.path, output="x.index")


def test_a_failed_write_leaves_the_old_index(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full, or the user stops it: what was there stands, and no temporary file is left."""
    bank = make_bank(snippets=clustered(300, 8))
    before = made(bank, "ivf-flat").read_bytes()

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    for failure, error in (
        (full, WriteError),
        (lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()), KeyboardInterrupt),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(index_file._Hashing, "__call__", failure)
            with pytest.raises((error, GMemError)):
                gmem_bank.build_index(bank.path, kind="flat")
    assert Path(f"{bank.path}.index").read_bytes() == before
    assert sorted(p.name for p in Path().iterdir()) == ["bank.safetensors", "bank.safetensors.index"]


def test_the_facts_are_canonical_json(make_bank: BankMaker) -> None:
    """Whoever reads safetensors can read them."""
    from safetensors import safe_open

    path = made(make_bank(snippets=clustered(60, 8)), "flat")
    with safe_open(path, "numpy") as stored:
        text = stored.metadata()["gmem_index"]
        assert stored.get_tensor("vectors").shape == (60, 8)
    facts = json.loads(text)
    assert json.dumps(facts, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == text
    assert facts["kind"] == "flat"


@pytest.mark.slow
def test_a_killed_build_leaves_the_old_index_or_the_new_one(make_bank: BankMaker) -> None:
    """kill -9 at any moment: what is there can be read, and the next build clears what was left."""
    bank = make_bank(snippets=clustered(20_000, 32))
    old = made(bank, "flat").read_bytes()
    command = [sys.executable, "-m", "gmem_bank", "index", str(bank.path), "--kind", "ivf-rabitq", "-q"]
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.monotonic() - started
    new = Path(f"{bank.path}.index").read_bytes()
    for share in (0.2, 0.4, 0.6, 0.8, 0.9, 1.0):
        Path(f"{bank.path}.index").write_bytes(old)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * share)
        process.kill()
        process.wait()
        assert read_index(Path(f"{bank.path}.index")).kind in ("flat", "ivf-rabitq")
    subprocess.run(command, check=True, capture_output=True)
    assert len(Path(f"{bank.path}.index").read_bytes()) == len(new)
    assert sorted(p.name for p in Path().iterdir()) == ["bank.safetensors", "bank.safetensors.index"]
