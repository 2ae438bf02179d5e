"""What every experiment needs: cells that survive a kill, the images, a judge, and a section written from the figures.

Shapes: none here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import gmem_bank
import gmem_gen

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "RESULTS.md"
FIGURES = ROOT / "docs" / "results"
DIGITS_ENCODER = {"size": 40, "orientations": 12}
DIGITS_TRAINING = (
    "model.patch_size=2", "model.depth=2", "data.channels=1", "train.snippet_dropout=0.2", "train.max_minutes=0",
    "train.num_threads=1", "train.keep_checkpoints=0", "sample.method=euler", "sample.num_steps=12",
)  # fmt: skip
CIFAR_TRAINING = (
    "model.patch_size=4", "train.max_minutes=0", "train.num_threads=1", "train.keep_checkpoints=0", "sample.method=euler",
    "sample.num_steps=16",
)  # fmt: skip

Row = dict[str, Any]


class Cells:
    """Figures of an experiment, one JSON a cell, computed once.

    Args:
        folder: where they lie; what a cell makes on the way lies beside it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.used: list[Path] = []
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str, settings: Mapping[str, Any], compute: Callable[[Path], Row]) -> Row:
        """Return a cell's figures: as they were stored for the same settings, or computed now in a folder of its own."""
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]
        path, work = self.folder / f"{name}-{digest}.json", self.folder / f"{name}-{digest}"
        self.used.append(path)
        if path.is_file():
            found: Row = json.loads(path.read_text(encoding="utf-8"))
            return found
        print(f"{name} …", flush=True)
        started = time.perf_counter()
        work.mkdir(exist_ok=True)
        figures = {**compute(work), "seconds": round(time.perf_counter() - started, 1)}
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(figures, indent=1), encoding="utf-8")
        temporary.replace(path)
        print(f"{name}: {figures['seconds']} s", flush=True)
        return figures


@dataclass(frozen=True, kw_only=True)
class Images:
    """Real images in two halves, and what to do with them."""

    train: Path
    """Class folders."""
    held_out: Path
    """Class folders."""
    encoder: str
    parameters: Mapping[str, Any]
    training: Sequence[str]
    """Settings of the generator."""

    def build(self, source: Path, bank: Path) -> gmem_bank.MemoryBank:
        """Build a bank of the conditioning encoder, or open it where it is there."""
        gmem_bank.build(source, self.load(), bank)
        return gmem_bank.open(bank)

    def load(self) -> gmem_bank.Encoder:
        """Return the encoder that conditions."""
        return gmem_bank.load_encoder(self.encoder, parameters=self.parameters)

    def config(self, preset: str, *settings: str) -> gmem_gen.Config:
        """Return a preset with the settings of these images, and more."""
        return gmem_gen.apply_settings(gmem_gen.preset(preset), [*self.training, *settings])


def digits(folder: Path) -> Images:
    """Write scikit-learn's 1,797 digits as class folders: of every four the first is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    halves = folder / "digits" / "train", folder / "digits" / "held-out"
    if not (folder / "digits" / "written").is_file():
        shutil.rmtree(folder / "digits", ignore_errors=True)
        for index, (image, label) in enumerate(zip(data.images, data.target, strict=True)):
            target = halves[index % 4 == 0] / str(label)
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.rint(image * (255 / 16)).astype(np.uint8)).save(target / f"{index:04d}.png")
        (folder / "digits" / "written").touch()
    return Images(
        train=halves[0], held_out=halves[1], encoder="hog", parameters=DIGITS_ENCODER, training=DIGITS_TRAINING
    )


def cifar10(data: Path, folder: Path, per_class: int) -> Images:
    """Write the first images of each class of CIFAR-10 as class folders, from a folder with train.tar and test.tar."""
    target = folder / f"cifar10-{per_class}"
    if not (target / "written").is_file():
        shutil.rmtree(target, ignore_errors=True)
        for half, archive in (("train", "train.tar"), ("held-out", "test.tar")):
            source = gmem_bank.open_images(data / archive)
            for name, places in source.concepts.items():
                (target / half / name).mkdir(parents=True)
                for place in places[:per_class].tolist():
                    Image.fromarray(source.read(place)).save(target / half / name / f"{place:05d}.png")
        (target / "written").touch()
    return Images(
        train=target / "train",
        held_out=target / "held-out",
        encoder="hog",
        parameters={"size": 40},
        training=CIFAR_TRAINING,
    )


@dataclass(frozen=True, kw_only=True)
class Judge:
    """The encoder that judges: never the one that conditions."""

    name: str = "pixels"
    weights: str | None = None
    parameters: str = '{"size": 8}'
    """JSON object."""

    def load(self) -> gmem_bank.Encoder:
        """Return the encoder, in raw space."""
        return gmem_bank.load_encoder(
            self.name, weights=self.weights, space="raw", parameters=json.loads(self.parameters)
        )

    def words(self) -> str:
        """Return what to call it."""
        return self.name.replace("hf:", "") if not self.weights else Path(self.weights).name


def judged(report: gmem_gen.EvaluationReport) -> Row:
    """Return the figures of an evaluation that tables show."""
    found = report.to_json()
    distribution, copies, concepts = found["distribution"], found["memorisation"], found["concepts"]
    return {
        "frechet": distribution["frechet"]["value"], "frechet_low": distribution["frechet"]["low"],
        "frechet_high": distribution["frechet"]["high"], "rank_deficient": distribution["frechet"]["rank_deficient"],
        "kid": distribution["kid"]["value"], "precision": distribution["precision"]["value"],
        "recall": distribution["recall"]["value"],
        "near_copies": None if copies is None else copies["near_copies"]["value"],
        "fidelity": None if concepts is None else concepts["fidelity"]["value"],
        "by_concept": None if concepts is None else concepts["by_concept"],
        "snippet_cosine": None if found["snippets"] is None else found["snippets"]["cosine"]["value"],
    }  # fmt: skip


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table: field → heading."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put a section into the page of results, in the place of the one of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else "# Results\n\nWritten by `python -m tools.experiments`.\n"
    )
    section = f"{begin}\n{text.strip()}\n{end}\n"
    if begin in page:
        before, _, rest = page.partition(begin)
        after = rest.partition(end)[2].lstrip("\n")
        page = before + section + (f"\n{after}" if after else "")
    else:
        page = page.rstrip() + "\n\n" + section
    path.write_text(page, encoding="utf-8")


def record(settings: Any) -> Row:
    """Return a configuration as JSON."""
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in dataclasses.asdict(settings).items()
    }
