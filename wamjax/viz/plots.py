"""Plots a run's losses and success rates, and the ablation over variants."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from wamjax import files
from wamjax.viz import figures
from wamjax.viz.intervals import Interval, student_t, wilson


def losses(workdir: str | os.PathLike, path: str | os.PathLike | None = None) -> files.Path:
    """Draws every loss of ``metrics.jsonl``, and under them gradient norm and learning rate.

    Thin lines are the recorded values, thick ones a running mean over about 2 % of the run. Marks
    show steps that were skipped because of a non-finite loss.

    Args:
      workdir: folder of the run.
      path: a PNG; ``media/losses.png`` of the run by default.

    Raises:
      ValueError: the run has no metrics, or none with a loss.
    """
    from wamjax.training import metrics

    workdir = files.path(workdir)
    rows = metrics.read(workdir)
    names = sorted({k for row in rows for k in row if k.split("/")[0].startswith("loss")})
    if not names:
        raise ValueError(f"{workdir / metrics.FILE} has no metric that starts with 'loss'")
    extra = [k for k in ("grad_norm", "learning_rate") if any(k in row for row in rows)]
    figure = figures.figure(8, 3.8 + 1.5 * len(extra))
    panels = figure.subplots(1 + len(extra), 1, sharex=True, height_ratios=[2.4, *[1] * len(extra)])
    panels = np.atleast_1d(panels)
    for i, name in enumerate(names):
        _curve(panels[0], rows, name, figures.COLORS[i % len(figures.COLORS)])
    for axes, name in zip(panels[1:], extra, strict=True):
        _curve(axes, rows, name, figures.MUTED, smooth=name != "learning_rate")
        axes.set_ylabel(name.replace("_", " "))
    panels[0].set_ylabel("loss")
    panels[0].legend(frameon=False, fontsize=8)
    for axes in panels:
        _scale(axes, [line.get_ydata() for line in axes.lines])
        figures.plain(axes)
    bad = [row["step"] for row in rows if not np.isfinite(row.get("loss", 0.0))]
    for step in bad:
        panels[0].axvline(step, color=figures.BAD, lw=0.6, alpha=0.5)
    skipped = f"   ({len(bad)} non-finite steps in red)" if bad else ""
    panels[0].set_title(f"{workdir.name}{skipped}", loc="left")
    panels[-1].set_xlabel("step")
    return figures.write(figure, path or workdir / "media" / "losses.png")


def success(result: Mapping[str, Any] | str | os.PathLike, path: str | os.PathLike) -> files.Path:
    """Draws the success rate of each task with its 95 % Wilson interval.

    Args:
      result: eval.json, as a path or its content: "success_rate", "episodes", "per_task" (task ->
        {"success_rate", "episodes"}), and optionally "untrained_success_rate".
      path: a PNG.
    """
    if not isinstance(result, Mapping):
        result = json.loads(files.path(result).read_text())
    rows = [*result["per_task"].items(), ("all tasks", result)]
    figure = figures.figure(7.5, 1.5 + 0.38 * len(rows))
    axes = figure.add_subplot()
    for y, (name, row) in enumerate(rows):
        rate, n = row["success_rate"], row["episodes"]
        interval = wilson(round(rate * n), n)
        colour = figures.MUTED if name == "all tasks" else figures.COLORS[0]
        axes.barh(y, rate, color=colour, height=0.62, alpha=0.85)
        axes.errorbar(rate, y, xerr=_arms(interval), color="#222222", capsize=3, lw=1.2)
        axes.text(1.02, y, f"{100 * rate:.0f} %   n = {n}", va="center", fontsize=8)
    if "untrained_success_rate" in result:
        untrained = result["untrained_success_rate"]
        axes.axvline(untrained, color=figures.BAD, ls="--", lw=1)
        axes.text(untrained, -0.7, f" untrained {untrained:.0%}", color=figures.BAD, fontsize=8)
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -1), xlabel="success rate (95 % Wilson interval)")
    axes.xaxis.set_major_formatter("{x:.0%}")
    said = [f"{k} {result[k]}" for k in ("variant", "mode", "shift", "step") if result.get(k)]
    axes.set_title(", ".join(said), loc="left", fontsize=10)
    figures.plain(axes)
    return figures.write(figure, path)


def ablation(
    table: Mapping[str, Mapping[str, Sequence[float]]],
    path: str | os.PathLike,
    latency: Mapping[str, float] | None = None,
) -> files.Path:
    """Draws success by variant under each condition: bars are means over seeds, dots are seeds.

    Args:
      table: variant -> condition -> success rate of each seed. A missing condition stays empty.
      path: a PNG.
      latency: variant -> milliseconds of one plan (p50), written into the legend.
    """
    conditions = list(dict.fromkeys(c for row in table.values() for c in row))
    figure = figures.figure(max(7.0, 1.2 + 0.3 * len(table) * len(conditions)), 4.2)
    axes = figure.add_subplot()
    width = 0.8 / len(table)
    for i, (variant, row) in enumerate(table.items()):
        speed = f" ({latency[variant]:.0f} ms)" if latency and variant in latency else ""
        colour = figures.COLORS[i % len(figures.COLORS)]
        at = [c for c, name in enumerate(conditions) if name in row]
        x = np.array(at) + (i - (len(table) - 1) / 2) * width
        seeds = [np.asarray(row[conditions[c]], float) for c in at]
        means = [s.mean() for s in seeds]
        axes.bar(x, means, width * 0.9, color=colour, alpha=0.8, label=variant + speed)
        for place, values in zip(x, seeds, strict=True):
            jitter = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
            axes.plot(place + jitter * width, values, ".", color="#222222", ms=3)
            if len(values) > 1:
                interval = student_t(values)
                arms = _arms(interval)
                axes.errorbar(place, interval.mean, arms, color="#222222", capsize=2, lw=1)
    counts = sorted({len(s) for row in table.values() for s in row.values()})
    seeds = "/".join(map(str, counts))
    axes.set_xticks(range(len(conditions)), [c.replace("_", " ") for c in conditions])
    axes.set(ylim=(0, 1), ylabel="success rate")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.legend(frameon=False, fontsize=8, ncols=len(table), loc="lower center",
                bbox_to_anchor=(0.5, 1.0))  # fmt: skip
    note = f"dots: training seeds (n = {seeds}); whiskers: 95 % t interval of the mean, cut to 0..1"
    figure.supxlabel(note, fontsize=8, color=figures.MUTED)
    figures.plain(axes)
    return figures.write(figure, path)


def _curve(axes, rows, name: str, colour: str, smooth: bool = True) -> None:
    points = [(row["step"], row[name]) for row in rows if np.isfinite(row.get(name, np.nan))]
    steps, values = np.array(points, float).reshape(-1, 2).T
    half = len(values) // 100
    if smooth and half:
        axes.plot(steps, values, color=colour, lw=0.5, alpha=0.35)
        # Centred, so that it does not lag; at the ends over what exists.
        at, sums = np.arange(len(values)), np.concatenate([[0], np.cumsum(values)])
        low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
        values = (sums[high] - sums[low]) / (high - low)
    axes.plot(steps, values, color=colour, lw=1.6, label=name)


def _scale(axes, values: Sequence[np.ndarray]) -> None:
    """Chooses a logarithmic scale if the data span more than a factor of 20, else a linear one from
    zero."""
    values = np.concatenate([*values, [np.inf]])
    values = values[np.isfinite(values)]
    if values.size and 0 < 20 * values.min() < values.max():
        axes.set_yscale("log")
    elif values.size and values.min() >= 0:
        axes.set_ylim(bottom=0)


def _arms(interval: Interval) -> np.ndarray:
    """Returns the two arms of an error bar, clipped to valid rates."""
    low, high = max(interval.low, 0.0), min(interval.high, 1.0)
    return np.array([[interval.mean - low], [high - interval.mean]])
