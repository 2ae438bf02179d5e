"""A bank in the making: starts as an open bank, is changed step by step, ends as a header and entries.

Nothing is loaded but what belongs to all rows (hashes of keys, concepts, mask); the rest passes through as streams.

Shapes: N rows, n rows of a segment, D dimensions, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank import keys as key_tables
from gmem_bank import segments, streams
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import CorruptError, GMemError
from gmem_bank.provenance import EncoderSpec, Json, Source, relative_to_bank
from gmem_bank.storage import Payload
from gmem_bank.storage.rules import BANK_WIDE, vector_entries
from gmem_bank.storage.schema import VERSION, Header, Segment

MAX_SEGMENTS = 64
"""Past this many, an edit joins segments: each costs a search per lookup."""


@dataclass(frozen=True, kw_only=True)
class NewRows:
    """Rows to append as one segment."""

    num_rows: int
    vectors: Mapping[str, Payload]
    """What the rows hold, by the names of the format: {"snippets": …}, or {"coefficients": …, "scale": …}, …"""
    key_text: tuple[NDArray[np.uint8], NDArray[np.int64]]
    """Text and offsets of the keys."""
    hashes: NDArray[np.uint64]
    """(n,) hashes of the keys."""
    sources: NDArray[np.int64]
    """(n,) positions in the draft's list of sources."""
    active: NDArray[np.bool_] | None = None
    """(n,) row mask; None: all active."""
    extras: Mapping[str, Json] | None = None

    @classmethod
    def of(cls, keys: Sequence[str], sources: NDArray[np.int64], vectors: Mapping[str, Payload]) -> NewRows:
        """Make them from keys."""
        return cls(
            num_rows=len(keys), vectors=vectors, key_text=key_tables.encode(keys),
            hashes=key_tables.hashes_of(keys), sources=sources,
        )  # fmt: skip


def relocated(bank: MemoryBank, target: Path) -> tuple[EncoderSpec, tuple[Source, ...]]:
    """Return encoder and sources with their paths relative to where the new bank will lie."""
    if target.resolve().parent == bank.folder:
        return bank.encoder, bank.sources

    def move(path: str) -> str:
        return relative_to_bank(bank.folder / path, target.parent)

    encoder, weights = bank.encoder, bank.encoder.weights_path
    moved = encoder if weights is None else replace(encoder, weights_path=move(weights))
    return moved, tuple(s if s.path is None else replace(s, path=move(s.path)) for s in bank.sources)


class Draft:
    """A bank in the making.

    Args:
        bank: what it starts as.
        target: where it will lie: source paths are made relative to that.
    """

    def __init__(self, bank: MemoryBank, target: Path) -> None:
        self.bank, self.target = bank, target
        self.kind, self.extras = bank.header.kind, dict(bank.header.extras)
        self.encoder, sources = relocated(bank, target)
        self.sources = list(sources)
        self.segments = list(bank.header.segments)
        self.payloads = {name: p for name, p in bank.stored.payloads().items() if name not in BANK_WIDE}
        self._stored = {name: bank.stored.payload(name) for name in BANK_WIDE if name in bank.stored}
        self._table: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None
        self._concepts: dict[str, NDArray[np.int64]] | None = None
        self._only_appended = True

    # -- what belongs to all rows, read on first use and checked

    @property
    def num_rows(self) -> int:
        """N as it is now."""
        return sum(segment.num_rows for segment in self.segments)

    def table(self) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        """Return the key table: hashes ascending, and their rows."""
        if self._table is None:
            hashes, rows = streams.read(self._stored["keys.hash"]), streams.read(self._stored["keys.row"])
            if rows.min() < 0 or rows.max() >= self.num_rows:
                raise CorruptError(
                    f"{self.bank.path}: the table of keys names a row that is not there", tensor="keys.row"
                )
            self._table = hashes, rows
        return self._table

    def concepts(self) -> dict[str, NDArray[np.int64]]:
        """Return name → rows; changing the result changes the draft."""
        if self._concepts is None:
            self._concepts = {}
            if self.bank.names:
                for what in ("rows", "offsets"):
                    streams.read(self._stored[f"concepts.{what}"])
                self._concepts = {name: self.bank.all_rows_of(name) for name in self.bank.names}
        return self._concepts

    def active(self) -> NDArray[np.bool_]:
        """Return the (N,) row mask."""
        if "active" not in self._stored:
            return np.ones(self.num_rows, np.bool_)
        return np.asarray(streams.read(self._stored["active"]).view(np.uint8).astype(np.bool_))

    def set_active(self, active: NDArray[np.bool_]) -> None:
        """Replace the row mask; a mask that hides nothing is left out of the file."""
        self._only_appended = False
        self._put_active(active)

    def _put_active(self, active: NDArray[np.bool_]) -> None:
        self._stored.pop("active", None)
        if not active.all():
            self._stored["active"] = Payload.of(active)

    def set_concepts(self, concepts: Mapping[str, NDArray[np.int64]]) -> None:
        """Replace the concepts."""
        self._only_appended = False
        self._concepts = dict(concepts)

    def set_factors(self, *, grown: bool, **entries: NDArray[np.float32]) -> None:
        """Replace entries of the basis; `grown`: the old rows of each stand as they were, at the front."""
        self._only_appended = self._only_appended and grown
        self.payloads |= {name: Payload.of(np.asarray(values, np.float32)) for name, values in entries.items()}

    # -- steps

    def append(self, rows: NewRows, concept: str | None = None) -> None:
        """Add a segment, whose rows all belong to a concept where one is named."""
        first = self.num_rows
        mask = self.active() if "active" in self._stored or rows.active is not None else None
        self._table = key_tables.extended_table(*self.table(), rows.hashes, first)
        if concept is not None:
            self.extend_concepts({concept: np.arange(first, first + rows.num_rows, dtype=np.int64)})
        name = str(1 + max((int(s.name) for s in self.segments if s.name.isascii() and s.name.isdigit()), default=-1))
        self.segments.append(Segment(name=name, num_rows=rows.num_rows, extras=rows.extras or {}))
        self.payloads |= {f"{name}/{what}": payload for what, payload in rows.vectors.items()}
        self._put_keys(name, rows.key_text, rows.sources)
        if mask is not None:
            new = np.ones(rows.num_rows, np.bool_) if rows.active is None else rows.active
            both = np.concatenate([mask, new])
            # a mask of the old bank that hid nothing and is left out now is one that undo could not give back
            self._only_appended = self._only_appended and not ("active" in self._stored and both.all())
            self._put_active(both)

    def extend_concepts(self, concepts: Mapping[str, NDArray[np.int64]]) -> None:
        """Add appended rows to concepts, new ones at the end of the list."""
        for name, members in concepts.items():
            old = self.concepts().get(name)
            self.concepts()[name] = members if old is None else np.concatenate([old, members])

    def _put_keys(
        self, name: str, key_text: tuple[NDArray[np.uint8], NDArray[np.int64]], sources: NDArray[np.int64]
    ) -> None:
        self.payloads[f"{name}/keys.bytes"] = Payload.of(key_text[0])
        self.payloads[f"{name}/keys.offsets"] = Payload.of(key_text[1])
        self.payloads[f"{name}/source"] = Payload.of(sources.astype(np.uint32))

    def keep(self, keep: NDArray[np.bool_]) -> list[str]:
        """Keep only the rows of an (N,) mask; return the concepts that are gone because none of their rows is left.

        A segment that loses none of its rows is copied, one that loses all is dropped, sources that no row points at go.
        """
        if not keep.any():
            raise GMemError(
                f"{self.bank.path}: no row would be left, and a bank must keep at least one: delete the file"
            )
        self._only_appended = False
        renumbered = np.cumsum(keep) - 1
        old = self.concepts()
        self._concepts = {name: renumbered[rows[keep[rows]]] for name, rows in old.items() if keep[rows].any()}
        self._table = key_tables.filtered_table(*self.table(), keep)
        if "active" in self._stored:
            self._put_active(self.active()[keep])
        starts = np.cumsum([0, *(segment.num_rows for segment in self.segments)])
        masks = [keep[starts[i] : starts[i + 1]] for i in range(len(self.segments))]
        self._drop_sources(masks)
        segments_left = []
        for segment, mask in zip(self.segments, masks, strict=True):
            if mask.any():
                segments_left.append(replace(segment, num_rows=int(mask.sum())))
            if not mask.all():
                self._filter(segment, mask)
        self.segments = segments_left
        return [name for name in old if name not in self._concepts]

    def factorise(self, grow_below: float, **entries: NDArray[np.float32]) -> None:
        """Make it a factored bank with this basis, mean and singular values; its segments have been replaced for that."""
        self.kind, self.extras = "factored", {**self.extras, "grow_below": grow_below}
        self.set_factors(grown=False, **entries)

    def _drop_sources(self, masks: Sequence[NDArray[np.bool_]]) -> None:
        """Number the sources anew after those that no kept row points at are gone."""
        ids = [streams.read(self.payloads[segment.entry("source")]) for segment in self.segments]
        used = np.unique(np.concatenate([i[mask] for i, mask in zip(ids, masks, strict=True)]))
        if used[-1] >= len(self.sources):
            raise CorruptError(f"{self.bank.path}: a row points at source {used[-1]} of {len(self.sources)}")
        if len(used) == len(self.sources):
            return
        self.sources = [self.sources[index] for index in used]
        for segment, own in zip(self.segments, ids, strict=True):
            self.payloads[segment.entry("source")] = Payload.of(np.searchsorted(used, own).astype(np.uint32))

    def _filter(self, segment: Segment, mask: NDArray[np.bool_]) -> None:
        own = {name: p for name, p in self.payloads.items() if name.startswith(f"{segment.name}/")}
        self.payloads = {name: p for name, p in self.payloads.items() if name not in own}
        if not mask.any():
            return
        for what in (*vector_entries(self.bank.header, segment, own), "source"):
            self.payloads[segment.entry(what)] = streams.filtered(own[segment.entry(what)], mask)
        if segment.entry("scale") in own:
            self.payloads[segment.entry("scale")] = own[segment.entry("scale")]
        text, offsets = (streams.read(own[segment.entry(f"keys.{what}")]) for what in ("bytes", "offsets"))
        text, offsets = key_tables.filtered(text, key_tables.require_offsets(offsets, len(text), self.bank.path), mask)
        self.payloads[segment.entry("keys.bytes")] = Payload.of(text)
        self.payloads[segment.entry("keys.offsets")] = Payload.of(offsets)

    def replace_segments(self, parts: Sequence[tuple[Segment, dict[str, Payload]]]) -> None:
        """Put other segments with the same rows in the same order in place of these: joined, cut or re-coded."""
        assert sum(segment.num_rows for segment, _ in parts) == self.num_rows, "rows would be lost"
        self._only_appended = False
        names = {segment.name for segment in self.segments}
        self.payloads = {name: p for name, p in self.payloads.items() if name.partition("/")[0] not in names}
        self.segments = [segment for segment, _ in parts]
        for segment, entries in parts:
            self.payloads |= {segment.entry(what): payload for what, payload in entries.items()}

    def segment_entries(self, segment: Segment) -> dict[str, Payload]:
        """Return what a segment holds, by the names of the format without the segment's."""
        start = f"{segment.name}/"
        return {name.removeprefix(start): p for name, p in self.payloads.items() if name.startswith(start)}

    # -- the end

    def finish(self, entry: Mapping[str, Json] | None) -> tuple[Header, dict[str, Payload]]:
        """Return header (hashes still open) and entries.

        Args:
            entry: what the history gains; None for the same bank in another place or form.
        """
        concepts = self.bank.names if self._concepts is None else tuple(self._concepts)
        history = self.bank.history
        if entry is not None:
            added = {"appended": self._appended()} if self._only_appended else {}
            history = (*history, {**entry, **added, "parent": self.bank.fingerprint})
        version = self.bank.header.version if entry is None else max(self.bank.header.version, VERSION)
        header = replace(
            self.bank.header, version=version, segments=tuple(self.segments), encoder=self.encoder, sources=tuple(self.sources),
            concepts=concepts, history=history, kind=self.kind, extras=self.extras,
        )  # fmt: skip
        payloads = self._stored | self.payloads
        if self._table is not None:
            payloads |= segments.key_table_payloads(*self._table)
        if self._concepts is not None:
            payloads = {name: p for name, p in payloads.items() if not name.startswith("concepts.")}
            payloads |= segments.concept_payloads(self._concepts)
        return header, payloads

    def _appended(self) -> dict[str, Any]:
        """Return how much was added at the end of each list: `undo` takes just that away again."""
        old = self.bank.header
        concepts = self.bank.names if self._concepts is None else tuple(self._concepts)
        counts: dict[str, Any] = {
            "segments": len(self.segments) - len(old.segments),
            "sources": len(self.sources) - len(old.sources),
            "concepts": len(concepts) - len(old.concepts),
            "active": ("active" in self._stored) != ("active" in self.bank.stored),
        }
        if old.version < VERSION:
            counts["version"] = list(old.version)
        if "basis" in self.payloads:
            counts["rank"] = self.payloads["basis"].shape[0] - self.bank.stored.shape("basis")[0]
        return counts

    @property
    def only_appended(self) -> bool:
        """Whether the old bank is the front part of this one."""
        return self._only_appended
