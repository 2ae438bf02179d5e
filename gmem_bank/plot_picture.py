"""The picture of a bank: the panels of `plotting` side by side in a PNG, drawn by matplotlib.

Shapes: m rows shown.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gmem_bank.errors import MissingDependencyError
from gmem_bank.plot_page import BINS, COLOURS, GREY, LEGEND_ENTRIES, Drawing, RowMap, charts

if TYPE_CHECKING:
    pass


def require_matplotlib() -> None:
    """Raise MissingDependencyError, which names the extra, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "drawing a .png needs matplotlib: pip install matplotlib (the extra gmem[plot]); a page, .html, does not",
            extra="plot",
        ) from error


def draw_picture(drawing: Drawing) -> bytes:
    """Return the panels side by side as a PNG, the same bytes for the same drawing; raises MissingDependencyError."""
    require_matplotlib()
    import warnings

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    described = drawing.described()
    widths = [7 if panel == "map" else 5 for panel, _ in described]
    figure = Figure(figsize=(sum(widths), 5.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    heading = [line for text in (drawing.title, drawing.facts) for line in textwrap.wrap(text, sum(widths) * 12)]
    figure.suptitle("\n".join(heading), fontsize=10, parse_math=False)
    drawn = charts(drawing)
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for ax, width, (panel, words) in zip(axes, widths, described, strict=True):
        if panel == "map":
            _paint_map(ax, drawing.map)
        elif panel in drawn:
            _paint_chart(ax, drawn[panel])
        else:
            ax.set_axis_off()
        ax.set_title("\n".join(textwrap.wrap(words, width * 14)), fontsize=8, loc="left", color="#444")
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # an emoji in a name is drawn as a box
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _paint_chart(ax: Any, chart: dict[str, Any]) -> None:
    bars = np.arange(len(chart["bars"])) / max(len(chart["bars"]), 1)
    ax.bar(bars, chart["bars"], 0.95 / max(len(bars), 1), align="edge", color=COLOURS[0])
    for name, colour, points in chart["curves"]:
        marker = "o" if len(points) <= BINS else None
        ax.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=4, label=name, clip_on=False)
    for axis in "xy":
        ticks, labels = zip(*chart[axis], strict=True)
        ax.set(**{f"{axis}ticks": ticks, f"{axis}ticklabels": labels, f"{axis}lim": (0, 1)})
    ax.set_xlabel(chart["label"])
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#ddd")
    ax.set_axisbelow(True)
    ax.legend(fontsize=8, loc="best" if chart["bars"] else "center right")


def _paint_map(ax: Any, shown: RowMap | None) -> None:
    from matplotlib.lines import Line2D

    assert shown is not None
    coordinates = shown.projection.coordinates
    colours = [COLOURS[members[0] % len(COLOURS)] if members else GREY for members in shown.members]
    size = 6 if len(colours) > 2000 else 14 if len(colours) > 300 else 30
    ax.scatter(*coordinates.T, s=size, c=colours, alpha=0.8, linewidths=0)
    ax.set(aspect="equal", adjustable="datalim", xticks=[], yticks=[])
    ax.margins(0.08)  # a thumbnail reaches beyond its point
    ax.spines[:].set_color("#ccc")
    _paint_thumbnails(ax, shown, colours)
    first = sorted({members[0] for members in shown.members if members})
    names = [_short(shown.concepts[index]) for index in first[:LEGEND_ENTRIES]]
    dots = [Line2D([], [], ls="", marker="o", color=COLOURS[i % len(COLOURS)]) for i in first[:LEGEND_ENTRIES]]
    if len(first) > LEGEND_ENTRIES:
        dots.append(Line2D([], [], ls=""))
        names.append(f"… {len(first) - LEGEND_ENTRIES} more")
    if names:
        legend = ax.legend(dots, [" "] * len(dots), fontsize=7, ncols=1, loc="upper left", bbox_to_anchor=(1, 1))
        for text, name in zip(legend.get_texts(), names, strict=True):
            text.set_parse_math(False)  # a concept may be called "$x" or "_x", which mean something to matplotlib
            text.set_text(name)


def _paint_thumbnails(ax: Any, shown: RowMap, colours: Sequence[str]) -> None:
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    from PIL import Image

    for place, data in shown.thumbnails.items():
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        frame = {"edgecolor": colours[place], "linewidth": 1.5}
        image = OffsetImage(pixels, zoom=0.5)
        at = shown.projection.coordinates[place]
        ax.add_artist(AnnotationBbox(image, at, pad=0, bboxprops=frame))


def _short(name: str) -> str:
    """Return a name in one line of 24 characters at most."""
    plain = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in name)
    return plain if len(plain) <= 24 else plain[:23] + "…"
