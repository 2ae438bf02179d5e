"""Experiment "encoders": the same generator conditioned on one encoder after another, judged by none of them.

Beside the samples stands what the encoder itself knows: the share of held-out images whose nearest rows are of their class.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import gmem_bank
import gmem_gen
from tools.experiment_data import EncoderChoice, Images
from tools.experiment_judging import embedded
from tools.experiment_kit import Bench, Row, judged, plot, table, trained

COLUMNS = {"encoder": "conditioned on", "dim": "numbers", "known": "classes known", "frechet": "Fréchet distance",
           "frechet_low": "from", "frechet_high": "to", "kid": "KID", "precision": "precision", "recall": "recall",
           "near_copies": "near-copies", "fidelity": "fidelity", "snippet_cosine": "cosine to the snippet"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """Sizes of the experiment."""

    encoders: tuple[str, ...] = ("hog", "pixels", "clip", "real")
    steps: int = 800
    num: int = 500
    neighbours: int = 10
    """Rows that vote on what class a held-out image is of."""
    seed: int = 0


def run(config: Encoders, bench: Bench) -> dict[str, Any]:
    """Train and judge one generator for each encoder."""
    images, judge, cells = bench.images, bench.judge, bench.cells
    rows = []
    for name in config.encoders:
        own = dataclasses.replace(images, encoder=bench.choose(name))
        if own.encoder == judge:
            raise SystemExit(f"the encoder {name!r} cannot both condition and judge: give another --judge")
        bank = cells.folder / f"bank-{name}.safetensors"
        built = own.build(own.train, bank)
        made = trained(cells, name, own, bank, config.steps, f"train.seed={config.seed}")
        cell = {**own.identity(), "config": config, "judge": judge}
        found = cells.get(
            f"judge-{name}", cell, lambda work, o=own, b=bank, r=made.folder: _judge(config, o, judge, b, r, work)
        )
        rows.append({"encoder": own.encoder.words(), "dim": built.dim, **found})
    return {"rows": rows}


def _judge(config: Encoders, images: Images, judge: EncoderChoice, bank: Path, run_folder: Path, work: Path) -> Row:
    options = gmem_gen.EvaluationOptions(num=config.num, num_resamples=30, seed=config.seed)
    report = gmem_gen.evaluate(
        bank, judge.load("raw"), checkpoint=run_folder, reference=images.held_out, images=images.train, options=options,
        out=work.parent / "evaluation",
    )  # fmt: skip
    return {"known": known(images, bank, config.neighbours), **judged(report)}


def known(images: Images, bank: Path, k: int) -> float:
    """Return the share of held-out images of whose k nearest rows most are of their class; ties go to the nearer class."""
    opened = gmem_bank.open(bank)
    snippets, labels = embedded(images.encoder.load(), images.held_out)
    rows = opened.nearest(snippets, k)[1]
    classes = np.array([key.partition("/")[0] for key in opened.keys(np.arange(len(opened)))])
    right = [majority(classes[own].tolist()) == label for own, label in zip(rows, labels, strict=True)]
    return float(np.mean(right))


def majority(names: list[str]) -> str:
    """Return the most frequent name; of several the first."""
    return max(dict.fromkeys(names), key=names.count)


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    return table(found["rows"], COLUMNS)


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw distance, recall and fidelity, an encoder a bar."""
    fields = {"frechet": "Fréchet distance", "recall": "recall", "fidelity": "fidelity", "known": "classes known"}
    with plot(path, 1, len(fields), (10, 2.8)) as [axes]:
        for axis, (field, label) in zip(axes, fields.items(), strict=True):
            axis.bar([row["encoder"] for row in found["rows"]], [row[field] for row in found["rows"]], 0.6)
            axis.set(ylabel=label)
            axis.tick_params(axis="x", rotation=30)
