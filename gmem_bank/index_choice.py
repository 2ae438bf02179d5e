"""Which index a bank gets: its kind by size, recall and memory, its lists, and what it will take.

Shapes: N rows, E coordinates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gmem_bank.errors import ConfigError, suggest

KINDS = ("flat", "ivf-rabitq", "ivf-flat", "ivf-pq", "hnsw")
EXACT_NUMBERS = 1 << 26
"""N·E up to which every row is compared: some 25 ms a query on one core."""
ROWS_PER_LIST = 39
"""Training rows a list that FAISS asks for."""
MOST_LISTS = 1 << 16
HNSW_LINKS = 32
MOST_EFFORT = 1 << 16
"""Candidates that an HNSW index keeps in view, at most."""
GPU_CODE_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
"""Lengths of product codes that FAISS's kernels for GPUs know."""
ROW_TABLE_BYTES = 24
"""Of a row in the index file: its number, and the hashes of key and value."""
LABEL_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An index that is to be built."""

    kind: str
    """One of KINDS."""
    num_lists: int
    """Clusters of an IVF index; 0 for others."""
    num_bytes: int
    """About what the file takes."""
    why: str
    """In words."""

    @property
    def factory(self) -> str:
        """What FAISS calls it; "" for a flat one, which is plain vectors."""
        return {
            "flat": "", "hnsw": f"HNSW{HNSW_LINKS},Flat", "ivf-flat": f"IVF{self.num_lists},Flat",
            "ivf-rabitq": f"IVF{self.num_lists},RaBitQfs", "ivf-pq": f"IVF{self.num_lists},PQ",
        }[self.kind]  # fmt: skip


def plan_index(
    num_rows: int,
    dim: int,
    *,
    kind: str = "auto",
    recall: float = 0.95,
    max_bytes: int | None = None,
    num_lists: int | None = None,
    num_gpus: int = 0,
) -> Plan:
    """Return the index to build.

    Exact search comes first: where few numbers are compared, or where recall 1 is asked for. Then RaBitQ codes of one bit a
    coordinate in inverted lists (on a GPU whole vectors, or product codes, which it has). HNSW only where it is asked for.

    Args:
        num_rows: N.
        dim: E.
        kind: "auto" or one of KINDS.
        recall: wanted recall@10, above 0 up to 1.
        max_bytes: most that the index may take; None: no limit.
        num_lists: clusters of an IVF index; None: about 4·√N.
        num_gpus: GPUs that FAISS sees.

    Raises:
        ConfigError: an unknown kind, a value out of range, or nothing fits.
    """
    _check(num_rows, kind, recall, max_bytes, num_lists)
    lists = num_lists or default_lists(num_rows)
    sizes = {name: estimated_bytes(name, num_rows, dim, lists) for name in KINDS}

    def plan(name: str, why: str) -> Plan:
        return Plan(kind=name, num_lists=lists if name.startswith("ivf") else 0, num_bytes=sizes[name], why=why)

    if kind != "auto":
        if max_bytes is not None and sizes[kind] > max_bytes:
            raise ConfigError(_too_large(kind, sizes[kind], max_bytes), key="max_bytes")
        return plan(kind, "asked for")
    small = num_rows * dim <= EXACT_NUMBERS or num_rows < 4 * ROWS_PER_LIST
    reasons = [("flat", "exact, which is fast enough at this size")] if small else []
    if recall == 1:
        reasons = [("flat", "exact, as recall 1 asks for")]
    elif num_gpus:
        reasons.append(("ivf-flat", "on the GPU"))
        if pq_parts(dim) in GPU_CODE_BYTES:
            reasons.append(("ivf-pq", "on the GPU, whole vectors take more than --max-bytes"))
        else:
            reasons.append(
                ("ivf-rabitq", "on the CPU, whole vectors take more than --max-bytes, and GPUs know no such codes")
            )
    else:
        reasons.append(("ivf-rabitq", "one bit a coordinate, ordered again by exact values"))
    fitting = [(name, why) for name, why in reasons if max_bytes is None or sizes[name] <= max_bytes]
    if not fitting:
        raise ConfigError(_too_large(reasons[-1][0], sizes[reasons[-1][0]], max_bytes or 0), key="max_bytes")
    return plan(*fitting[0])


def _check(num_rows: int, kind: str, recall: float, max_bytes: int | None, num_lists: int | None) -> None:
    if kind not in ("auto", *KINDS):
        raise ConfigError(
            f"there is no index of kind {kind!r}: auto, {', '.join(KINDS)}.{suggest(kind, KINDS)}", key="kind"
        )
    if not 0 < recall <= 1:
        raise ConfigError(f"recall must be above 0 and at most 1, got {recall}", key="recall")
    if max_bytes is not None and max_bytes < 1:
        raise ConfigError(f"max_bytes must be at least 1, got {max_bytes}", key="max_bytes")
    if num_lists is not None and not 1 <= num_lists <= min(num_rows, MOST_LISTS):
        raise ConfigError(
            f"nlist must be 1 to {min(num_rows, MOST_LISTS)} for {num_rows} rows, got {num_lists}", key="nlist"
        )


def _too_large(kind: str, needed: int, limit: int) -> str:
    return (
        f"an index of kind {kind} takes about {needed:,} bytes, more than the {limit:,} allowed: raise --max-bytes, or search "
        "without an index, which compares every row in bounded memory"
    )


def default_lists(num_rows: int) -> int:
    """Return about 4·√N as a power of two, no more than there are rows to train on."""
    wanted = 1 << round(math.log2(4 * math.sqrt(max(num_rows, 1))))
    return max(1, min(wanted, num_rows // ROWS_PER_LIST, MOST_LISTS))


def estimated_bytes(kind: str, num_rows: int, dim: int, num_lists: int) -> int:
    """Return about what the file of an index takes."""
    code = {
        "flat": 4 * dim, "ivf-flat": 4 * dim + LABEL_BYTES, "ivf-pq": pq_parts(dim) + LABEL_BYTES,
        "ivf-rabitq": dim // 8 + 20 + LABEL_BYTES, "hnsw": 4 * dim + 8 * HNSW_LINKS + 20,
    }[kind]  # fmt: skip
    return num_rows * (code + ROW_TABLE_BYTES) + (4 * dim * num_lists if kind.startswith("ivf") else 0)


def pq_parts(dim: int) -> int:
    """Return how many bytes a product code has: the largest divisor of E with parts of eight or more coordinates."""
    return max((parts for parts in range(1, dim // 8 + 1) if dim % parts == 0), default=1)


def make_faiss(faiss: Any, plan: Plan, dim: int, seed: int) -> Any:
    """Return the empty FAISS index of a plan, for inner products, seeded."""
    factory = plan.factory + (str(pq_parts(dim)) if plan.kind == "ivf-pq" else "")
    made = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    if plan.num_lists:
        made.cp.seed, made.cp.min_points_per_centroid = (
            seed,
            1,
        )  # fewer were asked for, or there are no more: no warning
    if plan.kind == "ivf-pq":  # by default minutes go into an order of the words that nothing here asks for
        made.do_polysemous_training = False
        made.pq.cp.max_points_per_centroid, made.pq.cp.min_points_per_centroid, made.pq.cp.niter = (
            4 * ROWS_PER_LIST,
            1,
            10,
        )
    return made


def check_settings(plan: Plan, num_lists: int | None, nprobe: int | None, rerank: int | None) -> None:
    """Raise ConfigError where a setting is out of range, or given for a kind that has none."""
    given = {"nlist": num_lists if not plan.num_lists else None}
    given |= {"effort (nprobe)": nprobe, "rerank": rerank} if plan.kind == "flat" else {}
    for name, value in given.items():
        if value is not None:
            raise ConfigError(
                f"an index of kind {plan.kind} has no {name}: name another --kind, or leave it out",
                key=name.split(" ")[0],
            )
    if plan.kind != "flat":
        ladder(plan.kind, plan.num_lists, nprobe)
    if rerank is not None and rerank < 1:
        raise ConfigError(f"rerank must be at least 1, got {rerank}", key="rerank")


def ladder(kind: str, num_lists: int, fixed: int | None) -> Sequence[int]:
    """Return the efforts to try, ascending: lists looked into (IVF), or candidates kept in view (HNSW)."""
    if fixed is not None:
        most = num_lists if kind != "hnsw" else MOST_EFFORT
        if not 1 <= fixed <= most:
            raise ConfigError(f"effort (nprobe) must be 1 to {most} here, got {fixed}", key="nprobe")
        return (fixed,)
    if kind == "hnsw":
        return tuple(16 << step for step in range(7))
    powers = [1 << step for step in range(num_lists.bit_length())]
    between = [
        3 * step // 2 for step in powers[1:]
    ]  # 3, 6, 12, …: half as many lists more, where twice as many would be tried
    return (*sorted(step for step in (*powers, *between) if step < num_lists), num_lists)
