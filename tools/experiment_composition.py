"""Experiment "composition": snippets between a row of one class and a row of another, by every method.

A sample is of both parents where real images of both are among its nearest; controls are samples of one
parent alone, and the mean of two real images, pixel by pixel, which needs no generator.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
import gmem_gen
from tools.experiment_data import EncoderChoice, Images
from tools.experiment_judging import real_images
from tools.experiment_kit import Bench, Row, as_rgb, plot, table, trained

METHODS = ("linear", "slerp", "concat", "mask")
PARENTS = ("first parent", "second parent")
CONTROLS = (*PARENTS, "pixel blend")
SHOWN = ("first real", "second real", "pixel blend", *METHODS)
"""Rows of the picture."""

Drawn = list[NDArray[np.uint8]]


@dataclass(frozen=True, kw_only=True)
class Composition:
    """Sizes of the experiment."""

    steps: int = 800
    num: int = 50
    """Pairs of rows for each pair of classes; as many samples of each method."""
    apart: int = 3
    """Class i is paired with class i + apart, all around: as many pairs as classes."""
    neighbours: int = 10
    """Real images near a sample, among which both parents must be."""
    guidance: float = 2.0
    seed: int = 0


def run(config: Composition, bench: Bench) -> dict[str, Any]:
    """Train once on all classes, draw and judge every pair, and return a row for each, and means for each way."""
    images, judge, cells = bench.images, bench.judge, bench.cells
    bank = cells.folder / "bank.safetensors"
    opened = images.build(images.train, bank)
    guided = f"sample.guidance={config.guidance}"
    run_folder = trained(cells, "all", images, bank, config.steps, f"train.seed={config.seed}", guided).folder
    rows = []
    for first, second in pairs(sorted(opened.names), config.apart):
        cell = {**images.identity(), "config": config, "judge": judge}
        found = cells.get(
            f"pair-{first}-{second}",
            cell,
            lambda _, a=first, b=second: _pair(config, images, judge, opened, run_folder, a, b),
        )
        rows.append({"first": first, "second": second, **found})
    return {"rows": rows, "ways": [summary(rows, way) for way in (*METHODS, *CONTROLS)]}


def pairs(names: Sequence[str], apart: int) -> list[tuple[str, str]]:
    """Return each name with the one that comes `apart` places after it, all around."""
    if not 0 < apart < len(names):
        raise SystemExit(f"apart={apart}: give 1 to {len(names) - 1}")
    return [(name, names[(place + apart) % len(names)]) for place, name in enumerate(names)]


def _pair(
    config: Composition,
    images: Images,
    judge: EncoderChoice,
    bank: gmem_bank.MemoryBank,
    run_folder: Path,
    first: str,
    second: str,
) -> Row:
    """Draw and judge one pair of classes."""
    rng = np.random.default_rng(config.seed)
    rows = [
        rng.choice(bank.rows_of(name), config.num, replace=len(bank.rows_of(name)) < config.num)
        for name in (first, second)
    ]
    keys = [bank.keys(some) for some in rows]
    real = [[bank.read_image(int(row)) for row in some] for some in rows]
    model = gmem_gen.load_checkpoint(run_folder)
    drawn = {way: _sample(bank, model, snippets_of(bank, way, keys, config.seed)) for way in (*METHODS, *PARENTS)}
    drawn["pixel blend"] = [blend(a, b) for a, b in zip(*real, strict=True)]
    witnesses = real_images(judge, images.held_out)
    figures: Row = {
        way: shares(witnesses.classes_near(some, config.neighbours), first, second) for way, some in drawn.items()
    }
    drawn |= {"first real": real[0], "second real": real[1]}
    figures["pictures"] = {way: packed(drawn[way][0]) for way in SHOWN}  # the first pair of rows: not chosen
    return figures


def snippets_of(bank: gmem_bank.MemoryBank, way: str, keys: Sequence[Sequence[str]], seed: int) -> NDArray[np.float32]:
    """Return (n, D) snippets half-way between n rows and n others, or of one of the two alone."""
    if way in PARENTS:
        return bank.snippets(bank.rows_for(keys[PARENTS.index(way)]))
    middles = [
        gmem_bank.interpolate_snippets(bank, a, b, method=way, steps=3, seed=seed + place)[1]
        for place, (a, b) in enumerate(zip(*keys, strict=True))
    ]
    return np.stack(middles)


def _sample(bank: gmem_bank.MemoryBank, model: gmem_gen.LoadedCheckpoint, snippets: NDArray[np.float32]) -> Drawn:
    """Draw one (H, W, 3) image of each snippet."""
    conditions = gmem_gen.snippet_conditions(snippets, [f"{place}" for place in range(len(snippets))])
    return [as_rgb(image) for image in gmem_gen.sample(bank, model, conditions).images]


def blend(first: NDArray[np.uint8], second: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the mean of two images, pixel by pixel, halves rounded to even."""
    return np.rint((first.astype(np.float64) + second) / 2).astype(np.uint8)


def shares(near: NDArray[np.str_], first: str, second: str) -> Row:
    """Return of (n, k) classes near n samples the shares with both parents, and with more of a third than of either."""
    a, b = (near == first).sum(axis=1), (near == second).sum(axis=1)
    others = [(near == name).sum(axis=1) for name in np.unique(near) if name not in (first, second)]
    third = np.max(others, axis=0) if others else np.zeros_like(a)
    return {"both": float(np.mean((a > 0) & (b > 0))), "elsewhere": float(np.mean(third > np.maximum(a, b)))}


def summary(rows: Sequence[Row], way: str) -> Row:
    """Return a way's mean shares over the pairs, and its lowest and highest."""
    both = [row[way]["both"] for row in rows]
    return {"way": way, "both": float(np.mean(both)), "lowest": min(both), "highest": max(both),
            "elsewhere": float(np.mean([row[way]["elsewhere"] for row in rows]))}  # fmt: skip


def packed(image: NDArray[np.uint8]) -> Row:
    """Return an image as JSON."""
    return {"shape": image.shape, "bytes": base64.b64encode(image.tobytes()).decode("ascii")}


def unpacked(stored: Row) -> NDArray[np.uint8]:
    """Return the image that `packed` stored."""
    return np.frombuffer(base64.b64decode(stored["bytes"]), np.uint8).reshape(stored["shape"])


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    columns = {"way": "half-way by", "both": "both parents near", "lowest": "lowest pair", "highest": "highest pair",
               "elsewhere": "a third class nearer"}  # fmt: skip
    flat = [{"pair": f"{row['first']} + {row['second']}", **{way["way"]: row[way["way"]]["both"] for way in found["ways"]}}
            for row in found["rows"]]  # fmt: skip
    each = {"pair": "both parents near", **{way["way"]: way["way"] for way in found["ways"]}}
    same = "Linear and slerp are one and the same half-way between snippets of length 1."
    return f"{table(found['ways'], columns)}\n\n{same} Pair by pair:\n\n{table(flat, each)}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw the first pair of rows of each pair of classes, real, blended and composed."""
    rows = found["rows"]
    with plot(path, len(SHOWN), len(rows), (0.85 * len(rows) + 1, 0.85 * len(SHOWN))) as axes:
        for line, way in zip(axes, SHOWN, strict=True):
            for axis, row in zip(line, rows, strict=True):
                axis.imshow(unpacked(row["pictures"][way]))
                axis.set(xticks=[], yticks=[])
            line[0].set_ylabel(way, rotation=0, ha="right", va="center", fontsize=8)
        for axis, row in zip(axes[0], rows, strict=True):
            axis.set_title(f"{row['first']} + {row['second']}", fontsize=8)
