"""What a search found, as an HTML page of pictures that needs nothing else.

Keys, concepts and queries enter the page as escaped text. An image is read where the provenance says it is.
"""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gmem_bank.bank import MemoryBank
from gmem_bank.errors import ConfigError, OutputExistsError, SourceError
from gmem_bank.plot_page import thumbnail
from gmem_bank.progress import Progress, no_progress
from gmem_bank.query import Hit, QueryHits
from gmem_bank.storage import atomic

SIDE = 192
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:80rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h1,h2{overflow-wrap:anywhere}ol{list-style:none;margin:0;padding:0;display:grid;gap:1rem;
grid-template-columns:repeat(auto-fill,minmax(12rem,1fr))}li{min-width:0;font-size:14px;overflow-wrap:anywhere}
.picture{height:192px;display:flex;align-items:center;justify-content:center;background:#f3f3f3;color:#777;text-align:center}
img{max-width:100%;max-height:100%}b{font-variant-numeric:tabular-nums}i{color:#666}
"""


DOCTYPE = b"<!doctype html>"


def write_results_page(
    path: str | os.PathLike[str],
    bank: MemoryBank,
    results: Sequence[QueryHits],
    *,
    note: str = "",
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> int:
    """Write the rows that a search found as a page of thumbnails, and return how many of them have an image.

    Args:
        path: the page.
        bank: where the rows are.
        results: from `search`.
        note: a line below the title.
        overwrite: replace what is at `path`.
        progress: told rows looked up and rows in all.

    Raises:
        ConfigError: `path` is not named .html.
        OutputExistsError: something is at `path`, and is no page or not to be overwritten.
        WriteError: the disk refused.
    """
    target = Path(path)
    require_page(target, overwrite)
    rows = sorted({hit.row for result in results for hit in result.hits})
    pictures = _pictures(bank, rows, progress)
    title = html.escape(f"Search in {bank.path.name}")
    sections = "".join(_section(result, pictures) for result in results)
    page = (
        f"{DOCTYPE.decode()}<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f'<meta http-equiv=Content-Security-Policy content="{POLICY}"><title>{title}</title><style>{STYLE}</style>'
        f"<body><h1>{title}</h1><p>{html.escape(note)}</p>{sections}</body></html>"
    )
    atomic.write_bytes(target, page.encode("utf-8", "replace"))
    return sum(isinstance(picture, bytes) for picture in pictures.values())


def require_page(target: Path, overwrite: bool) -> None:
    """Raise unless a page may be written there: named .html, and new or, to be overwritten, a page already."""
    if target.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"{target}: a page of results is named .html", path=target, key="html")
    if not target.exists():
        return
    if not overwrite:
        raise OutputExistsError(f"{target} exists: name another file with --html, or give --overwrite", path=target)
    with target.open("rb") as stream:
        if stream.read(len(DOCTYPE)) != DOCTYPE:
            raise OutputExistsError(f"{target} exists and is no page: name another file with --html", path=target)


def _pictures(bank: MemoryBank, rows: Sequence[int], progress: Progress) -> dict[int, bytes | str]:
    """Return row → JPEG, or why there is none."""
    from_image = set(bank.image_rows().tolist())
    found: dict[int, bytes | str] = {}
    for done, row in enumerate(rows, 1):
        found[row] = _picture(bank, row) if row in from_image else "not from an image"
        progress(done, len(rows))
    return found


def _picture(bank: MemoryBank, row: int) -> bytes | str:
    try:
        if len(bank.missing_images(np.array([row]))):
            return "the image is not where it was"
        return thumbnail(bank.read_image(row), SIDE)
    except (SourceError, OSError):
        return "the image cannot be read"


def _section(result: QueryHits, pictures: dict[int, bytes | str]) -> str:
    hits = "".join(_item(hit, pictures[hit.row]) for hit in result.hits)
    found = f"<p><i>{html.escape(result.skipped)}</i></p>" if result.skipped else f"<ol>{hits}</ol>"
    return f"<section><h2>{html.escape(result.query)}</h2>{found}</section>"


def _item(hit: Hit, picture: bytes | str) -> str:
    key = html.escape(hit.key)
    if isinstance(picture, bytes):
        shown = f"<img alt='' src='data:image/jpeg;base64,{base64.b64encode(picture).decode()}'>"
    else:
        shown = html.escape(picture)
    concepts = html.escape(", ".join(hit.concepts))
    return f"<li><div class=picture>{shown}</div><b>{hit.score:+.4f}</b> {key} <i>{concepts}</i></li>"
