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
)
SAMPLING = ("--solver", "euler", "--steps", "12", "--guidance", "2", "-q")
STEPS = {"default": 1200, "full": 2500}


class Stages:
    """Runs commands, prints them, and keeps the time of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.commands: list[str] = []

    def run(self, stage: str, *command: str | Path) -> Any:
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


def play(held_out: int, folder: Path, steps: int, seed: int, encoder: tuple[str, ...]) -> dict[str, Any]:
    """Do the whole job for one held-out digit and return figures and pictures."""
    started = time.perf_counter()
    shutil.rmtree(folder, ignore_errors=True)
    stages, digit = Stages(), str(held_out)
    images, labels = write_digits(folder, held_out)
    judge = Judge(images, labels)
    bank, run, new = folder / "bank.safetensors", folder / "run", folder / "new" / digit

    def sample(stage: str, name: str, *what: str | Path) -> NDArray[np.uint8]:
        grid, single = folder / "samples" / f"{name}.png", folder / "samples" / name
        stages.run(stage, "gmem-gen", "sample", "--bank", bank, "--checkpoint", run, *what, "--seed", str(seed),
                   "--output", grid, "--save-images", single, *SAMPLING)  # fmt: skip
        return load_images(single)

    built = stages.run("build", "gmem-bank", "build", folder / "digits", *encoder, "--output", bank, "-q")
    settings = [
        word for setting in (*TRAINING, f"train.max_steps={steps}", f"train.seed={seed}") for word in ("--set", setting)
    ]
    trained = stages.run("train", "gmem-gen", "train", "--bank", bank, "--out", run, *settings)

    # before: the concept is not in the bank, so the nearest rows to the new images stand in for it
    nearest = stages.run("before", "gmem-bank", "search", bank, new, "-k", "1", "-q")
    keys_file = folder / "nearest.txt"
    keys_file.write_text("".join(result["hits"][0]["key"] + "\n" for result in nearest), encoding="utf-8")
    before = sample("before", "before", "--keys-from", keys_file)

    inserted_report = stages.run("insert", "gmem-bank", "insert-concept", new, "--bank", bank, "-q")
    count = inserted_report["num_added"]
    inserted = sample("sample", "inserted", "--concept", digit, "--num", str(count))
    inserted_keys = json.loads((folder / "samples" / "inserted.json").read_text(encoding="utf-8"))["keys"]

    listed = stages.run("sample", "gmem-bank", "list", bank)["rows"]
    rng = np.random.default_rng(seed)
    seen_rows = [row["key"] for row in listed if not row["key"].startswith(f"{digit}/")]
    seen_keys = [seen_rows[i] for i in np.sort(rng.choice(len(seen_rows), SEEN_SAMPLES, replace=False))]
    keys_file = folder / "seen.txt"
    keys_file.write_text("".join(key + "\n" for key in seen_keys), encoding="utf-8")
    seen = sample("sample", "seen", "--keys-from", keys_file)
    seen_labels = np.array([int(key.split("/")[0]) for key in seen_keys])

    spreads = {}
    for name, keys in (("inserted", inserted_keys), ("seen", seen_keys)):
        chosen = keys[:: max(1, len(keys) // SPREAD_SNIPPETS)][:SPREAD_SNIPPETS]
        picked = [word for key in chosen for word in ("--key", key)]
        drawn = sample("sample", f"spread-{name}", *picked, "--per-snippet", str(SPREAD_SAMPLES))
        spreads[name] = pixel_spread(drawn, SPREAD_SAMPLES)

    others = [d for d in (3, 0, 7, 2) if d != held_out][:2]
    ways = {}
    for first, second in ((others[0], others[1]), (others[0], held_out)):
        ends = [next(row["key"] for row in listed if row["key"].startswith(f"{d}/")) for d in (first, second)]
        name = f"{first}-to-{second}"
        stages.run("interpolate", "gmem-bank", "interpolate", *ends, "--bank", bank, "--steps", "7", "--name", name)
        keys = [word for step in range(7) for word in ("--key", f"{name}/{step}")]
        ways[name] = sample("interpolate", name, *keys)

    figures = {
        "held_out": held_out,
        "seen_accuracy": judge.share(seen, seen_labels),
        "inserted_accuracy": judge.share(inserted, held_out),
        "before_accuracy": judge.share(before, held_out),
        "linear_accuracy": linear_accuracy(bank, judge, digit),
        "classifier_accuracy": judge.accuracy,
        "snippet_cosine": snippet_cosine(bank, inserted, inserted_keys),
        "spread_inserted": spreads["inserted"],
        "spread_seen": spreads["seen"],
        "inserted_taken_for": judge.counts(inserted),
        "before_taken_for": judge.counts(before),
        "num_inserted_samples": count,
        "num_seen_samples": SEEN_SAMPLES,
        "steps": trained["step"],
        "loss": trained["loss"],
        "steps_per_second": trained["steps_per_second"],
        "num_parameters": trained["num_parameters"],
        "snippet_dim": built["dim"],
        "seed": seed,
        "seconds": stages.seconds,
        "seconds_total": round(time.perf_counter() - started, 1),
    }
    pictures = {"real": images[labels == held_out], "real seen": np.stack([images[int(Path(k).stem)] for k in seen_keys]),
                "seen": seen, "inserted": inserted, "before": before, **ways}  # fmt: skip
    return {"figures": figures, "pictures": pictures, "commands": stages.commands}


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
