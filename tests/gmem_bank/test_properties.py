"""Laws of banks of every kind and form, whatever their rows, keys, segments and masks."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gmem_bank
from gmem_bank import keys as key_tables
from gmem_bank import segments
from gmem_bank.bank import MemoryBank
from gmem_bank.draft import MAX_SEGMENTS
from gmem_bank.errors import GMemError, MaskedRowError
from gmem_bank.provenance import EncoderSpec, Source
from gmem_bank.selection import Selection
from gmem_bank.storage import Payload, open_stored, write
from gmem_bank.storage.schema import Header, Segment
from gmem_bank.verifier import verify
from tests.conftest import stored_oracle, synthetic_bank, vectors_of

KINDS = [("dense", "f32"), ("dense", "f16"), ("dense", "bf16")]
KINDS += [(kind, dtype) for kind in ("factored", "sparse") for dtype in ("f32", "f16", "i8")]
FORMS = (".safetensors", ".h5", ".gmem")
CONCEPTS = ("cat", "neon dog", "猫", "a.b")
every_kind = pytest.mark.parametrize(("kind", "dtype"), KINDS)
every_form = pytest.mark.parametrize("form", FORMS)
few = settings(max_examples=3)


# -- banks to be drawn

letters = st.characters(codec="utf-8", exclude_characters="/\0")
odd_names = st.sampled_from(
    [
        "🐟",
        "👩🏽‍🚀.png",
        "a\nb",
        "\r\n",
        " ",
        "...",
        "x#flip",
        "a\\b",
        "é",
        "e\u0301",
        "\u202e",
        "y" * 10_000,
        "z" * 60_000,
    ]
)
names = st.one_of(st.text(letters, min_size=1, max_size=8), odd_names).filter(lambda name: name != "..")


@st.composite
def key_lists(draw: st.DrawFn, count: int) -> list[str]:
    """Different keys: some in concepts, some deeper, some outside any."""
    tails = draw(st.lists(names, min_size=count, max_size=count, unique=True))
    heads = draw(
        st.lists(st.sampled_from(["", "deep/er/", *(f"{c}/" for c in CONCEPTS)]), min_size=count, max_size=count)
    )
    keys = [head + tail for head, tail in zip(heads, tails, strict=True)]
    return keys if len(set(keys)) == count else [f"{key}{n}" for n, key in enumerate(keys)]


@dataclass(frozen=True)
class Plan:
    """All that makes a bank, but for its kind and place."""

    values: np.ndarray
    keys: list[str]
    parts: tuple[int, ...]
    active: np.ndarray | None
    space: str
    rank: int
    later: bool
    """Whether it has entries and fields of a later minor version."""

    def make(self, path: Path, kind: str, dtype: str, prefix: str = "") -> MemoryBank:
        bank = synthetic_bank(
            path, snippets=self.values, keys=[prefix + key for key in self.keys], parts=self.parts, active=self.active,
            space=self.space, rank=self.rank, kind=kind, dtype=dtype,
        )  # fmt: skip
        if not self.later:
            return bank
        stored = bank.stored
        payloads = stored.payloads() | {
            "thumbnails": Payload.of(np.arange(5, dtype=np.uint8)),
            "0/thumbnails": Payload.of(np.arange(3, dtype=np.uint16)),
        }
        write(path, replace(stored.header, extras={"colour": "blue"}, version=(1, 9)), payloads)
        if path.is_dir():
            _only_listed(path)
        return gmem_bank.open(path)


def _only_listed(folder: Path) -> None:
    from gmem_bank.storage import folder_store

    folder_store.sweep(folder, {folder_store.MANIFEST})


@st.composite
def plans(
    draw: st.DrawFn, *, least: int = 1, dim: int | None = None, space: str | None = None, later: bool = True
) -> Plan:
    """Draw a bank of up to a dozen rows in one to four segments."""
    count = draw(st.integers(least, 12))
    dim = dim or draw(st.integers(3, 9))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = (rng.standard_normal((count, dim)) + 2).astype(np.float32)  # away from 0, where a direction is badly known
    cuts = sorted(draw(st.sets(st.integers(1, count - 1), max_size=3))) if count > 1 else []
    active = None
    if draw(st.booleans()):
        active = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
        active[draw(st.integers(0, count - 1))] = True
    return Plan(
        values=values,
        keys=draw(key_lists(count)),
        parts=tuple(np.diff([0, *cuts, count]).tolist()),
        active=active,
        space=space or draw(st.sampled_from(["raw", "unit"])),
        rank=draw(st.integers(1, min(count, dim))),
        later=later and draw(st.booleans()),
    )


_folders = itertools.count()


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[[], Path]:
    """Return a function that gives a new empty folder: a drawn example must not see the one before it."""

    def make() -> Path:
        folder = tmp_path / f"example-{next(_folders)}"
        folder.mkdir()
        return folder

    return make


# -- what is compared


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def bank_bytes(path: Path) -> dict[str, bytes]:
    """The bytes of a bank, without what is kept for undo."""
    if path.is_file():
        return {"": path.read_bytes()}
    stored = open_stored(path)
    listed = {stored.place(name).file.path.name for name in stored.names()}
    return {name: (path / name).read_bytes() for name in ("manifest.json", *sorted(listed))}


def content(bank: MemoryBank) -> dict[str, Any]:
    """Keys, concepts by key, mask and image sources, as they are seen through the interface."""
    keys = bank.keys(np.arange(len(bank)))
    return {
        "keys": keys,
        "concepts": {name: [keys[row] for row in bank.all_rows_of(name)] for name in bank.names},
        "active": bank.rows().tolist(),
        "sources": [bank.sources[n] for n in bank.source_ids(np.arange(len(bank)))],
    }


def snippets_of(bank: MemoryBank) -> np.ndarray:
    return bank.snippets(bank.rows())


def coefficients_of(bank: MemoryBank) -> np.ndarray:
    return bank.coefficients(bank.rows()) if bank.header.kind == "factored" else np.zeros(0, np.float32)


# -- storage


@every_form
@every_kind
@few
@given(plan=plans())
def test_a_bank_is_what_was_written_and_saves_to_the_same_bytes(
    fresh: Callable[[], Path], kind: str, dtype: str, form: str, plan: Plan
) -> None:
    """Keys, mask, concepts and snippets are those it was made of; open then save is the identity in bytes."""
    folder, again = fresh(), fresh()
    bank = plan.make(folder / f"bank{form}", kind, dtype)
    count = len(plan.keys)
    active = np.ones(count, np.bool_) if plan.active is None else plan.active
    assert bank.keys(np.arange(count)) == plan.keys
    assert bank.rows_for(plan.keys[::-1]).tolist() == list(range(count))[::-1]
    assert bank.rows().tolist() == np.flatnonzero(active).tolist()
    for name in bank.names:
        members = [row for row, key in enumerate(plan.keys) if key.startswith(f"{name}/")]
        assert bank.all_rows_of(name).tolist() == members
        assert bank.rows_of(name).tolist() == [row for row in members if active[row]]
    tolerance = 1e-6 * max(1.0, float(np.abs(plan.values).max()))
    np.testing.assert_allclose(snippets_of(bank), stored_oracle(bank)[active], atol=tolerance)
    assert verify(bank.path).ok
    # in the same folder under another name: a bank that moves has other relative paths in it
    gmem_bank.save(bank, folder / f"again{form}")
    gmem_bank.save(gmem_bank.open(folder / f"again{form}"), again / f"bank{form}")
    assert bank_bytes(folder / f"again{form}") == bank_bytes(bank.path)
    saved = gmem_bank.open(folder / f"again{form}")
    assert content(saved) == content(bank)
    np.testing.assert_array_equal(snippets_of(saved), snippets_of(bank))


@every_kind
@few
@given(plan=plans())
def test_every_way_through_the_forms_ends_at_the_same_bytes(
    fresh: Callable[[], Path], kind: str, dtype: str, plan: Plan
) -> None:
    """Converting to another form, or through all of them, and back keeps every byte, the fingerprint and all values."""
    folder = fresh()
    first = plan.make(folder / "bank.safetensors", kind, dtype)
    at_home = {form: folder / f"way{form}" for form in FORMS}
    for form in FORMS:
        gmem_bank.save(first, at_home[form])
    for number, way in enumerate(itertools.permutations(FORMS)):
        bank = gmem_bank.open(at_home[way[0]])
        for step, form in enumerate((*way[1:], way[0])):
            target = folder / f"{number}-{step}{form}"
            gmem_bank.save(bank, target)
            bank = gmem_bank.open(target)
            assert bank_bytes(target) == bank_bytes(at_home[form])
            assert bank.fingerprint == first.fingerprint
        np.testing.assert_array_equal(snippets_of(bank), snippets_of(first))
        assert content(bank) == content(first)


# -- edits

new_rows = st.integers(1, 5)


def drawn_rows(data: st.DataObject, dim: int) -> np.ndarray:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    return (rng.standard_normal((data.draw(new_rows), dim)) + 2).astype(np.float32)


@every_form
@every_kind
@few
@given(plan=plans(), data=st.data())
def test_remove_of_insert_is_the_identity(
    fresh: Callable[[], Path], kind: str, dtype: str, form: str, plan: Plan, data: st.DataObject
) -> None:
    """remove(insert(b)) = b in keys, concepts, mask, sources and snippets, though a basis has grown in between."""
    bank = plan.make(fresh() / f"bank{form}", kind, dtype)
    rows = drawn_rows(data, bank.dim)
    gmem_bank.insert_snippets(bank.path, rows, name="new one", report=False)
    inserted = gmem_bank.open(bank.path)
    assert verify(bank.path).ok
    assert inserted.rows_of("new one").tolist() == list(range(len(bank), len(bank) + len(rows)))
    np.testing.assert_allclose(inserted.snippets(bank.rows()), snippets_of(bank), atol=1e-5)
    gmem_bank.remove_concept(bank.path, "new one")
    after = gmem_bank.open(bank.path)
    assert verify(bank.path).ok
    assert content(after) == content(bank)
    np.testing.assert_allclose(
        snippets_of(after), snippets_of(bank), atol=0 if kind == "dense" else 1e-6 * np.abs(plan.values).max()
    )


def some_rows(data: st.DataObject, bank: MemoryBank) -> Selection:
    """Draw a selection of one row or more, by keys or by concepts."""
    if bank.names and data.draw(st.booleans()):
        return Selection(concepts=tuple(data.draw(st.sets(st.sampled_from(bank.names), min_size=1))))
    keys = bank.keys(np.arange(len(bank)))
    return Selection(keys=tuple(data.draw(st.sets(st.sampled_from(keys), min_size=1))), invert=data.draw(st.booleans()))


def an_item(data: st.DataObject, bank: MemoryBank) -> str:
    return data.draw(st.sampled_from([*bank.names, *bank.keys(bank.rows())] or ["none"]))  # all rows may be masked


def merge_with_another(path: Path, bank: MemoryBank, data: st.DataObject, number: int) -> Any:
    plan = data.draw(plans(dim=bank.dim, space=bank.space, later=False))
    kinds = (
        [("dense", "f16"), ("dense", "f32")] if bank.header.kind == "dense" else [("factored", "f32"), ("sparse", "i8")]
    )
    kind, dtype = data.draw(st.sampled_from(kinds))
    other = plan.make(
        path.parent.parent / f"other-{path.parent.name}-{number}.safetensors", kind, dtype, prefix=f"other {number}/"
    )
    return gmem_bank.merge(path, [other.path])


Edit = Callable[[Path, MemoryBank, Any, int], Any]
EDITS: dict[str, Edit] = {
    "insert_snippets": lambda path, bank, data, n: gmem_bank.insert_snippets(
        path, drawn_rows(data, bank.dim), name=f"new {n}", report=False
    ),
    "concept_of_rows": lambda path, bank, data, n: gmem_bank.concept_of_rows(path, f"tag {n}", some_rows(data, bank)),
    "remove": lambda path, bank, data, n: gmem_bank.remove(path, some_rows(data, bank)),
    "remove_concept": lambda path, bank, data, n: gmem_bank.remove_concept(path, data.draw(st.sampled_from(bank.names or ("none",)))),
    "rename": lambda path, bank, data, n: gmem_bank.rename(path, data.draw(st.sampled_from(bank.names or ("none",))), f"renamed {n}"),
    "select": lambda path, bank, data, n: gmem_bank.select(path, some_rows(data, bank)),
    "mask": lambda path, bank, data, n: gmem_bank.mask(path, some_rows(data, bank)),
    "unmask": lambda path, bank, data, n: gmem_bank.unmask(path, data.draw(st.sampled_from([None, some_rows(data, bank)]))),
    "interpolate": lambda path, bank, data, n: gmem_bank.interpolate(
        path, an_item(data, bank), an_item(data, bank), steps=data.draw(st.integers(2, 4)), name=f"way {n}",
        method=data.draw(st.sampled_from(["linear", "slerp", "concat", "mask"])),
    ),
    "compose": lambda path, bank, data, n: gmem_bank.compose(path, {an_item(data, bank): 1.0, an_item(data, bank): 0.5}, name=f"sum {n}"),
    "merge": merge_with_another,
    "dedup": lambda path, bank, data, n: gmem_bank.dedup(path, threshold=0.9),
    "compact": lambda path, bank, data, n: gmem_bank.compact(path),
}  # fmt: skip
APPENDS = {"insert_snippets", "interpolate", "compose"}
every_edit = pytest.mark.parametrize("operation", EDITS)


def edited(operation: str, path: Path, data: st.DataObject, number: int) -> bool:
    """Run an edit; return whether the bank is another now. One that is refused, or has nothing to do, changes no byte."""
    before = bytes_of(path.parent)
    try:
        report = EDITS[operation](path, gmem_bank.open(path), data, number)
    except GMemError:
        assert bytes_of(path.parent) == before
        return False
    if report.unchanged:
        assert bytes_of(path.parent) == before
        return False
    assert verify(path).ok
    assert report.fingerprint == gmem_bank.open(path).fingerprint
    assert report.num_rows == len(gmem_bank.open(path))
    return True


@every_edit
@settings(max_examples=14)
@given(plan=plans(), kind=st.sampled_from(KINDS), form=st.sampled_from(FORMS), data=st.data())
def test_undo_restores_every_byte(
    fresh: Callable[[], Path], operation: str, plan: Plan, kind: tuple[str, str], form: str, data: st.DataObject
) -> None:
    """Of any edit, on a bank of any kind and form: the bank and the folder around it are as they were."""
    folder = fresh()
    if operation == "unmask" and plan.active is None:
        plan = replace(plan, active=np.arange(len(plan.keys)) != len(plan.keys) - 2)
    bank = plan.make(folder / f"bank{form}", *kind)
    before = bytes_of(folder)
    if edited(operation, bank.path, data, 0):
        if operation in APPENDS or (operation == "merge" and kind[0] == "dense"):
            explicit = plan.active is not None and plan.active.all()
            assert "appended" in gmem_bank.open(bank.path).history[-1] or explicit
        report = gmem_bank.undo(bank.path)
        assert report.fingerprint == bank.fingerprint
        assert bytes_of(folder) == before


@settings(max_examples=40)
@given(
    plan=plans(least=3), kind=st.sampled_from(KINDS), form=st.sampled_from(FORMS), data=st.data(),
    operations=st.lists(st.sampled_from([*EDITS, *APPENDS]), min_size=2, max_size=4),
)  # fmt: skip
def test_edits_in_a_row_are_undone_one_by_one(
    fresh: Callable[[], Path], plan: Plan, kind: tuple[str, str], form: str, data: st.DataObject, operations: list[str]
) -> None:
    """Appends to any depth, and the last edit of another sort; an older one of another sort is refused and changes nothing."""
    folder = fresh()
    bank = plan.make(folder / f"bank{form}", *kind)
    states = [bank_bytes(bank.path)]
    for number, operation in enumerate(operations):
        if edited(operation, bank.path, data, number):
            states.append(bank_bytes(bank.path))
    states.pop()
    spent = False  # the one state that is kept has been used
    while states:
        appended = "appended" in gmem_bank.open(bank.path).history[-1]
        if spent and not appended:
            before = bytes_of(folder)
            with pytest.raises(GMemError, match="not kept"):
                gmem_bank.undo(bank.path)
            assert bytes_of(folder) == before
            return
        spent = spent or not appended
        gmem_bank.undo(bank.path)
        assert bank_bytes(bank.path) == states.pop()
        assert verify(bank.path).ok
    with pytest.raises(GMemError, match="nothing to undo"):
        gmem_bank.undo(bank.path)


@every_kind
@few
@given(data=st.data(), space=st.sampled_from(["raw", "unit"]), dim=st.integers(3, 8))
def test_merge_is_associative(
    fresh: Callable[[], Path], kind: str, dtype: str, data: st.DataObject, space: str, dim: int
) -> None:
    """(a + b) + c, a + (b + c) and a + b + c hold the same rows, concepts and mask, and snippets to the type's precision."""
    folder = fresh()
    plans_of = {name: data.draw(plans(dim=dim, space=space, later=False)) for name in "abc"}
    a, b, c = (
        plan.make(folder / f"{name}.safetensors", kind, dtype, prefix=f"{name}/").path
        for name, plan in plans_of.items()
    )
    ab, bc = folder / "ab.safetensors", folder / "bc.h5"
    gmem_bank.merge(a, [b], output=ab)
    gmem_bank.merge(b, [c], output=bc)
    ways = [(ab, [c]), (a, [bc]), (a, [b, c])]
    merged = []
    for number, (first, others) in enumerate(ways):
        gmem_bank.merge(first, others, output=folder / f"all-{number}.gmem")
        merged.append(gmem_bank.open(folder / f"all-{number}.gmem"))
        assert verify(merged[-1].path).ok
    alone = [gmem_bank.open(path) for path in (a, b, c)]
    assert content(merged[0])["keys"] == [key for bank in alone for key in content(bank)["keys"]]
    expected = np.concatenate([snippets_of(bank) for bank in alone])
    # each time i8 is quantised anew, a coefficient moves by up to 1/254 of the largest of its column
    tolerance = {"f32": 1e-5, "f16": 5e-3, "i8": 0.06, "bf16": 0}[dtype] * float(np.abs(expected).max())
    for bank in merged:
        assert {**content(bank), "sources": None} == {**content(merged[0]), "sources": None}
        np.testing.assert_allclose(snippets_of(bank), expected, atol=0 if kind == "dense" else tolerance)


@every_form
@every_kind
@few
@given(plan=plans(least=2), data=st.data())
def test_selection_and_mask_algebra(
    fresh: Callable[[], Path], kind: str, dtype: str, form: str, plan: Plan, data: st.DataObject
) -> None:
    """select(A) keeps A, remove(A) = select(not A), mask hides A from all reads, and unmask after mask is the identity."""
    folder = fresh()
    bank = plan.make(folder / f"bank{form}", kind, dtype)
    keys, active = content(bank)["keys"], set(bank.rows().tolist())
    some = data.draw(st.sets(st.integers(0, len(keys) - 1), min_size=1, max_size=len(keys) - 1))
    chosen = Selection(keys=tuple(keys[row] for row in sorted(some, reverse=True)))
    others = replace(chosen, invert=True)
    selected, removed, inverted = (folder / f"{name}{form}" for name in ("selected", "removed", "inverted"))
    gmem_bank.select(bank.path, chosen, output=selected)
    gmem_bank.remove(bank.path, chosen, output=removed)
    gmem_bank.select(bank.path, others, output=inverted)
    for path, rows in ((selected, sorted(some)), (removed, sorted(set(range(len(keys))) - some))):
        kept = gmem_bank.open(path)
        assert kept.keys(np.arange(len(kept))) == [keys[row] for row in rows]
        assert kept.rows().tolist() == [place for place, row in enumerate(rows) if row in active]
        wanted = np.array([row for row in rows if row in active], np.int64)
        np.testing.assert_allclose(
            snippets_of(kept), bank.snippets(wanted), atol=0 if kind == "dense" else 1e-6 * np.abs(plan.values).max()
        )
        assert verify(path).ok
    assert gmem_bank.open(removed).fingerprint == gmem_bank.open(inverted).fingerprint
    if not active - some:
        with pytest.raises(GMemError, match="no row would be left active"):
            gmem_bank.mask(bank.path, chosen)
        return
    before = content(bank), snippets_of(bank)
    masked = gmem_bank.mask(bank.path, chosen)
    hidden = gmem_bank.open(bank.path)
    assert masked.unchanged == (not active & some)
    assert hidden.rows().tolist() == sorted(active - some)
    with pytest.raises(MaskedRowError):
        hidden.snippets(np.array(sorted(some)))
    assert hidden.keys(np.arange(len(keys))) == keys
    # shown again are only those that were hidden by this mask
    shown = tuple(keys[row] for row in sorted(active & some))
    if shown:
        gmem_bank.unmask(bank.path, Selection(keys=shown))
    back = gmem_bank.open(bank.path)
    assert (content(back), back.fingerprint == bank.fingerprint) == (
        before[0],
        plan.active is None or not plan.active.all(),
    )
    np.testing.assert_array_equal(snippets_of(back), before[1])


# -- compact


def mixed_bank(path: Path, kind: str, counts: list[int], types: list[tuple[str, str]], plan: Plan) -> MemoryBank:
    """Write a bank whose segments have different types: dense ones, or factored and sparse ones, i8 each with its own scale."""
    total = sum(counts)
    rng = np.random.default_rng(total)
    values = (rng.standard_normal((total, 6)) + 2).astype(np.float32)
    keys = [f"{CONCEPTS[row % 3]}/{row}🐟\n" for row in range(total)]
    mean, basis = values.mean(axis=0), np.linalg.svd(values - values.mean(axis=0))[2][:4].astype(np.float32)
    payloads = {} if kind == "dense" else {"basis": Payload.of(basis), "mean": Payload.of(mean)}
    for number, rows in enumerate(_runs(counts)):
        own_kind, dtype = types[number % len(types)]
        own_basis = basis if own_kind == "sparse" else basis[: 3 + number % 2]  # segments from before the basis grew
        entries = vectors_of(values[rows], own_kind, dtype, own_basis, mean)
        text, offsets = key_tables.encode([keys[row] for row in rows])
        entries |= {"keys.bytes": Payload.of(text), "keys.offsets": Payload.of(offsets)}
        entries["source"] = Payload.of(np.full(len(rows), number % 2, np.uint32))
        payloads |= {f"{number}/{what}": payload for what, payload in entries.items()}
    concepts = segments.concepts_of_folders(keys)
    payloads |= segments.key_table_payloads(*key_tables.sorted_table(key_tables.hashes_of(keys)))
    payloads |= segments.concept_payloads(concepts)
    payloads["active"] = Payload.of(np.arange(total) % 5 != 1)
    header = Header(
        kind=kind, space=plan.space, dim=6, encoder=EncoderSpec(name="x", family="x", dim=6, space=plan.space),
        segments=tuple(Segment(name=f"part_{n}", num_rows=c) for n, c in enumerate(counts)),
        sources=(Source(kind="folder", path="."), Source(kind="folder", path="..")), concepts=tuple(concepts),
        history=({"operation": "build", "arguments": {}, "num_rows": total},),
    )  # fmt: skip
    renamed = {n if n.partition("/")[0] == n else f"part_{n}": p for n, p in payloads.items()}
    write(path, header, renamed)
    return gmem_bank.open(path)


def _runs(counts: list[int]) -> Iterator[range]:
    start = 0
    for count in counts:
        yield range(start, start + count)
        start += count


DENSE_TYPES = [("dense", "f32"), ("dense", "f16"), ("dense", "bf16")]
FACTORED_TYPES = [(kind, dtype) for kind in ("factored", "sparse") for dtype in ("f32", "f16", "i8")]


@every_form
@settings(max_examples=4)
@given(
    counts=st.one_of(
        st.lists(st.integers(1, 3), min_size=2, max_size=9),
        st.lists(st.integers(1, 3), min_size=MAX_SEGMENTS + 2, max_size=MAX_SEGMENTS + 6),
    ),
    dense=st.booleans(),
    data=st.data(),
    plan=plans(),
)
def test_compact_changes_no_value(
    fresh: Callable[[], Path], form: str, counts: list[int], dense: bool, data: st.DataObject, plan: Plan
) -> None:
    """Segments of mixed types, scales and widths, few or more than 64, are joined with the same bits in every row."""
    kind, known = ("dense", DENSE_TYPES) if dense else ("factored", FACTORED_TYPES)
    types = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=6))
    folder = fresh()
    bank = mixed_bank(folder / f"bank{form}", kind, counts, types, replace(plan, space="raw") if dense else plan)
    before = bytes_of(folder)
    np.testing.assert_allclose(snippets_of(bank), stored_oracle(bank)[bank.rows()], atol=1e-5)
    report = gmem_bank.compact(bank.path)
    joined = gmem_bank.open(bank.path)
    assert verify(bank.path).ok
    assert report.details["num_segments"] == len(joined.header.segments) <= min(len(counts), MAX_SEGMENTS)
    assert content(joined) == content(bank)
    np.testing.assert_array_equal(coefficients_of(joined), coefficients_of(bank))
    if dense:
        np.testing.assert_array_equal(snippets_of(joined), snippets_of(bank))
    else:  # the same coefficients, multiplied in other batches
        np.testing.assert_allclose(snippets_of(joined), snippets_of(bank), atol=2e-6)
    gmem_bank.undo(bank.path)
    assert bytes_of(folder) == before


@every_form
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_an_edit_past_64_segments_joins_them_and_is_undone(fresh: Callable[[], Path], kind: str, form: str) -> None:
    """The insert that makes too many segments joins those of mixed types: old rows keep their values, undo every byte."""
    folder = fresh()
    plan = Plan(np.zeros(0), [], (), None, "unit" if kind == "factored" else "raw", 1, False)
    types = DENSE_TYPES if kind == "dense" else FACTORED_TYPES
    bank = mixed_bank(folder / f"bank{form}", kind, [1, 2] * (MAX_SEGMENTS // 2), types, plan)
    before = bytes_of(folder)
    gmem_bank.insert_snippets(bank.path, np.eye(3, 6, dtype=np.float32) + 1, name="new", report=False)
    after = gmem_bank.open(bank.path)
    assert len(after.header.segments) <= MAX_SEGMENTS
    assert verify(bank.path).ok
    np.testing.assert_allclose(after.snippets(bank.rows()), snippets_of(bank), atol=0 if kind == "dense" else 2e-6)
    gmem_bank.undo(bank.path)
    assert bytes_of(folder) == before
