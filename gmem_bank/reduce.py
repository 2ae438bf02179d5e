"""Fewer rows that stand for all: dedup (near-duplicates by cosine) and coreset (k-means medoids).

Shapes: n active rows, B rows of a block, D dimensions, k medoids.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.editing import EditReport, editing
from gmem_bank.errors import ConfigError
from gmem_bank.index import require_faiss
from gmem_bank.ops import PathLike, keep_only
from gmem_bank.progress import Progress, no_progress
from gmem_bank.space import to_space

QUERY_ROWS = 2048
SHOWN = 20
POINTS_PER_CENTROID = 256
"""Rows a centroid is trained on at most; more change it little."""
MOST_TRAINING_ROWS = 262_144
MANY_CENTROIDS = 2048
"""Up to this many start by k-means++ (Arthur & Vassilvitskii 2007), more by its sampled form AFK-MC² (Bachem et al. 2016)."""


def dedup(
    bank_path: PathLike,
    *,
    threshold: float = 0.98,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
    progress: Progress = no_progress,
) -> EditReport:
    """Remove near-duplicates: a row goes where a row before it that stays has at least this cosine to it.

    Every pair of active rows is compared (exactly, in bounded memory), so the time grows with n²; masked rows stay.

    Args:
        bank_path: the bank.
        threshold: cosine, above -1 and up to 1; 1 removes rows of the same direction only, up to rounding.
        output: bank file to write; default: replace the bank.
        dry_run: write nothing, and report what would be removed.
        undo: keep the bank as it was for `undo`.
        progress: told rows compared and rows in all.

    Raises:
        ConfigError: the threshold is out of range.
    """
    if not -1 < threshold <= 1:
        raise ConfigError(f"threshold must be above -1 and at most 1, got {threshold}", key="threshold")
    with editing(bank_path, "dedup", {"threshold": threshold}, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None:
            return edit.unchanged()
        bank = edit.bank
        twins = find_duplicates(bank, threshold, progress)
        details = _groups(bank, twins)
        if not twins and edit.in_place:
            return edit.unchanged(details=details)
        stay = np.setdiff1d(np.arange(len(bank)), np.array(list(twins), np.int64))
        return keep_only(edit, stay, **details)


def find_duplicates(
    bank: MemoryBank, threshold: float, progress: Progress = no_progress
) -> dict[int, tuple[int, float]]:
    """Return row → (the row that stands for it, their cosine) for each active row that an earlier, staying one covers."""
    limit = np.float32(threshold) - np.float32(
        1e-6
    )  # float32 products of equal directions fall short of 1 by this much
    rows = bank.rows()
    twins: dict[int, tuple[int, float]] = {}
    kept: list[NDArray[np.int64]] = []
    for start, queries in bank.snippet_blocks(rows, QUERY_ROWS):
        own = rows[start : start + QUERY_ROWS]
        unit = to_space(queries, "unit")
        best, found = _nearest_of(bank, np.concatenate(kept) if kept else own[:0], unit)
        stays = np.ones(len(own), np.bool_)
        within = np.tril(unit @ unit.T, -1)
        for place in range(len(own)):
            if best[place] < limit and place:
                among = np.where(stays[:place], within[place, :place], -np.inf)
                nearest = int(among.argmax())
                if among[nearest] > best[place]:
                    best[place], found[place] = among[nearest], own[nearest]
            if best[place] >= limit:
                stays[place] = False
                twins[int(own[place])] = (int(found[place]), float(best[place]))
        kept.append(own[stays])
        progress(min(start + QUERY_ROWS, len(rows)), len(rows))
    return twins


def _nearest_of(
    bank: MemoryBank, rows: NDArray[np.int64], queries: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    best, found = np.full(len(queries), -np.inf, np.float32), np.full(len(queries), -1, np.int64)
    for start, snippets in bank.snippet_blocks(rows, 4 * QUERY_ROWS):
        scores = queries @ to_space(snippets, "unit").T
        places = scores.argmax(axis=1)
        values = scores[np.arange(len(queries)), places]
        better = values > best
        best[better], found[better] = values[better], rows[start + places[better]]
    return best, found


def _groups(bank: MemoryBank, twins: dict[int, tuple[int, float]]) -> dict[str, Any]:
    """Return the first groups of near-duplicates by key, and how many there are."""
    groups: dict[int, list[tuple[int, float]]] = {}
    for row, (kept, cosine) in twins.items():
        groups.setdefault(kept, []).append((row, cosine))
    shown = [
        {
            "kept": bank.keys(np.array([kept]))[0],
            "removed": [
                {"key": key, "cosine": round(cosine, 6)}
                for key, (_, cosine) in zip(bank.keys(np.array([row for row, _ in members])), members, strict=True)
            ],
        }
        for kept, members in sorted(groups.items())[:SHOWN]
    ]
    return {"num_groups": len(groups), "num_duplicates": len(twins), "groups": shown}


def coreset(
    bank_path: PathLike,
    num_rows: int,
    *,
    seed: int = 0,
    iterations: int = 25,
    output: PathLike | None = None,
    dry_run: bool = False,
    undo: bool = True,
    progress: Progress = no_progress,
) -> EditReport:
    """Keep the rows nearest to the centroids of a k-means clustering of the active rows.

    Centroids start by k-means++ and are trained by FAISS (spherical in unit space) on at most 256 rows each; then one pass
    over the bank assigns every active row and takes of each cluster the row nearest to its centroid. Where a cluster is empty,
    the row that is farthest from its own centroid is taken instead. Masked rows stay.

    Args:
        bank_path: the bank.
        num_rows: k, rows to keep; below the number of active rows.
        seed: draws the training rows and the first centroids.
        iterations: of k-means.
        output, dry_run, undo: as `dedup`.
        progress: told rows assigned and rows in all.

    Raises:
        ConfigError: num_rows is out of range.
        MissingDependencyError: FAISS is not installed.
    """
    arguments = {"num_rows": num_rows, "seed": seed, "iterations": iterations}
    with editing(bank_path, "coreset", arguments, output=output, dry_run=dry_run, undo=undo) as edit:
        if edit.made is not None:
            return edit.unchanged()
        rows = edit.bank.rows()
        if not 1 <= num_rows < len(rows):
            raise ConfigError(
                f"a coreset has at least one row and fewer than the {len(rows)} active ones of {edit.bank.path}: {num_rows} were "
                "asked for",
                key="num_rows",
            )
        if seed < 0 or iterations < 1:
            raise ConfigError(
                f"seed must be 0 or more and iterations 1 or more, got {seed} and {iterations}", key="seed"
            )
        medoids, mean_cosine = find_medoids(edit.bank, num_rows, seed, iterations, progress)
        masked = np.setdiff1d(np.arange(len(edit.bank)), rows)
        return keep_only(edit, np.union1d(medoids, masked), mean_cosine_to_centroid=round(mean_cosine, 6))


def find_medoids(
    bank: MemoryBank, k: int, seed: int, iterations: int, progress: Progress = no_progress
) -> tuple[NDArray[np.int64], float]:
    """Return the (k,) medoid rows, ascending, and the mean cosine of active rows to their centroids."""
    faiss = require_faiss()
    rows = bank.rows()
    rng = np.random.Generator(np.random.PCG64(seed))
    most = max(k, min(POINTS_PER_CENTROID * k, MOST_TRAINING_ROWS))
    training = rows if len(rows) <= most else np.sort(rng.choice(rows, most, replace=False))
    spherical = bank.space == "unit"
    start_with = (
        faiss.ClusteringInitMethod_KMEANS_PLUS_PLUS if k <= MANY_CENTROIDS else faiss.ClusteringInitMethod_AFK_MC2
    )
    kmeans = faiss.Kmeans(
        bank.dim, k, niter=iterations, seed=seed, spherical=spherical, max_points_per_centroid=POINTS_PER_CENTROID,
        min_points_per_centroid=1, init_method=start_with,
    )  # fmt: skip
    sample = np.empty((len(training), bank.dim), np.float32)
    for start, snippets in bank.snippet_blocks(training):
        sample[start : start + len(snippets)] = snippets
    kmeans.train(sample)
    del sample
    nearest = np.full(k, -1, np.int64)
    smallest = np.full(k, np.inf, np.float32)
    distances, total = np.empty(len(rows), np.float32), 0.0
    for start, block, cluster, distance in _assigned(faiss, bank, rows, kmeans.centroids):
        distances[start : start + len(block)] = distance
        units = to_space(kmeans.centroids[cluster], "unit")
        total += float(np.vecdot(to_space(block, "unit"), units).sum(dtype=np.float64))
        order = np.lexsort((np.arange(len(block)), distance, cluster))
        first = order[np.unique(cluster[order], return_index=True)[1]]
        closer = first[distance[first] < smallest[cluster[first]]]
        smallest[cluster[closer]], nearest[cluster[closer]] = distance[closer], rows[start + closer]
        progress(start + len(block), len(rows))
    medoids = nearest[nearest >= 0]
    spare = rows[np.argsort(-distances, kind="stable")]
    spare = spare[~np.isin(spare, medoids)][: k - len(medoids)]
    return np.sort(np.concatenate([medoids, spare])), total / len(rows)


def _assigned(
    faiss: Any, bank: MemoryBank, rows: NDArray[np.int64], centroids: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]]]:
    """Yield (start, snippets, cluster of each, squared distance to its centroid) block by block."""
    for start, block in bank.snippet_blocks(rows):
        distance, cluster = faiss.knn(block, centroids, 1)
        yield start, block, cluster[:, 0].astype(np.int64), distance[:, 0]
