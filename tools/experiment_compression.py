"""Experiment "compression": the same generator asked from ever smaller banks, by rank, type and coefficients kept.

It is trained once, on the whole bank; only what it is asked from changes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gmem_bank
import gmem_gen
from tools.experiment_data import EncoderChoice, Images
from tools.experiment_kit import Bench, Row, judged, log_scale, plot, table, trained

WITHIN = 1.05
"""Of the whole bank's distance: what counts as as good."""
MARKERS = "osD^v<>Ph"


@dataclass(frozen=True, kw_only=True)
class Compression:
    """Sizes of the experiment."""

    steps: int = 1600
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    dtypes: tuple[str, ...] = ("f32", "f16", "i8")
    keep: tuple[float, ...] = (1.0, 0.5, 0.25)
    """Shares of the coefficients that are kept, the largest of each row."""
    num: int = 500
    seed: int = 0


def run(config: Compression, bench: Bench) -> dict[str, Any]:
    """Judge every bank, and name the smallest that is as good as the whole one."""
    images, judge, cells = bench.images, bench.judge, bench.cells
    whole = cells.folder / "bank.safetensors"
    images.build(images.train, whole)
    run_folder = trained(cells, "whole", images, whole, config.steps, f"train.seed={config.seed}").folder
    settings = {**images.identity(), "steps": config.steps, "seed": config.seed}
    rows = []
    for rank, dtype, keep in [
        (0, "f32", 1.0),
        *((r, d, k) for r in config.ranks for d in config.dtypes for k in config.keep),
    ]:
        cell = {**settings, "rank": rank, "dtype": dtype, "keep": keep, "num": config.num, "judge": judge}
        name = f"rank-{rank}-{dtype}-{keep:g}" if rank else "whole"
        found = cells.get(
            name,
            cell,
            lambda work, r=rank, d=dtype, k=keep: _judge(config, judge, images, whole, run_folder, work, r, d, k),
        )
        rows.append({"bank": "whole" if not rank else f"rank {rank}", "dtype": dtype, "kept": keep, **found})
    good = [row for row in rows if row["frechet"] <= WITHIN * rows[0]["frechet"]]
    return {"rows": rows, "smallest": min(good, key=lambda row: row["bytes"])}


def _judge(
    config: Compression, judge: EncoderChoice, images: Images, whole: Path, run_folder: Path, work: Path, rank: int,
    dtype: str, keep: float,
) -> Row:  # fmt: skip
    """Compress, mask, sample and judge."""
    bank = whole
    if rank:
        bank = work / "compressed.safetensors"
        if not bank.exists():
            gmem_bank.compress(whole, rank=rank, dtype=dtype, output=bank)
        if keep < 1:
            masked = work / "masked.safetensors"
            if not masked.exists():
                kept = max(1, round(keep * rank))
                gmem_bank.mask_coefficients(bank, keep=kept, allow_larger=True, output=masked)
            bank = masked
    options = gmem_gen.EvaluationOptions(num=config.num, num_resamples=30, seed=config.seed)
    report = gmem_gen.evaluate(
        bank, judge.load("raw"), checkpoint=run_folder, reference=images.held_out, images=images.train, options=options,
        out=work.parent / "evaluation",
    )  # fmt: skip
    return {"bytes": bank.stat().st_size, **judged(report)}


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    columns = {"bank": "bank", "dtype": "type", "kept": "coefficients kept", "bytes": "bytes", "frechet": "Fréchet distance",
               "recall": "recall", "fidelity": "fidelity"}  # fmt: skip
    best, whole = found["smallest"], found["rows"][0]
    said = (
        f"Smallest bank within 5 % of the whole one's distance: {best['bank']}, {best['dtype']}, {best['kept']:.0%} of the "
        f"coefficients: {best['bytes']:,} of {whole['bytes']:,} bytes."
    )
    why = "All banks were asked for the same rows with the same noise; the distances' own spread is wider than 5 %."
    return f"{table(found['rows'], columns)}\n\n{said} {why}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw distance against bytes."""
    with plot(path, 1, 1, (6.5, 3.6)) as [[axis]]:
        for index, (dtype, kept) in enumerate(dict.fromkeys((row["dtype"], row["kept"]) for row in found["rows"])):
            own = [row for row in found["rows"] if (row["dtype"], row["kept"]) == (dtype, kept)]
            axis.plot([row["bytes"] / 1024 for row in own], [row["frechet"] for row in own], MARKERS[index % len(MARKERS)],
                      mfc="none", label=f"{dtype}, {kept:.0%} kept")  # fmt: skip
        axis.axhline(WITHIN * found["rows"][0]["frechet"], color="#888", linestyle="--", label="whole bank + 5 %")
        axis.set(xscale="log", xlabel="KiB of the bank", ylabel="Fréchet distance")
        log_scale(axis, "y")
        axis.legend(frameon=False, fontsize=8)
