"""An evaluation as an HTML page that needs nothing else, and as JSON beside it.

Keys and concepts enter the page as escaped text. There is no script: what is drawn is SVG.

Shapes: n samples.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gmem_bank.errors import SourceError
from gmem_gen.estimates import Estimate
from gmem_gen.evaluation_report import EvaluationReport
from gmem_gen.evaluation_samples import require_own_folder
from gmem_gen.image_sets import ImageSet
from gmem_gen.images import replace_file
from gmem_gen.memorisation import ConceptFidelity, Memorisation
from gmem_gen.outputs import writing

REPORT, PAGE = "report.json", "report.html"
MOST_SAMPLES, MOST_PAIRS, SIDE = 60, 10, 112
BINS, WIDTH, HEIGHT = 48, 720, 180
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:76rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.25rem .7rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}.wide{overflow-x:auto}
.remarks{background:#fff6dd;padding:.6rem 1.8rem;border-left:4px solid #d99a00}
.pictures{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;font-size:12px;max-width:17rem;overflow-wrap:anywhere}
.one{max-width:7rem}img{image-rendering:pixelated;background:#f3f3f3}svg{max-width:100%;height:auto}small,i{color:#666}
"""


def write_report(report: EvaluationReport, out: str | os.PathLike[str]) -> list[Path]:
    """Write `report.json` and `report.html` into a folder of ours or a new one; raises OutputExistsError or WriteError."""
    folder = require_own_folder(out)
    text = json.dumps(report.to_json(), indent=1, ensure_ascii=False) + "\n"
    written = {folder / REPORT: text, folder / PAGE: draw_page(report)}
    for path, content in written.items():
        with writing(path, str(path), "Free some space, or choose another --out"):
            replace_file(path, partial(Path.write_bytes, data=content.encode("utf-8", errors="replace")))
    return list(written)


def draw_page(report: EvaluationReport) -> str:
    """Return the page."""
    title = f"{report.samples['count']} samples judged by {report.judge['encoder']}"
    parts = [_remarks(report.remarks), _figures(report), _samples(report)]
    if report.memorisation is not None and report.training is not None:
        beside = "reference images" if report.held_out is None else "held-out images"
        parts.append(_memorisation(report.memorisation, report.drawn.images, report.training.images, beside))
    if report.concepts is not None:
        parts.append(_concepts(report.concepts))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{html.escape(title)}</title><style>{STYLE}</style>'
        f"<body><h1>{html.escape(title)}</h1><p>{html.escape(_facts(report))}</p>{''.join(parts)}</body></html>"
    )


def _facts(report: EvaluationReport) -> str:
    """Return what was compared, in words."""
    samples, judge, reference = report.samples, report.judge, report.reference
    drawn = samples["sampling"]
    how = "" if not drawn else (
        f" Drawn at step {drawn['step']} ({drawn['kind_of_weights']} weights) by {drawn['sample.method']} in "
        f"{drawn['sample.num_steps']} steps, guidance {drawn['sample.guidance']:g}, seed {drawn['sample.seed']}."
    )  # fmt: skip
    return (
        f"{samples['count']} samples of {samples['width']}×{samples['height']} against {reference['count']}: "
        f"{reference['what']}. {judge['dim']} {judge['space']} features of {judge['encoder']} ({judge['fingerprint'][:8]}).{how} "
        "Intervals, 95 %: how far a figure would move with other samples of the same model; the reference is held fixed."
    )


def _remarks(remarks: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>" for text in remarks)
    return f"<ul class=remarks>{items}</ul>" if items else ""


def _figures(report: EvaluationReport) -> str:
    found = report.distribution
    rows = [
        (
            "Fréchet distance" + (" (rank-deficient)" if found.rank_deficient else ""),
            found.frechet,
            "lower is better; the bias of finite sets, upwards, is not in the interval",
        ),
        (f"KID × 1000 (subsets of {found.kid.subset_size})", _scaled(found.kid.estimate, 1000), "lower is better"),
    ]
    rows += [(f"{name} ({found.neighbours_of(name)} neighbours)", estimate, "higher is better")
             for name, estimate in found.measures.items()]  # fmt: skip
    if (copies := report.memorisation) is not None:
        rows.append(("near-copies of training images", copies.near_copies, f"cosine distance ≤ {copies.threshold:.3g}"))
    if (concepts := report.concepts) is not None:
        real = concepts.of_real_as_asked
        rows.append(("concept fidelity", concepts.fidelity, f"of real images: {real:.3g}"))
    if (faithful := report.faithfulness) is not None:
        beside = {"to other snippets": faithful.shuffled, "of their own images": faithful.of_real}
        floor = ", ".join(f"{name} {value:.3g}" for name, value in beside.items() if value is not None)
        rows.append(("cosine to the snippet drawn from", faithful.cosine, floor))
    lines = "".join(
        f"<tr><td>{html.escape(name)}<td><b>{estimate.value:.4g}</b><td>{_interval(estimate)}<td>{html.escape(note)}</tr>"
        for name, estimate, note in rows
    )
    return f"<h2>Figures</h2><div class=wide><table><tr><th>figure<th>value<th>interval<th></tr>{lines}</table></div>"


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    def times(value: float | None) -> float | None:
        return None if value is None else value * factor

    return Estimate(value=estimate.value * factor, low=times(estimate.low), high=times(estimate.high))


def _interval(estimate: Estimate) -> str:
    return "" if estimate.low is None or estimate.high is None else f"{estimate.low:.4g} to {estimate.high:.4g}"


def _samples(report: EvaluationReport) -> str:
    images = report.drawn.images
    chosen = np.unique(np.linspace(0, len(images) - 1, min(MOST_SAMPLES, len(images))).astype(np.int64))
    asked = {int(place): name for name, places in images.concepts.items() for place in places}
    figures = "".join(
        f"<figure class=one>{_picture(images.read, place)}<br>{html.escape(asked.get(place, ''))}</figure>"
        for place in chosen.tolist()
    )
    return f"<h2>Samples</h2><div class=pictures>{figures}</div>"


def _picture(read: Callable[[int], NDArray[np.uint8]], place: int) -> str:
    """Return an <img> of an image, small ones enlarged by whole pixels."""
    try:
        pixels = read(place)
    except SourceError:
        return "<small>cannot be read</small>"
    image, stream = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(stream, "PNG")
    factor = max(1, SIDE // max(image.size))
    size = f"width={image.width * factor} height={image.height * factor}"
    return f"<img alt='' {size} src='data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}'>"


def _memorisation(found: Memorisation, samples: ImageSet, training: ImageSet, beside: str) -> str:
    curves = {"samples": found.distances, "training images, to the nearest other": found.between_real}
    if found.held_out is not None:
        curves[beside] = found.held_out
    closest = np.argsort(found.distances, kind="stable")[:MOST_PAIRS].tolist()
    pairs = "".join(
        f"<figure>{_picture(samples.read, place)} {_picture(training.read, int(found.neighbours[place]))}<br>"
        f"{found.distances[place]:.4f} <i>{html.escape(training.keys[int(found.neighbours[place])])}</i></figure>"
        for place in closest
    )
    origin = "as given" if found.given else "below which 1 % of training images lie to their nearest other"
    near = f"{found.near_copies.value:.2%} of samples are at most {found.threshold:.4g} away ({origin})."
    return (
        f"<h2>Memorisation</h2><p>Cosine distance to the nearest training image. {near}</p>"
        f"{_histogram(curves, found.threshold)}"
        f"<h3>Closest pairs</h3><p>Sample, and the training image nearest to it.</p><div class=pictures>{pairs}</div>"
    )


def _histogram(curves: dict[str, NDArray[np.float64]], mark: float) -> str:
    """Return an SVG of shares of distances, one line a curve, and a dashed line at `mark`."""
    most = max(float(values.max()) for values in curves.values()) or 1e-6
    shares = {name: np.histogram(values, BINS, (0.0, most))[0] / len(values) for name, values in curves.items()}
    top = max(float(heights.max()) for heights in shares.values())
    lines, colours = [], ("#1f77b4", "#d62728", "#2ca02c")
    for index, ((name, heights), colour) in enumerate(zip(shares.items(), colours, strict=False)):
        points = " ".join(
            f"{(i + 0.5) / BINS * WIDTH:.1f},{HEIGHT - h / top * (HEIGHT - 20):.1f}" for i, h in enumerate(heights)
        )
        lines.append(f"<polyline fill=none stroke='{colour}' stroke-width=2 points='{points}'/>")
        lines.append(f"<text x={WIDTH - 300} y={20 + 18 * index} fill='{colour}'>— {html.escape(name)}</text>")
    at = min(mark / most, 1.0) * WIDTH
    lines.append(f"<line x1={at:.1f} x2={at:.1f} y1=0 y2={HEIGHT} stroke='#444' stroke-dasharray='4 3'/>")
    ticks = "".join(
        f"<text x={share * WIDTH:.0f} y={HEIGHT + 18} text-anchor='{'start' if not share else 'end'}'>{share * most:.3g}</text>"
        for share in (0, 0.25, 0.5, 0.75, 1)
    )
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT + 24}' width={WIDTH} role=img font-size=13>{''.join(lines)}{ticks}</svg>"


def _concepts(found: ConceptFidelity) -> str:
    shares, totals = found.shares(), found.table.sum(axis=1)
    head = "".join(f"<th>{html.escape(name)}" for name in found.concepts)
    lines = ""
    for row, name in enumerate(found.concepts):
        if not totals[row]:
            continue
        cells = "".join(
            f"<td style='background:rgba({'31,119,180' if row == column else '214,39,40'},{count / totals[row]:.2f})'>{count}"
            for column, count in enumerate(found.table[row].tolist())
        )
        lines += f"<tr><td>{html.escape(name)}<td>{shares[name]:.3g}<td>{found.of_real[name]:.3g}{cells}</tr>"
    return (
        f"<h2>Concepts</h2><p>What the {found.votes} nearest real images of each sample vote for. Rows: asked for.</p>"
        f"<div class=wide><table><tr><th>asked<th>right<th>real images{head}</tr>{lines}</table></div>"
    )
