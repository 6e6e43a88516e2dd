"""A data set as one page for a browser: warnings, pictures, histograms, traces; no other file."""

from __future__ import annotations

import base64
import html as escape
from collections import Counter
from collections.abc import Sequence

import numpy as np

from wamjax.data import images
from wamjax.data.examine import Examination

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #222; background: #fff; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
td:first-child { color: #666; white-space: nowrap; }
ul.warnings { background: #fff4e0; border-left: 4px solid #e69500; padding: .6rem 2rem; }
p.fine { background: #e9f6ea; border-left: 4px solid #3a9a45; padding: .6rem 1rem; }
.strip { white-space: nowrap; overflow-x: auto; margin-bottom: .4rem; }
.strip img { height: 6rem; margin-right: 2px; } .strip span { color: #666; margin-right: .6rem; }
.plots { display: flex; flex-wrap: wrap; gap: .8rem; }
figure { margin: 0; } figcaption { font-size: .8rem; color: #444; }
svg { background: #f6f6f6; } rect { fill: #3b6ea5; } polyline { fill: none; stroke-width: 1; }
"""
COLOURS = ("#3b6ea5", "#c8553d", "#4a8f4f", "#8a5aa8", "#c79a2b")
WIDTH, HEIGHT, BINS = 200, 70, 40
TRACES = 5  # episodes


def html(examination: Examination) -> str:
    """The page."""
    info = examination.reader.info
    names = {"proprio": info.proprio_names, "actions": info.action_names}
    parts = [f"<h1>{_text(examination.reader.path)}</h1>", _warnings(examination.warnings),
             _table(examination.facts)]  # fmt: skip
    for camera, rows in examination.pictures.items():
        parts.append(f"<h2>Camera {_text(camera)}: are these upright, and in true colours?</h2>")
        parts += [_strip(number, frames) for number, frames in rows]
    episodes = [e for _, e in examination.episodes]
    for key in ("actions", "proprio") if not info.action_free else ("proprio",):
        x = np.concatenate([getattr(e, key) for e in episodes])
        parts.append(f"<h2>{key}: how often which value</h2>")
        parts.append(_plots(_histogram(column, _name(key, i, names[key]))
                            for i, column in enumerate(x.T)))  # fmt: skip
        parts.append(f"<h2>{key} over time, of {min(TRACES, len(episodes))} episodes</h2>")
        parts.append(_plots(
            _trace([getattr(e, key)[:, i] for e in episodes[:TRACES]], _name(key, i, names[key]))
            for i in range(x.shape[1])
        ))  # fmt: skip
    parts.append("<h2>Steps of the episodes</h2>")
    lengths = examination.reader.lengths.astype(np.float64)
    parts.append(_plots([_histogram(lengths, "steps")]))
    parts.append("<h2>Instructions</h2>")
    parts.append(_instructions([e.instruction for e in episodes]))
    body = "\n".join(parts)
    return (f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>"
            f"{_text(examination.reader.path)}</title><style>{STYLE}</style></head><body>{body}</body>"
            "</html>\n")  # fmt: skip


def _text(value) -> str:
    return escape.escape(str(value))


def _warnings(texts: Sequence[str]) -> str:
    if not texts:
        return "<p class='fine'>no warnings</p>"
    return f"<ul class='warnings'>{''.join(f'<li>{_text(t)}</li>' for t in texts)}</ul>"


def _table(facts) -> str:
    rows = (f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in facts.items())
    return f"<table>{''.join(rows)}</table>"


def _strip(number: int, frames: np.ndarray) -> str:
    """Frames of an episode side by side."""
    tags = []
    for x in frames:
        size = x.shape[:2]
        if size[0] > 160:  # a page of original pictures would be too large
            x = images.resize(x, (160, round(size[1] * 160 / size[0])))
        data = base64.b64encode(images.encode(x, "jpeg", 85)).decode()
        tags.append(f"<img alt='' src='data:image/jpeg;base64,{data}'>")
    return f"<div class='strip'><span>episode {number}</span>{''.join(tags)}</div>"


def _name(key: str, i: int, names: Sequence[str]) -> str:
    return f"{key}[{i}]" + (f" {names[i]}" if i < len(names) else "")


def _plots(figures) -> str:
    return f"<div class='plots'>{''.join(figures)}</div>"


def _figure(inner: str, name: str, low: float, high: float) -> str:
    return (f"<figure><svg width='{WIDTH}' height='{HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}'>"
            f"{inner}</svg><figcaption>{_text(name)}: {low:.4g} to {high:.4g}</figcaption>"
            "</figure>")  # fmt: skip


def _histogram(x: np.ndarray, name: str) -> str:
    low, high = float(x.min()), float(x.max())
    counts, _ = np.histogram(x, BINS, (low, high) if high > low else (low - 0.5, high + 0.5))
    # The root, so that rare values can be seen beside frequent ones.
    tall = np.sqrt(counts / counts.max()) * (HEIGHT - 4)
    wide = WIDTH / BINS
    bars = (f"<rect x='{i * wide:.1f}' y='{HEIGHT - h:.1f}' width='{wide - 0.5:.1f}' "
            f"height='{h:.1f}'/>" for i, h in enumerate(tall) if h)  # fmt: skip
    return _figure("".join(bars), name, low, high)


def _trace(rows: Sequence[np.ndarray], name: str) -> str:
    low, high = float(min(x.min() for x in rows)), float(max(x.max() for x in rows))
    longest = max(max(len(x) for x in rows) - 1, 1)
    lines = []
    for colour, x in zip(COLOURS, rows, strict=False):
        at = np.linspace(0, len(x) - 1, min(len(x), WIDTH)).round().astype(int)
        up = HEIGHT - 2 - (x[at] - low) / max(high - low, 1e-9) * (HEIGHT - 4)
        points = " ".join(f"{WIDTH * t / longest:.1f},{y:.1f}" for t, y in zip(at, up, strict=True))
        lines.append(f"<polyline points='{points}' stroke='{colour}'/>")
    return _figure("".join(lines), name, low, high)


def _instructions(texts: Sequence[str]) -> str:
    rows = Counter(text or "(none)" for text in texts).most_common(200)
    return "".join(f"<div>{count} &times; {_text(text)}</div>" for text, count in rows)
