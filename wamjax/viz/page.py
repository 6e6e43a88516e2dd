"""Builds a web page in one file: its frame, its style, its parts; it makes no network requests.

It is readable on a phone and in dark mode. Everything written into it is escaped; a policy in its
head keeps a browser from loading anything that is not in the page.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from wamjax import files

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fff; --panel: #f4f5f7;
  --line: #d5d9e0; --accent: #0072b2; --warm: #d55e00; --good: #009e73; --bad: #c8102e;
  --warn: #fff4e0; --fine: #e9f6ea; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --soft: #a0a6b0; --paper: #15181c;
  --panel: #1f242a; --line: #3a414b; --accent: #56b4e9; --warm: #f0954a; --good: #3fc79a;
  --bad: #ff6b78; --warn: #3a2e18; --fine: #17301f; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; } h3 { font-size: 1rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
td, th { padding: .15rem 1rem .15rem 0; vertical-align: top; text-align: left; }
td:first-child { color: var(--soft); } th { color: var(--soft); font-weight: 600; }
table.told td:last-child { min-width: 16rem; color: var(--soft); }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
ul.warnings { background: var(--warn); border-left: 4px solid #e69500; padding: .6rem 2rem; }
p.fine { background: var(--fine); border-left: 4px solid var(--good); padding: .6rem 1rem; }
p.note { color: var(--soft); }
.strip { white-space: nowrap; overflow-x: auto; margin-bottom: .4rem; }
.strip img { height: 6rem; margin-right: 2px; }
.strip span { color: var(--soft); margin-right: .6rem; }
.plots { display: flex; flex-wrap: wrap; gap: .8rem; }
.plots img, .plots video { max-width: 100%; max-height: 34rem; height: auto; background: #fff;
  border-radius: 4px; }
figure { margin: 0; max-width: 100%; } figcaption { font-size: .8rem; color: var(--soft); }
svg { background: var(--panel); } rect { fill: var(--accent); }
polyline { fill: none; stroke-width: 1; }
@media (max-width: 40rem) { body { margin: 1rem auto; padding: 0 .7rem; }
  td, th { padding-right: .6rem; } }
"""
POLICY = ("default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
          "img-src data:; media-src data:")  # fmt: skip
_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".gif": "image/gif", ".mp4": "video/mp4"
}  # fmt: skip


def page(title: str, body: str, style: str = "", script: str = "") -> str:
    """Returns the whole page.

    Args:
      title: title of the browser's tab.
      body: HTML, escaped already.
      style, script: CSS and JavaScript in addition to what every page has.
    """
    end = f"<script>{script}</script>" if script else ""
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body>{body}\n{end}</body></html>\n"
    )


def text(value: Any) -> str:
    """Formats a value as HTML."""
    return html.escape(str(value))


def warnings(texts: Sequence[str]) -> str:
    """Returns a list of warnings, or a line that says there are none."""
    if not texts:
        return "<p class='fine'>no warnings</p>"
    return f"<ul class='warnings'>{''.join(f'<li>{text(t)}</li>' for t in texts)}</ul>"


def table(facts: Mapping[str, Any]) -> str:
    """Returns names and values, one row each."""
    return rows(facts.items())


def rows(lines: Iterable[Sequence[Any]], head: Sequence[str] = (), kind: str = "") -> str:
    """Returns a table with one column per item of a line; it scrolls if it is too wide.

    Args:
      kind: "told" if the last column is a sentence.
    """
    top = f"<tr>{''.join(f'<th>{text(x)}</th>' for x in head)}</tr>" if head else ""
    cells = ("".join(f"<td>{text(x)}</td>" for x in line) for line in lines)
    body = "".join(f"<tr>{line}</tr>" for line in cells)
    return f"<div class='wide'><table class='{kind}'>{top}{body}</table></div>"


def plots(figures: Iterable[str]) -> str:
    """Puts figures side by side, as many as fit."""
    return f"<div class='plots'>{''.join(figures)}</div>"


def picture(x: np.ndarray, alt: str = "", format: str = "jpeg") -> str:
    """Returns an image of uint8 (h, w, 3)."""
    return f"<img alt='{text(alt)}' src='{address(x, format)}'>"


def address(x: np.ndarray, format: str = "png") -> str:
    """Returns a picture, uint8 (h, w, 3) or (h, w), as a data URL."""
    from PIL import Image

    out = io.BytesIO()
    options = {"quality": 85} if format == "jpeg" else {"optimize": True}
    Image.fromarray(x).save(out, format, **options)
    return f"data:image/{format};base64,{base64.b64encode(out.getvalue()).decode()}"


def file(path: files.Path, caption: str) -> str:
    """Returns a figure of a picture or a video, embedded in the page."""
    kind = _TYPES[path.suffix]
    source = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    if kind.startswith("video"):
        shown = f"<video controls loop muted playsinline src='{source}'></video>"
    else:
        shown = f"<img alt='{text(caption)}' src='{source}'>"
    return f"<figure>{shown}<figcaption>{text(caption)}</figcaption></figure>"


def embed(name: str, value: Any) -> str:
    """Embeds data for the scripts of a page, by the id of its element; numbers without JSON form
    are null.

    Nothing in the data can close the element.
    """
    dumped = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)
    safe = dumped.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return f"<script type='application/json' id='{text(name)}'>{safe}</script>"


def embedded(written: str, name: str) -> Any:
    """Returns the data that `embed` put into a page."""
    start = written.index(">", written.index(f"<script type='application/json' id='{name}'")) + 1
    return json.loads(written[start : written.index("</script>", start)])


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
