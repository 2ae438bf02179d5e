"""A bank as a Parquet table, for pandas, DuckDB, Hugging Face datasets and viewers of embeddings.

Columns: row int64; key string; concept string, the first or null; concepts list of strings; source string, its folder or file
or null; active bool; image string, where the row's image should lie or null; vector list of float32, null where masked; x and y
float32. Paths are relative to the table's folder. The schema's metadata has gmem.fingerprint, gmem.dim, gmem.space,
gmem.encoder and gmem.encoder_fingerprint.

`embedding-atlas FILE --vector vector` reads a table whose vectors are all there; where rows are masked it also needs
`--query "SELECT * FROM data WHERE active"`.

Shapes: N rows, n active rows, b rows of a row group, D dimensions.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.arrow import require_pyarrow
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError, SourceError
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import IMAGE_KINDS, Json
from gmem_bank.sources import image_path
from gmem_bank.storage import atomic

SUFFIXES = (".parquet", ".pq")
GROUP_BYTES = 32 << 20
"""Of vectors in a row group: what is held in memory, and what a reader has to read at a time."""
GROUP_ROWS = 16_384
"""At most: the keys of so many rows, however long, fit what Arrow's strings can address."""


@dataclass(frozen=True, kw_only=True)
class ParquetReport:
    """What was exported."""

    output: str
    num_rows: int
    num_active: int
    num_row_groups: int
    columns: list[str]
    bytes: int

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return asdict(self)


def export_parquet(
    bank: MemoryBank,
    output: str | os.PathLike[str],
    *,
    vectors: bool = True,
    coordinates: NDArray[np.floating[Any]] | None = None,
    overwrite: bool = True,
    progress: Progress = no_progress,
) -> ParquetReport:
    """Write a bank as a Parquet table with the columns above, row group by row group, whole or not at all.

    Args:
        bank: any bank.
        output: file to write, .parquet or .pq.
        vectors: False leaves the column out.
        coordinates: (n, 2) of the active rows, as of `plot_measures.project` with all rows; NaN and masked rows become null.
        overwrite: False refuses where something is there.
        progress: told rows written and rows in all.

    Raises:
        OutputExistsError: the output exists, and overwriting was not asked for.
        ConfigError: another suffix, or coordinates of another shape.
        MissingDependencyError: pyarrow is not installed.
        WriteError: the output cannot be written.
    """
    target = Path(output)
    if target.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{target}: a Parquet table is named .parquet or .pq", path=target, key="output")
    atomic.require_free(target, overwrite)
    table = _Table(bank, target, vectors=vectors, coordinates=coordinates)
    parquet = require_pyarrow().parquet
    step = max(1, min(GROUP_ROWS, GROUP_BYTES // (4 * bank.dim) if vectors else GROUP_ROWS))
    with atomic.replacing(target) as stream, parquet.ParquetWriter(stream, table.schema, **table.encodings) as writer:
        for start in range(0, len(bank), step):
            end = min(start + step, len(bank))
            writer.write_batch(table.batch(start, end))
            progress(end, len(bank))
    return ParquetReport(
        output=str(target), num_rows=len(bank), num_active=int(table.active.sum()),
        num_row_groups=-(-len(bank) // step), columns=table.schema.names, bytes=target.stat().st_size,
    )  # fmt: skip


class _Table:
    """A bank's rows as record batches."""

    def __init__(
        self, bank: MemoryBank, target: Path, *, vectors: bool, coordinates: NDArray[np.floating[Any]] | None
    ) -> None:
        self._arrow = require_pyarrow()
        self._bank = bank
        self._folder = target.absolute().parent
        self._vectors = vectors
        self.active = np.zeros(len(bank), np.bool_)
        self.active[bank.rows()] = True
        self._places = _at_rows(coordinates, self.active)
        self._offsets, self._members = _concepts_by_row(bank)
        self._sources = [self._relative(source.folder(bank.folder)) for source in bank.sources]
        self.schema = self._schema()

    @property
    def encodings(self) -> dict[str, Any]:
        """How columns are stored: names that come again and again once, vectors as they are."""
        return {"use_dictionary": ["concept", "concepts.list.element", "source"], "compression": "snappy"}

    def _schema(self) -> Any:
        text, number, arrow = self._arrow.string(), self._arrow.float32(), self._arrow
        columns = {
            "row": arrow.int64(), "key": text, "concept": text, "concepts": arrow.list_(text), "source": text,
            "active": arrow.bool_(), "image": text,
        }  # fmt: skip
        if self._vectors:
            columns["vector"] = arrow.list_(number)  # not of fixed size: with nulls that cannot be read everywhere
        if self._places is not None:
            columns |= {"x": number, "y": number}
        facts = {
            "fingerprint": self._bank.fingerprint, "dim": str(self._bank.dim), "space": self._bank.space,
            "encoder": self._bank.encoder.name, "encoder_fingerprint": self._bank.encoder.fingerprint,
        }  # fmt: skip
        return arrow.schema(list(columns.items()), {f"gmem.{name}": value for name, value in facts.items()})

    def batch(self, start: int, end: int) -> Any:
        """Return rows start to end."""
        rows = np.arange(start, end)
        keys, ids = self._bank.keys(rows), self._bank.source_ids(rows).tolist()
        concepts = self._concepts(start, end)
        columns: list[Any] = [
            rows,
            keys,
            [names[0] if names else None for names in concepts],
            concepts,
            [self._sources[number] for number in ids],
            self.active[start:end],
            [self._image(key, number) for key, number in zip(keys, ids, strict=True)],
        ]
        if self._vectors:
            columns.append(self._vector_column(rows))
        if self._places is not None:
            columns += [self._arrow.array(column, from_pandas=True) for column in self._places[start:end].T]
        self._bank.stored.release()
        arrays = [
            column if isinstance(column, self._arrow.Array) else self._arrow.array(column, field.type)
            for column, field in zip(columns, self.schema, strict=True)
        ]
        return self._arrow.record_batch(arrays, schema=self.schema)

    def _vector_column(self, rows: NDArray[np.int64]) -> Any:
        """Return a list of D float32 for each active row, without copying them one by one."""
        active = self.active[rows]
        values = self._bank.snippets(rows[active]).reshape(-1)
        offsets = np.concatenate([[0], np.cumsum(active)]).astype(np.int32) * np.int32(self._bank.dim)
        return self._arrow.ListArray.from_arrays(
            self._arrow.array(offsets), self._arrow.array(values), mask=self._arrow.array(~active)
        )

    def _concepts(self, start: int, end: int) -> list[list[str]]:
        names, bounds = self._bank.names, self._offsets[start : end + 1].tolist()
        inside = self._members[bounds[0] : bounds[-1]].tolist()
        return [
            [names[index] for index in inside[begin - bounds[0] : stop - bounds[0]]] for begin, stop in pairwise(bounds)
        ]

    def _image(self, key: str, source: int) -> str | None:
        if self._bank.sources[source].kind not in IMAGE_KINDS:
            return None
        try:
            return self._relative(image_path(key, self._bank.sources[source], self._bank.folder, None))
        except SourceError:  # a key that leads out of its source
            return None

    def _relative(self, path: Path | None) -> str | None:
        return None if path is None else Path(os.path.relpath(path, self._folder)).as_posix()


def _at_rows(coordinates: NDArray[np.floating[Any]] | None, active: NDArray[np.bool_]) -> NDArray[np.float32] | None:
    """Return (N, 2) coordinates, NaN where masked, of (n, 2) ones; raises ConfigError for another shape."""
    if coordinates is None:
        return None
    given = np.asarray(coordinates)
    if given.shape != (int(active.sum()), 2):
        raise ConfigError(
            f"coordinates must have a row of 2 for each of {int(active.sum())} active rows, got {list(given.shape)}",
            key="coordinates",
        )
    places = np.full((len(active), 2), np.nan, np.float32)
    places[active] = given
    return places


def _concepts_by_row(bank: MemoryBank) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return offsets (N+1,) into the positions in `names` of the concepts of each row, in file order."""
    members = [bank.all_rows_of(name) for name in bank.names]
    rows = np.concatenate([*members, np.zeros(0, np.int64)])
    concepts = np.repeat(np.arange(len(members), dtype=np.int32), [len(own) for own in members])
    offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(bank)))]).astype(np.int64)
    return offsets, concepts[np.argsort(rows, kind="stable")]
