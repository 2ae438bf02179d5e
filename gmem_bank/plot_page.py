"""A plot as one HTML page that needs nothing else: a map to hover over, and charts as inline SVG.

What comes from a bank (keys, concepts, its name) is only ever escaped text or JSON; no script sees it as markup.

Shapes: m rows on the map.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from gmem_bank.plotting import Neighbours, Projection, Spectrum

COLOURS = (
    "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#1b4f72",
    "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#dbdb8d", "#9edae5", "#5d8a66",
)  # fmt: skip
"""Of concepts, in file order; past the twentieth they begin again."""
GREY = "#9a9a9a"
"""Of rows without a concept."""
BINS = 40
MOST_POINTS = 400
"""Of a curve: more cannot be told apart at its width."""
WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 480, 280, 48, 10, 14, 38


@dataclass(kw_only=True)
class Map:
    """The rows of a projection with all that is shown of them."""

    projection: Projection
    keys: list[str]
    concepts: list[str]
    """Those that a row on the map has, in file order."""
    members: list[list[int]]
    """Of each row, the positions in `concepts`; its colour is that of the first."""
    thumbnails: dict[int, bytes] = field(default_factory=dict)
    """Place on the map → JPEG."""
    note: str = ""
    """What is to be said of the thumbnails."""

    def colours(self) -> list[str]:
        """Return the colour of each row."""
        return [colour_of(members) for members in self.members]


@dataclass(kw_only=True)
class Drawing:
    """What a plot shows: panels in order, those asked for."""

    title: str
    facts: str
    panels: Sequence[str]
    spectrum: Spectrum | None
    map: Map | None
    neighbours: Neighbours | None


def colour_of(members: Sequence[int]) -> str:
    """Return the colour of a row of these concepts."""
    return COLOURS[members[0] % len(COLOURS)] if members else GREY


def curve_places(count: int) -> NDArray[np.int64]:
    """Return the positions of a curve's points that are drawn: all, or 400 at equal distances."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(np.int64))


def histogram(distances: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the counts and edges of the bins between no distance and the largest."""
    counts, edges = np.histogram(distances.astype(np.float64), BINS, (0, max(float(distances.max()), 1e-6)))
    return counts.astype(np.int64), edges


def draw_page(drawing: Drawing) -> bytes:
    """Return the page in UTF-8."""
    title = html.escape(drawing.title)
    sections = {"spectrum": _spectrum_figure, "map": _map_section, "neighbours": _neighbours_figure}
    body = "".join(sections[panel](drawing) for panel in drawing.panels)
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{title}</title><style>{STYLE}</style>'
        f"<body><h1>{title}</h1><p>{html.escape(drawing.facts)}</p><main>{body}</main>"
    )
    if drawing.map is not None:
        page += f"<script type=application/json id=data>{_json(_map_data(drawing.map))}</script><script>{SCRIPT}</script>"
    return page.encode()


def _json(value: object) -> str:
    """Return JSON that cannot end the element it stands in: ASCII, and no "<"."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _map_data(shown: Map) -> dict[str, object]:
    """Return what the script draws: x, y and keys of the rows, their concepts, colours, and thumbnails by place."""
    x, y = (np.round(column.astype(np.float64), 6).tolist() for column in shown.projection.coordinates.T)
    images = {place: base64.b64encode(data).decode() for place, data in shown.thumbnails.items()}
    return {
        "x": x, "y": y, "keys": shown.keys, "members": shown.members, "concepts": shown.concepts, "thumbnails": images,
        "colours": COLOURS, "grey": GREY,
    }  # fmt: skip


def _map_section(drawing: Drawing) -> str:
    assert drawing.map is not None
    caption = html.escape(f"{drawing.map.projection.describe()} {drawing.map.note}")
    return (
        f"<figure class=wide><figcaption><b>Map</b> {caption} Hover for the key; scroll to zoom, drag to move, "
        "double-click to start over. A row has the colour of its first concept.</figcaption><div id=map><canvas></canvas>"
        "<div id=legend></div></div><div id=tip hidden></div><noscript>The map needs JavaScript.</noscript></figure>"
    )


def _spectrum_figure(drawing: Drawing) -> str:
    assert drawing.spectrum is not None
    found = drawing.spectrum
    count, largest = len(found.values), float(found.values[0]) or 1.0
    places = curve_places(count)
    across = places / max(count - 1, 1)
    lines = [
        f"<polyline class={name} points='{' '.join(map(_at, across, curve[places]))}'/>"
        + "".join(f"<circle class={name} r=2.5 {_centre(x, y)}/>" for x, y in zip(across, curve[places], strict=True))
        * (count <= BINS)
        for name, curve in (("energy", found.energy), ("sigma", found.values / largest))
    ]
    ticks = {place / max(count - 1, 1): f"{place + 1:,}" for place in np.linspace(0, count - 1, min(count, 5), dtype=int)}
    keys = "<span class=energy>━ cumulative energy</span> <span class=sigma>━ singular value ÷ the largest</span>"
    body = _axes(ticks, {share: f"{share:.0%}" for share in (0, 0.25, 0.5, 0.75, 1)}, "component") + "".join(lines)
    return _figure("Spectrum", found.describe(), body, keys)


def _neighbours_figure(drawing: Drawing) -> str:
    assert drawing.neighbours is not None
    found = drawing.neighbours
    if not len(found.distances):
        return _figure("Neighbours", found.describe(), "")
    counts, edges = histogram(found.distances)
    bars = [
        f"<path class=bar d='M{_at(edges[i] / edges[-1], 0)}V{_at(0, count / counts.max()).split(',')[1]}"
        f"H{_at(edges[i + 1] / edges[-1], 0).split(',')[0]}V{_at(0, 0).split(',')[1]}Z'/>"
        for i, count in enumerate(counts.tolist())
    ]
    middle = float(np.median(found.distances)) / edges[-1]
    median = f"<polyline class=median points='{_at(middle, 0)} {_at(middle, 1)}'/>"
    ticks = {share: f"{share * edges[-1]:.3g}" for share in (0, 0.25, 0.5, 0.75, 1)}
    body = _axes(ticks, {0: "0", 1: f"{counts.max():,}"}, "cosine distance to the nearest other row")
    return _figure("Neighbours", found.describe(), body + "".join(bars) + median, "<span class=median>┅ median</span>")
