"""The quick start's report: pictures and figures in one self-contained HTML page, figures in JSON."""

from __future__ import annotations

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

import gmem_gen

SHOWN = 30
CAPTIONS = {
    "real seen": "Real images of the nine digits",
    "seen": "Drawn from the snippets of those images",
    "real": "Real images of the held-out digit: never trained on",
    "inserted": "Drawn after the digit was inserted into the bank, without training",
    "before": "The same request before: the nearest rows of the bank stand in",
}
ROWS = {
    "seen_accuracy": "samples of trained digits that are recognised",
    "inserted_accuracy": "samples of the inserted digit that are recognised",
    "before_accuracy": "the same before insertion",
    "linear_accuracy": "the same, drawn by a ridge regression from the snippet",
    "classifier_accuracy": "real held-out images that the judge recognises",
    "snippet_cosine": "cosine between the snippet asked for and that of the sample",
    "spread_inserted": "spread of samples of one inserted snippet (standard deviation of a pixel, 0 to 1)",
    "spread_seen": "spread of samples of one trained snippet",
    "steps_per_second": "training steps a second",
    "seconds_total": "seconds in all",
}
MEANS = [name for name in ROWS if name.endswith(("_accuracy", "_cosine")) or name.startswith("spread_")]
"""What a report over several digits gives the mean of."""
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "img{image-rendering:pixelated;max-width:100%}td{padding:.1rem 1rem .1rem 0}td:first-child{font-variant-numeric:tabular-nums}"
    "pre{background:#f4f4f4;padding:1rem;overflow:auto;font-size:13px}figure{margin:1rem 0}figcaption{font-weight:600}"
)


def write_report(folder: Path, results: list[dict[str, Any]]) -> None:
    """Write report.html and report.json.

    Args:
        folder: where to.
        results: one for each held-out digit: figures, pictures, commands. Of several, report.json has the means, and each
            digit's own figures in "runs".
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = dict(results[0]["figures"])
    if len(results) > 1:
        runs = [result["figures"] for result in results]
        figures = {name: float(np.mean([run[name] for run in runs])) for name in MEANS}
        figures |= {"seconds_total": sum(run["seconds_total"] for run in runs), "runs": runs}
    (folder / "report.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    body = "".join(_section(result) for result in results)
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>gmem quick start</title><style>{STYLE}</style><body>{body}"
    (folder / "report.html").write_text(page, encoding="utf-8")


def _section(result: dict[str, Any]) -> str:
    figures, pictures = result["figures"], result["pictures"]
    digit = figures["held_out"]
    intro = (
        f"<h1>A generator that never saw a {digit} draws one</h1><p>It was trained on nine digits through a memory bank. "
        f"Then images of the {digit} were inserted into the bank; the weights were not touched.</p>"
    )
    table = "".join(f"<tr><td>{_number(figures[name])}<td>{html.escape(text)}" for name, text in ROWS.items())
    shown = "".join(_figure(CAPTIONS[name], spread_out(pictures[name], SHOWN), 15) for name in CAPTIONS)
    ways = "".join(
        _figure(f"From a {name.replace('-to-', ' to a ')} in seven steps", images, 7)
        for name, images in pictures.items()
        if name not in CAPTIONS
    )
    note = (
        "<p>The linear figure is there to be compared with: where it is high, much of the picture can be read off the snippet "
        "by a linear map, and the generator shows that it follows a snippet it has never seen, not that it invents one.</p>"
    )
    commands = html.escape("\n".join(result["commands"]))
    return f"{intro}<table>{table}</table>{note}{shown}{ways}<h2>Commands</h2><pre>{commands}</pre>"


def spread_out(images: Any, count: int) -> Any:
    """Return `count` images at equal distances: of sorted classes, some of each."""
    return images[np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)]


def _number(value: float) -> str:
    return f"{value:.3f}" if isinstance(value, float) and value < 10 else f"{value:.0f}"


def _figure(caption: str, images: Any, columns: int) -> str:
    stream = io.BytesIO()
    gmem_gen.make_grid(images[..., None], columns, min_cell=48).save(stream, format="PNG")
    data = base64.b64encode(stream.getvalue()).decode()
    return f"<figure><figcaption>{html.escape(caption)}</figcaption><img src='data:image/png;base64,{data}'></figure>"
