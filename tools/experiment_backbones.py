"""Experiment "backbones": does insertion without training depend on the network, the tokenizer or the encoder?

Every combination is trained without the same classes, which are then inserted into its bank one at a time. What is compared
is the share of samples that show an inserted class over that of the classes that were seen.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.experiment_data import EncoderChoice, Images, latent_settings
from tools.experiment_insertion import CLASSIFIED, Insertion, chosen_classes, hold_out
from tools.experiment_kit import Bench, plot, table

BACKBONES: Mapping[str, tuple[str, ...]] = {
    "LightningDiT": (),
    "SiT": ("model.use_rmsnorm=false", "model.use_swiglu=false", "model.use_rope=false"),
}
COLUMNS = {"backbone": "backbone", "tokenizer": "tokenizer", "encoder": "encoder", "seen": "seen classes",
           "not inserted": "not inserted", "basis grown": "inserted", "ratio": "inserted / seen",
           "seen" + CLASSIFIED: "seen (classifier)", "basis grown" + CLASSIFIED: "inserted (classifier)",
           "ratio" + CLASSIFIED: "inserted / seen (classifier)"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Backbones:
    """Sizes of the experiment."""

    backbones: tuple[str, ...] = tuple(BACKBONES)
    tokenizers: tuple[str, ...] = ("pixel", "taef2")
    encoders: tuple[str, ...] = ("hog", "real")
    held: tuple[str, ...] = ("1", "4", "6")
    """Classes that are held out together."""
    steps: int = 800
    rank: int = 256
    num: int = 50
    guidance: float = 3.0
    seed: int = 0


def run(config: Backbones, bench: Bench) -> dict[str, Any]:
    """Train and judge every combination, and return its row, and how far the ratios lie apart."""
    held = chosen_classes(bench.images, config.held)
    sizes = Insertion(steps=config.steps, rank=config.rank, num=config.num, guidance=config.guidance, seed=config.seed)
    rows = []
    for encoder, tokenizer, backbone in itertools.product(config.encoders, config.tokenizers, config.backbones):
        if backbone not in BACKBONES:
            raise SystemExit(f"no backbone {backbone!r}: give {' or '.join(BACKBONES)}")
        settings = (*BACKBONES[backbone], *_tokenizer(tokenizer, bench))
        images = dataclasses.replace(bench.images, encoder=bench.choose(encoder))
        if images.encoder == bench.judge:
            raise SystemExit(f"the encoder {encoder!r} cannot both condition and judge: give another --judge")
        cell = {**images.identity(), "sizes": sizes, "held": held, "settings": settings, "judge": bench.judge}
        found = bench.cells.get(
            f"{encoder}-{tokenizer}-{backbone}", cell,
            lambda work, i=images, s=settings: _judged(sizes, i, bench.judge, work, held, s),
        )  # fmt: skip
        rows.append({"backbone": backbone, "tokenizer": tokenizer, "encoder": images.encoder.words(), **found})
    spread = {f"spread{by}": max(row[f"ratio{by}"] for row in rows) - min(row[f"ratio{by}"] for row in rows)
              for by in ("", CLASSIFIED)}  # fmt: skip
    return {"rows": rows, "held": held, **spread}


def _judged(
    sizes: Insertion, images: Images, judge: EncoderChoice, work: Path, held: list[str], settings: tuple[str, ...]
) -> dict[str, Any]:
    found = hold_out(sizes, images, judge, work, held, *settings, variants=["basis grown"])
    ratios = {f"ratio{by}": found[f"basis grown{by}"] / max(found[f"seen{by}"], 1e-9) for by in ("", CLASSIFIED)}
    return {**found, **ratios}


def _tokenizer(name: str, bench: Bench) -> tuple[str, ...]:
    """Return the settings of a tokenizer."""
    if name == "pixel":
        return ()
    if name != "taef2":
        raise SystemExit(f"no tokenizer {name!r}: give pixel or taef2")
    return latent_settings(bench.images, bench.cells.folder, bench.autoencoder)


def _spread(rows: list[dict[str, Any]]) -> float:
    ratios = [row["ratio"] for row in rows]
    return float(max(ratios) - min(ratios))


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    each = dict.fromkeys(row["encoder"] for row in found["rows"])
    within = ", ".join(
        f"{_spread([row for row in found['rows'] if row['encoder'] == name]):.3g} by {name}" for name in each
    )
    said = (
        f"Held out and inserted: {', '.join(found['held'])}. The ratios lie {found['spread']:.3g} apart; by the classifier "
        f"{found['spread' + CLASSIFIED]:.3g}. Of one encoder: {within}."
    )
    return f"{table(found['rows'], COLUMNS)}\n\n{said}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw seen and inserted, a combination a pair of bars."""
    with plot(path, 1, 1, (9, 3.2)) as [[axis]]:
        for index, field in enumerate(("seen", "not inserted", "basis grown")):
            places = [place + (index - 1) * 0.27 for place in range(len(found["rows"]))]
            axis.bar(
                places, [row[field] for row in found["rows"]], 0.27, label={"basis grown": "inserted"}.get(field, field)
            )
        names = ["\n".join([row["backbone"], row["tokenizer"], *row["encoder"].split("_")]) for row in found["rows"]]
        axis.set(xticks=range(len(names)), ylabel="fidelity", ylim=(0, 1))
        axis.set_xticklabels(names, fontsize=7)
        axis.legend(frameon=False, ncols=3)
