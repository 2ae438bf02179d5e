"""Experiment "generalisation": what is drawn beyond the training images, as snippets are dropped more or less in training.

Four things are asked of each model: rows of its bank, snippets half-way between two rows of a class, half-way between
rows of two classes, and snippets of held-out images, which were never in a bank. Near-copies are counted by the judge, at the
cosine distance below which 1 % of the training images lie to their nearest other; the held-out images themselves are the control.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
import gmem_gen
from gmem_bank.space import to_space
from gmem_gen.judgement import cosines_of
from tools.experiment_data import EncoderChoice, Images
from tools.experiment_kit import Bench, Row, as_rgb, judged, plot, save_pictures, table, trained

OWN = "held-out images"
"""Asked for what also judges: of these samples distance, precision and recall would say too much, and are left out."""
ASKED = ("rows of the bank", "between rows of a class", "between two classes", OWN)
OF_THE_JUDGED = ("frechet", "frechet_low", "frechet_high", "precision", "recall")
COLUMNS = {"dropout": "snippet dropout", "asked": "asked for", "frechet": "Fréchet distance", "frechet_low": "from",
           "frechet_high": "to", "precision": "precision", "recall": "recall", "near_copies": "near-copies",
           "copies_low": "near-copies from", "copies_high": "near-copies to", "followed": "cosine to the snippet"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Generalisation:
    """Sizes of the experiment."""

    dropouts: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    """Probabilities that a number of a snippet is dropped in training."""
    steps: int = 800
    num: int = 400
    """Samples of each kind, one a snippet."""
    method: str = "slerp"
    """Of interpolation."""
    seed: int = 0


def run(config: Generalisation, bench: Bench) -> dict[str, Any]:
    """Train a model for each dropout, ask each for all four, and return their rows after that of the held-out images."""
    images, judge, cells = bench.images, bench.judge, bench.cells
    bank = cells.folder / "bank.safetensors"
    images.build(images.train, bank)
    settings = {**images.identity(), "config": config, "judge": judge}
    rows: list[Row] = []
    for dropout in config.dropouts:
        name = f"dropout-{dropout:g}"
        settings_of = (f"train.snippet_dropout={dropout}", f"train.seed={config.seed}")
        folder = trained(cells, name, images, bank, config.steps, *settings_of).folder
        for asked in ASKED:
            found = cells.get(
                f"{name}-{asked.replace(' ', '-')}", {**settings, "dropout": dropout},
                lambda work, a=asked, f=folder: _ask(config, images, judge, bank, f, work, a),
            )  # fmt: skip
            rows.append({"dropout": dropout, "asked": asked, **found})
    return {"rows": rows, "near_copies_of_real": rows[0]["near_copies_of_real"]}


def _ask(
    config: Generalisation, images: Images, judge: EncoderChoice, bank: Path, run_folder: Path, work: Path, asked: str
) -> Row:
    """Draw one sample of each of so many snippets, and judge them; also how near their own snippets come to those asked for."""
    opened = gmem_bank.open(bank)
    wanted = snippets_asked(config, images, opened, asked)
    conditions = gmem_gen.snippet_conditions(wanted, [f"{place}" for place in range(len(wanted))])
    drawn = gmem_gen.sample(opened, gmem_gen.load_checkpoint(run_folder), conditions)
    save_pictures(drawn.images, work / "samples")
    found = gmem_bank.encode_images(images.encoder.load(), [as_rgb(image) for image in drawn.images])
    options = gmem_gen.EvaluationOptions(num_resamples=30, seed=config.seed)
    report = gmem_gen.evaluate(bank, judge.load("raw"), samples=work / "samples", reference=images.held_out,
                               images=images.train, options=options, out=work.parent / "evaluation")  # fmt: skip
    return {**judged(report), "followed": float(cosines_of(found, wanted).mean())}


def snippets_asked(
    config: Generalisation, images: Images, bank: gmem_bank.MemoryBank, asked: str
) -> NDArray[np.float32]:
    """Return (num, D) snippets of one of the four kinds, the same for every model."""
    rng = np.random.default_rng(config.seed)
    if asked == OWN:
        source = gmem_bank.open_images(images.held_out)
        places = rng.permutation(len(source))[: config.num]
        found = gmem_bank.encode_images(images.encoder.load(), [source.read(int(place)) for place in places])
        return to_space(found, bank.space)
    if asked == "rows of the bank":
        return bank.snippets(rng.choice(len(bank), config.num, replace=len(bank) < config.num))
    pairs = [_pair(bank, rng, of_one=asked == "between rows of a class") for _ in range(config.num)]
    return np.stack([gmem_bank.interpolate_snippets(bank, *pair, method=config.method, steps=3)[1] for pair in pairs])


def _pair(bank: gmem_bank.MemoryBank, rng: np.random.Generator, *, of_one: bool) -> list[str]:
    """Return the keys of two rows of one concept, or of two."""
    names = sorted(bank.names)
    chosen = [str(name) for name in rng.choice(names, 1 if of_one else 2, replace=False)]
    if of_one:
        return bank.keys(rng.choice(bank.rows_of(chosen[0]), 2, replace=False))
    return [bank.keys(rng.choice(bank.rows_of(name), 1))[0] for name in chosen]


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    said = f"Of the held-out images themselves {found['near_copies_of_real']:.2%} count as near-copies."
    return f"{table([shown(row) for row in found['rows']], COLUMNS)}\n\n{said}"


def shown(row: Row) -> Row:
    """Return a row without the figures that would be better by construction."""
    return {name: value for name, value in row.items() if row["asked"] != OWN or name not in OF_THE_JUDGED}


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw near-copies, recall and precision against the dropout."""
    fields = {"near_copies": "near-copies", "precision": "precision", "recall": "recall"}
    with plot(path, 1, len(fields), (10, 3.2)) as [axes]:
        for axis, (field, label) in zip(axes, fields.items(), strict=True):
            for asked in ASKED if field == "near_copies" else ASKED[:-1]:
                own = [row for row in found["rows"] if row["asked"] == asked]
                axis.plot([row["dropout"] for row in own], [row[field] for row in own], "o-", label=asked)
            axis.set(xlabel="snippet dropout", ylabel=label, ylim=(0, None))
        axes[0].axhline(found["near_copies_of_real"], color="#888", linestyle="--", label="held-out images themselves")
        axes[0].legend(frameon=False, fontsize=7)
