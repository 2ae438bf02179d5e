"""The main job in a few minutes: teach a generator nine digits, insert the tenth into its bank, and draw it untrained.

Real images: the 1,797 handwritten digits that scikit-learn ships, written out as PNG. Every step is a public command, and
is printed as it is run.

    python -m tools.quickstart [--held-out 9] [--full | --digits 0,1,…] [--out quickstart]
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.quickstart_figures import Judge, linear_accuracy, load_images, pixel_spread, snippet_cosine
from tools.quickstart_report import write_report

SEEN_SAMPLES = 270
SPREAD_SNIPPETS, SPREAD_SAMPLES = 12, 8
FULL_DIGITS = (9, 4, 1)
"""Fixed in advance; --digits takes any."""
ENCODER = ("--encoder", "hog", "--set", "size=40", "--set", "orientations=12")
TRAINING = (
    "model.patch_size=2",
    "model.depth=2",
    "data.channels=1",
    "train.schedule=cosine",
    "train.snippet_dropout=0.2",
    "train.checkpoint_every=500",
    "train.max_minutes=0",
    "train.num_threads=1",
)
SAMPLING = ("--solver", "euler", "--steps", "12", "--guidance", "2", "-q")
MARKER = ".gmem-quickstart"
STEPS = {"default": 1200, "full": 2500}


class Stages:
    """Runs commands, prints them, and keeps the time of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []

    def run(self, stage: str, *command: str | Path | int) -> Any:
        """Run a gmem command with --json and return what it printed."""
        words = [str(word) for word in command]
        self.commands.append(shlex.join(words))
        print(f"$ {self.commands[-1]}", flush=True)
        started = time.perf_counter()
        program = Path(sys.executable).with_name(words[0])
        result = subprocess.run([program, *words[1:], "--json"], stdout=subprocess.PIPE, text=True, check=False)
        self.seconds[stage] = round(self.seconds.get(stage, 0.0) + time.perf_counter() - started, 2)
        if result.returncode:
            raise SystemExit(f"the command above failed with exit code {result.returncode}")
        return json.loads(result.stdout)


def clear(folder: Path) -> None:
    """Make the folder, or empty one that an earlier run of ours made; stop where it holds anything else."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise SystemExit(f"{folder} exists and was not made by the quick start: give another folder with --out")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def write_digits(folder: Path, held_out: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Write `digits/<class>/<index>.png` for nine classes and `new/<class>/<index>.png` for the tenth.

    Returns:
        (N, 8, 8) uint8 images and (N,) labels of all ten.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    for index, (image, label) in enumerate(zip(images, data.target, strict=True)):
        target = folder / ("new" if label == held_out else "digits") / str(label)
        target.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target / f"{index:04d}.png")
    return images, data.target


class Game:
    """One held-out digit: its folder, its bank, its generator.

    Args:
        held_out: the digit that is not trained on.
        folder: emptied, and filled with everything.
        seed: of training and sampling.
    """

    def __init__(self, held_out: int, folder: Path, seed: int) -> None:
        clear(folder)
        self.stages, self.folder, self.seed = Stages(), folder, seed
        self.held_out, self.digit = held_out, str(held_out)
        self.bank, self.run, self.new = folder / "bank.safetensors", folder / "run", folder / "new" / self.digit
        self.images, self.labels = write_digits(folder, held_out)
        self.judge = Judge(self.images, self.labels)

    def build(self, encoder: tuple[str, ...]) -> dict[str, Any]:
        """Build the bank of nine digits."""
        return self.stages.run("build", "gmem-bank", "build", self.folder / "digits", *encoder, "-o", self.bank, "-q")

    def train(self, steps: int) -> dict[str, Any]:
        """Train on it."""
        settings = (*TRAINING, f"train.max_steps={steps}", f"train.seed={self.seed}")
        words = [word for setting in settings for word in ("--set", setting)]
        return self.stages.run("train", "gmem-gen", "train", "--bank", self.bank, "--out", self.run, *words)

    def sample(self, name: str, *what: str | Path, stage: str = "sample") -> NDArray[np.uint8]:
        """Draw samples and return them as (N, 8, 8)."""
        grid, single = self.folder / "samples" / f"{name}.png", self.folder / "samples" / name
        self.stages.run(stage, "gmem-gen", "sample", "--bank", self.bank, "--checkpoint", self.run, *what, "--seed", self.seed,
                        "--output", grid, "--save-images", single, *SAMPLING)  # fmt: skip
        return load_images(single)

    def sample_keys(self, name: str, keys: list[str], *options: str, stage: str = "sample") -> NDArray[np.uint8]:
        """Draw samples for rows, in order."""
        path = self.folder / f"{name}.txt"
        path.write_text("".join(key + "\n" for key in keys), encoding="utf-8")
        return self.sample(name, "--keys-from", path, *options, stage=stage)

    def sample_before(self) -> NDArray[np.uint8]:
        """Ask for the digit while it is not in the bank: the nearest rows to its images stand in for it."""
        nearest = self.stages.run("before", "gmem-bank", "search", self.bank, self.new, "-k", "1", "-q")
        return self.sample_keys("before", [result["hits"][0]["key"] for result in nearest], stage="before")

    def insert(self) -> int:
        """Insert the digit; return the number of its rows."""
        return self.stages.run("insert", "gmem-bank", "insert-concept", self.new, "--bank", self.bank, "-q")[
            "num_added"
        ]

    def keys(self) -> list[str]:
        """All keys of the bank."""
        return [row["key"] for row in self.stages.run("sample", "gmem-bank", "list", self.bank)["rows"]]

    def spread(self, name: str, keys: list[str]) -> float:
        """Draw several samples of each of some snippets and return how much they differ."""
        chosen = keys[:: max(1, len(keys) // SPREAD_SNIPPETS)][:SPREAD_SNIPPETS]
        drawn = self.sample_keys(f"spread-{name}", chosen, "--per-snippet", str(SPREAD_SAMPLES))
        return pixel_spread(drawn, SPREAD_SAMPLES)

    def way(self, first: int, second: int, keys: list[str]) -> NDArray[np.uint8]:
        """Draw the way from a row of one digit to a row of another."""
        ends = [next(key for key in keys if key.startswith(f"{digit}/")) for digit in (first, second)]
        name = f"{first}-to-{second}"
        made = self.stages.run(
            "interpolate", "gmem-bank", "interpolate", *ends, "-b", self.bank, "--steps", "7", "-n", name
        )
        return self.sample_keys(name, made["keys"], stage="interpolate")


def play(held_out: int, folder: Path, steps: int, seed: int, encoder: tuple[str, ...]) -> dict[str, Any]:
    """Do the whole job for one held-out digit and return figures, pictures and commands."""
    started = time.perf_counter()
    game = Game(held_out, folder, seed)
    built, trained = game.build(encoder), game.train(steps)
    before = game.sample_before()
    count = game.insert()
    inserted = game.sample("inserted", "--concept", game.digit, "--num", str(count))
    inserted_keys = json.loads((folder / "samples" / "inserted.json").read_text(encoding="utf-8"))["keys"]
    keys = game.keys()
    old_keys = [key for key in keys if not key.startswith(f"{game.digit}/")]
    chosen = np.random.default_rng(seed).choice(len(old_keys), SEEN_SAMPLES, replace=False)
    seen_keys = [old_keys[place] for place in np.sort(chosen)]
    seen = game.sample_keys("seen", seen_keys)
    spreads = {name: game.spread(name, some) for name, some in (("inserted", inserted_keys), ("seen", seen_keys))}
    others = [digit for digit in (3, 0, 7, 2) if digit != held_out][:2]
    ways = {f"{a}-to-{b}": game.way(a, b, keys) for a, b in ((others[0], others[1]), (others[0], held_out))}
    judge = game.judge
    figures = {
        "held_out": held_out,
        "seen_accuracy": judge.share(seen, np.array([int(key.split("/")[0]) for key in seen_keys])),
        "inserted_accuracy": judge.share(inserted, held_out),
        "before_accuracy": judge.share(before, held_out),
        "linear_accuracy": linear_accuracy(game.bank, judge, game.digit),
        "classifier_accuracy": judge.accuracy,
        "snippet_cosine": snippet_cosine(game.bank, inserted, inserted_keys),
        "spread_inserted": spreads["inserted"],
        "spread_seen": spreads["seen"],
        "inserted_taken_for": judge.counts(inserted),
        "before_taken_for": judge.counts(before),
        "num_inserted_samples": count,
        "num_seen_samples": SEEN_SAMPLES,
        **{name: trained[name] for name in ("step", "loss", "steps_per_second", "num_parameters")},
        "snippet_dim": built["dim"],
        "seed": seed,
        "seconds": game.stages.seconds,
        "seconds_total": round(time.perf_counter() - started, 1),
    }
    # every row of pictures in the same order, so that what stands below one another belongs together
    real = game.images[[int(Path(key).stem) for key in inserted_keys]]
    before = before[np.argsort(np.argsort(inserted_keys))]
    real_seen = game.images[[int(Path(key).stem) for key in seen_keys]]
    pictures = {"real": real, "real seen": real_seen, "seen": seen, "inserted": inserted,
                "before": before, **ways}  # fmt: skip
    return {"figures": figures, "pictures": pictures, "commands": game.stages.commands}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--held-out", type=int, default=9, choices=range(10), help="the digit the generator never sees (9)"
    )
    parser.add_argument("--full", action="store_true", help="digits 9, 4 and 1, trained longer: up to 15 minutes")
    parser.add_argument("--digits", help="digits to hold out in turn, such as 0,1,2")
    parser.add_argument("--out", type=Path, default=Path("quickstart"), help="folder for everything (quickstart)")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--encoder", help="options of gmem-bank build in place of ours, such as '--encoder hog --set cell=4'"
    )
    return parser.parse_args()


def main() -> int:
    """Run, print the figures, write the report."""
    options = parse()
    digits = (
        [int(d) for d in options.digits.split(",")]
        if options.digits
        else FULL_DIGITS
        if options.full
        else [options.held_out]
    )
    steps = options.steps or STEPS["full" if options.full else "default"]
    encoder = tuple(shlex.split(options.encoder)) if options.encoder else ENCODER
    results = []
    for digit in digits:
        folder = options.out if len(digits) == 1 else options.out / f"held-out-{digit}"
        results.append(play(digit, folder, steps, options.seed, encoder))
    write_report(options.out, results)
    for result in results:
        f = result["figures"]
        print(
            f"held-out {f['held_out']}: seen {f['seen_accuracy']:.3f}, inserted {f['inserted_accuracy']:.3f} "
            f"(before insertion {f['before_accuracy']:.3f}, linear map {f['linear_accuracy']:.3f}), {f['seconds_total']:.0f} s"
        )
    bank, run = options.out / "bank.safetensors", options.out / "run"
    if len(digits) > 1:
        print(f"mean inserted: {np.mean([r['figures']['inserted_accuracy'] for r in results]):.3f}")
        bank, run = (
            options.out / f"held-out-{digits[0]}" / "bank.safetensors",
            options.out / f"held-out-{digits[0]}" / "run",
        )
    print(f"\nreport: {options.out / 'report.html'}   figures: {options.out / 'report.json'}\n\nTry next:")
    print(f"  .venv/bin/gmem-bank info {bank}")
    print(f"  .venv/bin/gmem-bank interpolate 0 8 --bank {bank} --steps 9 --name way")
    print(f"  .venv/bin/gmem-gen sample --bank {bank} --checkpoint {run} --concept way")
    return 0


if __name__ == "__main__":
    sys.exit(main())
