"""What a bank looks like: its spectrum, a map of its rows, and how near they lie to each other.

Shapes: n active rows, m rows on the map, D dimensions, R singular values, p probes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gmem_bank import plot_page
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError
from gmem_bank.index import require_faiss, search_flat
from gmem_bank.kinds import FactoredBank
from gmem_bank.progress import Progress, no_progress
from gmem_bank.provenance import Json
from gmem_bank.storage import atomic

PANELS = ("spectrum", "map", "neighbours")
METHODS = {"pca": "PCA", "tsne": "t-SNE"}
SHARES = {"rank_90": 0.90, "rank_95": 0.95, "rank_99": 0.99}
QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
FEWEST_TSNE = 4
"""Below this many rows there are no neighbourhoods to keep, and PCA shows all there is."""
THUMBNAILS = {".html": (2000, 0.0), ".png": (60, 0.08)}
"""How many at most, and how far apart at least, as a share of the map: in a picture they lie on it all at once."""


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """How the squared norm of the centred snippets spreads over orthogonal directions."""

    values: NDArray[np.float64]
    """(R,) singular values, descending."""
    energy: NDArray[np.float64]
    """(R,) cumulative share of their squares; of recorded values, the share of what the bank has kept."""
    stored: bool
    """True: as the factored bank recorded them; False: of the active rows as they are now."""

    def ranks(self) -> dict[str, int]:
        """Return the fewest components that hold 90, 95 and 99 % of the energy; 0 where there is none."""
        found = {name: int(np.searchsorted(self.energy, share - 1e-12)) + 1 for name, share in SHARES.items()}
        return found if self.values.any() else dict.fromkeys(SHARES, 0)

    def describe(self) -> str:
        """Return the figures in words."""
        if not self.values.any():
            return "No spread: all rows are equal."
        ranks = ", ".join(f"{name[5:]} % in {rank:,}" for name, rank in self.ranks().items())
        kept = " As the bank recorded them, and shares of what it kept." if self.stored else ""
        return f"Energy, of {len(self.values):,} components: {ranks}.{kept}"


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """How far probes lie from the nearest other row."""

    distances: NDArray[np.float32]
    """(p,) cosine distances, 1 - cos, in order of the probes' rows; none for a bank of one active row."""
    num_compared: int
    sampled: bool
    """True: not every active row was compared with, so the true distances are smaller."""

    def quantiles(self) -> dict[str, float]:
        """Return quantiles of the distances; {} where there are none."""
        places = QUANTILES if len(self.distances) else {}
        return {name: round(float(np.quantile(self.distances, q)), 6) for name, q in places.items()}

    def to_json(self) -> dict[str, Json]:
        """Return the figures as a JSON object."""
        compared = {"num_probes": len(self.distances), "num_compared": self.num_compared, "sampled": self.sampled}
        return {**compared, **self.quantiles()}

    def describe(self) -> str:
        """Return the figures in words."""
        if not len(self.distances):
            return "One active row: it has no neighbour."
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.quantiles().items())
        sample = " (a sample: among all rows the distances are smaller)" if self.sampled else ""
        return f"{len(self.distances):,} probes against {self.num_compared:,} rows{sample}: {figures}."


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Rows in the plane."""

    rows: NDArray[np.int64]
    """(m,) rows, ascending."""
    coordinates: NDArray[np.float32]
    """(m, 2)."""
    method: str
    """"pca" or "tsne"; fewer than four rows are projected by PCA whatever was asked for."""
    num_active: int
    seed: int

    def describe(self) -> str:
        """Return in words what is shown."""
        few = len(self.rows) < self.num_active
        drawn = f"{len(self.rows):,} of {self.num_active:,} active rows, drawn at random"
        return f"{drawn if few else 'All active rows'}, by {METHODS[self.method]} (seed {self.seed})."


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


def spectrum(bank: MemoryBank) -> Spectrum:
    """Return the singular values of the centred snippets: those a factored bank recorded, or those of the active rows.

    Rows are streamed; memory does not grow with their number. Values below some 1e-3 of the largest hold rounding.

    Args:
        bank: any bank with an active row.

    Returns:
        R = min(n, D) values, or as many as a factored bank recorded.

    Raises:
        ConfigError: every row is masked.
    """
    rows = _active_rows(bank)
    stored = bank.singular_values if isinstance(bank, FactoredBank) else None
    if stored is not None:
        values = np.sort(stored.astype(np.float64))[::-1]
    elif len(rows) <= bank.dim:  # no larger than the Gram matrix, and exact
        wide = bank.snippets(rows).astype(np.float64)
        values = np.linalg.svd(wide - wide.mean(axis=0), compute_uv=False)
        values[values <= 1e-12 * np.linalg.norm(wide)] = 0.0  # what the rounding of the mean leaves of equal rows
    else:
        values = np.sqrt(np.maximum(np.linalg.eigvalsh(_centred_gram(bank, rows)[1])[::-1], 0.0))
    squares = np.cumsum(values**2)
    energy = squares / squares[-1] if values.any() else np.ones_like(values)
    return Spectrum(values=values, energy=energy, stored=stored is not None)


def _active_rows(bank: MemoryBank) -> NDArray[np.int64]:
    rows = bank.rows()
    if not len(rows):
        raise ConfigError(f"every row of {bank.path} is masked: unmask some to see them", path=bank.path)
    return rows


def _centred_gram(bank: MemoryBank, rows: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the (D,) mean and the (D, D) Gram matrix of the centred snippets, in one pass."""
    shift = np.zeros(bank.dim, np.float32)
    total, gram = np.zeros(bank.dim), np.zeros((bank.dim, bank.dim))
    for start, block in bank.snippet_blocks(rows):
        if start == 0:  # without the shift a large mean would drown the small directions in float32
            shift = block.mean(axis=0, dtype=np.float64).astype(np.float32)
        shifted = np.subtract(block, shift, out=block)
        total += shifted.sum(axis=0, dtype=np.float64)
        largest = float(np.abs(shifted).max())
        exact = shifted if 1e-15 < largest < 1e15 else shifted.astype(np.float64)  # their squares are no float32
        gram += exact.T @ exact
    centre = total / len(rows)
    gram -= len(rows) * np.outer(centre, centre)
    return shift + centre, gram


def neighbour_distances(bank: MemoryBank, *, num_probes: int = 2000, sample: int = 50_000, seed: int = 0) -> Neighbours:
    """Return the cosine distance of probes to the nearest other active row.

    Args:
        bank: any bank with an active row.
        num_probes: p at most.
        sample: active rows compared with at most; of more this many are drawn, and the probes among them.
        seed: draws both.

    Raises:
        ConfigError: every row is masked, or a number is out of range.
        MissingDependencyError: FAISS is not installed.
    """
    if num_probes < 1 or sample < 2 or seed < 0:
        raise ConfigError("num_probes must be 1 or more, sample 2 or more and seed 0 or more", key="num_probes")
    active, rng = _active_rows(bank), np.random.Generator(np.random.PCG64(seed))
    rows = _drawn(active, sample, rng)
    distances = np.zeros(0, np.float32)
    if len(rows) > 1:
        probes = _drawn(rows, num_probes, rng)
        scores, found = search_flat(bank, bank.snippets(probes), 2, rows)
        nearest = np.where(found[:, 0] == probes, scores[:, 1], scores[:, 0])  # equal rows may come in any order
        distances = np.clip(1 - nearest, 0, 2).astype(np.float32)
    return Neighbours(distances=distances, num_compared=len(rows), sampled=len(rows) < len(active))


def _drawn(rows: NDArray[np.int64], most: int, rng: np.random.Generator) -> NDArray[np.int64]:
    return rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))


def project(bank: MemoryBank, *, method: str = "pca", num_rows: int = 5000, seed: int = 0) -> Projection:
    """Return active rows in the plane, the same for the same seed.

    Args:
        bank: any bank with an active row.
        method: "pca" (streamed) or "tsne" (the rows are held in memory; minutes from some 20,000 on).
        num_rows: m at most; of more active rows this many are drawn.
        seed: draws them, and drives t-SNE.

    Raises:
        ConfigError: every row is masked, an unknown method, or a number out of range.
    """
    if method not in METHODS or num_rows < 1 or seed < 0:
        asked = f"got {method!r}, {num_rows} and {seed}"
        raise ConfigError(f"method must be pca or tsne, num_rows 1 or more and seed 0 or more, {asked}", key="method")
    active = _active_rows(bank)
    rows = _drawn(active, num_rows, np.random.Generator(np.random.PCG64(seed)))
    method = method if len(rows) >= FEWEST_TSNE else "pca"
    coordinates = _principal(bank, rows)
    if method == "tsne":
        coordinates = _tsne(bank.snippets(rows), bank.space, coordinates, seed)
    return Projection(rows=rows, coordinates=coordinates, method=method, num_active=len(active), seed=seed)


def _principal(bank: MemoryBank, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (m, 2) coordinates along the first two principal components; the second is 0 where D is 1."""
    from scipy.linalg import eigh

    mean, gram = _centred_gram(bank, rows)
    top = eigh(gram, subset_by_index=(max(bank.dim - 2, 0), bank.dim - 1))[1][:, ::-1]
    top = top * np.where(top.max(axis=0) < -top.min(axis=0), -1, 1)  # so that the sign does not depend on LAPACK
    coordinates = np.zeros((len(rows), 2), np.float32)
    for start, block in bank.snippet_blocks(rows):
        coordinates[start : start + len(block), : top.shape[1]] = (block - mean) @ top
    return coordinates


def _tsne(snippets: NDArray[np.float32], space: str, start: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Return (m, 2) t-SNE coordinates of (m, D) snippets, begun at the principal components."""
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    deviation = float(start[:, 0].std())
    small = start * np.float32(1e-4 / deviation if deviation > 0 else 1.0)  # as scikit-learn does for init="pca"
    metric, perplexity = "cosine" if space == "unit" else "euclidean", min(30.0, (len(snippets) - 1) / 3)
    model = TSNE(init=small, metric=metric, perplexity=perplexity, random_state=seed)
    with threadpool_limits(1, user_api="openmp"):  # several threads add up in any order, and gain little here
        return np.asarray(model.fit_transform(snippets), np.float32)


def plot(
    bank: MemoryBank,
    output: str | os.PathLike[str],
    *,
    what: Sequence[str] = PANELS,
    method: str = "pca",
    num_rows: int = 5000,
    seed: int = 0,
    thumbnails: bool = True,
    progress: Progress = no_progress,
) -> PlotReport:
    """Draw a bank into a picture (.png, needs matplotlib) or a page that holds all it needs (.html).

    Args:
        bank: any bank with an active row.
        output: file to write; its suffix decides the form.
        what: panels, in order: "spectrum", "map", "neighbours".
        method, num_rows, seed: of the map, as in `project`; the seed also draws the probes.
        thumbnails: show images on the map where they are still there: 60 in a picture, 2,000 on a page at most.
        progress: told images read for thumbnails and images in all.

    Raises:
        ConfigError: another suffix, an unknown panel or method, a number out of range, or every row is masked.
        MissingDependencyError: matplotlib (for .png) or FAISS (for "neighbours") is not installed.
        WriteError: the output cannot be written.
    """
    target, panels = Path(output), tuple(dict.fromkeys([what] if isinstance(what, str) else what))
    write = _writer(target, panels)
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


def _writer(target: Path, panels: Sequence[str]) -> Callable[[plot_page.Drawing], bytes]:
    """Return what writes a file of this name; raises ConfigError or MissingDependencyError before any work is done."""
    writers = {".html": plot_page.draw_page, ".png": plot_page.draw_picture}
    suffix = target.suffix.lower()
    if suffix not in writers:
        raise ConfigError(f"{target}: a plot is a .png or a .html file, by its suffix", path=target, key="output")
    if not panels or not set(panels) <= set(PANELS):
        raise ConfigError(f"what must be some of {', '.join(PANELS)}; got {', '.join(panels) or 'none'}", key="what")
    if suffix == ".png":
        plot_page.require_matplotlib()
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
