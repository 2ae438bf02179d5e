"""Experiments that can be repeated: a configuration, a table, a plot, and a section of docs/RESULTS.md from the figures.

    python -m tools.experiments speed            # on scikit-learn's digits
    python -m tools.experiments insertion
    python -m tools.experiments compression
    python -m tools.experiments composition
    python -m tools.experiments speed --data FOLDER --judge hf:FOLDER   # CIFAR-10 as train.tar and test.tar

The same command again takes up where it was interrupted: what is done lies in --out, a JSON a cell. With --publish the
figures go to docs/results and docs/RESULTS.md; `--from-json` writes these again without computing anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from tools import experiment_composition, experiment_compression, experiment_insertion, experiment_speed
from tools.experiment_kit import FIGURES, Cells, Images, Judge, cifar10, digits, record, write_section

EXPERIMENTS: dict[str, tuple[Any, Any, str]] = {
    "speed": (experiment_speed, experiment_speed.Speed, "Training speed: a memory, classes, or nothing"),
    "insertion": (experiment_insertion, experiment_insertion.Insertion, "A class inserted without training"),
    "composition": (experiment_composition, experiment_composition.Composition, "Between two classes"),
    "compression": (experiment_compression, experiment_compression.Compression, "How small the bank may be"),
}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 as train.tar and test.tar; without it digits")
    parser.add_argument("--per-class", type=int, default=200, help="images of each class of CIFAR-10 (200)")
    parser.add_argument("--judge", help="encoder that judges (digits: pixels)")
    parser.add_argument("--judge-weights", help="folder with its weights")
    parser.add_argument("--judge-parameters", default="{}", help="JSON object")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=JSON", help="a field of the configuration")
    parser.add_argument("--train", action="append", default=[], metavar="KEY=VALUE", help="a setting of the generator")
    parser.add_argument("--variant", help="short word for a second section of the same experiment, such as full-rank")
    parser.add_argument("--out", type=Path, default=Path("experiments"), help="folder for cells (experiments)")
    parser.add_argument("--publish", action="store_true", help="write docs/results and docs/RESULTS.md")
    parser.add_argument("--from-json", action="store_true", help="only write docs/RESULTS.md again from docs/results")
    return parser.parse_args()


def configured(kind: Any, pairs: list[str]) -> Any:
    """Return a configuration with fields set from FIELD=JSON."""
    known = {field.name for field in dataclasses.fields(kind)}
    changes = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in known:
            raise SystemExit(f"--set {pair}: give FIELD=JSON with a field of {', '.join(sorted(known))}")
        value = json.loads(text)
        changes[name] = tuple(value) if isinstance(value, list) else value
    return kind(**changes)


def material(options: argparse.Namespace) -> tuple[str, Images, Judge]:
    """Return the name of the data, the images, and the judge."""
    if options.data is None:
        judge = Judge() if options.judge is None else Judge(name=options.judge, weights=options.judge_weights,
                                                            parameters=options.judge_parameters)  # fmt: skip
        return "digits", digits(options.out), judge
    if options.judge is None:
        raise SystemExit("CIFAR-10 needs --judge: a network that was trained on other images, such as hf:FOLDER")
    judge = Judge(name=options.judge, weights=options.judge_weights, parameters=options.judge_parameters)
    return "CIFAR-10", cifar10(options.data, options.out, options.per_class), judge


def publish(stem: str) -> None:
    """Write the plot and the section of an experiment from its JSON."""
    found = json.loads((FIGURES / f"{stem}.json").read_text(encoding="utf-8"))
    module, _, title = EXPERIMENTS[found["name"]]
    module.draw(found["figures"], FIGURES / f"{stem}.png")
    data = ", ".join(part for part in (found["data"], found.get("variant")) if part)
    about = (
        f"## {title}: {data}\n\n    {found['command']}\n\nConfiguration: `{json.dumps(found['config'])}`. Conditioned "
        f"on {found['conditioned_on']}, judged by {found['judge']}; {found['seconds']:,.0f} s in all.\n\n"
    )
    write_section(stem, f"{about}{module.words(found['figures'])}\n\n![{title}](results/{stem}.png)")


def main() -> int:
    """Run an experiment and print its table."""
    options = parse()
    module, kind, _ = EXPERIMENTS[options.name]
    if options.from_json:
        for path in sorted(FIGURES.glob(f"{options.name}-*.json")):
            publish(path.stem)
        return 0
    config = configured(kind, options.set)
    data, images, judge = material(options)
    images = dataclasses.replace(images, training=(*images.training, *options.train))
    if options.variant and not options.variant.replace("-", "").isalnum():
        raise SystemExit(f"--variant {options.variant}: give a word of letters, digits and '-'")
    stem = "-".join(part for part in (options.name, data.lower(), options.variant) if part)
    cells = Cells(options.out / stem)
    figures = module.run(config, images, judge, cells)
    seconds = sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in cells.used)
    words = ["--data CIFAR10", f"--per-class {options.per_class}", f"--judge {judge.words()}"]
    command = " ".join(["python -m tools.experiments", options.name, *(words if options.data else []),
                        *(f"--set {shlex.quote(pair)}" for pair in options.set),
                        *(f"--train {shlex.quote(pair)}" for pair in options.train),
                        *([f"--variant {options.variant}"] if options.variant else [])])  # fmt: skip
    found = {
        "name": options.name, "data": data, "variant": options.variant, "command": command, "config": record(config),
        "conditioned_on": images.encoder,
        "judge": judge.words(), "seconds": round(seconds), "figures": figures,
    }  # fmt: skip
    print(module.words(figures))
    if options.publish:
        FIGURES.mkdir(exist_ok=True)
        (FIGURES / f"{stem}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        publish(stem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
