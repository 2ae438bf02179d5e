"""What every experiment needs: cells that survive a kill, trained generators, and a section written from the figures.

Shapes: none here.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import gmem_gen
from tools.experiment_data import EncoderChoice, Images

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "RESULTS.md"
FIGURES = ROOT / "docs" / "results"
PREAMBLE = """# Results

Written by `python -m tools.experiments NAME --publish`; the command above each table makes its figures again. Those that need
more than scikit-learn's digits name `$CIFAR10`, a folder with train.tar and test.tar whose members are `class/name.jpg` (here
2,500 and 200 images of each class, compressed once more), `$VIT_TINY`, one with the published ViT-Ti/16 (augreg, from
ImageNet-21k to 1k) as the transformers library saves it, and `$TAEF2`, one with the weights of TAEF2. One seed each, two cores.
"""

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
class Bench:
    """What an experiment works with."""

    images: Images
    judge: EncoderChoice
    cells: Cells
    choose: Callable[[str], EncoderChoice]
    """Encoders by the short names of configurations."""
    autoencoder: Path | None = None
    """Folder of TAEF2."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A generator that was trained."""

    folder: Path
    seconds: float


def trained(
    cells: Cells, name: str, images: Images, bank: Path, steps: int, *settings: str, preset: str = "nano"
) -> Run:
    """Train a generator once, and return its run.

    Args:
        cells: remember that it was trained, and have the run.
        name: of the cell.
        images: give the settings that all generators of these images have.
        bank: what it learns from.
        steps: how many; the only checkpoint is the last.
        settings: more of the generator's.
        preset: of the generator.
    """
    config = images.config(preset, f"train.max_steps={steps}", f"train.checkpoint_every={steps}", *settings)
    described = {**images.identity(), "steps": steps, "settings": settings, "preset": preset}

    def train(work: Path) -> Row:
        report = gmem_gen.train(bank, config, out=work / "run")
        return {"run": f"{work.name}/run", "train_seconds": report.seconds}

    made = cells.get(f"train-{name}", described, train)
    return Run(folder=cells.folder / made["run"], seconds=made["train_seconds"])


def judged(report: gmem_gen.EvaluationReport) -> Row:
    """Return the figures of an evaluation that tables show."""
    found = report.to_json()
    distribution, copies, concepts = found["distribution"], found["memorisation"], found["concepts"]
    return {
        "frechet": distribution["frechet"]["value"], "frechet_low": distribution["frechet"]["low"],
        "frechet_high": distribution["frechet"]["high"], "rank_deficient": distribution["frechet"]["rank_deficient"],
        "kid": distribution["kid"]["value"], "precision": distribution["precision"]["value"],
        "recall": distribution["recall"]["value"],
        **({} if copies is None else _copies(copies)),
        "fidelity": None if concepts is None else concepts["fidelity"]["value"],
        "by_concept": None if concepts is None else concepts["by_concept"],
        "snippet_cosine": None if found["snippets"] is None else found["snippets"]["cosine"]["value"],
    }  # fmt: skip


def _copies(found: Mapping[str, Any]) -> Row:
    near = found["near_copies"]
    return {"near_copies": near["value"], "copies_low": near["low"], "copies_high": near["high"],
            "near_copies_of_real": found.get("near_copies_of_reference")}  # fmt: skip


def save_pictures(images: NDArray[np.uint8], folder: Path, classes: Sequence[str] = ()) -> None:
    """Write n images (n, H, W, 1 or 3) as PNGs into an empty folder, in folders of their classes where these are given."""
    shutil.rmtree(folder, ignore_errors=True)
    for place, pixels in enumerate(images):
        target = folder / classes[place] if classes else folder
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(target / f"{place:05d}.png")


def as_rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return (H, W, 3) of (H, W, 1 or 3)."""
    return np.broadcast_to(image, (*image.shape[:2], 3)).copy()


def table(rows: Sequence[Row], columns: Mapping[str, str]) -> str:
    """Return rows as a Markdown table: field → heading."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(name)) for name in columns) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def plot(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[NDArray[Any]]:
    """Give (rows, columns) axes to draw on, and write the picture as a PNG.

    Args:
        path: of the PNG.
        rows, columns: of axes.
        size: width and height in inches, at 110 pixels each.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, constrained_layout=True)
    yield axes
    figure.savefig(path, dpi=110)
    plt.close(figure)


def log_scale(axis: Any, which: str, ticks: Sequence[int] = ()) -> None:
    """Make an axis ("x" or "y") logarithmic, with plain numbers at its ticks: those given, or where they fall."""
    from matplotlib.ticker import NullLocator

    axis.set(**{f"{which}scale": "log"})
    scale = getattr(axis, f"{which}axis")
    if ticks:
        scale.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        scale.set_minor_locator(NullLocator())
    else:
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter("{x:g}")


def write_section(name: str, text: str, path: Path = RESULTS) -> None:
    """Put a section into the page of results, in the place of the one of that name."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page = path.read_text(encoding="utf-8") if path.is_file() else PREAMBLE
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
