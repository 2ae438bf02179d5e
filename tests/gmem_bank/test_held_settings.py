"""Settings of the whole process under threads: values after are values before."""

from __future__ import annotations

import threading
from pathlib import Path

import faiss

from gmem_bank import index_engine
from gmem_bank.errors import CorruptError
from gmem_bank.held_settings import HeldSetting
from gmem_bank.index import matrix_products
from gmem_bank.index_file import read_index
from tests.conftest import BankMaker
from tests.gmem_bank.test_index import clustered
from tests.gmem_bank.test_index_file import made


def test_settings_of_the_process_are_as_before_whichever_thread_leaves_first() -> None:
    """First in, first out: the second must not save what the first had set."""
    before = faiss.cvar.distance_compute_blas_threshold
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        with matrix_products(1000):
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second() -> None:
        first_in.wait(10)
        with matrix_products(1000):
            second_in.set()
            first_out.wait(10)
            assert faiss.cvar.distance_compute_blas_threshold == 1

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert first_out.is_set()
    assert faiss.cvar.distance_compute_blas_threshold == before != 1


def test_limits_of_reading_are_as_before_after_many_threads(make_bank: BankMaker) -> None:
    """Each reader has its own, one after the other; also where one fails."""
    path = made(make_bank(snippets=clustered(300, 8)), "ivf-flat")
    Path("bad.index").write_bytes(path.read_bytes()[:-1])
    before = index_engine._limits()
    failed: list[BaseException] = []

    def work(own: Path) -> None:
        for _ in range(20):
            try:
                read_index(own)
            except CorruptError:
                assert own.name == "bad.index"
            except BaseException as error:
                failed.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in (path, path, Path("bad.index"), path)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert index_engine._limits() == before
    assert before[0] != path.stat().st_size


def test_a_setting_that_is_exclusive_is_held_by_one_thread() -> None:
    """The second waits for the first."""
    box, seen = [0], []

    def write(value: int) -> None:
        box[0] = value

    setting = HeldSetting(lambda: box[0], write, exclusive=True)

    def work(value: int) -> None:
        with setting.holding(value):
            threading.Event().wait(0.01)
            seen.append(box[0] == value)

    threads = [threading.Thread(target=work, args=(value,)) for value in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 8
    assert box == [0]
