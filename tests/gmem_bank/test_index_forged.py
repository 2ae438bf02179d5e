"""Index files that somebody made on purpose: hashes are right, what they say is not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest

import gmem_bank
from gmem_bank import index_facts, index_file
from gmem_bank.errors import CorruptError, OutputExistsError
from gmem_bank.index_file import index_path, read_index, write_index
from gmem_bank.row_identity import key_hashes
from gmem_bank.selection import Selection
from tests.conftest import BankMaker
from tests.gmem_bank.test_index import KINDS, clustered
from tests.gmem_bank.test_index_file import made, write_raw

FAISS_KINDS = KINDS[1:]


def bytes_of(index: Any) -> bytes:
    return faiss.serialize_index(index).tobytes()


def on_disk(index: Any, victim: Path) -> bytes:
    """The bytes of an IVF index whose lists are said to lie in another file."""
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(victim))
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            codes, ids = index.invlists.get_codes(number), index.invlists.get_ids(number)
            lists.add_entries(number, size, ids, codes)
    index.replace_invlists(lists, False)
    data = bytes_of(index)
    assert b"ilod" in data
    return data


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-pq"])
def test_lists_in_another_file_are_refused_and_that_file_is_left_alone(make_bank: BankMaker, kind: str) -> None:
    """Neither opening nor updating maps the file that the bytes name."""
    bank = make_bank(snippets=clustered(300, 8))
    path, victim = made(bank, kind), Path("victim.txt")
    state = read_index(path)
    data = on_disk(state.faiss, victim)
    victim.write_bytes(b"mine" * (victim.stat().st_size // 4))
    before = victim.read_bytes()
    write_raw(path, state, data)
    gmem_bank.insert_snippets(bank.path, clustered(20, 8, seed=5), name="new", report=False)
    for work in (lambda: read_index(path), lambda: gmem_bank.update_index(bank.path)):
        with pytest.raises(CorruptError, match="lists that lie in the file itself"):
            work()
    assert victim.read_bytes() == before


@pytest.mark.parametrize("kind", FAISS_KINDS)
def test_faiss_gets_no_other_kind_of_index(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Other kinds, other sizes, wrapped ones, other quantizers: refused before FAISS reads a byte."""
    path = made(make_bank(snippets=clustered(300, 8)), kind)
    state = read_index(path)
    lists = state.facts["num_lists"] or 4
    rows = clustered(300, 8, seed=1)
    forged = [
        "Flat", "SQ8", f"IVF{lists},SQ8", f"IVF{lists + 1},Flat", f"IVF{lists}_HNSW8,Flat", "PCA4,Flat", "HNSW8,SQ8",
        f"IVF{lists},PQ2", f"IVF{lists},PQ4x4fs", "Flat,RFlat",
    ]  # fmt: skip
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("FAISS was asked to read"))
    for factory in forged:
        other = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
        other.train(rows)
        other.add(rows)
        write_raw(Path("forged.index"), state, bytes_of(other))
        with pytest.raises(CorruptError, match="not what gmem writes"):
            read_index(Path("forged.index"))


def test_links_that_lead_out_of_a_graph_are_refused(make_bank: BankMaker) -> None:
    """FAISS would follow them."""
    state = read_index(made(make_bank(snippets=clustered(300, 8)), "hnsw"))
    links = faiss.vector_to_array(state.faiss.hnsw.neighbors)
    links[3] = 1 << 30
    faiss.copy_array_to_vector(links, state.faiss.hnsw.neighbors)
    write_index(Path("forged.index"), state)
    with pytest.raises(CorruptError, match=r"leads out of it|cannot read"):
        read_index(Path("forged.index"))


@pytest.mark.parametrize("forged", ["entry", "entry of none", "height", "too high", "link", "probabilities"])
def test_layers_that_a_node_is_not_in_are_refused(make_bank: BankMaker, forged: str) -> None:
    """Links of a layer lie behind those of the layer below: where a node has none, FAISS would read beyond them."""
    state = read_index(made(make_bank(snippets=clustered(3000, 8)), "hnsw"))
    graph = state.faiss.hnsw
    levels = faiss.vector_to_array(graph.levels)
    low, high = int(np.flatnonzero(levels == 1)[-1]), int(np.flatnonzero(levels > 1)[0])
    if forged == "entry":
        graph.entry_point = low
    elif forged == "entry of none":
        graph.entry_point = -1
    elif forged == "height":
        graph.max_level += 1
    elif forged == "too high":
        graph.entry_point, graph.max_level = low, graph.cum_nneighbor_per_level.size() - 1
    elif forged == "link":
        links = faiss.vector_to_array(graph.neighbors)
        links[graph.offsets.at(high) + graph.cum_nneighbor_per_level.at(1)] = low
        faiss.copy_array_to_vector(links, graph.neighbors)
    else:
        graph.assign_probas.resize(graph.assign_probas.size() + 9)
    write_index(Path("forged.index"), state)
    with pytest.raises(CorruptError, match="leads out of it"):
        read_index(Path("forged.index"))


def test_lists_of_other_sizes_are_refused(make_bank: BankMaker) -> None:
    """More or fewer rows in the lists than the table of rows has."""
    state = read_index(made(make_bank(snippets=clustered(300, 8)), "ivf-flat"))
    state.faiss.invlists.resize(0, 0)
    write_index(Path("forged.index"), state)
    with pytest.raises(CorruptError, match="other lists"):
        read_index(Path("forged.index"))


@pytest.mark.parametrize("shift", [1 << 40, -(1 << 40)])
@pytest.mark.parametrize("masked", [False, True])
def test_labels_outside_of_the_table_are_refused(make_bank: BankMaker, masked: bool, shift: int) -> None:
    """Labels stand in the lists, which are not gone through when an index is opened: a search names them."""
    bank = make_bank(snippets=clustered(3000, 8))
    path = made(bank, "ivf-flat")
    state = read_index(path)
    lists = state.facts["num_lists"]
    for number in range(lists):
        ids = faiss.rev_swig_ptr(state.faiss.invlists.get_ids(number), state.faiss.invlists.list_size(number))
        ids += shift
    write_index(path, state)
    if masked:
        gmem_bank.mask(bank.path, Selection(keys=tuple(bank.keys(np.arange(99)))))
    index = gmem_bank.open_index(gmem_bank.open(bank.path))
    if not masked:
        with pytest.raises(CorruptError, match="not in its table"):
            index.nearest(clustered(30, 8), 1, nprobe=lists)
        return
    with pytest.raises(CorruptError, match="not in its table"):
        index._candidates.hidden_from(clustered(30, 8), 1, lists)


@pytest.mark.parametrize("masked", [False, True])
def test_a_row_twice_in_the_lists_is_refused(make_bank: BankMaker, masked: bool) -> None:
    """A search would give it as several neighbours, and hide those whose place it has taken."""
    bank = make_bank(snippets=clustered(3000, 8))
    path = made(bank, "ivf-flat")
    state = read_index(path)
    for number in range(state.facts["num_lists"]):
        size = state.faiss.invlists.list_size(number)
        faiss.rev_swig_ptr(state.faiss.invlists.get_ids(number), size)[:] = 2999
        codes = faiss.rev_swig_ptr(state.faiss.invlists.get_codes(number), size * 32).reshape(size, 32)
        codes[:] = np.frombuffer(bank.snippets([2999]).tobytes(), np.uint8)
    write_index(path, state)
    if masked:
        gmem_bank.mask(bank.path, Selection(keys=tuple(bank.keys(np.arange(9)))))
    index = gmem_bank.open_index(gmem_bank.open(bank.path))
    with pytest.raises(CorruptError, match="twice"):
        index.nearest(clustered(1, 8), 5)


def forged(state: index_file.IndexState, **changes: object) -> Path:
    """An index that says other things of itself, under a hash that fits."""
    write_index(Path("forged.index"), dataclasses.replace(state, facts={**state.facts, **changes}))
    return Path("forged.index")


@pytest.mark.parametrize("kind", ["flat", *FAISS_KINDS])
def test_forged_facts_are_refused(make_bank: BankMaker, kind: str) -> None:
    """Every fact that cannot be is a CorruptError, whatever was built on it; nothing is allocated from a number that is said."""
    state = read_index(made(make_bank(snippets=clustered(300, 8), kind="factored", rank=4), kind))
    content, settings = state.facts["content"], state.facts["settings"]
    segment, factors = content["segments"][0], content["factors"]
    changes: list[dict[str, object]] = [{"kind": other} for other in (*KINDS, "auto", "", "x") if other != kind]
    changes += [{"dim": value} for value in (0, -1, True, 1 << 70, state.facts["dim"] + 1)]
    changes += [{"num_lists": value} for value in (-1, 1 << 40, 1 + state.facts["num_lists"], None)]
    changes += [{"trained_rows": value} for value in (-1, True, 1.5, 1 << 200)]
    changes += [{"settings": value} for value in (
        {"nprobe": "8", "rerank": 1}, {"nprobe": 0, "rerank": 1}, {"nprobe": 1 << 40, "rerank": 1}, {"nprobe": 1}, {"rerank": 1},
        {"nprobe": 1, "rerank": 10**30}, {"nprobe": True, "rerank": 1}, {**settings, "x": 1}, [],
    )]  # fmt: skip
    changes += [{"measured": [value]} for value in (
        0, {}, {"kind": "x"}, {"kind": "x", "recall": "1", "queries_per_second": 1, "bytes": 1},
        {"kind": "x", "recall": 1, "queries_per_second": 1e300, "bytes": 1},
        {"kind": "x", "recall": 1, "queries_per_second": 1, "bytes": 10**100},
    )]  # fmt: skip
    changes += [{"content": {**content, **value}} for value in (
        {"segments": [[10**13, segment[1]]]}, {"segments": [[10**30, segment[1]]]}, {"segments": [[-300, segment[1]]]},
        {"segments": [[299, segment[1]]]}, {"segments": [segment, segment]}, {"segments": [segment[0]]}, {"segments": {}},
        {"segments": [[300.0, segment[1]]]}, {"segments": [[300, 7]]}, {"dim": "8"}, {"dim": 9}, {"encoder": 3}, {"space": None},
        {"factors": 1}, {"factors": {**factors, "rank": "4"}}, {"factors": {"rank": 4}}, {"factors": {**factors, "mean": None}},
    )]  # fmt: skip
    changes += [{"content": {}}, {"bank": 7}, {"version": True}]
    for change in changes:
        if change.get("num_lists") == 0:
            continue
        if "version" in change:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(index_file, "VERSION", True)
                path = forged(state)
        else:
            path = forged(state, **change)
        with pytest.raises(CorruptError):
            read_index(path)
    read_index(forged(state))


def test_segments_of_swapped_sizes_are_another_state(make_bank: BankMaker) -> None:
    """The sum is right and each hash is known: rows are matched by values then, not by places that do not exist."""
    bank = make_bank(snippets=clustered(60, 8), parts=(40, 20))
    gmem_bank.build_index(bank.path, kind="ivf-flat", nprobe=1, rerank=1)
    state = read_index(index_path(bank.path))
    (first, one), (second, two) = state.facts["content"]["segments"]
    content = {**state.facts["content"], "segments": [[second, one], [first, two]]}
    write_index(index_path(bank.path), dataclasses.replace(state, facts={**state.facts, "content": content}))
    report = gmem_bank.update_index(bank.path)
    assert (report.num_added, report.num_removed) == (0, 0)


def test_a_damaged_index_of_ours_is_replaced_and_another_file_is_not(make_bank: BankMaker) -> None:
    """-o looks at what the file says it is, and does not read it."""
    bank = make_bank(snippets=clustered(300, 8))
    gmem_bank.build_index(bank.path, kind="ivf-flat", output="x.index")
    good = Path("x.index").read_bytes()
    for bad in (good[:-1], good[:3000], good[:20] + b"\0" + good[21:], good.replace(b"ilar", b"ilod")):
        Path("x.index").write_bytes(bad)
        gmem_bank.build_index(bank.path, kind="ivf-flat", output="x.index")
        read_index(Path("x.index"))
    for other in (
        b"",
        b"{}",
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x12\0\0\0\0\0\0\0" + b'{"__metadata__":1}',
        bank.path.read_bytes(),
    ):
        Path("y").write_bytes(other)
        assert not index_facts.is_ours(Path("y"))
        with pytest.raises(OutputExistsError, match="is no index"):
            gmem_bank.build_index(bank.path, output="y")
    Path("folder").mkdir()
    with pytest.raises(OutputExistsError, match="is no index"):
        gmem_bank.build_index(bank.path, output="folder")


def test_the_output_is_not_deserialised(make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    """To see that an old index is ours its metadata is enough."""
    bank = make_bank(snippets=clustered(300, 8))
    gmem_bank.build_index(bank.path, kind="ivf-flat", output="x.index")
    monkeypatch.setattr(faiss, "read_index", lambda *_: pytest.fail("read as a whole"))
    assert gmem_bank.build_index(bank.path, kind="flat", output="x.index").kind == "flat"


@pytest.mark.parametrize("rows", [[0, 0, 2], [0, 1, 3], [-1, 0, 1], [0, 1]])
def test_a_table_of_keys_that_is_no_permutation_is_named(
    make_bank: BankMaker, monkeypatch: pytest.MonkeyPatch, rows: list[int]
) -> None:
    """Rows twice, outside, negative, missing."""
    bank = make_bank(rows=3)
    whole = bank.stored.array
    monkeypatch.setattr(
        bank.stored, "array", lambda name: np.array(rows, np.int64) if name == "keys.row" else whole(name)
    )
    with pytest.raises(CorruptError, match=r"each row once.*gmem-bank verify"):
        key_hashes(bank)
