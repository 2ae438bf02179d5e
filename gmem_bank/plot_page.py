"""How a plot is shown: as an HTML page that needs nothing else and answers the pointer, or as a picture.

What comes from a bank (keys, concepts, its name) enters the page as escaped text or as JSON, never as markup.

Shapes: m rows on the map.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gmem_bank.bank import MemoryBank
from gmem_bank.errors import SourceError
from gmem_bank.progress import Progress

if TYPE_CHECKING:
    from gmem_bank.plot_measures import Neighbours, Projection, Spectrum

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
HINT = "Hover for the key, scroll to zoom, drag to move, double-click to go back. The first concept gives the colour."
PLANE = "<div id=plane><canvas></canvas><div id=legend></div></div><div id=tip hidden></div>"
LEGEND_ENTRIES = 20
THUMBNAIL_SIDE = 64
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1{overflow-wrap:anywhere}main{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem 2rem;
grid-auto-flow:dense}
figure{margin:0;min-width:0}.map{grid-column:1/-1}figcaption{font-size:14px;margin-bottom:.4rem}canvas{width:100%;height:18rem;display:block}
#plane{display:flex;gap:1rem;flex-wrap:wrap}
#plane canvas{flex:1 1 24rem;width:0;height:36rem;border:1px solid #ddd;cursor:crosshair}
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
function make(tag,parent,text=""){const e=document.createElement(tag);e.textContent=text;parent.append(e);return e}
function chart(c,d){ // ticks, bars, curves and their names, all in fractions of the axes
  const g=fit(c),w=c.clientWidth,h=c.clientHeight,X=v=>50+v*(w-70),Y=v=>24+(1-v)*(h-68);
  g.strokeStyle="#ddd";g.fillStyle="#444";
  g.textAlign="right";
  for(const [v,t] of d.y){g.beginPath();g.moveTo(X(0),Y(v));g.lineTo(X(1),Y(v));g.stroke();g.fillText(t,X(0)-6,Y(v)+4)}
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
  function draw(){pending=false;const g=fit(C),s=scale();g.globalAlpha=.75;g.strokeStyle="#000";
    for(let i=0;i<n;i++){if(off.has(first[i]))continue;const [x,y]=place(i,s);g.fillStyle=colour(first[i]);
      g.beginPath();g.arc(x,y,radius,0,7);g.fill()}
    if(hot>=0){const [x,y]=place(hot,s);g.globalAlpha=1;g.lineWidth=2;g.beginPath();g.arc(x,y,radius+2,0,7);g.stroke()}}
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
  C.addEventListener("wheel",e=>{e.preventDefault();const f=Math.exp(-e.deltaY/400);
    const x=e.offsetX-C.clientWidth/2,y=e.offsetY-C.clientHeight/2;
    view.k*=f;view.x=x-(x-view.x)*f;view.y=y-(y-view.y)*f;redraw()},{passive:false});
  const counts=new Map();first.forEach(c=>counts.set(c,(counts.get(c)||0)+1));const boxes=[];
  const kinds=[...counts.keys()].sort((a,b)=>(a<0)-(b<0)||a-b);
  if(kinds.length>1){const all=make("button",el("legend"),"all / none");
    all.onclick=()=>{const on=off.size>0;off.clear();if(!on)kinds.forEach(c=>off.add(c));boxes.forEach(b=>b.checked=on);redraw()}}
  if(kinds.length>1||kinds[0]>=0)for(const c of kinds){const line=make("label",el("legend")),b=make("input",line);
    b.type="checkbox";b.checked=true;boxes.push(b);
    make("i",line).style.background=colour(c);line.append((c<0?"no concept":M.concepts[c])+" ("+counts.get(c)+")");
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
    thumbnails: dict[int, bytes] = field(default_factory=dict)
    """Place on the map → JPEG."""
    num_images: int = 0
    """Rows on the map that came from an image, counted where thumbnails are wanted."""
    num_missing: int = 0
    """Of those, rows whose image is not there, or not readable, any more."""

    def describe(self) -> str:
        """Return in words what is shown."""
        missing = f", {self.num_missing:,} missing or unreadable" if self.num_missing else ""
        images = f" {len(self.thumbnails):,} of {self.num_images:,} images shown{missing}."
        return self.projection.describe() + (images if self.num_images else "")


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


def add_thumbnails(shown: RowMap, bank: MemoryBank, progress: Progress, most: int, gap: float = 0.0) -> None:
    """Read images of rows on the map, `most` at most, `gap` of its extent apart, and count those that are missing."""
    rows = shown.projection.rows
    places = np.flatnonzero(np.isin(rows, bank.image_rows())).tolist()
    there = [place for place in places if _has_image(bank, int(rows[place]))]
    chosen = [there[index] for index in spread(shown.projection.coordinates[there], most, gap)]
    for done, place in enumerate(chosen, 1):
        with contextlib.suppress(SourceError):
            shown.thumbnails[place] = thumbnail(bank.read_image(int(rows[place])))
        progress(done, len(chosen))
    shown.num_images = len(places)
    shown.num_missing = len(places) - len(there) + len(chosen) - len(shown.thumbnails)


def _has_image(bank: MemoryBank, row: int) -> bool:
    try:
        return not len(bank.missing_images(np.array([row])))
    except (SourceError, OSError):  # a key that is no path, or too long for one
        return False


def thumbnail(pixels: NDArray[np.uint8], side: int = THUMBNAIL_SIDE) -> bytes:
    """Return an (H, W, 3) image as a JPEG whose longer side is `side` at most."""
    from PIL import Image

    image, stream = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((side, side))
    image.save(stream, "JPEG", quality=75)
    return stream.getvalue()


def spread(coordinates: NDArray[np.float32], most: int, gap: float = 0.0) -> list[int]:
    """Return positions of up to `most` of (m, 2) points, each the farthest from those before it.

    Args:
        coordinates: (m, 2).
        most: where m is no larger, and no gap is asked for, all are taken.
        gap: stop where the next would be nearer to one of those before it than this share of the extent.
    """
    if (len(coordinates) <= most and not gap) or not len(coordinates):
        return list(range(len(coordinates)))
    points = coordinates.astype(np.float64)
    nearest = np.full(len(points), np.inf)
    chosen = [int(np.square(points - points.mean(axis=0)).sum(axis=1).argmin())]
    limit = (gap * np.ptp(points, axis=0).max()) ** 2
    while len(chosen) < min(most, len(points)):
        nearest = np.minimum(nearest, np.square(points - points[chosen[-1]]).sum(axis=1))
        nearest[chosen] = -1.0  # of equal points each is taken once
        farthest = int(nearest.argmax())
        if gap and nearest[farthest] <= limit:
            break
        chosen.append(farthest)
    return chosen


def draw_page(drawing: Drawing) -> bytes:
    """Return the page in UTF-8."""
    title, figures = html.escape(drawing.title), ""
    data = _data(drawing)
    for panel, words in drawing.described():
        name = HEADINGS[panel]
        chart = f"<canvas data-chart={panel} role=img aria-label='{name}'></canvas>" if panel in data else ""
        hint, picture = (f" {HINT}", PLANE) if panel == "map" else ("", chart)
        caption = f"<figcaption><b>{name}.</b> {html.escape(words)}{hint}</figcaption>"
        figures += f"<figure class={panel}>{caption}{picture}</figure>"
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{title}</title><style>{STYLE}</style>'
        f"<body><h1>{title}</h1><p>{html.escape(drawing.facts)}</p><noscript>The drawings need JavaScript.</noscript>"
        f"<main>{figures}</main><script type=application/json id=data>{_json(data)}</script>"
        f"<script>{SCRIPT}</script></body></html>"
    )
    return page.encode()


def _json(value: object) -> str:
    """Return JSON that cannot end the element it stands in: ASCII, and no "<"."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _data(drawing: Drawing) -> dict[str, Any]:
    """Return what the script draws."""
    data: dict[str, Any] = {"colours": COLOURS, "grey": GREY, **charts(drawing)}
    if (shown := drawing.map) is not None:
        x, y = ([float(f"{value:.6g}") for value in column] for column in shown.projection.coordinates.T.tolist())
        thumbnails = {place: base64.b64encode(jpeg).decode() for place, jpeg in shown.thumbnails.items()}
        words = {"keys": shown.keys, "concepts": shown.concepts, "members": shown.members}
        data["map"] = {"x": x, "y": y, **words, "thumbnails": thumbnails}
    return data


def charts(drawing: Drawing) -> dict[str, Any]:
    """Return panel → chart, where there is something to draw: ticks, heights of bars and curves, all from 0 to 1."""
    found: dict[str, Any] = {}
    if drawing.spectrum is not None and drawing.spectrum.values.any():
        found["spectrum"] = _spectrum_chart(drawing.spectrum)
    if drawing.neighbours is not None and len(drawing.neighbours.distances):
        found["neighbours"] = _neighbours_chart(drawing.neighbours.distances)
    return found


def _spectrum_chart(found: Spectrum) -> dict[str, Any]:
    last = len(found.values) - 1
    places = np.unique(np.linspace(0, last, min(last + 1, MOST_POINTS)).round().astype(np.int64))
    x, relative = places / max(last, 1), found.values / found.values[0]
    curves = {"cumulative energy": found.energy, "singular value ÷ the largest": relative}
    return {
        "x": [[place / max(last, 1), f"{place + 1:,}"] for place in sorted({last * part // 4 for part in range(5)})],
        "y": [[share, f"{share:.0%}"] for share in (0, 0.25, 0.5, 0.75, 1)],
        "label": "component",
        "bars": [],
        "curves": [
            [name, colour, np.round(np.column_stack([x, y[places]]), 6).tolist()]
            for (name, y), colour in zip(curves.items(), COLOURS[:2], strict=True)
        ],
    }


def _neighbours_chart(distances: NDArray[np.float32]) -> dict[str, Any]:
    most = max(float(distances.max()), 1e-6)
    counts, _ = np.histogram(distances.astype(np.float64), BINS, (0.0, most))
    median = float(np.median(distances)) / most
    return {
        "x": [[share, f"{share * most:.3g}"] for share in (0, 0.25, 0.5, 0.75, 1)],
        "y": [[0, "0"], [1, f"{counts.max():,}"]],
        "label": "cosine distance to the nearest other row",
        "bars": np.round(counts / counts.max(), 6).tolist(),
        "curves": [["median", COLOURS[3], [[median, 0], [median, 1]]]],
    }
