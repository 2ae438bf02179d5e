"""Experiments that can be repeated: a configuration, a table, a plot, and a section of docs/RESULTS.md from the figures.

    python -m tools.experiments speed            # on scikit-learn's digits
    python -m tools.experiments insertion
    python -m tools.experiments compression
    python -m tools.experiments composition      # and generalisation, size, encoders
    python -m tools.experiments backbones --real FOLDER --taef2 FOLDER
    python -m tools.experiments speed --cifar10 FOLDER   # a folder with train.tar and test.tar

The same command again takes up where it was interrupted: what is done lies in --out, a JSON a cell. With --publish the
figures go to docs/results and docs/RESULTS.md; `--from-json` writes these again without computing anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from gmem_bank.errors import GMemError
from tools import (
    experiment_backbones,
    experiment_composition,
    experiment_compression,
    experiment_encoders,
    experiment_generalisation,
    experiment_insertion,
    experiment_size,
    experiment_speed,
)
from tools.experiment_data import EncoderChoice, Images, choose_encoder, cifar10, digits, latent_settings
from tools.experiment_kit import FIGURES, Bench, Cells, record, write_section

EXPERIMENTS: dict[str, tuple[Any, Any, str]] = {
    "speed": (experiment_speed, experiment_speed.Speed, "Training speed: a memory, classes, or nothing"),
    "insertion": (experiment_insertion, experiment_insertion.Insertion, "A class inserted without training"),
    "composition": (experiment_composition, experiment_composition.Composition, "Between two classes"),
    "compression": (experiment_compression, experiment_compression.Compression, "How small the bank may be"),
    "generalisation": (
        experiment_generalisation,
        experiment_generalisation.Generalisation,
        "Beyond the training images",
    ),
    "size": (experiment_size, experiment_size.Size, "How many rows the bank has to have"),
    "encoders": (experiment_encoders, experiment_encoders.Encoders, "One encoder after another"),
    "backbones": (experiment_backbones, experiment_backbones.Backbones, "Networks, tokenizers and encoders"),
}


OF_MANY = ("encoders", "backbones")
"""Experiments that condition on several encoders."""
OF_TWINS = ("insertion", "backbones")
"""Experiments that keep mirrored twins, which may show something else or nothing, out of what they ask for."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument(
        "--cifar10", type=Path, help="folder with CIFAR-10 as train.tar and test.tar; without it digits"
    )
    parser.add_argument("--per-class", type=int, default=500, help="images of each class of CIFAR-10 to train on (500)")
    parser.add_argument("--encoder", default="hog", help="that conditions: hog, pixels, clip, real, classifier (hog)")
    parser.add_argument("--tokenizer", choices=("pixel", "taef2"), default="pixel", help="what generators draw (pixel)")
    parser.add_argument("--flip", action="store_true", help="mirrored twins in the banks that generators learn from")
    parser.add_argument("--judge", help="encoder that judges (digits: pixels, CIFAR-10: classifier)")
    parser.add_argument("--real", help="folder or repository of the encoder 'real', in the form of transformers")
    parser.add_argument("--taef2", type=Path, help="folder with the weights of TAEF2, for the tokenizer 'taef2'")
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
        try:
            value = json.loads(text)
        except ValueError:
            raise SystemExit(f'--set {pair}: what follows = must be JSON, such as 300, [50,100] or ["9"]') from None
        changes[name] = tuple(value) if isinstance(value, list) else value
    return kind(**changes)


def bench(options: argparse.Namespace) -> Bench:
    """Return images, judge and cells as the command line asks for them."""
    if options.name in OF_MANY and (options.encoder != "hog" or options.tokenizer != "pixel"):
        raise SystemExit(f"{options.name} has encoders and tokenizers of its own: give them by --set")
    if options.flip and options.name not in OF_TWINS:
        raise SystemExit(f"--flip is for {' and '.join(OF_TWINS)}, which ask for no mirrored twin")
    images = (
        digits(options.out) if options.cifar10 is None else cifar10(options.cifar10, options.out, options.per_class)
    )

    def choose(name: str) -> EncoderChoice:
        return choose_encoder(name, images, options.out, options.real)

    chosen = dataclasses.replace(images, flip=options.flip, encoder=choose(options.encoder))
    drawn = latent_settings(chosen, options.out, options.taef2) if options.tokenizer == "taef2" else ()
    chosen = dataclasses.replace(chosen, training=(*images.training, *drawn, *options.train))
    judge = choose(options.judge or ("pixels" if options.cifar10 is None else "classifier"))
    if judge == chosen.encoder:
        raise SystemExit(f"{judge.words()} cannot both condition and judge: give another --encoder or --judge")
    identity = hashlib.sha256(json.dumps(chosen.identity(), sort_keys=True, default=str).encode()).hexdigest()[:8]
    folder = options.out / f"{stem(options, images)}-{identity}"
    return Bench(images=chosen, judge=judge, cells=Cells(folder), choose=choose, autoencoder=options.taef2)


def stem(options: argparse.Namespace, images: Images) -> str:
    """Return the name of the files of an experiment."""
    return "-".join(part for part in (options.name, images.name.lower(), options.variant) if part)


def command(options: argparse.Namespace) -> str:
    """Return the command again, with variables in the place of folders that every machine has elsewhere."""
    words = ["python -m tools.experiments", options.name]
    words += [f"--cifar10 $CIFAR10 --per-class {options.per_class}"] if options.cifar10 else []
    words += ["--real $VIT_TINY"] if options.real else []
    words += ["--taef2 $TAEF2"] if options.taef2 else []
    words += [f"--encoder {options.encoder}"] if options.encoder != "hog" else []
    words += [f"--tokenizer {options.tokenizer}"] if options.tokenizer != "pixel" else []
    words += ["--flip"] if options.flip else []
    words += [f"--judge {options.judge}"] if options.judge else []
    words += [f"--set {shlex.quote(pair)}" for pair in options.set] + [
        f"--train {shlex.quote(pair)}" for pair in options.train
    ]
    return " ".join([*words, *([f"--variant {options.variant}"] if options.variant else [])])


def publish(name: str) -> None:
    """Write the plot and the section of an experiment from its JSON."""
    found = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    module, _, title = EXPERIMENTS[found["name"]]
    module.draw(found["figures"], FIGURES / f"{name}.png")
    data = ", ".join(part for part in (found["data"], found.get("variant")) if part)
    by = "Judged" if found["name"] in OF_MANY else f"Conditioned on {found['conditioned_on']}, judged"
    about = (
        f"## {title}: {data}\n\n    {found['command']}\n\nConfiguration: `{json.dumps(found['config'])}`. {by} by "
        f"{found['judge']}; {found['seconds']:,.0f} s, without banks and encoders that are made once.\n\n"
    )
    write_section(name, f"{about}{module.words(found['figures'])}\n\n![{title}](results/{name}.png)")


def main() -> int:
    """Run an experiment and print its table."""
    options = parse()
    module, kind, _ = EXPERIMENTS[options.name]
    if options.from_json:
        names = [path.stem for path in sorted(FIGURES.glob(f"{options.name}-*.json"))]
        for name in names:
            publish(name)
        if not names:
            raise SystemExit(f"{FIGURES} has no figures of {options.name}: run it with --publish first")
        return 0
    config = configured(kind, options.set)
    if options.variant and not options.variant.replace("-", "").isalnum():
        raise SystemExit(f"--variant {options.variant}: give a word of letters, digits and '-'")
    try:
        given = bench(options)
        figures = module.run(config, given)
    except GMemError as error:
        raise SystemExit(f"Error: {error}") from error
    seconds = sum(json.loads(path.read_text(encoding="utf-8"))["seconds"] for path in set(given.cells.used))
    found = {
        "name": options.name, "data": given.images.name, "variant": options.variant, "command": command(options),
        "config": record(config), "conditioned_on": given.images.encoder.words(), "judge": given.judge.words(),
        "seconds": round(seconds), "figures": figures,
    }  # fmt: skip
    print(module.words(figures))
    if options.publish:
        FIGURES.mkdir(exist_ok=True)
        name = stem(options, given.images)
        (FIGURES / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        publish(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
