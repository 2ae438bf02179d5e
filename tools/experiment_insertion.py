"""Experiment "insertion": every class held out of the training in turn, then inserted into the bank, or not.

The bank is factored, as a small bank is: insertion projects on its basis, or lets it grow. Held-out
real images of all classes vote on what each sample shows; a classifier trained on the same embeddings
of the same images is a second way to count, not a second witness.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gmem_bank
import gmem_gen
from tools.experiment_data import EncoderChoice, Images
from tools.experiment_judging import real_images
from tools.experiment_kit import Bench, Row, plot, save_pictures, table

INSERTED = {"projected": -1.0, "basis grown": None}
"""Variant → `grow_below` of the insertion; None: the bank's own threshold."""
TRAINED = "trained on"
"""The control: samples of a class of a generator that was trained on every class."""
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


def run(config: Insertion, bench: Bench) -> dict[str, Any]:
    """Hold out every class in turn and return a row for each."""
    images, judge, cells = bench.images, bench.judge, bench.cells
    alone = dataclasses.replace(config, classes=())  # a cell is the same whichever others are held out
    settings = {"config": alone, **images.identity(), "judge": judge}
    control = cells.get("trained-on-all", settings, lambda work: trained_on_all(config, images, judge, work))
    rows = []
    for name in chosen_classes(images, config.classes):
        cell = {**settings, "class": name}
        found = cells.get(f"hold-out-{name}", cell, lambda work, n=name: hold_out(config, images, judge, work, [n]))
        rows.append({"class": name, TRAINED: control[name], TRAINED + CLASSIFIED: control[name + CLASSIFIED], **found})
    fields = [name + judged for judged in ("", CLASSIFIED) for name in ("seen", TRAINED, "not inserted", *INSERTED)]
    means = {field: float(np.mean([row[field] for row in rows])) for field in fields}
    return {"rows": [*rows, {"class": "mean", **means}], "share_of_seen": means["basis grown"] / means["seen"],
            "share_of_seen_classified": means["basis grown" + CLASSIFIED] / means["seen" + CLASSIFIED]}  # fmt: skip


def chosen_classes(images: Images, wanted: Sequence[str]) -> list[str]:
    """Return the classes that are asked for, or every class."""
    there = sorted(path.name for path in images.train.iterdir() if path.is_dir())
    if unknown := sorted(set(wanted) - set(there)):
        raise SystemExit(f"no class {unknown[0]!r}: give some of {', '.join(there)}")
    return list(wanted) or there


def trained_on_all(config: Insertion, images: Images, judge: EncoderChoice, work: Path) -> Row:
    """Train on every class, and return of each the share of its samples that show it."""
    bank = _train_without(config, images, work, [])
    asked = {name: (bank, *_asked(_keys(config, bank, name), name)) for name in opened(bank).names}
    return _fidelity(images, judge, work, asked)


def hold_out(config: Insertion, images: Images, judge: EncoderChoice, work: Path, held: Sequence[str], *settings: str,
             variants: Sequence[str] = tuple(INSERTED)) -> Row:  # fmt: skip
    """Train without some classes, and judge samples of the others, and of each of these, inserted and not.

    Args:
        config: sizes; its classes are of no account.
        images: of all classes.
        judge: by whose embeddings held-out images vote.
        work: where everything lies.
        held: the classes to hold out.
        settings: of the generator.
        variants: names in INSERTED.

    Returns:
        Shares of the samples that show what was asked for, by votes and by a classifier, and the ranks of the banks.
    """
    bank = _train_without(config, images, work, held, *settings)
    keys = [key for name in opened(bank).names for key in _keys(config, bank, name)]
    figures = _fidelity(images, judge, work, {"seen": (bank, keys, [key.partition("/")[0] for key in keys])})
    absent = {name: (bank, *_asked(_stand_ins(config, images, work, bank, name), name)) for name in held}
    figures |= _mean_of(_fidelity(images, judge, work, absent), held, "not inserted")
    for variant in variants:
        targets = {name: _inserted(images, bank, work, name, variant) for name in held}
        there = {name: (targets[name], *_asked(_keys(config, targets[name], name), name)) for name in held}
        figures |= _mean_of(_fidelity(images, judge, work, there), held, variant)
        figures[f"{variant}: rank"] = max(len(opened(target).basis) for target in targets.values())
    return figures


def _train_without(config: Insertion, images: Images, work: Path, held: Sequence[str], *settings: str) -> Path:
    """Train on a factored bank of all classes but some, and return it."""
    bank = _bank_without(config, images, work, held)
    train = images.config(
        "nano", f"train.max_steps={config.steps}", f"train.checkpoint_every={config.steps}", f"train.seed={config.seed}",
        f"sample.guidance={config.guidance}", *settings,
    )  # fmt: skip
    gmem_gen.train(bank, train, out=work / "run")
    return bank


def _asked(keys: list[str], name: str) -> tuple[list[str], list[str]]:
    return keys, [name] * len(keys)


def _mean_of(figures: Row, held: Sequence[str], name: str) -> Row:
    """Return the means over the classes that were held out, under one name, and each class's where there are several."""
    means: Row = {
        name + judged: float(np.mean([figures[each + judged] for each in held])) for judged in ("", CLASSIFIED)
    }
    return means if len(held) == 1 else {**means, f"{name}: each": {each: figures[each] for each in held}}


def _bank_without(config: Insertion, images: Images, work: Path, held: Sequence[str]) -> Path:
    """Return a factored bank of all classes but some."""
    whole, dense, bank = _whole(images, work), work / "dense.safetensors", work / "bank.safetensors"
    if held and not dense.exists():
        gmem_bank.remove(whole.path, gmem_bank.Selection(concepts=tuple(held)), output=dense)
    if not bank.exists():
        gmem_bank.compress(dense if held else whole.path, rank=min(config.rank, whole.dim), output=bank)
    return bank


def _whole(images: Images, work: Path) -> gmem_bank.MemoryBank:
    """Return the dense bank of all classes, which the cells share: so that an image is encoded once."""
    return images.build(images.train, work.parent / f"whole-{images.encoder.words()}.safetensors")


def _snippets_of(images: Images, work: Path, concept: str) -> NDArray[np.float32]:
    """Return the (n, D) snippets of a class as the encoder made them, without those of mirrored twins."""
    whole = _whole(images, work)
    return whole.snippets(whole.rows_for(_own_keys(whole, concept)))


def _own_keys(bank: gmem_bank.MemoryBank, concept: str) -> list[str]:
    """Return the keys of a concept without mirrored twins, which may show something else, or nothing."""
    return [key for key in bank.keys(bank.rows_of(concept)) if not key.endswith(gmem_bank.FLIP_SUFFIX)]


def _inserted(images: Images, bank: Path, work: Path, held: str, variant: str) -> Path:
    """Return the bank with a class inserted."""
    target = work / f"{variant.replace(' ', '-')}-{held}.safetensors"
    if not target.exists():
        snippets = _snippets_of(images, work, held)
        gmem_bank.insert_snippets(bank, snippets, name=held, grow_below=INSERTED[variant], report=False, output=target)
    return target


def opened(bank: Path) -> Any:
    """Return an open bank."""
    return gmem_bank.open(bank)


def _keys(config: Insertion, bank: Path, concept: str) -> list[str]:
    """Return as many keys of a concept as are sampled."""
    keys = _own_keys(opened(bank), concept)
    chosen = np.random.default_rng(config.seed).choice(len(keys), config.num, replace=len(keys) < config.num)
    return [keys[place] for place in chosen]


def _stand_ins(config: Insertion, images: Images, work: Path, bank: Path, held: str) -> list[str]:
    """Return the rows nearest to images of a class that is not in the bank."""
    snippets = np.resize(_snippets_of(images, work, held), (config.num, opened(bank).dim))
    found: list[str] = opened(bank).keys(opened(bank).nearest(snippets, 1)[1][:, 0])
    return found


def _fidelity(
    images: Images, judge: EncoderChoice, work: Path, asked: Mapping[str, tuple[Path, list[str], list[str]]]
) -> Row:
    """Draw rows of banks; the shares that held-out images of all classes vote for, and a classifier takes for, as asked.

    Args:
        images: with the held-out ones.
        judge: by whose embeddings they vote.
        work: with the run, and where samples go.
        asked: name of the figures → bank, keys of its rows, and the classes that they should show.
    """
    figures: Row = {}
    witnesses = real_images(judge, images.held_out)
    for name, (bank, keys, classes) in asked.items():
        conditions = gmem_gen.choose_conditions(opened(bank), concept=None, keys=keys, num=None, per_snippet=1, seed=0)
        drawn = gmem_gen.sample(opened(bank), gmem_gen.load_checkpoint(work / "run"), conditions)
        folder = work / f"samples-{name.replace(' ', '-')}"
        save_pictures(drawn.images, folder, classes)
        options = gmem_gen.EvaluationOptions(num_resamples=0)
        report = gmem_gen.evaluate(None, judge.load("raw"), samples=folder, reference=images.held_out, options=options,
                                   out=work.parent / "judged")  # fmt: skip
        assert report.concepts is not None
        figures |= {name: report.concepts.fidelity.value, name + CLASSIFIED: witnesses.classified(folder)}
    return figures


def words(found: dict[str, Any]) -> str:
    """Return the section's text."""
    columns = {"class": "held out"}
    for by, label in {"": "", CLASSIFIED: " (classifier)"}.items():
        columns |= {
            f"seen{by}": f"seen classes{label}", f"{TRAINED}{by}": f"trained on it{label}",
            f"not inserted{by}": f"not inserted{label}", f"projected{by}": f"inserted, projected{label}",
            f"basis grown{by}": f"inserted, basis grown{label}",
        }  # fmt: skip
    columns |= {"projected: rank": "rank", "basis grown: rank": "rank, grown"}
    said = (
        f"Mean fidelity of inserted classes (basis grown) over that of seen ones: {found['share_of_seen']:.3g}; by the "
        f"classifier: {found['share_of_seen_classified']:.3g}."
    )
    return f"{table(found['rows'], columns)}\n\n{said}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw fidelity class by class."""
    with plot(path, 1, 1, (9, 3.2)) as [[axis]]:
        names = ("seen", TRAINED, "not inserted", *INSERTED)
        for index, name in enumerate(names):
            places = np.arange(len(found["rows"])) + (index - 2) * 0.17
            axis.bar(places, [row[name] for row in found["rows"]], 0.17, label=name)
        axis.set(xticks=range(len(found["rows"])), xlabel="class held out", ylabel="fidelity", ylim=(0, 1.15))
        axis.set_xticklabels(
            [row["class"] for row in found["rows"]], rotation=0 if len(found["rows"][0]["class"]) < 3 else 30
        )
        axis.legend(frameon=False, ncols=5, loc="upper center")
