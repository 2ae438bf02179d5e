"""Experiment "insertion": every class held out of the training in turn, then inserted into the bank, or not.

The bank is factored, as a small bank is: insertion projects on its basis, or lets it grow. Held-out
real images of all classes vote on what each sample shows; a classifier trained on them is a second judge.
"""

from __future__ import annotations

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import gmem_bank
import gmem_gen
from tools.experiment_judging import RealImages
from tools.experiment_kit import Cells, Images, Judge, Row, table

INSERTED = {"projected": -1.0, "basis grown": None}
"""Variant → `grow_below` of the insertion; None: the bank's own threshold."""
CLASSIFIED = ": classifier"
"""What follows the name of a figure that is the classifier's."""


@dataclass(frozen=True, kw_only=True)
class Insertion:
    """Sizes of the experiment."""

    steps: int = 800
    rank: int = 24
    num: int = 100
    """Samples of each class."""
    guidance: float = 2.0
    seed: int = 0
    classes: tuple[str, ...] = ()
    """Held out in turn; none: every class."""


def run(config: Insertion, images: Images, judge: Judge, cells: Cells) -> dict[str, Any]:
    """Hold out every class in turn and return a row for each."""
    there = sorted(path.name for path in images.train.iterdir() if path.is_dir())
    if unknown := sorted(set(config.classes) - set(there)):
        raise SystemExit(f"no class {unknown[0]!r}: give some of {', '.join(there)}")
    alone = dataclasses.replace(config, classes=())  # a cell is the same whichever others are held out
    settings = {"config": alone, "training": images.training, "encoder": images.parameters, "judge": judge}
    rows = [
        {
            "class": name,
            **cells.get(
                f"hold-out-{name}",
                {**settings, "class": name},
                lambda work, n=name: _hold_out(config, images, judge, work, n),
            ),
        }
        for name in config.classes or there
    ]
    fields = [name + judged for judged in ("", CLASSIFIED) for name in ("seen", "not inserted", *INSERTED)]
    means = {field: float(np.mean([row[field] for row in rows])) for field in fields}
    return {"rows": [*rows, {"class": "mean", **means}], "share_of_seen": means["basis grown"] / means["seen"],
            "share_of_seen_classified": means["basis grown" + CLASSIFIED] / means["seen" + CLASSIFIED]}  # fmt: skip


def _hold_out(config: Insertion, images: Images, judge: Judge, work: Path, held: str) -> Row:
    """Train without a class, and judge samples of it, and of the others."""
    seen, dense, bank = work / "seen", work / "dense.safetensors", work / "bank.safetensors"
    for folder in sorted(images.train.iterdir()):
        if folder.name != held and not (seen / folder.name).exists():
            shutil.copytree(folder, seen / folder.name)
    images.build(seen, dense)
    if not bank.exists():
        gmem_bank.compress(dense, rank=config.rank, output=bank)
    train = images.config(
        "nano", f"train.max_steps={config.steps}", f"train.checkpoint_every={config.steps}", f"train.seed={config.seed}",
        f"sample.guidance={config.guidance}",
    )  # fmt: skip
    gmem_gen.train(bank, train, out=work / "run")
    keys = [key for name in opened(bank).names for key in _keys(config, bank, name)]
    asked = [key.partition("/")[0] for key in keys]
    figures = _fidelity(images, judge, work, bank, keys, asked, "seen")
    stand_ins = _stand_ins(config, images, bank, held)
    figures |= _fidelity(images, judge, work, bank, stand_ins, [held] * len(stand_ins), "not inserted")
    for variant, grow_below in INSERTED.items():
        target = work / f"{variant.replace(' ', '-')}.safetensors"
        if not target.exists():
            gmem_bank.insert_concept(
                bank,
                [images.train / held],
                images.load(),
                name=held,
                grow_below=grow_below,
                report=False,
                output=target,
            )
        keys = _keys(config, target, held)
        figures |= _fidelity(images, judge, work, target, keys, [held] * len(keys), variant)
        figures[f"{variant}: rank"] = len(opened(target).basis)
    return figures


def opened(bank: Path) -> Any:
    """Return a factored bank."""
    return gmem_bank.open(bank)


def _keys(config: Insertion, bank: Path, concept: str) -> list[str]:
    """Return as many keys of a concept as are sampled."""
    return gmem_gen.choose_conditions(
        opened(bank), concept=concept, keys=(), num=config.num, per_snippet=1, seed=config.seed
    ).keys


def _stand_ins(config: Insertion, images: Images, bank: Path, held: str) -> list[str]:
    """Return the rows nearest to images of a class that is not in the bank."""
    source = gmem_bank.open_images(images.train / held)
    places = np.resize(np.arange(len(source)), config.num)
    snippets = gmem_bank.encode_images(images.load(), [source.read(int(place)) for place in places])
    found: list[str] = opened(bank).keys(opened(bank).nearest(snippets, 1)[1][:, 0])
    return found


def _fidelity(
    images: Images, judge: Judge, work: Path, bank: Path, keys: list[str], asked: list[str], name: str
) -> Row:
    """Draw rows of a bank; the shares that held-out images of all classes vote for, and a classifier takes for, as asked."""
    conditions = gmem_gen.choose_conditions(opened(bank), concept=None, keys=keys, num=None, per_snippet=1, seed=0)
    drawn = gmem_gen.sample(opened(bank), gmem_gen.load_checkpoint(work / "run"), conditions)
    folder = work / f"samples-{name.replace(' ', '-')}"
    shutil.rmtree(folder, ignore_errors=True)
    for place, (pixels, concept) in enumerate(zip(drawn.images, asked, strict=True)):
        (folder / concept).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(folder / concept / f"{place:05d}.png")
    options = gmem_gen.EvaluationOptions(num_resamples=0)
    report = gmem_gen.evaluate(
        None, judge.load(), samples=folder, reference=images.held_out, options=options, out=work / "judged"
    )
    assert report.concepts is not None
    classified = RealImages(judge, images.held_out).classified(folder)
    return {name: report.concepts.fidelity.value, name + CLASSIFIED: classified}


def words(found: dict[str, Any]) -> str:
    """Return the section's text; figures that were written before there was a classifier have no columns of it."""
    judges = {"": "", CLASSIFIED: " (classifier)"} if f"seen{CLASSIFIED}" in found["rows"][0] else {"": ""}
    columns = {"class": "held out"}
    for field, label in judges.items():
        columns |= {f"seen{field}": f"seen classes{label}", f"not inserted{field}": f"not inserted{label}",
                    f"projected{field}": f"inserted, projected{label}",
                    f"basis grown{field}": f"inserted, basis grown{label}"}  # fmt: skip
    columns |= {"projected: rank": "rank", "basis grown: rank": "rank, grown"}
    share = f"Mean fidelity of inserted classes (basis grown) over that of seen ones: {found['share_of_seen']:.3g}"
    if CLASSIFIED in judges:
        share += f"; by the classifier: {found['share_of_seen_classified']:.3g}"
    return f"{table(found['rows'], columns)}\n\n{share}."


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw fidelity class by class."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(9, 3.2), constrained_layout=True)
    names = ("seen", "not inserted", *INSERTED)
    for index, name in enumerate(names):
        places = np.arange(len(found["rows"])) + (index - 1.5) * 0.2
        axis.bar(places, [row[name] for row in found["rows"]], 0.2, label=name)
    axis.set(xticks=range(len(found["rows"])), xlabel="class held out", ylabel="fidelity", ylim=(0, 1.15))
    axis.set_xticklabels(
        [row["class"] for row in found["rows"]], rotation=0 if len(found["rows"][0]["class"]) < 3 else 30
    )
    axis.legend(frameon=False, ncols=4, loc="upper center")
    figure.savefig(path, dpi=110)
    plt.close(figure)
