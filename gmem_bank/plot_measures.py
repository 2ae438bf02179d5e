"""What plots show, as figures: the spectrum of a bank, its rows in the plane, and how near they lie to each other.

Shapes: n active rows, m rows on the map, D dimensions, R singular values, p probes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gmem_bank import moments
from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError
from gmem_bank.index import search_flat
from gmem_bank.kinds import FactoredBank
from gmem_bank.provenance import Json

METHODS = {"pca": "PCA", "tsne": "t-SNE"}
SHARES = {"rank_90": 0.90, "rank_95": 0.95, "rank_99": 0.99}
QUANTILES = {"min": 0.0, "p5": 0.05, "median": 0.5, "p95": 0.95, "max": 1.0}
FEWEST_TSNE = 4
"""Below this many rows there are no neighbourhoods to keep, and PCA shows all there is."""


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
    sums = moments.RunningSums(bank.dim)
    for _, block in bank.snippet_blocks(rows):
        sums.add(moments.sum_chunk(block, wide=False))
    found = sums.moments()
    return found.mean, found.scatter


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
