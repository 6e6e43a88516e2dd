"""Writes the report of a run as one web page, to send to people who do not have the run."""

from __future__ import annotations

import json
import math
import os
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

import wamjax
from wamjax import config as configs
from wamjax import files, wam
from wamjax.training import metrics
from wamjax.viz import page, plots
from wamjax.viz.intervals import wilson

FILE = "report.html"
# First letters of pictures of a run -> what they are; in this order, what is none of them last.
PICTURES = {
    "success": "Success by task",
    "losses": "Losses",
    "samples": "Samples",
    "reconstructions": "Reconstructions",
    "batch": "The first batch, as the network gets it",
    "mask_": "Who sees whom",
}
_DRAWN = (".png", ".jpg", ".gif", ".mp4")


def write(workdir: str | os.PathLike, output: str | os.PathLike | None = None) -> files.Path:
    """Writes the report of a run; returns its path.

    Args:
      workdir: folder of a run, finished or not.
      output: path of the page; report.html of the run by default.

    Raises:
      FileNotFoundError: the run does not exist.
    """
    workdir = files.path(workdir, "--workdir")
    if not (workdir / "config.json").exists():
        raise FileNotFoundError(f"{workdir} has no config.json: give the --workdir of a run")
    path = workdir / FILE if output is None else files.path(output, "--output")
    text = html(workdir)
    files.make_folder(path.parent, "give another --output")
    files.write_text(path, text)
    return path


def html(workdir: files.Path) -> str:
    """Returns the page of a run."""
    config = configs.load(workdir / "config.json")
    rows = metrics.read(workdir)
    results = evaluations(workdir)
    title = f"{files.absolute(workdir).name}: {wam.label(config)}"
    parts = [f"<h1>{page.text(title)}</h1>", page.table(_facts(workdir, config, rows))]
    parts += [part for name, result in results.items() for part in _success(name, result)]
    parts += _media(workdir, rows)
    if rows:
        parts.append("<h2>The last numbers</h2>")
        parts.append(page.rows((k, _number(v)) for k, v in last(rows).items()))
    changed = [(key, _value(base), _value(now), configs.doc(key))
               for key, (base, now) in changes(config).items()]  # fmt: skip
    parts.append(f"<h2>Config: {len(changed)} keys differ from the base</h2>")
    parts.append(page.rows(changed, ("key", "base", "this run", ""), "told"))
    parts.append("<h2>Versions</h2>")
    parts.append(page.table(_versions(results)))
    return page.page(title, "\n".join(parts))


def evaluations(workdir: files.Path) -> dict[str, dict[str, Any]]:
    """Returns the results of a run by file name, eval.json first."""
    paths = sorted(files.glob(workdir, "eval*.json"), key=lambda p: (len(p.stem), p.stem))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def changes(config) -> dict[str, tuple[Any, Any]]:
    """Returns key -> (value of the base config, value of this one), where they differ."""
    base = configs.base_config()
    for name in config.data.sources:  # of a source the base is an empty one
        base.data.sources[name] = configs.source()
    return configs.diff(base, config)


def last(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Returns the newest value of every metric, since some are not in every row."""
    out: dict[str, float] = {}
    for row in rows:
        out |= row
    return out


def _facts(workdir: files.Path, config, rows) -> dict[str, Any]:
    done = workdir / "DONE"
    steps = int(rows[-1]["step"]) if rows else 0
    state = "done" if done.exists() else "not done"
    facts = {
        "method": f"{config.objective.name}, {wam.label(config)}",
        "steps": f"{steps:,} of {config.total_steps:,}, {state}",
        "batch": config.data.batch_size,
        "data": ", ".join(config.data.sources) or config.data.kind,
        "seed": config.seed,
    }
    times = [row["step_time"] for row in rows if math.isfinite(row.get("step_time", math.nan))]
    if times:
        facts["step time"] = f"{1e3 * sorted(times)[len(times) // 2]:,.1f} ms (median)"
    if rows and rows[-1].get("skips"):
        facts["skipped steps"] = f"{rows[-1]['skips']:.0f}, not finite"
    return facts


def _success(name: str, result: Mapping[str, Any]) -> list[str]:
    """Formats one evaluation: rates with their intervals."""
    lines = [("all tasks", *_rate(result))]
    lines += [(task, *_rate(row)) for task, row in result.get("per_task", {}).items()]
    for key, words in (("untrained", "untrained, for comparison"), ("blind", "without looking")):
        if f"{key}_success_rate" in result:
            lines.append((words, f"{100 * result[f'{key}_success_rate']:.1f} %", "", ""))
    said = [f"{k} {result[k]}" for k in ("step", "variant", "mode", "shift", "env") if
            result.get(k) not in (None, "none")]  # fmt: skip
    if "latency_ms" in result:
        ms = result["latency_ms"]
        said.append(f"a plan takes {ms['p50']:.1f} ms (p99 {ms['p99']:.1f})")
    head = ("task", "success", "95 % interval (Wilson)", "episodes")
    return [f"<h2>Success: {page.text(name)}</h2>", f"<p>{page.text(', '.join(said))}</p>",
            page.rows(lines, head)]  # fmt: skip


def _rate(row: Mapping[str, Any]) -> tuple[str, str, int]:
    rate, count = row["success_rate"], row["episodes"]
    interval = wilson(round(rate * count), count)
    ends = f"{100 * interval.low:.1f} to {100 * interval.high:.1f} %"
    return f"{100 * rate:.1f} %", ends, count


def _media(workdir: files.Path, rows) -> list[str]:
    """Returns videos first, then pictures in the order of `PICTURES`."""
    left = [p for p in sorted(files.glob(workdir / "media", "*")) if p.suffix in _DRAWN]
    parts = []
    videos = [p for p in left if p.suffix in (".mp4", ".gif")]
    if videos:
        parts += ["<h2>Videos</h2>", page.plots(page.file(p, p.stem) for p in videos)]
    left = [p for p in left if p not in videos]
    for start, title in PICTURES.items():
        chosen = [p for p in left if p.stem.startswith(start)]
        figures = [page.file(p, p.stem) for p in chosen]
        if start == "losses" and not chosen and rows:  # a run that is not done has none yet
            figures = [_losses(workdir)]
        left = [p for p in left if p not in chosen]
        if figures:
            parts += [f"<h2>{title}</h2>", page.plots(figures)]
    if left:
        parts += ["<h2>Pictures</h2>", page.plots(page.file(p, p.stem) for p in left)]
    return parts


def _losses(workdir: files.Path) -> str:
    with tempfile.TemporaryDirectory() as folder:
        drawn = plots.losses(workdir, pathlib.Path(folder) / "losses.png")
        return page.file(drawn, "losses so far")


def _versions(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    out = {}
    for name, result in results.items():
        versions = result.get("versions", {})
        if versions:
            out[name] = ", ".join(f"{k} {v}" for k, v in versions.items())
    return out | {"this page": f"wamjax {wamjax.__version__}, jax {jax.__version__}"}


def _number(value: float) -> str:
    return f"{value:.6g}"


def _value(value: Any) -> str:
    return "" if value is configs.ABSENT else repr(value)
