"""How well banks of a real encoder classify held-out images, by both routes and both presets, as JSON.

python -m tools.bench_encoders --data DIR [--runs clothing cifar10]

DIR holds encoder_vit_tiny16/ and encoder_vit_tiny16_as_dinov2/ (one ViT-Ti/16 in two forms), clothing/{train,val}/ and
cifar10/{train,test}.tar. Banks are built by gmem_bank; a held-out image takes the class that most of its 10
nearest rows by cosine have (ties to the nearer).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

import gmem_bank
from gmem_bank.progress import ProgressBar

K = 10
FIRST_100, FIRST_50 = ("*/00[0-9][0-9].jpg",), ("*/00[0-4][0-9].jpg",)


def encoders(data: Path) -> dict[str, tuple[str, Path | None, dict[str, Any]]]:
    """Return route and preset → name, weights, parameters."""
    vit, dinov2 = data / "encoder_vit_tiny16", data / "encoder_vit_tiny16_as_dinov2"
    return {
        "hf: native": (f"hf:{vit}", None, {"preset": "native"}),
        "dinov2 --weights native": ("dinov2", dinov2, {"preset": "native"}),
        "hf: gmem": (f"hf:{vit}", None, {"preset": "gmem"}),
        "dinov2 --weights gmem": ("dinov2", dinov2, {"preset": "gmem"}),
    }


def rows_and_classes(bank: Path) -> tuple[np.ndarray, list[str]]:
    """Return the snippets of a bank and the class of each."""
    opened = gmem_bank.open(bank)
    return opened.snippets(opened.rows()), [key.split("/")[0] for key in opened.keys(opened.rows())]


def accuracy(known: Path, asked: Path) -> float:
    """Return the share of rows of `asked` that the K nearest rows of `known` classify rightly."""
    bank, classes = rows_and_classes(known)
    queries, truth = rows_and_classes(asked)
    right = 0
    for query, name in zip(queries, truth, strict=True):
        nearest = np.argsort(-(bank @ query), kind="stable")[:K]
        right += Counter(classes[row] for row in nearest).most_common(1)[0][0] == name
    return right / len(truth)


def main() -> int:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", nargs="*", default=["clothing", "cifar10"])
    given = parser.parse_args()
    sets = {
        "clothing": ((given.data / "clothing/train", ()), (given.data / "clothing/val", ())),
        "cifar10": ((given.data / "cifar10/train.tar", FIRST_100), (given.data / "cifar10/test.tar", FIRST_50)),
    }
    result: dict[str, dict[str, Any]] = {}
    for name in given.runs:
        result[name] = {}
        for route, (encoder, weights, parameters) in encoders(given.data).items():
            loaded = gmem_bank.load_encoder(encoder, weights=weights, parameters=parameters)
            with tempfile.TemporaryDirectory() as folder:
                banks = []
                for part, (source, include) in zip(("known", "asked"), sets[name], strict=True):
                    with ProgressBar(f"{name} {route} {part}", "image", quiet=False) as progress:
                        report = gmem_bank.build(
                            source, loaded, Path(folder) / f"{part}.safetensors", progress=progress,
                            narrowing=gmem_bank.Narrowing(include=include),
                        )  # fmt: skip
                    banks.append(Path(report.bank))
                result[name][route] = {"accuracy": round(accuracy(*banks), 4), "known": len(gmem_bank.open(banks[0]))}
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
