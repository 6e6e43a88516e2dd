"""Formats the table and draws the pictures of `schemes_video.py`."""

from __future__ import annotations

import pathlib

import numpy as np

from wamjax.scores.video import psnr
from wamjax.viz import figures, sheet
from wamjax.viz.intervals import Interval, student_t

# What a cell of scores.json is called.
CASES = {
    "0": "nothing given",
    "1": "one frame given",
    "2": "two frames given",
    "long": "two given, twice as long",
}
BASELINES = "copying", "held-out clips"
Rows = dict[str, list[dict]]  # scheme -> scores.json of each seed


def text(rows: Rows, bases: dict[str, dict], batch: int) -> str:
    """Formats all tables.

    Args:
      bases: case -> baseline -> its scores.
      batch: number of clips that were timed together.
    """
    parts = [costs(rows)]
    for case, title in CASES.items():
        found = {s: [f[case] for f in runs if case in f] for s, runs in rows.items()}
        parts.append(quality(title, {s: f for s, f in found.items() if f}, bases[case]))
    one = next(iter(rows.values()))[0]
    seeds = sorted({len(found) for found in rows.values()})
    parts.append(
        f"{one['clips']} held-out clips a cell; {seeds} seeds. 95 % intervals: t over seeds; of "
        "one seed, bootstrap over clips. PSNR in dB of the frames that were made. Frechet: "
        "distance of clip features from the training data's. Of clips twice as long both are of "
        f"the second half. Passes of the network, GFLOP and ms are of one clip in batches of "
        f"{batch}."
    )
    return "\n\n".join(parts)


def costs(rows: Rows) -> str:
    """Formats the training cost of each scheme."""
    lines = ["| model | parameters | training TFLOP | minutes |", "|---|---|---|---|"]
    for scheme, found in rows.items():
        work, seconds = (
            float(np.mean([f["training"][key] for f in found])) for key in ("flops", "seconds")
        )
        sizes = f"{found[0]['parameters']:,} | {work / 1e12:.1f} | {seconds / 60:.1f}"
        lines.append(f"| {scheme} | {sizes} |")
    return "\n".join(lines)


def quality(title: str, found: Rows, base: dict[str, dict]) -> str:
    """Formats scores of one way of continuing clips, next to scores without a model."""
    heads = [title, "PSNR", "next frame", "last frame", "Frechet", "passes", "GFLOP", "ms"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, some in {**found, **{b: [base[b]] for b in BASELINES if b in base}}.items():
        cells = [name, *["-"] * 7]
        if "psnr" in some[0]:
            curve = psnr(np.mean([f["mse"] for f in some], axis=0))
            cells[1:4] = across(some, "psnr"), f"{curve[0]:.1f}", f"{curve[-1]:.1f}"
        cells[4] = across(some, "frechet")
        if "passes" in some[0]:
            work, seconds = (np.mean([f[key] for f in some]) for key in ("flops", "seconds"))
            cells[5:] = str(some[0]["passes"]), f"{work / 1e9:.2f}", f"{1e3 * seconds:.1f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def across(found: list[dict], key: str) -> str:
    """Returns a score with its interval: over the seeds, or of the only one."""
    several = [f[key][0] for f in found]
    x = student_t(several) if len(several) > 1 else Interval(*found[0][key])
    return f"{x.mean:.1f} [{x.low:.1f}, {x.high:.1f}]"


def curves(path: pathlib.Path, rows: Rows, bases: dict[str, dict]) -> None:
    """Draws the error by frame, one panel for each case with true futures."""
    cases = [case for case in CASES if "copying" in bases[case]]
    figure = figures.figure(3.7 * len(cases), 3.4)
    panels = figure.subplots(1, len(cases), sharey=True)
    for axes, case in zip(panels, cases, strict=True):
        for color, (scheme, runs) in zip(figures.COLORS, rows.items(), strict=False):
            if some := [f[case] for f in runs if case in f]:
                error = psnr(np.mean([f["mse"] for f in some], axis=0))
                at = some[0]["given"] + np.arange(len(error))
                axes.plot(at, error, color=color, marker=".", lw=1.2, label=scheme)
        base = bases[case]["copying"]
        error = psnr(np.array(base["mse"]))
        at = base["given"] + np.arange(len(error))
        axes.plot(at, error, color=figures.MUTED, ls="--", lw=1, label="copying")
        axes.set_title(CASES[case], fontsize=9, loc="left")
        axes.set(xlabel="frame", ylabel="PSNR, dB" if case == cases[0] else "")
        axes.legend(frameon=False, fontsize=7)
        figures.plain(axes)
    figures.write(figure, path)


def pictures(workdir: pathlib.Path, name: str, truth: np.ndarray, given: dict[str, int]) -> None:
    """Draws the same held-out clips, true and by every scheme.

    Args:
      name: name of the picture: clips, or long for those of twice the length.
      truth: the true clips.
      given: scheme -> number of given frames.
    """
    shown = {"truth": truth}
    for scheme, n in given.items():
        with np.load(min(workdir.glob(f"{scheme}-*/clips.npz"))) as archive:
            shown[f"{scheme}, {n} given"] = archive["long" if name == "long" else str(n)]
    rows = [clips[i] for i in range(len(truth)) for clips in shown.values()]
    sheet.save(np.stack(rows), workdir / f"{name}.png", [*shown] * len(truth))
