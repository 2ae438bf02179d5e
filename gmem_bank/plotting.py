"""What a bank looks like: its spectrum, a map of its rows, and how near they lie, in one picture or page.

Shapes: m rows on the map.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import plot_page, plot_picture
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError, OutputExistsError
from gmem_bank.index import require_faiss
from gmem_bank.plot_measures import Projection, Spectrum, neighbour_distances, project, spectrum
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json
from gmem_bank.storage import atomic

PANELS = ("spectrum", "map", "neighbours")
THUMBNAILS = {".html": (2000, 0.0), ".png": (60, 0.08)}
"""How many at most, and how far apart at least, as a share of the map: in a picture they lie on it all at once."""


@dataclass(frozen=True, kw_only=True)
class PlotReport:
    """What was drawn."""

    output: str
    num_active: int
    num_shown: int
    """Rows on the map."""
    sampled: bool
    """Whether the map leaves active rows out."""
    method: str | None
    num_thumbnails: int
    num_missing_images: int
    """Rows on the map whose image is not there, or not readable, any more."""
    spectrum: dict[str, Json] | None
    """{"num_values", "stored", "rank_90", "rank_95", "rank_99"}."""
    neighbours: dict[str, Json] | None
    """{"num_probes", "num_compared", "sampled", and "min", "p5", "median", "p95", "max" of the distances}."""

    def to_json(self) -> dict[str, Json]:
        """Return the report as a JSON object."""
        return asdict(self)


def plot(
    bank: MemoryBank,
    output: str | os.PathLike[str],
    *,
    what: Sequence[str] = PANELS,
    method: str = "pca",
    num_rows: int = 5000,
    seed: int = 0,
    thumbnails: bool = True,
    overwrite: bool = True,
    progress: Progress = no_progress,
) -> PlotReport:
    """Draw a bank into a picture (.png, needs matplotlib) or a page that holds all it needs (.html).

    Args:
        bank: any bank with an active row.
        output: file to write; its suffix decides the form.
        what: panels, in order: "spectrum", "map", "neighbours".
        method, num_rows, seed: of the map, as in `project`; the seed also draws the probes.
        thumbnails: show images on the map where they are still there: 60 in a picture, 2,000 on a page at most.
        overwrite: False refuses where something is there.
        progress: told images read for thumbnails and images in all.

    Raises:
        OutputExistsError: the output exists, and overwriting was not asked for.
        ConfigError: another suffix, an unknown panel or method, a number out of range, or every row is masked.
        MissingDependencyError: matplotlib (for .png) or FAISS (for "neighbours") is not installed.
        WriteError: the output cannot be written.
    """
    target, panels = Path(output), tuple(dict.fromkeys([what] if isinstance(what, str) else what))
    write = _writer(target, panels)
    atomic.require_free(target, overwrite)
    drawing = plot_page.Drawing(title=_title(bank), facts=_facts(bank), panels=panels)
    if "spectrum" in panels:
        drawing.spectrum = spectrum(bank)
    if "neighbours" in panels:
        drawing.neighbours = neighbour_distances(bank, seed=seed)
    if "map" in panels:
        drawing.map = _row_map(bank, project(bank, method=method, num_rows=num_rows, seed=seed))
        if thumbnails:
            plot_page.add_thumbnails(drawing.map, bank, progress, *THUMBNAILS[target.suffix.lower()])
    atomic.write_bytes(target, write(drawing))
    return _report(target, bank, drawing)


def require_drawable(target: Path) -> None:
    """Raise ConfigError, MissingDependencyError or OutputExistsError where no spectrum can be drawn into that file."""
    _writer(target, ("spectrum",))
    if target.exists():
        raise OutputExistsError(f"{target} exists: name another file with --plot, or delete it first", path=target)


def draw_spectrum(bank: MemoryBank, values: NDArray[np.float64], output: str | os.PathLike[str]) -> None:
    """Draw (R,) singular values of a bank, descending, into a picture or page; what is there is replaced.

    Raises:
        ConfigError, MissingDependencyError, WriteError: as `plot`.
    """
    target = Path(output)
    squares = np.cumsum(values**2)
    energy = squares / squares[-1] if values.any() else np.ones_like(values)
    found = Spectrum(values=values, energy=energy, stored=False)
    drawing = plot_page.Drawing(title=_title(bank), facts=_facts(bank), panels=("spectrum",), spectrum=found)
    atomic.write_bytes(target, _writer(target, drawing.panels)(drawing))


def _writer(target: Path, panels: Sequence[str]) -> Callable[[plot_page.Drawing], bytes]:
    """Return what writes a file of this name; raises ConfigError or MissingDependencyError before any work is done."""
    writers = {".html": plot_page.draw_page, ".png": plot_picture.draw_picture}
    suffix = target.suffix.lower()
    if suffix not in writers:
        raise ConfigError(f"{target}: a plot is a .png or a .html file, by its suffix", path=target, key="output")
    if not panels or not set(panels) <= set(PANELS):
        raise ConfigError(f"what must be some of {', '.join(PANELS)}; got {', '.join(panels) or 'none'}", key="what")
    if suffix == ".png":
        plot_picture.require_matplotlib()
    if "neighbours" in panels:
        require_faiss()
    return writers[suffix]


def _title(bank: MemoryBank) -> str:
    return bank.path.name.encode("utf-8", "replace").decode()  # a file's name need not be valid Unicode


def _facts(bank: MemoryBank) -> str:
    masked = len(bank) - len(bank.rows())
    hidden = f" ({masked:,} masked)" if masked else ""
    rows = f"{len(bank):,} row{'s' * (len(bank) != 1)}"
    return f"{rows}{hidden}, {bank.header.kind}, {bank.space} space, encoder {bank.encoder.describe()}"


def _row_map(bank: MemoryBank, placed: Projection) -> plot_page.RowMap:
    """Return the rows of a projection with their keys and concepts, those in file order that a row on the map has."""
    place = np.full(len(bank), -1)
    place[placed.rows] = np.arange(len(placed.rows))
    shown = plot_page.RowMap(
        projection=placed, keys=bank.keys(placed.rows), concepts=[], members=[[] for _ in placed.rows]
    )
    for name in bank.names:
        places = place[bank.all_rows_of(name)]
        for index in places[places >= 0].tolist():
            shown.members[index].append(len(shown.concepts))
        shown.concepts += [name] * bool((places >= 0).any())
    return shown


def _report(target: Path, bank: MemoryBank, drawing: plot_page.Drawing) -> PlotReport:
    shown, found, near = drawing.map, drawing.spectrum, drawing.neighbours
    measured = None if found is None else {"num_values": len(found.values), "stored": found.stored, **found.ranks()}
    return PlotReport(
        output=str(target),
        num_active=len(bank.rows()),
        num_shown=0 if shown is None else len(shown.keys),
        sampled=shown is not None and len(shown.keys) < shown.projection.num_active,
        method=None if shown is None else shown.projection.method,
        num_thumbnails=0 if shown is None else len(shown.thumbnails),
        num_missing_images=0 if shown is None else shown.num_missing,
        spectrum=measured,
        neighbours=None if near is None else near.to_json(),
    )
