"""Writes a data set as one HTML page without other files: warnings, pictures, histograms,
traces."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from wamjax.data import images
from wamjax.data.examine import Examination
from wamjax.viz import page

COLOURS = ("#3b6ea5", "#c8553d", "#4a8f4f", "#8a5aa8", "#c79a2b")
WIDTH, HEIGHT, BINS = 200, 70, 40
TRACES = 5  # episodes


def html(examination: Examination) -> str:
    """Returns the page."""
    info = examination.reader.info
    names = {"proprio": info.proprio_names, "actions": info.action_names}
    parts = [f"<h1>{page.text(examination.reader.path)}</h1>", page.warnings(examination.warnings),
             page.table(examination.facts)]  # fmt: skip
    for camera, rows in examination.pictures.items():
        name = page.text(camera)
        parts.append(f"<h2>Camera {name}: are these upright, and in true colours?</h2>")
        parts += [_strip(number, frames) for number, frames in rows]
    episodes = [e for _, e in examination.episodes]
    for key in ("actions", "proprio") if not info.action_free else ("proprio",):
        x = np.concatenate([getattr(e, key) for e in episodes])
        parts.append(f"<h2>{key}: how often which value</h2>")
        parts.append(page.plots(_histogram(column, _name(key, i, names[key]))
                            for i, column in enumerate(x.T)))  # fmt: skip
        parts.append(f"<h2>{key} over time, of {min(TRACES, len(episodes))} episodes</h2>")
        parts.append(page.plots(
            _trace([getattr(e, key)[:, i] for e in episodes[:TRACES]], _name(key, i, names[key]))
            for i in range(x.shape[1])
        ))  # fmt: skip
    parts.append("<h2>Steps of the episodes</h2>")
    lengths = examination.reader.lengths.astype(np.float64)
    parts.append(page.plots([_histogram(lengths, "steps")]))
    parts.append("<h2>Instructions</h2>")
    parts.append(_instructions([e.instruction for e in episodes]))
    return page.page(str(examination.reader.path), "\n".join(parts))


def _strip(number: int, frames: np.ndarray) -> str:
    """Puts frames of an episode side by side."""
    tags = []
    for x in frames:
        size = x.shape[:2]
        if size[0] > 160:  # a page of original pictures would be too large
            x = images.resize(x, (160, round(size[1] * 160 / size[0])))
        tags.append(page.picture(x))
    return f"<div class='strip'><span>episode {number}</span>{''.join(tags)}</div>"


def _name(key: str, i: int, names: Sequence[str]) -> str:
    return f"{key}[{i}]" + (f" {names[i]}" if i < len(names) else "")


def _figure(inner: str, name: str, low: float, high: float) -> str:
    return (f"<figure><svg width='{WIDTH}' height='{HEIGHT}' viewBox='0 0 {WIDTH} {HEIGHT}'>"
            f"{inner}</svg><figcaption>{page.text(name)}: {low:.4g} to {high:.4g}</figcaption>"
            "</figure>")  # fmt: skip


def _histogram(x: np.ndarray, name: str) -> str:
    low, high = float(x.min()), float(x.max())
    counts, _ = np.histogram(x, BINS, (low, high) if high > low else (low - 0.5, high + 0.5))
    # Square root, so that rare values are visible next to frequent ones.
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
    return "".join(f"<div>{count} &times; {page.text(text)}</div>" for text, count in rows)
