"""The main ablation on the embedded world: what do co-training and imagining contribute?

    python experiments/ablation_tabletop.py --workdir=runs/ablation
    python experiments/ablation_tabletop.py --workdir=runs/ablation --arg=labelled=64
    python experiments/ablation_tabletop.py --workdir=runs/ablation --table_only

Trains every variant on the same data and budget over several seeds, all from one video model that
is trained first, since the published variants start from one too. Rolls each out in distribution
and under every shift of the world, and prints the article's table: success and latency of each
variant, with 95 % t intervals over seeds, and the difference to `fast`, seed by seed. On one CPU
core: 7 minutes for the video model, 8 to 20 for a training of 3,000 steps, and 1 to 5 to measure it
in 96 episodes. Everything can be resumed, between runs and within each.
"""

from __future__ import annotations

import json
import pathlib

import study
from absl import flags

from wamjax import cli

VARIANTS = ("fast", "joint", "idm", "no_cotrain", "optional_idm")
CONFIG = pathlib.Path(__file__).parent / "configs" / "fast_wam_tabletop.py"


def measure(variant: str, run: pathlib.Path) -> None:
    """Measures every mode of the trained variant under every shift."""
    from wamjax.envs import tabletop
    from wamjax.runs import trained

    for shift in tabletop.SHIFTS:
        study.measure(run, study.modes(variant), lambda how: trained.load(run, **how), shift)


def table(workdir: pathlib.Path) -> str:
    """Collects all rows so far; writes table.json, table.md and a picture; returns the table."""
    from wamjax.envs import tabletop
    from wamjax.viz import plots

    rows: dict[str, dict[str, dict[str, float]]] = {}  # row -> shift -> seed -> success
    latencies: dict[str, list[float]] = {}
    for run in sorted(workdir.glob("*-[0-9]*")):
        by_shift = {shift: study.rows(run, shift) for shift in tabletop.SHIFTS}
        # The table includes a mean over all shifts.
        for name in [n for n in by_shift["none"] if all(n in x for x in by_shift.values())]:
            latencies.setdefault(name, []).append(by_shift["none"][name]["latency_ms"]["p50"])
            for shift, ways in by_shift.items():
                seed = run.name.rsplit("-", 1)[1]
                rows.setdefault(name, {}).setdefault(shift, {})[seed] = ways[name]["success_rate"]
                episodes = ways[name]["episodes"]
    if not rows:
        return "no run has been measured yet"
    shifts = list(next(iter(rows.values())))
    head = "variant", "latency p50 ms", *shifts, "mean", "mean against fast"
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    overall = {
        name: {seed: sum(row[s][seed] for s in shifts) / len(shifts) for seed in row[shifts[0]]}
        for name, row in rows.items()
    }
    for name, row in rows.items():
        columns = [(row[s], episodes) for s in shifts]
        columns.append((overall[name], episodes * len(shifts)))
        cells = [study.interval(list(x.values()), n).percent() for x, n in columns]
        paired = study.by_seed(overall[name], overall.get("fast", {})) if name != "fast" else "-"
        lines.append(
            f"| {name} | {min(latencies[name]):.1f} | " + " | ".join([*cells, paired]) + " |"
        )
    seeds = {len(x) for row in rows.values() for x in row.values()}
    lines.append(f"\nsuccess in % of {episodes} episodes a cell and seed, mean over "
                 f"{sorted(seeds)} seeds with 95 % t interval; a single seed has the Wilson "
                 "interval of its episodes; differences in points, over seeds")  # fmt: skip
    text = "\n".join(lines)
    rates = {name: {s: list(x.values()) for s, x in row.items()} for name, row in rows.items()}
    (workdir / "table.md").write_text(text + "\n")
    (workdir / "table.json").write_text(json.dumps({"rows": rates, "latency": latencies}, indent=2))
    latency = {name: min(values) for name, values in latencies.items()}
    plots.ablation(rates, workdir / "ablation.png", latency)
    return text


def define_flags() -> None:
    """Defines the flags; not on import, since the studies share flag names."""
    study.define_flags("runs/ablation", VARIANTS, "variants", "0,1,2")
    flags.DEFINE_integer("episodes", 192, "episodes for each shift, over all tasks")
    flags.DEFINE_integer("execute", 4, "actions of each plan that are executed")
    flags.DEFINE_integer("pretraining", 2000, "steps of the video model all start from; 0 = none")


def main(argv: list[str]) -> None:
    """Runs the command; flags are parsed."""

    def each(variant: str, seed: str, run: pathlib.Path) -> None:
        start = study.pretrain_video(CONFIG, run.with_name("video"), flags.FLAGS.pretraining)
        study.train(CONFIG, f"variant={variant}", seed, run, *start, "--config.eval.episodes=0")
        measure(variant, run)

    study.run(argv, "variants", each, table)


if __name__ == "__main__":
    cli.run(main, define_flags)
