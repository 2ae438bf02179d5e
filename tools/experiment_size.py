"""Experiment "size": how many rows the bank has to have, where the generator saw all of them, and where it saw no more.

Rows stay by chance, or as a coreset. Samples are judged against held-out images, so that what few rows lose is diversity.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gmem_bank
import gmem_gen
from tools.experiment_data import EncoderChoice, Images
from tools.experiment_kit import Bench, Cells, Row, judged, log_scale, plot, save_pictures, table, trained

WAYS = ("at random", "coreset")
TRAINED = ("the whole bank", "these rows alone")
COLUMNS = {"rows": "rows", "kept": "kept", "trained": "trained on", "bytes": "bytes", "frechet": "Fréchet distance",
           "frechet_low": "from", "frechet_high": "to", "precision": "precision", "recall": "recall",
           "near_copies": "near-copies", "fidelity": "fidelity"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the experiment."""

    rows: tuple[int, ...] = (25, 50, 100, 200, 400, 800)
    retrained: tuple[int, ...] = (50, 100, 200, 400, 800)
    """Of these, banks that a generator of their own is trained on too."""
    steps: int = 800
    num: int = 400
    seed: int = 0


def run(config: Size, bench: Bench) -> dict[str, Any]:
    """Judge every bank, and return its row."""
    images, judge, cells = bench.images, bench.judge, bench.cells
    whole = cells.folder / "bank.safetensors"
    total = len(images.build(images.train, whole))
    first = trained(cells, "whole", images, whole, config.steps, f"train.seed={config.seed}").folder
    planned = [(total, "all", whole, TRAINED[0], first)]
    for count in config.rows:
        if not 0 < count < total:
            raise SystemExit(f"rows={count}: the bank has {total}")
        for kept in WAYS:
            bank = _reduced(cells, whole, count, kept, config.seed)
            planned.append((count, kept, bank, TRAINED[0], first))
            if count in config.retrained:
                own = trained(cells, bank.stem, images, bank, config.steps, f"train.seed={config.seed}").folder
                planned.append((count, kept, bank, TRAINED[1], own))
    rows = []
    for count, kept, bank, on, run_folder in planned:
        cell = {**images.identity(), "config": config, "judge": judge, "on": on}
        found = cells.get(
            f"judge-{bank.stem}-{run_folder.name}", cell,
            lambda work, b=bank, r=run_folder: _judge(config, images, judge, whole, b, r, work),
        )  # fmt: skip
        rows.append({"rows": count, "kept": kept, "trained": on, **found})
    return {"rows": rows}


def _reduced(cells: Cells, whole: Path, count: int, kept: str, seed: int) -> Path:
    """Return the bank with so many rows."""
    target = cells.folder / f"bank-{kept.replace(' ', '-')}-{count}-{seed}.safetensors"
    if not target.exists() and kept == "coreset":
        gmem_bank.coreset(whole, count, seed=seed, output=target)
    elif not target.exists():
        gmem_bank.select(whole, gmem_bank.Selection(random=count, seed=seed), output=target)
    return target


def _judge(
    config: Size, images: Images, judge: EncoderChoice, whole: Path, bank: Path, run_folder: Path, work: Path
) -> Row:
    """Draw from a bank and judge; near-copies are of any training image, whichever rows the bank has."""
    asked = gmem_bank.open(bank)
    conditions = gmem_gen.choose_conditions(
        asked, concept=None, keys=(), num=config.num, per_snippet=1, seed=config.seed
    )
    found = gmem_gen.sample(asked, gmem_gen.load_checkpoint(run_folder), conditions)
    save_pictures(found.images, work / "samples", [key.partition("/")[0] for key in conditions.keys])
    options = gmem_gen.EvaluationOptions(num_resamples=30, seed=config.seed)
    report = gmem_gen.evaluate(whole, judge.load("raw"), samples=work / "samples", reference=images.held_out,
                               images=images.train, options=options, out=work.parent / "evaluation")  # fmt: skip
    return {"bytes": bank.stat().st_size, **judged(report)}


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    return table(found["rows"], COLUMNS)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw distance and recall against the rows."""
    whole = found["rows"][0]
    counts = sorted({row["rows"] for row in found["rows"]})
    with plot(path, 1, 2, (9, 3.4)) as [axes]:
        for axis, (field, label) in zip(axes, {"frechet": "Fréchet distance", "recall": "recall"}.items(), strict=True):
            for kept in WAYS:
                for on, line in zip(TRAINED, ("o-", "s--"), strict=True):
                    own = [row for row in found["rows"] if (row["kept"], row["trained"]) == (kept, on)]
                    axis.plot([row["rows"] for row in own], [row[field] for row in own], line, mfc="none",
                              label=f"{kept}, trained on {on}")  # fmt: skip
            axis.axhline(whole[field], color="#888", linestyle=":", label=f"all {whole['rows']:,} rows")
            axis.set(xlabel="rows of the bank", ylabel=label)
            log_scale(axis, "x", counts)
        log_scale(axes[0], "y")
        axes[0].legend(frameon=False, fontsize=7)
