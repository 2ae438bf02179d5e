"""How a plot is shown: as an HTML page that needs nothing else and answers the pointer, or as a picture.

What comes from a bank (keys, concepts, its name) enters the page as escaped text or as JSON, never as markup.

Shapes: m rows on the map.
"""

from __future__ import annotations

import base64
import html
import io
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.errors import MissingDependencyError

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
HEADINGS = {"spectrum": "Spectrum", "map": "Map", "neighbours": "Nearest neighbours"}
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
HINT = "Hover for the key, scroll to zoom, drag to move, double-click to start over. The first concept gives the colour."
LEGEND_ENTRIES = 20
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{overflow-wrap:anywhere}main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem 2rem}
figure{margin:0;min-width:0}.map{grid-column:1/-1}figcaption{font-size:14px;margin-bottom:.4rem}canvas{width:100%;height:18rem;display:block}
#plane{display:flex;gap:1rem;flex-wrap:wrap}#plane canvas{flex:1 1 24rem;width:0;height:36rem;border:1px solid #ddd;cursor:crosshair}
#legend{flex:0 1 15rem;max-height:36rem;overflow:auto;font-size:14px}#legend label{display:block;overflow-wrap:anywhere}
#legend i{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin:0 .4em}#legend:empty{display:none}
#tip{position:fixed;pointer-events:none;background:#fff;border:1px solid #999;box-shadow:0 2px 8px #0003;padding:.4rem .6rem;
font-size:13px;max-width:20rem;max-height:16rem;overflow:hidden;overflow-wrap:anywhere;white-space:pre-wrap}
#tip img{display:block;min-width:64px;image-rendering:auto}#tip[hidden]{display:none}
"""
SCRIPT = r"""
const el=id=>document.getElementById(id),D=JSON.parse(el("data").textContent);
function fit(c){const r=devicePixelRatio||1,g=c.getContext("2d");c.width=c.clientWidth*r;c.height=c.clientHeight*r;
  g.setTransform(r,0,0,r,0,0);g.font="12px system-ui,sans-serif";return g}
function make(tag,parent,text){const e=document.createElement(tag);if(text!==undefined)e.textContent=text;parent.append(e);return e}
function chart(c,d){ // ticks, bars, curves and their names, all in fractions of the axes
  const g=fit(c),w=c.clientWidth,h=c.clientHeight,X=v=>50+v*(w-70),Y=v=>24+(1-v)*(h-68);
  g.strokeStyle="#ddd";g.fillStyle="#444";
  for(const [v,t] of d.y){g.beginPath();g.moveTo(X(0),Y(v));g.lineTo(X(1),Y(v));g.stroke();g.textAlign="right";g.fillText(t,X(0)-6,Y(v)+4)}
  g.textAlign="center";for(const [v,t] of d.x)g.fillText(t,X(v),Y(0)+16);g.fillText(d.label,X(.5),Y(0)+36);
  g.fillStyle=D.colours[0];d.bars.forEach((v,i)=>g.fillRect(X(i/d.bars.length),Y(v),(w-70)/d.bars.length-1,Y(0)-Y(v)));
  g.textAlign="left";let at=X(0);
  for(const [name,colour,points] of d.curves){g.strokeStyle=g.fillStyle=colour;g.lineWidth=2;g.beginPath();
    points.forEach(([x,y],i)=>i?g.lineTo(X(x),Y(y)):g.moveTo(X(x),Y(y)));g.stroke();g.lineWidth=1;
    if(points.length<41)for(const [x,y] of points){g.beginPath();g.arc(X(x),Y(y),3,0,7);g.fill()}
    g.fillText("\u2014 "+name,at,14);at+=g.measureText("\u2014 "+name).width+16}
}
function map(M){
  const box=el("plane"),C=box.querySelector("canvas"),tip=el("tip"),off=new Set(),n=M.x.length,view={k:1,x:0,y:0};
  const first=M.members.map(m=>m.length?m[0]:-1),colour=c=>c<0?D.grey:D.colours[c%D.colours.length];
  const least=a=>a.reduce((m,v)=>Math.min(m,v)),most=a=>a.reduce((m,v)=>Math.max(m,v));
  const x0=(least(M.x)+most(M.x))/2,y0=(least(M.y)+most(M.y))/2,reach=Math.max(most(M.x)-least(M.x),most(M.y)-least(M.y))||1;
  const spanX=Math.max(most(M.x)-least(M.x),reach/50),spanY=Math.max(most(M.y)-least(M.y),reach/50);
  const scale=()=>view.k*Math.min((C.clientWidth-40)/spanX,(C.clientHeight-40)/spanY); // one for both axes
  const place=(i,s)=>[C.clientWidth/2+view.x+(M.x[i]-x0)*s,C.clientHeight/2+view.y-(M.y[i]-y0)*s];
  const radius=n>2000?2.5:n>300?3.5:5;let hot=-1,drag=null,pending=false;
  function draw(){pending=false;const g=fit(C),s=scale();g.globalAlpha=.75;
    for(let i=0;i<n;i++){if(off.has(first[i]))continue;const [x,y]=place(i,s);g.fillStyle=colour(first[i]);
      g.beginPath();g.arc(x,y,radius,0,7);g.fill()}
    if(hot>=0){const [x,y]=place(hot,s);g.globalAlpha=1;g.strokeStyle="#000";g.lineWidth=2;g.beginPath();g.arc(x,y,radius+2,0,7);g.stroke()}}
  const redraw=()=>{if(!pending){pending=true;requestAnimationFrame(draw)}};
  function nearest(px,py){let best=-1,limit=144;const s=scale();for(let i=0;i<n;i++){if(off.has(first[i]))continue;
    const [x,y]=place(i,s),d=(x-px)**2+(y-py)**2;if(d<limit){limit=d;best=i}}return best}
  function show(i,e){if(i!==hot){hot=i;redraw();tip.replaceChildren();tip.hidden=i<0;if(i>=0){
      if(M.thumbnails[i]){make("img",tip).src="data:image/jpeg;base64,"+M.thumbnails[i]}
      make("b",tip,M.keys[i]);make("div",tip,M.members[i].map(c=>M.concepts[c]).join(", ")||"no concept")}}
    if(i>=0){tip.style.left=Math.max(0,Math.min(e.clientX+14,innerWidth-tip.offsetWidth-8))+"px";
      tip.style.top=Math.max(0,Math.min(e.clientY+14,innerHeight-tip.offsetHeight-8))+"px"}}
  C.onpointermove=e=>{if(drag){view.x+=e.clientX-drag[0];view.y+=e.clientY-drag[1];drag=[e.clientX,e.clientY];show(-1,e);redraw()}
    else show(nearest(e.offsetX,e.offsetY),e)};
  C.onpointerdown=e=>{drag=[e.clientX,e.clientY];C.setPointerCapture(e.pointerId)};
  C.onpointerup=C.onpointercancel=()=>{drag=null};C.onpointerleave=e=>show(-1,e);
  C.ondblclick=()=>{view.k=1;view.x=view.y=0;redraw()};
  C.addEventListener("wheel",e=>{e.preventDefault();const f=Math.exp(-e.deltaY/400),x=e.offsetX-C.clientWidth/2,y=e.offsetY-C.clientHeight/2;
    view.k*=f;view.x=x-(x-view.x)*f;view.y=y-(y-view.y)*f;redraw()},{passive:false});
  const counts=new Map();first.forEach(c=>counts.set(c,(counts.get(c)||0)+1));const boxes=[];
  const kinds=[...counts.keys()].sort((a,b)=>(a<0)-(b<0)||a-b);
  if(kinds.length>1){const all=make("button",el("legend"),"all / none");
    all.onclick=()=>{const on=off.size>0;off.clear();if(!on)kinds.forEach(c=>off.add(c));boxes.forEach(b=>b.checked=on);redraw()}}
  if(kinds.length>1||kinds[0]>=0)for(const c of kinds){const line=make("label",el("legend")),b=make("input",line);b.type="checkbox";b.checked=true;
    boxes.push(b);make("i",line).style.background=colour(c);line.append((c<0?"no concept":M.concepts[c])+" ("+counts.get(c)+")");
    b.onchange=()=>{b.checked?off.delete(c):off.add(c);redraw()}}
  return draw}
const painters=[...document.querySelectorAll("canvas[data-chart]")].map(c=>()=>chart(c,D[c.dataset.chart]));
if(D.map)painters.push(map(D.map));const paint=()=>painters.forEach(f=>f());paint();addEventListener("resize",paint);
"""


@dataclass(kw_only=True)
class RowMap:
    """The rows of a projection, with all that is shown of them."""

    projection: Projection
    keys: list[str]
    concepts: list[str]
    """Those of rows on the map, in file order."""
    members: list[list[int]]
    """Of each row, positions in `concepts`; the first gives its colour."""
    thumbnails: dict[int, bytes]
    """Place on the map → JPEG."""
    note: str
    """What is to be said of the thumbnails."""

    def describe(self) -> str:
        """Return in words what is shown."""
        return f"{self.projection.describe()} {self.note}".rstrip()


@dataclass(kw_only=True)
class Drawing:
    """What a plot shows: of the parts, those that are named in `panels`, in that order."""

    title: str
    facts: str
    panels: Sequence[str]
    spectrum: Spectrum | None = None
    map: RowMap | None = None
    neighbours: Neighbours | None = None

    def described(self) -> list[tuple[str, str]]:
        """Return (panel, its figures in words)."""
        parts = {"spectrum": self.spectrum, "map": self.map, "neighbours": self.neighbours}
        return [(panel, part.describe()) for panel in self.panels if (part := parts[panel]) is not None]


def draw_page(drawing: Drawing) -> bytes:
    """Return the page in UTF-8."""
    title, figures = html.escape(drawing.title), ""
    for panel, words in drawing.described():
        heading = f"<figure class={panel}><figcaption><b>{HEADINGS[panel]}.</b> {html.escape(words)}"
        canvas = f"<canvas data-chart={panel} role=img aria-label='{HEADINGS[panel]}'></canvas>"
        plane = f" {HINT}<div id=plane><canvas></canvas><div id=legend></div></div><div id=tip hidden></div>"
        figures += f"{heading}{plane if panel == 'map' else '</figcaption>' + canvas}</figure>"
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{title}</title><style>{STYLE}</style>'
        f"<body><h1>{title}</h1><p>{html.escape(drawing.facts)}</p><noscript>The drawings need JavaScript.</noscript>"
        f"<main>{figures}</main><script type=application/json id=data>{_json(_data(drawing))}</script>"
        f"<script>{SCRIPT}</script></body></html>"
    )
    return page.encode()


def _json(value: object) -> str:
    """Return JSON that cannot end the element it stands in: ASCII, and no "<"."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _data(drawing: Drawing) -> dict[str, object]:
    """Return what the script draws."""
    data: dict[str, object] = {"colours": COLOURS, "grey": GREY}
    if drawing.spectrum is not None:
        data["spectrum"] = _spectrum_chart(drawing.spectrum)
    if drawing.neighbours is not None:
        data["neighbours"] = _neighbours_chart(drawing.neighbours)
    if (shown := drawing.map) is not None:
        x, y = (np.round(column.astype(np.float64), 6).tolist() for column in shown.projection.coordinates.T)
        thumbnails = {place: base64.b64encode(data).decode() for place, data in shown.thumbnails.items()}
        words = {"keys": shown.keys, "concepts": shown.concepts, "members": shown.members}
        data["map"] = {"x": x, "y": y, **words, "thumbnails": thumbnails}
    return data


def _spectrum_chart(found: Spectrum) -> dict[str, object]:
    places, x = curve(found)
    count, relative = len(found.values), found.values / (found.values[0] or 1.0)
    marks = np.unique(np.linspace(0, count - 1, 5).astype(int)).tolist()
    curves = {"cumulative energy": (COLOURS[0], found.energy), "singular value ÷ the largest": (COLOURS[1], relative)}
    return {
        "x": [[place / max(count - 1, 1), f"{place + 1:,}"] for place in marks],
        "y": [[share, f"{share:.0%}"] for share in (0, 0.25, 0.5, 0.75, 1)],
        "label": "component", "bars": [],
        "curves": [
            [name, colour, np.round(np.column_stack([x, y[places]]), 6).tolist()] for name, (colour, y) in curves.items()
        ],
    }  # fmt: skip


def _neighbours_chart(found: Neighbours) -> dict[str, object]:
    counts, edges = histogram(found)
    median = float(np.median(found.distances)) / edges[-1] if len(found.distances) else 0.0
    return {
        "x": [[share, f"{share * edges[-1]:.3g}"] for share in (0, 0.25, 0.5, 0.75, 1)],
        "y": [[0, "0"], [1, f"{counts.max():,}"]],
        "label": "cosine distance to the nearest other row", "bars": (counts / max(counts.max(), 1)).tolist(),
        "curves": [["median", COLOURS[3], [[median, 0], [median, 1]]]] if len(found.distances) else [],
    }  # fmt: skip


def curve(found: Spectrum) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return the components that are drawn, 400 at most, and where they stand between the first, 0, and the last, 1."""
    last = len(found.values) - 1
    places = np.unique(np.linspace(0, last, min(last + 1, MOST_POINTS)).round().astype(np.int64))
    return places, places / max(last, 1)


def histogram(found: Neighbours) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Return counts and edges of the bins between no distance and the largest."""
    distances = found.distances.astype(np.float64)
    counts, edges = np.histogram(distances, BINS, (0.0, max(float(distances.max(initial=0.0)), 1e-6)))
    return counts.astype(np.int64), edges


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
    canvas = FigureCanvasAgg(figure)
    figure.suptitle(f"{drawing.title}\n{drawing.facts}", fontsize=10, parse_math=False)
    painters = {"spectrum": _paint_spectrum, "map": _paint_map, "neighbours": _paint_neighbours}
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for ax, width, (panel, words) in zip(axes, widths, described, strict=True):
        painters[panel](ax, getattr(drawing, panel))
        ax.set_title("\n".join(textwrap.wrap(words, width * 11)), fontsize=8, loc="left", color="#444")
        ax.spines[["top", "right"]].set_visible(False)
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # an emoji in a name is drawn as a box
        canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def _paint_spectrum(ax: Any, found: Spectrum) -> None:
    places, _ = curve(found)
    marker = "o" if len(places) <= BINS else None
    ax.plot(places + 1, found.energy[places], color=COLOURS[0], marker=marker, ms=4, label="cumulative energy")
    relative = found.values[places] / (found.values[0] or 1.0)
    ax.plot(places + 1, relative, color=COLOURS[1], marker=marker, ms=4, label="singular value ÷ the largest")
    ax.set(xlabel="component", ylim=(-0.02, 1.05))
    ax.grid(axis="y", color="#ddd")
    ax.legend(fontsize=8)


def _paint_neighbours(ax: Any, found: Neighbours) -> None:
    counts, edges = histogram(found)
    ax.stairs(counts, edges, fill=True, color=COLOURS[0])
    if len(found.distances):
        ax.axvline(float(np.median(found.distances)), color=COLOURS[3], ls="--", label="median")
        ax.legend(fontsize=8)
    ax.set(xlabel="cosine distance to the nearest other row", ylabel="probes", xlim=(0, edges[-1]))


def _paint_map(ax: Any, shown: RowMap) -> None:
    from matplotlib.lines import Line2D

    coordinates = shown.projection.coordinates
    colours = [COLOURS[members[0] % len(COLOURS)] if members else GREY for members in shown.members]
    size = 6 if len(colours) > 2000 else 14 if len(colours) > 300 else 30
    ax.scatter(*coordinates.T, s=size, c=colours, alpha=0.8, linewidths=0)
    ax.set(aspect="equal", adjustable="datalim", xticks=[], yticks=[])
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
